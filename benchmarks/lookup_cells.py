"""Cells of the batched lookup: its forward pass, and its backward pass into sparse gradients.

Shape suffixes: B bags, N ids, U distinct rows, D width of a table, W sum of the widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fbgemm_tables import table_batched
from kernel_cells import (
    TYPES,
    Contestant,
    Cost,
    NotHere,
    Work,
    inductors,
    kernel_of,
    largest_error,
    normal,
    pulled_back,
)
from lookup_data import ID_BYTES, Data, Lookups, draw, most_frequent, pooled, summed_gradient
from torch.nn import functional as F

from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.tolerances import reordered_limit

MOST_COMPILED = 50  # Inductor takes minutes for many lookups, and leaves each to the operator of eager PyTorch


def forward_cost(size: Lookups, ids: int, distinct: int) -> Cost:
    """Return the cost of all sums: ids, offsets and rows read, the joined output written."""
    row = size.width * size.element_bytes
    besides = ids * ID_BYTES + size.tables * size.bags * (ID_BYTES + row)
    return Cost(besides + distinct * row, ids * size.width, None, besides + ids * row)


def backward_cost(size: Lookups, ids: int, distinct: int) -> Cost:
    """Return the cost of summed sparse gradients: the output's gradient and the ids read, a value a row written."""
    row = size.width * size.element_bytes
    written = ids * ID_BYTES + size.tables * size.bags * ID_BYTES + distinct * (ID_BYTES + row)
    return Cost(written + size.tables * size.bags * row, ids * size.width, None, written + ids * row)


def eager_lookups(
    tables: Sequence[torch.Tensor], ids: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor], sparse: bool = False
) -> torch.Tensor:
    """Return all sums side by side, as a model asks for them."""
    each = zip(tables, ids, offsets, strict=True)
    return torch.cat([F.embedding_bag(i, table, o, mode="sum", sparse=sparse) for table, i, o in each], dim=1)


def dmt_lookups(data: Data, size: Lookups, sparse: bool = False) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Return the batched lookup as a function of the tables.

    Raises:
        NotHere: the kernel is not in this version.
    """
    batched, pooling = kernel_of("batched_lookup"), (Pooling("sum", sparse),) * size.tables
    return lambda tables: batched(tables, data.ids, data.offsets, pooling, size.bags, kernel="triton")


def fbgemm_lookups(data: Data, module: Any) -> Callable[[], torch.Tensor]:
    """Return FBGEMM's lookup of the same ids."""
    ids_N, offsets = data.joined()
    return lambda: module(ids_N, offsets)


@dataclass(frozen=True)
class LookupForward:
    """The forward pass alone."""

    size: Lookups
    unit: None = None

    @property
    def name(self) -> str:
        """See :class:`Lookups`."""
        return f"lookup-{self.size.name}"

    def tiny(self) -> LookupForward:
        """See :class:`Lookups`."""
        return replace(self, size=self.size.tiny())

    def make(self, device: torch.device) -> Work:
        """Draw tables and ids."""
        size, data = self.size, draw(self.size, device)

        def of(function: Callable[..., torch.Tensor], *args: Any) -> Contestant:
            def run() -> torch.Tensor:
                with torch.no_grad():
                    return function(*args)

            return Contestant(run)

        def inductor(compile_: Callable[[Any], Any]) -> Contestant:
            if size.tables > MOST_COMPILED:
                raise NotHere(f"takes minutes to compile more than {MOST_COMPILED} lookups")
            return of(compile_(eager_lookups), data.tables, data.ids, data.offsets)

        makers = {
            "eager": lambda: of(eager_lookups, data.tables, data.ids, data.offsets),
            **inductors(inductor),
            "fbgemm": lambda: of(fbgemm_lookups(data, table_batched(data))),
            "dmt": lambda: of(dmt_lookups(data, size), data.tables),
        }
        limit = reordered_limit(TYPES[size.dtype], 2 * size.pooling)

        def error(out_BW: torch.Tensor) -> float:
            columns = out_BW.split(size.width, dim=1)
            each = zip(columns, data.tables, data.ids, data.offsets, strict=True)
            return max(largest_error([mine], [pooled(*read)], limit) for mine, *read in each)

        return Work(forward_cost(size, data.id_count, data.distinct_count()), makers, error)


@dataclass(frozen=True)
class LookupBackward:
    """The backward pass alone, to gradients summed by row, which every optimizer but SGD asks for first.

    Sparse gradients do not pass through Inductor, and FBGEMM has no backward pass without an update.
    """

    size: Lookups
    unit: None = None

    @property
    def name(self) -> str:
        """See :class:`Lookups`."""
        return f"lookup-bwd-{self.size.name}"

    def tiny(self) -> LookupBackward:
        """See :class:`Lookups`."""
        return replace(self, size=self.size.tiny())

    def make(self, device: torch.device) -> Work:
        """Draw tables, ids and the output's gradient."""
        size, data = self.size, draw(self.size, device)
        tables = [table.requires_grad_() for table in data.tables]
        grad_BW = normal(device, size.bags, size.tables * size.width, dtype=TYPES[size.dtype])

        def of(out_BW: torch.Tensor) -> Contestant:
            back = pulled_back(out_BW, tables, grad_BW).run
            return Contestant(lambda: [grad.coalesce() for grad in back()])

        makers = {
            "eager": lambda: of(eager_lookups(tables, data.ids, data.offsets, sparse=True)),
            "dmt": lambda: of(dmt_lookups(data, size, sparse=True)(tables)),
        }
        limit = reordered_limit(TYPES[size.dtype], most_frequent(data.ids), gradient=True)

        def error(grads: list[torch.Tensor]) -> float:
            worst = 0.0
            each = zip(grads, grad_BW.split(size.width, dim=1), data.ids, data.offsets, strict=True)
            for grad, grad_BD, ids, offsets in each:
                rows_U, summed_UD = summed_gradient(grad_BD, ids, offsets)
                if not torch.equal(grad.indices()[0], rows_U):
                    return float("inf")
                worst = max(worst, largest_error([grad.values()], [summed_UD], limit))
            return worst

        return Work(backward_cost(size, data.id_count, data.distinct_count()), makers, error)
