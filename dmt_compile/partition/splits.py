"""Split tables by columns over towers and ranks, and by rows over the ranks of a tower, where whole ones do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from dmt_compile.errors import PlanError
from dmt_compile.plan import TableSpec
from dmt_compile.table_names import Range, columns_of, covers_once, parameter_of, piece_name, rows_of, whole_among
from dmt_compile.topology import Topology

QUANTUM = 4  # columns; narrower pieces make rows of less than 16 bytes


def split_by_columns(tables: Sequence[TableSpec], towers: int, memory_bytes: int | None = None) -> list[TableSpec]:
    """Split the tables that a tower's share cannot hold, then the widest ones until every tower can have a piece.

    Args:
        tables: whole.
        towers: number of towers.
        memory_bytes: the most bytes of weights on a rank.

    Returns:
        Whole tables as they are, split ones as pieces ``emb.3[:, 0:32]``, in the order of the tables. Pieces of a table
        differ by at most one quantum of 4 columns.

    Cost: ids and bag lengths of a split table are sent once for each of its pieces.
    Source: section 6 of the DMT paper, which slices the tables of its internal model into columns of equal width.
    """
    numbers = [min(number, _most_columns(t)) for t, number in _wanted(tables, towers, memory_bytes, by_rows=False)]
    while sum(numbers) < towers:
        widest = max(range(len(tables)), key=lambda i: (tables[i].dim / numbers[i], -i), default=None)
        if widest is None or numbers[widest] >= _most_columns(tables[widest]):
            break
        numbers[widest] += 1
    return [piece for table, number in zip(tables, numbers, strict=True) for piece in _in_columns(table, number)]


def split_in_tower(
    tables: Sequence[TableSpec], topology: Topology, ranks: int, memory_bytes: int | None, rows: bool, columns: bool
) -> dict[str, list[TableSpec]]:
    """Split the tables of a tower group that outweigh one of its ranks, by rows or by columns, whichever costs less.

    Args:
        tables: of the group's towers, pieces of columns among them.
        topology: its bandwidths.
        ranks: of the group.
        memory_bytes: the most bytes of weights on a rank.
        rows: pieces of rows may be made.
        columns: pieces of columns may be made.

    Returns:
        The pieces of each table that is split, at most one a rank, by its name.

    Cost: :func:`seconds_in_rows` and :func:`seconds_in_columns` say what pieces cost, in seconds of one sample.
    """
    out: dict[str, list[TableSpec]] = {}
    pairs = zip(_wanted(tables, ranks, memory_bytes, True), _wanted(tables, ranks, memory_bytes, False), strict=True)
    for (table, in_rows), (_, in_columns) in pairs:
        ways: list[tuple[float, list[TableSpec]]] = []
        if rows and table.splits == "rows and columns" and (number := min(in_rows, ranks, table.rows)) > 1:
            ways.append((seconds_in_rows(table, number, topology), _in_rows(table, number)))
        if columns and (number := min(in_columns, ranks, _most_columns(table))) > 1:
            ways.append((seconds_in_columns(table, number, topology), _in_columns(table, number)))
        fitting = [way for way in ways if memory_bytes is None or max(p.memory_bytes for p in way[1]) <= memory_bytes]
        if ways:
            out[table.name] = min(fitting or ways, key=lambda way: way[0])[1]
    return out


def seconds_in_rows(table: TableSpec, number: int, topology: Topology) -> float:
    """Return what one sample costs in ``number`` pieces of rows: ids once, bag lengths and partial sums once a piece.

    ``(ids + number * lengths) / id link + 2 * number * embeddings / in-host link``; embeddings go forward and backward.
    """
    lengths = table.id_bytes * table.features * table.bags
    ids = table.id_bytes_per_sample - table.jagged * lengths
    partial = 2 * number * table.output_bytes_per_sample
    return (ids + number * lengths) / _id_link(topology) + partial / topology.intra_bytes_per_s


def seconds_in_columns(table: TableSpec, number: int, topology: Topology) -> float:
    """Return what one sample costs in ``number`` pieces of columns: ids and lengths once a piece, embeddings once.

    ``number * (ids + lengths) / id link + 2 * embeddings / in-host link``.
    """
    ids = number * table.id_bytes_per_sample
    return ids / _id_link(topology) + 2 * table.output_bytes_per_sample / topology.intra_bytes_per_s


def split_as_named(tables: Sequence[TableSpec], names: Iterable[str]) -> list[TableSpec]:
    """Split the tables of which ``names`` has pieces into those.

    Raises:
        PlanError: the pieces of a table do not cover it once.
    """
    found: dict[str, list[str]] = {}
    for name, whole in whole_among([table.name for table in tables], names).items():
        if name != whole:
            found.setdefault(whole, []).append(name)
    out: list[TableSpec] = []
    for table in tables:
        names = sorted(found.get(table.name, []), key=_place)
        if names and not covers_once(names, table.name, table.rows, table.dim):
            raise PlanError(
                f"partition: expected pieces that cover the {table.rows} rows and {table.dim} columns of {table.name} "
                f"once, found {names}"
            )
        out += [_piece(table, rows_of(name), columns_of(name)) for name in names] or [table]
    return out


def _place(name: str) -> tuple[int, int]:
    _, row, column = parameter_of(name)
    return column, row


def _wanted(
    tables: Sequence[TableSpec], bins: int, memory_bytes: int | None, by_rows: bool
) -> list[tuple[TableSpec, int]]:
    """Return for each table the pieces that keep each below the mean bin's weights, bytes moved and a rank's memory.

    Pieces share what is split alone: the bytes of embeddings where that is columns, of ids where it is rows.
    """
    mean_bytes = sum(table.memory_bytes for table in tables) / bins
    moved = [t.id_bytes_per_sample if by_rows else t.output_bytes_per_sample for t in tables]
    mean_moved = sum(moved) / bins
    out = []
    for table, own in zip(tables, moved, strict=True):
        shares = (
            table.memory_bytes / max(mean_bytes, 1),
            own / max(mean_moved, 1),
            table.memory_bytes / (memory_bytes or math.inf),
        )
        out.append((table, max(1, math.ceil(max(shares) - 1e-9)) if table.splits != "none" else 1))
    return out


def _id_link(topology: Topology) -> float:
    return topology.cross_bytes_per_s if topology.hosts > 1 else topology.intra_bytes_per_s


def _most_columns(table: TableSpec) -> int:
    return max(1, table.dim // QUANTUM) if table.splits != "none" else 1


def _in_columns(table: TableSpec, number: int) -> list[TableSpec]:
    """Cut a table, or a piece of rows or columns, into pieces of columns."""
    if number == 1:
        return [table]
    first, quanta = parameter_of(table.name).first_column, table.dim // QUANTUM
    ends = [first + quanta * k // number * QUANTUM for k in range(number)] + [first + table.dim]
    return [_piece(table, None, columns) for columns in pairwise(ends)]


def _in_rows(table: TableSpec, number: int) -> list[TableSpec]:
    first = parameter_of(table.name).first_row
    ends = [first + table.rows * k // number for k in range(number + 1)]
    return [_piece(table, rows, None) for rows in pairwise(ends)]


def _piece(table: TableSpec, rows: Range | None, columns: Range | None) -> TableSpec:
    """Return a piece as the planner sees it: of rows, it gets its share of the ids, and a length for every bag."""
    of_rows, dim = table, table.dim if columns is None else columns[1] - columns[0]
    if rows is not None:
        share = (rows[1] - rows[0]) / table.rows
        of_rows = replace(table, rows=rows[1] - rows[0], pooling=round(table.pooling * share, 3), jagged=1.0)
    return replace(of_rows, name=piece_name(table.name, rows, columns), dim=dim, whole=table.whole or table.name)
