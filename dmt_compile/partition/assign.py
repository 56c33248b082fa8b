"""Make a tower plan: tables to towers, and whole tables to the ranks of their tower."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from itertools import count

from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.partition.balance import balance, imbalance
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.topology import Topology

# With more tables the quicker searches come close to an even plan, and every tower would run its own integer program.
EXACT_MAX_TABLES = 200


def make_plan(
    tables: Sequence[TableSpec],
    topology: Topology,
    *,
    towers: int | str = "host",
    partition: str | Sequence[Sequence[str]] = "balanced",
) -> TowerPlan:
    """Assign every table to one tower and one rank; the same arguments give the same plan.

    Args:
        tables: the model's tables, in the order of the model; may be empty.
        topology: hosts and ranks.
        towers: ``"host"`` (one per host), a multiple of the hosts (several towers share all ranks of a host), or a
            divisor of them (a tower spans neighbouring hosts). Not read where ``partition`` is explicit.
        partition: ``"balanced"`` evens out bytes moved and memory over towers, then over ranks; ``"strided"`` puts
            table ``i`` into tower ``i % towers`` and a tower's tables on its ranks in turn; a list of table names per
            tower is taken as it is, and evened out over ranks.

    Returns:
        A plan with one shard per table. A tower or a rank may hold no table.

    Raises:
        ConfigError: the number of towers does not fit the number of hosts.
        PlanError: an explicit partition names an unknown table, omits one, or repeats one.

    Source: section 3 of the DMT paper; ``"strided"`` is its naive assignment.
    """
    explicit, exact = not isinstance(partition, str), len(tables) <= EXACT_MAX_TABLES
    number = len(partition) if explicit else topology.hosts if towers == "host" else int(towers)
    _check_number(number, topology.hosts)
    if isinstance(partition, str):
        bins = _strided(len(tables), number) if partition == "strided" else _balanced(tables, number, exact)
        members = [[table for table, bin_ in zip(tables, bins, strict=True) if bin_ == k] for k in range(number)]
    else:
        members = _explicit(tables, partition)
    groups = min(number, topology.hosts)
    hosts_per_group = topology.hosts // groups
    ranks = topology.grouped(hosts_per_group).local_ranks
    owners: dict[str, int] = {}
    for group in range(groups):
        here = members[group * number // groups : (group + 1) * number // groups]
        if partition == "strided":
            placed = [pair for tower in here for pair in zip(tower, _strided(len(tower), ranks), strict=True)]
        else:
            together = [table for tower in here for table in tower]
            placed = list(zip(together, _balanced(together, ranks, exact), strict=True))
        owners |= {table.name: group * ranks + local_rank for table, local_rank in placed}
    return TowerPlan(
        topology=topology,
        tables=tuple(tables),
        towers=tuple(_tower(k, members[k], k * groups // number, hosts_per_group) for k in range(number)),
        placements={t.name: (Shard(owners[t.name], (0, t.rows), (0, t.dim)),) for t in tables},
        partition="explicit" if explicit else str(partition),
        notes=_notes(tables, topology.world_size, members, owners),
    )


def _tower(k: int, tables: Sequence[TableSpec], group: int, hosts_per_group: int) -> Tower:
    return Tower(
        name=f"tower{k}",
        tables=tuple(table.name for table in tables),
        hosts=tuple(range(group * hosts_per_group, (group + 1) * hosts_per_group)),
        output_width=sum(table.features * table.dim for table in tables),
    )


def _check_number(number: int, hosts: int) -> None:
    """Hold the number of towers to the rule that every host, or every few hosts, have the same number of them."""

    def fits(n: int) -> bool:
        return n > 0 and (n % hosts == 0 or hosts % n == 0)

    if fits(number):
        return
    below = next((n for n in range(number - 1, 0, -1) if fits(n)), None)
    above = next(n for n in count(max(number, 0) + 1) if fits(n))
    raise ConfigError(
        f"partition: expected a number of towers that divides, or is a multiple of, {hosts} hosts, found {number}; "
        f"use {above if below is None else f'{below} or {above}'}"
    )


def _loads(tables: Sequence[TableSpec]) -> tuple[list[float], list[float]]:
    """Bytes that one sample moves for each table, and bytes of its weights."""
    moved = [table.output_bytes_per_sample + table.id_bytes_per_sample for table in tables]
    return moved, [float(table.memory_bytes) for table in tables]


def _balanced(tables: Sequence[TableSpec], bins: int, exact: bool) -> list[int]:
    return balance(*_loads(tables), bins, exact)


def _strided(items: int, bins: int) -> list[int]:
    return [item % bins for item in range(items)]


def _explicit(tables: Sequence[TableSpec], partition: Sequence[Sequence[str]]) -> list[list[TableSpec]]:
    """Look up the tables of an explicit partition, in the order in which it names them."""
    by_name = {table.name: table for table in tables}
    listed = Counter(name for names in partition for name in names)
    for k, names in enumerate(partition):
        for name in names:
            if name not in by_name:
                close = difflib.get_close_matches(name, by_name, n=1, cutoff=0)
                advice = f"did you mean {close[0]!r}?" if close else "the model has no tables"
                raise PlanError(f"partition: expected a table of the model in list {k}, found {name!r}; {advice}")
    twice = [name for name, times in listed.items() if times > 1]
    if twice:
        lists = [k for k, names in enumerate(partition) for name in names if name == twice[0]]
        raise PlanError(f"partition: expected table {twice[0]} in one list, found it in lists {lists}; keep it in one")
    missing = [name for name in by_name if name not in listed]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise PlanError(
            f"partition: expected every table in a list, found none for {shown}; add them to a tower's list"
        )
    return [[by_name[name] for name in names] for names in partition]


def _notes(
    tables: Sequence[TableSpec], ranks: int, members: Sequence[Sequence[TableSpec]], owners: dict[str, int]
) -> tuple[str, ...]:
    """Say how even the plan is, and why it is not more even."""
    if not tables:
        return ("the model has no embedding tables",)
    loads, memories = _loads(tables)
    tower_of = {table.name: k for k, tower in enumerate(members) for table in tower}
    notes = []
    for what, bins, assignment in (
        ("tower", len(members), [tower_of[t.name] for t in tables]),
        ("rank", ranks, [owners[t.name] for t in tables]),
    ):
        load, memory = imbalance(loads, memories, assignment, bins)
        empty = bins - len(set(assignment))
        without = f"; {empty} of {bins} {what}s hold no table" if empty else ""
        notes.append(f"largest {what} load {load:.2f}x the mean, memory {memory:.2f}x{without}")
    for what, values in (("load", loads), ("memory", memories)):
        share = max(values) * ranks / sum(values)
        if share > 1.05:
            name = tables[values.index(max(values))].name
            notes.append(f"table {name} alone has {share:.2f}x the mean rank {what}: whole tables cannot be more even")
    return tuple(notes)
