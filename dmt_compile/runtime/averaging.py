"""The way of dense gradients: added up bucket by bucket, beside the backward pass.

A program gives a bucket's gradients away as soon as they exist (:meth:`Averaging.start`) and takes all of them back at
the end of its backward pass (:meth:`Averaging.finish`), or, where the optimizer's step can wait (``deferred_step.py``),
when the next one reads what they change (:meth:`Averaging.settle`).

Shape suffixes: P elements of a bucket, padded so that every rank has an equal part.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dmt_compile import torch_internals
from dmt_compile.runtime.coming_gradients import coming_gradients, step_can_wait
from dmt_compile.runtime.world import Pending, World
from dmt_compile.topology import Topology

logger = logging.getLogger(__name__)
BOTH_ADD = 2  # hosts that send each other their sums whole


class Reduction(NamedTuple):
    """How the gradients of a set of parameters are added up; the same on every rank.

    Args:
        tower: the tower group whose ranks alone hold the parameters; -1 where all ranks do.
        hosts: number of hosts that hold them: all, or those of a tower.
        hierarchical: in the host, then among the ranks with the same local rank, then in the host again; otherwise in
            one all-reduce.
        wire_dtype: element type between hosts, for a hierarchical reduction; ``None``: the gradients' own. Nothing is
            sent in a type that is not smaller than the gradients' own.
        buckets: the number of parameters of each, in the order in which they leave.
    """

    tower: int
    hosts: int
    hierarchical: bool
    wire_dtype: str | None
    buckets: tuple[int, ...]

    @property
    def label(self) -> str:
        """What ledger and errors call it."""
        return "dense_gradients" if self.tower < 0 else "tower_gradients"

    def members(self, topology: Topology) -> range:
        """The ranks that hold the parameters."""
        count = self.hosts * topology.local_ranks
        first = max(self.tower, 0) * count
        return range(first, first + count)

    def divisor(self, topology: Topology) -> int:
        """What the sum is divided by; gradients of a tower carry 1 / ranks already."""
        return topology.world_size if self.tower < 0 else 1

    def padding(self, topology: Topology, elements: int) -> int:
        """Return how many elements a bucket lacks for equal parts on every rank."""
        return -elements % (self.hosts * topology.local_ranks) if self.hierarchical else 0

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """Return the element type between hosts of gradients of ``dtype``."""
        wire = dtype if self.wire_dtype is None else getattr(torch, self.wire_dtype)
        return wire if wire.itemsize < dtype.itemsize else dtype

    def span(self, bucket: int) -> slice:
        """Return the places of a bucket's parameters among all of them."""
        first = sum(self.buckets[:bucket])
        return slice(first, first + self.buckets[bucket])


