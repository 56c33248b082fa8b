"""One session on one topology: build all programs in the same ranks, check them, then measure them in turn.

Programs share processes, links and batches, and take turns, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.launch import Answer, Ranks, ranks
from cluster.network import UNLIMITED, ClusterError, Network, network
from cluster.prediction import predict
from cluster.programs import Program, select
from cluster.results import Cell, Measurement, Results, cells
from cluster.workload import Workload
from dmt_compile.topology import Topology

START_S = 300.0  # to import everything and to meet
BUILD_S = 900.0  # to build or to compile; ranks share the machine's cores
STEP_S = 30.0  # a step that takes longer hangs


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly.

    Args:
        workload: sizes of model and batches.
        rates: of the links between hosts, in ``tc``'s notation, or ``unlimited``.
        programs: names; a trailing ``*`` takes all that begin so.
        steps: measured in each alternation.
        warmup: steps before them, dropped.
        alternations: how often all programs take their turn.
        checked_steps: from the common start, on which outputs and losses are compared.
        defaults: options by module, from the command line.
    """

    workload: Workload
    rates: Sequence[str]
    programs: Sequence[str]
    steps: int = 20
    warmup: int = 2
    alternations: int = 3
    checked_steps: int = 3
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def setup(self) -> dict[str, Any]:
        """Return what a measurement depends on, beside its cell."""
        return {"workload": asdict(self.workload), "steps": self.steps, "defaults": self.defaults}


def measure_topology(layout: str, settings: Settings, results: Results, say: Callable[[str], None]) -> None:
    """Measure what ``results`` lacks of a topology.

    Raises:
        ClusterError: a rank failed, or a program's numbers are not those of the program it must equal.
    """
    names = [program.name for program in select(list(settings.programs))]
    wanted = results.missing(cells(layout, settings.rates, names, settings.alternations))
    if not wanted:
        return
    needed = select(list(dict.fromkeys(cell.program for cell in wanted)))
    topology = Topology.parse(layout)
    with network(topology.hosts) as net, ranks(net, topology.local_ranks) as group:
        workload = asdict(settings.workload)
        start = {"do": "start", "workload": workload, "defaults": settings.defaults, "timeout_s": BUILD_S}
        group.ask(start, START_S)
        ready = {program.name for program in needed if build(program, group, settings, say)}
        predicted = {program.name: predict(program, settings.workload, layout) for program in needed}
        rate = UNLIMITED  # as long as programs were built
        for cell in wanted:
            if cell.program not in ready:
                continue
            if cell.rate != rate:
                rate = cell.rate
                net.set_rate(rate)
            measurement = measure(cell, net, group, settings, predicted[cell.program])
            results.add(measurement)
            say(f"{layout} {rate} {cell.alternation + 1}: {cell.program} {measurement.median_s * 1e3:.1f} ms")
        group.ask({"do": "stop"}, START_S)


def build(program: Program, group: Ranks, settings: Settings, say: Callable[[str], None]) -> bool:
    """Build a program in every rank and check it; tell whether it is there.

    Raises:
        ClusterError: its numbers are wrong.
    """
    built = group.ask({"do": "build", "program": program.name}, BUILD_S)
    reasons = [answer["unavailable"] for answer in built if "unavailable" in answer]
    if reasons:
        say(f"{program.name}: unavailable: {reasons[0]}")
        return False
    observed = group.ask({"do": "observe", "program": program.name, "steps": settings.checked_steps}, BUILD_S)
    seconds = max(answer["seconds"] for answer in built)
    losses = " ".join(f"{loss:.6f}" for loss in observed[0]["losses"])
    held = "held to no other program"
    if program.same_as is not None:
        worst = check(program, group.ask({"do": "compare", "program": program.name}, START_S))
        held = f"as {program.same_as}: largest error {worst['error']:.1e}, limit {worst['limit']:.1e}"
    say(f"{program.name}: built in {seconds:.1f} s; rank 0's losses {losses}; {held}")
    return True


def check(program: Program, compared: Sequence[Answer]) -> Answer:
    """Return the comparison of the rank that comes nearest to its limit.

    Raises:
        ClusterError: it is over the limit.
    """
    worst = max(compared, key=lambda answer: float(answer["error"] / answer["limit"]))
    if not worst["error"] <= worst["limit"]:
        raise ClusterError(
            f"{program.name}: expected the outputs and losses of {program.same_as} within {worst['limit']:.1e} of "
            f"their largest magnitude, found a difference of {worst['error']:.1e}; no wrong program is measured: "
            "leave it out with --programs, or mend it"
        )
    return worst


def measure(
    cell: Cell, net: Network, group: Ranks, settings: Settings, predicted: dict[str, float] | None
) -> Measurement:
    """Warm a program up and measure it once."""
    ask = {"do": "measure", "program": cell.program}
    group.ask(ask | {"steps": settings.warmup}, START_S + settings.warmup * STEP_S)
    before = net.sent_bytes()
    answers = group.ask(ask | {"steps": settings.steps}, START_S + settings.steps * STEP_S)
    after = net.sent_bytes()
    hosts = len(net.hosts)
    ledgers = [answer.get("ledger_bytes", {}) for answer in answers]
    return Measurement(
        cell=cell,
        step_s=[statistics.mean(times) for times in zip(*(answer["step_s"] for answer in answers), strict=True)],
        work_s=statistics.mean(answer["work_s"] for answer in answers),
        waited_s={k: v / len(answers) for k, v in total([answer["waited_s"] for answer in answers]).items()},
        sent_bytes=[(end - start) / settings.steps for start, end in zip(before, after, strict=True)],
        ledger_bytes={label: sent / hosts for label, sent in total(ledgers).items()},
        predicted_bytes=predicted,
    )


def total(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add up by key."""
    return {key: sum(part.get(key, 0.0) for part in parts) for key in dict.fromkeys(k for part in parts for k in part)}
