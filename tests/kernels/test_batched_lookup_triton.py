"""The batched lookup's Triton kernels against the reference and against sums in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.kernels.batched_lookup import features as lookup_features
from dmt_compile.kernels.batched_lookup import reference
from dmt_compile.kernels.batched_lookup.features import Feature
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup
from dmt_compile.kernels.batched_lookup.support import supports
from dmt_compile.runtime.tables import Block, ShardedTable
from dmt_compile.torch_internals import FakeTensorMode
from tests._tolerances import error
from tests.models import dense_of

pytest.importorskip("triton")
from dmt_compile.kernels.batched_lookup.triton_distinct import DistinctRows, Group, distinct_gradients
from dmt_compile.kernels.batched_lookup.triton_look_up import look_up

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS, WIDTHS = (50, 7, 1), (8, 3, 16)
MODES = ("sum", "mean", "max")


class Batch:
    """Tables, ids and offsets of ragged bags, empty ones among them."""

    def __init__(
        self, device: torch.device, samples: int, dtype: torch.dtype = torch.float32, longest: int = 3,
        widths: Sequence[int] = WIDTHS, id_dtype: torch.dtype = torch.int64,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(samples + longest)
        self.samples = samples
        self.tables, self.ids, self.offsets, self.weights = [], [], [], []
        for rows, width in zip(ROWS, widths, strict=True):
            table = torch.randn(rows, width, generator=generator).to(device, dtype)
            lengths = torch.randint(0, longest + 1, (samples,), generator=generator)
            number = int(lengths.sum())
            self.tables.append(table.requires_grad_())
            self.ids.append(torch.randint(0, rows, (number,), generator=generator).to(device, id_dtype))
            self.offsets.append((lengths.cumsum(0) - lengths).to(device, id_dtype))
            self.weights.append(torch.randn(number, generator=generator).to(device, dtype).requires_grad_())

    def inputs(self, weighted: Sequence[bool], double: bool = False) -> list[torch.Tensor]:
        """Return the weights that are used, then the tables."""
        used = [w for w, yes in zip(self.weights, weighted, strict=True) if yes] + self.tables
        return [t.detach().double().requires_grad_() for t in used] if double else used


def results(
    batch: Batch, pooling: tuple[Pooling, ...], weighted: Sequence[bool], how: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output and all gradients: of the kernels, of the reference, or in double precision."""
    inputs = batch.inputs(weighted, double=how == "double")
    given = iter(inputs)
    weights = [next(given) if yes else None for yes in weighted]
    tables = list(given)
    if how == "triton":
        out = batched_lookup(tables, batch.ids, batch.offsets, pooling, batch.samples, weights, "triton")
    else:
        out = reference.batched_lookup(tables, batch.ids, batch.offsets, pooling, weights)
    # Powers of two: exact in every type, so that all gradients start from the same numbers.
    factors = torch.exp2(torch.arange(out.numel(), device=out.device) % 5 - 2).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, inputs, factors)
    return out.detach(), [dense_of(g, t) for g, t in zip(found, inputs, strict=True)]


def assert_as_good_as_the_reference(batch: Batch, pooling: tuple[Pooling, ...], weighted: Sequence[bool]) -> None:
    """Assert errors at most twice those of the reference, or half a step of the type where that has none."""
    assert supports(batch.tables, batch.ids, batch.offsets, pooling, None) is None
    mine, theirs, exact = (results(batch, pooling, weighted, how) for how in ("triton", "reference", "double"))
    step = torch.finfo(mine[0].dtype).eps
    assert mine[0].dtype == theirs[0].dtype
    pairs = zip([mine[0], *mine[1]], [theirs[0], *theirs[1]], [exact[0], *exact[1]], strict=True)
    for position, (found, their, oracle) in enumerate(pairs):
        assert found.shape == oracle.shape
        if found.numel():
            assert error(found, oracle) <= max(2 * error(their, oracle), step), position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("samples", [1, 127])
