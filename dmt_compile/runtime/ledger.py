"""What ranks sent, by collective and link."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

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
