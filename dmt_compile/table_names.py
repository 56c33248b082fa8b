"""The names of tables: which rows and columns of which parameter ``emb[100:150, 0:32]`` is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Range = tuple[int, int]  # half-open


class Origin(NamedTuple):
    """The parameter that holds a table, and the table's first row and column in it."""

    parameter: str
    first_row: int
    first_column: int


_PART = re.compile(r"(.+)\[(?:(\d+):(\d+)|:)(?:, (\d+):(\d+))?\]")


def parameter_of(table: str) -> Origin:
    """Return where a table is: ``emb[100:150]`` in ``emb`` from row 100 on, ``emb[:, 8:16]`` there from column 8 on."""
    part = _PART.fullmatch(table)
    return Origin(part[1], int(part[2] or 0), int(part[4] or 0)) if part else Origin(table, 0, 0)


def columns_of(table: str) -> Range | None:
    """Return the columns that a table's name says, as in ``emb[:, 8:16]``; ``None`` where it has all."""
    part = _PART.fullmatch(table)
    return None if part is None or part[4] is None else (int(part[4]), int(part[5]))


def rows_of(table: str) -> Range | None:
    """Return the rows of the parameter that a table's name says, as in ``emb[100:150]``; ``None`` where it has all."""
    part = _PART.fullmatch(table)
    return None if part is None or part[2] is None else (int(part[2]), int(part[3]))


def piece_name(table: str, rows: Range | None, columns: Range | None) -> str:
    """Return the name of a piece: ``emb[0:50]``, ``emb[:, 0:32]``, ``emb[0:50, 0:32]``; ``None``: all of the table's.

    Rows count from the first one of the parameter, those of a field too.
    """
    parameter, rows, columns = parameter_of(table).parameter, rows or rows_of(table), columns or columns_of(table)
    of_rows = ":" if rows is None else f"{rows[0]}:{rows[1]}"
    of_columns = "" if columns is None else f", {columns[0]}:{columns[1]}"
    return table if rows is None and columns is None else f"{parameter}[{of_rows}{of_columns}]"


def whole_among(tables: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return, for each of ``names`` that is one of ``tables`` or a piece of one, that table."""
    of_parameter: dict[str, list[tuple[str, Range | None]]] = {}
    for table in tables:
        of_parameter.setdefault(parameter_of(table).parameter, []).append((table, rows_of(table)))
    known = {table for found in of_parameter.values() for table, _ in found}
    out: dict[str, str] = {}
    for name in names:
        mine = rows_of(name)
        for table, rows in () if name in known else of_parameter.get(parameter_of(name).parameter, ()):
            if rows is None or (mine is not None and rows[0] <= mine[0] < mine[1] <= rows[1]):
                out[name] = table
                break
        if name in known:
            out[name] = name
    return out


def covers_once(pieces: Sequence[str], table: str, rows: int, dim: int) -> bool:
    """Tell whether pieces of a table cover it once: columns side by side, each with rows one after the other."""
    first = parameter_of(table).first_row
    of_columns: dict[Range, list[Range]] = {}
    for name in pieces:
        of_columns.setdefault(columns_of(name) or (0, dim), []).append(rows_of(name) or (first, first + rows))
    of_rows = [_adjoin(found, first, first + rows) for found in of_columns.values()]
    return all(of_rows) and _adjoin(list(of_columns), 0, dim)


def _adjoin(ranges: list[Range], first: int, end: int) -> bool:
    ordered = sorted(ranges)
    ends = [first, *(e for _, e in ordered)]
    return [f for f, _ in ordered] == ends[:-1] and ends[-1] == end and all(f < e for f, e in ordered)
