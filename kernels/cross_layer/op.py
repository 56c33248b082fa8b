"""The tail of a cross layer as one operator, ``dmt::cross_tail``, with its gradient.

Shapes: x0, wx and x are (..., W) of one shape; a bias has the trailing dimensions of it, one or more.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.cross_layer import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the Triton kernels cannot compute tails of ``dtype`` on ``device``; ``None`` where they can."""
    if dtype not in _DTYPES:
        return f"elements of {dtype}"
    return triton_support.why_not(device)


def try_out(width: int, bias: bool, bias_last: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Compute one tail and its gradient by the Triton kernels, which compiles them."""
    with torch.enable_grad():
        x = torch.zeros(1, width, dtype=dtype, device=device, requires_grad=True)
        cross_tail(x, x, x[0] if bias else None, x, bias_last, "triton").sum().backward()


@torch.library.custom_op("dmt::cross_tail", mutates_args=())
def cross_tail(
    x0: torch.Tensor,
    wx: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    bias_last: bool = False,
    kernel: str = "reference",
) -> torch.Tensor:
    """Return x0 * (wx + bias) + x, contiguous, of the promoted type.

    Args:
        x0: what the cross network was given, floating point.
        wx: the layer's matrix product, of full or low rank.
        bias: of the product; ``None`` for none, or where the product has it already.
        x: what the layer was given.
        bias_last: x0 * wx + bias + x instead, as some write it.
        kernel: ``"reference"``, or ``"triton"`` where :func:`supports` has no reason against it.

    Cost: reads x0, wx and x and writes as much as one of them; its gradient reads three and writes two.
    """
    if kernel == "triton":
        from dmt_compile.kernels.cross_layer import triton_kernel

        return triton_kernel.cross_tail(x0, wx, bias, x, bias_last, _promoted(x0, wx, bias, x))
    return reference.cross_tail(x0, wx, bias, x, bias_last).contiguous()


@cross_tail.register_fake
def _(
    x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, bias_last: bool = False,
    kernel: str = "reference",
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=_promoted(x0, wx, bias, x))


@torch.library.custom_op("dmt::cross_tail_backward", mutates_args=())
def cross_tail_backward(
    grad: torch.Tensor, x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, bias_last: bool, kernel: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x0, wx and bias, contiguous; the last is empty without a bias."""
    if kernel == "triton":
        from dmt_compile.kernels.cross_layer import triton_kernel

        return triton_kernel.cross_tail_backward(grad, x0, wx, bias, bias_last)
    grad_x0, grad_wx, grad_bias = reference.cross_tail_backward(grad, x0, wx, bias, bias_last)
    return grad_x0.contiguous(), grad_wx.contiguous(), grad.new_empty(0) if grad_bias is None else grad_bias


@cross_tail_backward.register_fake
def _(
    grad: torch.Tensor, x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, bias_last: bool, kernel: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_bias = grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x0.new_empty(x0.shape), wx.new_empty(wx.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x0, wx, bias, x, ctx.bias_last, ctx.kernel = inputs
    ctx.save_for_backward(x0, wx, bias)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x0, wx, bias = ctx.saved_tensors
    grad_x0, grad_wx, grad_bias = cross_tail_backward(grad, x0, wx, bias, ctx.bias_last, ctx.kernel)
    return grad_x0, grad_wx, None if bias is None else grad_bias, grad.to(ctx.dtype), None, None


cross_tail.register_autograd(_backward, setup_context=_setup_context)


def _promoted(*tensors: torch.Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))