def test_modes_and_types(device: torch.device, dtype: torch.dtype, id_dtype: torch.dtype, samples: int) -> None:
    batch = Batch(device, samples, dtype, id_dtype=id_dtype)
    pooling = tuple(Pooling(mode, False) for mode in MODES)
    assert_as_good_as_the_reference(batch, pooling, [True, False, False])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_padding(device: torch.device, mode: str, padding_idx: int | None) -> None:
    batch = Batch(device, 40)
    for counts in (False, True):
        pooling = (Pooling(mode, False, padding_idx, padding_counts=counts),) * 3
        assert_as_good_as_the_reference(batch, pooling, [mode == "sum"] * 3)


def test_a_thousand_bags(device: torch.device) -> None:
    batch = Batch(device, 1000, longest=2)
    assert_as_good_as_the_reference(batch, tuple(Pooling(mode, False) for mode in MODES), [False] * 3)


@pytest.mark.parametrize("widths", [(1, 600, 17), (64, 64, 128)])
def test_widths_of_all_classes(device: torch.device, widths: tuple[int, ...]) -> None:
    batch = Batch(device, 9, widths=widths)
    assert_as_good_as_the_reference(
        batch, (Pooling("sum", False), Pooling("mean", False), Pooling("sum", False)), [True] + [False] * 2
    )
    assert_as_good_as_the_reference(batch, (Pooling("max", False),) * 3, [False] * 3)


@pytest.mark.parametrize("samples", [0, 5])
def test_nothing_but_empty_bags(device: torch.device, samples: int) -> None:
    batch = Batch(device, samples, longest=0)
    out, found = results(batch, tuple(Pooling(mode, False) for mode in MODES), [False] * 3, "triton")
    assert torch.equal(out, torch.zeros(samples, sum(WIDTHS), device=device))
    assert not any(gradient.any() for gradient in found)


def long_bags(device: torch.device, lengths: Sequence[int], rows: int, width: int = 8) -> Batch:
    """Return one feature whose bags have these lengths."""
    batch = Batch(device, 0)
    generator = torch.Generator().manual_seed(len(lengths))
    lengths_B = torch.tensor(lengths)
    number = sum(lengths)
    batch.samples = len(lengths)
    batch.tables = [torch.randn(rows, width, generator=generator).to(device).requires_grad_()]
    batch.ids = [torch.randint(0, rows, (number,), generator=generator).to(device)]
    batch.offsets = [(lengths_B.cumsum(0) - lengths_B).to(device)]
    batch.weights = [torch.randn(number, generator=generator).to(device).requires_grad_()]
    return batch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [((3, 600, 0, 2, 700, 1), 3), ((1000,), 1000), ((1, 1, 1, 300, 1), 3), ((5, 2000, 30), 4)],
)
def test_bags_far_longer_than_others(device: torch.device, mode: str, lengths: tuple[int, ...], rows: int) -> None:
    """And of three rows, which occur far oftener than a piece is long."""
    batch = long_bags(device, lengths, rows)
    assert_as_good_as_the_reference(batch, (Pooling(mode, False),), [mode == "sum"])


def test_one_id_a_bag(device: torch.device) -> None:
    batch = Batch(device, 127)
    batch.ids = [i.new_tensor(range(127)).remainder(r) for i, r in zip(batch.ids, ROWS, strict=True)]
    batch.offsets = [None] * 3
    pooling = (Pooling("none", False, 2, padding_counts=True), Pooling("none", False), Pooling("none", True))
    out, found = results(batch, pooling, [False] * 3, "triton")
    expected, theirs = results(batch, pooling, [False] * 3, "reference")
    assert torch.equal(out, expected)
    assert not found[0][2].any()
    for mine, their in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, their)


def test_sparse_gradients_have_each_row_once(device: torch.device) -> None:
    batch = Batch(device, 127)
    pooling = (Pooling("sum", True, padding_idx=3), Pooling("mean", True), Pooling("sum", True))
    out = batched_lookup(batch.tables, batch.ids, batch.offsets, pooling, 127, kernel="triton")
    expected = reference.batched_lookup(batch.tables, batch.ids, batch.offsets, pooling)
    found = torch.autograd.grad(out.sum(), batch.tables)
    theirs = torch.autograd.grad(expected.sum(), batch.tables)
    for mine, their in zip(found, theirs, strict=True):
        assert mine.is_coalesced()
        rows = mine._indices()[0]
        assert (rows.diff() > 0).all()
        torch.testing.assert_close(mine.to_dense(), their.to_dense())
    assert 3 not in found[0]._indices()[0]
    assert set(found[0]._indices()[0].tolist()) == set(batch.ids[0].tolist()) - {3}


