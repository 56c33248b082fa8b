"""The operators that scale gradients and keep replicas of dense parameters and buffers equal.

Shape suffixes: N rows of a feature, D its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dmt_compile.ir.ops import operator
from dmt_compile.runtime import world as runtime
from dmt_compile.runtime.route import Route


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


@operator(lambda sizes, tensors, group: tuple(t.view_as(t) for t in tensors), collective=True)
def synchronize(tensors: Sequence[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Return dense parameters as they are; their gradients are averaged over all ranks in one all-reduce.

    Cost: the parameters' bytes, twice across each link of a ring, once per backward pass.
    """
    world = runtime.current().world
    return _reduce_gradients(world, "synchronize", "world", world.topology.world_size, tensors)


def _reduce_gradients(
    world: runtime.World, label: str, group: str, divisor: int, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    out: tuple[torch.Tensor, ...] = _ReduceGradients.apply(world, label, group, divisor, *tensors)  # type: ignore[no-untyped-call]
    return out


class _ReduceGradients(torch.autograd.Function):
    """Sums gradients over the ranks of a group in one all-reduce, and divides them."""

    @staticmethod
    def forward(ctx: Any, world: runtime.World, label: str, group: str, divisor: int, *tensors: torch.Tensor) -> Any:
        ctx.saved = world, label, group, divisor
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        world, label, group, divisor = ctx.saved
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        world.start_all_reduce(flat, label, group=group).wait()
        flat /= divisor
        parts = flat.split([grad.numel() for grad in grads])
        return None, None, None, None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


@operator(lambda sizes, tensors, route, group: tuple(t.view_as(t) for t in tensors), collective=True)
def synchronize_tower(tensors: Sequence[torch.Tensor], route: Route, group: int) -> tuple[torch.Tensor, ...]:
    """Return a tower's parameters as they are; their gradients are summed over the ranks of tower group ``group``.

    They carry 1 / ranks of the world already, through ``scale_gradient``. Ranks of other groups do not take part: there
    the parameters have no gradient.

    Cost: the parameters' bytes, twice across each link of a ring inside the tower, once per backward pass.
    """
    if route.group != group:
        return tuple(tensor.detach() for tensor in tensors)
    return _reduce_gradients(runtime.current().world, "synchronize_tower", "intra", 1, tensors)


@operator(lambda sizes, tensors, group: tuple(tensors), collective=True)
def broadcast_buffers(tensors: Sequence[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Overwrite buffers with rank 0's and return them, as DDP does before each training forward."""
    for tensor in tensors:
        runtime.current().world.broadcast(tensor.data, "broadcast_buffers")  # .data: no new version for autograd
    return tuple(tensors)
