"""The train-step benchmark's table, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEERS = ("eager", "inductor-rest", "inductor")
_COLUMNS = (
    *("model", "contestant", "step ms", "spread", "host ms", "GiB of a step"),
    *(f"{peer} / it" for peer in PEERS),
    *("error / allowed", "ready after s", "what ran, or why not"),
)
HEADER = ("| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS))


@dataclass(frozen=True)
class Result:
    """What became of a contestant.

    Args:
        model, name: which.
        error: relative to what is allowed; 0 for the first, which the others are held to.
        ready_s: until it was compiled and checked.
        step_s: median of the turns, a step; ``None`` where it was not timed.
        spread: of all turns, relative to the median.
        host_s: until a step was launched.
        peak_bytes: above what stands before a turn.
        note: why it has no time.
        ran: what dmt chose.
    """

    model: str
    name: str
    error: float | None = None
    ready_s: float | None = None
    step_s: float | None = None
    spread: float | None = None
    host_s: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    ran: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)


def lines(results: Sequence[Result]) -> list[str]:
    """Return a row for each contestant of a model; what was not measured is "-"."""
    times = {result.name: result.step_s for result in results}
    rows = []
    for result in results:
        ratios = [
            _number(peer / result.step_s if peer and result.step_s else None, ".2f")
            for peer in (times.get(name) for name in PEERS)
        ]
        cells = [
            result.model,
            result.name,
            _number(result.step_s and result.step_s * 1e3, ".2f"),
            _number(result.spread, ".1%"),
            _number(result.host_s and result.host_s * 1e3, ".2f"),
            _number(result.peak_bytes and result.peak_bytes / 2**30, ".2f"),
            *ratios,
            _number(result.error, ".2g"),
            _number(result.ready_s, ".0f"),
            result.note or result.ran,
        ]
        rows.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
