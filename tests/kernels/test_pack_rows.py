"""Packed rows: how far they are from what was packed, and what they do with what cannot be packed."""

from __future__ import annotations

import math

import pytest
import torch

from dmt_compile.kernels.pack_rows.reference import FORMATS, SCALED, pack_rows, packed_dtype, packed_width, unpack_rows

# Rounding, relative to the element and to the largest of its row: half a step of the type.
RELATIVE = {"bfloat16": 2**-8, "float16": 2**-11, "float8": 2**-4, "int8": 0.0}
OF_LARGEST = {"bfloat16": 0.0, "float16": 0.0, "float8": 2**-10 / 448, "int8": 0.5 / 127}


def roundtrip(rows_NW: torch.Tensor, form: str) -> torch.Tensor:
    packed = pack_rows(rows_NW, form)
    assert packed.shape == (len(rows_NW), packed_width(rows_NW.shape[1], form))
    assert packed.dtype == packed_dtype(form)
    assert packed.is_contiguous()
    return unpack_rows(packed, form, rows_NW.shape[1], rows_NW.dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (127, 16), (5, 1000), (0, 8), (3, 0)])
def test_an_element_is_off_by_half_a_step(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NW = torch.randn(shape, generator=generator, dtype=dtype) * torch.logspace(-3, 3, shape[0]).to(dtype)[:, None]
    found = roundtrip(rows_NW, form)
    assert found.dtype == dtype
    largest = rows_NW.abs().amax(dim=1, keepdim=True) if rows_NW.numel() else rows_NW.abs()
    subnormal = 2**-25 if form == "float16" else 0.0
    bound = (RELATIVE[form] * rows_NW.abs() + OF_LARGEST[form] * largest) * (1 + 1e-5) + subnormal
    assert ((found - rows_NW).abs() <= bound).all()


@pytest.mark.parametrize("form", SCALED)
def test_a_row_has_a_scale_of_its_own(form: str) -> None:
    rows_NW = torch.tensor([[1e-6, -2e-6, 0.0], [3e4, -1e4, 7.0]])
    found = roundtrip(rows_NW, form)
    assert (found[0] - rows_NW[0]).abs().max() < 1e-7
    assert found[:, :2].abs().amax(dim=1) == pytest.approx([2e-6, 3e4])


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_and_what_is_too_small_come_back_as_zeros_at_most(form: str) -> None:
    rows_NW = torch.tensor([[0.0, -0.0], [1e-44, 1e-45]])
    assert (roundtrip(rows_NW, form).abs() <= rows_NW.abs()).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_hides_what_is_not_finite(form: str, bad: float) -> None:
    found = roundtrip(torch.tensor([[1.0, bad], [1.0, 2.0]]), form)
    assert found[1].isfinite().all()
    assert found[0].isnan().all() if form in SCALED else not found[0, 1].isfinite()


def test_float16_keeps_the_largest_where_a_number_is_too_large() -> None:
    assert roundtrip(torch.tensor([[1e6, -1e6]]), "float16").tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("form", FORMATS)
def test_strides_do_not_matter(form: str) -> None:
    wide = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    rows_NW = wide[::2, 1:9:2]
    assert torch.equal(pack_rows(rows_NW, form), pack_rows(rows_NW.contiguous(), form))
