"""The operators that scale gradients and keep replicas of dense parameters and buffers equal.

Shape suffixes: N rows of a feature, D its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dmt_compile.ir.ops import operator
from dmt_compile.runtime import world as runtime
from dmt_compile.runtime.averaging import Averaging, Reduction


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


@operator(lambda sizes, tensor, factor: tensor.view_as(tensor))
def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor as it is; its gradient is multiplied by ``factor``.

    The objective is the mean over ranks of each rank's loss, so every gradient carries 1 / number of ranks.
    """
    out: torch.Tensor = _ScaleGradient.apply(tensor, factor)  # type: ignore[no-untyped-call]
    return out


class _ScaleByFrequency(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids_N)
        return rows_ND.view_as(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, places_N, counts = torch.unique(ctx.saved_tensors[0], return_inverse=True, return_counts=True)
        return grads[0] / counts[places_N].unsqueeze(1), None


@operator(lambda sizes, rows_ND, ids_N: rows_ND.view_as(rows_ND))
def scale_by_frequency(rows_ND: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """Return the rows as they are; their gradients are divided by how often each id occurs in this rank's batch.

    This is ``scale_grad_by_freq`` as every rank's own flat model understands it.
    """
    out: torch.Tensor = _ScaleByFrequency.apply(rows_ND, ids_N)  # type: ignore[no-untyped-call]
    return out


@operator(lambda sizes, reduction: Averaging(None, reduction))
def averaging(reduction: Reduction) -> Averaging:
    """Return where the gradients of this forward pass are given away and taken back."""
    return Averaging(runtime.current().world, reduction)


@operator(lambda sizes, tensors, averaging: tuple(t.view_as(t) for t in tensors), collective=True)
def wait_gradients(tensors: Sequence[torch.Tensor], averaging: Averaging) -> tuple[torch.Tensor, ...]:
    """Return parameters as they are; their backward waits for the averages of their gradients.

    Where the optimizer's step can wait, it gives out gradients that come later.

    At the front of a program, so that autograd, which takes of what is ready the node made last, waits at the very end.
    Ranks that do not hold the parameters get them without gradient, and take no part.

    Args:
        tensors: the parameters, bucket after bucket.
        averaging: theirs.

    Raises:
        CollectiveError: in the backward pass, where a rank does not arrive.

    Cost: see ``start_gradients``.
    """
    if not averaging.member:
        return tuple(tensor.detach() for tensor in tensors)
    averaging.open(tensors)
    out: tuple[torch.Tensor, ...] = _WaitGradients.apply(averaging, *tensors)  # type: ignore[no-untyped-call]
    return out


class _WaitGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, averaging: Averaging, *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.averaging = averaging
        # A step that is still to be done writes to the parameters, and must not outdate views of them.
        return tuple(t.data if averaging.deferred else t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.averaging.finish([node for node, _ in ctx.next_functions])


def _bucket(waited: Sequence[torch.Tensor], averaging: Averaging, bucket: int) -> tuple[torch.Tensor, ...]:
    return tuple(waited[averaging.reduction.span(bucket)])


@operator(lambda sizes, *args: tuple(t.view_as(t) for t in _bucket(*args)), collective=True)
def start_gradients(waited: Sequence[torch.Tensor], averaging: Averaging, bucket: int) -> tuple[torch.Tensor, ...]:
    """Return a bucket's parameters as they are; their backward gives their gradients away as soon as all are there.

    A step of the optimizer that waits for their last gradients is done first. In front of what first reads one of them:
    its backward, the last to add to their gradients, comes just before.

    Args:
        waited: what ``wait_gradients`` gave.
        averaging: of the same.
        bucket: which.

    Cost: flat, 2 (N-1) / N of the bucket's bytes from each of N ranks to the next, some of them on other hosts;
    hierarchical, as :func:`dmt_compile.runtime.averaging.reduce_hierarchically` says.
    """
    tensors = _bucket(waited, averaging, bucket)
    if not averaging.member:
        return tensors
    averaging.settle()
    out: tuple[torch.Tensor, ...] = _StartGradients.apply(averaging, bucket, *tensors)  # type: ignore[no-untyped-call]
    return out


class _StartGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, averaging: Averaging, bucket: int, *tensors: torch.Tensor) -> Any:
        ctx.saved = averaging, bucket
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        averaging, bucket = ctx.saved
        averaging.start(bucket, grads)
        # What wait_gradients replaces; it takes no memory.
        return None, None, *(grad.new_zeros(()).expand(grad.shape) for grad in grads)


@operator(lambda sizes, tensors, group: tuple(tensors), collective=True)
def broadcast_buffers(tensors: Sequence[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Overwrite buffers with rank 0's and return them, as DDP does before each training forward."""
    for tensor in tensors:
        runtime.current().world.broadcast(tensor.data, "broadcast_buffers")  # .data: no new version for autograd
    return tuple(tensors)
