"""The meaning of a cross layer's tail, in plain PyTorch.

Shapes: x0, wx and x are (..., W) of one shape; a bias has the trailing dimensions of it, one or more.
"""

from __future__ import annotations

import torch


def cross_tail(
    x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, bias_last: bool = False
) -> torch.Tensor:
    """Return x0 * (wx + bias) + x.

    Args:
        x0: what the cross network was given.
        wx: the layer's matrix product, of full or low rank.
        bias: of the product; ``None`` for none, or where the product has it already.
        x: what the layer was given.
        bias_last: x0 * wx + bias + x instead, as some write it.
    """
    if bias is None:
        return x0 * wx + x
    return x0 * wx + bias + x if bias_last else x0 * (wx + bias) + x


def cross_tail_backward(
    grad: torch.Tensor, x0: torch.Tensor, wx: torch.Tensor, bias: torch.Tensor | None, bias_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x0, wx and bias; that of x is ``grad`` itself."""
    grad_x0 = grad * (wx if bias is None or bias_last else wx + bias)
    grad_wx = grad * x0
    grad_bias = None
    if bias is not None:
        grad_bias = (grad if bias_last else grad_wx)[None].sum_to_size(bias.shape).to(bias.dtype)
    return grad_x0.to(x0.dtype), grad_wx.to(wx.dtype), grad_bias
