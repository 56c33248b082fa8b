"""One rank: builds programs and runs steps of them, as it is asked on standard input.

Requests are lines of JSON with a key ``do``; each is answered by a line on what was standard output when the process
began. From then on standard output is the log, since libraries print.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from cluster.programs import PROGRAMS, Step
from cluster.waits import Waits
from cluster.workload import Workload, flat_model, make_batches
from dmt_compile.errors import ConfigError
from dmt_compile.tolerances import absolute_error, magnitude, reordered_limit

Answer = dict[str, Any]


class Rank:
    """What this rank has built and seen."""

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.waits = Waits()
        self.workload = Workload()
        self.defaults: dict[str, dict[str, Any]] = {}

    def start(self, workload: dict[str, Any], defaults: dict[str, dict[str, Any]], timeout_s: float) -> Answer:
        """Join the process group and make the batches."""
        sizes: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in workload.items()
        }
        self.workload, self.defaults = Workload(**sizes), defaults
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        self.waits.install()
        self.batches = make_batches(self.workload, dist.get_rank())
        return {}

    def build(self, program: str) -> Answer:
        """Build a program, or say why it cannot be had here: an option or a library is missing."""
        start = time.perf_counter()
        try:
            step = PROGRAMS[program].build(flat_model(self.workload), self.workload, self.batches, self.defaults)
        except (ConfigError, ImportError) as error:
            return {"unavailable": f"{type(error).__name__}: {error}"}
        gc.collect()
        self.steps[program], self.seen[program] = step, []
        return {"seconds": time.perf_counter() - start}

    def observe(self, program: str, steps: int) -> Answer:
        """Run steps and keep their losses and outputs."""
        for _ in range(steps):
            loss, logits_B = self.steps[program].run()
            self.seen[program].append((loss.clone(), logits_B.clone()))
        return {"losses": [float(loss) for loss, _ in self.seen[program]]}

    def compare(self, program: str) -> Answer:
        """Compare what was observed with the program that it must equal.

        Returns:
            ``error`` and ``limit`` of the observation that comes nearest to its limit, relative to the largest
            magnitude of the reference.
        """
        spec = PROGRAMS[program]
        assert spec.same_as is not None
        longest_sum = max(*self.workload.bottom, *self.workload.top, self.workload.samples * dist.get_world_size())
        worst: dict[str, float] = {"error": 0.0, "limit": 1.0}
        for index, (mine, theirs) in enumerate(zip(self.seen[program], self.seen[spec.same_as], strict=True)):
            limit = reordered_limit(getattr(torch, spec.precision), longest_sum, gradient=index > 0)
            for actual, expected in zip(mine, theirs, strict=True):
                error = absolute_error(actual, expected) / magnitude(expected)
                if not error / limit <= worst["error"] / worst["limit"]:
                    worst = {"error": error, "limit": limit}
        return worst

    def measure(self, program: str, steps: int) -> Answer:
        """Run steps from a barrier on.

        Returns:
            Seconds of each step; per step, seconds of this thread's work and waits by collective, and where the program
            keeps a ledger the bytes that it says this rank sent to other hosts, by collective.
        """
        step = self.steps[program]
        world = None if step.state is None else step.state.world
        step.finish()
        dist.barrier()
        waited_before = dict(self.waits.seconds)
        if world is not None:
            world.ledger.clear()
            world.waited_s.clear()
        worked, times = time.thread_time(), [time.perf_counter()]
        for _ in range(steps):
            step.run()
            times.append(time.perf_counter())
        step.finish()
        waited = {name: seconds - waited_before.get(name, 0.0) for name, seconds in self.waits.seconds.items()}
        if world is not None:
            waited = {" ".join(key): seconds for key, seconds in world.waited_s.items()}
        answer: Answer = {
            "step_s": [after - before for before, after in pairwise(times)],
            "work_s": (time.thread_time() - worked) / steps,
            "waited_s": {label: seconds / steps for label, seconds in waited.items()},
        }
        if world is not None:
            ledger: dict[str, float] = {}
            for (label, _, link), sent in world.ledger.records.items():
                if link == "cross":
                    ledger[label] = ledger.get(label, 0.0) + sent / steps
            answer["ledger_bytes"] = ledger
        return answer


def leave() -> Answer:
    """Leave the process group."""
    dist.barrier()
    dist.destroy_process_group()
    return {}


def serve(requests: Any, answers: Any, handlers: dict[str, Callable[..., Answer]]) -> None:
    """Answer requests until there are no more, or until one fails."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run(handlers: dict[str, Callable[..., Answer]]) -> None:
    """Serve on this process's standard streams, and end without the interpreter's own end."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    try:
        serve(sys.stdin, answers, {**handlers, "stop": leave})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort at the interpreter's own exit


if __name__ == "__main__":
    rank = Rank()
    run({name: getattr(rank, name) for name in ("start", "build", "observe", "compare", "measure")})
