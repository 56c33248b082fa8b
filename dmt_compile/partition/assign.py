"""Make a tower plan: tables to towers, and tables or pieces of them to the ranks of their tower."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.partition.affinity import group_by_interaction, targets
from dmt_compile.partition.balance import balance, imbalance
from dmt_compile.partition.interaction import InteractionMatrix, inside_share
from dmt_compile.partition.splits import split_as_named, split_by_columns, split_in_tower
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.topology import Topology

# With more tables the quicker searches come close to an even plan, and every tower would run its own integer program.
EXACT_MAX_TABLES = 200
# What a tower may hold of load, memory and rows read, relative to the mean, wherever that is possible.
MAX_IMBALANCE = 1.1
STRATEGIES = ("coherent", "diverse")


def make_plan(
    tables: Sequence[TableSpec],
    topology: Topology,
    *,
    towers: int | str = "host",
    partition: str | Sequence[Sequence[str]] = "balanced",
    interactions: InteractionMatrix | None = None,
    max_imbalance: float | None = None,
    memory_bytes: int | None = None,
    split_columns: bool = False,
    split_rows: bool = False,
    across_towers: bool = True,
    seed: int = 0,
) -> TowerPlan:
    """Assign every table to one tower and one rank; the same arguments give the same plan.

    Args:
        tables: the model's tables, in the order of the model; may be empty.
        topology: hosts and ranks.
        towers: ``"host"`` (one per host), a multiple of the hosts (several towers share all ranks of a host), or a
            divisor of them (a tower spans neighbouring hosts). Not read where ``partition`` is explicit.
        partition: ``"balanced"`` evens out bytes moved and memory over towers, then over ranks; ``"strided"`` puts
            table ``i`` into tower ``i % towers`` and a tower's tables on its ranks in turn; ``"coherent"`` puts tables
            that interact into one tower, ``"diverse"`` into different ones, within ``max_imbalance``; a list of table
            names per tower is taken as it is. All but ``"strided"`` even out a tower's tables over its ranks.
        interactions: of the tables, for ``"coherent"`` and ``"diverse"``.
        max_imbalance: the most bytes moved, weights and rows read of a ``"coherent"`` or ``"diverse"`` tower, relative
            to the mean tower. ``None`` is 1.1, where tables are too uneven for that 1.1 times the least that they
            allow; a number must be kept.
        memory_bytes: the most bytes of weights on a rank.
        split_columns: split tables that outweigh a tower or a rank, and others while there are fewer than towers.
        split_rows: split tables that outweigh a rank of their tower, over the tower's ranks; with ``split_columns``
            as well by rows or by columns, whichever costs less. An explicit partition may name pieces, such as
            ``emb.3[:, 0:32]`` and ``emb.3[0:500]``, without either.
        across_towers: pieces of a table's columns may go to different towers, which Tower Modules do not take.
        seed: of the search for ``"coherent"`` and ``"diverse"`` towers.

    Returns:
        A plan with one shard per table, or per piece of a table. A tower or a rank may hold no table.

    Raises:
        ConfigError: the number of towers does not fit the number of hosts, or interactions are missing.
        PlanError: an explicit partition names an unknown table, omits one, or repeats one; a bound cannot be kept.

    Source: section 3 of the DMT paper; ``"strided"`` is its naive assignment.
    """
    explicit, exact = not isinstance(partition, str), len(tables) <= EXACT_MAX_TABLES
    number = len(partition) if explicit else topology.hosts if towers == "host" else int(towers)
    _check_number(number, topology.hosts)
    if not isinstance(partition, str):
        tables = split_as_named(tables, (name for names in partition for name in names))
    elif split_columns and across_towers:
        tables = split_by_columns(tables, number, None if split_rows else memory_bytes)
    in_tower = split_rows or (split_columns and not across_towers)  # once towers have their tables
    groups = min(number, topology.hosts)
    hosts_per_group = topology.hosts // groups
    ranks = topology.grouped(hosts_per_group).local_ranks
    if memory_bytes is not None:
        _check_memory(tables, topology, memory_bytes, ranks if in_tower else 1)
    why: tuple[str, ...] = ()
    if isinstance(partition, str):
        if partition in STRATEGIES:
            bound = Bound(max_imbalance, None if memory_bytes is None else memory_bytes * topology.world_size // number)
            bins, why = _interacting(tables, number, partition, interactions, bound, seed, exact)
        else:
            bins = _strided(len(tables), number) if partition == "strided" else _balanced(tables, number, exact)
        members = [[table for table, bin_ in zip(tables, bins, strict=True) if bin_ == k] for k in range(number)]
    else:
        members = _explicit(tables, partition)
    split: dict[str, list[TableSpec]] = {}
    owners: dict[str, int] = {}
    for group in range(groups):
        towers_here = range(group * number // groups, (group + 1) * number // groups)
        if in_tower:
            whole = [table for k in towers_here for table in members[k]]
            split |= split_in_tower(whole, topology, ranks, memory_bytes, split_rows, split_columns)
            for k in towers_here:
                members[k] = [piece for table in members[k] for piece in split.get(table.name, [table])]
        here = [members[k] for k in towers_here]
        if partition == "strided":
            placed = [pair for tower in here for pair in zip(tower, _strided(len(tower), ranks), strict=True)]
        else:
            together = [table for tower in here for table in tower]
            placed = list(zip(together, _on_ranks(together, ranks, exact, memory_bytes), strict=True))
        owners |= {table.name: group * ranks + local_rank for table, local_rank in placed}
    tables = [piece for table in tables for piece in split.get(table.name, [table])]
    if memory_bytes is not None:
        _check_ranks(tables, owners, topology.world_size, memory_bytes)
    return TowerPlan(
        topology=topology,
        tables=tuple(tables),
        towers=tuple(_tower(k, members[k], k * groups // number, hosts_per_group) for k in range(number)),
        placements={t.name: (Shard(owners[t.name], (0, t.rows), (0, t.dim)),) for t in tables},
        partition="explicit" if explicit else str(partition),
        notes=(*why, *_split_notes(tables, owners), *_notes(tables, topology.world_size, members, owners)),
    )


def _tower(k: int, tables: Sequence[TableSpec], group: int, hosts_per_group: int) -> Tower:
    return Tower(
        name=f"tower{k}",
        tables=tuple(table.name for table in tables),
        hosts=tuple(range(group * hosts_per_group, (group + 1) * hosts_per_group)),
        output_width=sum(table.features * table.dim for table in {table.added: table for table in tables}.values()),
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


def _loads(tables: Sequence[TableSpec]) -> list[list[float]]:
    """Bytes that one sample moves for each table, and bytes of its weights."""
    moved = [table.output_bytes_per_sample + table.id_bytes_per_sample for table in tables]
    return [moved, [float(table.memory_bytes) for table in tables]]


def _balanced(tables: Sequence[TableSpec], bins: int, exact: bool) -> list[int]:
    return balance(_loads(tables), bins, exact)


@dataclass(frozen=True)
class Bound:
    """What a tower may hold: the user's imbalance, ``None`` for what can be reached, and bytes of weights."""

    imbalance: float | None
    memory_bytes: int | None


