"""The ranks that run a program together: process groups, collectives with a deadline, and a ledger of what was sent."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dmt_compile import torch_internals
from dmt_compile.errors import CollectiveError
from dmt_compile.topology import Topology


@dataclass
class Ledger:
    """Bytes sent, by collective and link; each byte is counted once, at its sender.

    ``records`` maps (collective, direction, link) to bytes: direction is ``forward`` or ``backward``, link ``intra``
    (inside a host) or ``cross`` (between hosts).
    """

    records: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))

    def add(
        self, collective: str, direction: str, topology: Topology, source: int, target: int, sent_bytes: int
    ) -> None:
        """Record one transfer; what a rank sends to itself crosses no link."""
        if source != target and sent_bytes:
            link = "intra" if topology.host_of(source) == topology.host_of(target) else "cross"
            self.records[collective, direction, link] += sent_bytes

    def add_all_reduce(
        self, collective: str, topology: Topology, rank: int, tensor_bytes: int, members: Sequence[int]
    ) -> None:
        """Record what ``rank`` sends to its neighbour in a ring all-reduce over ``members``."""
        sent = 2 * tensor_bytes * (len(members) - 1) // len(members)
        neighbour = members[(list(members).index(rank) + 1) % len(members)]
        self.add(collective, "backward", topology, rank, neighbour, sent)

    def bytes_per_link(self) -> dict[str, int]:
        """Bytes on all links inside hosts and on all links between hosts."""
        totals = {"intra": 0, "cross": 0}
        for (_, _, link), sent in self.records.items():
            totals[link] += sent
        return totals

    def clear(self) -> None:
        """Forget what was recorded."""
        self.records.clear()


class World(Protocol):
    """What a running program asks of the ranks around it."""

    topology: Topology
    rank: int
    ledger: Ledger
    device: torch.device  # where collectives take their tensors

    def all_to_all(
        self, sent: torch.Tensor, send: list[int], receive: list[int], group: str, label: str, direction: str
    ) -> torch.Tensor:
        """Exchange slices of a 1-D tensor among the ranks of ``group``."""

    def all_reduce(self, tensor: torch.Tensor, label: str, maximum: bool = False, group: str = "world") -> torch.Tensor:
        """Sum a tensor over the ranks of ``group``, in place; or take the maximum."""

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        """Overwrite a tensor with rank 0's."""


class ProcessWorld:
    """One rank of a ``torch.distributed`` run.

    Args:
        topology: hosts x local ranks.
        grouped: tower groups x ranks in a group; equal to ``topology`` where a tower is one host.
        limit_s: seconds to wait for the other ranks in a collective; programs set it anew with each call.

    Creates process groups: a collective call, in the same order on every rank.
    """

    def __init__(self, topology: Topology, grouped: Topology, limit_s: float) -> None:
        self.topology = topology
        self.rank = dist.get_rank()
        self.ledger = Ledger()
        on_gpu = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.limit_s = limit_s
        self._store = torch_internals.default_store()
        self._collectives = 0
        timeout = timedelta(seconds=limit_s)
        self._groups: dict[str, dist.ProcessGroup] = {}
        whole = list(range(grouped.world_size))
        for name, members in (
            ("intra", [grouped.intra_ranks(h * grouped.local_ranks) for h in range(grouped.hosts)]),
            ("peer", [grouped.peer_ranks(local) for local in range(grouped.local_ranks)]),
            ("world", [tuple(whole)]),
        ):
            for ranks in members:
                group = dist.new_group(list(ranks), timeout=timeout)
                if self.rank in ranks:
                    self._groups[name] = group
        self._members = {
            "intra": grouped.intra_ranks(self.rank),
            "peer": grouped.peer_ranks(self.rank),
            "world": tuple(whole),
        }

    def all_to_all(
        self, sent: torch.Tensor, send: list[int], receive: list[int], group: str, label: str, direction: str
    ) -> torch.Tensor:
        received = sent.new_empty(sum(receive))
        with self._named(label, group):
            self._wait(
                dist.all_to_all_single(received, sent, receive, send, group=self._groups[group], async_op=True),
                label,
                group,
            )
        for target, count in zip(self._members[group], send, strict=True):
            self.ledger.add(label, direction, self.topology, self.rank, target, count * sent.element_size())
        return received

    def all_reduce(self, tensor: torch.Tensor, label: str, maximum: bool = False, group: str = "world") -> torch.Tensor:
        reduction = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        with self._named(label, group):
            work = dist.all_reduce(tensor, reduction, group=self._groups[group], async_op=True)
            self._wait(work, label, group, counted=group == "world")
        self.ledger.add_all_reduce(label, self.topology, self.rank, tensor.nbytes, self._members[group])
        return tensor

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        with self._named(label, "world"):
            self._wait(dist.broadcast(tensor, src=0, group=self._groups["world"], async_op=True), label, "world")

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        """Send a tensor from rank ``source`` into the same tensor of rank ``target``; other ranks do nothing."""
        with self._named(label, "world"):
            if self.rank == source:
                self._wait(dist.isend(tensor, target, group=self._groups["world"]), label, "world")
            elif self.rank == target:
                self._wait(dist.irecv(tensor, source, group=self._groups["world"]), label, "world")

    def _wait(self, work: Any, label: str, group: str, counted: bool = True) -> None:
        """Wait for a collective; ``counted``: every rank takes part in one like it at this point of the step."""
        self._collectives += counted
        if dist.get_backend(self._groups[group]) == "nccl":
            work.wait()  # ordered on the stream; NCCL's own watchdog holds the deadline
        else:
            work.wait(timedelta(seconds=self.limit_s))

    @contextmanager
    def _named(self, label: str, group: str) -> Any:
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - start
            missing = self._missing(label)
            who = f"ranks {missing} did not arrive" if missing else f"ranks {self._members[group]} broke off"
            raise CollectiveError(
                f"{label}: expected all of ranks {list(self._members[group])} within the time limit, found that {who} "
                f"after {waited:.1f} s (rank {self.rank}); call the model on every rank, in training and evaluation, "
                f"also with an empty batch. The transport said: {str(error).splitlines()[0]}"
            ) from error

    def _missing(self, label: str) -> list[int]:
        """Ask, through the store, which ranks wait in a collective too; those that do not say so are missing."""
        try:
            prefix = f"dmt/waiting/{self._collectives}/"
            self._store.set(f"{prefix}{self.rank}", label)
            deadline = time.monotonic() + 1.5
            others = [r for r in range(self.topology.world_size) if r != self.rank]
            while others and time.monotonic() < deadline:
                others = [r for r in others if not self._store.check([f"{prefix}{r}"])]
                time.sleep(0.05)
            return others
        except RuntimeError:  # the store is gone with rank 0
            return [0]


@dataclass
class Execution:
    """What the operators of a running program need to know."""

    world: World
    fingerprint: int = 0
    checksum: Callable[[], int] = lambda: 0


class _Running(threading.local):
    def __init__(self) -> None:
        self.stack: list[Execution] = []


_running = _Running()


def current() -> Execution:
    """Return the execution that the running program belongs to."""
    return _running.stack[-1]


@contextmanager
def executing(execution: Execution) -> Any:
    """Make ``execution`` the current one."""
    _running.stack.append(execution)
    try:
        yield
    finally:
        _running.stack.pop()
