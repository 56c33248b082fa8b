"""The gradients of tables, summed for each distinct row: what gradients and optimizers start from.

Shape suffixes: N ids of all features, U distinct rows of a table, B bags, W columns of the joined output, D columns of
a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton

from dmt_compile.kernels.batched_lookup import triton_backward as kernels
from dmt_compile.kernels.batched_lookup.features import (
    Feature,
    block_of,
    describe,
    piece_of,
    position_type,
    segment_tile_of,
    tile_of,
)
from dmt_compile.kernels.batched_lookup.triton_look_up import TYPES, Kept, means_of, vector_for, winners_of

_BLOCK = 1024


class DistinctRows(NamedTuple):
    """Rows of a table, ascending, each once, (U,) int64; their gradients (U, D) of the table's dtype."""

    rows_U: torch.Tensor
    grads_UD: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Lookups of one table that have one gradient: their numbers among all features, and whether it is dense."""

    members: tuple[int, ...]
    dense: bool = False


@dataclass(frozen=True)
class _Sorted:
    """Ids sorted by key, stable, and where the ids of one key, a segment, start; ``order_N`` is what was sorted."""

    keys_N: torch.Tensor
    order_N: torch.Tensor
    starts: torch.Tensor  # (N + 1,); N behind the last segment
    rows: torch.Tensor  # (N + 1,) the segments' keys, ascending; behind them the key of ids without a gradient
    per_id: dict[str, torch.Tensor | None]  # by number in the order of the features: slots, factors, ...


def distinct_gradients(
    features: Sequence[Feature], groups: Sequence[Group], bags: int, grad_BW: torch.Tensor, kept: Kept,
    grad_rows_B: torch.Tensor | None = None, piece: int | None = None,
) -> list[DistinctRows | torch.Tensor]:  # fmt: skip
    """Return the gradient of each group: of the distinct rows that it looked up, or dense where the group says so.

    Args:
        features: of the forward pass, all of them.
        groups: those whose tables need a gradient, in any order.
        bags: B.
        grad_BW: of the joined output, columns next to each other.
        kept: what ``look_up`` kept.
        grad_rows_B: the output's row of each bag, as in the forward pass.
        piece: length of the pieces of long segments, a power of two; by default as the number of ids asks for.

    Returns:
        Sums in a fixed order, in fp32, rounded once. Dense gradients are parts of one tensor for each width and type.

    Cost: a sort of all ids; reads a gradient row for each id. One synchronisation, if any group is not dense.
    """
    order = sorted(range(len(groups)), key=lambda g: _class_of(features, groups[g]))
    sizes = [features[groups[g].members[0]].table.shape[0] for g in order]
    bases = [0, *accumulate(sizes)]
    found: list[Any] = [None] * len(groups)
    if not groups:
        return found
    of_group = {member: base for g, base in zip(order, bases, strict=False) for member in groups[g].members}
    ids = _sorted(features, of_group, bags, grad_BW, kept, grad_rows_B, bases[-1])
    firsts = torch.searchsorted(ids.rows, torch.tensor(bases).to(ids.rows.device, non_blocking=True))
    counts = [] if all(group.dense for group in groups) else firsts.tolist()
    classes: dict[Any, list[int]] = defaultdict(list)
    for position, g in enumerate(order):
        classes[_class_of(features, groups[g])].append(position)
    for positions in classes.values():
        first, end = positions[0], positions[-1] + 1
        members = [features[m] for p in positions for m in groups[order[p]].members]
        dense = groups[order[first]].dense
        keys = bases[first], bases[end]
        number = sum(len(f.ids) for f in members)
        segments = min(number, keys[1] - keys[0]) if dense else counts[end] - counts[first]
        shape = (keys[1] - keys[0] if dense else segments, members[0].width)
        make = torch.zeros if dense else torch.empty
        out = make(shape, dtype=members[0].table.dtype, device=grad_BW.device)
        if segments and shape[1]:
            _sum(members, ids, grad_BW, kept, features, out, firsts[first:], keys, segments, dense, piece)
        for p in positions:
            if dense:
                found[order[p]] = out[bases[p] - keys[0] : bases[p + 1] - keys[0]]
            else:
                rows_U = ids.rows[counts[p] : counts[p + 1]] - bases[p]
                found[order[p]] = DistinctRows(rows_U, out[counts[p] - counts[first] : counts[p + 1] - counts[first]])
    return found


def _class_of(features: Sequence[Feature], group: Group) -> tuple[bool, int, str]:
    table = features[group.members[0]].table
    return group.dense, table.shape[1], str(table.dtype)


def _sorted(
    features: Sequence[Feature], bases: dict[int, int], bags: int, grad_BW: torch.Tensor, kept: Kept,
    grad_rows_B: torch.Tensor | None, nowhere: int,
) -> _Sorted:  # fmt: skip
    """Number the ids of the features in ``bases`` and sort them."""
    device, means, (winner_columns, _) = grad_BW.device, means_of(features), winners_of(features)
    chosen = [features[member] for member in bases]
    total = sum(len(f.ids) for f in chosen)
    # half the passes of a sort of 64 bits
    keys_N = torch.empty(total, dtype=torch.int32 if nowhere < 2**31 - 1 else torch.int64, device=device)
    scaled = any(f.mode == "mean" or f.weights is not None for f in chosen)
    maxima = any(f.mode == "max" for f in chosen)

    def per_id(dtype: torch.dtype, needed: bool = True) -> torch.Tensor | None:
        return torch.empty(total, dtype=dtype, device=device) if needed else None

    arrays = {
        "slots": per_id(torch.int64), "factors": per_id(torch.float32, scaled),
        "winner_slots": per_id(torch.int64, maxima), "positions": per_id(torch.int32, maxima),
    }  # fmt: skip
    starts_of = [0, *accumulate(len(f.ids) for f in chosen)]
    launches: dict[Any, list[int]] = defaultdict(list)
    for index, f in enumerate(chosen):
        launches[f.table.dtype, f.ids.dtype].append(index)
    longest = max((len(f.ids) for f in chosen), default=0)
    winner_stride = 0 if kept.winners_BX is None else kept.winners_BX.stride(0)
    for (row, index_type), indices in launches.items() if total else ():
        launch = [chosen[index] for index in indices]
        meta = describe(
            launch, device, skipped=[f.padding for f in launch], first=[starts_of[index] for index in indices],
            base=[list(bases.values())[index] for index in indices], mean=[means.get(id(f), -1) for f in launch],
            winners=[winner_columns.get(id(f), -1) for f in launch],
        )  # fmt: skip
        kernels.number_ids[(triton.cdiv(longest, _BLOCK), len(launch))](
            meta, keys_N, **arrays, grad_rows=grad_rows_B, grad_stride=grad_BW.stride(0), counts=kept.counts_MB,
            winner_stride=winner_stride, bags=bags, halvings=bags.bit_length(), nowhere=nowhere, ROW=TYPES[row],
            ID=TYPES[index_type], POSITION=TYPES[position_type(total)], BLOCK=_BLOCK,
        )  # fmt: skip
    keys_N, order_N = torch.sort(keys_N, stable=True)
    position = position_type(total)
    starts = torch.full((total + 1,), total, dtype=position, device=device)
    rows = torch.full((total + 1,), nowhere, dtype=torch.int64, device=device)
    if total:
        changes_N = torch.ones(total, dtype=torch.bool, device=device)
        torch.ne(keys_N[1:], keys_N[:-1], out=changes_N[1:])
        segments_N = changes_N.cumsum(0, dtype=position)
        kernels.find_segments[(triton.cdiv(total, _BLOCK),)](
            keys_N, segments_N, starts, rows, total, POSITION=TYPES[position], BLOCK=_BLOCK
        )
    return _Sorted(keys_N, order_N, starts, rows, arrays)


def _sum(
    members: Sequence[Feature], ids: _Sorted, grad_BW: torch.Tensor, kept: Kept, features: Sequence[Feature],
    out: torch.Tensor, first_segment: torch.Tensor, keys: tuple[int, int], segments: int, dense: bool,
    piece: int | None,
) -> None:  # fmt: skip
    """Sum the segments with keys from ``keys[0]`` to ``keys[1]``, all of one width and type, into ``out``."""
    total, width = len(ids.keys_N), out.shape[1]
    block = block_of(width)
    chunks, tile = triton.cdiv(width, block), segment_tile_of(block)
    piece = piece_of(total) if piece is None else piece
    winner_columns, _ = winners_of(features)
    arrays = ids.per_id | {"winners": kept.winners_BX if any(f.mode == "max" for f in members) else None}
    if arrays["winners"] is None:
        arrays |= {"winner_slots": None, "positions": None}
    vector = vector_for(members, grad_BW, arrays["winners"], winner_columns)
    types = {"VECTOR": vector, "T": tile, "D": block, "POSITION": TYPES[position_type(total)]}
    bounds = {"base": keys[0], "end": keys[1], "width": width, "piece_bits": piece.bit_length() - 1}
    partials = None
    if total >= 2 * piece:
        partials = torch.empty(total // piece, width, dtype=torch.float32, device=grad_BW.device)
        kernels.sum_segment_pieces[(total // piece, chunks)](
            grad_BW, ids.keys_N, ids.order_N, **arrays, partials=partials, **bounds, **types
        )
    kernels.sum_segments[(triton.cdiv(segments, tile), chunks)](
        grad_BW, ids.starts, ids.rows, total, ids.order_N, **arrays, partials=partials, out=out,
        first_segment=first_segment, **bounds, DENSE=dense, **types, **kernels.SEGMENT_OPTIONS,
    )  # fmt: skip


def weight_gradients(
    features: Sequence[Feature], chosen: Sequence[int], bags: int, grad_BW: torch.Tensor,
    grad_rows_B: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the gradient (N,) of the weights of each chosen feature: one dot product of two rows for each id."""
    found = {number: torch.empty_like(features[number].weights) for number in chosen}  # type: ignore[arg-type]
    launches: dict[Any, list[int]] = defaultdict(list)
    for number in chosen:
        f = features[number]
        if len(f.ids):
            launches[f.table.dtype, f.ids.dtype, block_of(f.width)].append(number)
    for (row, index_type, block), numbers in launches.items():
        launch, tile = [features[number] for number in numbers], tile_of(block)
        meta = describe(
            launch, grad_BW.device, skipped=[f.skipped for f in launch],
            base=[found[number].data_ptr() for number in numbers],
        )  # fmt: skip
        kernels.weigh_gradients[(triton.cdiv(max(len(f.ids) for f in launch), tile), len(launch))](
            meta, grad_BW, grad_rows_B, grad_BW.stride(0), bags, bags.bit_length(), ROW=TYPES[row],
            ID=TYPES[index_type], POSITION=TYPES[position_type(max(len(f.ids) for f in launch))],
            VECTOR=vector_for(launch, grad_BW, None, {}), T=tile, D=block,
        )  # fmt: skip
    return list(found.values())
