"""The dot interaction in Triton: two kernels a direction, and their launches.

Of few vectors (``whole``) all products of a sample are one tile, and a program takes several samples; of many
(``tiled``) a program makes one tile of a sample's products, or of its gradient.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, E columns of the leading vector, P pairs. In
kernels S samples of a program, R rows and C columns of a tile, D and E columns at a time.
"""

# Triton types what it compiles itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.dot_interaction.blocks import Use
from dmt_compile.kernels.dot_interaction.reference import pair_count
from dmt_compile.kernels.triton_support import AheadCase


@triton.jit
def _inside(i, j, DIAGONAL: tl.constexpr, UPPER: tl.constexpr):
    """Tell whether row ``i``, column ``j`` is in the triangle."""
    beyond = j - i if UPPER else i - j
    return beyond >= (0 if DIAGONAL else 1)


@triton.jit
def _place(i, j, F: tl.constexpr, DIAGONAL: tl.constexpr, UPPER: tl.constexpr):
    """Return the number of the pairs before row ``i``, column ``j`` of the triangle."""
    if UPPER:  # rows above are of F, F - 1, ... pairs with the diagonal, one fewer each without
        before = i * F - i * (i - 1) // 2 + j - i if DIAGONAL else i * F - i * (i + 1) // 2 + j - i - 1
    else:
        before = i * (i + 1) // 2 + j if DIAGONAL else i * (i - 1) // 2 + j
    return before


@triton.jit
def _multiply(a, b, added, PRECISION: tl.constexpr):
    """Return ``a @ b + added``, summed in float32."""
    if PRECISION == "interpreted":  # Triton's interpreter multiplies the bits of bfloat16, not its values
        return tl.dot(a.to(tl.float32), b.to(tl.float32), added, input_precision="ieee")
    else:
        return tl.dot(a, b, added, input_precision=PRECISION)


