"""The flat model through ``torch.compile(model, backend="dmt")``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from models import DLRM
from torch import Tensor

import dmt_compile
from cluster.programs import Step
from cluster.workload import Batch, Workload, loss_of
from dmt_compile.runtime.distributed_session import state_of


def topology(one_host: bool) -> str:
    """Return the emulated cluster's topology, or what it is to a program that takes all links for the same."""
    ranks = int(os.environ["WORLD_SIZE"])
    local_ranks = ranks if one_host else int(os.environ["LOCAL_WORLD_SIZE"])
    return f"{ranks // local_ranks}x{local_ranks}"


def build(
    flat: DLRM,
    workload: Workload,
    batches: list[Batch],
    options: dict[str, Any] | None = None,
    dense_compiler: str = "inductor",
    prefetch: bool = False,
    defer: bool = False,
    one_host: bool = False,
) -> Step:
    """Return the training step.

    Args:
        flat: the flat model.
        workload: its sizes.
        batches: local batches.
        options: of the backend, beside topology and dense compiler.
        dense_compiler: what compiles the dense parts.
        prefetch: send the next batch's ids while a step computes.
        defer: let the optimizer's step on dense parameters wait for the next step.
        one_host: compile for one host of all ranks, as for links that are all as fast.
    """
    every = {"topology": topology(one_host), "dense_compiler": dense_compiler} | (options or {})
    compiled = torch.compile(flat, backend="dmt", options=every)
    dmt_compile.warmup(compiled, batches[0].inputs())
    optimizer = torch.optim.SGD(flat.parameters(), lr=workload.lr)
    deferred = dmt_compile.defer_step(optimizer, compiled) if defer else None

    items = [(batch.inputs(), batch.labels_B) for batch in batches]
    upcoming: Iterator[Any] = cycle(items)
    if prefetch:
        upcoming = dmt_compile.prefetch(upcoming, compiled, batch_of=lambda item: item[0])

    def step() -> tuple[Tensor, Tensor]:
        inputs, labels_B = next(upcoming)
        optimizer.zero_grad()
        logits_B = compiled(*inputs)
        loss = loss_of(logits_B, labels_B)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits_B.detach()

    state = next(state for state in map(state_of, flat.parameters()) if state is not None)
    return Step(step, state) if deferred is None else Step(step, state, deferred.finish)
