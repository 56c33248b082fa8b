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
from dmt_compile.runtime.chains import Chains
from dmt_compile.runtime.route import ID_HOPS
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


@dataclass
class Pending:
    """A collective that was started; whoever started it waits once, and leaves its tensors alone until then.

    Args:
        result: what ``wait`` returns, filled by then.
        finish: waits.
    """

    result: torch.Tensor
    finish: Callable[[], None] = lambda: None

    def wait(self) -> torch.Tensor:
        """Wait and return the result.

        Raises:
            CollectiveError: a rank did not arrive within the time limit, or broke off.
        """
        self.finish()
        return self.result


class World(Protocol):
    """What a running program asks of the ranks around it.

    Groups: ``world``, all ranks; ``intra``, those of this rank's tower group, and ``peer``, those with its place in
    every tower group; ``host``, those of its host, and ``across``, those with its local rank on every host. Chains run
    beside all that, in groups that nothing else uses: ``chain host``, ``chain across``, and ``chain across tower``,
    those with this rank's local rank on the hosts of its tower.
    """

    topology: Topology
    rank: int
    ledger: Ledger
    device: torch.device  # where collectives take their tensors

    def start_all_to_all(
        self, sent: torch.Tensor, send: list[int], receive: list[int], group: str, label: str, direction: str
    ) -> Pending:
        """Start to exchange slices of a 1-D tensor among the ranks of ``group``."""

    def start_all_reduce(
        self, tensor: torch.Tensor, label: str, maximum: bool = False, group: str = "world"
    ) -> Pending:
        """Start to sum a tensor over the ranks of ``group``, in place; or to take the maximum."""

    def start_exchange(self, sent: torch.Tensor, label: str, group: str) -> Pending:
        """Start to send equal slices of a 1-D gradient to the ranks of ``group``, and to receive theirs."""

    def start_gather(self, part: torch.Tensor, label: str, group: str) -> Pending:
        """Start to collect a 1-D gradient of which each rank of ``group`` has an equal part, in their order."""

    def start_chain(self, chain: Callable[[], None], filled: torch.Tensor, label: str) -> Pending:
        """Start collectives that follow upon each other and fill a tensor, beside what the caller goes on to do."""

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        """Overwrite a tensor with rank 0's."""


# The pass that puts a collective into a program, by the collective's name.
_PASSES = {
    **dict.fromkeys(("exchange_headers", "intra", "peer"), "lower_to_sptt"),
    **{what + hop: "lower_to_sptt" for what in ("ids", "weights") for way in ID_HOPS.values() for hop, _ in way},
    **dict.fromkeys(("dense_gradients", "tower_gradients", "broadcast_buffers"), "sync_dense_gradients"),
}