def _interacting(
    tables: Sequence[TableSpec],
    number: int,
    strategy: str,
    interactions: InteractionMatrix | None,
    bound: Bound,
    seed: int,
    exact: bool,
) -> tuple[list[int], tuple[str, ...]]:
    """Return the tower of each table, and why it is there."""
    if interactions is None:
        raise ConfigError(
            f"partition: expected 'interactions' for {strategy!r} towers, found none; measure them on a trained model "
            "with dmt_compile.interactions(model, batches)"
        )
    if not tables:
        return [], ()
    matrix = interactions.of_tables([table.whole or table.name for table in tables])
    moved, memory = _loads(tables)
    resources = [moved, memory, [table.features * table.bags * table.pooling for table in tables]]
    limits = targets(resources, number, bound.imbalance or MAX_IMBALANCE)
    if bound.memory_bytes is not None:
        limits[1] = min(limits[1], bound.memory_bytes * number / max(sum(memory), 1))
    start = balance(resources, number, exact)
    bins = group_by_interaction(matrix, resources, number, strategy=strategy, bounds=limits, start=start, seed=seed)
    peaks = imbalance(resources, bins, number)
    _check_towers(tables, resources, peaks, number, bound)
    share, strided = inside_share(matrix, bins), inside_share(matrix, _strided(len(tables), number))
    measured = f"{interactions.signal} interaction" + (
        f" over {interactions.samples:,} samples" if interactions.samples else ""
    )
    limit = bound.imbalance or MAX_IMBALANCE
    over = []
    for what, needs, peak in zip(_RESOURCES, resources, peaks, strict=True):
        if peak > limit + 1e-6:
            alone = max(needs) * number / sum(needs)
            largest = f"table {tables[needs.index(max(needs))].name} alone has {alone:.2f}x the mean tower"
            whole = f"whole tables do not share out evenly, {len(tables)} in {number} towers"
            over.append(f"{what} could not be within {limit:.2f}x: {largest if alone > limit else whole}")
    return bins, (
        f"{strategy} towers by {measured}: {share:.1%} of it is inside towers, {strided:.1%} with strided ones",
        f"largest tower against the mean one: bytes moved {peaks[0]:.2f}x, weights {peaks[1]:.2f}x, rows read "
        f"{peaks[2]:.2f}x; bound {limit:.2f}x",
        *over,
    )


_RESOURCES = ("bytes moved", "weights", "rows read")


