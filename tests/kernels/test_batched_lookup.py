"""The batched lookup against its reference and against sums written out in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.kernels.batched_lookup import reference
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup
from dmt_compile.runtime.tables import Block, ShardedTable
from tests._tolerances import error
from tests.models import dense_of

ROWS, WIDTHS = (50, 7, 1), (8, 3, 16)
MODES = ["sum", "mean", "max"]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


# --------------------------------------------------------------------------------------- what else a lookup may ask for


def assert_same_gradient(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that two gradients are bitwise the same, row by row where they are sparse."""
    assert mine.layout == theirs.layout
    if mine.layout == torch.sparse_coo:
        assert torch.equal(mine._indices(), theirs._indices())
        assert torch.equal(mine._values(), theirs._values())
    else:
        assert torch.equal(mine, theirs)


def one_by_one(table: torch.Tensor, samples: int = 127) -> torch.Tensor:
    """Return ids of which many occur several times."""
    return torch.randint(0, len(table), (samples,), generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("samples", [0, 1, 127])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_id_a_bag_is_an_embedding(samples: int, sparse: bool, padding_idx: int | None, scaled: bool) -> None:
    tables, ids, offsets = features(samples)
    scaled = scaled and not sparse  # PyTorch has no such sparse gradient
    how = Pooling("none", sparse, padding_idx, padding_counts=True, scale_grad_by_freq=scaled)
    ids[1] = one_by_one(tables[1], samples)
    pooling = (Pooling("sum", False), how)
    arguments = tables[:2], ids[:2], [offsets[0], None], pooling
    out, expected = batched_lookup(*arguments, samples), reference.batched_lookup(*arguments)
    assert torch.equal(out, expected)
    assert torch.equal(out[:, WIDTHS[0] :], tables[1][ids[1]])  # the padding row as well
    for mine, theirs in zip(gradients(out, tables[:2]), gradients(expected, tables[:2]), strict=True):
        assert_same_gradient(mine, theirs)
    if scaled:
        plain = pooling[0], how._replace(scale_grad_by_freq=False)
        (unscaled,) = gradients(batched_lookup(*arguments[:3], plain, samples), tables[1:2])
        often = ids[1].bincount(minlength=len(tables[1])).clamp(min=1)
        torch.testing.assert_close(mine, unscaled / often[:, None])


class Bags(TorchDispatchMode):
    """Counts how often ids are read as bags."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.aten._embedding_bag.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("how", "starts", "bags"),
    [
        (Pooling("sum", True), range(127), 0),
        (Pooling("mean", True), range(127), 0),
        (Pooling("sum", True), [0, *range(126)], 1),  # as many bags as ids, the first one empty
        (Pooling("mean", True), [*range(126), 127], 1),
        (Pooling("sum", True, padding_idx=2), range(127), 1),
        (Pooling("sum", True, scale_grad_by_freq=True), range(127), 1),
        (Pooling("sum", False), range(127), 1),
        (Pooling("max", False), range(127), 1),
    ],
)
def test_bags_of_one_id_are_read_as_rows(how: Pooling, starts: Sequence[int], bags: int, id_dtype: torch.dtype) -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.randint(0, 9, (127,), generator=torch.Generator().manual_seed(1)).to(id_dtype)
    offsets = torch.tensor(starts, dtype=id_dtype)
    with Bags() as counted:
        mine = batched_lookup([table], [ids], [offsets], (how,), 127)
    assert counted.times == bags
    if how.scale_grad_by_freq and how.sparse:
        return  # PyTorch has no such gradient
    theirs = torch.nn.functional.embedding_bag(
        ids, table, offsets, mode=how.mode, sparse=how.sparse, padding_idx=how.padding_idx
    )
    assert torch.equal(mine, theirs)
    assert_same_gradient(*(gradients(out, [table])[0] for out in (mine, theirs)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_padding_row_that_counts_has_no_gradient(mode: str, sparse: bool) -> None:
    tables, ids, offsets = features(127)
    sparse = sparse and mode != "max"
    padded = (Pooling(mode, sparse, 3, padding_counts=True),)
    out = batched_lookup(tables[:1], ids[:1], offsets[:1], padded, 127)
    assert torch.equal(out, reference.batched_lookup(tables[:1], ids[:1], offsets[:1], (Pooling(mode, sparse),)))
    expected = reference.batched_lookup(tables[:1], ids[:1], offsets[:1], padded)
    assert torch.equal(out, expected)
    (mine,), (theirs,) = gradients(out, tables[:1]), gradients(expected, tables[:1])
    assert error(dense_of(mine, mine), dense_of(theirs, theirs)) < 1e-6  # the reference sums over two products
    assert (ids[0] == 3).any()
    assert not dense_of(mine, mine)[3].any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("samples", [0, 1, 127])
def test_weighted_bags(sparse: bool, counts: bool, padding_idx: int | None, samples: int) -> None:
    tables, ids, offsets = features(samples)
    how = (Pooling("sum", sparse, padding_idx, counts), Pooling("mean", sparse))
    weights = torch.randn(len(ids[0]), generator=torch.Generator().manual_seed(5), requires_grad=True)
    arguments = tables[:2], ids[:2], offsets[:2], how
    out = batched_lookup(*arguments, samples, [weights, None])
    expected = reference.batched_lookup(*arguments, [weights, None])
    assert torch.equal(out, expected)
    both = [weights, *tables[:2]]
    (mine, *of_tables), (theirs, *of_theirs) = gradients(out, both), gradients(expected, both)
    assert error(mine, theirs) < 1e-6  # another order of the sum over columns
    if padding_idx is not None and not counts:
        assert not mine[ids[0] == padding_idx].any()
    for found, reference_s in zip(of_tables, of_theirs, strict=True):
        assert error(dense_of(found, found), dense_of(reference_s, reference_s)) < 1e-6


def test_frozen_weights_and_frozen_tables_of_weighted_bags() -> None:
    tables, ids, offsets = features(20)
    weights = torch.rand(len(ids[0]), requires_grad=True)
    tables[0].requires_grad_(False)
    batched_lookup(tables[:1], ids[:1], offsets[:1], (Pooling("sum", False),), 20, [weights]).sum().backward()
    torch.testing.assert_close(weights.grad, tables[0][ids[0]].sum(1))
    assert tables[0].grad is None
    tables[0].requires_grad_(True)
    batched_lookup(tables[:1], ids[:1], offsets[:1], (Pooling("sum", False),), 20, [weights.detach()]).sum().backward()
    expected = torch.zeros_like(tables[0]).index_add(0, ids[0], weights.detach()[:, None].expand(-1, WIDTHS[0]))
    torch.testing.assert_close(tables[0].grad, expected)


@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_scales_the_looked_up_rows_of_the_table(mode: str, norm_type: float) -> None:
    tables, ids, offsets = features(20)
    mine, theirs = (tables[0].detach().clone().requires_grad_() for _ in range(2))
    how = (Pooling(mode, False, max_norm=1.5, norm_type=norm_type),)
    starts = None if mode == "none" else offsets[0]
    bags = len(ids[0]) if mode == "none" else 20
    out = batched_lookup([mine], ids[:1], [starts], how, bags)
    expected = reference.batched_lookup([theirs], ids[:1], [starts], how)
    assert torch.equal(out, expected)
    assert torch.equal(mine, theirs)
    changed = (mine != tables[0]).any(1)
    assert changed.any()
    assert set(changed.nonzero()[:, 0].tolist()) <= set(ids[0].tolist())
    norms = torch.linalg.vector_norm(mine.detach()[ids[0]], norm_type, dim=1)
    assert norms.max() <= 1.5 + 1e-5
    assert all(map(torch.equal, gradients(out, [mine]), gradients(expected, [theirs])))


def test_max_norm_in_a_block_changes_this_rank_s_rows() -> None:
    flat = 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    shard, ids = sharded(flat, (10, 30), (0, 8)), torch.tensor([12, 29, 12])
    how = (Pooling("none", False, max_norm=1.0),)
    out = batched_lookup([shard], [ids], [None], how, 3)
    assert torch.equal(out, reference.batched_lookup([flat], [ids], [None], how))
    assert torch.equal(shard.local, flat[10:30])


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_scaled_by_frequency(mode: str) -> None:
    """PyTorch's own numbers, whatever it counts."""
    tables, ids, offsets = features(127)
    plain, scaled = ((Pooling(mode, False, scale_grad_by_freq=by),) for by in (False, True))
    out = batched_lookup(tables[:1], ids[:1], offsets[:1], scaled, 127)
    expected = reference.batched_lookup(tables[:1], ids[:1], offsets[:1], scaled)
    assert torch.equal(out, expected)
    (mine,), (theirs,) = gradients(out, tables[:1]), gradients(expected, tables[:1])
    assert torch.equal(mine, theirs)
    (unscaled,) = gradients(reference.batched_lookup(tables[:1], ids[:1], offsets[:1], plain), tables[:1])
    assert not torch.equal(mine, unscaled)


@pytest.mark.parametrize(
    ("dtypes", "promoted"),
    [
        ((torch.float32, torch.float64), torch.float64),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
    ],
)
def test_element_types_are_promoted_and_gradients_stay(
    dtypes: tuple[torch.dtype, torch.dtype], promoted: torch.dtype
) -> None:
    tables, ids, offsets = features(20)
    mixed = [table.detach().to(dtype).requires_grad_() for table, dtype in zip(tables, dtypes, strict=False)]
    pooling = (Pooling("sum", False), Pooling("mean", False))
    out = batched_lookup(mixed, ids[:2], offsets[:2], pooling, 20)
    assert out.dtype == promoted
    alone = [
        reference.batched_lookup([t], [i], [o], [p]) for t, i, o, p in zip(mixed, ids, offsets, pooling, strict=False)
    ]
    assert torch.equal(out, torch.cat(alone, dim=1))
    out.sum().backward()
    expected = torch.autograd.grad([part.sum() for part in alone], mixed)
    assert [table.grad.dtype for table in mixed] == list(dtypes)
    assert all(torch.equal(table.grad, theirs) for table, theirs in zip(mixed, expected, strict=True))


def test_second_derivatives_are_refused() -> None:
    tables, ids, offsets = features(5)
    out = batched_lookup(tables, ids, offsets, (Pooling("sum", False),) * 3, 5)
    with pytest.raises(UnsupportedGraphError, match=r"batched_lookup: expected a first derivative, found create_graph"):
        torch.autograd.grad(out.square().sum(), tables, create_graph=True)
    torch.autograd.grad(out.square().sum(), tables)  # the first one is still there


# -------------------------------------------------------------------------------------------------- fields of one table

FIELDS = ((0, 20), (20, 23), (23, 50))


def field_ids(samples: int = 127) -> list[torch.Tensor]:
    """Return one id a sample in each field, in rows of the whole table."""
    generator = torch.Generator().manual_seed(samples)
    return [torch.randint(first, end, (samples,), generator=generator) for first, end in FIELDS]


def as_fields(how: Pooling) -> tuple[Pooling, ...]:
    return tuple(how._replace(field_rows=rows) for rows in FIELDS)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 21, 49])
