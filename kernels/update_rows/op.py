"""The optimizer's step on distinct rows of a table, in place, by the implementation that was chosen.

Shape suffixes: U distinct rows, D width of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.update_rows import reference
from dmt_compile.kernels.update_rows.reference import Hyper

__all__ = ["Hyper", "supports", "update_rows"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def update_rows(
    kind: str,
    table: torch.Tensor,
    states: Sequence[torch.Tensor],
    rows_U: torch.Tensor,
    grads_UD: torch.Tensor,
    hyper: Hyper,
    kernel: str = "reference",
) -> None:
    """Do an optimizer's step on some rows, in place; ``reference.py`` defines the numbers.

    Args:
        kind: ``"sgd"``, ``"adagrad"``, ``"sparse_adam"`` or ``"row_wise_adagrad"``.
        table: (rows, D).
        states: of the step, each (rows, D), of ``"row_wise_adagrad"`` (rows, 1).
        rows_U: distinct, int64.
        grads_UD: their gradients.
        hyper: the numbers of the step.
        kernel: ``"reference"`` or ``"triton"``; :func:`supports` says what the latter takes.

    Cost: reads the gradient, and reads and writes table and states, once for each of the rows.
    """
    if kernel == "reference":
        reference.update_rows(kind, table, states, rows_U, grads_UD, hyper)
        return
    from dmt_compile.kernels.update_rows import triton_kernel

    triton_kernel.update_rows(kind, table, states, rows_U, grads_UD, hyper)


def supports(table: torch.Tensor, states: Sequence[torch.Tensor]) -> str | None:
    """Return why the Triton kernel cannot update a table; ``None`` where it can."""
    reason = triton_support.why_not(table.device)
    if reason is not None:
        return reason
    for tensor in (table, *states):
        if tensor.dtype not in _TYPES:
            return f"the kernel computes in float32, which {tensor.dtype} does not fit"
    if table.stride(1) != 1 and table.shape[1] > 1:
        return "the elements of a row do not lie side by side"
    if not all(state.is_contiguous() for state in states):
        return "the optimizer's state is not contiguous"
    return None
