"""Runs a function in several real ranks on gloo: one process each, results and errors brought back.

Processes come from a fork server that has compiled a model (``compiled_once``): a run costs its own work, and not what
the first compilation of a process imports, builds and caches.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.compiled_once"])


@dataclass
class Outcome:
    """What a rank returned, or the error that ended it, and after how many seconds."""

    value: Any = None
    error: str | None = None
    message: str = ""
    seconds: float = 0.0


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120, environ: dict[str, str] | None = None
) -> list[Outcome]:
    """Call ``function(rank, *args)`` in ``world`` ranks of one gloo process group.

    A rank that hangs is ended after ``timeout_s`` and reported as error ``Hang``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receivers, processes = [], []
    for rank in range(world):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(rank, world, port, sender, environ or {}, function, args))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + timeout_s
    outcomes = []
    for receiver in receivers:
        try:
            ready = receiver.poll(max(0.0, deadline - time.monotonic()))
            outcomes.append(receiver.recv() if ready else Outcome(error="Hang", message=f"no answer in {timeout_s} s"))
        except EOFError:
            outcomes.append(Outcome(error="Died", message="the process ended without an answer"))
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
    return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """Return what the ranks returned; fail with the first error."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.error}: {outcome.message}"
    return [outcome.value for outcome in outcomes]


def _rank(
    rank: int, world: int, port: int, sender: Any, environ: dict[str, str], function: Any, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), **environ})
    start = time.monotonic()
    try:
        if "NO_PROCESS_GROUP" not in environ:
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group(
                "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
        outcome = Outcome(value=function(rank, *args))
    except BaseException as error:
        text = (
            str(error) + (f" <- {error.__cause__!r}" if error.__cause__ is not None else "") or traceback.format_exc()
        )
        outcome = Outcome(error=type(error).__name__, message=text)
    outcome.seconds = time.monotonic() - start
    sender.send(outcome)
    sender.close()
    if outcome.error is None and dist.is_initialized():
        dist.barrier()
    os._exit(0)  # gloo's threads may abort at the interpreter's own exit
