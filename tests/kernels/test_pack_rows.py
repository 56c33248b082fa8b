"""Packed rows: how far they are from what was packed, what they do with what cannot be packed, and their exact bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from dmt_compile.kernels.pack_rows.op import FORMATS, pack_rows, packed_dtype, packed_width, supports, unpack_rows
from dmt_compile.kernels.pack_rows.reference import SCALE_BYTES, SCALED

# Rounding, relative to the element and to the largest of its row: half a step of the type.
RELATIVE = {"bfloat16": 2**-8, "float16": 2**-11, "float8": 2**-4, "int8": 0.0}
OF_LARGEST = {"bfloat16": 0.0, "float16": 0.0, "float8": 2**-10 / 448, "int8": 0.5 / 127}
SHAPES = [(1, 1), (127, 16), (5, 1000), (0, 8), (3, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def roundtrip(rows_NW: torch.Tensor, form: str) -> torch.Tensor:
    packed = pack_rows(rows_NW, form)
    assert packed.shape == (len(rows_NW), packed_width(rows_NW.shape[1], form))
    assert packed.dtype == packed_dtype(form)
    assert packed.is_contiguous()
    return unpack_rows(packed, form, rows_NW.shape[1], rows_NW.dtype)


def rows_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return normal rows whose scales span six decades."""
    rows_NW = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (rows_NW * torch.logspace(-3, 3, shape[0], dtype=torch.float64)[:, None]).to(dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_element_is_off_by_half_a_step(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows_NW = rows_of(shape, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float16_keeps_the_largest_where_a_number_is_too_large(dtype: torch.dtype) -> None:
    rows_NW = torch.tensor([[1e6, -1e6, 65504.0]], dtype=dtype)  # 65504 is 65536 in bfloat16
    packed = pack_rows(rows_NW, "float16")
    assert packed.tolist() == [[65504.0, -65504.0, 65504.0]]


def test_float16_rows_that_travel_as_bfloat16_come_back_finite() -> None:
    assert roundtrip(torch.tensor([[65504.0, -65504.0]], dtype=torch.float16), "bfloat16").tolist() == [
        [65504.0, -65504.0]
    ]


@pytest.mark.parametrize("form", SCALED)
def test_the_largest_float32_comes_back_finite(form: str) -> None:
    largest = torch.finfo(torch.float32).max
    assert roundtrip(torch.tensor([[largest, -largest, 1.0]]), form).isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_strides_do_not_matter(form: str) -> None:
    wide = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    rows_NW = wide[::2, 1:9:2]
    assert torch.equal(pack_rows(rows_NW, form), pack_rows(rows_NW.contiguous(), form))


# ---------------------------------------------------------------------------------------------------------- exact bits


def nearest(exact: Fraction) -> np.float32:
    """Return the float32 nearest to a number: to a product of two it is exact, since a double holds that whole."""
    return np.float32(exact.numerator / exact.denominator)


def steps_of(row: list[float], form: str) -> tuple[np.float32, list[Fraction]]:
    """Return a row's scale and its scaled elements by the operations of the README, each rounded once."""
    reciprocal = nearest(1 / Fraction(SCALED[form][1]))
    scale = nearest(Fraction(max(map(abs, row))) * Fraction(float(reciprocal)))
    factor = nearest(1 / Fraction(float(scale)))
    return scale, [Fraction(float(nearest(Fraction(x) * Fraction(float(factor))))) for x in row]


def test_the_bits_of_int8_rows_follow_from_the_operations() -> None:
    rows_NW = rows_of((200, 9), torch.float32)
    packed = pack_rows(rows_NW, "int8").numpy()
    for row, found in zip(rows_NW.tolist(), packed, strict=True):
        scale, scaled = steps_of(row, "int8")
        assert found[:SCALE_BYTES].tobytes() == scale.tobytes()
        assert found[SCALE_BYTES:].view(np.int8).tolist() == [round(x) for x in scaled]


def test_the_bits_of_float8_rows_follow_from_the_operations() -> None:
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
    rows_NW = rows_of((200, 9), torch.float32)
    packed = pack_rows(rows_NW, "float8").numpy()
    for row, found in zip(rows_NW.tolist(), packed, strict=True):
        scale, scaled = steps_of(row, "float8")
        assert found[:SCALE_BYTES].tobytes() == scale.tobytes()
        for code, value in zip(found[SCALE_BYTES:].tolist(), scaled, strict=True):
            assert code >> 7 == (value < 0)
            # the nearest; of two, the even one
            assert code & 127 == min(range(127), key=lambda c: (abs(Fraction(finite[c]) - abs(value)), c % 2))


# --------------------------------------------------------------------------------------------------------------- Triton


def assert_same_bits(rows_NW: torch.Tensor, form: str) -> None:
    """Assert that both implementations pack and unpack rows in the same way."""
    packed, expected = (pack_rows(rows_NW, form, kernel=kernel) for kernel in ("triton", "reference"))
    assert (packed.shape, packed.dtype, packed.is_contiguous()) == (expected.shape, expected.dtype, True)
    assert_same_values(packed, expected)
    for dtype in DTYPES:
        back, wanted = (
            unpack_rows(expected, form, rows_NW.shape[1], dtype, kernel=kernel) for kernel in ("triton", "reference")
        )
        assert (back.shape, back.dtype) == (wanted.shape, dtype)
        assert_same_values(back, wanted)


def assert_same_values(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that all bits are equal, but for which NaN a NaN is in floating-point numbers."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = (tensor.masked_fill(tensor.isnan(), 0).view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 127), (2, 4097), (2, 9001), (5000, 1)])
def test_triton_gives_the_bits(device: torch.device, form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_same_bits(rows_of(shape, dtype).to(device), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_bits_of_what_is_not_finite_or_too_small_or_large(
    device: torch.device, form: str, dtype: torch.dtype
) -> None:
    odd = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-44, 3e-39, -1e-31, 6e-5, 3e-8, 65504.0, 65519.0, 65520.0]
    odd = [*odd, 3.39e38, torch.finfo(torch.float32).max, torch.finfo(dtype).max, -torch.finfo(dtype).tiny]
    values = torch.tensor(odd, device=device).to(dtype)
    assert_same_bits(torch.stack([values, values.flip(0), torch.ones_like(values)], dim=1), form)
    assert_same_bits(values[:, None], form)
    assert_same_bits(values[None, :], form)


# numpy, which interprets, tells of the signalling ones among the NaNs
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("form", SCALED)
def test_triton_packs_every_bfloat16_in_a_row_of_its_own(device: torch.device, form: str) -> None:
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(every[:, None], form)


def packed_as_they_are(values: torch.Tensor, kernel: str) -> torch.Tensor:
    """Return the bytes of values in a row whose scale is 1, since its largest magnitude is the largest e4m3."""
    packed = pack_rows(torch.cat([values.new_tensor([448.0]), values])[None], "float8", kernel=kernel)[0]
    assert packed[:SCALE_BYTES].cpu().numpy().view(np.float32) == 1.0
    return packed[SCALE_BYTES + 1 :]


def test_every_bfloat16_of_at_most_448_is_the_e4m3_that_pytorch_makes_of_it(device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = every[every.abs() <= 448]
    assert len(values) == 2 * (0x43E0 + 1)
    found = packed_as_they_are(values.to(device), "triton").cpu()
    assert torch.equal(found, values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_every_border_between_two_e4m3_and_its_neighbours_is_rounded_as_pytorch_does(device: torch.device) -> None:
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    up, down = torch.nextafter(borders, torch.tensor(1e9)), torch.nextafter(borders, torch.tensor(-1e9))
    values = torch.cat([borders, up, down])
    values = torch.cat([values, -values])
    values = values[values.abs() <= 448]
    assert len(values) > 1500
    found = packed_as_they_are(values.to(device), "triton").cpu()
    assert torch.equal(found, values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("form", SCALED)
def test_every_byte_is_unpacked(device: torch.device, form: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127] if form == "float8" else codes  # a row with NaNs has them in its scale
    values = codes.view(SCALED[form][0]).float()
    packed = torch.cat([torch.tensor([0.75]).view(torch.uint8), codes])[None].to(device)
    found = unpack_rows(packed, form, len(codes), torch.float32, kernel="triton")[0]
    assert torch.equal(found.cpu(), values * 0.75)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_reads_rows_of_any_strides(device: torch.device, form: str, dtype: torch.dtype) -> None:
    wide = rows_of((40, 30), dtype).to(device)
    for rows_NW in (wide[::2, 1:9], wide[:, ::3], wide.t(), wide[:1].expand(5, 30), wide[:, :1].expand(40, 7)):
        assert_same_bits(rows_NW, form)


@pytest.mark.parametrize("form", FORMATS)
def test_triton_reads_rows_that_lie_far_apart(
    device: torch.device, form: str, far_apart: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    near = rows_of((2100, 9), torch.bfloat16).to(device)
    packed = pack_rows(far_apart(near), form, kernel="triton")
    assert torch.equal(packed.view(torch.uint8), pack_rows(near, form).view(torch.uint8))
    back = unpack_rows(far_apart(packed), form, 9, torch.float32, kernel="triton")
    assert torch.equal(back, unpack_rows(packed, form, 9, torch.float32))


def test_triton_reads_columns_that_lie_far_apart(
    device: torch.device, far_apart: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    near = rows_of((2100, 9), torch.bfloat16).to(device)
    for form in FORMATS:
        packed = pack_rows(far_apart(near).t(), form, kernel="triton")
        assert torch.equal(packed.view(torch.uint8), pack_rows(near.t(), form).view(torch.uint8))


@pytest.mark.parametrize("form", SCALED)
def test_triton_writes_rows_that_lie_far_apart(
    device: torch.device, form: str, far_apart: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    from dmt_compile.kernels.pack_rows.triton_kernel import pack_into

    rows_NW = rows_of((2100, 9), torch.float32).to(device)
    out = far_apart(torch.zeros(2100, 9 + SCALE_BYTES, dtype=torch.uint8, device=device))
    pack_into(out, rows_NW, form)
    assert torch.equal(out.contiguous(), pack_rows(rows_NW, form))


def test_what_triton_does_not_pack_has_its_reason(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports(torch.float32, device) is None
    assert supports(torch.float64, device) == "rows of torch.float64"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no kernels for cpu" in (supports(torch.float32, torch.device("cpu")) or "")
