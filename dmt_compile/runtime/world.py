"""The ranks that run a program together: process groups, and collectives with a deadline."""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dmt_compile import torch_internals
from dmt_compile.errors import CollectiveError
from dmt_compile.runtime.chains import Chains
from dmt_compile.runtime.ledger import Ledger
from dmt_compile.runtime.messages import Messages
from dmt_compile.runtime.route import ID_HOPS
from dmt_compile.topology import Topology


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
    beside all that, in groups of their own: ``chain host``, ``chain across``, and ``chain across tower``, those with
    this rank's local rank on the hosts of its tower.
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

    def start_chain(self, chain: Iterator[None], filled: torch.Tensor, label: str) -> Pending:
        """Start collectives that follow upon each other and fill a tensor, beside what the caller goes on to do.

        ``chain`` yields between stages; several chains may be under way, each in another stage.
        """

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        """Overwrite a tensor with rank 0's."""


class _Named:
    """Gives what the transport raises the name of the collective; a class, since a step enters some thirty."""

    __slots__ = ("_group", "_label", "_start", "_world")

    def __init__(self, world: ProcessWorld, label: str, group: str) -> None:
        self._world, self._label, self._group = world, label, group

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise self._world.broke_off(self._label, self._group, time.monotonic() - self._start, error) from error


# The pass that puts a collective into a program, by the collective's name.
_PASSES = {
    **dict.fromkeys(("exchange_headers", "intra", "peer"), "lower_to_sptt"),
    **{what + hop: "lower_to_sptt" for what in ("ids", "weights") for way in ID_HOPS.values() for hop, _ in way},
    **dict.fromkeys(("dense_gradients", "tower_gradients", "broadcast_buffers"), "sync_dense_gradients"),
}

# What a forward pass waits for from other hosts; of gradients, where the optimizer's step is done in it.
_LONG_WAITS = {("peer", "forward"), ("dense_gradients", "backward")}

# Messages that may be under way at one time between the same ranks, in no order that all ranks share, are told apart.
_STEP, _AHEAD = 0, 1
_CHAINS = {
    (label, collective): 2 + tag
    for tag, (label, collective) in enumerate(
        (label, collective) for label in ("dense_gradients", "tower_gradients") for collective in ("exchange", "gather")
    )
}


