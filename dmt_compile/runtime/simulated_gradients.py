"""Dense gradients in a simulated world: what the ranks' collectives give, bit for bit, and what they send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dmt_compile.runtime.averaging import BOTH_ADD, Averaging, Reduction, add_up, flatten, unflatten
from dmt_compile.runtime.ledger import Ledger
from dmt_compile.topology import Topology


def wait_gradients(tensors: Sequence[torch.Tensor], averaging: Averaging) -> tuple[torch.Tensor, ...]:
    """Return one rank's parameters as they are."""
    return tuple(tensor.view_as(tensor) if averaging.member else tensor.detach() for tensor in tensors)


def start_gradients(args: Sequence[Any], topology: Topology, ledger: Ledger) -> list[tuple[torch.Tensor, ...]]:
    """Return a bucket's parameters of every rank; in the backward pass their gradients become the average.

    Args:
        args: those of the operator, of every rank.
        topology: of all ranks.
        ledger: told what each rank would send.
    """
    reduction: Reduction = args[0][1].reduction
    span = reduction.span(args[0][2])
    members = reduction.members(topology)
    out = [tuple(waited[span]) for waited, *_ in args]
    passed = _Average.apply(topology, ledger, reduction, *(t for rank in members for t in out[rank]))  # type: ignore[no-untyped-call]
    count = span.stop - span.start
    for place, rank in enumerate(members):
        out[rank] = passed[place * count : (place + 1) * count]
    return out


class _Average(torch.autograd.Function):
    """The ranks share one parameter and autograd adds up what they give it: the first gives all of it."""

    @staticmethod
    def forward(ctx: Any, topology: Topology, ledger: Ledger, reduction: Reduction, *tensors: torch.Tensor) -> Any:
        ctx.saved = topology, ledger, reduction
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        topology, ledger, reduction = ctx.saved
        members = reduction.members(topology)
        count = len(grads) // len(members)
        by_rank = [grads[first : first + count] for first in range(0, len(grads), count)]
        for rank in members:
            _record(ledger, topology, reduction, rank, by_rank[0])
        return None, None, None, *average(by_rank, topology, reduction), *[None] * (len(grads) - count)


def average(by_rank: Sequence[Sequence[torch.Tensor]], topology: Topology, reduction: Reduction) -> list[torch.Tensor]:
    """Return the average of the gradients of a bucket that the members hold.

    In the order and the element types of their collectives: for a hierarchical reduction the same bits.
    """
    flats = [flatten(gradients, 0) for gradients in by_rank]
    dtype, divisor, local = flats[0].dtype, reduction.divisor(topology), topology.local_ranks
    if reduction.hierarchical:
        total, *others = [add_up(flats[first : first + local]) / divisor for first in range(0, len(flats), local)]
        if others:
            wire = reduction.wire(dtype)
            total = add_up([part.to(wire) for part in (total, *others)])
            if reduction.hosts != BOTH_ADD:
                total = total.to(wire)
    else:
        total = add_up(flats) / divisor
    return unflatten(total.to(dtype), [gradient.shape for gradient in by_rank[0]])


def _record(
    ledger: Ledger, topology: Topology, reduction: Reduction, rank: int, gradients: Sequence[torch.Tensor]
) -> None:
    """Record what one member sends for a bucket, link by link."""
    members, label, dtype = reduction.members(topology), reduction.label, gradients[0].dtype
    elements = sum(gradient.numel() for gradient in gradients)
    if not reduction.hierarchical:
        ledger.add_all_reduce(label, topology, rank, elements * dtype.itemsize, members)
        return
    part = (elements + reduction.padding(topology, elements)) // len(members)
    for target in topology.intra_ranks(rank):
        ledger.add(label, "backward", topology, rank, target, 2 * part * reduction.hosts * dtype.itemsize)
    for target in members[rank % topology.local_ranks :: topology.local_ranks]:
        ledger.add(label, "backward", topology, rank, target, 2 * part * reduction.wire(dtype).itemsize)
