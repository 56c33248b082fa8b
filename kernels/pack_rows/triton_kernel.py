"""Packed rows in Triton: one pass over memory, and the bits of ``reference.py``.

Kernels are compiled without contraction of products and sums. Elements of 16 bits are read and written as int16.

Shape suffixes: N rows, W columns, P elements of a packed row; in kernels N rows and W columns of one program's tile.
"""

# Kernels have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.pack_rows.reference import CASTS, SCALE_BYTES, SCALED, SMALLEST_SCALE, packed_dtype
from dmt_compile.kernels.pack_rows.triton_elements import INFINITY, MAGNITUDE, NAN, decode, encode, load, store
from dmt_compile.kernels.triton_support import AheadCase

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
_TILE = 4096  # elements of a program: 32 of a thread
_WIDEST = 8192  # columns of a row that is read once; a wider one is read again, from a cache
_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _pack_kernel(
    rows, out, count, width, row_stride, column_stride, out_width, reciprocal: tl.constexpr, FORM: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_W = tl.arange(0, BLOCK_W).to(tl.int64)
    there_N1 = (row_N < count)[:, None]
    from_N1 = rows + row_N[:, None] * row_stride
    # The widths of rows are often multiples of 16, those of packed rows never.
    out_N = out + row_N * (out_width + _SCALE_BYTES)
    # Bits of magnitudes stand in the order of magnitudes, with infinity and NaN above all.
    if WHOLE:
        mask_NW = there_N1 & (column_W < width)[None, :]
        values_NW = load(from_N1 + column_W[None, :] * column_stride, mask_NW, TYPE)
        top_N = tl.max(values_NW.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    else:
        top_NW = tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
        for start in range(0, width, BLOCK_W):
            mask_NW = there_N1 & (start + column_W < width)[None, :]
            values_NW = load(from_N1 + (start + column_W)[None, :] * column_stride, mask_NW, TYPE)
            top_NW = tl.maximum(top_NW, values_NW.to(tl.int32, bitcast=True) & MAGNITUDE)
        top_N = tl.max(top_NW, axis=1)
    finite_N = top_N < INFINITY
    scale_N = tl.where(finite_N, top_N, 0).to(tl.float32, bitcast=True) * reciprocal
    used_N = scale_N >= _SMALLEST_SCALE
    factor_N = tl.div_rn(1.0, tl.where(used_N, scale_N, 1.0))
    scale_bits_N = tl.where(used_N, scale_N, 0.0).to(tl.int32, bitcast=True)
    scale_bits_N = tl.where(finite_N, scale_bits_N, NAN)
    for byte in tl.static_range(_SCALE_BYTES):
        tl.store(out_N + byte, (scale_bits_N >> (8 * byte)).to(tl.uint8), mask=row_N < count)
    to_N1 = (out_N + _SCALE_BYTES)[:, None]
    if WHOLE:
        scaled_NW = tl.where(used_N[:, None], values_NW * factor_N[:, None], 0.0)
        tl.store(to_N1 + column_W[None, :], encode(scaled_NW, FORM).to(tl.uint8), mask=mask_NW)
    else:
        for start in range(0, width, BLOCK_W):
            mask_NW = there_N1 & (start + column_W < width)[None, :]
            values_NW = load(from_N1 + (start + column_W)[None, :] * column_stride, mask_NW, TYPE)
            scaled_NW = tl.where(used_N[:, None], values_NW * factor_N[:, None], 0.0)
            tl.store(to_N1 + (start + column_W)[None, :], encode(scaled_NW, FORM).to(tl.uint8), mask=mask_NW)


@triton.jit
def _unpack_kernel(
    packed, out, count, width, packed_width, column_stride, out_stride, FORM: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_W)
    row_N = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_W = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    from_N = packed + row_N * (packed_width + _SCALE_BYTES)
    scale_bits_N = tl.zeros((BLOCK_N,), tl.int32)
    for byte in tl.static_range(_SCALE_BYTES):
        scale_bits_N |= tl.load(from_N + byte * column_stride, row_N < count, 0).to(tl.int32) << (8 * byte)
    mask_NW = (row_N < count)[:, None] & (column_W < width)[None, :]
    from_NW = from_N[:, None] + (column_W + _SCALE_BYTES)[None, :] * column_stride
    values_NW = decode(tl.load(from_NW, mask_NW, 0), FORM) * scale_bits_N.to(tl.float32, bitcast=True)[:, None]
    store(out + row_N[:, None] * out_stride + column_W[None, :], values_NW, mask_NW, TYPE)


@triton.jit
def _cast_kernel(
    rows, out, count, width, row_stride, column_stride, out_stride, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_W)
    row_N = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_W = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_NW = (row_N < count)[:, None] & (column_W < width)[None, :]
    values_NW = load(rows + row_N[:, None] * row_stride + column_W[None, :] * column_stride, mask_NW, FROM)
    store(out + row_N[:, None] * out_stride + column_W[None, :], values_NW, mask_NW, TO)


def pack_rows(rows_NW: torch.Tensor, form: str) -> torch.Tensor:
    """Return what ``reference.pack_rows`` returns."""
    if form in CASTS:
        return _cast(rows_NW, CASTS[form]).contiguous()
    count, width = rows_NW.shape
    out_NP = rows_NW.new_empty(count, width + SCALE_BYTES if width else 0, dtype=packed_dtype(form))
    if rows_NW.numel():
        pack_into(out_NP, rows_NW, form)
    return out_NP


def pack_into(out_NP: torch.Tensor, rows_NW: torch.Tensor, form: str) -> None:
    """Pack rows of a scaled form; ``out_NP`` may have any distance between rows."""
    count, width = rows_NW.shape
    whole = width <= _WIDEST
    block_N, block_W = _blocks(width, _WIDEST if whole else _TILE)
    _pack_kernel[(triton.cdiv(count, block_N),)](
        _bits(rows_NW), out_NP, count, width, *rows_NW.stride(), out_NP.stride(0) - SCALE_BYTES, 1 / SCALED[form][1],
        form, _name(rows_NW.dtype), block_N, block_W, whole, num_warps=_warps(block_N * block_W), **_OPTIONS,
    )  # fmt: skip


def unpack_rows(packed_NP: torch.Tensor, form: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what ``reference.unpack_rows`` returns."""
    if form in CASTS:
        return _cast(packed_NP, dtype)
    out_NW = packed_NP.new_empty(len(packed_NP), width, dtype=dtype)
    if out_NW.numel():
        count, (row_stride, column_stride) = len(packed_NP), packed_NP.stride()
        block_N, block_W = _blocks(width, _TILE)
        _unpack_kernel[_grid(count, width, block_N, block_W)](
            packed_NP, _bits(out_NW), count, width, row_stride - SCALE_BYTES, column_stride, out_NW.stride(0), form,
            _name(dtype), block_N, block_W, **_OPTIONS,
        )  # fmt: skip
    return out_NW


def _cast(rows_NW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows in another type, contiguous; themselves where they are of it."""
    if rows_NW.dtype == dtype:
        return rows_NW
    out_NW = rows_NW.new_empty(rows_NW.shape, dtype=dtype)
    if rows_NW.numel():
        # Without gaps between rows there are no rows: an odd width costs no alignment.
        source, out = (t.view(1, -1) if rows_NW.is_contiguous() else t for t in (rows_NW, out_NW))
        count, width = source.shape
        block_N, block_W = _blocks(width, _TILE)
        _cast_kernel[_grid(count, width, block_N, block_W)](
            _bits(source), _bits(out), count, width, *source.stride(), out.stride(0), _name(source.dtype), _name(dtype),
            block_N, block_W, **_OPTIONS,
        )  # fmt: skip
    return out_NW


def _blocks(width: int, widest: int) -> tuple[int, int]:
    """Return rows and columns of a program's tile."""
    block_W = min(triton.next_power_of_2(width), widest)
    return max(1, _TILE // block_W), block_W


def _grid(count: int, width: int, block_N: int, block_W: int) -> tuple[int]:
    return (triton.cdiv(count, block_N) * triton.cdiv(width, block_W),)


def _warps(elements: int) -> int:
    return max(1, elements // (32 * 32))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor


def _ahead(name: str, kernel: Any, pointers: dict[str, str], strides: tuple[str, ...], **constants: Any) -> AheadCase:
    """Return a case of rows of whole vectors, side by side."""
    signature = {**pointers, "count": "i64", "width": "i32", **dict.fromkeys(strides, "i32")}
    aligned = frozenset({*pointers, "width", *strides} - {"column_stride"})
    constants["column_stride"] = 1
    warps = _warps(constants["BLOCK_N"] * constants["BLOCK_W"])
    return AheadCase(name, kernel, signature, constants, aligned, warps, _OPTIONS)


_TYPES = {"float32": "*fp32", "bfloat16": "*i16"}
AHEAD: tuple[AheadCase, ...] = tuple(
    case
    for form in SCALED
    for dtype, pointer in _TYPES.items()
    for case in (
        *(
            _ahead(
                f"pack {dtype} {form}, width {width}", _pack_kernel, {"rows": pointer, "out": "*u8"},
                ("row_stride", "out_width"), reciprocal=1 / SCALED[form][1], FORM=form, TYPE=dtype, BLOCK_N=block_N,
                BLOCK_W=block_W, WHOLE=whole,
            )
            for width, block_N, block_W, whole in ((64, 64, 64, True), (8192, 1, 8192, True), (16384, 1, 4096, False))
        ),
        _ahead(
            f"unpack {form} {dtype}", _unpack_kernel, {"packed": "*u8", "out": pointer}, ("packed_width", "out_stride"),
            FORM=form, TYPE=dtype, BLOCK_N=4, BLOCK_W=1024,
        ),
    )
) + tuple(
    _ahead(
        f"cast {source} {to}", _cast_kernel, {"rows": _TYPES.get(source, "*i16"), "out": _TYPES.get(to, "*i16")},
        ("row_stride", "out_stride"), FROM=source, TO=to, BLOCK_N=1, BLOCK_W=4096,
    )
    for source, to in (
        ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16"),
    )
)  # fmt: skip
