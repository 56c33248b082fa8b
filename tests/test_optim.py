"""Row-wise Adagrad against its formula in double precision, on whole and on sharded tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.ir.embedding_graph import Table
from dmt_compile.optim import RowWiseAdagrad
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.runtime.sharding import shard_tables
from dmt_compile.runtime.tables import Block, ShardedTable, flat_sparse
from dmt_compile.topology import Topology
from tests._tolerances import error

ROWS, DIM, STEPS = 12, 6, 4
BLOCKS = {
    "whole": Block("emb", ((0, ROWS),), (0, DIM)),
    "rows": Block("emb", ((3, 9),), (0, DIM)),
    "ranges": Block("emb", ((1, 3), (6, 7), (9, 10)), (0, DIM)),
    "empty": Block("emb", ((0, 0),), (0, DIM)),
}


def written_out(table: torch.Tensor, grads: list[torch.Tensor], lr: float, eps: float, start: float) -> torch.Tensor:
    """Return the table after the steps, element by element in double precision."""
    weights, sums = table.double().tolist(), [start] * len(table)
    for grad in grads:
        for row, values in enumerate(grad.double().tolist()):
            sums[row] += sum(value * value for value in values) / len(values)
            factor = lr / (sums[row] ** 0.5 + eps) if any(values) else 0.0
            weights[row] = [w - factor * g for w, g in zip(weights[row], values, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)


def draw(rows: int = ROWS, dim: int = DIM) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Return a table, sparse gradients in which rows repeat, and the same as dense ones."""
    generator = torch.Generator().manual_seed(rows * dim)
    sparse = []
    for _ in range(STEPS):
        ids = torch.randint(0, rows, (1, max(rows // 2, 2)), generator=generator)
        values = torch.randn(ids.shape[1], dim, dtype=torch.float64, generator=generator)
        sparse.append(torch.sparse_coo_tensor(ids, values, (rows, dim), check_invariants=False))
    return (
        torch.randn(rows, dim, dtype=torch.float64, generator=generator),
        sparse,
        [grad.to_dense() for grad in sparse],
    )


def trained(table: torch.Tensor, grads: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, RowWiseAdagrad]:
    parameter = nn.Parameter(table.clone())
    optimizer = RowWiseAdagrad([parameter], **options)
    for grad in grads:
        parameter.grad = grad.to(table.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return parameter.detach(), optimizer


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (12, 6), (127, 13)])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("eps", "start"), [(1e-10, 0.0), (1e-3, 0.5)])
def test_the_formula_in_double_precision(rows: int, dim: int, sparse: bool, eps: float, start: float) -> None:
    table, of_ids, dense = draw(rows, dim)
    oracle = written_out(table, dense, 0.1, eps, start)
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        grads = of_ids if sparse else dense
        found, optimizer = trained(table.to(dtype), grads, lr=0.1, eps=eps, initial_accumulator_value=start)
        assert found.dtype == dtype
        assert error(found, oracle) <= limit
        [state] = optimizer.state.values()
        assert (state["step"], state["sum"].shape, state["sum"].dtype) == (STEPS, (rows, 1), dtype)


def test_sparse_gradients_move_rows_as_dense_ones_do_and_no_others() -> None:
    table, sparse, dense = draw(50, 8)
    (mine, _), (theirs, _) = trained(table, sparse[:1]), trained(table, dense[:1])
    assert torch.equal(mine, theirs)
    untouched = [row for row in range(50) if row not in sparse[0]._indices()[0].tolist()]
    assert untouched
    assert torch.equal(mine[untouched], table[untouched])
    assert not torch.equal(mine, table)


def test_parameters_without_gradient_and_closures() -> None:
    table, _, dense = draw()
    first, second = nn.Parameter(table.clone()), nn.Parameter(table.clone())
    optimizer = RowWiseAdagrad([{"params": [first]}, {"params": [second], "lr": 0.5}])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (second * dense[0]).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (table * dense[0]).sum()
    assert torch.equal(first, table)
    assert torch.equal(second, trained(table, dense[:1], lr=0.5)[0])
    assert list(optimizer.state) == [second]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_state_dict(dtype: torch.dtype) -> None:
    table, _, dense = draw()
    table = table.to(dtype)
    expected, _ = trained(table, dense, lr=0.1)
    half, saving = trained(table, dense[:2], lr=0.1)
    parameter = nn.Parameter(half.clone())
    loading = RowWiseAdagrad([parameter])
    loading.load_state_dict(saving.state_dict())
    for grad in dense[2:]:
        parameter.grad = grad.to(dtype)
        loading.step()
    assert loading.state[parameter]["sum"].dtype == torch.float32
    assert torch.equal(parameter, expected)


def test_stochastic_rounding_counts_steps_smaller_than_a_bfloat16_can_tell_apart() -> None:
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    options = {"lr": 1e-4, "initial_accumulator_value": 1e6, "eps": 0.0}
    grads = [torch.full((64, 64), 1e3)] * 8  # each step about 7e-5 and less; below 1 numbers are 4e-3 apart
    assert torch.equal(trained(ones, grads, **options)[0], ones)
    found, _ = trained(ones, grads, stochastic_rounding=True, **options)
    exact, _ = trained(ones.float(), grads, **options)
    moved = (1 - found.float()).mean()
    assert abs(moved - (1 - exact).mean()) < 5 * (0.004 * float(moved) / found.numel()) ** 0.5
    assert torch.equal(found, trained(ones, grads, stochastic_rounding=True, **options)[0])
    assert not torch.equal(found, trained(ones, grads, stochastic_rounding=True, seed=1, **options)[0])


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_shard_is_trained_as_its_part_of_the_whole(block: Block, sparse: bool) -> None:
    table, of_ids, dense = draw()
    expected, whole = trained(table, dense, lr=0.1)
    sharded = nn.Parameter(ShardedTable(block.cut(table).clone(), table.shape, block))
    optimizer = RowWiseAdagrad([sharded], lr=0.1)
    for grad, gradient in zip(dense, of_ids, strict=True):
        if sparse:
            own = gradient.coalesce()
            mine = [i for i, row in enumerate(own.indices()[0]) if any(a <= row < b for a, b in block.rows)]
            rows_U = block.to_local(own.indices()[0][mine])
            sharded.grad = flat_sparse(rows_U, own.values()[mine], table.shape, block)
        else:
            sharded.grad = ShardedTable(block.cut(grad).clone(), table.shape, block)  # type: ignore[assignment]
        optimizer.step()
    assert torch.equal(cast(ShardedTable, sharded).local, block.cut(expected))
    state = optimizer.state[sharded]["sum"]
    assert (state.shape, state.local.shape) == ((ROWS, 1), (block.shape[0], 1))
    [sums] = [of_whole["sum"] for of_whole in whole.state.values()]
    rows = torch.cat([torch.arange(first, end) for first, end in block.rows])
    assert torch.equal(state.local, sums[rows])
    loaded = RowWiseAdagrad([sharded])
    for given in (optimizer.state_dict(), whole.state_dict()):
        loaded.load_state_dict(given)
        assert torch.equal(loaded.state[sharded]["sum"].local, sums[rows])


def test_some_columns_of_a_row_are_refused() -> None:
    block = Block("emb.3", ((0, ROWS),), (2, 5))
    sharded = nn.Parameter(ShardedTable(torch.zeros(ROWS, 3), (ROWS, DIM), block))
    sharded.grad = ShardedTable(torch.zeros(ROWS, 3), (ROWS, DIM), block)  # type: ignore[assignment]
    with pytest.raises(
        UnsupportedGraphError, match=r"whole rows of table emb\.3 on this rank, found columns 2 to 5 of 6"
    ):
        RowWiseAdagrad([sharded]).step()


def test_state_made_before_sharding_is_cut_down() -> None:
    table, _, dense = draw()
    parameter = nn.Parameter(table.clone())
    optimizer = RowWiseAdagrad([parameter], lr=0.1)
    parameter.grad = dense[0]
    optimizer.step()
    parameter.grad = None
    sums = optimizer.state[parameter]["sum"].clone()
    plan = TowerPlan(
        topology=Topology(1, 2),
        tables=(TableSpec("emb", ROWS, DIM),),
        towers=(Tower("tower0", ("emb",), (0,), DIM),),
        placements={"emb": (Shard(0, (0, 5), (0, DIM)), Shard(1, (5, ROWS), (0, DIM)))},
    )
    world = SimpleNamespace(rank=0, device=torch.device("cpu"), move=lambda *_: None)
    shard_tables([Table("emb", "emb", ROWS, DIM, table.dtype, parameter)], plan, cast(Any, world), model=None)
    state = optimizer.state[parameter]["sum"]
    assert isinstance(state, ShardedTable)
    assert torch.equal(state.local, sums[:5])
    parameter.grad = ShardedTable(dense[1][:5].clone(), table.shape, cast(ShardedTable, parameter).block)  # type: ignore[assignment]
    optimizer.step()
    assert torch.equal(cast(ShardedTable, parameter).local, trained(table, dense[:2], lr=0.1)[0][:5])


@pytest.mark.parametrize("option", ["lr", "eps", "initial_accumulator_value"])
def test_numbers_out_of_range(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected {option} of 0 or more, found -1"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(2, 2))], **{option: -1})


def test_what_is_no_table() -> None:
    with pytest.raises(ConfigError, match=r"expected tables of rows, found a parameter of shape \(3,\)"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(3))])
