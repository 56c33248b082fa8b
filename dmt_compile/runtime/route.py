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

    A table in pieces has as many features, one for each; those of row pieces are added up once the exchange inside the
    tower group has brought them together, and are one feature from there on, numbered as the first of them.

    Args:
        topology: tower groups x ranks in a group (hosts x local ranks where a tower is one host).
        owners: global rank of each feature's table, in feature order.
        widths: columns of each feature, in feature order.
        jagged: per feature, bag lengths travel with the ids; the others have one id a bag.
        weighted: per feature, each id has a weight.
        outputs: columns that each tower group sends to its peers; empty where it sends its features as they are.
        summed: sets of features that are added up, each of one tower group.
    """

    topology: Topology
    owners: tuple[int, ...]
    widths: tuple[int, ...]
    jagged: tuple[bool, ...]
    weighted: tuple[bool, ...]
    outputs: tuple[int, ...] = ()
    summed: tuple[tuple[int, ...], ...] = ()

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
    summed: tuple[tuple[int, ...], ...] = (),
) -> Layout:
    """Return the layout of these owners; the same object for the same arguments."""
    return Layout(Topology(hosts, local_ranks), owners, widths, jagged, weighted, outputs, summed)


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

    def sizes(self, hop: str) -> tuple[list[int], list[int]]:
        """Return the element counts (to send, to receive) of a hop, in the order of its group's ranks.

        ``ids``: all ranks; bag lengths, then ids. ``weights``: all ranks; the weights of the ids that have some.
        ``intra``: the ranks of this tower group. ``peer``: the ranks with this local rank in every group.
        """
        layout, topology = self.layout, self.layout.topology
        if hop == "ids":
            jagged = layout.jagged_by_rank
            send = [jagged[r] * self.batch_size + sum(counts) for r, counts in enumerate(self.sent_ids)]
            sizes = zip(self.batch_sizes, self.received_ids, strict=True)
            return send, [jagged[self.rank] * batch_size + sum(counts) for batch_size, counts in sizes]
        if hop == "weights":
            send = [sum(self.weights_of(r, counts)) for r, counts in enumerate(self.sent_ids)]
            return send, [sum(self.weights_of(self.rank, counts)) for counts in self.received_ids]
        if hop == "intra":
            my_width, my_rows = layout.rank_widths[self.rank], self.peer_rows(self.rank % topology.local_ranks)
            send = [self.peer_rows(local) * my_width for local in range(topology.local_ranks)]
            return send, [my_rows * layout.rank_widths[r] for r in topology.intra_ranks(self.rank)]
        peers = topology.peer_ranks(self.rank)
        my_width = layout.group_width(self.group)
        return (
            [self.batch_sizes[r] * my_width for r in peers],
            [self.batch_size * layout.group_width(group) for group in range(topology.hosts)],
        )

    def weights_of(self, owner: int, counts: tuple[int, ...]) -> list[int]:
        """Return the ids of each weighted feature of ``owner``, given those of all its features."""
        features = self.layout.features_by_rank[owner]
        return [count for feature, count in zip(features, counts, strict=True) if self.layout.weighted[feature]]

    def block_widths(self, hop: str) -> list[int]:
        """Columns of each block that a hop delivers, in the order of its group's ranks."""
        if hop == "intra":
            return [self.layout.rank_widths[r] for r in self.layout.topology.intra_ranks(self.rank)]
        return [self.layout.group_width(group) for group in range(self.layout.topology.hosts)]

    def block_rows(self, hop: str) -> int:
        """Rows of the blocks that a hop delivers."""
        if hop == "intra":
            return self.peer_rows(self.rank % self.layout.topology.local_ranks)
        return self.batch_size