def flatten(gradients: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Return gradients of one type side by side, (P,), with zeros behind them."""
    parts = [gradient.detach().reshape(-1) for gradient in gradients]
    return torch.cat([*parts, parts[0].new_zeros(padding)])


def unflatten(flat_P: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Return the gradients that lie side by side in ``flat_P``, as views."""
    sizes = [shape.numel() for shape in shapes]
    parts = flat_P[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def add_up(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum in the order given, in float32 or what is wider: the same bits whoever adds."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return functools.reduce(torch.Tensor.add_, parts[1:], parts[0].to(wide, copy=True))


def reduce_hierarchically(world: World, flat_P: torch.Tensor, reduction: Reduction) -> Iterator[None]:
    """Replace ``flat_P`` by the sum over all members, divided; yields between stages, which follow upon each other.

    Reduce-scatter in the host, all-reduce of the part among the ranks with the same local rank, all-gather in the host.
    Sums are made by hand from an all-to-all: in a fixed order, in float32, and where transports have no reduce-scatter
    or make one of an all-reduce. Between hosts an element may be rounded twice: before it is sent, and the sum; each
    sum is made on one rank and sent to the others, so that replicas stay equal bit by bit. Two hosts send each other
    all they have, which is no more, and both make the sum: one wait less, and the sum is not rounded.

    Cost: with L local ranks and H hosts each rank sends 2 (L-1) / L of the bytes inside its host, and
    2 (H-1) / H of 1 / L of them to other hosts.
    """
    topology, label = world.topology, reduction.label
    wire = reduction.wire(flat_P.dtype)
    across = "chain across" if reduction.tower < 0 else "chain across tower"

    def scattered(sent: torch.Tensor, group: str, members: int) -> torch.Tensor:
        received = sent if members == 1 else world.start_exchange(sent, label, group).wait()
        return add_up(received.chunk(members))

    def gathered(part: torch.Tensor, group: str, members: int) -> torch.Tensor:
        return part if members == 1 else world.start_gather(part, label, group).wait()

    part = scattered(flat_P, "chain host", topology.local_ranks)
    part /= reduction.divisor(topology)
    yield
    if reduction.hosts == BOTH_ADD:
        part = add_up(gathered(part.to(wire), across, BOTH_ADD).chunk(BOTH_ADD))
    elif reduction.hosts > 1:
        part = gathered(scattered(part.to(wire), across, reduction.hosts).to(wire), across, reduction.hosts)
    yield
    flat_P.copy_(gathered(part.to(flat_P.dtype), "chain host", topology.local_ranks))


class Averaging:
    """The gradients of one forward pass, on their way.

    Buckets leave in their order, whichever is ready first: ranks whose towers differ may be ready in different orders,
    and collectives must not. A bucket that got no gradient leaves last, as zeros: another rank may have some.

    Args:
        world: the ranks; ``None`` on fake tensors.
        reduction: how.
    """

    def __init__(self, world: World | None, reduction: Reduction) -> None:
        self._world = world
        self.reduction = reduction
        self._parameters: Sequence[torch.Tensor] = ()
        self._templates: Sequence[torch.Tensor] = ()
        self._finish_step: Callable[[], None] | None = None
        self._backward = -1
        self._ready: dict[int, torch.Tensor] = {}
        self._sent: list[Pending] = []

    @property
    def member(self) -> bool:
        """This rank holds the parameters."""
        assert self._world is not None
        return self._world.rank in self.reduction.members(self._world.topology)

    @property
    def deferred(self) -> bool:
        """The optimizer's step on these parameters can wait, so that their values are not final yet."""
        return self._finish_step is not None

    def open(self, parameters: Sequence[torch.Tensor]) -> None:
        """Remember the parameters, bucket after bucket, and what their gradients look like."""
        self._templates = [p.detach().new_empty(()).expand(p.shape) for p in parameters]
        if self.reduction.tower >= 0:  # read early in the next step, and inside the host their averages take no time
            return
        can_wait = {step_can_wait(parameter) for parameter in parameters}
        if len(can_wait) == 1:
            [self._finish_step] = can_wait
        else:
            _warn_of_mixture()
        self._parameters = parameters if self.deferred else ()

    def settle(self) -> None:
        """Make the parameters final: do the step that waits for their last gradients."""
        if self._finish_step is not None:
            self._finish_step()

    def start(self, bucket: int, gradients: Sequence[torch.Tensor]) -> None:
        """Give a bucket's gradients away; they leave once all buckets before them have left."""
        assert self._world is not None
        self._of_this_backward()
        elements = sum(gradient.numel() for gradient in gradients)
        self._ready[bucket] = flatten(gradients, self.reduction.padding(self._world.topology, elements))
        while len(self._sent) in self._ready:
            self._sent.append(self._leave(self._world, self._ready.pop(len(self._sent))))

    def finish(self, nodes: Sequence[Any]) -> list[torch.Tensor] | list[None]:
        """Wait for all gradients and return them, bucket after bucket; or set gradients that come later.

        Args:
            nodes: of autograd, that take the gradient of each parameter.

        Raises:
            CollectiveError: a rank did not arrive within the time limit, or broke off.
        """
        assert self._world is not None
        self._of_this_backward()
        for bucket in range(len(self.reduction.buckets)):
            if bucket >= len(self._sent) and bucket not in self._ready:
                self.start(bucket, [torch.zeros_like(t) for t in self._templates[self.reduction.span(bucket)]])
        self._backward = -1
        arrive = functools.partial(self._arrive, self._world.topology, self._sent)
        if not self.deferred or not all(map(_nobody_waits, self._parameters, nodes)):
            return arrive()
        for parameter, coming in zip(self._parameters, coming_gradients(self._parameters, arrive), strict=True):
            parameter.grad = coming
        return [None] * len(self._parameters)

    def _arrive(self, topology: Topology, sent: Sequence[Pending]) -> list[torch.Tensor]:
        gradients: list[torch.Tensor] = []
        for bucket, pending in enumerate(sent):
            flat_P = pending.wait()
            if not self.reduction.hierarchical:
                flat_P /= self.reduction.divisor(topology)
            gradients += unflatten(flat_P, [t.shape for t in self._templates[self.reduction.span(bucket)]])
        return gradients

    def _leave(self, world: World, flat_P: torch.Tensor) -> Pending:
        if flat_P.numel() == 0:
            return Pending(flat_P)
        if self.reduction.hierarchical:
            chain = reduce_hierarchically(world, flat_P, self.reduction)
            return world.start_chain(chain, flat_P, self.reduction.label)
        group = "world" if self.reduction.tower < 0 else "intra"
        return world.start_all_reduce(flat_P, self.reduction.label, group=group)

    def _of_this_backward(self) -> None:
        """Forget a backward pass that broke off."""
        current = torch_internals.backward_pass()
        if current != self._backward:
            self._backward = current
            self._ready, self._sent = {}, []


def _nobody_waits(parameter: torch.Tensor, node: Any) -> bool:
    """Tell, inside the backward pass, whether nothing in it reads a parameter's gradient or adds to an earlier one."""
    return (
        parameter.grad is None
        and torch_internals.will_run(node)
        and not torch_internals.has_gradient_hooks(parameter, None)
        and torch_internals.in_backward_node(parameter) is None
    )


@functools.cache
def _warn_of_mixture() -> None:
    logger.warning(
        "defer_step: no step is deferred, since the optimizer does not hold all dense parameters of the program; give "
        "it all of them"
    )
