"""Run thousands of random cases: ``make equivalence ARGS="--cases 5000 --seed 1"``."""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.equivalence import models, strategies
from tests.equivalence.checks import Tally, check
from tests.equivalence.strategies import Case, cases

MODELS_A_ROUND = 5
WORLDS = 4  # of each model


@dataclass
class Share:
    """What one process did: its tally, and the first failure with the case that shows it."""

    tally: Tally
    failure: str = ""
    case: str = ""


def work(number: int, first_seed: int) -> Share:
    """Run at least ``number`` cases, or up to the first failure."""
    torch.set_num_threads(1)
    share = Share(Tally())

    @given(case=cases(WORLDS))
    @settings(
        max_examples=MODELS_A_ROUND,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def compare(case: Case) -> None:
        if share.failure or share.tally.cases.total() >= number:
            return
        torch._dynamo.reset()
        try:
            check(case, share.tally)
        except Exception:
            share.failure, share.case = traceback.format_exc(), repr(case)

    turn = 0
    while share.tally.cases.total() < number and not share.failure:
        seed(first_seed + turn)(compare)()
        turn += 1
    return share


def parse_case(text: str) -> Case:
    """Return the case whose ``repr`` is ``text``."""
    case: Case = eval(text, vars(models) | vars(strategies))
    return case


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases in several processes; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="tests.equivalence.run", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="how many to run at least (default 5000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="how many processes share them (default 2)")
    parser.add_argument("--case", help="run this one case again, as a failure printed it")
    args = parser.parse_args(argv)
    if args.case is not None:
        check(parse_case(args.case), Tally())
        print("the case holds")
        return 0
    start = time.monotonic()
    each = -(-args.cases // args.processes)
    seeds = [1_000_000 * args.seed + 100_000 * process for process in range(args.processes)]
    if args.processes == 1:
        shares = [work(each, seeds[0])]
    else:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            shares = list(pool.map(work, [each] * args.processes, seeds))
    report([share.tally for share in shares], time.monotonic() - start)
    failed = [share for share in shares if share.failure]
    for share in failed:
        print(f"\nFAILED\n{share.failure}\nRun it again:")
        print(f"  python -m tests.equivalence.run --case {shlex.quote(share.case)}")
    return 1 if failed else 0


def report(tallies: Sequence[Tally], seconds: float) -> None:
    """Print how many cases ran and the largest error of each class of claim."""
    alone, whole = (sum(tally.cases[kind] for tally in tallies) for kind in ("pass alone", "pipeline"))
    print(f"{alone + whole:,} cases in {seconds:,.0f} s: {alone:,} passes alone, {whole:,} whole pipelines")
    for effect in tallies[0].largest:
        compared = sum(tally.compared[effect] for tally in tallies)
        largest = max(tally.largest[effect] for tally in tallies)
        print(f"  {effect.name:9}  largest relative error {largest:.2g}, in {compared:,} comparisons of tensors")


if __name__ == "__main__":
    sys.exit(main())
