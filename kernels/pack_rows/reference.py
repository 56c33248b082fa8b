"""The meaning of packed rows, in plain PyTorch: the same bits on every device and in every implementation, but for NaN.

Each step is one IEEE operation in float32, rounded to nearest, ties to even. There is no division by a constant, which
PyTorch computes as a product on GPUs, and no sum of a product, which compilers contract.

Shape suffixes: N rows, W columns, P elements of a packed row.
"""

from __future__ import annotations

import torch

CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Row-scaled formats: the type of an element, and its largest value. Each row starts with its scale in float32.
SCALED = {"float8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
FORMATS = (*CASTS, *SCALED)
SCALE_BYTES = 4
SMALLEST_SCALE = 2.0**-100  # a row below it is sent as zeros; the reciprocal would not be a normal number


def packed_width(width: int, form: str) -> int:
    """Return P: the elements of a packed row of ``width`` columns; 16 bits each in a cast, else bytes."""
    return width if form in CASTS or not width else width + SCALE_BYTES


def packed_dtype(form: str) -> torch.dtype:
    """Return the element type of packed rows."""
    return CASTS.get(form, torch.uint8)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return floating-point values, or bytes of no rows, in another type; float16 keeps finite what is finite."""
    if dtype == values.dtype:
        return values
    if dtype is torch.float16:
        values, largest = values.float(), torch.finfo(dtype).max  # the bound is no bfloat16
        values = torch.where(values.isinf(), values, values.clamp(-largest, largest))
    return values.to(dtype)


def pack_rows(rows_NW: torch.Tensor, form: str) -> torch.Tensor:
    """Return rows in a narrower form.

    Args:
        rows_NW: (N, W) floating point, any strides; float64 is rounded to float32 first.
        form: ``"bfloat16"``, ``"float16"`` (what is too large becomes the largest finite number; infinities stay),
            ``"float8"`` (e4m3) or ``"int8"``, which are scaled by the largest magnitude of each row.

    Returns:
        (N, P) of ``packed_dtype``, contiguous: see ``packed_width``. A row of a scaled form that holds an infinity or a
        NaN comes back as NaN whole: nothing hides it. Rows that are of the form's type already are not copied.

    Cost: reads N W elements, writes N P.
    """
    if form in CASTS:
        return cast(rows_NW, CASTS[form]).contiguous()
    if not rows_NW.shape[1]:
        return rows_NW.new_empty(rows_NW.shape, dtype=torch.uint8)
    dtype, largest = SCALED[form]
    values_NW = rows_NW.float()
    scale_N1 = values_NW.abs().amax(dim=1, keepdim=True) * (1 / largest)  # the constant is rounded to float32
    scale_N1 = torch.where(scale_N1 < SMALLEST_SCALE, 0.0, scale_N1)
    scale_N1 = torch.where(scale_N1.isfinite(), scale_N1, torch.nan)
    # At most largest * (1 + 2^-22), which rounds to the largest value: nothing has to be clamped.
    values_NW = torch.where(scale_N1 > 0, values_NW * scale_N1.reciprocal(), 0.0)
    if dtype is torch.int8:
        values_NW = values_NW.round()
    # Flat: a dimension of size 1 may have any stride, and then cannot be read as bytes.
    scales, values = scale_N1.reshape(-1).view(torch.uint8), values_NW.to(dtype).reshape(-1).view(torch.uint8)
    return torch.cat([scales.view(-1, SCALE_BYTES), values.view(rows_NW.shape)], dim=1)


def unpack_rows(packed_NP: torch.Tensor, form: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows (N, W) of ``dtype`` that :func:`pack_rows` packed, as near as the form allows."""
    if form in CASTS or not width:
        return cast(packed_NP, dtype)
    scale_N = packed_NP[:, :SCALE_BYTES].reshape(-1).view(torch.float32)
    values_NW = packed_NP[:, SCALE_BYTES:].reshape(-1).view(SCALED[form][0]).view(-1, width)
    return cast(values_NW.float() * scale_N[:, None], dtype)
