"""The batched lookup against its reference and against sums written out in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmt_compile.kernels.batched_lookup import reference
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup
from dmt_compile.runtime.tables import Block, ShardedTable
from tests._tolerances import error
from tests.models import dense_of

ROWS, WIDTHS = (50, 7, 1), (8, 3, 16)
MODES = ["sum", "mean", "max"]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that what the operator does not write shows."""
    new_empty: Callable[..., torch.Tensor] = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *sizes: Any, **options: Any) -> torch.Tensor:
        made = new_empty(tensor, *sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def features(
    samples: int, dtype: torch.dtype = torch.float32, id_dtype: torch.dtype = torch.int64, longest: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return tables, ids and offsets of ragged bags, empty ones among them."""
    generator = torch.Generator().manual_seed(samples)
    tables, ids, offsets = [], [], []
    for rows, width in zip(ROWS, WIDTHS, strict=True):
        tables.append(torch.randn(rows, width, dtype=dtype, generator=generator).requires_grad_())
        lengths = torch.randint(0, longest + 1, (samples,), generator=generator)
        ids.append(torch.randint(0, rows, (int(lengths.sum()),), generator=generator).to(id_dtype))
        offsets.append((lengths.cumsum(0) - lengths).to(id_dtype))
    return tables, ids, offsets


def written_out(table: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, how: Pooling) -> torch.Tensor:
    """Return the pooled bags in double precision, one bag after the other."""
    ends = [*offsets.tolist()[1:], len(ids)]
    bags = []
    for start, end in zip(offsets.tolist(), ends, strict=True):
        rows = table.double()[[i for i in ids[start:end].tolist() if i != how.padding_idx]]
        if not len(rows):
            bags.append(table.new_zeros(table.shape[1], dtype=torch.float64))
        else:
            bags.append(rows.amax(0) if how.mode == "max" else rows.sum(0) if how.mode == "sum" else rows.mean(0))
    return torch.stack(bags)


def gradients(out: torch.Tensor, tables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tables' gradients for a fixed weighting of the outputs."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), tables, materialize_grads=True))


@pytest.mark.parametrize("samples", [1, 127, 1000])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_bit_for_bit(samples: int, sparse: bool, dtype: torch.dtype) -> None:
    tables, ids, offsets = features(samples, dtype)
    modes = ["sum", "mean", "sum"] if sparse else MODES  # PyTorch has no sparse gradient of a maximum
    pooling = tuple(Pooling(mode, sparse) for mode in modes)
    out = batched_lookup(tables, ids, offsets, pooling, samples)
    expected = reference.batched_lookup(tables, ids, offsets, pooling)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    for mine, theirs in zip(gradients(out, tables), gradients(expected, tables), strict=True):
        assert mine.layout == theirs.layout == (torch.sparse_coo if sparse else torch.strided)
        assert torch.equal(dense_of(mine, mine), dense_of(theirs, theirs))
        if sparse:
            assert torch.equal(mine._indices(), theirs._indices())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("samples", [1, 127])
def test_the_sums_in_double_precision(mode: str, padding_idx: int | None, samples: int) -> None:
    tables, ids, offsets = features(samples)
    pooling = (Pooling(mode, False, padding_idx),) * 3
    oracle = torch.cat(
        [written_out(t, i, o, p) for t, i, o, p in zip(tables, ids, offsets, pooling, strict=True)], dim=1
    )
    out = batched_lookup(tables, ids, offsets, pooling, samples)
    theirs = reference.batched_lookup(tables, ids, offsets, pooling)
    assert error(out.detach(), oracle.detach()) <= 2 * error(theirs.detach(), oracle.detach())
    found, of_reference = gradients(out, tables), gradients(theirs, tables)
    for mine, their, exact in zip(found, of_reference, gradients(oracle, tables), strict=True):
        assert error(mine, exact) <= max(2 * error(their, exact), 1e-6)
        if padding_idx is not None:
            assert not mine[padding_idx].any()


def test_int32_ids() -> None:
    tables, ids, offsets = features(127, id_dtype=torch.int32)
    pooling = tuple(Pooling(mode, False) for mode in MODES)
    out = batched_lookup(tables, ids, offsets, pooling, 127)
    wide = batched_lookup(tables, [i.long() for i in ids], [o.long() for o in offsets], pooling, 127)
    assert torch.equal(out, wide)
    assert all(map(torch.equal, gradients(out, tables), gradients(wide, tables)))


def test_ids_and_offsets_that_are_not_contiguous() -> None:
    tables, ids, offsets = features(127)
    pooling = (Pooling("sum", False),) * 3
    strided = [torch.stack([t, t + 1], dim=1)[:, 0] for t in ids]
    strided_offsets = [torch.stack([t, t + 1], dim=1)[:, 0] for t in offsets]
    assert not strided[0].is_contiguous()
    out = batched_lookup(tables, strided, strided_offsets, pooling, 127)
    expected = reference.batched_lookup(tables, ids, offsets, pooling)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gradients(out, tables), gradients(expected, tables)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("samples", [0, 1, 5])
def test_empty_bags_are_zero(mode: str, samples: int) -> None:
    tables, ids, offsets = features(samples, longest=0)
    out = batched_lookup(tables, ids, offsets, (Pooling(mode, False),) * 3, samples)
    assert torch.equal(out, torch.zeros(samples, sum(WIDTHS)))
    assert not any(gradient.any() for gradient in gradients(out, tables))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_a_shared_table_add_up(sparse: bool) -> None:
    tables, ids, offsets = features(127, torch.float64)
    shared = [tables[1], tables[1]]
    ids, offsets = [ids[1], ids[1].flip(0)], [offsets[1], offsets[1]]
    pooling = (Pooling("sum", sparse), Pooling("mean", sparse))
    (mine,) = gradients(batched_lookup(shared, ids, offsets, pooling, 127), shared[:1])
    (theirs,) = gradients(reference.batched_lookup(shared, ids, offsets, pooling), shared[:1])
    assert torch.equal(dense_of(mine, mine), dense_of(theirs, theirs))


def test_a_frozen_table_gets_no_gradient() -> None:
    tables, ids, offsets = features(5)
    tables[1].requires_grad_(False)
    batched_lookup(tables, ids, offsets, (Pooling("sum", False),) * 3, 5).sum().backward()
    assert [table.grad is None for table in tables] == [False, True, False]


# ------------------------------------------------------------------------------------------------------ sharded tables


def sharded(table: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> ShardedTable:
    block = Block("emb", rows, columns)
    return ShardedTable(block.cut(table.detach()).clone().requires_grad_(), table.shape, block)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 50), (0, 8)), ((10, 30), (0, 8)), ((0, 50), (2, 5))], ids=["whole", "rows", "columns"]
)
def test_a_block_is_read_with_its_local_ids(rows: tuple[int, int], columns: tuple[int, int], sparse: bool) -> None:
    tables, ids, offsets = features(127)
    table = tables[0]
    local_ids, starts = ids[0].remainder(rows[1] - rows[0]), offsets[0]
    shard = sharded(table, rows, columns)
    pooling = (Pooling("sum", sparse),)
    out = batched_lookup([shard], [local_ids], [starts], pooling, 127)
    flat = reference.batched_lookup([table], [local_ids + rows[0]], [starts], pooling)
    assert torch.equal(out, flat[:, columns[0] : columns[1]])
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (mine,) = torch.autograd.grad((out * weights).sum(), [shard])
    (theirs,) = torch.autograd.grad((flat[:, columns[0] : columns[1]] * weights).sum(), [table])
    assert mine.shape == table.shape
    if sparse:
        assert torch.equal(mine.to_dense(), theirs.to_dense())
    else:
        assert isinstance(mine, ShardedTable)
        assert mine.block == shard.block
        assert torch.equal(mine.local, shard.block.cut(theirs))


def test_a_rank_writes_the_columns_that_it_owns() -> None:
    tables, ids, offsets = features(127)
    shards: list[torch.Tensor] = [
        sharded(tables[0], (0, 50), (0, 8)),
        sharded(tables[1], (0, 0), (0, 0)),  # another rank's
        sharded(tables[2], (0, 1), (0, 16)),
    ]
    pooling = (Pooling("sum", False),) * 3
    out = batched_lookup(shards, [ids[0], None, ids[2]], [offsets[0], None, offsets[2]], pooling, 127)
    expected = reference.batched_lookup(tables, ids, offsets, pooling)
    assert torch.equal(out, torch.cat([expected[:, :8], expected[:, 11:]], dim=1))
    out.sum().backward()
    assert [shard.grad is None for shard in shards] == [False, True, False]


def test_a_rank_that_owns_nothing_takes_part_in_the_backward_pass() -> None:
    tables, _, _ = features(5)
    shards = [sharded(table, (0, 0), (0, 0)) for table in tables]
    out = batched_lookup(shards, [None] * 3, [None] * 3, (Pooling("sum", False),) * 3, 5)
    assert out.shape == (5, 0)
    assert out.requires_grad
    out.sum().backward()
    assert all(shard.grad is None for shard in shards)
