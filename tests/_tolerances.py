"""How far numbers may differ, and why; errors are relative to the largest magnitude of the reference."""

from __future__ import annotations

import math

import torch

# A sum of n terms in another order differs by about sqrt(n) roundings; fp32 rounds at 6e-8, and layers multiply that.
FORWARD = {torch.float32: 2e-6, torch.float64: 2e-14}
# Gradients pass through more such sums, and optimizers divide by them.
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-13}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute error relative to the largest magnitude of ``expected``."""
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.abs().max()), 1e-12)
    return float((actual.double() - expected.double()).abs().max()) / scale


def assert_reordered(actual: torch.Tensor, expected: torch.Tensor, longest_sum: int, gradient: bool = False) -> None:
    """Assert that two tensors agree within what another summation order may change."""
    assert actual.shape == expected.shape
    table = GRADIENT if gradient else FORWARD
    limit = table[expected.dtype] * math.sqrt(longest_sum)
    found = error(actual, expected)
    assert found <= limit, f"relative error {found:.2e} above {limit:.2e}"
