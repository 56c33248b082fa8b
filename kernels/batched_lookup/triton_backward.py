"""The backward kernels of the batched lookup: gradient rows are summed once for each distinct row of a table.

Every id that has a gradient gets a key, the number of its row among the rows of all tables. Sorted by key, the ids of
one row stand together, in their own order: a segment, which is summed as a bag is in the forward pass.

Shape suffixes: N ids of all features, T lanes of a program, D columns of a program.
"""

# Triton reads the annotations of a kernel: types would be taken for constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.batched_lookup.triton_fields import (
    BASE,
    CHANGING,
    COLUMN,
    COUNT,
    FIRST,
    IDS,
    MEAN,
    NUMBER,
    OFFSETS,
    ROWS,
    SHIFT,
    SKIPPED,
    STRIDE,
    TABLE,
    WEIGHTS,
    WIDTH,
    WINNERS,
    bag_of,
    sum_piece,
    sum_rows,
)

# Left alone, ptxas spills some bytes of ``sum_segments`` so that one more program fits.
SEGMENT_OPTIONS = {} if torch.version.hip else {"maxnreg": 128}


@triton.jit(do_not_specialize=CHANGING)
def number_ids(
    meta, keys, slots, factors, winner_slots, positions, grad_rows,
    grad_stride, counts, winner_stride, bags, halvings, nowhere, ROW: tl.constexpr,
    ID: tl.constexpr, POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write for each id its key, the place of its bag's gradient, and the factor of that gradient.

    An id without a gradient (padding, or outside the table) gets the key ``nowhere``, above all others.
    """
    feature = meta + tl.program_id(1) * COUNT
    number = tl.load(feature + NUMBER).to(POSITION)
    position_N = tl.program_id(0).to(POSITION) * BLOCK + tl.arange(0, BLOCK)
    here_N = position_N < number
    if tl.program_id(0).to(POSITION) * BLOCK < number:
        ids = tl.load(feature + IDS).to(tl.pointer_type(ID))
        row_N = tl.load(ids + position_N, mask=here_N, other=0).to(tl.int64) - tl.load(feature + SHIFT)
        real_N = (row_N >= 0) & (row_N < tl.load(feature + ROWS)) & (row_N != tl.load(feature + SKIPPED)) & (bags > 0)
        key_N = tl.where(real_N, row_N + tl.load(feature + BASE), nowhere)
        to_N = tl.load(feature + FIRST) + position_N
        tl.store(keys + to_N, key_N.to(keys.dtype.element_ty), mask=here_N)
        bag_N = bag_of(feature, position_N, bags, halvings, ID)
        grad_row_N = bag_N.to(tl.int64)
        if grad_rows is not None:
            grad_row_N = tl.load(grad_rows + bag_N, mask=here_N, other=0)
        tl.store(slots + to_N, grad_row_N * grad_stride + tl.load(feature + COLUMN), mask=here_N)
        if factors is not None:
            factor_N = tl.full([BLOCK], 1.0, tl.float32)
            weights = tl.load(feature + WEIGHTS)
            if weights != 0:
                factor_N = tl.load(weights.to(tl.pointer_type(ROW)) + position_N, mask=here_N, other=0.0).to(tl.float32)
            mean = tl.load(feature + MEAN)
            if counts is not None:
                count_N = tl.load(counts + mean * bags + bag_N, mask=here_N & (mean >= 0), other=1)
                factor_N = factor_N / count_N.to(tl.float32)
            tl.store(factors + to_N, factor_N, mask=here_N)
        if winner_slots is not None:
            column = tl.load(feature + WINNERS)
            slot_N = tl.where(column < 0, -1, bag_N.to(tl.int64) * winner_stride + column)
            tl.store(winner_slots + to_N, slot_N, mask=here_N)
            of_maximum_N = here_N & (column >= 0)
            offsets = tl.load(feature + OFFSETS).to(tl.pointer_type(ID))
            start_N = tl.load(offsets + bag_N, mask=of_maximum_N, other=0).to(POSITION)
            tl.store(positions + to_N, (position_N - start_N).to(tl.int32), mask=of_maximum_N)


@triton.jit(do_not_specialize=CHANGING)
def find_segments(keys, segments, starts, rows, number, POSITION: tl.constexpr, BLOCK: tl.constexpr):
    """Write the start and the key of each segment; ``segments`` numbers the sorted ids' segments from 1 on."""
    position_N = tl.program_id(0).to(POSITION) * BLOCK + tl.arange(0, BLOCK)
    here_N = position_N < number
    key_N = tl.load(keys + position_N, mask=here_N, other=0)
    before_N = tl.load(keys + position_N - 1, mask=here_N & (position_N > 0), other=-1)
    segment_N = tl.load(segments + position_N, mask=here_N, other=1) - 1
    first_N = here_N & (key_N != before_N)
    tl.store(starts + segment_N, position_N, mask=first_N)
    tl.store(rows + segment_N, key_N.to(tl.int64), mask=first_N)


@triton.jit
def multiple(number, VECTOR):
    """Return a multiple of VECTOR as it is, in a form that shows the compiler what it is.

    ``tl.multiple_of`` does so for what is loaded, and for a constexpr, which VECTOR is not in a tuple.
    """
    return number // VECTOR * VECTOR


@triton.jit
def read_gradients(source, position_T, active_T, column_D, shown_D):
    """Return the gradient rows (T, D) of the bags in which the ids at sorted positions stand, times their factors."""
    grad, order, slots, factors, winners, winner_slots, positions, VECTOR = source
    id_T = tl.load(order + position_T, mask=active_T, other=0)
    slot_T = multiple(tl.load(slots + id_T, mask=active_T, other=0), VECTOR)
    shown_TD = active_T[:, None] & shown_D[None, :]
    row_TD = tl.load(grad + slot_T[:, None] + column_D[None, :], mask=shown_TD, other=0.0).to(tl.float32)
    if factors is not None:
        row_TD *= tl.load(factors + id_T, mask=active_T, other=0.0)[:, None]
    if winners is not None:
        winner_slot_T = tl.load(winner_slots + id_T, mask=active_T, other=-1)
        own_T = tl.load(positions + id_T, mask=active_T, other=0)
        of_maximum_TD = shown_TD & (winner_slot_T >= 0)[:, None]
        winner_slot_T = multiple(winner_slot_T, VECTOR)
        winner_TD = tl.load(winners + winner_slot_T[:, None] + column_D[None, :], mask=of_maximum_TD, other=0)
        row_TD = tl.where(of_maximum_TD & (winner_TD != own_T[:, None]), 0.0, row_TD)
    return row_TD, active_T


@triton.jit(do_not_specialize=CHANGING)
def sum_segment_pieces(
    grad, keys, order, slots, factors, winners, winner_slots, positions,
    partials, base, end, width, piece_bits, POSITION: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Sum each piece of the sorted ids that lies whole in one segment with a key from base to end."""
    start = tl.program_id(0).to(POSITION) << piece_bits
    key = tl.load(keys + start).to(tl.int64)
    last = tl.load(keys + start + (1 << piece_bits) - 1).to(tl.int64)
    if (key == last) & (key >= base) & (key < end):
        column_D = tl.program_id(1) * D + tl.arange(0, D)
        shown_D = column_D < multiple(width, VECTOR)
        source = grad, order, slots, factors, winners, winner_slots, positions, VECTOR
        sum_D, _ = sum_piece(read_gradients, source, start, piece_bits, column_D, shown_D, T, D)
        tl.store(partials + tl.program_id(0).to(tl.int64) * width + column_D, sum_D, mask=shown_D)


@triton.jit(do_not_specialize=CHANGING)
def sum_segments(
    grad, starts, rows, number, order, slots, factors, winners,
    winner_slots, positions, partials, out, first_segment, base, end, width,
    piece_bits, DENSE: tl.constexpr, POSITION: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the sum of each segment with a key from base to end.

    Into the row of its key (DENSE), or row after row from ``first_segment``, the first of these segments.
    """
    first = tl.load(first_segment).to(POSITION)
    to_T = tl.program_id(0).to(POSITION) * T + tl.arange(0, T)
    segment_T = first + to_T
    row_T = tl.load(rows + segment_T, mask=segment_T < number, other=end)
    here_T = (row_T >= base) & (row_T < end)
    if tl.max(here_T.to(tl.int32), axis=0) > 0:
        column_D = tl.program_id(1) * D + tl.arange(0, D)
        shown_D = column_D < multiple(width, VECTOR)
        start_T = tl.load(starts + segment_T, mask=here_T, other=0)
        end_T = tl.load(starts + segment_T + 1, mask=here_T, other=0)
        first_piece = tl.full([], 0, tl.int32)
        if partials is None:
            first_piece = tl.full([], -1, tl.int32)
        source = grad, order, slots, factors, winners, winner_slots, positions, VECTOR
        sum_TD, _ = sum_rows(
            read_gradients, source, start_T, end_T, partials, None, first_piece, width, piece_bits, column_D, shown_D,
            T, D,
        )  # fmt: skip
        place_T = to_T.to(tl.int64)
        if DENSE:
            place_T = row_T - base
        shown_TD = here_T[:, None] & shown_D[None, :]
        start_T = place_T * multiple(width, VECTOR)
        tl.store(out + start_T[:, None] + column_D[None, :], sum_TD.to(out.dtype.element_ty), mask=shown_TD)


@triton.jit(do_not_specialize=CHANGING)
def weigh_gradients(
    meta, grad, grad_rows, grad_stride, bags, halvings, ROW: tl.constexpr,
    ID: tl.constexpr, POSITION: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each weight: the product of its bag's gradient with the row that it weighs."""
    feature = meta + tl.program_id(1) * COUNT
    number = tl.load(feature + NUMBER).to(POSITION)
    position_T = tl.program_id(0).to(POSITION) * T + tl.arange(0, T)
    here_T = position_T < number
    if tl.program_id(0).to(POSITION) * T < number:
        ids = tl.load(feature + IDS).to(tl.pointer_type(ID))
        table = tl.load(feature + TABLE).to(tl.pointer_type(ROW))
        table = tl.multiple_of(table, VECTOR * (ROW.primitive_bitwidth // 8))
        row_T = tl.load(ids + position_T, mask=here_T, other=0).to(tl.int64) - tl.load(feature + SHIFT)
        real_T = here_T & (row_T >= 0) & (row_T < tl.load(feature + ROWS)) & (row_T != tl.load(feature + SKIPPED))
        grad_row_T = bag_of(feature, position_T, bags, halvings, ID).to(tl.int64)
        if grad_rows is not None:
            grad_row_T = tl.load(grad_rows + grad_row_T, mask=here_T, other=0)
        width = tl.multiple_of(tl.load(feature + WIDTH), VECTOR)
        stride = tl.multiple_of(tl.load(feature + STRIDE), VECTOR)
        column = tl.multiple_of(tl.load(feature + COLUMN), VECTOR)
        start_T = tl.multiple_of(grad_row_T * grad_stride, VECTOR) + column
        sum_TD = tl.zeros([T, D], tl.float32)
        for first in range(0, width, D):
            column_D = first + tl.arange(0, D)
            shown_TD = real_T[:, None] & (column_D < width)[None, :]
            row_TD = tl.load(table + (row_T * stride)[:, None] + column_D[None, :], mask=shown_TD, other=0.0)
            grad_TD = tl.load(grad + start_T[:, None] + column_D[None, :], mask=shown_TD, other=0.0)
            sum_TD += row_TD.to(tl.float32) * grad_TD.to(tl.float32)
        to = tl.load(feature + BASE).to(tl.pointer_type(ROW))
        tl.store(to + position_T, tl.sum(sum_TD, axis=1).to(ROW), mask=here_T)
