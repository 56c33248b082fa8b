"""The tail of a cross layer and its gradient in Triton, each one pass over memory.

Shape suffixes: N rows, W columns of a bias; in kernels rows and columns of a tile. G groups of rows.
"""

# Kernels have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.triton_support import AheadCase

_TILE = 2048  # elements: 16 of a thread, from three tensors
_WIDEST = 512  # columns of a tile of several rows
_PROGRAMS = 1024  # as many keep a large GPU busy
_LONGEST = 128  # rows of a group, whose sums are 1 / 128 of a tensor


@triton.jit
def _forward_kernel(
    x0, wx, bias, x, out, count, width, x0_stride, wx_stride, x_stride, BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_W)
    row_N = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_W = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_NW = (row_N < count)[:, None] & (column_W < width)[None, :]
    row_N1, column_1W = row_N[:, None], column_W[None, :]
    x0_NW = tl.load(x0 + row_N1 * x0_stride + column_1W, mask_NW, 0.0).to(tl.float32)
    wx_NW = tl.load(wx + row_N1 * wx_stride + column_1W, mask_NW, 0.0).to(tl.float32)
    x_NW = tl.load(x + row_N1 * x_stride + column_1W, mask_NW, 0.0).to(tl.float32)
    if BIAS != "none":
        bias_1W = tl.load(bias + column_W, column_W < width, 0.0).to(tl.float32)[None, :]
        if BIAS == "first":
            wx_NW += bias_1W
        else:
            x_NW += bias_1W
    out_NW = x0_NW * wx_NW + x_NW
    tl.store(out + row_N1 * width + column_1W, out_NW.to(out.dtype.element_ty), mask_NW)


@triton.jit
def _backward_kernel(
    grad, x0, wx, bias, grad_x0, grad_wx, sums_GW, count, width, grad_stride, x0_stride, wx_stride, group_rows,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_W)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column_W = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    column_1W = column_W[None, :]
    if BIAS == "first":
        bias_1W = tl.load(bias + column_W, column_W < width, 0.0).to(tl.float32)[None, :]
    sum_NW = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for start in range(0, group_rows, BLOCK_N):
        row_N = group * group_rows + start + tl.arange(0, BLOCK_N)
        mask_NW = (row_N < count)[:, None] & (column_W < width)[None, :]
        row_N1 = row_N[:, None]
        grad_NW = tl.load(grad + row_N1 * grad_stride + column_1W, mask_NW, 0.0).to(tl.float32)
        x0_NW = tl.load(x0 + row_N1 * x0_stride + column_1W, mask_NW, 0.0).to(tl.float32)
        wx_NW = tl.load(wx + row_N1 * wx_stride + column_1W, mask_NW, 0.0).to(tl.float32)
        grad_wx_NW = grad_NW * x0_NW
        if BIAS == "first":
            wx_NW += bias_1W
            sum_NW += grad_wx_NW
        elif BIAS == "last":
            sum_NW += grad_NW
        at_NW = row_N1 * width + column_1W
        tl.store(grad_x0 + at_NW, (grad_NW * wx_NW).to(grad_x0.dtype.element_ty), mask_NW)
        tl.store(grad_wx + at_NW, grad_wx_NW.to(grad_wx.dtype.element_ty), mask_NW)
    if BIAS != "none":
        tl.store(sums_GW + group * width + column_W, tl.sum(sum_NW, axis=0), column_W < width)


