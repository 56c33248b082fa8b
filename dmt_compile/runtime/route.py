"""Sizes of one step's exchanges: a static layout (who owns what) and a per-step route (how much goes where).

Ids reach their owners in one exchange among all ranks, or in two: across hosts, to the rank with the sender's local
rank on the owner's host (``ids_across``), which forwards them inside its host (``ids_host``). So do their weights.

Shape suffixes: S source ranks, B samples of one rank, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from dmt_compile.topology import Topology

T = TypeVar("T")

# What every rank tells every other one before a step's first exchange; the id counts per feature follow, then what the
# receiver forwards inside its host: for each of its ranks the elements of ids, then of weights.
HEADER_FIELDS = ("fingerprint", "batch_size", "fault", "feature", "position", "value", "checksum")
# The hops of ids, or of their weights, at once or by way of hosts: what each adds to the name, and its group.
ID_HOPS = {False: (("", "world"),), True: (("_across", "across"), ("_host", "host"))}


class IdExchange(NamedTuple):
    """How ids reach their owners.

    Args:
        dtype: element type of ids and bag lengths on the wire.
        hosts: hosts of the run where ids go across hosts first and then inside them; 0 where all ranks exchange them at
            once.
        even: per feature, all bags of one rank's batch have the same number of ids, which its header tells; empty for
            none.
    """

    dtype: str = "int64"
    hosts: int = 0
    even: tuple[bool, ...] = ()


AT_ONCE = IdExchange()


@dataclass(frozen=True)
class Layout:
    """Which rank owns each feature's table, and its width.

    A table in pieces has as many features, one for each; those of row pieces are added up once the exchange inside the
    tower group has brought them together, and are one feature from there on, numbered as the first of them.

    Args:
        topology: tower groups x ranks in a group (hosts x local ranks where a tower is one host).
        owners: global rank of each feature's table, in feature order.
        widths: columns of each feature, in feature order.
        jagged: per feature, bag lengths travel with the ids; the others have one id a bag, or are even.
        weighted: per feature, each id has a weight.
        outputs: columns that each tower group sends to its peers; empty where it sends its features as they are.
        exchange: how ids reach their owners.
        summed: sets of features that are added up, each of one tower group.
    """

    topology: Topology
    owners: tuple[int, ...]
    widths: tuple[int, ...]
    jagged: tuple[bool, ...]
    weighted: tuple[bool, ...]
    outputs: tuple[int, ...] = ()
    exchange: IdExchange = AT_ONCE
    summed: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def run_topology(self) -> Topology:
        """Hosts x local ranks of the run where ids go by way of hosts; otherwise one host."""
        hosts = self.exchange.hosts or 1
        return Topology(hosts, self.topology.world_size // hosts)

    @cached_property
    def sample_order(self) -> tuple[int, ...]:
        """The ranks in the order in which owners look up their samples; in two exchanges this is peer order."""
        return self.topology.peer_order() if self.exchange.hosts else tuple(range(self.topology.world_size))

    @cached_property
    def arrival_order(self) -> tuple[int, ...]:
        """The ranks in the order in which an owner receives their ids."""
        return self.run_topology.peer_order() if self.exchange.hosts else tuple(range(self.topology.world_size))

    @cached_property
    def header_width(self) -> int:
        """Numbers that every rank tells every other one."""
        forwarded = 2 * self.run_topology.local_ranks if self.exchange.hosts else 0
        return len(HEADER_FIELDS) + self.most_features + forwarded

    def is_even(self, feature: int) -> bool:
        """Tell whether all bags of one rank's batch have the same number of ids."""
        return bool(self.exchange.even) and self.exchange.even[feature]

    def in_sample_order(self, pieces: Sequence[T]) -> list[Sequence[T]]:
        """Return the pieces of what an owner received rank by rank, those of each rank, in the order of its samples."""
        each = len(pieces) // len(self.arrival_order)
        of_rank = {rank: pieces[each * i : each * (i + 1)] for i, rank in enumerate(self.arrival_order)}
        return [of_rank[rank] for rank in self.sample_order]

    @cached_property
    def features_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the features that each rank serves."""
        return tuple(
            tuple(i for i, owner in enumerate(self.owners) if owner == rank) for rank in range(self.topology.world_size)
        )

    @cached_property
    def rank_widths(self) -> tuple[int, ...]:
        """Columns that each rank serves."""
        return tuple(sum(self.widths[i] for i in features) for features in self.features_by_rank)

    def group_width(self, group: int) -> int:
        """Columns that a tower group sends to its peers."""
        return self.outputs[group] if self.outputs else self.features_width(group)

    def features_width(self, group: int) -> int:
        """Columns of a tower group's features, the sums of pieces among them."""
        return sum(self.widths[i] for i in self.group_features(group))

    @cached_property
    def last_widths(self) -> tuple[int, ...]:
        """Columns of each block that the last exchange delivers: of every tower group, or of every rank of the one."""
        hosts = self.topology.hosts
        return self.rank_widths if hosts == 1 else tuple(map(self.group_width, range(hosts)))

    def group_lookups(self, group: int) -> tuple[int, ...]:
        """Feature indices of a tower group, in the order of their columns after the exchange inside it."""
        local = self.topology.local_ranks
        return tuple(i for features in self.features_by_rank[group * local : (group + 1) * local] for i in features)

    def group_features(self, group: int) -> tuple[int, ...]:
        """The same, without those that were added to another: the columns that the group has for its peers."""
        added = {i for pieces in self.summed for i in pieces[1:]}
        return tuple(i for i in self.group_lookups(group) if i not in added)

    @cached_property
    def column_order(self) -> tuple[int, ...]:
        """Feature indices in the order of their columns after the last exchange."""
        return tuple(i for group in range(self.topology.hosts) for i in self.group_features(group))

    @cached_property
    def jagged_by_rank(self) -> tuple[int, ...]:
        """Number of features of each rank whose bag lengths travel."""
        return tuple(sum(self.jagged[i] for i in features) for features in self.features_by_rank)

    @cached_property
    def most_features(self) -> int:
        """The largest number of features on one rank."""
        return max(map(len, self.features_by_rank))