class ProcessWorld:
    """One rank of a ``torch.distributed`` run.

    Args:
        topology: hosts x local ranks.
        grouped: tower groups x ranks in a group; equal to ``topology`` where a tower is one host.
        limit_s: seconds to wait for the other ranks in a collective; programs set it anew with each call.
        towers: names of the towers that this rank serves.

    Attributes:
        ledger: bytes that this rank sent.
        waited_s: (collective, direction) -> seconds in which this rank did nothing but wait for it. Of NCCL's
            collectives, which are waited for on the GPU, it holds nothing.
        deferred: what :meth:`settle` calls, of each optimizer whose steps on the model's parameters may wait.
        step: calls of programs so far; ``reported``: of those, what a report told.

    Creates process groups: a collective call, in the same order on every rank.
    """

    def __init__(self, topology: Topology, grouped: Topology, limit_s: float, towers: Sequence[str] = ()) -> None:
        self.topology = topology
        self.grouped = grouped
        self.name, self._tag = "step", _STEP
        self.rank = dist.get_rank()
        self.ledger = Ledger()
        self._on_gpu = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else torch.device("cpu")
        self.limit_s = limit_s
        self._towers = towers
        self._store = torch_internals.default_store()
        self.step = self.reported = 0
        self.waited_s: dict[tuple[str, str], float] = defaultdict(float)
        self.deferred: set[Callable[[bool], None]] = set()
        timeout = timedelta(seconds=limit_s)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._inside_host: set[str] = set()
        self._chains = Chains(self.device)
        self._later: list[Callable[[], Any]] = []
        self._under_way: set[Messages] = set()  # a pass that breaks off waits for nothing, and the memory stays in use
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
        for groups in (own, of_chains):
            # Chains have groups of their own: a communicator has one order, and on a connection what is long on its way
            # would stand before what the step waits for.
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
                    if len(set(map(topology.host_of, ranks))) == 1:
                        self._inside_host.add(name)

    def ahead(self) -> ProcessWorld:
        """Return the same ranks for collectives that run beside those of steps, with the same ledger; on CPUs."""
        other = copy.copy(self)
        other.name, other._tag, other.step, other.reported = "ahead", _AHEAD, 0, 0
        other.waited_s, other._later = defaultdict(float), []
        return other

    def settle(self, trains: bool) -> None:
        """Do the optimizers' steps that wait, since someone is about to read parameters.

        Args:
            trains: it is a program that does so itself, later, for the parameters that it trains.
        """
        for finish in self.deferred:
            finish(trains)

    def later(self, task: Callable[[], Any]) -> None:
        """Call ``task`` when a step next waits for what comes over slow links, or ``run_later`` is called."""
        self._later.append(task)

    def run_later(self) -> None:
        """Call the tasks that wait for it."""
        tasks, self._later = self._later, []
        for task in tasks:
            task()

    def start_all_to_all(
        self, sent: torch.Tensor, send: list[int], receive: list[int], group: str, label: str, direction: str
    ) -> Pending:
        received = sent.new_empty(sum(receive))
        with _Named(self, label, group):
            if self._on_gpu:
                process_group = self._groups[group]
                work = dist.all_to_all_single(received, sent, receive, send, group=process_group, async_op=True)
            else:
                work = self._messages(received.split(receive), sent.split(send), group, self._tag)
        for target, count in zip(self._members[group], send, strict=True):
            self.ledger.add(label, direction, self.topology, self.rank, target, count * sent.element_size())
        return Pending(received, lambda: self._finish(work, label, group, direction))

    def start_all_reduce(
        self, tensor: torch.Tensor, label: str, maximum: bool = False, group: str = "world"
    ) -> Pending:
        reduction = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        with _Named(self, label, group):
            work = dist.all_reduce(tensor, reduction, group=self._groups[group], async_op=True)
        self.ledger.add_all_reduce(label, self.topology, self.rank, tensor.nbytes, self._members[group])
        return Pending(tensor, lambda: self._finish(work, label, group, "backward"))

    def start_exchange(self, sent: torch.Tensor, label: str, group: str) -> Pending:
        received, members = torch.empty_like(sent), len(self._members[group])
        with _Named(self, label, group):
            if self._on_gpu:
                work = dist.all_to_all_single(received, sent, group=self._groups[group], async_op=True)
            else:
                tag = _CHAINS[label, "exchange"]
                work = self._messages(received.chunk(members), sent.chunk(members), group, tag)
        self._record(label, group, sent.nbytes // members)
        return Pending(received, lambda: self._finish(work, label, group))

    def start_gather(self, part: torch.Tensor, label: str, group: str) -> Pending:
        members = len(self._members[group])
        gathered = part.new_empty(part.numel() * members)
        with _Named(self, label, group):
            if self._on_gpu:
                work = torch_internals.all_gather_single(gathered, part, self._groups[group])
            else:
                work = self._messages(gathered.chunk(members), [part] * members, group, _CHAINS[label, "gather"])
        self._record(label, group, part.nbytes)
        return Pending(gathered, lambda: self._finish(work, label, group))

    def start_chain(self, chain: Iterator[None], filled: torch.Tensor, label: str) -> Pending:
        finish = self._chains.start(chain, filled)
        return Pending(filled, lambda: self._timed(finish, label, "backward"))

    def _messages(
        self, received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], group: str, tag: int
    ) -> Messages:
        process_group, members, inside = self._groups[group], self._members[group], group in self._inside_host
        messages = Messages(received, sent, process_group, members, self.rank, tag, inside)
        self._under_way.add(messages)
        return messages

    def _record(self, label: str, group: str, sent_bytes: int) -> None:
        """Record what goes to each other rank of a group in the backward pass."""
        for target in self._members[group]:
            self.ledger.add(label, "backward", self.topology, self.rank, target, sent_bytes)

    def broadcast(self, tensor: torch.Tensor, label: str) -> None:
        with _Named(self, label, "world"):
            work = dist.broadcast(tensor, src=0, group=self._groups["world"], async_op=True)
        self._finish(work, label, "world", "forward")

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        """Send a tensor from rank ``source`` into the same tensor of rank ``target``; other ranks do nothing."""
        if self.rank in (source, target):
            with _Named(self, label, "world"):
                if self.rank == source:
                    work = dist.isend(tensor, target, group=self._groups["world"])
                else:
                    work = dist.irecv(tensor, source, group=self._groups["world"])
            self._finish(work, label, "world", "forward")

    def _finish(self, work: Any, label: str, group: str, direction: str | None = None) -> None:
        """Wait for a collective; ``direction``: of the pass that waits, where one does."""
        with _Named(self, label, group):
            if self._on_gpu:
                work.wait()  # ordered on the stream; NCCL's own watchdog holds the deadline
            else:
                self._timed(lambda: work.wait(timedelta(seconds=self.limit_s)), label, direction)
                self._under_way.discard(work)

    def _timed(self, wait: Callable[[], Any], label: str, direction: str | None) -> None:
        if (label, direction) in _LONG_WAITS:
            self.run_later()
        start = time.perf_counter()
        wait()
        if direction is not None and self.device.type == "cpu":
            self.waited_s[label, direction] += time.perf_counter() - start

    def broke_off(self, label: str, group: str, waited_s: float, error: RuntimeError) -> CollectiveError:
        """Return the error that names the collective, and the ranks that did not arrive."""
        missing = self._missing(label)
        who = f"ranks {missing} did not arrive" if missing else f"ranks {self._members[group]} broke off"
        of_pass = f"{_PASSES[label]}: " if label in _PASSES else ""
        towers = f" of {', '.join(self._towers)}" if group == "intra" and self._towers else ""
        hint = "" if self._tag == _STEP else "; prefetch on all ranks or on none"
        return CollectiveError(
            f"{of_pass}{label}{towers}: expected all of ranks {list(self._members[group])} within the time limit, "
            f"found that {who} after {waited_s:.1f} s (rank {self.rank}); call the model on every rank, in training "
            f"and evaluation, also with an empty batch{hint}. The transport said: {str(error).splitlines()[0]}"
        )

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