def cross_tail(
    x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, bias_last: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Return the tail, contiguous, of ``dtype``."""
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        (x0_NW, wx_NW, x_NW), bias = _matrices(bias, x0, wx, x)
        count, width = x_NW.shape
        block_N, block_W = _blocks(count, width)
        grid = (triton.cdiv(count, block_N) * triton.cdiv(width, block_W),)
        _forward_kernel[grid](
            x0_NW, wx_NW, bias, x_NW, out, count, width, x0_NW.stride(0), wx_NW.stride(0), x_NW.stride(0),
            _place(bias, bias_last), block_N, block_W,
        )  # fmt: skip
    return out


def cross_tail_backward(
    grad: torch.Tensor, x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, bias_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x0, wx and bias, contiguous; the last is empty without a bias."""
    grad_x0, grad_wx = x0.new_empty(x0.shape), wx.new_empty(wx.shape)
    if not grad.numel():
        return grad_x0, grad_wx, grad.new_empty(0) if bias is None else torch.zeros_like(bias)
    (grad_NW, x0_NW, wx_NW), row = _matrices(bias, grad, x0, wx)
    count, width = grad_NW.shape
    block_N, block_W = _blocks(count, width)
    tiles = triton.cdiv(width, block_W)
    group_rows = block_N
    while bias is not None and group_rows < _LONGEST and count * tiles > 2 * group_rows * _PROGRAMS:
        group_rows *= 2
    groups = triton.cdiv(count, group_rows)
    sums_GW = None if bias is None else grad.new_empty(groups, width, dtype=torch.float32)
    _backward_kernel[(groups * tiles,)](
        grad_NW, x0_NW, wx_NW, row, grad_x0, grad_wx, sums_GW, count, width, grad_NW.stride(0), x0_NW.stride(0),
        wx_NW.stride(0), group_rows, _place(bias, bias_last), block_N, block_W,
    )  # fmt: skip
    if bias is None or sums_GW is None:
        return grad_x0, grad_wx, grad.new_empty(0)
    return grad_x0, grad_wx, sums_GW.sum(0).to(bias.dtype).view(bias.shape)


def _matrices(bias: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return tensors as rows as wide as the bias, elements of a row side by side, and the bias as one row."""
    if bias is not None:
        matrices = [tensor.reshape(-1, bias.numel()) for tensor in tensors]
        return [m if m.stride(1) == 1 else m.contiguous() for m in matrices], bias.contiguous()
    if all(tensor.is_contiguous() for tensor in tensors):  # one row: an odd width costs no alignment
        return [tensor.view(1, -1) for tensor in tensors], None
    matrices = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return [m if m.stride(1) == 1 else m.contiguous() for m in matrices], None


def _place(bias: torch.Tensor | None, bias_last: bool) -> str:
    return "none" if bias is None else "last" if bias_last else "first"


def _blocks(count: int, width: int) -> tuple[int, int]:
    """Return rows and columns of a tile."""
    block_W = min(triton.next_power_of_2(width), _WIDEST if count > 1 else _TILE)
    return min(triton.next_power_of_2(count), _TILE // block_W), block_W


def _ahead(kernel: Any, dtype: str, place: str, tile: tuple[int, int]) -> AheadCase:
    """Return a case of rows of whole vectors, all of one type."""
    constants: dict[str, Any] = {"BIAS": place, "BLOCK_N": tile[0], "BLOCK_W": tile[1]}
    if place == "none":
        constants |= {"bias": None, "sums_GW": None}
    pointers = dict.fromkeys(("grad", "x0", "wx", "bias", "x", "out", "grad_x0", "grad_wx"), dtype)
    strides = ("width", "grad_stride", "x0_stride", "wx_stride", "x_stride")
    signature = {**pointers, "sums_GW": "*fp32", "count": "i64", "group_rows": "i32", **dict.fromkeys(strides, "i32")}
    names = set(kernel.arg_names)
    return AheadCase(
        f"{kernel.__name__.strip('_')} {dtype}, bias {place}",
        kernel,
        {name: kind for name, kind in signature.items() if name in names - constants.keys()},
        {name: value for name, value in constants.items() if name in names},
        frozenset({*pointers, "sums_GW", "group_rows", *strides} & names - constants.keys()),
    )


AHEAD: tuple[AheadCase, ...] = tuple(
    _ahead(kernel, dtype, place, (1, 2048) if place == "none" else (4, 512))
    for kernel in (_forward_kernel, _backward_kernel)
    for dtype in ("*fp32", "*bf16", "*fp16")
    for place in ("none", "first", "last")
)
