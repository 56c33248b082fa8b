"""The tables that a run prints: step times beside TorchRec's best, where the time goes, and bytes across hosts."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from cluster.programs import PROGRAMS
from cluster.results import Measurement, Results, fastest, speedup, typical_s

MB = 1e6
MS = 1e3


def references(found: dict[str, list[Measurement]]) -> tuple[str | None, str | None]:
    """Return TorchRec's fastest program in full precision, and its fastest with fp16 on the wire."""
    peers = [program for program in PROGRAMS.values() if program.family == "torchrec"]
    return (
        fastest(found, (program.name for program in peers if program.lossless)),
        fastest(found, (program.name for program in peers if not program.lossless)),
    )


def print_report(results: Results, topologies: list[str], rates: list[str], console: Console) -> None:
    """Print what is known of each topology and rate."""
    for topology in topologies:
        for rate in rates:
            found = results.of(topology, rate)
            if found:
                console.print(step_table(found, f"{topology}, {rate}"))
                console.print(byte_table(found, f"{topology}, {rate}: MB over each host's uplink in a step"))


def step_table(found: dict[str, list[Measurement]], title: str) -> Table:
    """Return the table of step times."""
    best = references(found)
    table = Table(title=title, caption=f"best of TorchRec: lossless {best[0]}, fp16 {best[1]}", title_justify="left")
    table.add_column("program")
    for heading in ("ms", "slowest - fastest", "x best lossless", "x best fp16", "working", "waiting"):
        table.add_column(heading, justify="right")
    table.add_column("waiting for, ms")
    for name, measured in found.items():
        medians = [each.median_s * MS for each in measured]
        waits = {label: s for label, s in _mean([each.waited_s for each in measured]).items() if s * MS >= 0.5}
        ratios = [None if each is None else speedup(measured, found[each]) for each in best]
        table.add_row(
            name,
            f"{typical_s(measured) * MS:.1f}",
            f"{max(medians):.0f} - {min(medians):.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{statistics.mean(each.work_s for each in measured) * MS:.0f}",
            f"{sum(waits.values()) * MS:.0f}",
            ", ".join(f"{label} {s * MS:.0f}" for label, s in sorted(waits.items(), key=lambda item: -item[1])),
        )
    return table


def byte_table(found: dict[str, list[Measurement]], title: str) -> Table:
    """Return the table of bytes: the kernel's counters, the program's own ledger, and the prediction."""
    table = Table(title=title, title_justify="left")
    table.add_column("program")
    for heading in ("kernel", "ledger", "kernel / ledger", "predicted", "kernel / predicted"):
        table.add_column(heading, justify="right")
    table.add_column("ledger by collective")
    for name, measured in found.items():
        sent = statistics.mean(statistics.mean(each.sent_bytes) for each in measured) / MB
        ledger = {label: sent_bytes / MB for label, sent_bytes in _mean([m.ledger_bytes for m in measured]).items()}
        total, predicted = sum(ledger.values()), predicted_bytes(measured[0])
        table.add_row(
            name,
            f"{sent:.3f}",
            f"{total:.3f}" if ledger else "",
            f"{sent / total:.3f}" if total else "",
            "" if predicted is None else f"{predicted / MB:.3f}",
            f"{sent / (predicted / MB):.3f}" if predicted else "",
            ", ".join(f"{label} {size:.3f}" for label, size in sorted(ledger.items(), key=lambda item: -item[1])),
        )
    return table


def predicted_bytes(measurement: Measurement) -> float | None:
    """Return all that a host was predicted to send in a step.

    How the dense gradients of a compiled program travel is decided in the program: its ledger's dense part, which is
    their bytes by construction, completes the prediction of its exchanges.
    """
    known = measurement.predicted_bytes
    if known is None:
        return None
    dense = known.get("dense", dense_ledger_bytes(measurement.ledger_bytes))
    return known["embeddings"] + dense


def dense_ledger_bytes(ledger: dict[str, float]) -> float:
    """Return the bytes of gradient averaging in a program's ledger."""
    return sum(size for label, size in ledger.items() if label.startswith(("dense_gradients", "tower_gradients")))


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each key."""
    keys = {key for part in parts for key in part}
    return {key: statistics.mean(part.get(key, 0.0) for part in parts) for key in keys}
