"""Steady train step of one process: eager, inductor and dmt on the same model, in alternation in one run.

``inductor`` is compiled for the one batch shape that it sees here; ``dynamic`` is inductor with dynamic shapes, which
is what a ragged batch gets, and what dmt always compiles.

    python benchmarks/step_time.py --tables 26 --samples 2048

Prints the median of each part of the step (forward, backward, optimizer) and the ratio of the whole step to eager's.
Outputs and gradients are compared with eager before anything is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from models import Batch, make_batch, make_model
from torch import nn


def stepper(
    model: nn.Module, call: Callable[..., Any], batch: Batch, labels: torch.Tensor
) -> Callable[[], list[float]]:
    """Return a function that runs one step and returns the seconds of its parts."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)

    def step() -> list[float]:
        times = [time.perf_counter()]
        loss = nn.functional.binary_cross_entropy_with_logits(call(*batch), labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    return step


def check(models: dict[str, nn.Module], calls: dict[str, Callable[..., Any]], batch: Batch) -> None:
    """Compare outputs and gradients with eager's."""
    for name, call in calls.items():
        output = call(*batch)
        output.sum().backward()
        torch.testing.assert_close(output, models["eager"](*batch), rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(models[name].parameters(), models["eager"].parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for model in models.values():
        model.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--sparse", action="store_true", help="sparse gradients (inductor does not take them)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flat = make_model(args.tables, rows=args.rows, sparse=args.sparse)
    names = ["eager", "dmt"] if args.sparse else ["eager", "inductor", "dynamic", "dmt"]
    models: dict[str, nn.Module] = {name: copy.deepcopy(flat) for name in names}
    makers: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
        "eager": lambda model: model,
        "inductor": torch.compile,
        "dynamic": lambda model: torch.compile(model, dynamic=True),
        "dmt": lambda model: torch.compile(model, backend="dmt"),
    }
    calls = {name: makers[name](model) for name, model in models.items()}
    batch = make_batch(flat, args.samples, seed=1)
    if not args.sparse:
        check(models, calls, batch)
    labels = torch.rand(args.samples)
    steps = {name: stepper(models[name], calls[name], batch, labels) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(args.steps + 3):
        for name, step in steps.items():
            times[name].append(step())
    print(f"{args.tables} tables of {args.rows} rows, {args.samples} samples, {args.threads} thread(s), Adagrad")
    print("backend   forward ms  backward ms  optimizer ms  step ms  ratio to eager")
    eager = statistics.median(sum(parts) for parts in times["eager"][3:])
    for name, measured in times.items():
        parts = [statistics.median(step[i] for step in measured[3:]) * 1e3 for i in range(3)]
        whole = statistics.median(sum(step) for step in measured[3:])
        columns = f"{parts[0]:10.2f}  {parts[1]:11.2f}  {parts[2]:12.2f}  {whole * 1e3:7.2f}"
        print(f"{name:8}  {columns}  {whole / eager:14.2f}")


if __name__ == "__main__":
    main()
