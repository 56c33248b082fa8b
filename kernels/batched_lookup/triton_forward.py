"""The forward kernels of the batched lookup: all features of a size class in one launch, written where they belong.

Shape suffixes: F features, B bags, N ids, T lanes of a program, D columns of a program, W columns of the joined output.
"""

# Triton reads the annotations of a kernel: types would be taken for constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.batched_lookup.triton_fields import (
    CHANGING,
    COLUMN,
    COUNT,
    IDS,
    MEAN,
    NUMBER,
    PIECES,
    ROWS,
    SHIFT,
    SKIPPED,
    STRIDE,
    TABLE,
    WEIGHTS,
    WIDTH,
    WINNERS,
    bag_of,
    bounds,
    lockstep,
    sum_piece,
    sum_rows,
    whole_pieces,
)

_NONE: tl.constexpr = tl.constexpr(2**31 - 1)
# Left alone, ptxas spills some bytes of ``max_bags`` with pieces so that one more program fits.
PIECES_OPTIONS = {} if torch.version.hip else {"maxnreg": 96}


@triton.jit
def read_rows(source, position_T, active_T, column_D, shown_D):
    """Return the rows (T, D) of the ids at some positions, and which ids are real.

    An id outside the table reads nothing and adds nothing, whatever was checked before.
    """
    table, ids, _, rows, stride, skipped, shift = source
    id_T = tl.load(ids + position_T, mask=active_T, other=0).to(tl.int64) - shift
    real_T = active_T & (id_T >= 0) & (id_T < rows) & (id_T != skipped)
    shown_TD = real_T[:, None] & shown_D[None, :]
    row_TD = tl.load(table + (id_T * stride)[:, None] + column_D[None, :], mask=shown_TD, other=0.0).to(tl.float32)
    return row_TD, real_T


@triton.jit
def read_weighted_rows(source, position_T, active_T, column_D, shown_D):
    """Return the same of a feature that may have weights, times these."""
    row_TD, real_T = read_rows(source, position_T, active_T, column_D, shown_D)
    weights = source[2]
    weight_T = tl.load(weights + position_T, mask=real_T & (weights.to(tl.int64) != 0), other=1.0).to(tl.float32)
    return row_TD * weight_T[:, None], real_T


