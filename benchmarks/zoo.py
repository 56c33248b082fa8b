"""What the compiler makes of every model of the zoo, ours and those of three libraries, none of them changed for it.

    python benchmarks/zoo.py

One line a model: embedding tables found; lookups; whether all of them are on the ranks of a 2x2 topology, or the
reasons why some stay flat; graphs over 50 batches of random sizes in training and in evaluation (sizes 0 and 1 among
them where the eager model takes them); the largest errors of outputs and of gradients relative to eager, in one process
and on four simulated ranks; whether Tower Modules of half the width (one vector a feature) fit, or the reason
why not. Everything is checked before anything is printed; what is wrong is named instead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dmt_compile
from tests.zoo.comparison import Difference, compare_alone, compare_ranks, explained, fresh
from tests.zoo.entry import Entry
from tests.zoo.models import ZOO

TOPOLOGY = "2x2"


@dataclass(frozen=True)
class Row:
    """What was found for one model; ``faults`` is empty where all is as it has to be."""

    cells: tuple[str, ...]
    faults: tuple[str, ...]


HEADER = (
    "model",
    "tables",
    "lookups",
    "towered",
    "graphs",
    "output",
    "gradient",
    f"output {TOPOLOGY}",
    f"gradient {TOPOLOGY}",
    "Tower Modules",
)


def entries(libraries: bool) -> dict[str, Entry]:
    """Return the models by name."""
    models = list(ZOO)
    if libraries:
        from tests.zoo.libraries import LIBRARIES

        models += LIBRARIES
    return {entry.name: entry for entry in models}


def measure(name: str, libraries: bool, shapes: int, dense_compiler: str) -> Row:
    """Measure one model in this process."""
    torch.set_num_threads(1)
    # Dynamo itself looks at the gradient of what an earlier graph returned.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    entry = entries(libraries)[name]
    try:
        explanation = explained(entry, TOPOLOGY)
        alone = compare_alone(entry, shapes, dense_compiler=dense_compiler)
        ranks = compare_ranks(entry, TOPOLOGY, dense_compiler)
    except Exception as error:
        return Row((), (f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}",))
    found = {table.name for table in explanation.tables}
    reasons = sorted({item.reason for item in explanation.unmatched})
    faults = [
        f"{name}: {d.what}: error {d.error:.1e} above {d.limit:.1e}"
        for d in (*alone.differences, *ranks)
        if not d.error <= d.limit
    ]
    if found != entry.tables:
        faults.append(f"{name}: expected tables {sorted(entry.tables)}, found {sorted(found)}")
    if len(explanation.unmatched) != len(entry.flat):
        faults.append(f"{name}: expected {len(entry.flat)} lookups to stay flat, found {reasons}")
    graphs = (alone.training_graphs, alone.evaluation_graphs)
    if graphs != (entry.graphs, entry.graphs):
        faults.append(f"{name}: expected {entry.graphs} graphs each in training and evaluation, found {graphs}")
    cells = (
        name,
        str(len(found)),
        str(sum(table.features for table in explanation.plan.tables) + len(explanation.unmatched)),
        "; ".join(reasons) or "fully",
        f"{graphs[0]} + {graphs[1]}",
        *(_largest(differences, what) for differences in (alone.differences, ranks) for what in ("output", "gradient")),
        _towers(entry),
    )
    return Row(cells, tuple(faults[:3]))


def _towers(entry: Entry) -> str:
    """Return ``"yes"``, or why Tower Modules that send half of each vector do not fit."""
    model, batch = fresh(entry), entry.batch(4, torch.Generator().manual_seed(4))
    width = max((table.dim for table in dmt_compile.plan(model, batch, TOPOLOGY).tables), default=2)
    options = {"dim": max(width // 2, 1)}
    try:
        plan = dmt_compile.plan(fresh(entry), batch, TOPOLOGY, tower_module="dlrm", tower_module_options=options)
    except dmt_compile.DmtError as error:
        return str(error)
    refused = [
        note.removeprefix("no Tower Modules: ").split(" (/")[0]
        for note in plan.notes
        if note.startswith("no Tower Modules")
    ]
    return "yes" if plan.tower_modules is not None else refused[0] if refused else "no table"


def _largest(differences: Sequence[Difference], what: str) -> str:
    error = max((d.error for d in differences if what in d.what), default=0.0)
    return "bitwise" if error == 0 else f"{error:.1e}"


def main() -> int:
    """Measure all models, check, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="parts of the names of the models to run")
    parser.add_argument("--no-libraries", action="store_true", help="only models of this repository")
    parser.add_argument("--shapes", type=int, default=50)
    parser.add_argument("--dense-compiler", default="eager", choices=("eager", "aot_eager", "inductor"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    libraries = not args.no_libraries
    names = [name for name in entries(libraries) if any(part in name for part in args.models)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        waiting = [pool.submit(measure, name, libraries, args.shapes, args.dense_compiler) for name in names]
        rows = [future.result() for future in waiting]
    faults = [fault for row in rows for fault in row.faults]
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return 1
    table = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEADER))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    lookups = sum(int(row.cells[2]) for row in rows)
    fully = sum(row.cells[3] == "fully" for row in rows)
    print(f"{len(rows)} models, {fully} of them fully towered; {lookups} lookups")
    return 0


if __name__ == "__main__":
    sys.exit(main())
