"""Ranks agree on one plan before anything is sharded, through the process group's store: never a GPU collective."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch.distributed as dist

from dmt_compile import errors, torch_internals
from dmt_compile.errors import CollectiveError, DmtError
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.torch_internals import Store

_rounds = count()
_LAST_WORDS_S = 5.0


def signature(tables: Sequence[TableSpec], options: str, shapes: object) -> str:
    """Return what has to be equal on every rank before one plan can serve all: model and options, not the batch."""
    content = [(t.name, t.rows, t.dim, t.dtype, t.features) for t in tables]
    return f"{len(tables)} tables, {hashlib.sha256(repr((content, options, shapes)).encode()).hexdigest()[:16]}"


def agree(make_plan: Callable[[], TowerPlan], mine: Callable[[], str], timeout_s: float) -> TowerPlan:
    """Return rank 0's plan on every rank.

    Args:
        make_plan: makes the plan; called on rank 0 alone.
        mine: returns this rank's signature; an error that it raises is raised on every rank.
        timeout_s: seconds to wait for the other ranks, which may still be compiling or loading.

    Raises:
        DmtError: the same on every rank: a rank's own error, differing signatures, or a rank that did not arrive.
    """
    rank, world, store = dist.get_rank(), dist.get_world_size(), torch_internals.default_store()
    prefix = f"dmt/plan/{next(_rounds)}"
    own_error: DmtError | None = None
    try:
        store.set(f"{prefix}/{rank}", "ok " + mine())
    except DmtError as error:
        own_error = error
        store.set(f"{prefix}/{rank}", f"error {type(error).__name__} rank {rank}: {error.message}")
    if rank == 0:
        verdict = _verdict(store, prefix, world, make_plan, timeout_s)
        store.set(f"{prefix}/verdict", verdict)
        if not verdict.startswith("plan "):  # this process may hold the store: stay until the others have read it
            _wait(store, [f"{prefix}/read/{other}" for other in range(1, world)], _LAST_WORDS_S)
    missing = _wait(store, [f"{prefix}/verdict"], timeout_s + 5)
    if missing:
        raise CollectiveError(
            f"plan: expected rank 0's plan within {timeout_s:.0f} s, found that rank 0 did not arrive; call the model "
            "on every rank"
        )
    verdict = store.get(f"{prefix}/verdict").decode()
    store.set(f"{prefix}/read/{rank}", "")
    kind, _, text = verdict.partition(" ")
    if kind == "plan":
        return TowerPlan.from_json(text)
    if own_error is not None:
        raise own_error
    raise getattr(errors, kind)(text)


def _verdict(store: Store, prefix: str, world: int, make_plan: Callable[[], TowerPlan], timeout_s: float) -> str:
    keys = [f"{prefix}/{rank}" for rank in range(world)]
    missing = _wait(store, keys, timeout_s)
    if missing:
        absent = [int(key.rsplit("/", 1)[1]) for key in missing]
        return (
            f"CollectiveError plan: expected all {world} ranks within {timeout_s:.0f} s, found that ranks {absent} did "
            "not arrive; call the model on every rank"
        )
    answers = [store.get(key).decode() for key in keys]
    for answer in answers:
        if answer.startswith("error "):
            _, kind, text = answer.split(" ", 2)
            return f"{kind} {text}"
    others = [rank for rank, answer in enumerate(answers) if answer != answers[0]]
    if others:
        return (
            f"PlanError plan: expected the same model and options on every rank, found {answers[0][3:]} on rank 0 and "
            f"{answers[others[0]][3:]} on rank {others[0]} (ranks {others} differ); build the model and call "
            "torch.compile alike on every rank"
        )
    try:
        return "plan " + make_plan().to_json()
    except DmtError as error:
        return f"{type(error).__name__} {error.message}"


def _wait(store: Store, keys: list[str], timeout_s: float) -> list[str]:
    """Wait for keys; return those that did not come."""
    deadline, pause = time.monotonic() + timeout_s, 0.001
    waiting = list(keys)
    while waiting:
        try:
            waiting = [key for key in waiting if not store.check([key])]
        except RuntimeError:  # the store went with its rank
            return waiting
        if waiting and time.monotonic() > deadline:
            return waiting
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    return []


def describe_options(values: dict[str, object]) -> str:
    """Return options as text that is equal on ranks with equal options."""
    return json.dumps({name: getattr(value, "__qualname__", str(value)) for name, value in sorted(values.items())})
