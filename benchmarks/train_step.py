"""Whole train steps on one GPU: flat eager PyTorch, Inductor and dmt on the same model, in alternation.

    python benchmarks/train_step.py                                       # the paper's DLRM and a DCN, tables of 13 GB
    python benchmarks/train_step.py --models dcn-low-rank --samples 4096 --json train_step.jsonl
    python benchmarks/train_step.py --contestants eager dmt-fused --options kernels=triton
    python benchmarks/train_step.py --device cpu --tiny --compiler eager   # numbers checked, no speeds

Contestants: ``eager``, flat, sparse gradients. ``inductor``, the whole model compiled, with dense gradients, which are
all that it takes. ``inductor-rest``, the dense part compiled, lookups eager with sparse gradients: Inductor's best.
``dmt``, ours with an ordinary optimizer, ``dmt-fused`` with the tables' optimizer in their backward pass, and
``dmt-towers`` with Tower Modules, which is another model. All train the same tables with the same SGD; dmt checks ids
besides.

Before anything is timed, three steps from the same start must give eager's losses, and change rows of the tables as
eager does, within the package's tolerances (Tower Modules: finite losses). Then each runs some steps in turn; a turn
ends when the GPU is done, and the median turn counts. "host ms" is how long the host took to launch a step: where it is
near "step ms", launching is what limits. "GiB of a step" is the peak above what stands before it: activations and
gradients.

Exits with 1 if something failed, and with 2 for a bad command line or where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import interpret_without_gpu  # noqa: F401
import torch
from chosen import chosen
from failures import failure
from gpu_timing import device_line, set_precision
from step_contestants import CONTESTANTS, TOWERS, Setting, Step
from step_models import MODELS, Size, StepBatch, fill, make_batch
from step_report import HEADER, Result, lines

from dmt_compile.tolerances import HALF_GRADIENT, absolute_error, magnitude, reordered_limit

CHECKED_STEPS = 3
CHECKED_IDS = 1000  # of each table
BATCHES = 4
SIZES = ("tables", "rows", "dim", "samples", "pooling", "towers")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["dlrm", "dcn"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    for name in SIZES:
        default = next(field.default for field in fields(Size) if field.name == name)
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--turns", type=int, default=7, help="of each contestant")
    parser.add_argument("--steps", type=int, default=10, help="of each turn")
    parser.add_argument("--precision", choices=("tf32", "fp32"), default="tf32", help="of float32 matrix products")
    parser.add_argument("--compiler", default="inductor", help="of dense parts, dmt's too")
    parser.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="of dmt, such as kernels=triton")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="prepare nobody after so long")
    parser.add_argument("--json", type=Path, help="append a line for each model and contestant to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, in place of those given")
    args = parser.parse_args(argv)
    if any("=" not in option for option in args.options):
        parser.error(f"--options: expected NAME=VALUE, found {' '.join(args.options)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU, found none; --device cpu --tiny checks numbers alone")
    args.size = Size(**{name: getattr(args, name) for name in SIZES})
    args.size = args.size.tiny() if args.tiny else args.size
    return args


def checked(step: Step, setting: Setting, batches: Sequence[StepBatch]) -> tuple[list[float], torch.Tensor]:
    """Train from the start for some steps.

    Returns:
        The losses, and what the steps changed of the first rows that a batch names, of all tables.
    """
    fill(setting.tables)
    rows = [(table, ids[:CHECKED_IDS]) for table, ids in zip(setting.tables, batches[0].ids, strict=True)]
    before = torch.cat([table[ids] for table, ids in rows])
    losses = [float(step(batch)) for batch in batches[:CHECKED_STEPS]]
    return losses, torch.cat([table[ids] for table, ids in rows]) - before


def gate(
    found: tuple[list[float], torch.Tensor], expected: tuple[list[float], torch.Tensor], size: Size, precision: str
) -> float:
    """Return the largest error of losses and changed rows, relative to what is allowed."""
    losses, right = (torch.tensor(pair[0], dtype=torch.float64) for pair in (found, expected))
    of_losses = absolute_error(losses, right) / (reordered_limit(torch.float32, size.longest_sum) * magnitude(right))
    limit = reordered_limit(torch.float32, size.longest_sum, gradient=True)
    if precision == "tf32":  # a factor then has the mantissa of a float16
        limit = max(limit, HALF_GRADIENT[torch.float16])
    return max(of_losses, absolute_error(found[1], expected[1]) / (limit * magnitude(expected[1])))


def prepare(
    names: Sequence[str], setting: Setting, batches: Sequence[StepBatch], precision: str, deadline: float
) -> tuple[dict[str, Step], dict[str, Result]]:
    """Compile and check; what goes wrong becomes a note, and has no step."""
    steps: dict[str, Step] = {}
    results: dict[str, Result] = {}
    expected: tuple[list[float], torch.Tensor] | None = None
    for name in names:
        if time.monotonic() > deadline:
            results[name] = Result(setting.model, name, note="not run: no time left")
            continue
        began = time.monotonic()
        try:
            step = CONTESTANTS[name](setting)
            found = checked(step, setting, batches)
            expected = found if expected is None and name != TOWERS else expected
            if name == TOWERS:
                error = 0.0 if all(map(math.isfinite, found[0])) else math.inf
            else:
                error = gate(found, expected or found, setting.size, precision)
            note = "" if error <= 1 else f"FAILED: error {error:.3g} times what is allowed"
            ready_s, ran = time.monotonic() - began, chosen(setting.dumps / name)
            results[name] = Result(setting.model, name, error, ready_s, note=note, ran=ran)
            if not note:
                steps[name] = step
        except Exception as raised:
            results[name] = Result(setting.model, name, note=failure(raised))
    return steps, results


def take_turns(
    steps: Mapping[str, Step], batches: Sequence[StepBatch], turns: int, length: int
) -> dict[str, dict[str, Any]]:
    """Run steps of each in turn on a GPU; returns what a :class:`Result` has of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    hosts: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for turn in range(turns + 1):
        for name, step in steps.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            standing, began = torch.cuda.memory_allocated(), time.perf_counter()
            for index in range(length):
                step(batches[index % len(batches)])
            launched = time.perf_counter()
            torch.cuda.synchronize()
            if turn:  # the first one warms up: the checks have not met every batch
                seconds[name].append((time.perf_counter() - began) / length)
                hosts[name].append((launched - began) / length)
                peaks[name] = torch.cuda.max_memory_allocated() - standing
    return {
        name: {
            "step_s": statistics.median(seconds[name]),
            "spread": (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name]),
            "host_s": statistics.median(hosts[name]),
            "peak_bytes": peaks[name],
        }
        for name in steps
    }


