"""Does a model keep its quality with Tower Modules? Flat, and towers by partition, number and compression, over seeds.

    python benchmarks/quality.py --data nycflights --out results.jsonl                 # train the headline rows
    python benchmarks/quality.py --data ml1m --path <folder> --out results.jsonl --rows all
    python benchmarks/quality.py --report --out results.jsonl --plot frontier.svg      # tables and plot, no training

Every finished training appends one line to the results file; a training that has its line there is skipped, so an
interrupted run goes on where it stopped. Settings are those of the flat model for every variant of it. In one process
the transform without modules computes the flat model exactly: that is certified for every rank (one line a model), and
not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from quality_data import LOADERS, QualityData
from quality_models import MODELS, SETTINGS, Settings
from quality_report import report
from quality_training import Score, Variant, flat_model, make_plan, planning_batch, towered, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import dmt_compile
from dmt_compile.tower_modules import INITS

PARTITIONS = ("strided", "coherent:nid", "balanced", "diverse:nid", "coherent:cosine", "diverse:cosine")
GRID = PARTITIONS[:4]
STRATEGIES, SIGNALS = ("coherent", "diverse"), ("cosine", "nid", "archdetect")
COMPRESSIONS = (2, 4, 8, 16)
TOWERS = (2, 4, 8)
HEADLINE = (4, 2)
START = {"init": "identity", "step": 0.1}  # the defaults, spelled out since results are kept by options
SEEDS = 9
PROBE_SEED = 1000  # of the flat model whose embeddings the partitioner sees; no seed of the tables
PROBE_SAMPLES, PROBE_BATCH = 8192, 2048


def variant_of(kind: str, partition: str, towers: int, compression: int, features: int, dim: int) -> Variant | None:
    """Return a variant that sends at most 1 / compression of the columns of all features; ``None`` where none can.

    ``kind`` is ``"each"`` (a narrower vector of every feature, the paper's DLRM rows), ``"together"`` (p vectors of all
    features of a tower), ``"dot"`` (a vector of every feature, narrower still, and the products inside the tower), or
    ``"cross"`` (the DCN's). Even towers are assumed.
    """
    if kind == "cross":
        return Variant(
            partition, towers, compression, "dcn", {"output": "per_feature", "dim": dim // compression, **START}
        )
    if kind == "each":
        return Variant(partition, towers, compression, "dlrm", {"c": 1, "p": 0, "dim": dim // compression, **START})
    columns = features * dim / compression
    if kind == "together":
        vectors = max(1, round(0.45 * math.sqrt(columns / towers)))
        return Variant(
            partition, towers, compression, "dlrm",
            {"c": 0, "p": vectors, "dim": int(columns / towers / vectors), **START},
        )  # fmt: skip
    sizes = [len(range(tower, features, towers)) for tower in range(towers)]
    width = int((columns - sum(size * (size - 1) // 2 for size in sizes)) / features)
    return (
        Variant(partition, towers, compression, "dot", {"c": 1, "p": 0, "dim": width, **START}) if width > 0 else None
    )


def variants(model: str, rows: str, features: int, dim: int) -> list[Variant]:
    """Return the variants of a model in the order in which they are trained.

    ``"flat"``: no towers. ``"paper"``: the paper's modules, 4 strided towers, compression 4 and 2. ``"headline"``:
    those, and every partition where the module makes use of it. ``"signals"``: what the interactions of coherent and
    diverse towers are measured by, compression 4. ``"modules"``: kinds of module, initial values and steps, 4 strided
    towers. ``"all"``: the headline, then every number of towers, one per feature too, and every compression, with the
    partitions of ``GRID``.
    """
    paper, best = ("each", "dot") if model == "dlrm" else ("cross", "cross")

    def make(kind: str, partitions: Sequence[str], towers: Sequence[int], compressions: Sequence[int]) -> list[Variant]:
        made = [variant_of(kind, p, t, c, features, dim) for t in towers for c in compressions for p in partitions]
        return [variant for variant in made if variant is not None]

    strided = PARTITIONS[:1]
    part = [Variant()]
    if rows != "flat":
        part += make(paper, strided, [4], HEADLINE)
    if rows == "signals":
        signalled = [f"{strategy}:{signal}" for signal in SIGNALS for strategy in STRATEGIES]
        part += make(best, [*strided, *signalled], [4], HEADLINE[:1])
    if rows == "modules":
        kinds = ("each", "together", "dot") if model == "dlrm" else ("cross",)
        base = [variant for kind in kinds for variant in make(kind, strided, [4], HEADLINE)]
        starts = [{"init": init, "step": step} for init in INITS for step in (0.1, 1)]
        part += [replace(v, options={**v.options, **start}) for v in base for start in starts]
    if rows in ("headline", "all"):
        part += make(best, PARTITIONS, [4], HEADLINE)
    if rows == "all":
        # One tower a feature is the same under every partition, and has no products inside.
        part += make(best, GRID, TOWERS, COMPRESSIONS)
        part += make(paper, strided, [*TOWERS, features], COMPRESSIONS)
    return list({variant.key: variant for variant in part}.values())


def digest(settings: Settings) -> str:
    """Return a short name for settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


class Results:
    """The results file: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        self._done = {self.key(line) for line in self.lines}
        if text and not text.endswith("\n"):  # a run was cut off in the middle of a line
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    @staticmethod
    def key(line: Mapping[str, Any]) -> str:
        """Return what makes a training the same as another one."""
        return json.dumps([line[k] for k in ("data", "rows", "model", "variant", "seed", "settings")], sort_keys=True)

    def __contains__(self, line: Mapping[str, Any]) -> bool:
        return self.key(line) in self._done

    def append(self, line: dict[str, Any]) -> None:
        """Write a line at once."""
        self.lines.append(line)
        self._done.add(self.key(line))
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Bench:
    """Trains variants of the models of one data set."""

    def __init__(self, data: QualityData, results: Results) -> None:
        self.data = data
        self.results = results
        self._bytes: dict[str, float] = {}
        self._plans: dict[str, dmt_compile.TowerPlan] = {}
        self._probes: dict[str, torch.nn.Module] = {}

    def line(self, model: str, variant: Variant, seed: int, settings: Settings) -> dict[str, Any]:
        """Return the line of a training, without its results."""
        return {
            "data": self.data.name, "rows": self.data.labels_N.numel(), "model": model,
            "seed": seed, "settings": json.loads(json.dumps(asdict(settings))),
            **(asdict(variant) | {"variant": variant.key}),
        }  # fmt: skip

    def run(self, model: str, variant: Variant, seed: int, settings: Settings, show: Any) -> Score:
        """Train one variant with one seed."""
        module = flat_model(self.data, model, settings, seed)
        if variant.module is not None:
            module = towered(module, self.data, self.plan(model, variant, settings), seed)
        return train(module, self.data, settings, seed, show)

    def plan(self, model: str, variant: Variant, settings: Settings) -> dmt_compile.TowerPlan:
        """Return a variant's plan: one partition, whatever the seed of a training."""
        key = f"{model} {variant.key} {variant.towers}"
        if key not in self._plans:
            strategy, _, signal = variant.partition.partition(":")
            partition: Any = strategy
            module = flat_model(self.data, model, settings, PROBE_SEED)
            if signal:
                found = dmt_compile.plan(
                    module, planning_batch(self.data), f"{variant.towers}x1", partition=strategy,
                    interactions=self.interactions(model, settings, signal),
                )  # fmt: skip
                partition = [list(tower.tables) for tower in found.towers]
            self._plans[key] = make_plan(module, self.data, variant, partition)
        return self._plans[key]

    def cross_host_bytes(self, model: str, variant: Variant, settings: Settings) -> float:
        """Return what the embeddings of a sample and their gradients send across hosts, of one rank each.

        Read off the ledger of one step of the compiled program in the simulated world; without a module it is the
        exchange of the flat model.
        """
        key = f"{model} {variant.key} {variant.towers}"
        if key not in self._bytes:
            plan = self.plan(model, variant, settings)
            batch = planning_batch(self.data)
            world = dmt_compile.SimulatedWorld(f"{variant.towers}x1")
            module = flat_model(self.data, model, settings, 0)
            outputs = world.run(module, [batch] * variant.towers, dense_compiler="eager", plan=plan)
            torch.stack([output.sum() for output in outputs]).sum().backward()
            sent = sum(n for (name, _, link), n in world.ledger.records.items() if (name, link) == ("peer", "cross"))
            self._bytes[key] = sent / (variant.towers * batch[0].shape[0])
        return self._bytes[key]

    def sent(self, model: str, variant: Variant, settings: Settings) -> dict[str, float]:
        """Return a variant's bytes across hosts for each sample, and those of the flat model on as many hosts."""
        if variant.module is None:
            return {}
        flat = replace(variant, module=None, options={})
        return {
            "cross_host_bytes": self.cross_host_bytes(model, variant, settings),
            "flat_cross_host_bytes": self.cross_host_bytes(model, flat, settings),
        }

    def interactions(self, model: str, settings: Settings, signal: str) -> dmt_compile.InteractionMatrix:
        """Return how much each two features interact in a flat model trained with a seed of its own.

        Measured on training rows, once for a data set, model and signal: kept beside the results file.
        """
        name = f"{self.data.name}-{self.data.labels_N.numel()}-{model}-{signal}-{digest(settings)}.json"
        path = self.results.path.with_name(f"{self.results.path.stem}.{name}")
        if not path.exists():
            if model not in self._probes:
                self._probes[model] = flat_model(self.data, model, settings, PROBE_SEED)
                train(self._probes[model], self.data, settings, PROBE_SEED)
            rows = self.data.train[:PROBE_SAMPLES]
            batches = [inputs for inputs, _ in self.data.batches(rows, PROBE_BATCH)]
            dmt_compile.interactions(self._probes[model], batches, signal).save(path)
        return dmt_compile.InteractionMatrix.load(path)

    def certify(self, model: str, settings: Settings) -> None:
        """Hold the transform without modules to the flat model on four hosts, and write one line of it."""
        variant = Variant("sptt", 4, 1)
        line = self.line(model, variant, 0, settings)
        if line in self.results:
            return
        module = flat_model(self.data, model, replace(settings, dropout=0.0), 0)
        certificate = dmt_compile.certify(module, planning_batch(self.data), "4x1", dense_compiler="eager")
        if not certificate.holds:
            raise SystemExit(f"quality: expected the transform without modules to hold, found\n{certificate}")
        self.results.append({**line, "max_abs_error": certificate.max_abs_error})


def settings_of(model: str, data: str, dim: int | None) -> Settings:
    """Return the settings of a model and data set, of another embedding width where one is given."""
    settings = SETTINGS[model, data]
    return settings if dim is None else replace(settings, dim=dim)


def jobs(
    names: list[str], rows: str, seeds: range, data: QualityData, dim: int | None = None
) -> Iterator[tuple[str, Variant, int]]:
    """Yield every training: seed by seed within a part of the table, so that all of its rows grow together."""
    for model in names:
        shape = len(data.table_rows), settings_of(model, data.name, dim).dim
        table, headline = variants(model, rows, *shape), variants(model, "headline", *shape)
        head = [v for v in table if v in headline]
        for part in (head, [v for v in table if v not in head]):
            for seed in seeds:
                yield from ((model, variant, seed) for variant in part)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(LOADERS), default="nycflights")
    parser.add_argument("--path", type=Path, help="the data set's folder; nycflights needs none")
    parser.add_argument("--limit-rows", type=int, help="use only so many rows (of each part) of the data")
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument(
        "--rows", choices=("flat", "paper", "headline", "signals", "modules", "all"), default="headline"
    )
    parser.add_argument("--dim", type=int, help="embedding width, in place of the settings'")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the results file, one JSON line for each training")
    parser.add_argument("--report", action="store_true", help="print what the results file holds; no training")
    parser.add_argument("--plot", type=Path, help="with --report: where to write the frontier (.svg or .png)")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, or report."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    results = Results(args.out)
    if args.report:
        report(results.lines, args.plot)
        return
    data = LOADERS[args.data](args.path, args.limit_rows)
    bench = Bench(data, results)
    todo = list(jobs(args.model, args.rows, range(args.first_seed, args.first_seed + args.seeds), data, args.dim))
    left = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *left, console=Console()) as progress:
        task = progress.add_task(args.data, total=len(todo))
        for model, variant, seed in todo:
            settings = settings_of(model, data.name, args.dim)
            line = bench.line(model, variant, seed, settings)
            if line not in results:
                bench.certify(model, settings)

                def show(epoch: int, valid_auc: float, what: str = f"{model} {variant.key} seed {seed}") -> None:
                    progress.update(task, description=f"{what}: epoch {epoch}, validation AUC {valid_auc:.4f}")

                score = bench.run(model, variant, seed, settings, show)
                results.append({**line, **asdict(score), **bench.sent(model, variant, settings)})
            progress.advance(task)


if __name__ == "__main__":
    main()
