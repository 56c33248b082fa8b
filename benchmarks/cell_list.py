"""The cells of the kernel benchmark by name: those of every run, most telling first, and those of the long sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product

from dense_cells import Cross, Dot
from kernel_cells import Cell
from lookup_cells import LookupBackward, LookupForward
from lookup_data import Lookups
from pack_cells import Pack
from step_cells import TableStep, UpdateRows

HEADLINE = Lookups()
POWER = replace(HEADLINE, law="power")
MANY = Lookups(tables=1000, rows=10_000, width=64, pooling=5, bags=4096)

# The largest, of the headline's tables, takes 13 GB, its fp64 checks and outputs less; FBGEMM copies the tables.
CELLS: tuple[Cell, ...] = (
    LookupForward(HEADLINE),
    LookupBackward(HEADLINE),
    TableStep(HEADLINE),
    Dot(),
    Dot(backward=True),
    Cross(),
    Cross(backward=True),
    Pack("int8"),
    Pack("int8", back=True),
    LookupForward(POWER),
    LookupBackward(POWER),
    TableStep(POWER),
    UpdateRows(),
    LookupForward(replace(HEADLINE, dtype="bf16")),
    LookupForward(MANY),
    LookupBackward(MANY),
    LookupForward(Lookups(tables=100, width=16, pooling=1, bags=65_536)),
    LookupForward(Lookups(tables=26, rows=500_000, width=512, bags=4096, dtype="bf16")),
    LookupForward(Lookups(tables=1, rows=10_000_000, bags=65_536)),
    LookupForward(Lookups(tables=26, rows=100_000, width=32, pooling=100, bags=1024)),
    Dot(unit="bf16"),
    Dot(unit="bf16", backward=True),
    Dot(unit="fp32"),
    Dot(vectors=100, samples=8192, unit="bf16"),
    Dot(vectors=100, samples=8192, unit="bf16", backward=True),
    Dot(vectors=512, width=64, samples=2048, unit="bf16"),
    Dot(vectors=512, width=64, samples=2048, unit="bf16", backward=True),
    Cross(dtype="bf16"),
    Cross(dtype="bf16", backward=True),
    Pack("bfloat16"),
    Pack("float8"),
    Pack("float8", dtype="bf16", back=True),
)

MOST_BYTES = 20 << 30  # of the tables of a cell of the sweep, for FBGEMM's copy and the checks to fit as well


def _sweep() -> list[Cell]:
    """Return every combination of sizes that fits, each once."""
    cells: list[Cell] = []
    counts, widths, poolings, bags = (1, 26, 100, 1000), (16, 64, 128, 512), (1, 10, 100), (1024, 16_384, 65_536)
    for tables, rows, width, pooling, count, dtype, law in product(
        counts, (10_000, 1_000_000, 10_000_000), widths, poolings, bags, ("fp32", "bf16"), ("uniform", "power")
    ):
        size = Lookups(tables, rows, width, pooling, count, dtype, law)
        row = width * size.element_bytes
        # Per id the checks hold eight bytes an element of one table, sparse gradients a whole row of all.
        if tables * rows * row <= MOST_BYTES and tables * count * pooling * row <= MOST_BYTES:
            cells += [LookupForward(size), LookupBackward(size)]
            if dtype == "fp32":
                cells.append(TableStep(size))
    for vectors, width, samples, unit, backward in product(
        (8, 27, 100, 512), (16, 64, 128), (1024, 16_384), ("fp32", "tf32", "bf16"), (False, True)
    ):
        if samples * vectors**2 * 8 <= MOST_BYTES:
            cells.append(Dot(vectors, width, samples, unit, backward))
    cells += [
        Cross(w, b, d, back) for w, b, d, back in product((512, 3456), (1024, 65_536), ("fp32", "bf16"), (False, True))
    ]
    cells += [Pack(f, 425_984, w, d, back) for f, w, d, back in product(
        ("bfloat16", "float16", "float8", "int8"), (16, 128, 512), ("fp32", "bf16"), (False, True)
    )]  # fmt: skip
    cells += [UpdateRows(rows, width, "fp32") for rows, width in product((10_000, 2_000_000), (16, 64, 128))]
    return cells


def select(patterns: Sequence[str], sweep: bool) -> list[Cell]:
    """Return the cells that some pattern matches, each once.

    Raises:
        ValueError: a pattern matches none.
    """
    cells = {cell.name: cell for cell in (*CELLS, *(_sweep() if sweep else ()))}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in cells):
            raise ValueError(f"expected cells that match {pattern!r}, found none; see --list")
    return [cell for name, cell in cells.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
