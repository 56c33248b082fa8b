"""Whether Triton kernels can run here, and the uses of each that are compiled for GPUs that are not here.

Nothing here imports Triton before it is asked for: the package works without it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def interpreted() -> bool:
    """Tell whether Triton was asked to interpret kernels, which is how they run on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on tensors of ``device``; ``None`` where they can."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"Triton has no kernels for {device.type}, but in its interpreter (TRITON_INTERPRET=1)"
    return None


@dataclass(frozen=True)
class AheadCase:
    """A kernel with the types and constants of one use.

    Args:
        name: of the case, in reports.
        kernel: a ``triton.jit`` function.
        signature: argument -> Triton type, such as ``"*fp32"`` or ``"i64"``; constants are not in it.
        constants: argument -> value.
        aligned: arguments that are multiples of 16, as most addresses and strides are at launch, where Triton finds
            out by itself.
        num_warps: as at launch.
        options: others of the launch, such as ``enable_fp_fusion``.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)


def operators() -> tuple[str, ...]:
    """Return the operators that have Triton kernels: those whose folder holds a ``triton_kernel.py``."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton_kernel.py")))


def cases_of(operator: str) -> tuple[AheadCase, ...]:
    """Return the cases that an operator lists as ``AHEAD`` in its ``triton_kernel.py``."""
    module = importlib.import_module(f"dmt_compile.kernels.{operator}.triton_kernel")
    cases: tuple[AheadCase, ...] = module.AHEAD
    return cases
