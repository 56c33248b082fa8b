"""How far numbers may differ where the mathematics is the same, and why.

Errors are relative to the largest magnitude of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

# A sum of n terms in another order differs by about sqrt(n) roundings; fp32 rounds at 6e-8, and layers multiply that.
FORWARD = {torch.float32: 2e-6, torch.float64: 2e-14}
# Gradients pass through more such sums, and optimizers divide by them.
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-13}
# Half precision sums in fp32 and rounds each layer's result once or twice: at 4e-3 (bf16) and 5e-4 (fp16).
HALF_FORWARD = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
HALF_GRADIENT = {torch.bfloat16: 4e-2, torch.float16: 8e-3}
# Narrow forms on the wire round an embedding once on each hop: at 4e-3 (bfloat16), 5e-4 (float16), 6e-2 (float8) and at
# 4e-3 of the largest of its row (int8); layers multiply that as above. Gradients are rounded on their way back as well,
# and an activation near its kink changes a whole term of them.
WIRE = {"bfloat16": 2e-2, "float16": 4e-3, "float8": 1.6e-1, "int8": 6e-2}


def lossy_limit(forms: Iterable[str], gradient: bool = False) -> float:
    """Return the largest relative error that forms on the wire, see ``comm_dtype``, may cause; 0 for none."""
    return (5 if gradient else 1) * max((WIRE[form] for form in forms), default=0.0)


def reordered_limit(dtype: torch.dtype, longest_sum: int, gradient: bool = False) -> float:
    """Return the largest relative error that another summation order may cause.

    Args:
        dtype: of the tensors compared; integers and booleans get 0.
        longest_sum: number of terms in the longest sum behind a value.
        gradient: the tensor is a gradient, or a weight after optimizer steps.
    """
    half = HALF_GRADIENT if gradient else HALF_FORWARD
    if dtype in half:
        return half[dtype]
    return (GRADIENT if gradient else FORWARD).get(dtype, 0.0) * math.sqrt(max(longest_sum, 1))


def magnitude(tensor: torch.Tensor) -> float:
    """Return the largest finite magnitude of a tensor; 0 for an empty one."""
    finite = tensor.detach().double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def absolute_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; infinite for another shape, and where only one is not a number."""
    if actual.shape != expected.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max())


def ulp_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance in representable values of the tensors' type; infinite as above and between types."""
    difference = absolute_error(actual, expected) if actual.dtype == expected.dtype else math.inf
    if not math.isfinite(difference) or difference == 0 or not actual.dtype.is_floating_point:
        return difference
    a, b = _ordered(actual.detach()), _ordered(expected.detach())
    apart = (a < 0) != (b < 0)  # their distance may not fit into 64 bits
    steps = torch.where(apart, a.double().abs() + b.double().abs(), (a - b).abs().double())
    steps = torch.where(actual.detach() == expected.detach(), 0.0, steps)
    return float(steps[~(actual.isnan() | expected.isnan())].max())


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Number the representable values in their order, from 0 for zero."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(integers)
    magnitude_bits = bits.long() & torch.iinfo(integers).max
    return torch.where(bits < 0, -magnitude_bits, magnitude_bits)