def _check_towers(
    tables: Sequence[TableSpec],
    resources: Sequence[Sequence[float]],
    peaks: Sequence[float],
    number: int,
    bound: Bound,
) -> None:
    """Hold towers to the bounds that the user gave.

    Raises:
        PlanError: names the table that needs most, and the bound.
    """
    limits: list[tuple[int, float, str]] = []
    if bound.imbalance is not None:
        limits += [(r, bound.imbalance, f"max_imbalance {bound.imbalance}") for r in range(len(resources))]
    if bound.memory_bytes is not None:
        share = bound.memory_bytes * number / max(sum(resources[1]), 1)
        limits.append((1, share, f"memory_bytes ({bound.memory_bytes:,} bytes a tower)"))
    for r, limit, name in limits:
        if peaks[r] > limit * (1 + 1e-6):
            needs, mean = resources[r], sum(resources[r]) / number
            largest = max(range(len(needs)), key=needs.__getitem__)
            raise PlanError(
                f"partition: expected towers of at most {limit:.2f}x the mean {_RESOURCES[r]} for {name}, found "
                f"{peaks[r]:.2f}x at best; the largest table, {tables[largest].name}, alone takes "
                f"{needs[largest] / mean:.2f}x: raise the bound or take fewer towers"
            )


def _check_memory(tables: Sequence[TableSpec], topology: Topology, memory_bytes: int, pieces: int) -> None:
    """See that tables can fit ranks at all, in up to ``pieces`` each where they may be split by rows.

    Raises:
        PlanError: names the table that does not fit, or the sum.
    """
    for table in tables:
        share = table.memory_bytes / (pieces if table.splits != "none" else 1)
        if share > memory_bytes:
            raise PlanError(
                f"partition: expected tables of at most memory_bytes = {memory_bytes:,} bytes, found {table.name} of "
                f"{table.memory_bytes:,}; raise the bound or set split_columns or split_rows"
            )
    total = sum(table.memory_bytes for table in tables)
    if total > memory_bytes * topology.world_size:
        largest = max(tables, key=lambda table: table.memory_bytes)
        raise PlanError(
            f"partition: expected tables of {memory_bytes * topology.world_size:,} bytes in all for memory_bytes = "
            f"{memory_bytes:,} on {topology.world_size} ranks, found {total:,}, {largest.name} the largest; raise the "
            "bound or take more ranks"
        )


def _on_ranks(tables: Sequence[TableSpec], ranks: int, exact: bool, memory_bytes: int | None) -> list[int]:
    """Even tables out over the ranks of a tower; by memory alone where that is what keeps them to its bound."""
    bins = _balanced(tables, ranks, exact)
    memory = _loads(tables)[1]
    if memory_bytes is None or not tables:
        return bins
    fits = max(imbalance([memory], bins, ranks)) * sum(memory) / ranks <= memory_bytes
    return bins if fits else balance([memory], ranks, exact)


def _check_ranks(tables: Sequence[TableSpec], owners: dict[str, int], ranks: int, memory_bytes: int) -> None:
    """Hold ranks to their memory.

    Raises:
        PlanError: names the rank, its largest table and the bound.
    """
    for rank in range(ranks):
        mine = [table for table in tables if owners[table.name] == rank]
        total = sum(table.memory_bytes for table in mine)
        if total > memory_bytes:
            largest = max(mine, key=lambda table: table.memory_bytes)
            raise PlanError(
                f"partition: expected at most memory_bytes = {memory_bytes:,} bytes on each rank, found {total:,} on "
                f"rank {rank}, {largest.name} the largest table there; raise the bound or choose other towers"
            )


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


def _split_notes(tables: Sequence[TableSpec], owners: dict[str, int]) -> tuple[str, ...]:
    """Say which tables are in pieces, of what, and on which ranks."""
    pieces: dict[str, list[TableSpec]] = {}
    for table in tables:
        if table.whole:
            pieces.setdefault(table.whole, []).append(table)
    notes = []
    for whole, found in pieces.items():
        sums = Counter(piece.added for piece in found)
        columns, rows = len(sums), max(sums.values())
        ways = [f"{number} ranges of {what}" for number, what in ((columns, "columns"), (rows, "rows")) if number > 1]
        ranks = ", ".join(map(str, sorted({owners[piece.name] for piece in found})))
        notes.append(f"table {whole} is split into {' and '.join(ways) or 'one piece'}, on ranks {ranks}")
    more = [f"and {len(notes) - 5} more tables are split"] if len(notes) > 5 else []
    return (*notes[:5], *more)


def _notes(
    tables: Sequence[TableSpec], ranks: int, members: Sequence[Sequence[TableSpec]], owners: dict[str, int]
) -> tuple[str, ...]:
    """Say how even the plan is, and why it is not more even."""
    if not tables:
        return ("the model has no embedding tables",)
    loads, memories = resources = _loads(tables)
    tower_of = {table.name: k for k, tower in enumerate(members) for table in tower}
    notes = []
    for what, bins, assignment in (
        ("tower", len(members), [tower_of[t.name] for t in tables]),
        ("rank", ranks, [owners[t.name] for t in tables]),
    ):
        load, memory = imbalance(resources, assignment, bins)
        empty = bins - len(set(assignment))
        without = f"; {empty} of {bins} {what}s hold no table" if empty else ""
        notes.append(f"largest {what} load {load:.2f}x the mean, memory {memory:.2f}x{without}")
    for what, values in (("load", loads), ("memory", memories)):
        share = max(values) * ranks / sum(values)
        if share > 1.05:
            name = tables[values.index(max(values))].name
            notes.append(f"table {name} alone has {share:.2f}x the mean rank {what}: whole tables cannot be more even")
    return tuple(notes)
