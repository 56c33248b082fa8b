"""A plan as plain-text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import chain

from rich.box import ASCII_DOUBLE_HEAD
from rich.console import Console
from rich.table import Table

from dmt_compile.plan import TableSpec, TowerPlan

WIDTH = 110
# Longer tables show their first and last lines only.
MAX_LINES, FIRST_LINES, LAST_LINES = 40, 20, 5

Row = tuple[str, ...]


def plan_text(plan: TowerPlan) -> str:
    """Return a plan as ASCII text of at most 110 columns.

    First the towers, then what each rank owns, then where each table is; a part of more than 40 lines is abbreviated.
    Memory is that of weights alone, load the bytes that one sample's ids and embeddings take.
    """
    topology = plan.topology
    head = (
        f"Tower plan: {_count(len(plan.tables), 'table')} in {_count(len(plan.towers), 'tower')}, "
        f"{_count(topology.hosts, 'host')} x {_count(topology.local_ranks, 'rank')}, partition {plan.partition}"
    )
    parts = [
        text_table(("tower", "hosts"), ("tables", "output width", "memory"), _tower_rows(plan)),
        text_table(("rank", "host"), ("tables", "memory", "load per sample"), _rank_rows(plan)),
        text_table(("table",), ("rows", "dim", "memory"), _table_rows(plan), ("tower", "ranks")),
    ]
    return "\n\n".join(["\n".join([head, *(f"- {note}" for note in plan.notes)]), *parts])


def _tower_rows(plan: TowerPlan) -> list[Row]:
    specs = {table.name: table for table in plan.tables}
    return [
        (
            tower.name,
            ", ".join(map(str, tower.hosts)),
            str(len(tower.tables)),
            str(tower.output_width),
            _size(sum(specs[name].memory_bytes for name in tower.tables)),
        )
        for tower in plan.towers
    ]


def _rank_rows(plan: TowerPlan) -> list[Row]:
    world_size = plan.topology.world_size
    tables, memory, load = [0] * world_size, [0] * world_size, [0.0] * world_size
    for table in plan.tables:
        for shard in plan.placements[table.name]:
            columns = shard.columns[1] - shard.columns[0]
            tables[shard.rank] += 1
            memory[shard.rank] += (shard.rows[1] - shard.rows[0]) * columns * table.element_bytes
            load[shard.rank] += table.output_bytes_per_sample * columns / table.dim + table.id_bytes_per_sample
    return [
        (str(rank), str(plan.topology.host_of(rank)), str(tables[rank]), _size(memory[rank]), _size(load[rank]))
        for rank in range(world_size)
    ]


def _table_rows(plan: TowerPlan) -> list[Row]:
    tower_of = {name: tower.name for tower in plan.towers for name in tower.tables}

    def row(table: TableSpec) -> Row:
        ranks = ", ".join(str(shard.rank) for shard in plan.placements[table.name])
        return table.name, str(table.rows), str(table.dim), _size(table.memory_bytes), tower_of[table.name], ranks

    return [row(table) for table in plan.tables]


def text_table(texts: Sequence[str], numbers: Sequence[str], rows: Sequence[Row], more: Sequence[str] = ()) -> str:
    """Draw one table; columns ``numbers`` are aligned to the right."""
    table = Table(box=ASCII_DOUBLE_HEAD)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in more:
        table.add_column(name, overflow="fold")
    hidden = len(rows) - FIRST_LINES - LAST_LINES
    shown: Iterable[Row] = rows
    if len(rows) > MAX_LINES:
        shown = chain(rows[:FIRST_LINES], [(f"... {hidden} more",)], rows[-LAST_LINES:])
    for row in shown:
        table.add_row(*row)
    console = plain_console(WIDTH)
    with console.capture() as capture:
        console.print(table)
    return stripped(capture.get())


def plain_console(width: int) -> Console:
    """Return a console for text alone: names may hold brackets and colons, which rich reads as markup and emoji."""
    return Console(
        file=StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        markup=False,
        emoji=False,
        highlight=False,
    )


def stripped(text: str) -> str:
    """Return what a console captured without trailing blanks."""
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _size(number: float) -> str:
    """Write a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
