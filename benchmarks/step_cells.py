"""Cells that train tables: forward, backward and row-wise Adagrad in one; and the update of given rows alone.

Shape suffixes: B bags, R rows, U distinct rows, D width of a table, W sum of the widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from chosen import chosen
from fbgemm_tables import table_batched
from kernel_cells import TYPES, Contestant, Cost, NotHere, Work, inductors, kernel_of, largest_error, normal
from lookup_cells import fbgemm_lookups
from lookup_data import ID_BYTES, Data, Lookups, draw, most_frequent, summed_gradient
from torch import nn

from dmt_compile.tolerances import reordered_limit

STATE_BYTES = 4
LR, EPS = 1.0, 1e-8  # so large that what the step changes, not what was there, makes the new rows
SCALE = 0.1  # of the tables' first values, for the same reason


def step_cost(size: Lookups, ids: int, distinct: int) -> Cost:
    """Return the cost of a step: rows and their state read and written once, no gradient of rows stored."""
    row = size.width * size.element_bytes
    joined = size.tables * size.bags * row
    # The backward pass reads ids, bags and rows again: what the forward pass read of them is more than a cache holds.
    besides = 2 * (ids + size.tables * size.bags) * ID_BYTES + 2 * joined + 2 * distinct * STATE_BYTES
    return Cost(besides + 3 * distinct * row, 2 * ids * size.width, None, besides + (2 * ids + 2 * distinct) * row)


def update_cost(rows: int, width: int, element_bytes: int) -> Cost:
    """Return the cost of an update: gradients and row numbers read, rows and state read and written."""
    return Cost(rows * (3 * width * element_bytes + ID_BYTES + 2 * STATE_BYTES), 6 * rows * width)


def stepped(rows_UD: torch.Tensor, grads_UD: torch.Tensor) -> torch.Tensor:
    """Return rows after the first step of row-wise Adagrad, float64."""
    grads_UD = grads_UD.double()
    return rows_UD.double() - LR * grads_UD / (grads_UD.square().mean(1, keepdim=True).sqrt() + EPS)


def row_wise_adagrad() -> type[torch.optim.Optimizer]:
    """Return our optimizer.

    Raises:
        NotHere: it is not in this version.
    """
    try:
        from dmt_compile.optim import RowWiseAdagrad
    except ImportError as error:
        raise NotHere(f"not here: {error}") from error
    return RowWiseAdagrad


class Tables(nn.Module):
    """Bags of all tables side by side, over the given tables and not copies of them."""

    def __init__(self, tables: list[torch.Tensor]) -> None:
        super().__init__()
        self.emb = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", sparse=True) for table in tables
        )

    def forward(self, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        """Return (B, W)."""
        return torch.cat([table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)], dim=1)


@dataclass(frozen=True)
class TableStep:
    """A whole step of the tables; contestants train the same tables in turn, each with state of its own.

    Sparse gradients do not pass through Inductor.
    """

    size: Lookups
    unit: None = None

    @property
    def name(self) -> str:
        """See :class:`Lookups`."""
        return f"table-step-{self.size.name}"

    def tiny(self) -> TableStep:
        """See :class:`Lookups`."""
        return replace(self, size=self.size.tiny())

    def make(self, device: torch.device) -> Work:
        """Draw tables, ids and the output's gradient."""
        size, data = self.size, draw(self.size, device, SCALE)
        grad_BW = normal(device, size.bags, size.tables * size.width, dtype=TYPES[size.dtype])

        def eager() -> Contestant:
            model = Tables(data.tables)
            optimizer = row_wise_adagrad()(model.parameters(), lr=LR, eps=EPS)

            def run() -> None:
                model(data.ids, data.offsets).backward(grad_BW)
                optimizer.step()
                optimizer.zero_grad()

            return Contestant(run, outcome_of(run, data.tables, data))

        def dmt() -> Contestant:
            from torch.distributed.optim import _apply_optimizer_in_backward

            model = Tables(data.tables)
            _apply_optimizer_in_backward(row_wise_adagrad(), model.parameters(), {"lr": LR, "eps": EPS})
            dumps = TemporaryDirectory()
            call = torch.compile(model, backend="dmt", options={"dump_dir": dumps.name})

            def run() -> None:
                call(data.ids, data.offsets).backward(grad_BW)

            def told() -> str:
                with dumps:
                    return chosen(Path(dumps.name))

            return Contestant(run, outcome_of(run, data.tables, data), told)

        def fbgemm() -> Contestant:
            module = table_batched(data, "EXACT_ROWWISE_ADAGRAD", LR, EPS)
            look_up = fbgemm_lookups(data, module)

            def run() -> None:
                look_up().backward(grad_BW)

            return Contestant(run, outcome_of(run, [w.detach() for w in module.split_embedding_weights()], data))

        makers = {"eager": eager, "fbgemm": fbgemm, "dmt": dmt}
        limit = reordered_limit(TYPES[size.dtype], most_frequent(data.ids), gradient=True)

        def error(rows: list[torch.Tensor]) -> float:
            worst = 0.0
            each = zip(rows, data.tables, grad_BW.split(size.width, dim=1), data.ids, data.offsets, strict=True)
            for rows_UD, table, grad_BD, ids, offsets in each:
                distinct_U, summed_UD = summed_gradient(grad_BD, ids, offsets)
                worst = max(worst, largest_error([rows_UD], [stepped(table[distinct_U], summed_UD)], limit))
            return worst

        return Work(step_cost(size, data.id_count, data.distinct_count()), makers, error)