@lru_cache(maxsize=256)
def make_layout(
    hosts: int,
    local_ranks: int,
    owners: tuple[int, ...],
    widths: tuple[int, ...],
    jagged: tuple[bool, ...],
    weighted: tuple[bool, ...],
    outputs: tuple[int, ...] = (),
    exchange: IdExchange = AT_ONCE,
    summed: tuple[tuple[int, ...], ...] = (),
) -> Layout:
    """Return the layout of these owners; the same object for the same arguments."""
    return Layout(Topology(hosts, local_ranks), owners, widths, jagged, weighted, outputs, exchange, summed)


@dataclass(frozen=True)
class Route:
    """The sizes of one step, as one rank sees them.

    Args:
        layout: who owns what.
        rank: this rank.
        batch_sizes: samples of every rank.
        sent_ids: for each rank, the ids of each of its features that this rank sends.
        received_ids: for each source rank, the ids of each of this rank's features.
        forwarded: of ``ids`` and of ``weights``, for each rank with this local rank the elements that it sends to each
            rank of this host by way of this rank; empty where ids go to their owners at once.
    """

    layout: Layout
    rank: int
    batch_sizes: tuple[int, ...]
    sent_ids: tuple[tuple[int, ...], ...]
    received_ids: tuple[tuple[int, ...], ...]
    forwarded: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Samples of this rank."""
        return self.batch_sizes[self.rank]

    @property
    def global_batch_size(self) -> int:
        """Samples of all ranks."""
        return sum(self.batch_sizes)

    @property
    def group(self) -> int:
        """This rank's tower group."""
        return self.layout.topology.host_of(self.rank)

    def peer_rows(self, local_rank: int) -> int:
        """Samples of all ranks with this local rank."""
        topology = self.layout.topology
        return sum(self.batch_sizes[r] for r in range(local_rank, topology.world_size, topology.local_ranks))

    def places_in_peer_order(self, device: torch.device) -> torch.Tensor:
        """Return (G,) int64: where each row goes that ``peer_permute`` finds in the order of ranks."""
        return _places(self.layout.topology, self.batch_sizes, device)

    def blocks(self, hop: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return (rows, columns) of the blocks of a hop, to send and to receive, in the order of its group's ranks.

        ``ids``: all ranks; bag lengths, then ids. ``weights``: all ranks; the weights of the ids that have some.
        ``ids_across``, ``weights_across``: of the same, the ranks with this local rank on every host. ``ids_host``,
        ``weights_host``: those of this host. ``intra``: those of this tower group. ``peer``: those with this place in
        every tower group.
        """
        layout, topology = self.layout, self.layout.topology
        what, _, step = hop.partition("_")
        if what in ("ids", "weights"):
            send, receive = self._sizes_to_owners(what, step)
            return [(size, 1) for size in send], [(size, 1) for size in receive]
        if hop == "intra":
            width, rows = layout.rank_widths[self.rank], self.peer_rows(self.rank % topology.local_ranks)
            return (
                [(self.peer_rows(local), width) for local in range(topology.local_ranks)],
                [(rows, layout.rank_widths[r]) for r in topology.intra_ranks(self.rank)],
            )
        width = layout.group_width(self.group)
        return (
            [(self.batch_sizes[r], width) for r in topology.peer_ranks(self.rank)],
            [(self.batch_size, layout.group_width(group)) for group in range(topology.hosts)],
        )

    def _sizes_to_owners(self, what: str, step: str) -> tuple[list[int], list[int]]:
        if step == "across":
            local = self.layout.run_topology.local_ranks
            sent = self.sent(what)
            send = [sum(sent[first : first + local]) for first in range(0, len(sent), local)]
            return send, [sum(by_rank) for by_rank in self.forwarded[what]]
        received = [self.block(what, self.rank, size, counts) for size, counts in self._announced()]
        if step == "host":
            local = self.layout.run_topology.local_ranks
            receive = [sum(received[position::local]) for position in range(local)]
            return [sum(to_rank) for to_rank in zip(*self.forwarded[what], strict=True)], receive
        return self.sent(what), received

    def _announced(self) -> zip[tuple[int, tuple[int, ...]]]:
        return zip(self.batch_sizes, self.received_ids, strict=True)

    def sent(self, what: str) -> list[int]:
        """Return the elements of ``ids`` or ``weights`` that this rank has for each owner."""
        return [self.block(what, owner, self.batch_size, counts) for owner, counts in enumerate(self.sent_ids)]

    def block(self, what: str, owner: int, batch_size: int, counts: tuple[int, ...]) -> int:
        """Return the elements that one rank has for ``owner``, given its samples and ids."""
        if what == "weights":
            return sum(self.weights_of(owner, counts))
        return self.layout.jagged_by_rank[owner] * batch_size + sum(counts)

    def weights_of(self, owner: int, counts: tuple[int, ...]) -> list[int]:
        """Return the ids of each weighted feature of ``owner``, given those of all its features."""
        features = self.layout.features_by_rank[owner]
        return [count for feature, count in zip(features, counts, strict=True) if self.layout.weighted[feature]]


@lru_cache(maxsize=16)
def _places(topology: Topology, batch_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    order = topology.peer_order()
    starts = dict(zip(order, accumulate((batch_sizes[rank] for rank in order), initial=0), strict=False))
    blocks = [torch.arange(starts[rank], starts[rank] + size) for rank, size in enumerate(batch_sizes)]
    return torch.cat(blocks).to(device)
