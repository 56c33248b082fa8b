"""What all kernels of the lookup share: the fields of a feature, its bags, and the sum of rows over bags.

Shape suffixes: T lanes of a program, which are bags or, of a long bag, rows; D columns.
"""

# Triton reads the annotations of a kernel: types would be taken for constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dmt_compile.kernels.batched_lookup.features import FIELDS

# Sizes that change from step to step: no size, however round or small, gets a kernel compiled for it alone.
CHANGING = ("bags", "halvings", "number", "piece_bits")

_AT = {name: tl.constexpr(index) for index, name in enumerate(FIELDS)}
TABLE, ROWS, STRIDE, WIDTH, COLUMN, IDS, OFFSETS, NUMBER = (_AT[name] for name in FIELDS[:8])
WEIGHTS, MEAN, SKIPPED, SHIFT, PIECES, FIRST, BASE, WINNERS = (_AT[name] for name in FIELDS[8:])
COUNT: tl.constexpr = tl.constexpr(len(FIELDS))
# Rows beyond twice the mean length of a program's bags: with fewer, some bag is often a little longer than the rest.
_SLACK: tl.constexpr = tl.constexpr(4)


@triton.jit
def bounds(feature, bag_T, bags, ID: tl.constexpr, POSITION: tl.constexpr):
    """Return where the bags of a feature start and end among its ids; never outside them."""
    offsets = tl.load(feature + OFFSETS)
    number = tl.load(feature + NUMBER).to(POSITION)
    here_T = bag_T < bags
    if offsets == 0:
        start_T = bag_T.to(POSITION)
        end_T = start_T + 1
    else:
        starts = offsets.to(tl.pointer_type(ID))
        start_T = tl.load(starts + bag_T, mask=here_T, other=0).to(POSITION)
        end_T = tl.load(starts + bag_T + 1, mask=bag_T + 1 < bags, other=0).to(POSITION)
        end_T = tl.where(bag_T + 1 < bags, end_T, number)
    start_T = tl.minimum(tl.maximum(start_T, 0), number)
    end_T = tl.minimum(tl.maximum(end_T, start_T), number)
    return start_T, tl.where(here_T, end_T, start_T)


@triton.jit
def bag_of(feature, position_T, bags, halvings, ID: tl.constexpr):
    """Return the bag of each position among a feature's ids, by bisection; ``halvings`` is log2 of ``bags``."""
    offsets = tl.load(feature + OFFSETS)
    bag_T = position_T
    if offsets != 0:
        starts = offsets.to(tl.pointer_type(ID))
        low_T = position_T * 0
        high_T = low_T + bags
        for _ in range(halvings):
            middle_T = (low_T + high_T) // 2
            before_T = tl.load(starts + middle_T).to(position_T.dtype) <= position_T
            low_T = tl.where(before_T, middle_T, low_T)
            high_T = tl.where(before_T, high_T, middle_T)
        bag_T = low_T
    return bag_T


@triton.jit
def lockstep(length_T, T: tl.constexpr):
    """Return how many rows the lanes take in step, each of its own bag; what is left is taken by all lanes together."""
    return tl.minimum(tl.max(length_T, axis=0), 2 * (tl.sum(length_T, axis=0) // T) + _SLACK)


@triton.jit
def whole_pieces(start, end, first_piece, piece_bits):
    """Return the first piece that lies whole between two positions, and how many do."""
    first = (start + (1 << piece_bits) - 1) >> piece_bits
    return first, tl.where(first_piece < 0, 0, tl.maximum((end >> piece_bits) - first, 0))


@triton.jit
def sum_rows(
    READ: tl.constexpr, source, start_T, end_T, partials, partial_counts, first_piece,
    partial_stride, piece_bits, column_D, shown_D, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the sums (T, D) of the rows at positions from start to end, and the number (T,) of rows in each.

    A piece is 2^``piece_bits`` positions, the first a multiple of that. What lies whole in one bag was summed before,
    into row ``first_piece`` and on of ``partials``; it is negative where nothing was, and they ``None`` where all are.

    Args:
        READ: function of (source, positions, which of them, columns, which of them): rows (T, D), which are real.
    """
    lane_T = tl.arange(0, T)
    from_T, whole_T = whole_pieces(start_T, end_T, first_piece, piece_bits)
    lone_T = end_T - start_T - (whole_T << piece_bits)  # positions outside whole pieces
    steps = lockstep(lone_T, T)
    sum_TD = tl.zeros([T, D], tl.float32)
    count_T = tl.zeros([T], tl.int32)
    for step in tl.range(0, steps, loop_unroll_factor=2):
        position_T = start_T + step
        position_T += tl.where(position_T >= from_T << piece_bits, whole_T << piece_bits, 0)
        row_TD, real_T = READ(source, position_T, step < lone_T, column_D, shown_D)
        sum_TD += row_TD
        count_T += real_T.to(tl.int32)
    if (tl.max(lone_T, axis=0) > steps) | (tl.max(whole_T, axis=0) > 0):
        for lane in range(T):
            chosen_T = lane_T == lane
            start = tl.sum(tl.where(chosen_T, start_T, 0), axis=0)
            end = tl.sum(tl.where(chosen_T, end_T, 0), axis=0)
            from_, whole = whole_pieces(start, end, first_piece, piece_bits)
            lone = end - start - (whole << piece_bits)
            if (lone > steps) | (whole > 0):
                rest_TD = tl.zeros([T, D], tl.float32)
                rest_T = tl.zeros([T], tl.int32)
                for step in range(steps, lone, T):
                    position_T = start + step + lane_T
                    position_T += tl.where(position_T >= from_ << piece_bits, whole << piece_bits, 0)
                    row_TD, real_T = READ(source, position_T, step + lane_T < lone, column_D, shown_D)
                    rest_TD += row_TD
                    rest_T += real_T.to(tl.int32)
                if partials is not None:
                    for step in range(0, whole, T):
                        more_T = step + lane_T < whole
                        row_T = first_piece.to(tl.int64) + from_ + step + lane_T
                        shown_TD = more_T[:, None] & shown_D[None, :]
                        partial_TD = partials + row_T[:, None] * partial_stride + column_D[None, :]
                        rest_TD += tl.load(partial_TD, mask=shown_TD, other=0.0)
                        if partial_counts is not None:
                            rest_T += tl.load(partial_counts + row_T, mask=more_T, other=0)
                sum_TD += tl.where(chosen_T[:, None], tl.sum(rest_TD, axis=0)[None, :], 0.0)
                count_T += tl.where(chosen_T, tl.sum(rest_T, axis=0), 0)
    return sum_TD, count_T


@triton.jit
def sum_piece(
    READ: tl.constexpr, source, start, piece_bits, column_D, shown_D, T: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Return the sum (D,) of one whole piece, and the number of its rows."""
    lane_T = tl.arange(0, T)
    sum_TD = tl.zeros([T, D], tl.float32)
    count_T = tl.zeros([T], tl.int32)
    for step in tl.range(0, 1 << piece_bits, T, loop_unroll_factor=4):
        row_TD, real_T = READ(source, start + step + lane_T, step + lane_T < (1 << piece_bits), column_D, shown_D)
        sum_TD += row_TD
        count_T += real_T.to(tl.int32)
    return tl.sum(sum_TD, axis=0), tl.sum(count_T, axis=0)