def test_lookups_of_one_table_have_one_gradient(device: torch.device) -> None:
    batch = Batch(device, 127)
    shared = batch.tables[1]
    tables, ids, offsets = [shared] * 3, [batch.ids[1], batch.ids[1].flip(0), batch.ids[1]], [batch.offsets[1]] * 3
    pooling = (Pooling("sum", True), Pooling("mean", True), Pooling("max", True, 4))
    out = batched_lookup(tables, ids, offsets, pooling, 127, kernel="triton")
    (mine,) = torch.autograd.grad(out.sum(), [shared])
    plain = [how._replace(sparse=False) for how in pooling]
    (theirs,) = torch.autograd.grad(reference.batched_lookup(tables, ids, offsets, plain).sum(), [shared])
    assert mine.is_coalesced()
    assert mine._nnz() <= ROWS[1]
    torch.testing.assert_close(mine.to_dense(), theirs)


def test_ids_outside_the_table_add_nothing(device: torch.device) -> None:
    """Whatever was checked before; NaN in the rows next to the table would show."""
    whole = torch.full((70, 8), torch.nan, device=device)
    whole[10:60] = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(device)
    table = whole[10:60].detach().requires_grad_()
    ids, offsets = torch.tensor([3, -1, 50, 4, 2**40, -(2**40), 7]).to(device), torch.tensor([0, 3, 6]).to(device)
    kept, kept_offsets = torch.tensor([3, 4, 7]).to(device), torch.tensor([0, 1, 2]).to(device)
    for mode in MODES:
        pooling = (Pooling(mode, False),)
        out = batched_lookup([table], [ids], [offsets], pooling, 3, kernel="triton")
        expected = reference.batched_lookup([table], [kept], [kept_offsets], pooling)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(o.sum(), table)[0] for o in (out, expected)))
    weights = torch.ones(7, device=device, requires_grad=True)
    out = batched_lookup([table], [ids], [offsets], (Pooling("sum", False),), 3, [weights], "triton")
    (of_weights,) = torch.autograd.grad(out.sum(), weights)
    assert (of_weights != 0).tolist() == [True, False, False, True, False, False, True]


def test_strides(device: torch.device) -> None:
    batch = Batch(device, 40)
    pooling = tuple(Pooling(mode, False) for mode in MODES)
    expected = results(batch, pooling, [False] * 3, "triton")
    batch.ids = [torch.stack([t, t + 1], dim=1)[:, 0] for t in batch.ids]
    batch.offsets = [torch.stack([t, t + 1], dim=1)[:, 0] for t in batch.offsets]
    batch.tables = [torch.cat([t, t], dim=1).detach()[:, : t.shape[1]].requires_grad_() for t in batch.tables]
    found = results(batch, pooling, [False] * 3, "triton")
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_layout_and_type_of_the_next_exchange(device: torch.device, kernel: str) -> None:
    batch = Batch(device, 40)
    pooling = tuple(Pooling(mode, False) for mode in MODES)
    rows_B = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(device)
    plain = batched_lookup(batch.tables, batch.ids, batch.offsets, pooling, 40, kernel=kernel)
    wire = batched_lookup(batch.tables, batch.ids, batch.offsets, pooling, 40, None, kernel, torch.bfloat16, rows_B)
    assert wire.dtype == torch.bfloat16
    rounded = plain.detach().clone()
    if kernel == "triton" and device.type == "cpu":  # the interpreter cuts off what GPUs round to the nearest
        rounded.view(torch.int32).bitwise_and_(-(2**16))
    assert torch.equal(wire[rows_B], rounded.to(torch.bfloat16))
    grad_BW = torch.randn(wire.shape, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    found = torch.autograd.grad(wire, batch.tables, grad_BW)
    expected = torch.autograd.grad(plain, batch.tables, grad_BW[rows_B].float())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["sum", "max", "none"])
