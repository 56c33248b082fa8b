"""The forward pass of the lookup on Triton: one launch for each size class of features.

Shape suffixes: B bags, W columns of the joined output, X columns of the features that are maxima, M features that are
means, P pieces, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.batched_lookup import triton_forward as kernels
from dmt_compile.kernels.batched_lookup.features import (
    Feature,
    block_of,
    classes,
    describe,
    piece_of,
    position_type,
    tile_of,
    vector_of,
)

TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int32: tl.int32,
    torch.int64: tl.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs that only the forward pass knows; ``None`` where no feature needs it.

    Args:
        counts_MB: int32, the rows in each bag of a mean, at least 1.
        winners_BX: int32, per column of a maximum the position of the id that won; -1 in an empty bag.
    """

    counts_MB: torch.Tensor | None
    winners_BX: torch.Tensor | None


def look_up(
    features: Sequence[Feature], bags: int, out_BW: torch.Tensor, out_rows_B: torch.Tensor | None, keep: bool,
    piece: int | None = None,
) -> Kept:  # fmt: skip
    """Write all features into ``out_BW``.

    Args:
        features: of this rank, on the output's device.
        bags: B.
        out_BW: any row stride, columns next to each other; whatever no feature's columns cover stays as it is.
        out_rows_B: int64, the output's row of each bag; ``None`` for its own number.
        keep: for a backward pass.
        piece: length of the pieces of long bags, a power of two; by default as the number of ids asks for.

    Cost: reads every row, id and offset once, writes B W; see README.md.
    """
    means = means_of(features)
    winner_columns, winner_width = winners_of(features)
    counts = winners = None
    if keep and means:
        counts = torch.empty(len(means), bags, dtype=torch.int32, device=out_BW.device)
    if keep and winner_columns:
        winners = torch.empty(bags, winner_width, dtype=torch.int32, device=out_BW.device)
    for launch in classes(features) if bags else ():
        if launch[0].width:
            _launch(launch, bags, out_BW, out_rows_B, counts, winners, means, winner_columns, piece)
    return Kept(counts, winners)


def means_of(features: Sequence[Feature]) -> dict[int, int]:
    """Return for each feature that is a mean, by identity, its row among the counts."""
    return {id(f): row for row, f in enumerate(f for f in features if f.mode == "mean")}


def winners_of(features: Sequence[Feature]) -> tuple[dict[int, int], int]:
    """Return for each feature that is a maximum, by identity, its first column among the winners, and their width."""
    columns, width = {}, 0
    for f in features:
        if f.mode == "max":
            columns[id(f)] = width
            width += f.width
    return columns, width


def _launch(
    features: list[Feature], bags: int, out_BW: torch.Tensor, out_rows_B: torch.Tensor | None, counts: Any,
    winners: Any, means: dict[int, int], winner_columns: dict[int, int], piece: int | None,
) -> None:  # fmt: skip
    block = block_of(features[0].width)
    kind = features[0].mode if features[0].mode in ("none", "max") else "sum"
    averaged, weighted = any(f.mode == "mean" for f in features), any(f.weights is not None for f in features)
    tile = tile_of(block, "scaled" if averaged or weighted else kind)
    chunks = triton.cdiv(max(f.width for f in features), block)
    row_dtype = features[0].table.dtype
    vector = vector_for(features, out_BW, winners, winner_columns)
    types = {
        "ROW": TYPES[row_dtype], "ID": TYPES[features[0].ids.dtype], "VECTOR": vector, "T": tile, "D": block,
        "POSITION": TYPES[position_type(max(len(f.ids) for f in features))],
    }  # fmt: skip
    grid = (len(features) * triton.cdiv(bags, tile), chunks)
    skipped = [f.skipped for f in features]
    if kind == "none":
        meta = describe(features, out_BW.device, skipped=skipped)
        kernels.copy_rows[grid](meta, out_BW, out_BW.stride(0), out_rows_B, bags, len(features), **types)
        return
    piece = piece_of(max(len(f.ids) for f in features)) if piece is None else piece
    pieces = [len(f.ids) // piece if worth_splitting(f, bags, piece) else 0 for f in features]
    firsts = [sum(pieces[:index]) if number else -1 for index, number in enumerate(pieces)]
    meta = describe(
        features, out_BW.device, skipped=skipped, pieces=firsts, mean=[means.get(id(f), -1) for f in features],
        winners=[winner_columns.get(id(f), 0) for f in features],
    )  # fmt: skip
    stride, bits = max(f.width for f in features), piece.bit_length() - 1
    if kind == "sum":
        types["WEIGHTED"] = weighted
    partials = beside = None  # beside each partial sum how many rows it has, beside a maximum who won
    if any(pieces):
        partials = torch.empty(sum(pieces), stride, dtype=torch.float32, device=out_BW.device)
        shape = partials.shape if kind == "max" else partials.shape[:1]
        beside = torch.empty(shape, dtype=torch.int32, device=out_BW.device)
        of_pieces: Any = kernels.max_pieces if kind == "max" else kernels.sum_pieces
        of_pieces[(max(pieces), len(features), chunks)](
            meta, partials, beside, stride, bags, bags.bit_length(), bits, **types
        )
    if kind == "max":
        kernels.max_bags[grid](
            meta, out_BW, out_BW.stride(0), out_rows_B, winners, 0 if winners is None else winners.stride(0), partials,
            beside, stride, bags, len(features), bits, **types, **(kernels.PIECES_OPTIONS if any(pieces) else {}),
        )  # fmt: skip
        return
    kernels.sum_bags[grid](
        meta, out_BW, out_BW.stride(0), out_rows_B, counts, partials, beside, stride, bags, len(features), bits,
        AVERAGED=averaged, **types,
    )  # fmt: skip


def worth_splitting(feature: Feature, bags: int, piece: int) -> bool:
    """Tell whether to look for long bags: their lengths are not known here, only the mean."""
    return len(feature.ids) >= max(2 * piece, 4 * bags)


def vector_for(
    features: Sequence[Feature],
    joined_BW: torch.Tensor,
    winners_BX: torch.Tensor | None,
    winner_columns: dict[int, int],
) -> int:
    """Return how many elements a thread may load and store at once in all of some features."""
    elements = [number for f in features for number in (f.width, f.column, f.table.stride(0))]
    if winners_BX is not None:
        elements += [winners_BX.stride(0), *(winner_columns.get(id(f), 0) for f in features)]
    addresses = [f.table.data_ptr() for f in features]
    return vector_of(features[0].table.element_size(), addresses, [*elements, joined_BW.stride(0)])