def test_fields_give_their_table_one_gradient(sparse: bool, padding_idx: int | None) -> None:
    table, ids = features(127)[0][0], field_ids()
    how = Pooling("none", sparse, padding_idx, padding_counts=True)
    out = batched_lookup([table] * 3, ids, [None] * 3, as_fields(how), 127)
    rows = torch.nn.functional.embedding(torch.stack(ids, dim=1), table, padding_idx, sparse=sparse)
    assert torch.equal(out, rows.flatten(1))
    (mine,), (theirs,) = gradients(out, [table]), gradients(rows.flatten(1), [table])
    assert mine.layout == theirs.layout
    assert torch.equal(dense_of(mine, mine), dense_of(theirs, theirs))


def test_two_lookups_of_the_same_fields_each_have_a_gradient() -> None:
    """One of them pads row 21, the other does not: their rows are summed apart, as those of two eager lookups."""
    table, ids = features(127)[0][0], field_ids()
    hows = Pooling("none", False, 21, padding_counts=True), Pooling("none", False)
    pooling = (*as_fields(hows[0]), *as_fields(hows[1]))
    out = batched_lookup([table] * 6, [*ids, *ids], [None] * 6, pooling, 127)
    matrix = torch.stack(ids, dim=1)
    rows = torch.cat([torch.nn.functional.embedding(matrix, table, h.padding_idx).flatten(1) for h in hows], dim=1)
    assert torch.equal(out, rows)
    assert all(map(torch.equal, gradients(out, [table]), gradients(rows, [table])))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 21, 30])
