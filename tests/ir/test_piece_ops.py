"""The operators of row pieces: bags cut by rows, means of whole bags, blocks added up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.ir.piece_ops import add_blocks, divide_by_lengths, select_rows
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.route import AT_ONCE, Route, make_layout

SUM = Pooling("sum", sparse=False)
PIECES = ((3, 5), (5, 11), (11, 12))


@given(
    bags=st.lists(st.lists(st.integers(3, 11), max_size=4), max_size=5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    last_offset=st.booleans(),
    behind=st.integers(0, 2),
)
def test_each_piece_gets_its_part_of_every_bag(
    bags: list[list[int]], dtype: torch.dtype, last_offset: bool, behind: int
) -> None:
    ids = torch.tensor([i for bag in bags for i in bag] + [4] * (behind if last_offset else 0), dtype=dtype)
    ends = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0).to(dtype)
    weights = torch.arange(len(ids)).float().requires_grad_()
    offsets = ends if last_offset else ends[:-1]
    how = SUM._replace(last_offset=last_offset)
    out = select_rows(ids, offsets, weights, how, PIECES, (3, 12), True)
    for piece, (first, end) in enumerate(PIECES):
        mine, starts, factors = out[piece :: len(PIECES)]
        assert mine is not None
        assert starts is not None
        assert factors is not None
        assert (mine.dtype, starts.dtype, starts.shape) == (dtype, dtype, offsets.shape)
        bounds = starts.tolist() if last_offset else [*starts.tolist(), len(mine)]
        found = [mine[a:b].tolist() for a, b in pairwise(bounds)]
        assert found == [[i for i in bag if first <= i < end] for bag in bags]
        read = ids[: int(ends[-1])]
        assert torch.equal(factors, weights[: len(read)][(read >= first) & (read < end)])
    torch.cat(list(out[2 * len(PIECES) :])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [1.0] * int(ends[-1]) + [0.0] * (len(ids) - int(ends[-1]))


def test_single_ids_become_bags_of_none_or_one() -> None:
    out = select_rows(torch.tensor([11, 3, 4]), None, None, SUM, PIECES, (3, 12), True)
    assert [t if t is None else t.tolist() for t in out] == [
        [3, 4],
        [],
        [11],
        [0, 0, 1],
        [0, 0, 0],
        [0, 1, 1],
        *[None] * 3,
    ]


@pytest.mark.parametrize(
    ("ids", "offsets"), [([3, 12], [0, 1]), ([2], [0]), ([3, 4], [1, 2]), ([3, 4], [0, 3]), ([3, 4], [0, 2, 1])]
)
def test_what_is_faulty_passes_as_it_is(ids: list[int], offsets: list[int]) -> None:
    given_ids, given_offsets = torch.tensor(ids), torch.tensor(offsets)
    out = select_rows(given_ids, given_offsets, None, SUM, PIECES, (3, 12), True)
    assert all(t is given_ids for t in out[:3])
    assert all(t is given_offsets for t in out[3:6])


@pytest.mark.parametrize("padding_counts", [False, True])
@pytest.mark.parametrize("last_offset", [False, True])
def test_means_are_those_of_embedding_bag(last_offset: bool, padding_counts: bool) -> None:
    table, ids = torch.randn(6, 4), torch.tensor([0, 2, 2, 5, 2, 1, 1])
    offsets = torch.tensor([0, 3, 3, 5, *([7] if last_offset else [])])
    bag = torch.nn.functional.embedding_bag
    padding = None if padding_counts else 2
    total, wanted = (
        bag(ids, table, offsets, mode=mode, padding_idx=padding, include_last_offset=last_offset)
        for mode in ("sum", "mean")
    )
    how = Pooling("mean", False, padding_idx=2, padding_counts=padding_counts, last_offset=last_offset)
    torch.testing.assert_close(divide_by_lengths(total, ids, offsets, how), wanted)


def test_blocks_of_pieces_are_added_where_the_first_one_stands() -> None:
    # Features 1 and 3 are pieces of one table on ranks 1 and 0, 0 and 2 are whole; rank 2 is another group.
    layout = make_layout(2, 2, (0, 1, 2, 0), (1, 2, 3, 2), (True,) * 4, (False,) * 4, (), AT_ONCE, ((1, 3),))
    assert (layout.group_lookups(0), layout.group_features(0)) == ((0, 3, 1), (0, 1))
    assert (layout.column_order, layout.group_width(0), layout.rank_widths) == ((0, 1, 2), 3, (3, 2, 3, 0))
    joined = torch.tensor([[1.0, 20.0, 30.0, 4.0, 5.0]], requires_grad=True)
    out = add_blocks(joined, Route(layout, 1, (1, 1, 1, 1), ((),) * 4, ((),) * 4))
    assert out.tolist() == [[1.0, 24.0, 35.0]]
    out.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert joined.grad is not None
    assert joined.grad.tolist() == [[1.0, 2.0, 3.0, 2.0, 3.0]]
    other = torch.ones(1, 3)
    assert add_blocks(other, Route(layout, 3, (1, 1, 1, 1), ((),) * 4, ((),) * 4)) is other
