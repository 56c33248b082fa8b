"""The kernel benchmark's table in Markdown, row by row, so that a run cut short leaves a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_timing import Ceilings, Timing
from kernel_cells import Cost


@dataclass(frozen=True)
class Measured:
    """What became of a cell.

    Args:
        name: of the cell.
        cost: ``None`` where its data could not be made.
        errors: contestant -> its error relative to what is allowed; those above 1 are not timed.
        timings: contestant -> its timing; empty on a machine without a GPU.
        notes: contestant, or ``"cell"`` -> why it has no timing.
    """

    name: str
    cost: Cost | None
    errors: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, Timing] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a number was wrong or something broke, beyond contestants that cannot take part."""
        return any(note.startswith("FAILED") for note in self.notes.values())

    def as_json(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """Return everything, with the card's ceilings."""
        return asdict(self) | {"ceilings": None if ceilings is None else asdict(ceilings)}


def header(contestants: Sequence[str]) -> list[str]:
    """Return the first two lines of the table."""
    cells = ["cell", "MB", "GFLOP", "bound", "floor ms", *(f"{name} ms" for name in contestants), "dmt spread"]
    cells += ["dmt host ms", "floor / dmt", "same, uncached", *(f"{name} / dmt" for name in contestants[:-1])]
    cells += ["error / allowed", "notes"]
    return [_line(cells), "|" + "---|" * len(cells)]


def row(measured: Measured, contestants: Sequence[str], ceilings: Ceilings | None) -> str:
    """Return the row of a cell; ``contestants`` end in ``"dmt"``.

    What was not timed is "-". "floor / dmt" is the share of the measured bandwidth, or of the measured matrix rate
    where that binds; "same, uncached" counts a row of a table as often as an id names it, so it may be above 1.
    """
    cost, timings = measured.cost, measured.timings
    dmt = timings.get("dmt")
    floor = bound = uncached = None
    if cost is not None and ceilings is not None:
        floor, bound = ceilings.floor_s(cost.moved_bytes, cost.flops, cost.unit)
        if cost.uncached_bytes is not None:
            uncached = cost.uncached_bytes / ceilings.bytes_per_s
    cells = [
        measured.name,
        _number(None if cost is None else cost.moved_bytes / 1e6, ".1f"),
        _number(None if cost is None else cost.flops / 1e9, ".2f"),
        bound or "-",
        _number(floor and floor * 1e3, ".3f"),
        *(_number(timings[name].median_s * 1e3 if name in timings else None, ".3f") for name in contestants),
        _number(dmt and dmt.spread, ".1%"),
        _number(dmt and dmt.host_s * 1e3, ".3f"),
        _number(floor / dmt.median_s if dmt and floor else None, ".2f"),
        _number(uncached / dmt.median_s if dmt and uncached else None, ".2f"),
        *(
            _number(timings[name].median_s / dmt.median_s if dmt and name in timings else None, ".2f")
            for name in contestants[:-1]
        ),
        _number(measured.errors.get("dmt"), ".2g"),
        "; ".join(f"{name}: {note}" for name, note in measured.notes.items()),
    ]
    return _line(cells)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
