"""The options of ``torch.compile(model, backend="dmt", options={...})``: one frozen, validated dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import networkx as nx

from dmt_compile.errors import ConfigError
from dmt_compile.kernels.choice import KERNELS
from dmt_compile.kernels.pack_rows.reference import CASTS, FORMATS
from dmt_compile.partition.assign import STRATEGIES
from dmt_compile.partition.interaction import InteractionMatrix, read_interactions
from dmt_compile.plan import TowerModules, TowerPlan
from dmt_compile.topology import Topology
from dmt_compile.tower_modules import KINDS

PARTITIONS = ("balanced", "strided", *STRATEGIES)
DENSE_COMPILERS = ("inductor", "aot_eager", "eager")
HOPS = ("intra", "peer", "dense")
ID_EXCHANGES = ("auto", "global", "hierarchical")
DENSE_REDUCTIONS = ("auto", "flat", "hierarchical")


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
        partition: ``"balanced"`` (bytes moved and memory), ``"strided"`` (table ``i`` to tower ``i % towers``),
            ``"coherent"`` (tables that interact into one tower) or ``"diverse"`` (into different ones), or an explicit
            list of lists of table names, one list a tower.
        interactions: of the features, for ``"coherent"`` and ``"diverse"``: what :func:`dmt_compile.interactions`
            returned, the path of such a saved matrix, or a networkx graph of features with edge weights from 0 to 1.
        max_imbalance: the most bytes moved, weights and rows read of a ``"coherent"`` or ``"diverse"`` tower, relative
            to the mean tower; ``None`` is 1.1, where tables are too uneven for that 1.1 times the least that they
            allow; a number must be kept.
        memory_bytes: the most bytes of weights on a rank.
        split_columns: let the planner split tables by columns where one outweighs a tower or a rank, or there are fewer
            tables than towers; ids of a split table are sent once a piece. With Tower Modules, inside a tower alone.
        split_rows: let the planner split tables by rows where one outweighs a rank of its tower; each id is sent once,
            and the pieces' sums are added inside the tower. With ``split_columns``, whichever costs less.
        tower_module: what compresses each tower before its embeddings cross hosts, which changes the model: ``None``, a
            kind of :mod:`dmt_compile.tower_modules` (``"dlrm"``, ``"dcn"``, ...), or a callable
            ``(tower: TowerSpec) -> nn.Module``.
        tower_module_options: of that kind, such as ``{"c": 1, "p": 0, "dim": 64}``.
        seed: of the Tower Modules' initial values, and those of the layers that get another size; of the search for
            ``"coherent"`` and ``"diverse"`` towers.
        comm_dtype: in which form numbers travel, by hop: ``"intra"`` (embeddings inside a host), ``"peer"`` (embeddings
            between hosts) and ``"dense"`` (gradients of dense parameters between hosts). A form is ``"float32"`` (as
            they are), ``"bfloat16"``, ``"float16"``, or for embeddings ``"float8"`` or ``"int8"``, which are scaled by
            row; a pair of forms is for the forward and the backward pass. Sums are made in float32 all the same.
        id_exchange: how ids reach the tables' owners: ``"global"`` (one exchange among all ranks, the embeddings are
            permuted afterwards), ``"hierarchical"`` (across hosts first, then inside them; nothing is permuted) or
            ``"auto"`` (what :mod:`dmt_compile.cost.id_exchange` expects to be faster). The numbers are the same, but
            for the order in which a table's gradient sums the samples.
        dense_compiler: what compiles the dense regions: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        dense_reduction: of dense gradients: ``"flat"`` (one all-reduce), ``"hierarchical"`` (in hosts, between them, in
            hosts again) or ``"auto"``: hierarchical where several hosts have several ranks each.
        kernels: which implementation of lookups, interactions and packed rows runs: ``"auto"`` (the fastest that can,
            see ``explain`` or ``report.json`` for which and why), ``"reference"`` (PyTorch's own operators),
            ``"triton"`` or ``"fbgemm"``, each where it can and the reference elsewhere.
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
    interactions: InteractionMatrix | nx.Graph[Any] | str | Path | None = None
    max_imbalance: float | None = None
    memory_bytes: int | None = None
    split_columns: bool = False
    split_rows: bool = False
    tower_module: str | Callable[..., Any] | None = None
    tower_module_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    comm_dtype: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    id_exchange: str = "auto"
    dense_compiler: str = "inductor"
    dense_reduction: str = "auto"
    kernels: str = "auto"
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
        self._check_planner()
        self._check_tower_module()
        self._check_comm_dtype()
        for name, known in (
            ("dense_compiler", DENSE_COMPILERS),
            ("dense_reduction", DENSE_REDUCTIONS),
            ("id_exchange", ID_EXCHANGES),
            ("kernels", KERNELS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"options: expected a known {name!r}, found {value!r}" + _nearest(value, known))
        for name in ("timeout_s", "first_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"options: expected seconds above 0 for {name!r}, found {value!r}")
        for name in ("check_ids", "split_columns", "split_rows", "strict", "verify"):
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

    def _check_planner(self) -> None:
        by_interaction = self.partition in STRATEGIES
        if by_interaction and self.interactions is None:
            raise ConfigError(
                f"options: expected 'interactions' beside 'partition' {self.partition!r}, found none; measure them on "
                "the trained flat model with dmt_compile.interactions(model, batches) and pass the result, or the path "
                "that its save() wrote"
            )
        if not isinstance(self.interactions, InteractionMatrix | nx.Graph | str | Path | None):
            raise ConfigError(
                "options: expected an InteractionMatrix, a networkx graph or a path for 'interactions', found "
                f"{self.interactions!r}"
            )
        for name in ("interactions", "max_imbalance"):
            if getattr(self, name) is not None and not by_interaction:
                raise ConfigError(
                    f"options: expected 'partition' 'coherent' or 'diverse' beside {name!r}, found "
                    f"{self.partition!r}; set it, or drop {name!r}"
                )
        limit, memory = self.max_imbalance, self.memory_bytes
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1):
            raise ConfigError(f"options: expected a number of at least 1 for 'max_imbalance', found {limit!r}")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
            raise ConfigError(f"options: expected bytes above 0 for 'memory_bytes', found {memory!r}")
        for name in ("memory_bytes", "split_columns", "split_rows"):
            if self.plan is not None and getattr(self, name):
                raise ConfigError(f"options: expected 'plan' alone, found it beside {name!r}; drop one of them")

    def _check_tower_module(self) -> None:
        if isinstance(self.tower_module, str):
            if self.tower_module not in KINDS:
                raise ConfigError(
                    f"options: expected a known 'tower_module', found {self.tower_module!r}"
                    + _nearest(self.tower_module, tuple(KINDS))
                )
        elif not (self.tower_module is None or callable(self.tower_module)):
            raise ConfigError(
                f"options: expected a name, a callable or None for 'tower_module', found {self.tower_module!r}"
            )
        if not isinstance(self.tower_module_options, Mapping):
            raise ConfigError(
                f"options: expected a dict for 'tower_module_options', found {self.tower_module_options!r}"
            )
        if self.tower_module_options and self.tower_module is None:
            raise ConfigError(
                "options: expected 'tower_module' beside 'tower_module_options', found it missing; name a kind, such "
                f"as {next(iter(KINDS))!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"options: expected a whole number for 'seed', found {self.seed!r}")

    def _check_comm_dtype(self) -> None:
        if not isinstance(self.comm_dtype, Mapping):
            raise ConfigError(f"options: expected a dict for 'comm_dtype', found {self.comm_dtype!r}")
        for hop, given in self.comm_dtype.items():
            if hop not in HOPS:
                raise ConfigError(f"options: expected a known hop in 'comm_dtype', found {hop!r}" + _nearest(hop, HOPS))
            forms = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
            if len(forms) not in ((1,) if hop == "dense" else (1, 2)):
                expected = "one form" if hop == "dense" else "a form, or one for each direction,"
                raise ConfigError(f"options: expected {expected} for hop {hop!r} in 'comm_dtype', found {given!r}")
            valid = ("float32", *(CASTS if hop == "dense" else FORMATS))
            for form in forms:
                if form not in valid:
                    raise ConfigError(
                        f"options: expected a known form for hop {hop!r} in 'comm_dtype', found {form!r}"
                        + _nearest(form, valid)
                    )

        if self.wire_forms("dense")[0] is not None and self.dense_reduction == "flat":
            raise ConfigError(
                "options: expected a hierarchical 'dense_reduction' for hop 'dense' in 'comm_dtype', found 'flat', "
                "which has no hop of its own between hosts; drop one of them"
            )

    def wire_forms(self, hop: str) -> tuple[str | None, str | None]:
        """The forms in which floating-point numbers travel on a hop, forward and backward; ``None``: as they are."""
        given = self.comm_dtype.get(hop, "float32")
        forward, backward = (given, given) if isinstance(given, str) else (given[0], given[-1])
        return (None if forward == "float32" else forward, None if backward == "float32" else backward)

    def recipe(self, plan: TowerPlan) -> TowerModules | None:
        """Return what makes the Tower Modules: the plan's own, or these options'.

        Raises:
            ConfigError: the plan has others, or its callable was not passed again.
        """
        recorded, given = plan.tower_modules, self.tower_module
        if given is None:
            if recorded is not None and recorded.kind not in KINDS:
                raise ConfigError(
                    f"options: expected the callable {recorded.kind} of the plan's Tower Modules as 'tower_module', "
                    "found none; pass it again, a plan holds its name only"
                )
            return recorded
        kind = given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}"
        recipe = TowerModules(kind, dict(self.tower_module_options), self.seed)
        if recorded is not None and recorded.kind != kind:
            raise ConfigError(
                f"options: expected the plan's Tower Modules {recorded.kind!r}, found 'tower_module' {kind!r}; drop "
                "it, or make a new plan"
            )
        return recorded or recipe

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

    def planner(self) -> dict[str, Any]:
        """What :func:`dmt_compile.partition.assign.make_plan` is told, but for the partition.

        Raises:
            ConfigError: the interactions cannot be read.
        """
        given = self.interactions
        return {
            "towers": self.towers,
            "interactions": None if given is None else read_interactions(given),
            "max_imbalance": self.max_imbalance,
            "memory_bytes": self.memory_bytes,
            "split_columns": self.split_columns,
            "split_rows": self.split_rows,
            "across_towers": self.tower_module is None,
            "seed": self.seed,
        }

    def resolve_plan(self) -> TowerPlan | None:
        """The plan that the user gave, loaded where it is a path."""
        if self.plan is None or isinstance(self.plan, TowerPlan):
            return self.plan
        return TowerPlan.load(self.plan)
