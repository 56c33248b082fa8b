"""What a cell of the kernel benchmark is: its floor, who takes part, and the numbers that all have to give."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import interpret_without_gpu  # noqa: F401
import torch
import torch._functorch.config

from dmt_compile.tolerances import absolute_error, magnitude

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class NotHere(Exception):
    """Why a contestant takes no part in a cell."""


@dataclass(frozen=True)
class Cost:
    """The least that a cell has to do.

    Args:
        moved_bytes: each input read once, each output written once; of a table the distinct rows.
        flops: of its products and sums.
        unit: which matrix unit does them: ``"bf16"``, ``"tf32"`` or ``"fp32"``; ``None`` where no product is large.
        uncached_bytes: with each row read as often as an id names it; ``None`` where nothing is read twice.
    """

    moved_bytes: int
    flops: int
    unit: str | None = None
    uncached_bytes: int | None = None


@dataclass(frozen=True)
class Contestant:
    """One implementation, ready.

    Args:
        run: launches what is timed.
        outcome: what :class:`Work` checks; by default what ``run`` returns.
        told: says, once it has run, what it is that runs.
    """

    run: Callable[[], Any]
    outcome: Callable[[], Any] | None = None
    told: Callable[[], str] = lambda: ""

    def result(self) -> Any:
        """Run once and return what is to be checked."""
        return (self.outcome or self.run)()


@dataclass(frozen=True)
class Work:
    """A cell with its data on a device.

    Args:
        cost: see there.
        makers: name of a contestant -> what prepares it, which raises :class:`NotHere`; those that can never take part
            are not in it.
        error: how far an outcome is from the right one, relative to what is allowed: above 1 it fails.
    """

    cost: Cost
    makers: Mapping[str, Callable[[], Contestant]]
    error: Callable[[Any], float]


class Cell(Protocol):
    """The size of a cell."""

    @property
    def name(self) -> str:
        """Operator first, then sizes."""

    @property
    def unit(self) -> str | None:
        """Which precision float32 products have while it runs; see :class:`Cost`."""

    def tiny(self) -> Cell:
        """Return the same kind of cell, small enough for Triton's interpreter."""

    def make(self, device: torch.device) -> Work:
        """Draw its data."""


def kernel_of(operator: str, function: str | None = None) -> Callable[..., Any]:
    """Return an operator's function that takes ``kernel="triton"``.

    Raises:
        NotHere: the operator, or its kernel, is not in this version.
    """
    try:
        module = importlib.import_module(f"dmt_compile.kernels.{operator}.op")
        importlib.import_module(f"dmt_compile.kernels.{operator}.triton_kernel")
        found: Callable[..., Any] = getattr(module, function or operator)
    except (ImportError, AttributeError) as error:
        raise NotHere(f"not here: {error}") from error
    return found


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile with Inductor for the one shape that a cell has."""
    # A cell's backward pass runs many times on one forward pass, which such buffers do not outlive.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def inductors(make: Callable[[Callable[[Any], Any]], Any]) -> dict[str, Callable[[], Any]]:
    """Return the makers of Inductor's contestants from one that is given the compiler.

    With max-autotune CUDA graphs are left out: they would copy each input into a buffer of their own.
    """
    modes = {"inductor": None, "inductor-max": "max-autotune-no-cudagraphs"}
    return {name: lambda mode=mode: make(lambda function: compiled(function, mode)) for name, mode in modes.items()}


def pulled_back(out: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> Contestant:
    """Return the backward pass of ``out``, which can run again and again."""
    return Contestant(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float) -> float:
    """Return the largest error of some tensors, each relative to its largest magnitude and the limit."""
    return max(
        absolute_error(mine, right) / max(limit * magnitude(right), 1e-300)
        for mine, right in zip(found, expected, strict=True)
    )


def normal(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw from N(0, 1), the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator).to(dtype)
