"""Assertions on how far numbers may differ; the table and its reasons are in ``dmt_compile.tolerances``."""

from __future__ import annotations

import torch

from dmt_compile.tolerances import FORWARD, GRADIENT, absolute_error, magnitude, reordered_limit

__all__ = ["FORWARD", "GRADIENT", "assert_reordered", "error"]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute error relative to the largest magnitude of ``expected``."""
    return absolute_error(actual, expected) / max(magnitude(expected), 1e-12)


def assert_reordered(actual: torch.Tensor, expected: torch.Tensor, longest_sum: int, gradient: bool = False) -> None:
    """Assert that two tensors agree within what another summation order may change."""
    assert actual.shape == expected.shape
    limit = reordered_limit(expected.dtype, longest_sum, gradient)
    found = error(actual, expected)
    assert found <= limit, f"relative error {found:.2e} above {limit:.2e}"