def run_model(model: str, args: argparse.Namespace, deadline: float) -> list[Result]:
    """Check and time all contestants of a model."""
    device, size = torch.device(args.device), args.size
    set_precision(args.precision)
    tables = [torch.empty(size.rows, size.dim, device=device) for _ in range(size.tables)]
    batches = [make_batch(size, device, seed) for seed in range(BATCHES)]
    options = dict(option.split("=", 1) for option in args.options) | {"dense_compiler": args.compiler}
    with tempfile.TemporaryDirectory() as dumps:
        setting = Setting(model, size, tables, batches[0], args.compiler, options, Path(dumps))
        steps, results = prepare(args.contestants, setting, batches, args.precision, deadline)
    if device.type == "cuda":
        for name, measured in take_turns(steps, batches, args.turns, args.steps).items():
            results[name] = replace(results[name], **measured)
    return list(results.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    args = parse_args(argv)
    deadline = time.monotonic() + args.limit_s
    precision = f"float32 products in {args.precision}, medians of {args.turns} turns of {args.steps} steps"
    print(device_line(torch.device(args.device)), "", f"{args.size}; {precision}.", "", *HEADER, sep="\n", flush=True)
    failed = False
    for model in args.models:
        results = run_model(model, args, deadline)
        failed = failed or any(result.note.startswith("FAILED") for result in results)
        print(*lines(results), sep="\n", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.writelines(json.dumps(result.as_json()) + "\n" for result in results)
        torch.compiler.reset()  # what was compiled holds the tables
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