@triton.jit
def forward_whole(
    vectors, leading, out, samples, stride_b, stride_f, stride_d, leading_stride_b, leading_stride_e,
    F: tl.constexpr, COLUMNS: tl.constexpr, LEADING: tl.constexpr, PAIRS: tl.constexpr, DIAGONAL: tl.constexpr,
    UPPER: tl.constexpr, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sample_S = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    row_R = tl.arange(0, R)
    here_S = sample_S < samples
    start_SR = sample_S[:, None] * stride_b + row_R.to(tl.int64)[None, :] * stride_f
    valid_SR = here_S[:, None] & (row_R < F)[None, :]
    products_SRR = tl.zeros((S, R, R), tl.float32)
    for first in range(0, COLUMNS, D):
        column_D = first + tl.arange(0, D).to(tl.int64)
        vectors_SRD = tl.load(
            vectors + start_SR[:, :, None] + column_D[None, None, :] * stride_d,
            mask=valid_SR[:, :, None] & (column_D < COLUMNS)[None, None, :],
            other=0.0,
        )
        products_SRR = _multiply(vectors_SRD, tl.permute(vectors_SRD, (0, 2, 1)), products_SRR, PRECISION)
    out_S = out + sample_S * (LEADING + PAIRS)
    i, j = row_R[:, None], row_R[None, :]
    chosen_RR = _inside(i, j, DIAGONAL, UPPER) & (i < F) & (j < F)
    tl.store(
        out_S[:, None, None] + (LEADING + _place(i, j, F, DIAGONAL, UPPER))[None, :, :],
        products_SRR.to(out.dtype.element_ty),
        mask=here_S[:, None, None] & chosen_RR[None, :, :],
    )
    if LEADING:
        for first in range(0, LEADING, E):
            column_E = first + tl.arange(0, E).to(tl.int64)
            mask_SE = here_S[:, None] & (column_E < LEADING)[None, :]
            from_SE = leading + sample_S[:, None] * leading_stride_b + column_E[None, :] * leading_stride_e
            tl.store(out_S[:, None] + column_E[None, :], tl.load(from_SE, mask=mask_SE), mask=mask_SE)


@triton.jit
def backward_whole(
    grad, vectors, out, samples, grad_stride_b, grad_stride_p, stride_b, stride_f, stride_d,
    F: tl.constexpr, COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr, UPPER: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (COLUMNS + D - 1) // D
    sample_S = (tl.program_id(0) // CHUNKS).to(tl.int64) * S + tl.arange(0, S)
    column_D = (tl.program_id(0) % CHUNKS) * D + tl.arange(0, D).to(tl.int64)
    row_R = tl.arange(0, R)
    here_S = sample_S < samples
    i, j = row_R[:, None], row_R[None, :]
    chosen_RR = _inside(i, j, DIAGONAL, UPPER) & (i < F) & (j < F)
    place_RR = _place(i, j, F, DIAGONAL, UPPER).to(tl.int64)
    grad_SRR = tl.load(
        grad + (sample_S * grad_stride_b)[:, None, None] + (place_RR * grad_stride_p)[None, :, :],
        mask=here_S[:, None, None] & chosen_RR[None, :, :],
        other=0.0,
    )
    wide_SRR = grad_SRR.to(tl.float32)
    both_SRR = (wide_SRR + tl.permute(wide_SRR, (0, 2, 1))).to(grad_SRR.dtype)
    mask_SRD = here_S[:, None, None] & (row_R < F)[None, :, None] & (column_D < COLUMNS)[None, None, :]
    start_SR = sample_S[:, None] * stride_b + row_R.to(tl.int64)[None, :] * stride_f
    vectors_SRD = tl.load(vectors + start_SR[:, :, None] + column_D[None, None, :] * stride_d, mask=mask_SRD, other=0.0)
    result_SRD = _multiply(both_SRR, vectors_SRD, tl.zeros((S, R, D), tl.float32), PRECISION)
    row_SR = sample_S[:, None] * F + row_R[None, :]
    to_SRD = out + row_SR[:, :, None] * COLUMNS + column_D[None, None, :]
    tl.store(to_SRD, result_SRD.to(out.dtype.element_ty), mask=mask_SRD)


@triton.jit
def forward_tiled(
    vectors, leading, out, stride_b, stride_f, stride_d, leading_stride_b, leading_stride_e,
    F: tl.constexpr, COLUMNS: tl.constexpr, LEADING: tl.constexpr, PAIRS: tl.constexpr, DIAGONAL: tl.constexpr,
    UPPER: tl.constexpr, R: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (F + R - 1) // R
    OF_SAMPLE: tl.constexpr = TILES * (TILES + 1) // 2
    sample = (tl.program_id(0) // OF_SAMPLE).to(tl.int64)
    number = tl.program_id(0) % OF_SAMPLE
    high = number * 0
    for row in tl.static_range(1, TILES):
        high += (number >= row * (row + 1) // 2).to(tl.int32)
    low = number - high * (high + 1) // 2
    row_R = (low if UPPER else high) * R + tl.arange(0, R)
    row_C = (high if UPPER else low) * R + tl.arange(0, R)
    vectors += sample * stride_b
    start_R, start_C = row_R.to(tl.int64) * stride_f, row_C.to(tl.int64) * stride_f
    products_RC = tl.zeros((R, R), tl.float32)
    for first in range(0, COLUMNS, D):
        column_D = first + tl.arange(0, D).to(tl.int64)
        valid_D = column_D < COLUMNS
        at_D = column_D * stride_d
        vectors_RD = tl.load(
            vectors + start_R[:, None] + at_D[None, :], mask=(row_R < F)[:, None] & valid_D[None, :], other=0.0
        )
        vectors_CD = tl.load(
            vectors + start_C[:, None] + at_D[None, :], mask=(row_C < F)[:, None] & valid_D[None, :], other=0.0
        )
        products_RC = _multiply(vectors_RD, tl.trans(vectors_CD), products_RC, PRECISION)
    out += sample * (LEADING + PAIRS)
    i, j = row_R[:, None], row_C[None, :]
    tl.store(
        out + LEADING + _place(i, j, F, DIAGONAL, UPPER),
        products_RC.to(out.dtype.element_ty),
        mask=_inside(i, j, DIAGONAL, UPPER) & (i < F) & (j < F),
    )
    if LEADING:
        for first in range(0, LEADING, E):
            column_E = first + tl.arange(0, E).to(tl.int64)
            mask_E = (column_E < LEADING) & (number == 0)  # one of a sample's programs copies it
            from_E = leading + sample * leading_stride_b + column_E * leading_stride_e
            tl.store(out + column_E, tl.load(from_E, mask=mask_E), mask=mask_E)


@triton.jit
def backward_tiled(
    grad, vectors, out, grad_stride_b, grad_stride_p, stride_b, stride_f, stride_d,
    F: tl.constexpr, COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr, UPPER: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (F + R - 1) // R
    CHUNKS: tl.constexpr = (COLUMNS + D - 1) // D
    sample = (tl.program_id(0) // (TILES * CHUNKS)).to(tl.int64)
    tile = tl.program_id(0) // CHUNKS % TILES
    column_D = (tl.program_id(0) % CHUNKS) * D + tl.arange(0, D).to(tl.int64)
    grad += sample * grad_stride_b
    vectors += sample * stride_b
    row_R = tile * R + tl.arange(0, R)
    result_RD = tl.zeros((R, D), tl.float32)
    # The tile on the diagonal is in both loops: once as it is and once transposed.
    for other in range(tile if UPPER else 0, TILES if UPPER else tile + 1):
        row_C = other * R + tl.arange(0, R)
        grad_RC = _tile(grad, grad_stride_p, row_R, row_C, F, DIAGONAL, UPPER)
        vectors_CD = _rows(vectors, stride_f, stride_d, row_C, column_D, F, COLUMNS)
        result_RD = _multiply(grad_RC, vectors_CD, result_RD, PRECISION)
    for other in range(0 if UPPER else tile, tile + 1 if UPPER else TILES):
        row_C = other * R + tl.arange(0, R)
        grad_CR = _tile(grad, grad_stride_p, row_C, row_R, F, DIAGONAL, UPPER)
        vectors_CD = _rows(vectors, stride_f, stride_d, row_C, column_D, F, COLUMNS)
        result_RD = _multiply(tl.trans(grad_CR), vectors_CD, result_RD, PRECISION)
    to_RD = out + (sample * F + row_R)[:, None] * COLUMNS + column_D[None, :]
    mask_RD = (row_R < F)[:, None] & (column_D < COLUMNS)[None, :]
    tl.store(to_RD, result_RD.to(out.dtype.element_ty), mask=mask_RD)


@triton.jit
def _tile(grad, stride_p, row, column, F: tl.constexpr, DIAGONAL: tl.constexpr, UPPER: tl.constexpr):
    i, j = row[:, None], column[None, :]
    mask = _inside(i, j, DIAGONAL, UPPER) & (i < F) & (j < F)
    return tl.load(grad + _place(i, j, F, DIAGONAL, UPPER).to(tl.int64) * stride_p, mask=mask, other=0.0)


@triton.jit
def _rows(vectors, stride_f, stride_d, row, column, F: tl.constexpr, COLUMNS: tl.constexpr):
    at = row.to(tl.int64)[:, None] * stride_f + column[None, :] * stride_d
    return tl.load(vectors + at, mask=(row < F)[:, None] & (column < COLUMNS)[None, :], other=0.0)


def dot_interaction(
    vectors_BFD: torch.Tensor, leading_BE: torch.Tensor | None, diagonal: bool, upper: bool, tf32: bool
) -> torch.Tensor:
    """Return (B, E + P); see ``op.py``."""
    samples, vectors, _ = vectors_BFD.shape
    use = Use.of(vectors_BFD, diagonal, upper, tf32)
    leading = 0 if leading_BE is None else leading_BE.shape[1]
    out = vectors_BFD.new_empty(samples, leading + pair_count(vectors, diagonal))
    if not out.numel():
        return out
    # Without a leading vector nothing is read of it: any tensor stands for it.
    tensors = (vectors_BFD, vectors_BFD if leading_BE is None else leading_BE, out)
    strides = (*vectors_BFD.stride(), *((0, 0) if leading_BE is None else leading_BE.stride()))
    grid, options = (use.forward_programs(samples),), {**use.forward(leading), "num_warps": use.warps(False)}
    if use.whole:
        forward_whole[grid](*tensors, samples, *strides, **options)
    else:
        forward_tiled[grid](*tensors, *strides, **options)
    return out


def dot_interaction_backward(
    grad_BP: torch.Tensor, vectors_BFD: torch.Tensor, diagonal: bool, upper: bool, tf32: bool
) -> torch.Tensor:
    """Return the gradient of the vectors, (B, F, D), contiguous; see ``op.py``."""
    samples = vectors_BFD.shape[0]
    use = Use.of(vectors_BFD, diagonal, upper, tf32)
    out = vectors_BFD.new_empty(vectors_BFD.shape)
    if not out.numel():
        return out
    tensors, strides = (grad_BP, vectors_BFD, out), (*grad_BP.stride(), *vectors_BFD.stride())
    grid, options = (use.backward_programs(samples),), {**use.backward(), "num_warps": use.warps(True)}
    if use.whole:
        backward_whole[grid](*tensors, samples, *strides, **options)
    else:
        backward_tiled[grid](*tensors, *strides, **options)
    return out


def _ahead(vectors: int, columns: int, dtype: str) -> tuple[AheadCase, AheadCase]:
    """Return the cases of contiguous tensors, whose innermost strides of 1 are constants at launch."""
    narrow = dtype == "bf16"
    use = Use(vectors, columns, False, False, 2 if narrow else 4, "tf32" if dtype == "tf32" else "ieee")
    types = {"samples": "i32"} if use.whole else {}
    types |= dict.fromkeys(("vectors", "leading", "grad", "out"), "*bf16" if narrow else "*fp32")
    types |= dict.fromkeys(("stride_b", "stride_f", "leading_stride_b", "grad_stride_b"), "i32")
    aligned = {"vectors", "leading", "out", "leading_stride_b", *({"stride_b", "stride_f"} if not columns % 16 else ())}
    cases = []
    for name, kernel, constants, warps in (
        ("forward", forward_whole if use.whole else forward_tiled, use.forward(columns), use.warps(False)),
        ("backward", backward_whole if use.whole else backward_tiled, use.backward(), use.warps(True)),
    ):
        known = {**constants, "stride_d": 1, "leading_stride_e": 1, "grad_stride_p": 1}
        names = kernel.arg_names
        cases.append(
            AheadCase(
                f"{name} {vectors} x {columns} {dtype}",
                kernel,
                {argument: kind for argument, kind in types.items() if argument in names},
                {argument: value for argument, value in known.items() if argument in names},
                frozenset(aligned & set(names)),
                warps,
            )
        )
    return cases[0], cases[1]


AHEAD: tuple[AheadCase, ...] = tuple(
    case
    for vectors, columns, dtypes in (
        (8, 16, ("fp32",)), (27, 128, ("fp32", "tf32", "bf16")), (100, 64, ("tf32",)), (512, 1000, ("fp32", "bf16")),
    )
    for dtype in dtypes
    for case in _ahead(vectors, columns, dtype)
)  # fmt: skip
