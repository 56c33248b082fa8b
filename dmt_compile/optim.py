"""Optimizers for embedding tables that PyTorch does not have.

Shape suffixes: R rows of a table, D its width, U distinct rows of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.kernels.update_rows import reference
from dmt_compile.kernels.update_rows.reference import Hyper
from dmt_compile.runtime.tables import Block, ShardedTable, local_of, local_sparse

__all__ = ["RowWiseAdagrad"]


class RowWiseAdagrad(torch.optim.Optimizer):
    r"""Adagrad with one accumulator for each row of a table, which takes 1 / D of Adagrad's memory.

    For each row w of a table, with gradient g of D elements:

        sum <- sum + (g_1^2 + ... + g_D^2) / D
        w   <- w - lr / (sqrt(sum) + eps) * g

    A row without gradient stays as it is, so sparse and dense gradients give the same. The accumulator is float32, or
    float64 for tables of that type; rows narrower than float32 are updated in float32 and rounded once. On several
    ranks each keeps the accumulators of its own rows.

    Args:
        params: tables, (R, D); or groups of them.
        lr: learning rate.
        eps: keeps the divisor of a row's first steps from zero.
        initial_accumulator_value: of all accumulators.
        stochastic_rounding: round rows narrower than float32 up or down at random, right on average: steps smaller
            than half the distance between neighbours then count, which else leave a row where it is.
        seed: of the random numbers, which also depend on step, row and column.

    Raises:
        ConfigError: a number is out of its range, or a parameter is no table.

    Source: FBGEMM's ``EXACT_ROWWISE_ADAGRAD``, without weight decay: that would move rows which no batch looks up.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        for name in ("lr", "eps", "initial_accumulator_value"):
            if not defaults[name] >= 0:
                raise ConfigError(f"RowWiseAdagrad: expected {name} of 0 or more, found {defaults[name]}")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables with hyperparameters of their own."""
        super().add_param_group(param_group)
        for table in self.param_groups[-1]["params"]:
            if table.ndim != 2 or not table.is_floating_point():
                raise ConfigError(
                    f"RowWiseAdagrad: expected tables of rows, found a parameter of shape {tuple(table.shape)} and "
                    f"type {table.dtype}; give it to another optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step and return what ``closure``, called first with gradients on, gave.

        Raises:
            UnsupportedGraphError: a rank holds some columns of a table's rows only.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(group, table, table.grad)
        return loss

    def _step(self, group: dict[str, Any], table: torch.Tensor, grad: torch.Tensor) -> None:
        state = self.state_of(group, table)
        state["step"] += 1
        local_RD, sums_R1 = local_of(table), local_of(state["sum"])
        hyper = hyper_of(group, state)
        if grad.layout == torch.sparse_coo:
            grad = grad.coalesce()
            grad = local_sparse(grad, table.block) if isinstance(table, ShardedTable) else grad
            rows_U, grads_UD = grad.indices()[0], grad.values()
            reference.update_rows("row_wise_adagrad", local_RD, [sums_R1], rows_U, grads_UD, hyper)
        else:
            wide = reference.wide_type(local_RD)
            new_RD, new_sums_R1 = reference.row_wise_adagrad(
                local_RD.to(wide), local_of(grad).to(wide), [sums_R1], hyper
            )
            rows_R = torch.arange(len(local_RD), device=local_RD.device)
            local_RD.copy_(reference.rounded(new_RD, local_RD.dtype, rows_R, hyper))
            sums_R1.copy_(new_sums_R1)

    def state_of(self, group: dict[str, Any], table: torch.Tensor) -> dict[str, Any]:
        """Return a table's state: number of steps, and ``sum`` (R, 1), of this rank's rows where it is sharded.

        Raises:
            UnsupportedGraphError: see :meth:`step`.
        """
        if isinstance(table, ShardedTable) and table.block.columns != (0, table.shape[1]):
            first, end = table.block.columns
            raise UnsupportedGraphError(
                f"RowWiseAdagrad: expected whole rows of table {table.block.name} on this rank, found columns {first} "
                f"to {end} of {table.shape[1]}, whose squares are not all of the row's mean; plan the table without "
                "column ranges, or give it to Adagrad"
            )
        state: dict[str, Any] = self.state[table]
        if not state:
            local_RD = local_of(table)
            wide = reference.wide_type(local_RD)
            sums_R1 = local_RD.new_full((len(local_RD), 1), group["initial_accumulator_value"], dtype=wide)
            state["step"] = 0
            state["sum"] = _of_rows(sums_R1, table)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` gave; accumulators of a whole table are cut down to this rank's rows."""
        super().load_state_dict(dict(state_dict))
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for key, table in zip(saved, tables, strict=True):
            state = state_dict["state"].get(key)
            if state:  # PyTorch has rounded the accumulators to the table's type
                sums_R1 = state["sum"].to(table.device, reference.wide_type(local_of(table)), copy=True)
                self.state[table]["sum"] = _of_rows(sums_R1, table)


def hyper_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> Hyper:
    """Return the numbers of a table's present step."""
    rounding, seed = group["stochastic_rounding"], group["seed"]
    return Hyper(float(group["lr"]), state["step"], group["eps"], stochastic_rounding=rounding, seed=seed)


def _of_rows(sums: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return accumulators as a part of a sharded table, as they are for a whole one."""
    if not isinstance(table, ShardedTable) or isinstance(sums, ShardedTable):
        return sums
    of_rows = Block(table.block.name, table.block.rows, (0, 1), table.block.model)
    local_R1 = sums if sums.shape == of_rows.shape else of_rows.cut(sums).clone()
    return ShardedTable(local_R1, (table.shape[0], 1), of_rows)
