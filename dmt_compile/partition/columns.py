"""Split tables by columns, where whole ones cannot fill the towers or one outweighs a tower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from dmt_compile.errors import PlanError
from dmt_compile.plan import TableSpec, piece_name, whole_of

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
    mean_bytes = sum(table.memory_bytes for table in tables) / towers
    mean_moved = sum(table.output_bytes_per_sample for table in tables) / towers
    numbers = []
    for table in tables:
        wanted = max(
            table.memory_bytes / max(mean_bytes, 1),
            table.output_bytes_per_sample / max(mean_moved, 1),
            table.memory_bytes / (memory_bytes or math.inf),
        )
        numbers.append(min(max(1, math.ceil(wanted - 1e-9)), _most(table)))
    while sum(numbers) < towers:
        widest = max(range(len(tables)), key=lambda i: (tables[i].dim / numbers[i], -i), default=None)
        if widest is None or numbers[widest] >= _most(tables[widest]):
            break
        numbers[widest] += 1
    return [piece for table, number in zip(tables, numbers, strict=True) for piece in _pieces(table, number)]


def split_as_named(tables: Sequence[TableSpec], names: Iterable[str]) -> list[TableSpec]:
    """Split the tables of which ``names`` has pieces into those.

    Raises:
        PlanError: the pieces of a table do not cover its columns once.
    """
    columns: dict[str, list[tuple[int, int]]] = {}
    for whole, piece in map(whole_of, names):
        if piece is not None:
            columns.setdefault(whole, []).append(piece)
    out: list[TableSpec] = []
    for table in tables:
        found = sorted(columns.get(table.name, [(0, table.dim)]))
        ends = [0, *(end for _, end in found)]
        if [first for first, _ in found] != ends[:-1] or ends[-1] != table.dim or min(e - f for f, e in found) < 1:
            raise PlanError(
                f"partition: expected pieces that cover the {table.dim} columns of {table.name} once, found {found}"
            )
        out += _named(table, found) if table.name in columns else [table]
    return out


def _most(table: TableSpec) -> int:
    return max(1, table.dim // QUANTUM)


def _pieces(table: TableSpec, number: int) -> list[TableSpec]:
    if number == 1:
        return [table]
    quanta = table.dim // QUANTUM
    ends = [quanta * k // number * QUANTUM for k in range(number)] + [table.dim]
    return _named(table, list(pairwise(ends)))


def _named(table: TableSpec, columns: Sequence[tuple[int, int]]) -> list[TableSpec]:
    return [replace(table, name=piece_name(table.name, piece), dim=piece[1] - piece[0]) for piece in columns]
