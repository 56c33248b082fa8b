"""Sizes of one step's exchanges: a static layout (who owns what) and a per-step route (how much goes where).

Shape suffixes: S source ranks, B samples of one rank, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from dmt_compile.topology import Topology

# What every rank tells every other one before a step's first exchange; the id counts per feature follow.
HEADER_FIELDS = ("fingerprint", "batch_size", "fault", "feature", "position", "value", "checksum")


@dataclass(frozen=True)
class Layout:
    """Which rank owns each feature's table, and its width.

    Args:
        topology: tower groups x ranks in a group (hosts x local ranks where a tower is one host).
        owners: global rank of each feature's table, in feature order.
        widths: columns of each feature, in feature order.
        jagged: per feature, bag lengths travel with the ids; the others have one id a bag.
        weighted: per feature, each id has a weight.
        outputs: columns that each tower group sends to its peers; empty where it sends its features as they are.
    """

    topology: Topology
    owners: tuple[int, ...]
    widths: tuple[int, ...]
    jagged: tuple[bool, ...]
    weighted: tuple[bool, ...]
    outputs: tuple[int, ...] = ()

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
        if self.outputs:
            return self.outputs[group]
        return sum(self.widths[i] for i in self.group_features(group))

    def group_features(self, group: int) -> tuple[int, ...]:
        """Feature indices of a tower group, in the order of their columns after the exchange inside it."""
        local = self.topology.local_ranks
        return tuple(i for features in self.features_by_rank[group * local : (group + 1) * local] for i in features)

    @cached_property
    def column_order(self) -> tuple[int, ...]:
        """Feature indices in the order of their columns after the last exchange."""
        return tuple(i for features in self.features_by_rank for i in features)

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
) -> Layout:
    """Return the layout of these owners; the same object for the same arguments."""
    return Layout(Topology(hosts, local_ranks), owners, widths, jagged, weighted, outputs)


@dataclass(frozen=True)
class Route:
    """The sizes of one step, as one rank sees them.

    Args:
        layout: who owns what.
        rank: this rank.
        batch_sizes: samples of every rank.
        sent_ids: for each rank, the ids of each of its features that this rank sends.
        received_ids: for each source rank, the ids of each of this rank's features.
    """

    layout: Layout
    rank: int
    batch_sizes: tuple[int, ...]
    sent_ids: tuple[tuple[int, ...], ...]
    received_ids: tuple[tuple[int, ...], ...]

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

    def blocks(self, hop: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return (rows, columns) of the blocks of a hop, to send and to receive, in the order of its group's ranks.

        ``ids``: all ranks; bag lengths, then ids. ``weights``: all ranks; the weights of the ids that have some.
        ``intra``: the ranks of this tower group. ``peer``: the ranks with this local rank in every group.
        """
        layout, topology = self.layout, self.layout.topology
        if hop == "ids":
            jagged = layout.jagged_by_rank
            send = [jagged[r] * self.batch_size + sum(counts) for r, counts in enumerate(self.sent_ids)]
            sizes = zip(self.batch_sizes, self.received_ids, strict=True)
            receive = [jagged[self.rank] * batch_size + sum(counts) for batch_size, counts in sizes]
            return [(size, 1) for size in send], [(size, 1) for size in receive]
        if hop == "weights":
            send = [sum(self.weights_of(r, counts)) for r, counts in enumerate(self.sent_ids)]
            receive = [sum(self.weights_of(self.rank, counts)) for counts in self.received_ids]
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

    def weights_of(self, owner: int, counts: tuple[int, ...]) -> list[int]:
        """Return the ids of each weighted feature of ``owner``, given those of all its features."""
        features = self.layout.features_by_rank[owner]
        return [count for feature, count in zip(features, counts, strict=True) if self.layout.weighted[feature]]