def test_a_block_of_several_fields_holds_their_rows_alone(sparse: bool, padding_idx: int | None) -> None:
    """This rank has the outer two fields; row 21 is another rank's, and 30 stands elsewhere in this rank's rows."""
    flat, ids = features(127)[0][0], field_ids()
    block = Block("emb", (FIELDS[0], FIELDS[2]), (0, 8))
    shard = ShardedTable(block.cut(flat.detach()).clone().requires_grad_(), flat.shape, block)
    pooling = as_fields(Pooling("none", sparse, padding_idx, padding_counts=True))
    out = batched_lookup([shard] * 3, [ids[0], None, ids[2]], [None] * 3, pooling, 127)
    expected = reference.batched_lookup([flat] * 2, [ids[0], ids[2]], [None] * 2, [pooling[0], pooling[2]])
    assert torch.equal(out, expected)
    (mine,), (theirs,) = gradients(out, [shard]), gradients(expected, [flat])
    assert mine.shape == flat.shape
    if sparse:
        assert torch.equal(mine.to_dense(), theirs.to_dense())
    else:
        assert isinstance(mine, ShardedTable)
        assert mine.block == block
        assert torch.equal(mine.local, block.cut(theirs))


# ------------------------------------------------------------------------------------------------------ sharded tables


def sharded(table: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> ShardedTable:
    block = Block("emb", (rows,), columns)
    return ShardedTable(block.cut(table.detach()).clone().requires_grad_(), table.shape, block)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 50), (0, 8)), ((10, 30), (0, 8)), ((0, 50), (2, 5))], ids=["whole", "rows", "columns"]
)
def test_a_block_is_read_with_its_local_ids(rows: tuple[int, int], columns: tuple[int, int], sparse: bool) -> None:
    tables, ids, offsets = features(127)
    table = tables[0]
    flat_ids, starts = ids[0].remainder(rows[1] - rows[0]) + rows[0], offsets[0]
    shard = sharded(table, rows, columns)
    pooling = (Pooling("sum", sparse, padding_idx=rows[0] + 2),)
    out = batched_lookup([shard], [flat_ids], [starts], pooling, 127)
    flat = reference.batched_lookup([table], [flat_ids], [starts], pooling)
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
