"""Cells of the dot interaction and of the tail of a cross layer, forward and backward.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, P pairs, W columns of a cross layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_cells import (
    TYPES,
    Contestant,
    Cost,
    Work,
    inductors,
    kernel_of,
    largest_error,
    normal,
    pulled_back,
)

from dmt_compile.tolerances import HALF_FORWARD, HALF_GRADIENT, reordered_limit


def dot_cost(samples: int, vectors: int, width: int, unit: str, backward: bool) -> Cost:
    """Return the cost of all pairs behind a leading vector; backward the leading vector's gradient is a view."""
    pairs = vectors * (vectors - 1) // 2
    elements = 2 * vectors * width + pairs if backward else vectors * width + 2 * width + pairs
    flops = 2 * samples * pairs * width * (2 if backward else 1)
    return Cost(samples * elements * TYPES[unit].itemsize, flops, unit)


def cross_cost(samples: int, width: int, element_bytes: int, backward: bool) -> Cost:
    """Return the cost of x0 (wx + b) + x: three read, one written; backward three read, two and b's sum written."""
    elements = samples * width * (5 if backward else 4) + width * (2 if backward else 1)
    return Cost(elements * element_bytes, (5 if backward else 3) * samples * width)


def limit_of(unit: str, longest_sum: int, gradient: bool) -> float:
    """Return the error allowed: a TF32 factor has the mantissa of a float16."""
    if unit == "tf32":
        return (HALF_GRADIENT if gradient else HALF_FORWARD)[torch.float16]
    return reordered_limit(TYPES[unit], longest_sum, gradient)


def eager_dots(
    vectors_BFD: torch.Tensor, leading_BD: torch.Tensor, rows_P: torch.Tensor, columns_P: torch.Tensor
) -> torch.Tensor:
    """Return the dot products as a DLRM writes them."""
    dots_BFF = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))
    return torch.cat([leading_BD, dots_BFF[:, rows_P, columns_P]], dim=1)


def eager_tail(x0_BW: torch.Tensor, wx_BW: torch.Tensor, bias_W: torch.Tensor, x_BW: torch.Tensor) -> torch.Tensor:
    """Return the tail of a cross layer."""
    return x0_BW * (wx_BW + bias_W) + x_BW


def contest(
    cost: Cost,
    functions: dict[str, Callable[[], Callable[..., torch.Tensor]]],
    inputs: list[torch.Tensor],
    oracle: Callable[..., torch.Tensor],
    backward: bool,
    limit: float,
) -> Work:
    """Return the work of computing a function of tensors, or its gradients.

    Args:
        cost: of it.
        functions: contestant -> what returns its function of ``inputs``.
        inputs: drawn.
        oracle: gives the right numbers for float64 inputs.
        backward: time the gradients of ``inputs``, for a drawn gradient of the output.
        limit: relative error that is allowed.
    """
    wide = [x.double().requires_grad_(backward) for x in inputs]
    expected = [oracle(*wide)]
    grad = normal(inputs[0].device, *expected[0].shape, seed=9, dtype=inputs[0].dtype)
    if backward:
        expected = list(torch.autograd.grad(expected[0], wide, grad.double()))
    given = [x.requires_grad_(backward) for x in inputs]

    def of(make: Callable[[], Callable[..., torch.Tensor]]) -> Contestant:
        function = make()
        return pulled_back(function(*given), given, grad) if backward else Contestant(lambda: function(*given))

    def error(found: Any) -> float:
        return largest_error(found if backward else [found], expected, limit)

    makers = {name: lambda make=make: of(make) for name, make in functions.items()}
    return Work(cost, makers, error)


@dataclass(frozen=True)
class Dot:
    """All pairs of ``vectors`` vectors behind the first of them, as in a DLRM."""

    vectors: int = 27
    width: int = 128
    samples: int = 16_384
    unit: str = "tf32"
    backward: bool = False

    @property
    def name(self) -> str:
        """Vectors, width, samples and unit."""
        return f"dot-{'bwd-' if self.backward else ''}f{self.vectors}-d{self.width}-b{self.samples}-{self.unit}"

    def tiny(self) -> Dot:
        """Return the same for Triton's interpreter."""
        return replace(self, vectors=min(self.vectors, 20), width=24, samples=5)

    def make(self, device: torch.device) -> Work:
        """Draw vectors."""
        dtype = TYPES[self.unit]
        vectors_BFD = normal(device, self.samples, self.vectors, self.width, seed=1, dtype=dtype)
        leading_BD = normal(device, self.samples, self.width, seed=2, dtype=dtype)
        rows_P, columns_P = torch.tril_indices(self.vectors, self.vectors, -1, device=device)

        def eager(vectors_BFD: torch.Tensor, leading_BD: torch.Tensor) -> torch.Tensor:
            return eager_dots(vectors_BFD, leading_BD, rows_P, columns_P)

        def dmt() -> Callable[..., torch.Tensor]:
            dots, tf32 = kernel_of("dot_interaction"), self.unit == "tf32"
            return lambda vectors_BFD, leading_BD: dots(vectors_BFD, leading_BD, kernel="triton", tf32=tf32)

        functions = {"eager": lambda: eager, **inductors(lambda compile_: compile_(eager)), "dmt": dmt}
        terms = 2 * self.vectors if self.backward else self.width
        cost = dot_cost(self.samples, self.vectors, self.width, self.unit, self.backward)
        limit = limit_of(self.unit, terms, self.backward)
        return contest(cost, functions, [vectors_BFD, leading_BD], eager, self.backward, limit)


@dataclass(frozen=True)
class Cross:
    """The tail x0 (wx + b) + x of a cross layer."""

    width: int = 3_456
    samples: int = 16_384
    dtype: str = "fp32"
    backward: bool = False
    unit: None = None

    @property
    def name(self) -> str:
        """Samples, width and type."""
        return f"cross-{'bwd-' if self.backward else ''}b{self.samples}-w{self.width}-{self.dtype}"

    def tiny(self) -> Cross:
        """Return the same for Triton's interpreter."""
        return replace(self, width=40, samples=9)

    def make(self, device: torch.device) -> Work:
        """Draw the four inputs."""
        dtype = TYPES[self.dtype]
        x0, wx, x = (normal(device, self.samples, self.width, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        bias = normal(device, self.width, seed=4, dtype=dtype)

        def dmt() -> Callable[..., torch.Tensor]:
            tail = kernel_of("cross_layer", "cross_tail")
            return lambda *inputs: tail(*inputs, kernel="triton")

        functions = {
            "eager": lambda: eager_tail,
            **inductors(lambda compile_: compile_(eager_tail)),
            "dmt": dmt,
        }
        cost = cross_cost(self.samples, self.width, dtype.itemsize, self.backward)
        limit = limit_of(self.dtype, self.samples if self.backward else 1, self.backward)
        return contest(cost, functions, [x0, wx, bias, x], eager_tail, self.backward, limit)
