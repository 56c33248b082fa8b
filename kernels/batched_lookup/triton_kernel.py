"""The uses of the lookup's kernels that are compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from dmt_compile.kernels.batched_lookup import triton_backward, triton_forward
from dmt_compile.kernels.batched_lookup.features import block_of, segment_tile_of, tile_of
from dmt_compile.kernels.triton_support import AheadCase

_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "i32": tl.int32, "i64": tl.int64}
_TILES = {"pieces": "sum", "pieces of max": "max", "mean": "scaled", "weighted": "scaled"}
_SIZES = ("bags", "features", "piece_bits", "halvings", "number", "base", "end", "width", "nowhere")
# Argument -> type, where it is the same in all uses.
_COMMON = dict.fromkeys(_SIZES, "i32") | {
    "meta": "*i64", "out_rows": "*i64", "counts": "*i32", "partials": "*fp32", "partial_counts": "*i32",
    "partial_winners": "*i32",
    "partial_stride": "i32", "out_stride": "i32", "winners": "*i32", "winner_stride": "i32", "grad_stride": "i32",
    "grad_rows": "*i64", "keys": "*i32", "slots": "*i64", "factors": "*fp32", "winner_slots": "*i64",
    "positions": "*i32", "segments": "*i32", "starts": "*i32", "rows": "*i64", "order": "*i64",
    "first_segment": "*i64",
}  # fmt: skip


def _case(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any] = {}
) -> AheadCase:  # fmt: skip
    signature = {a: (_COMMON | dict(types))[a] for a in kernel.arg_names if a not in constants}
    # A launch finds this out by itself: memory of PyTorch starts at multiples of more, and strides are widths.
    aligned = frozenset(a for a, kind in signature.items() if kind.startswith("*") or a.endswith("stride"))
    return AheadCase(name, kernel, signature, constants, aligned - {"first_segment"}, options=options)


def _forward(row: str, index: str, width: int, kind: str, joined: str, position: str = "i32") -> AheadCase:
    """Return a use of a forward kernel; where bags are ``long``, pieces of them were looked at before."""
    name = f"{kind}-{row}-{index}-{width}-to-{joined}" + ("" if position == "i32" else f"-at-{position}")
    kind, long = kind.removeprefix("long "), kind.startswith("long ")
    block = block_of(width)
    vector = 16 // (_TYPES[row].primitive_bitwidth // 8) if width % 16 == 0 else 1
    tile = tile_of(block, _TILES.get(kind, kind))
    constants: dict[str, Any] = {"ROW": _TYPES[row], "ID": _TYPES[index], "VECTOR": vector, "T": tile, "D": block}
    constants["POSITION"] = _TYPES[position]
    kernel = {
        "none": triton_forward.copy_rows,
        "max": triton_forward.max_bags,
        "pieces": triton_forward.sum_pieces,
        "pieces of max": triton_forward.max_pieces,
    }.get(kind, triton_forward.sum_bags)
    if kind not in ("none", "max", "pieces of max"):
        constants["WEIGHTED"] = kind == "weighted"
    if kind in ("sum", "mean", "weighted"):
        constants["AVERAGED"] = kind == "mean"
    if kind not in ("none", "pieces", "pieces of max") and not long:
        beside = "partial_winners" if kind == "max" else "partial_counts"
        constants |= {"partials": None, beside: None}
    options = triton_forward.PIECES_OPTIONS if kind == "max" and long else {}
    return _case(name, kernel, {"out": f"*{joined}"}, constants, options)


def _segments(row: str, width: int, kind: str, position: str = "i32") -> AheadCase:
    block = block_of(width)
    vector = 16 // (_TYPES[row].primitive_bitwidth // 8) if width % 16 == 0 else 1
    constants: dict[str, Any] = {
        "VECTOR": vector,
        "T": segment_tile_of(block),
        "D": block,
        "POSITION": _TYPES[position],
    }
    if kind != "max":
        constants |= {"winners": None, "winner_slots": None, "positions": None}
    if kind == "sum":
        constants["factors"] = None
    if kind == "pieces":
        kernel = triton_backward.sum_segment_pieces
    else:
        kernel, constants["DENSE"] = triton_backward.sum_segments, kind == "sum"
    name = f"segments-{kind}-{row}-{width}" + ("" if position == "i32" else f"-at-{position}")
    types = {"grad": f"*{row}", "out": f"*{row}", "starts": f"*{position}"}
    return _case(name, kernel, types, constants, {} if kind == "pieces" else triton_backward.SEGMENT_OPTIONS)


def _weights(row: str, index: str, width: int) -> AheadCase:
    block = block_of(width)
    constants = {
        "ROW": _TYPES[row], "ID": _TYPES[index], "VECTOR": 16 // (_TYPES[row].primitive_bitwidth // 8),
        "T": tile_of(block), "D": block, "POSITION": tl.int32,
    }  # fmt: skip
    return _case(f"weights-{row}-{index}-{width}", triton_backward.weigh_gradients, {"grad": f"*{row}"}, constants)


def _numbers(row: str, index: str, keys: str) -> AheadCase:
    constants = {"ROW": _TYPES[row], "ID": _TYPES[index], "BLOCK": 1024, "POSITION": tl.int32}
    types = {"keys": f"*{keys}"} | ({"nowhere": "i64"} if keys == "i64" else {})
    return _case(f"number-{row}-{index}-{keys}", triton_backward.number_ids, types, constants)


AHEAD: tuple[AheadCase, ...] = (
    *(_forward("fp32", "i64", width, "sum", "fp32") for width in (128, 3, 16, 32, 64, 256, 512)),
    *(_forward("bf16", "i32", width, "sum", "bf16") for width in (128, 512)),
    *(_forward(row, "i64", width, "none", row) for row, width in (("fp32", 128), ("bf16", 16), ("bf16", 512))),
    *(_forward("fp32", "i64", 128, "sum", joined) for joined in ("bf16", "fp16")),
    _forward("fp16", "i64", 64, "sum", "fp32"),
    *(_forward("fp32", "i64", 128, kind, "fp32") for kind in ("mean", "weighted", "max", "pieces", "pieces of max")),
    *(_forward("fp32", "i64", 128, f"long {kind}", "fp32") for kind in ("sum", "mean", "weighted", "max")),
    *(_forward("bf16", "i64", 128, kind, "bf16") for kind in ("weighted", "max", "long max")),
    *(_forward("fp32", "i32", width, kind, "fp32") for width in (16, 512) for kind in ("weighted", "max", "long max")),
    *(_segments("fp32", 128, kind) for kind in ("sum", "mean", "max", "pieces")),
    *(_segments("bf16", 128, kind) for kind in ("sum", "max")),
    *(_segments("fp32", width, kind) for width in (16, 512) for kind in ("sum", "max")),
    *(_forward("bf16", "i64", 128, kind, "bf16", "i64") for kind in ("long sum", "pieces")),
    _segments("bf16", 128, "max", "i64"),
    *(_weights(row, "i64", width) for row, width in (("fp32", 128), ("bf16", 512))),
    _numbers("fp32", "i64", "i32"),
    _numbers("bf16", "i32", "i64"),
    _case("segments", triton_backward.find_segments, {}, {"BLOCK": 1024, "POSITION": tl.int32}),
)
