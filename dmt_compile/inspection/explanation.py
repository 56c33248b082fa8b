"""Writes an explanation as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.box import ASCII_DOUBLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from dmt_compile.api import Explanation


_NOTED = {
    "insert_tower_modules": "Tower Modules, and the layers that they give another size",
    "fuse_optimizers": "Optimizers that lookups step themselves",
    "select_kernels": "Kernels, and what speaks against others",
}


def explanation_text(explanation: Explanation, width: int = 110) -> str:
    """Return what was found, the plan, the bytes on each link and the passes, as plain text."""
    # Source lines hold brackets and colons, which rich would read as markup and emoji.
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    found, unmatched = explanation.tables, explanation.unmatched
    console.print(f"Found {len(found)} embedding tables; {len(unmatched)} lookups stay flat.")
    if explanation.interaction is None:
        console.print("Interaction: not recognised; SPTT needs the lookups alone.")
    else:
        dense = " and one dense vector" if explanation.interaction.dense else ""
        count = len(explanation.interaction.features)
        console.print(f"Interaction: {explanation.interaction.kind} over {count} features{dense}.")
    for item in unmatched:
        console.print(f"  stays flat: {item.node}: {item.reason}\n    {item.source_line}", soft_wrap=True)
    console.print(str(explanation.plan))
    console.print(f"\nBytes per training step, summed over all ranks, local batch {explanation.batch_size}")
    console.print(_links(explanation))
    for record in explanation.passes:
        if record.name in _NOTED and record.report.notes:
            console.print(f"\n{_NOTED[record.name]}")
            for note in record.report.notes:
                console.print(f"  {note}", soft_wrap=True)
    console.print("\nPasses, in order")
    console.print(_passes(explanation))
    console.print(f"Effect on numbers: {explanation.effect.name} ({explanation.effect.explain()}).")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _links(explanation: Explanation) -> RichTable:
    table = RichTable(box=ASCII_DOUBLE_HEAD)
    for column in ("exchange", "inside hosts", "between hosts"):
        table.add_column(column, justify="left" if column == "exchange" else "right")
    for name, links in explanation.bytes_per_link.items():
        table.add_row(name, f"{links['intra']:,}", f"{links['cross']:,}")
    return table


def _passes(explanation: Explanation) -> RichTable:
    table = RichTable(box=ASCII_DOUBLE_HEAD)
    for column in ("pass", "effect", "matched", "left alone"):
        table.add_column(column)
    for record in explanation.passes:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in record.report.skipped[:3])
        more = len(record.report.skipped) - 3
        effect = record.effect.name if record.report.changed else "-"
        table.add_row(
            record.name, effect, str(record.report.matched), reasons + (f" ... {more} more" if more > 0 else "")
        )
    return table
