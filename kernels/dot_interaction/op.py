"""The dot interaction as a ``torch.library`` operator: its shapes, its gradient and its implementations.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, E columns of the leading vector, P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.dot_interaction import reference
from dmt_compile.kernels.dot_interaction.reference import pair_count

MOST_VECTORS, MOST_COLUMNS = 512, 1024
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def dot_interaction(
    vectors_BFD: torch.Tensor,
    leading_BE: torch.Tensor | None = None,
    diagonal: bool = False,
    upper: bool = False,
    kernel: str = "reference",
    tf32: bool = False,
) -> torch.Tensor:
    """Return the dot products of all pairs of a sample's vectors, behind its leading vector.

    Args:
        vectors_BFD: (B, F, D) floating point, any strides.
        leading_BE: (B, E) of the same dtype, any strides, or ``None`` for E = 0.
        diagonal: each vector with itself, too.
        upper: pairs in the order of ``torch.triu_indices``, else of ``torch.tril_indices``.
        kernel: ``"reference"`` or, where :func:`supports` has no objection, ``"triton"``.
        tf32: float32 products may round their factors to TF32; see :func:`allows_tf32`. The reference asks PyTorch.

    Returns:
        (B, E + P) of the same dtype, contiguous. There is no second derivative.

    Cost: reads B (F D + E) elements, writes B (E + P); backward reads B (F D + P), writes B F D. 2 B P D flops at
        least, twice that backward.
    """
    out: torch.Tensor = torch.ops.dmt.dot_interaction(vectors_BFD, leading_BE, diagonal, upper, kernel, tf32)
    return out


def supports(vectors_BFD: torch.Tensor, leading_BE: torch.Tensor | None) -> str | None:
    """Return why the Triton kernels cannot take these tensors, which may be fake; ``None`` where they can."""
    dtype, (_, vectors, columns) = vectors_BFD.dtype, vectors_BFD.shape
    if dtype not in _TYPES:
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    if not 1 <= vectors <= MOST_VECTORS:
        return f"it has {vectors} vectors, a kernel takes 1 to {MOST_VECTORS}"
    if not 1 <= columns <= MOST_COLUMNS:
        return f"its vectors have {columns} columns, a kernel takes 1 to {MOST_COLUMNS}"
    if leading_BE is not None and (leading_BE.dtype, leading_BE.device) != (dtype, vectors_BFD.device):
        return "the leading vector has another element type or device"
    return triton_support.why_not(vectors_BFD.device)


def try_out(vectors: int, columns: int, how: tuple[bool, bool], dtype: torch.dtype, device: torch.device) -> None:
    """Compute one sample's pairs and their gradient by the Triton kernels, which compiles them.

    ``how`` is ``diagonal`` and ``upper``.
    """
    with torch.enable_grad():
        one_BFD = torch.zeros(1, vectors, columns, dtype=dtype, device=device, requires_grad=True)
        dot_interaction(one_BFD, None, *how, "triton", allows_tf32()).sum().backward()


def allows_tf32() -> bool:
    """Tell whether PyTorch's own float32 matrix products on a GPU may use TF32 now."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@torch.library.custom_op(
    "dmt::dot_interaction",
    mutates_args=(),
    schema="(Tensor vectors, Tensor? leading, bool diagonal, bool upper, str kernel, bool tf32) -> Tensor",
)
def _forward(
    vectors: torch.Tensor, leading: torch.Tensor | None, diagonal: bool, upper: bool, kernel: str, tf32: bool
) -> torch.Tensor:
    if kernel == "reference":
        return reference.dot_interaction(vectors, leading, diagonal, upper)
    from dmt_compile.kernels.dot_interaction import triton_kernel

    return triton_kernel.dot_interaction(vectors, leading, diagonal, upper, tf32)


@_forward.register_fake
def _(vectors: torch.Tensor, leading: torch.Tensor | None, diagonal: bool, *rest: Any) -> torch.Tensor:
    width = pair_count(vectors.shape[1], diagonal) + (0 if leading is None else leading.shape[1])
    return vectors.new_empty(vectors.shape[0], width)


@torch.library.custom_op(
    "dmt::dot_interaction_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor vectors, bool diagonal, bool upper, str kernel, bool tf32) -> Tensor",
)
def _backward(
    grad: torch.Tensor, vectors: torch.Tensor, diagonal: bool, upper: bool, kernel: str, tf32: bool
) -> torch.Tensor:
    if kernel == "reference":
        return reference.dot_interaction_backward(grad, vectors, diagonal, upper)
    from dmt_compile.kernels.dot_interaction import triton_kernel

    return triton_kernel.dot_interaction_backward(grad, vectors, diagonal, upper, tf32)


@_backward.register_fake
def _(grad: torch.Tensor, vectors: torch.Tensor, *rest: Any) -> torch.Tensor:
    return vectors.new_empty(vectors.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    vectors, leading, *ctx.how = inputs
    ctx.leading_width = 0 if leading is None else leading.shape[1]
    ctx.save_for_backward(vectors)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (vectors,), width = ctx.saved_tensors, ctx.leading_width
    of_vectors = of_leading = None
    if ctx.needs_input_grad[0]:
        of_vectors = torch.ops.dmt.dot_interaction_backward(grad[:, width:], vectors, *ctx.how)
    if ctx.needs_input_grad[1]:
        of_leading = grad[:, :width]  # a view, here and not in the operator: no bytes move
    return of_vectors, of_leading, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula([torch.ops.dmt.dot_interaction, torch.ops.dmt.dot_interaction_backward])
def _flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count, for ``FlopCounterMode``, the one product of F x F, as bmm of both would be counted."""
    samples, vectors, columns = next(shape for shape in shapes if shape is not None and len(shape) == 3)
    return 2 * samples * vectors * vectors * columns  # type: ignore[no-any-return]
