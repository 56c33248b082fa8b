"""Packed rows by the chosen implementation; ``reference.py`` defines the bits.

Shape suffixes: N rows, W columns, P elements of a packed row.
"""

from __future__ import annotations

import torch

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.pack_rows import reference
from dmt_compile.kernels.pack_rows.reference import CASTS, FORMATS, packed_dtype, packed_width

__all__ = ["CASTS", "FORMATS", "pack_rows", "packed_dtype", "packed_width", "supports", "try_out", "unpack_rows"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the Triton kernels cannot pack rows of ``dtype`` on ``device``; ``None`` where they can."""
    if dtype not in _DTYPES:
        return f"rows of {dtype}"
    return triton_support.why_not(device)


def try_out(form: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Pack and unpack one row by the Triton kernels, which compiles them."""
    packed = pack_rows(torch.zeros(1, width, dtype=dtype, device=device), form, "triton")
    unpack_rows(packed, form, width, dtype, "triton")


def pack_rows(rows_NW: torch.Tensor, form: str, kernel: str = "reference") -> torch.Tensor:
    """Return rows in a narrower form, (N, P) of ``packed_dtype``, contiguous.

    Args:
        rows_NW: (N, W) floating point, any strides.
        form: one of ``FORMATS``.
        kernel: ``"reference"``, or ``"triton"`` where :func:`supports` has no reason against it; the bits are the same.

    Cost: reads N W elements, writes N P.
    """
    if kernel == "triton":
        from dmt_compile.kernels.pack_rows import triton_kernel

        return triton_kernel.pack_rows(rows_NW, form)
    return reference.pack_rows(rows_NW, form)


def unpack_rows(
    packed_NP: torch.Tensor, form: str, width: int, dtype: torch.dtype, kernel: str = "reference"
) -> torch.Tensor:
    """Return the rows (N, W) of ``dtype`` that :func:`pack_rows` packed, by either implementation."""
    if kernel == "triton":
        from dmt_compile.kernels.pack_rows import triton_kernel

        return triton_kernel.unpack_rows(packed_NP, form, width, dtype)
    return reference.unpack_rows(packed_NP, form, width, dtype)