class ProcessWorld:
    """One rank of a ``torch.distributed`` run.

    Args:
        topology: hosts x local ranks.
        grouped: tower groups x ranks in a group; equal to ``topology`` where a tower is one host.
        limit_s: seconds to wait for the other ranks in a collective; programs set it anew with each call.
        towers: names of the towers that this rank serves.
        name: of this world among those of one run.

    Attributes:
        ledger: bytes that this rank sent.
        waited_s: (collective, direction) -> seconds in which this rank did nothing but wait for it. Of NCCL's
            collectives, which are waited for on the GPU, it holds nothing.
        step: calls of programs so far; ``reported``: of those, what a report told.

    Creates process groups: a collective call, in the same order on every rank.
    """

    def __init__(
        self, topology: Topology, grouped: Topology, limit_s: float, towers: Sequence[str] = (), name: str = "step"
    ) -> None:
        self.topology = topology
        self.grouped = grouped
        self.name = name
        self.rank = dist.get_rank()
        self.ledger = Ledger()
        on_gpu = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.limit_s = limit_s
        self._towers = towers
        self._store = torch_internals.default_store()
        self.step = self.reported = 0
        self.waited_s: dict[tuple[str, str], float] = defaultdict(float)
        timeout = timedelta(seconds=limit_s)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._chains = Chains(self.device)
        span = grouped.local_ranks // topology.local_ranks  # hosts of a tower group
        across = [topology.peer_ranks(local) for local in range(topology.local_ranks)]
        parts = [ranks[first : first + span] for ranks in across for first in range(0, topology.hosts, span)]
        own: dict[str, list[tuple[int, ...]]] = {
            "intra": [grouped.intra_ranks(h * grouped.local_ranks) for h in range(grouped.hosts)],
            "peer": [grouped.peer_ranks(local) for local in range(grouped.local_ranks)],
            "world": [tuple(range(grouped.world_size))],
            "host": [topology.intra_ranks(h * topology.local_ranks) for h in range(topology.hosts)],
            "across": across,
        }
        of_chains: dict[str, list[tuple[int, ...]]] = {
            "chain host": own["host"],
            "chain across": across,
            "chain across tower": parts if span > 1 else [],
        }
        for groups in (own, of_chains):  # chains have an order of their own, so their groups are others
            made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
            for name, ranks in ((name, ranks) for name, members in groups.items() for ranks in members):
                if groups is of_chains and len(ranks) == 1:
                    continue
                if ranks not in made:
                    made[ranks] = dist.new_group(list(ranks), timeout=timeout)
                group = made[ranks]
                if self.rank in ranks:
                    assert group is not None
                    self._groups[name], self._members[name] = group, ranks

    def again(self, name: str) -> ProcessWorld:
        """Return the same ranks on process groups of their own, with the same ledger; a collective call."""
        other = ProcessWorld(self.topology, self.grouped, self.limit_s, self._towers, name)
        other.ledger = self.ledger
        return other

    def start_all_to_all(
        self, sent: torch.Tensor, send: list[int], receive: list[int], group: str, label: str, direction: str
    ) -> Pending:
        received = sent.new_empty(sum(receive))
        with self._named(label, group):
            work = dist.all_to_all_single(received, sent, receive, send, group=self._groups[group], async_op=True)
        for target, count in zip(self._members[group], send, strict=True):
            self.ledger.add(label, direction, self.topology, self.rank, target, count * sent.element_size())
        return Pending(received, lambda: self._finish(work, label, group, direction))

    def start_all_reduce(
        self, tensor: torch.Tensor, label: str, maximum: bool = False, group: str = "world"
    ) -> Pending:
        reduction = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        with self._named(label, group):
            work = dist.all_reduce(tensor, reduction, group=self._groups[group], async_op=True)
        self.ledger.add_all_reduce(label, self.topology, self.rank, tensor.nbytes, self._members[group])
        return Pending(tensor, lambda: self._finish(work, label, group, "backward"))

    def start_exchange(self, sent: torch.Tensor, label: str, group: str) -> Pending:
        received = torch.empty_like(sent)
        with self._named(label, group):
            work = dist.all_to_all_single(received, sent, group=self._groups[group], async_op=True)
        self._record(label, group, sent.nbytes // len(self._members[group]))
        return Pending(received, lambda: self._finish(work, label, group))

    def start_gather(self, part: torch.Tensor, label: str, group: str) -> Pending:
        gathered = part.new_empty(part.numel() * len(self._members[group]))
        with self._named(label, group):
            work = torch_internals.all_gather_single(gathered, part, self._groups[group])
        self._record(label, group, part.nbytes)
        return Pending(gathered, lambda: self._finish(work, label, group))

    def start_chain(self, chain: Callable[[], None], filled: torch.Tensor, label: str) -> Pending:
        finish = self._chains.start(chain, filled)
        return Pending(filled, lambda: self._timed(finish, label, "backward"))

    def _record(self, label: str, group: str, sent_bytes: int) -> None:
        """Record what goes to each other rank of a group in the backward pass."""
        for target in self._members[group]:
            self.ledger.add(label, "backward", self.topology, self.rank, target, sent_bytes)

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        with self._named(label, "world"):
            work = dist.broadcast(tensor, src=0, group=self._groups["world"], async_op=True)
        self._finish(work, label, "world", "forward")

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        """Send a tensor from rank ``source`` into the same tensor of rank ``target``; other ranks do nothing."""
        if self.rank in (source, target):
            with self._named(label, "world"):
                if self.rank == source:
                    work = dist.isend(tensor, target, group=self._groups["world"])
                else:
                    work = dist.irecv(tensor, source, group=self._groups["world"])
            self._finish(work, label, "world", "forward")

    def _finish(self, work: Any, label: str, group: str, direction: str | None = None) -> None:
        """Wait for a collective; ``direction``: of the pass that waits, where one does."""
        with self._named(label, group):
            if dist.get_backend(self._groups[group]) == "nccl":
                work.wait()  # ordered on the stream; NCCL's own watchdog holds the deadline
            else:
                self._timed(lambda: work.wait(timedelta(seconds=self.limit_s)), label, direction)

    def _timed(self, wait: Callable[[], Any], label: str, direction: str | None) -> None:
        start = time.perf_counter()
        wait()
        if direction is not None and self.device.type == "cpu":
            self.waited_s[label, direction] += time.perf_counter() - start

    @contextmanager
    def _named(self, label: str, group: str) -> Any:
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - start
            missing = self._missing(label)
            who = f"ranks {missing} did not arrive" if missing else f"ranks {self._members[group]} broke off"
            of_pass = f"{_PASSES[label]}: " if label in _PASSES else ""
            towers = f" of {', '.join(self._towers)}" if group == "intra" and self._towers else ""
            raise CollectiveError(
                f"{of_pass}{label}{towers}: expected all of ranks {list(self._members[group])} within the time limit, "
                f"found that {who} after {waited:.1f} s (rank {self.rank}); call the model on every rank, in training "
                f"and evaluation, also with an empty batch. The transport said: {str(error).splitlines()[0]}"
            ) from error

    def _missing(self, label: str) -> list[int]:
        """Ask, through the store, which ranks wait in this step too; those that do not say so are missing."""
        try:
            prefix = f"dmt/waiting/{self.name}/{self.step}/"
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
    """What the operators of a running program need to know.

    ``agreed`` runs once the ranks know of each other that they run the same program on sound batches: nothing but the
    header is sent before.
    """

    world: World
    fingerprint: int = 0
    checksum: Callable[[], int] = lambda: 0
    agreed: Callable[[], None] = lambda: None


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