def test_what_is_finite_stays_so_in_float16(device: torch.device, kernel: str, mode: str) -> None:
    table = torch.tensor([[7e4, -1e38, 65504.0, 1.5, float("inf"), -float("inf"), float("nan")]], device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    pooling = (Pooling(mode, False),)
    offsets = None if mode == "none" else ids  # an id a bag needs none
    out = batched_lookup([table], [ids], [offsets], pooling, 1, None, kernel, torch.float16)
    expected = [65504.0, -65504.0, 65504.0, 1.5, float("inf"), -float("inf"), float("nan")]
    torch.testing.assert_close(out, torch.tensor([expected], dtype=torch.float16, device=device), equal_nan=True)
    if mode == "sum":  # a sum of float16 rows has the type's own bound
        rows = torch.full((2, 3), 65504.0, dtype=torch.float16, device=device)
        with np.errstate(over="ignore"):  # the interpreter computes with NumPy
            of_two = batched_lookup([rows], [torch.arange(2, device=device)], [ids], pooling, 1, None, kernel)
        assert of_two.isinf().all()


def test_rows_of_several_types(device: torch.device) -> None:
    batch = Batch(device, 20)
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    batch.tables = [t.detach().to(d).requires_grad_() for t, d in zip(batch.tables, dtypes, strict=True)]
    pooling = (Pooling("sum", False), Pooling("mean", True), Pooling("max", False))
    out = batched_lookup(batch.tables, batch.ids, batch.offsets, pooling, 20, kernel="triton")
    assert out.dtype == torch.float32
    alone = [reference.batched_lookup([t.float()], [i], [o], [p._replace(sparse=False)]) for t, i, o, p in
             zip(batch.tables, batch.ids, batch.offsets, pooling, strict=True)]  # fmt: skip
    torch.testing.assert_close(out, torch.cat(alone, dim=1))
    out.sum().backward()
    assert [t.grad.dtype for t in batch.tables] == dtypes


def far_apart(device: torch.device, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return two rows more than 2^31 elements apart, in memory of which only they are touched."""
    elements = 2**31 + 64
    if device.type == "cuda":
        memory = torch.zeros(elements, dtype=dtype, device=device)
    else:
        memory = torch.from_numpy(np.zeros(elements, dtype=np.int16)).view(dtype)
    return memory.as_strided((2, width), (2**31 + 16, 1))


def test_rows_more_than_2_31_elements_apart(device: torch.device) -> None:
    table = far_apart(device, 8, torch.bfloat16)
    table.copy_(torch.arange(16.0).view(2, 8))
    near = table.clone(memory_format=torch.contiguous_format)
    ids, offsets = torch.tensor([1, 0, 1], device=device), torch.tensor([0, 1], device=device)
    for mode in MODES:
        weights = torch.ones(3, dtype=near.dtype, device=device, requires_grad=True) if mode == "sum" else None
        found = []
        for rows in (table, near):
            leaf = rows.detach().requires_grad_()
            out = batched_lookup([leaf], [ids], [offsets], (Pooling(mode, False),), 2, [weights], "triton")
            inputs = [leaf] if weights is None else [leaf, weights]
            found.append([out.detach(), *torch.autograd.grad(out.sum(), inputs)])
        assert all(map(torch.equal, *found))


def test_gradient_rows_more_than_2_31_elements_apart(device: torch.device) -> None:
    grad_BW = far_apart(device, 8, torch.bfloat16)
    grad_BW.copy_(torch.arange(16.0).view(2, 8))
    ids, offsets = torch.tensor([1, 0, 1], device=device), torch.tensor([0, 1], device=device)
    table = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16).requires_grad_()
    for mode in MODES:
        out = batched_lookup([table], [ids], [offsets], (Pooling(mode, False),), 2, kernel="triton")
        (found,) = torch.autograd.grad(out, table, grad_BW, retain_graph=True)
        (expected,) = torch.autograd.grad(out, table, grad_BW.clone(memory_format=torch.contiguous_format))
        assert torch.equal(found, expected)


def test_positions_of_64_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more than 2^31 ids of one lookup, in numbers as small as the others."""
    monkeypatch.setattr(lookup_features, "MOST_IN_32_BITS", 0)
    for lengths, mode in (((3, 600, 0, 2, 700, 1), "sum"), ((1, 0, 40, 3), "max"), ((1, 0, 40, 3), "mean")):
        assert_as_good_as_the_reference(long_bags(device, lengths, 3), (Pooling(mode, False),), [mode == "sum"])


def test_more_than_2_31_rows(device: torch.device) -> None:
    """Every row is the same memory; keys of rows have 64 bits."""
    rows = 2**31 + 5
    table = torch.arange(8.0, device=device).expand(rows, 8).requires_grad_()
    ids, offsets = torch.tensor([rows - 1, 3, rows - 1, rows], device=device), torch.tensor([0, 2], device=device)
    out = batched_lookup([table], [ids], [offsets], (Pooling("sum", True),), 2, kernel="triton")
    assert torch.equal(out, torch.arange(8.0, device=device) * torch.tensor([[2.0], [1.0]], device=device))
    (found,) = torch.autograd.grad(out, table, torch.tensor([[1.0], [4.0]], device=device).expand(2, 8))
    assert found._indices().tolist() == [[3, rows - 1]]
    assert torch.equal(found._values()[:, 0], torch.tensor([1.0, 5.0], device=device))


def test_distinct_rows_of_several_tables_at_once(device: torch.device) -> None:
    """Sparse and dense, of several widths, in pieces of 4 ids; the fourth has no lookups at all."""
    generator = torch.Generator().manual_seed(5)
    bags, features, column = 60, [], 0
    for rows, width, mode in ((9, 8, "sum"), (4, 5, "mean"), (6, 8, "sum"), (3, 8, "sum"), (9, 8, "sum")):
        lengths_B = torch.randint(0, 1 if rows == 3 else 4, (bags,), generator=generator)
        ids = torch.randint(0, rows, (int(lengths_B.sum()),), generator=generator).to(device)
        offsets = (lengths_B.cumsum(0) - lengths_B).to(device)
        table = torch.randn(rows, width, generator=generator).to(device)
        features.append(Feature(table, ids, offsets, None, mode, -1, -1, 0, column))
        column += width
    out_BW = torch.empty(bags, column, device=device)
    kept = look_up(features, bags, out_BW, None, True, piece=4)
    pooling = [Pooling(f.mode, False) for f in features]
    tables = [f.table.detach().requires_grad_() for f in features]
    expected = reference.batched_lookup(tables, [f.ids for f in features], [f.offsets for f in features], pooling)
    torch.testing.assert_close(out_BW, expected)
    grad_BW = torch.randn(out_BW.shape, generator=generator).to(device)
    groups = [Group((0,)), Group((1,), dense=True), Group((2,), dense=True), Group((3,)), Group((4,))]
    found = distinct_gradients(features, groups, bags, grad_BW, kept, piece=4)
    for group, mine, theirs in zip(groups, found, torch.autograd.grad(expected, tables, grad_BW), strict=True):
        if group.dense:
            torch.testing.assert_close(mine, theirs)
        else:
            assert isinstance(mine, DistinctRows)
            f = features[group.members[0]]
            assert mine.rows_U.tolist() == sorted(set(f.ids.tolist()))
            torch.testing.assert_close(mine.grads_UD, theirs[mine.rows_U])


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_has_the_gradients_of_differences(mode: str) -> None:
    batch = Batch(torch.device("cpu"), 3, torch.float64)
    pooling = (Pooling(mode, False),) * 3
    weighted = [mode == "sum"] * 3

    def pooled(*inputs: torch.Tensor) -> torch.Tensor:
        weights = inputs[:3] if mode == "sum" else [None] * 3
        return reference.batched_lookup(inputs[-3:], batch.ids, batch.offsets, pooling, weights)

    assert torch.autograd.gradcheck(pooled, batch.inputs(weighted))


def test_the_same_numbers_every_time(device: torch.device) -> None:
    batch = long_bags(device, (3, 300, 0, 2, 300, 1), rows=2)
    first, second = (results(batch, (Pooling("sum", False),), [True], "triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("sparse", [False, True])
def test_fields_and_columns_of_blocks(device: torch.device, sparse: bool) -> None:
    """A rank with two of three fields of a table, and of another table some columns, of which a lookup gives some."""
    flat = Batch(device, 30).tables[0]
    generator = torch.Generator().manual_seed(3)
    fields = ((0, 20), (20, 23), (23, 50))
    ids = [torch.randint(first, end, (30,), generator=generator).to(device) for first, end in fields]
    blocks = Block("fields", (fields[0], fields[2]), (0, 8)), Block("columns", ((0, 50),), (2, 8))
    of_fields, of_columns = (
        ShardedTable(block.cut(flat.detach()).clone().requires_grad_(), flat.shape, block) for block in blocks
    )
    how = Pooling("none", sparse, 21, padding_counts=True)
    pooling = tuple(how._replace(field_rows=rows) for rows in (fields[0], fields[2]))
    bags = Pooling("mean", sparse, columns=(3, 6))
    offsets = torch.arange(30, device=device) // 2
    tables, all_ids = [of_fields, of_fields, of_columns], [ids[0], ids[2], ids[1]]
    all_offsets = [None, None, offsets]
    out = batched_lookup(tables, all_ids, all_offsets, (*pooling, bags), 30, kernel="triton")
    theirs = batched_lookup(tables, all_ids, all_offsets, (*pooling, bags), 30)
    torch.testing.assert_close(out, theirs)
    found = torch.autograd.grad(out.sum(), [of_fields, of_columns])
    expected = torch.autograd.grad(theirs.sum(), [of_fields, of_columns])
    for mine, their in zip(found, expected, strict=True):
        assert mine.shape == flat.shape
        if sparse:
            assert mine.is_coalesced()
            torch.testing.assert_close(mine.to_dense(), their.to_dense())
        else:
            assert isinstance(mine, ShardedTable)
            assert isinstance(their, ShardedTable)
            assert mine.block == their.block
            torch.testing.assert_close(mine.local, their.local)


def test_what_other_ranks_own(device: torch.device) -> None:
    batch = Batch(device, 20)
    arguments: Any = (batch.tables, [batch.ids[0], None, None], [batch.offsets[0], None, None])
    pooling = (Pooling("sum", False),) * 3
    weights = [None, torch.zeros(0, device=device, requires_grad=True), None]
    out = batched_lookup(*arguments, pooling, 20, weights, "triton")
    assert out.shape == (20, WIDTHS[0])
    out.sum().backward()
    assert [table.grad is None for table in batch.tables] == [False, True, True]
    nothing = batched_lookup(batch.tables, [None] * 3, [None] * 3, pooling, 20, kernel="triton")
    assert nothing.shape == (20, 0)
    nothing.sum().backward()


def test_second_derivatives_are_refused(device: torch.device) -> None:
    batch = Batch(device, 5)
    out = batched_lookup(batch.tables, batch.ids, batch.offsets, (Pooling("sum", False),) * 3, 5, kernel="triton")
    with pytest.raises(UnsupportedGraphError, match=r"batched_lookup: expected a first derivative, found create_graph"):
        torch.autograd.grad(out.square().sum(), batch.tables, create_graph=True)


def test_what_is_not_supported_has_a_reason(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(device, 5)
    ids, offsets, plain = batch.ids[:1], batch.offsets[:1], Pooling("sum", False)

    def why(table: torch.Tensor = batch.tables[0], how: Pooling = plain, weights: Any = None, ids: Any = ids) -> Any:
        return supports([table], ids, offsets, [how], [weights])

    assert why() is None
    assert why(weights=batch.weights[0]) is None
    with FakeTensorMode() as mode:
        assert supports([mode.from_tensor(batch.tables[0])], [mode.from_tensor(ids[0])], [None], [plain]) is None
    assert why(batch.tables[0].double()) == "rows of torch.float64"
    assert "max_norm" in why(how=plain._replace(max_norm=1.0))
    assert "scale_grad_by_freq" in why(how=plain._replace(scale_grad_by_freq=True))
    assert why(ids=[ids[0].short()]) == "ids of torch.int16"
    assert why(batch.tables[0].t().contiguous().t()) == "a row's columns are not next to each other"
    assert why(weights=batch.weights[0], how=Pooling("mean", False)) == "weights of what is not a sum"
    assert why(weights=batch.weights[0].double()) == "weights of torch.float64 for rows of torch.float32"
    if device.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "TRITON_INTERPRET" in why()
