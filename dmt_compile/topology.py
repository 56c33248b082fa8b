"""Hosts, local ranks and the process groups that follow from them.

Ranks are numbered ``rank = host * local_ranks + local_rank``, as ``torchrun`` numbers them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dmt_compile.errors import ConfigError

GBIT_BYTES = 1e9 / 8


@dataclass(frozen=True)
class Topology:
    """A two-level data center: ``hosts`` hosts with ``local_ranks`` ranks each.

    Args:
        hosts: number of hosts, at least 1.
        local_ranks: ranks (GPUs) on each host, at least 1.
        intra_bytes_per_s: bandwidth of one rank inside its host, bytes/s in one direction.
        cross_bytes_per_s: bandwidth of one rank across hosts, bytes/s in one direction.

    Raises:
        ConfigError: a number is not positive.

    Source: section 2.1 of the DMT paper; the default bandwidths are its Table 1 for H100 hosts.
    """

    hosts: int
    local_ranks: int
    intra_bytes_per_s: float = 450e9
    cross_bytes_per_s: float = 400 * GBIT_BYTES

    def __post_init__(self) -> None:
        for field in ("hosts", "local_ranks", "intra_bytes_per_s", "cross_bytes_per_s"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"topology: expected a positive number for {field}, found {getattr(self, field)}")

    @classmethod
    def parse(cls, text: str | Topology) -> Topology:
        """Read ``"<hosts>x<local ranks>"``, such as ``"2x4"``; a topology is returned as it is.

        Raises:
            ConfigError: the text has another form.
        """
        if isinstance(text, Topology):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
        if match is None:
            raise ConfigError(
                f"topology: expected '<hosts>x<local ranks>' such as '2x4', found {text!r}; "
                "write the number of hosts first"
            )
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, world_size: int, environ: Mapping[str, str] = os.environ) -> Topology:
        """Derive the topology from torchrun's ``LOCAL_WORLD_SIZE``; one host where it is absent.

        Raises:
            ConfigError: ``world_size`` is not a multiple of ``LOCAL_WORLD_SIZE``.
        """
        local = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        if local < 1 or world_size % local:
            raise ConfigError(
                f"topology: expected a world size that is a multiple of LOCAL_WORLD_SIZE={local}, found {world_size}; "
                "start the same number of ranks on every host, or pass options={'topology': '<hosts>x<local ranks>'}"
            )
        return cls(world_size // local, local)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.hosts * self.local_ranks

    def __str__(self) -> str:
        return f"{self.hosts}x{self.local_ranks}"

    def host_of(self, rank: int) -> int:
        """The host that holds global rank ``rank``."""
        return rank // self.local_ranks

    def grouped(self, hosts_per_group: int) -> Topology:
        """The topology in which ``hosts_per_group`` neighbouring hosts act as one: a tower over K hosts.

        Raises:
            ConfigError: the hosts cannot be divided evenly.
        """
        if hosts_per_group < 1 or self.hosts % hosts_per_group:
            raise ConfigError(
                f"topology: expected a divisor of {self.hosts} hosts as hosts per tower, found {hosts_per_group}"
            )
        return Topology(
            self.hosts // hosts_per_group,
            self.local_ranks * hosts_per_group,
            self.intra_bytes_per_s,
            self.cross_bytes_per_s,
        )

    def intra_ranks(self, rank: int) -> tuple[int, ...]:
        """Global ranks of the host of ``rank``, in order of local rank."""
        first = self.host_of(rank) * self.local_ranks
        return tuple(range(first, first + self.local_ranks))

    def peer_ranks(self, rank: int) -> tuple[int, ...]:
        """Global ranks with the same local rank as ``rank``, in order of host."""
        return tuple(range(rank % self.local_ranks, self.world_size, self.local_ranks))

    def peer_order(self) -> tuple[int, ...]:
        """All ranks sorted by ``(rank % local_ranks, rank // local_ranks)``.

        Source: section 3.1 of the paper prints ``rank % towers`` in this key, which is right only where the number
        of towers equals the number of local ranks.
        """
        return tuple(sorted(range(self.world_size), key=lambda r: (r % self.local_ranks, r // self.local_ranks)))
