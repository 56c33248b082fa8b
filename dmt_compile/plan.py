"""The tower plan: which tables form which tower, and which rank owns which rows and columns of each table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dmt_compile.errors import PlanError
from dmt_compile.table_names import Range, columns_of, covers_once, parameter_of
from dmt_compile.topology import Topology

PLAN_VERSION = 3
MOST_INT32 = 2**31 - 1
SPLITS = ("none", "columns", "rows and columns")  # how a table may be split


@dataclass(frozen=True)
class TableSpec:
    """What the planner knows of one embedding table.

    Args:
        name: the flat model's parameter name without ``.weight``, such as ``emb.3``.
        rows: number of embeddings.
        dim: width of one embedding.
        dtype: element type, such as ``float32``.
        features: lookups per sample that read this table (2 for a table shared by two features).
        pooling: mean ids per bag, measured on the planning batch.
        bags: mean bags per sample and lookup; more than 1 where a sequence is used before it is pooled.
        jagged: share of the bags whose lengths travel with the ids; the others have one id, or as many as each other.
        weighted: share of the bags whose ids have weights.
        splits: how it may be split: by ``"rows and columns"``, by ``"columns"`` alone where a maximum is taken of a
            bag or ids are counted, or not at all (``"none"``), where whole rows are renormalised.
        whole: the table of which this is a piece; empty for a whole one.
    """

    name: str
    rows: int
    dim: int
    dtype: str = "float32"
    features: int = 1
    pooling: float = 1.0
    bags: float = 1.0
    jagged: float = 1.0
    weighted: float = 0.0
    splits: str = SPLITS[-1]
    whole: str = ""

    @property
    def added(self) -> tuple[str, Range | None]:
        """What the pooled embeddings are summed to: equal for the row pieces of the same columns of a table."""
        return (self.whole, columns_of(self.name)) if self.whole else (self.name, None)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        import torch

        return int(getattr(torch, self.dtype).itemsize)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table's weights, without optimizer state."""
        return self.rows * self.dim * self.element_bytes

    @property
    def output_bytes_per_sample(self) -> int:
        """Bytes of pooled embeddings that one sample takes from this table."""
        return round(self.features * self.bags * self.dim * self.element_bytes)

    @property
    def id_bytes(self) -> int:
        """Bytes of one id or bag length on the wire: int32 where it can count the rows of the table's parameter."""
        return 4 if parameter_of(self.name).first_row + self.rows <= MOST_INT32 else 8

    @property
    def id_bytes_per_sample(self) -> float:
        """Bytes of ids, bag lengths and weights that one sample sends to this table's owner."""
        per_bag = self.id_bytes * (self.pooling + self.jagged) + self.weighted * self.pooling * self.element_bytes
        return self.features * self.bags * per_bag