@triton.jit
def source_of(feature, ROW: tl.constexpr, ID: tl.constexpr, VECTOR: tl.constexpr):
    """Return what ``read_rows`` has to know of a feature; the host has made sure of what VECTOR promises."""
    table = tl.multiple_of(tl.load(feature + TABLE).to(tl.pointer_type(ROW)), VECTOR * (ROW.primitive_bitwidth // 8))
    ids = tl.load(feature + IDS).to(tl.pointer_type(ID))
    stride = tl.multiple_of(tl.load(feature + STRIDE), VECTOR)
    weights = tl.load(feature + WEIGHTS).to(tl.pointer_type(ROW))
    return table, ids, weights, tl.load(feature + ROWS), stride, tl.load(feature + SKIPPED), tl.load(feature + SHIFT)


@triton.jit(do_not_specialize=CHANGING)
def sum_pieces(
    meta, partials, partial_counts, partial_stride, bags, halvings, piece_bits,
    ROW: tl.constexpr, ID: tl.constexpr, POSITION: tl.constexpr, WEIGHTED: tl.constexpr,
    VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum each piece of the ids of a feature that lies whole in one bag: long bags are shared out among programs."""
    feature = meta + tl.program_id(1) * COUNT
    first = tl.load(feature + PIECES)
    width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
    start = tl.program_id(0).to(POSITION) << piece_bits
    column_D = tl.program_id(2) * D + tl.arange(0, D)
    if (first >= 0) & (start + (1 << piece_bits) <= tl.load(feature + NUMBER)) & (tl.program_id(2) * D < width):
        bag_1 = bag_of(feature, start + tl.zeros([1], POSITION), bags, halvings, ID)
        _, end_1 = bounds(feature, bag_1, bags, ID, POSITION)
        if tl.max(end_1, axis=0) >= start + (1 << piece_bits):
            shown_D = column_D < width
            source = source_of(feature, ROW, ID, VECTOR)
            if WEIGHTED:
                sum_D, count = sum_piece(read_weighted_rows, source, start, piece_bits, column_D, shown_D, T, D)
            else:
                sum_D, count = sum_piece(read_rows, source, start, piece_bits, column_D, shown_D, T, D)
            row = first + tl.program_id(0)
            tl.store(partials + row * partial_stride + column_D, sum_D, mask=shown_D)
            tl.store(partial_counts + row, count)


@triton.jit(do_not_specialize=CHANGING)
def sum_bags(
    meta, out, out_stride, out_rows, counts, partials, partial_counts,
    partial_stride, bags, features, piece_bits, ROW: tl.constexpr, ID: tl.constexpr, POSITION: tl.constexpr,
    WEIGHTED: tl.constexpr, AVERAGED: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the sums or means of the bags of all features of a launch.

    Neighbouring programs take the same bags of different features: their columns fill whole lines of the output.
    """
    feature = meta + (tl.program_id(0) % features) * COUNT
    width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
    bag_T = tl.program_id(0) // features * T + tl.arange(0, T)
    column_D = tl.program_id(1) * D + tl.arange(0, D)
    shown_D = column_D < width
    if tl.program_id(1) * D < width:
        start_T, end_T = bounds(feature, bag_T, bags, ID, POSITION)
        source = source_of(feature, ROW, ID, VECTOR)
        first_piece = tl.load(feature + PIECES).to(tl.int32)
        if WEIGHTED:
            sum_TD, count_T = sum_rows(
                read_weighted_rows, source, start_T, end_T, partials, partial_counts, first_piece, partial_stride,
                piece_bits, column_D, shown_D, T, D,
            )  # fmt: skip
        else:
            sum_TD, count_T = sum_rows(
                read_rows, source, start_T, end_T, partials, partial_counts, first_piece, partial_stride, piece_bits,
                column_D, shown_D, T, D,
            )  # fmt: skip
        if AVERAGED:
            mean = tl.load(feature + MEAN)
            count_T = tl.maximum(count_T, 1)
            sum_TD = sum_TD / tl.where(mean < 0, 1, count_T).to(tl.float32)[:, None]
            if counts is not None:
                shown_T = (bag_T < bags) & (mean >= 0) & (tl.program_id(1) == 0)
                tl.store(counts + mean * bags + bag_T, count_T, mask=shown_T)
        _write(feature, out, out_stride, out_rows, sum_TD, bag_T, bags, column_D, shown_D, ROW, VECTOR)


@triton.jit(do_not_specialize=CHANGING)
def copy_rows(
    meta, out, out_stride, out_rows, bags, features, ROW: tl.constexpr, ID: tl.constexpr, POSITION: tl.constexpr,
    VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the rows of all features of a launch that have one id a bag."""
    feature = meta + (tl.program_id(0) % features) * COUNT
    width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
    bag_T = tl.program_id(0) // features * T + tl.arange(0, T)
    column_D = tl.program_id(1) * D + tl.arange(0, D)
    shown_D = column_D < width
    if tl.program_id(1) * D < width:
        start_T, end_T = bounds(feature, bag_T, bags, ID, POSITION)
        row_TD, _ = read_rows(source_of(feature, ROW, ID, VECTOR), start_T, start_T < end_T, column_D, shown_D)
        _write(feature, out, out_stride, out_rows, row_TD, bag_T, bags, column_D, shown_D, ROW, VECTOR)


@triton.jit
def _write(
    feature, out, out_stride, out_rows, bag_TD, bag_T, bags, column_D,
    shown_D, ROW: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if out.dtype.element_ty == tl.float16 and tl.float16 != ROW:  # what is finite stays so, as in packed rows
        bounded_TD = tl.minimum(tl.maximum(bag_TD, -65504.0, tl.PropagateNan.ALL), 65504.0, tl.PropagateNan.ALL)
        bag_TD = tl.where(tl.abs(bag_TD) == float("inf"), bag_TD, bounded_TD)
    row_T = bag_T.to(tl.int64)
    if out_rows is not None:
        row_T = tl.load(out_rows + bag_T, mask=bag_T < bags, other=0)
    column = tl.multiple_of(tl.load(feature + COLUMN), VECTOR)
    start_T = tl.multiple_of(row_T * out_stride, VECTOR) + column
    shown_TD = (bag_T < bags)[:, None] & shown_D[None, :]
    tl.store(out + start_T[:, None] + column_D[None, :], bag_TD.to(out.dtype.element_ty), mask=shown_TD)


@triton.jit
def _better(best_TD, winner_TD, source, start_T, step_T, active_T, column_D, shown_D):
    """Return maxima, and their positions in the bags that start at ``start_T``, with one more row in each lane."""
    row_TD, real_T = read_rows(source, start_T + step_T, active_T, column_D, shown_D)
    better_TD = real_T[:, None] & ((winner_TD < 0) | (row_TD > best_TD))
    winner_TD = tl.where(better_TD, step_T.to(tl.int32)[:, None], winner_TD)
    return tl.where(better_TD, row_TD, best_TD), winner_TD


@triton.jit
def _first_best(best_TD, winner_TD):
    """Return the maximum (D,) of all lanes and the first position that has it; ``_NONE`` where no lane has a row."""
    most_D = tl.max(tl.where(winner_TD < 0, float("-inf"), best_TD), axis=0)
    wins_TD = (winner_TD >= 0) & (best_TD == most_D[None, :])
    return most_D, tl.min(tl.where(wins_TD, winner_TD, _NONE), axis=0)


@triton.jit
def _better_of(best_TD, winner_TD, other_TD, position_TD, real_TD):
    """Return the greater of two maxima and its position; of equals the first."""
    better_TD = (other_TD > best_TD) | ((other_TD == best_TD) & (position_TD < winner_TD))
    better_TD = real_TD & ((winner_TD < 0) | better_TD)
    return tl.where(better_TD, other_TD, best_TD), tl.where(better_TD, position_TD, winner_TD)


@triton.jit(do_not_specialize=CHANGING)
def max_pieces(
    meta, partials, partial_winners, partial_stride, bags, halvings, piece_bits,
    ROW: tl.constexpr, ID: tl.constexpr, POSITION: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Take the maximum of each piece of the ids of a feature that lies whole in one bag, and who won; -1 for no row."""
    feature = meta + tl.program_id(1) * COUNT
    first = tl.load(feature + PIECES)
    width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
    start = tl.program_id(0).to(POSITION) << piece_bits
    column_D = tl.program_id(2) * D + tl.arange(0, D)
    if (first >= 0) & (start + (1 << piece_bits) <= tl.load(feature + NUMBER)) & (tl.program_id(2) * D < width):
        bag_1 = bag_of(feature, start + tl.zeros([1], POSITION), bags, halvings, ID)
        begin_1, end_1 = bounds(feature, bag_1, bags, ID, POSITION)
        if tl.max(end_1, axis=0) >= start + (1 << piece_bits):
            begin = tl.max(begin_1, axis=0)
            shown_D = column_D < width
            source = source_of(feature, ROW, ID, VECTOR)
            lane_T = tl.arange(0, T)
            best_TD = tl.zeros([T, D], tl.float32)
            winner_TD = tl.full([T, D], -1, tl.int32)
            for step in tl.range(0, 1 << piece_bits, T, loop_unroll_factor=2):
                best_TD, winner_TD = _better(
                    best_TD, winner_TD, source, begin, start - begin + step + lane_T,
                    step + lane_T < (1 << piece_bits), column_D, shown_D,
                )  # fmt: skip
            most_D, first_D = _first_best(best_TD, winner_TD)
            to_D = (first + tl.program_id(0)) * partial_stride + column_D
            tl.store(partials + to_D, most_D, mask=shown_D)
            tl.store(partial_winners + to_D, tl.where(first_D == _NONE, -1, first_D), mask=shown_D)


@triton.jit(do_not_specialize=CHANGING)
def max_bags(
    meta, out, out_stride, out_rows, winners, winner_stride, partials, partial_winners, partial_stride, bags, features,
    piece_bits, ROW: tl.constexpr, ID: tl.constexpr, POSITION: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Write the maxima of the bags of all features of a launch and, for the gradient, who won: the first of equals.

    Pieces that lie whole in one bag were looked at before, as in ``sum_rows``.
    """
    feature = meta + (tl.program_id(0) % features) * COUNT
    width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
    bag_T = tl.program_id(0) // features * T + tl.arange(0, T)
    column_D = tl.program_id(1) * D + tl.arange(0, D)
    shown_D = column_D < width
    if tl.program_id(1) * D < width:
        start_T, end_T = bounds(feature, bag_T, bags, ID, POSITION)
        source = source_of(feature, ROW, ID, VECTOR)
        first_piece = tl.load(feature + PIECES).to(tl.int32)
        from_T, whole_T = whole_pieces(start_T, end_T, first_piece, piece_bits)
        lone_T = end_T - start_T - (whole_T << piece_bits)  # positions outside whole pieces
        steps = lockstep(lone_T, T)
        lane_T = tl.arange(0, T)
        best_TD = tl.zeros([T, D], tl.float32)
        winner_TD = tl.full([T, D], -1, tl.int32)
        for step in range(steps):
            at_T = step + tl.where(start_T + step >= from_T << piece_bits, whole_T << piece_bits, 0)
            best_TD, winner_TD = _better(best_TD, winner_TD, source, start_T, at_T, step < lone_T, column_D, shown_D)
        if (tl.max(lone_T, axis=0) > steps) | (tl.max(whole_T, axis=0) > 0):
            for lane in range(T):
                chosen_T = lane_T == lane
                start = tl.sum(tl.where(chosen_T, start_T, 0), axis=0)
                end = tl.sum(tl.where(chosen_T, end_T, 0), axis=0)
                from_, whole = whole_pieces(start, end, first_piece, piece_bits)
                lone = end - start - (whole << piece_bits)
                if (lone > steps) | (whole > 0):
                    rest_TD = tl.zeros([T, D], tl.float32)
                    first_TD = tl.full([T, D], -1, tl.int32)
                    for step in range(steps, lone, T):
                        at_T = step + lane_T
                        at_T += tl.where(start + at_T >= from_ << piece_bits, whole << piece_bits, 0)
                        rest_TD, first_TD = _better(
                            rest_TD, first_TD, source, start, at_T, step + lane_T < lone, column_D, shown_D
                        )
                    if partials is not None:
                        for step in range(0, whole, T):
                            row_T = first_piece.to(tl.int64) + from_ + step + lane_T
                            from_TD = row_T[:, None] * partial_stride + column_D[None, :]
                            shown_TD = (step + lane_T < whole)[:, None] & shown_D[None, :]
                            position_TD = tl.load(partial_winners + from_TD, mask=shown_TD, other=-1)
                            piece_TD = tl.load(partials + from_TD, mask=shown_TD, other=0.0)
                            rest_TD, first_TD = _better_of(rest_TD, first_TD, piece_TD, position_TD, position_TD >= 0)
                    most_D, first_D = _first_best(rest_TD, first_TD)
                    best_TD, winner_TD = _better_of(
                        best_TD, winner_TD, most_D[None, :], first_D[None, :],
                        chosen_T[:, None] & (first_D != _NONE)[None, :],
                    )  # fmt: skip
        _write(feature, out, out_stride, out_rows, best_TD, bag_T, bags, column_D, shown_D, ROW, VECTOR)
        if winners is not None:
            column = tl.multiple_of(tl.load(feature + WINNERS), VECTOR)
            start_T = tl.multiple_of(bag_T.to(tl.int64) * winner_stride, VECTOR) + column
            shown_TD = (bag_T < bags)[:, None] & shown_D[None, :]
            tl.store(winners + start_T[:, None] + column_D[None, :], winner_TD, mask=shown_TD)