def outcome_of(run: Callable[[], None], tables: list[torch.Tensor], data: Data) -> Callable[[], list[torch.Tensor]]:
    """Return a function that runs, returns what became of the rows that ids name, and puts the rows back."""

    def outcome() -> list[torch.Tensor]:
        rows = [ids.unique() for ids in data.ids]
        before = [table[rows_U] for table, rows_U in zip(tables, rows, strict=True)]
        run()
        after = [table[rows_U] for table, rows_U in zip(tables, rows, strict=True)]
        for table, rows_U, old_UD in zip(tables, rows, before, strict=True):
            table[rows_U] = old_UD
        return after

    return outcome


@dataclass(frozen=True)
class UpdateRows:
    """Row-wise Adagrad on ``rows`` distinct rows, a quarter of the table's."""

    rows: int = 2_000_000
    width: int = 128
    dtype: str = "fp32"
    unit: None = None

    @property
    def name(self) -> str:
        """Rows x width and type."""
        return f"update-rows-{self.rows}x{self.width}-{self.dtype}"

    def tiny(self) -> UpdateRows:
        """Return the same for Triton's interpreter."""
        return replace(self, rows=11, width=24)

    def make(self, device: torch.device) -> Work:
        """Draw table, rows and gradients."""
        dtype = TYPES[self.dtype]
        table = normal(device, 4 * self.rows, self.width, seed=1).mul_(SCALE).to(dtype)
        generator = torch.Generator(device).manual_seed(2)
        rows_U = torch.randperm(len(table), device=device, generator=generator)[: self.rows].sort().values
        grads_UD = normal(device, self.rows, self.width, dtype=dtype)
        expected_UD = stepped(table[rows_U], grads_UD)

        def of(update: Callable[..., None], *how: str) -> Contestant:
            from dmt_compile.kernels.update_rows.reference import Hyper

            state_R1 = torch.zeros(len(table), 1, device=device)

            def run() -> None:
                update("row_wise_adagrad", table, [state_R1], rows_U, grads_UD, Hyper(LR, 1, EPS), *how)

            def outcome() -> torch.Tensor:
                before_UD = table[rows_U]
                run()
                after_UD = table[rows_U]
                table[rows_U] = before_UD
                return after_UD

            return Contestant(run, outcome)

        def inductor(compile_: Callable[[Any], Any]) -> Contestant:
            kernel_of("update_rows")
            from dmt_compile.kernels.update_rows import reference

            return of(compile_(reference.update_rows))

        def eager() -> Contestant:
            kernel_of("update_rows")
            from dmt_compile.kernels.update_rows import reference

            return of(reference.update_rows)

        makers = {
            "eager": eager,
            **inductors(inductor),
            "dmt": lambda: of(kernel_of("update_rows"), "triton"),
        }
        limit = reordered_limit(dtype, self.width, gradient=True)
        return Work(
            update_cost(self.rows, self.width, dtype.itemsize),
            makers,
            lambda rows_UD: largest_error([rows_UD], [expected_UD], limit),
        )