@dataclass(frozen=True)
class Shard:
    """A rectangular part of a table on one rank; ``rows`` and ``columns`` are half-open ranges."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class Tower:
    """A group of tables that live together on the hosts ``hosts``.

    ``output_width`` is the number of columns that the tower sends to each sample: the sum of its features' widths
    where no Tower Module compresses them.
    """

    name: str
    tables: tuple[str, ...]
    hosts: tuple[int, ...]
    output_width: int


@dataclass(frozen=True)
class TowerModules:
    """What makes the Tower Modules of a plan.

    Args:
        kind: a name of :mod:`dmt_compile.tower_modules`, or the qualified name of a callable to be passed again.
        options: of that kind, as JSON can hold them.
        seed: of their initial values and those of the layers that get another size.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class TowerPlan:
    """Towers, placements and the topology they were made for; equal on every rank, saved as readable JSON.

    ``tower_modules`` is ``None`` where every tower sends its features as they are.
    """

    topology: Topology
    tables: tuple[TableSpec, ...]
    towers: tuple[Tower, ...]
    placements: dict[str, tuple[Shard, ...]]
    partition: str = "balanced"
    notes: tuple[str, ...] = field(default=())
    tower_modules: TowerModules | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        names = [table.name for table in self.tables]
        in_towers = [name for tower in self.towers for name in tower.tables]
        extra = sorted((set(in_towers) | self.placements.keys()) - set(names))
        if extra or sorted(in_towers) != sorted(names):
            missing = sorted(set(names) - set(in_towers))
            twice = sorted({name for name in in_towers if in_towers.count(name) > 1})
            raise PlanError(
                "plan: expected every table in exactly one tower, found "
                f"missing {missing}, unknown {extra}, in two towers {twice}"
            )
        for tower in self.towers:
            bad = [host for host in tower.hosts if not 0 <= host < self.topology.hosts]
            if bad or not tower.hosts:
                raise PlanError(
                    f"plan: expected hosts below {self.topology.hosts} for {tower.name}, found {tower.hosts}"
                )
        homes: dict[Any, str] = {}
        for table in self.tables:
            home = self.tower_of(table.name).name
            if homes.setdefault(table.added, home) != home:
                raise PlanError(
                    f"plan: expected the row pieces of {table.whole} in one tower, where they are added up, found them "
                    f"in {homes[table.added]} and {home}"
                )
            shards = self.placements.get(table.name, ())
            area = 0
            for shard in shards:
                (r0, r1), (c0, c1) = shard.rows, shard.columns
                inside = 0 <= r0 <= r1 <= table.rows and 0 <= c0 <= c1 <= table.dim
                hosts = self.tower_of(table.name).hosts
                known = 0 <= shard.rank < self.topology.world_size
                if not inside or not known or self.topology.host_of(shard.rank) not in hosts:
                    raise PlanError(
                        f"plan: expected shards of {table.name} inside {table.rows}x{table.dim} on the ranks of hosts "
                        f"{hosts}, found rows {shard.rows} columns {shard.columns} on rank {shard.rank}"
                    )
                area += (r1 - r0) * (c1 - c0)
            overlap = any(
                a is not b
                and max(a.rows[0], b.rows[0]) < min(a.rows[1], b.rows[1])
                and max(a.columns[0], b.columns[0]) < min(a.columns[1], b.columns[1])
                for a in shards
                for b in shards
            )
            if area != table.rows * table.dim or overlap:
                raise PlanError(
                    f"plan: expected the shards of {table.name} to cover its {table.rows}x{table.dim} elements once, "
                    f"found {[(s.rank, s.rows, s.columns) for s in shards]}"
                )

    def tower_of(self, table: str) -> Tower:
        """The tower that holds ``table``.

        Raises:
            PlanError: no tower holds it.
        """
        for tower in self.towers:
            if table in tower.tables:
                return tower
        raise PlanError(f"plan: expected a tower for table {table}, found none; the plan belongs to another model")

    def home(self, table: str) -> Tower | None:
        """The tower that holds a table or a piece, or else all pieces of a table; ``None`` where they are in several.

        Raises:
            PlanError: no tower holds it.
        """
        towers = {tower.name: tower for tower in map(self.tower_of, self._parts(table))}
        return towers.popitem()[1] if len(towers) == 1 else None

    def _parts(self, table: str) -> list[str]:
        return [spec.name for spec in self.pieces_of(table)] or [table]

    def unsplit(self, tables: Iterable[TableSpec]) -> TowerPlan:
        """Return the plan with ``tables`` whole, each where its first piece is.

        Raises:
            PlanError: the pieces of a table are in several towers.
        """
        given = {table.name: table for table in tables}
        whole = {spec.name: spec.whole if spec.whole in given else spec.name for spec in self.tables}
        placements: dict[str, tuple[Shard, ...]] = {}
        for name, shards in self.placements.items():
            table = given[whole[name]] if whole[name] != name else None
            one = shards if table is None else (Shard(shards[0].rank, (0, table.rows), (0, table.dim)),)
            placements.setdefault(whole[name], one)
        return replace(
            self,
            tables=tuple({whole[spec.name]: given.get(whole[spec.name], spec) for spec in self.tables}.values()),
            towers=tuple(replace(t, tables=tuple(dict.fromkeys(whole[n] for n in t.tables))) for t in self.towers),
            placements=placements,
        )

    def pieces_of(self, table: str) -> list[TableSpec]:
        """The pieces of a table that the plan splits, by columns, then by rows; none of a whole one."""
        return self._pieces.get(table, [])

    @cached_property
    def _pieces(self) -> dict[str, list[TableSpec]]:
        found: dict[str, list[TableSpec]] = {}
        for spec in sorted(self.tables, key=lambda spec: parameter_of(spec.name)[:0:-1]):
            if spec.whole:
                found.setdefault(spec.whole, []).append(spec)
        return found

    def parts_of(self, parameter: str) -> list[tuple[str, Shard]]:
        """The shards of all tables that a parameter holds: the table's name, rows and columns of the parameter."""
        found = []
        for name, shards in self.placements.items():
            where, row, column = parameter_of(name)
            for shard in shards if where == parameter else ():
                rows = (row + shard.rows[0], row + shard.rows[1])
                columns = (column + shard.columns[0], column + shard.columns[1])
                found.append((name, Shard(shard.rank, rows, columns)))
        return found

    def owner(self, table: str) -> int:
        """The one rank that holds all of ``table``.

        Raises:
            PlanError: the table has several shards; what is split is written as pieces, tables of their own.
        """
        shards = self.placements[table]
        if len(shards) != 1:
            raise PlanError(f"plan: expected one shard for table {table}, found {len(shards)}")
        return shards[0].rank

    @property
    def id_bytes(self) -> int:
        """Bytes of one id or bag length on the wire: one type for all tables."""
        return max((table.id_bytes for table in self.tables), default=4)

    def merge(self, other: TowerPlan) -> TowerPlan:
        """Return the plan of a model whose tables came in two graphs, planned one after the other."""
        towers = [
            replace(a, tables=(*a.tables, *b.tables), output_width=a.output_width + b.output_width)
            for a, b in zip(self.towers, other.towers, strict=True)
        ]
        return replace(
            self,
            tables=(*self.tables, *other.tables),
            towers=tuple(towers),
            placements={**self.placements, **other.placements},
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def tower_groups(self) -> Topology:
        """Return the topology in which the hosts of one tower act as one host.

        Raises:
            PlanError: towers span different numbers of hosts, or hosts that are no neighbours.
        """
        spans = {len(tower.hosts) for tower in self.towers}
        aligned = all(
            tower.hosts == tuple(range(tower.hosts[0], tower.hosts[0] + len(tower.hosts)))
            and tower.hosts[0] % len(tower.hosts) == 0
            for tower in self.towers
        )
        if len(spans) > 1 or not aligned:
            raise PlanError(
                "plan: expected towers over the same number of neighbouring hosts, found "
                f"{[(tower.name, tower.hosts) for tower in self.towers]}; give every tower as many hosts"
            )
        return self.topology.grouped(spans.pop() if spans else 1)

    @property
    def fingerprint(self) -> int:
        """A 62-bit hash of the plan's content; ranks compare it."""
        return int.from_bytes(hashlib.sha256(self.to_json().encode()).digest()[:8], "big") >> 2

    def check_tables(self, tables: Iterable[TableSpec], others: Iterable[TableSpec] = ()) -> None:
        """Compare the plan with a model's tables; ``others`` are tables of the model that it need not hold.

        Raises:
            PlanError: a name, shape or element type differs, or the pieces of a table do not cover it once.
        """
        pieces: dict[str, list[str]] = {}
        mine: dict[str, Any] = {}
        for spec in self.tables:
            mine[spec.whole or spec.name] = (spec.rows, spec.dim, spec.dtype)
            if spec.whole:
                pieces.setdefault(spec.whole, []).append(spec.name)
        theirs = {}
        for table, needed in (*((t, True) for t in tables), *((t, False) for t in others)):
            if needed or table.name in mine:
                theirs[table.name] = (table.rows, table.dim, table.dtype)
            if table.name in pieces:
                if not covers_once(pieces[table.name], table.name, table.rows, table.dim):
                    raise PlanError(
                        f"plan: expected pieces that cover the {table.rows} rows and {table.dim} columns of "
                        f"{table.name} once, found {sorted(pieces[table.name])}"
                    )
                mine[table.name] = (table.rows, table.dim, mine[table.name][2])
        if mine != theirs:
            differing = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            first = differing[0]
            raise PlanError(
                f"plan: expected table {first} as (rows, dim, dtype) = {mine.get(first)}, found {theirs.get(first)} "
                f"({len(differing)} tables differ); the plan was made for another model, make a new one with "
                "dmt_compile.plan"
            )

    def to_json(self) -> str:
        """The plan as versioned JSON: one table, tower and shard a line, so that two plans can be diffed."""

        def rows(items: list[str]) -> str:
            return "[\n" + ",\n".join("    " + item for item in items) + "\n  ]" if items else "[]"

        placements = [
            json.dumps({"table": name, **asdict(shard)})
            for name in sorted(self.placements)
            for shard in self.placements[name]
        ]
        return (
            "{\n"
            f'  "version": {PLAN_VERSION},\n'
            f'  "topology": {json.dumps(asdict(self.topology))},\n'
            f'  "partition": {json.dumps(self.partition)},\n'
            f'  "tables": {rows([json.dumps(asdict(t)) for t in self.tables])},\n'
            f'  "towers": {rows([json.dumps(asdict(t)) for t in self.towers])},\n'
            f'  "placements": {rows(placements)},\n'
            f'  "tower_modules": {json.dumps(None if self.tower_modules is None else asdict(self.tower_modules))},\n'
            f'  "notes": {json.dumps(list(self.notes))}\n'
            "}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> TowerPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: not JSON, another version, or a missing field.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["version"] != PLAN_VERSION:
                raise PlanError(f"plan: expected version {PLAN_VERSION}, found {data['version']}; make the plan again")
            placements: dict[str, tuple[Shard, ...]] = {}
            for row in data["placements"]:
                shard = Shard(row["rank"], tuple(row["rows"]), tuple(row["columns"]))
                placements[row["table"]] = (*placements.get(row["table"], ()), shard)
            return cls(
                topology=Topology(**data["topology"]),
                tables=tuple(TableSpec(**row) for row in data["tables"]),
                towers=tuple(
                    Tower(row["name"], tuple(row["tables"]), tuple(row["hosts"]), row["output_width"])
                    for row in data["towers"]
                ),
                placements=placements,
                partition=data["partition"],
                notes=tuple(data["notes"]),
                tower_modules=None if data["tower_modules"] is None else TowerModules(**data["tower_modules"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"plan: expected a tower plan in JSON, found {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TowerPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: the file is missing or holds no plan.
        """
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise PlanError(
                f"plan: expected a readable file, found {error}; pass the path that save() wrote"
            ) from error
        return cls.from_json(text)

    def __str__(self) -> str:
        from dmt_compile.inspection.tables import plan_text

        return plan_text(self)
