"""The options of ``torch.compile(model, backend="dmt", options={...})``: one frozen, validated dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dmt_compile.errors import ConfigError
from dmt_compile.plan import TowerPlan
from dmt_compile.topology import Topology

PARTITIONS = ("balanced", "strided")
DENSE_COMPILERS = ("inductor", "aot_eager", "eager")


def _nearest(name: object, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(map(repr, valid))}"


@dataclass(frozen=True)
class Options:
    """What a user may ask of the compiler.

    Args:
        plan: a :class:`TowerPlan` or the path of a saved one; ``None`` plans at the first call.
        topology: ``"auto"`` (from the process group and ``LOCAL_WORLD_SIZE``), ``"<hosts>x<local ranks>"`` or a
            :class:`Topology`.
        towers: ``"host"`` (one per host) or a number of towers that divides, or is a multiple of, the hosts.
        partition: ``"balanced"`` (bytes moved and memory), ``"strided"`` (table ``i`` to tower ``i % towers``), or an
            explicit list of lists of table names, one list a tower.
        dense_compiler: what compiles the dense regions: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        check_ids: check every id against its table's rows before it is used.
        strict: an unsupported region is an error, not a fallback.
        verify: hold the graph to its stage's rules after every pass.
        dump_dir: folder for the graph before and after every pass, and ``report.json``.
        timeout_s: seconds after which a rank that does not arrive at a collective is reported.
        first_timeout_s: the same for a model's first calls, in which ranks compile; the first calls of its later graphs
            wait up to ten times as long as this rank compiled, within the two.

    Raises:
        ConfigError: an unknown name or value, or a contradiction.
    """

    plan: TowerPlan | str | Path | None = None
    topology: Topology | str = "auto"
    towers: int | str = "host"
    partition: str | Sequence[Sequence[str]] = "balanced"
    dense_compiler: str = "inductor"
    check_ids: bool = True
    strict: bool = False
    verify: bool = True
    dump_dir: str | Path | None = None
    timeout_s: float = 60.0
    first_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not isinstance(self.topology, Topology | str):
            raise ConfigError(f"options: expected text or a Topology for 'topology', found {self.topology!r}")
        if isinstance(self.topology, str) and self.topology != "auto":
            Topology.parse(self.topology)
        if isinstance(self.towers, bool) or not (
            self.towers == "host" or (isinstance(self.towers, int) and self.towers > 0)
        ):
            raise ConfigError(f"options: expected 'host' or a positive number for 'towers', found {self.towers!r}")
        if isinstance(self.partition, str):
            if self.partition not in PARTITIONS:
                raise ConfigError(
                    f"options: expected a known 'partition', found {self.partition!r}"
                    + _nearest(self.partition, PARTITIONS)
                )
        else:
            self._check_explicit(self.partition)
        if self.dense_compiler not in DENSE_COMPILERS:
            raise ConfigError(
                f"options: expected a known 'dense_compiler', found {self.dense_compiler!r}"
                + _nearest(self.dense_compiler, DENSE_COMPILERS)
            )
        for name in ("timeout_s", "first_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"options: expected seconds above 0 for {name!r}, found {value!r}")
        for name in ("check_ids", "strict", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"options: expected True or False for {name!r}, found {getattr(self, name)!r}")
        if not isinstance(self.plan, TowerPlan | str | Path | None):
            raise ConfigError(f"options: expected a TowerPlan or a path for 'plan', found {self.plan!r}")
        if self.plan is not None and (self.towers != "host" or self.partition != "balanced"):
            raise ConfigError("options: expected 'plan' alone, found it beside 'towers' or 'partition'; drop those")

    def _check_explicit(self, partition: Sequence[Sequence[str]]) -> None:
        if not isinstance(partition, Sequence) or not all(
            isinstance(group, Sequence) and not isinstance(group, str) and all(isinstance(n, str) for n in group)
            for group in partition
        ):
            raise ConfigError(f"options: expected a list of lists of table names for 'partition', found {partition!r}")
        if self.towers != "host":
            raise ConfigError(
                "options: expected either 'towers' or an explicit 'partition', found both; "
                "the number of lists is the number of towers, drop 'towers'"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> Options:
        """Validate the dictionary that a user passed to ``torch.compile``.

        Raises:
            ConfigError: an unknown option, with the nearest valid name, or a bad value.
        """
        values = dict(values or {})
        valid = [f.name for f in fields(cls)]
        for name in values:
            if name not in valid:
                raise ConfigError(f"options: expected a known option, found {name!r}" + _nearest(name, valid))
        return cls(**values)

    def resolve_topology(self, world_size: int) -> Topology:
        """The topology of a run with ``world_size`` ranks.

        Raises:
            ConfigError: the topology has another number of ranks.
        """
        if self.topology == "auto":
            return Topology.from_environment(world_size) if world_size > 1 else Topology(1, 1)
        topology = Topology.parse(self.topology)
        if topology.world_size != world_size:
            raise ConfigError(
                f"options: expected {topology.world_size} ranks for topology {topology}, found {world_size}; start "
                f"torchrun with {topology.world_size} processes, or use dmt_compile.SimulatedWorld('{topology}') to "
                "run all of its ranks in this process"
            )
        return topology

    def resolve_plan(self) -> TowerPlan | None:
        """The plan that the user gave, loaded where it is a path."""
        if self.plan is None or isinstance(self.plan, TowerPlan):
            return self.plan
        return TowerPlan.load(self.plan)
