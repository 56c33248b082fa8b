"""The tail of a cross layer: both implementations against double precision, in every way that models write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmt_compile.kernels.cross_layer import reference
from dmt_compile.kernels.cross_layer.op import cross_tail, cross_tail_backward, supports
from tests._tolerances import error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = ["none", "first", "last"]
Tail = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


def tail_of(
    shape: tuple[int, ...], place: str, dtype: torch.dtype = torch.float32, device: Any = "cpu", bias_dims: int = 1
) -> Tail:
    """Return x0, wx, bias and x, all of which need a gradient."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    x0, wx, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(shape[-bias_dims:], generator=generator, dtype=torch.float64)
    x0, wx, bias, x = (t.to(device, dtype).requires_grad_() for t in (x0, wx, bias, x))
    return x0, wx, None if place == "none" else bias, x


def results(function: Callable[..., torch.Tensor], tail: Tail, *options: Any) -> list[torch.Tensor]:
    """Return the output, and the gradients of all that is there for a fixed weighting of it."""
    out = function(*tail, *options)
    weights = torch.linspace(1, 2, out.numel(), dtype=torch.bfloat16).view(out.shape).to(out)  # exact in every type
    inputs = [t for t in tail if t is not None]
    return [out, *torch.autograd.grad(out, inputs, weights, materialize_grads=True)]


def assert_right(tail: Tail, place: str, kernel: str) -> None:
    """Assert that the error against double precision is at most twice the reference's."""
    last = place == "last"
    double: Any = tuple(None if t is None else t.detach().double().requires_grad_() for t in tail)
    exact = results(reference.cross_tail, double, last)
    theirs = results(reference.cross_tail, tail, last)
    found = results(cross_tail, tail, last, kernel)
    for position, (mine, their, wanted) in enumerate(zip(found, theirs, exact, strict=True)):
        assert mine.shape == wanted.shape
        assert mine.dtype == their.dtype
        if wanted.numel():
            # A step of the result: the interpreter cuts bfloat16 off. A bias has a sum, which may have another order.
            least = max(torch.finfo(mine.dtype).eps, 1e-6 if tail[2] is not None and position == 3 else 0.0)
            assert error(mine.detach(), wanted.detach()) <= max(2 * error(their.detach(), wanted.detach()), least)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (127, 16), (5, 1000), (1000, 1), (9, 127), (1, 5000), (0, 8), (3, 0)])
def test_triton_against_double_precision(
    device: torch.device, place: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    assert_right(tail_of(shape, place, dtype, device), place, "triton")


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("shape", "bias_dims"), [((6, 4, 1), 2), ((6, 4, 1), 1), ((3, 5, 7), 1), ((2, 3, 4), 3), ((9,), 1)]
)
def test_dimensions_before_and_in_a_bias(
    device: torch.device, kernel: str, place: str, shape: tuple[int, ...], bias_dims: int
) -> None:
    assert_right(tail_of(shape, place, device=device, bias_dims=bias_dims), place, kernel)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("place", PLACES)
def test_tensors_that_are_not_contiguous(device: torch.device, kernel: str, place: str) -> None:
    _, _, bias, _ = tail_of((12, 10), place, device=device)
    wide = torch.randn(40, 60, generator=torch.Generator().manual_seed(3)).to(device)
    columns = (wide[:12, 3:13], wide[:12, 20:30], wide[:12, 5:15])
    every_other = (wide[::4, :20:2][:10, :], wide[:10, ::6], wide[:10, 1::6])
    turned = (wide[:10, :12].t(), wide[:10, 5:17].t(), wide[20:30, :12].t())
    for x0, wx, x in (columns, every_other, turned):
        x0, wx, x = (t.detach().requires_grad_() for t in (x0, wx, x))
        assert not x0.is_contiguous()
        assert cross_tail(x0, wx, bias, x, False, kernel).is_contiguous()
        assert_right((x0, wx, bias, x), place, kernel)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_types_are_promoted_and_gradients_keep_theirs(device: torch.device, kernel: str) -> None:
    x0, wx, bias, x = tail_of((9, 16), "first", device=device)
    wx = wx.detach().bfloat16().requires_grad_()
    assert_right((x0, wx, bias, x), "first", kernel)
    assert cross_tail(x0, wx, bias, x, False, kernel).dtype == torch.float32


def test_rows_that_lie_far_apart(device: torch.device, far_apart: Callable[[torch.Tensor], torch.Tensor]) -> None:
    near = tail_of((2100, 8), "first", torch.bfloat16, device)
    grad = torch.ones(2100, 8, dtype=torch.bfloat16, device=device)
    expected = cross_tail(*near, False, "triton"), *cross_tail_backward(grad, *near[:3], False, "triton")
    bias = near[2]
    assert bias is not None
    for position in (0, 1, 3):
        far = [far_apart(t.detach()) if i == position else t for i, t in enumerate(near)]
        found = cross_tail(*far, False, "triton"), *cross_tail_backward(grad, *far[:3], False, "triton")
        assert all(map(torch.equal, found, expected))
    found = cross_tail_backward(far_apart(grad), *near[:3], False, "triton")
    assert all(map(torch.equal, found, expected[1:]))


def test_a_bias_has_the_same_gradient_every_time_and_in_groups_of_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmt_compile.kernels.cross_layer import triton_kernel

    tail = tail_of((999, 40), "first", device=device)
    grad = torch.randn(999, 40, generator=torch.Generator().manual_seed(4)).to(device)
    first, again = (cross_tail_backward(grad, *tail[:3], False, "triton") for _ in range(2))
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(triton_kernel, "_PROGRAMS", 1)
    grouped = cross_tail_backward(grad, *tail[:3], False, "triton")
    assert all(map(torch.equal, first[:2], grouped[:2]))
    exact = (grad.double() * tail[0].double()).sum(0)
    assert error(grouped[2], exact) < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_the_reference_has_the_gradient_of_its_mathematics(place: str) -> None:
    x0, wx, bias, x = tail_of((3, 5), place, torch.float64)
    inputs = [t for t in (x0, wx, bias, x) if t is not None]

    def run(*given: torch.Tensor) -> torch.Tensor:
        x0, wx, *rest, x = given
        return cross_tail(x0, wx, rest[0] if rest else None, x, place == "last")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("place", PLACES)
def test_the_operators_keep_the_rules_of_torch_library(device: torch.device, kernel: str, place: str) -> None:
    tail = tail_of((6, 5), place, device=device)
    torch.library.opcheck(cross_tail, (*tail, place == "last", kernel))
    detached = [None if t is None else t.detach() for t in tail]
    torch.library.opcheck(cross_tail_backward, (detached[3], *detached[:3], place == "last", kernel))


def test_a_frozen_input_gets_no_gradient_and_the_gradient_of_x_is_no_copy() -> None:
    x0, wx, _, x = tail_of((4, 5), "none")
    wx.requires_grad_(False)
    given = torch.ones(4, 5)
    out = cross_tail(x0, wx, None, x)
    found = torch.autograd.grad(out, [x0, x], given)
    assert found[1].data_ptr() == given.data_ptr()
    assert torch.equal(found[0], wx)


def test_what_triton_does_not_compute_has_its_reason(device: torch.device) -> None:
    assert supports(torch.bfloat16, device) is None
    assert supports(torch.float64, device) == "elements of torch.float64"
