"""Measurements as lines of JSON, one for each program, rate and alternation: a broken run goes on where it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Where a measurement belongs."""

    topology: str
    rate: str
    program: str
    alternation: int


@dataclass
class Measurement:
    """What one program did in one alternation; per step, and where it says so per host.

    Args:
        step_s: seconds of each step, the mean over ranks.
        work_s: seconds that a rank's main thread worked, the mean over ranks.
        waited_s: seconds in collectives by name, the mean over ranks.
        sent_bytes: over each host's uplink, by the kernel's counter.
        ledger_bytes: to other hosts by collective, by the program's own account, the mean over hosts; empty where it
            keeps none.
        predicted_bytes: computed beforehand; ``None`` where nothing is known.
    """

    cell: Cell
    step_s: list[float]
    work_s: float
    waited_s: dict[str, float]
    sent_bytes: list[float]
    ledger_bytes: dict[str, float] = field(default_factory=dict)
    predicted_bytes: dict[str, float] | None = None

    @property
    def median_s(self) -> float:
        """The median step."""
        return statistics.median(self.step_s)


class Results:
    """A file of results of one setup; lines of other setups stay in it and are not read.

    Args:
        path: of the file, which need not exist.
        setup: everything that decides what a step does; part of every line.
    """

    def __init__(self, path: Path, setup: dict[str, Any]) -> None:
        self.path = path
        self.setup: dict[str, Any] = json.loads(json.dumps(setup))
        self.measurements: dict[Cell, Measurement] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            if record.pop("setup") == self.setup:
                cell = Cell(**record.pop("cell"))
                self.measurements[cell] = Measurement(cell, **record)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, in the file too."""
        self.measurements[measurement.cell] = measurement
        record = {"cell": vars(measurement.cell), **{k: v for k, v in vars(measurement).items() if k != "cell"}}
        with self.path.open("a") as file:
            file.write(json.dumps({"setup": self.setup, **record}) + "\n")

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells that have no measurement yet, in their order."""
        return [cell for cell in cells if cell not in self.measurements]

    def of(self, topology: str, rate: str) -> dict[str, list[Measurement]]:
        """Return the measurements of a topology and rate by program."""
        found: dict[str, list[Measurement]] = {}
        for cell, measurement in self.measurements.items():
            if (cell.topology, cell.rate) == (topology, rate):
                found.setdefault(cell.program, []).append(measurement)
        return found


def cells(topology: str, rates: Sequence[str], programs: Sequence[str], alternations: int) -> list[Cell]:
    """Return what to measure in a topology, in order: at each rate all programs in turn, then all of them again."""
    return [
        Cell(topology, rate, program, alternation)
        for rate in rates
        for alternation in range(alternations)
        for program in programs
    ]


def typical_s(measurements: Sequence[Measurement]) -> float:
    """Return the median over alternations of the median step."""
    return statistics.median(measurement.median_s for measurement in measurements)


def speedup(program: Sequence[Measurement], reference: Sequence[Measurement]) -> float | None:
    """Return how many times as fast a program is: the median over the alternations that both were measured in."""
    theirs = {measurement.cell.alternation: measurement.median_s for measurement in reference}
    ratios = [theirs[m.cell.alternation] / m.median_s for m in program if m.cell.alternation in theirs]
    return statistics.median(ratios) if ratios else None


def fastest(found: dict[str, list[Measurement]], names: Iterable[str]) -> str | None:
    """Return the fastest of some programs, among those measured."""
    return min((name for name in names if name in found), key=lambda name: typical_s(found[name]), default=None)
