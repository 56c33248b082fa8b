"""What ranks do in the tests of prefetching; each function runs in every rank."""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import dmt_compile
from dmt_compile.runtime.program import Program
from dmt_compile.runtime.tables import ShardedTable
from dmt_compile.runtime.world import ProcessWorld
from tests.distributed.scenarios import compiled
from tests.models import DLRM, Mixture, make_batch

STEPS = 6


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a parameter."""
    return (parameter.local if isinstance(parameter, ShardedTable) else parameter.detach()).clone()


class Rests:
    """Counts the calls of programs that found their batch distributed before."""

    def __init__(self) -> None:
        self.number = 0
        whole = Program._rest

        def counting(program: Program, args: tuple[Any, ...]) -> Any:
            graph, given = whole(program, args)
            self.number += graph is not program.gm
            return graph, given

        Program._rest = counting  # type: ignore[method-assign]  # in a process of its own


def batches_of(model: Any, rank: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(rank)
    if isinstance(model, DLRM):
        return [make_batch(model, (step + rank) % 4, generator) for step in range(STEPS)]
    return [model.batch(2 + (rank + step) % 3, generator) for step in range(STEPS)]


def with_and_without(rank: int, kind: str, topology: str, **options: Any) -> dict[str, Any]:
    """Train and evaluate twice, with prefetching and without; return how many steps had their ids in time."""
    torch.manual_seed(0)
    models = [build() for build in [DLRM if kind == "dlrm" else Mixture] * 2]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    batches = batches_of(models[0], rank)
    rests, seen = Rests(), []
    for ahead, model in enumerate(models):
        step_model = compiled(model, topology=topology, **options)
        optimizer = torch.optim.Adagrad(model.parameters(), 0.1)
        found = []
        loader = [(batch, index) for index, batch in enumerate(batches)]
        items = dmt_compile.prefetch(loader, step_model, batch_of=lambda item: item[0]) if ahead else iter(loader)
        for batch, index in items:
            output = step_model(*batch)
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [output.detach(), torch.tensor(index)]
        in_training = rests.number
        with torch.no_grad():
            for batch in dmt_compile.prefetch(batches, step_model) if ahead else batches:
                found.append(step_model(*batch))
        seen.append([*found, *map(local, model.parameters())])
    equal = all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    return {"equal": equal, "training": in_training, "evaluation": rests.number - in_training}


def order_of_a_step(rank: int, deferred: bool) -> list[str]:
    """Return what a forward pass waits for, and when it lets the ids of the next batch leave, once both are there."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, topology="2x2")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if deferred:
        dmt_compile.defer_step(optimizer, step_model)
    timed, submit = ProcessWorld._timed, ThreadPoolExecutor.submit
    events: list[str] = []

    def waiting(self: ProcessWorld, wait: Any, label: str, direction: str | None) -> None:
        if self.name == "step" and direction is not None:
            events.append(label)
        timed(self, wait, label, direction)

    def submitting(self: ThreadPoolExecutor, task: Any, *args: Any) -> Any:
        if self._thread_name_prefix == "dmt_prefetch":
            events.append("ids of the next batch leave")
        return submit(self, task, *args)

    ProcessWorld._timed = waiting  # type: ignore[method-assign]  # in a process of its own
    ThreadPoolExecutor.submit = submitting  # type: ignore[method-assign]
    steps = []
    for batch in dmt_compile.prefetch(batches_of(model, rank), step_model):
        events.clear()
        output = step_model(*batch)
        steps.append(list(events))
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps[3]


def faulty_next_batch(rank: int) -> tuple[int, str]:
    """Give rank 1 a faulty fifth batch; return how many steps were done before the error, and its message."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    batches = batches_of(model, rank)
    if rank == 1:
        batches[4][1][2] = torch.cat([batches[4][1][2], torch.tensor([99])])
    done = 0
    try:
        for batch in dmt_compile.prefetch(batches, step_model):
            step_model(*batch).sum().backward()
            done += 1
    except dmt_compile.BatchError as error:
        good = make_batch(model, 2, torch.Generator().manual_seed(rank))
        assert step_model(*good).shape == (2,)  # the world goes on
        return done, str(error)
    raise AssertionError("expected a BatchError")


def loader_that_ends_early(rank: int, fewer: int) -> Any:
    """Rank 1's loader yields fewer batches than the others'."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, timeout_s=3.0, first_timeout_s=20.0)
    batches = batches_of(model, rank)
    for batch in dmt_compile.prefetch(batches[: STEPS - fewer] if rank == 1 else batches, step_model):
        step_model(*batch).sum().backward()
    if rank == 1:
        time.sleep(8)
    return "finished"


def changed_batch(rank: int) -> bool:
    """Write to a batch after it was sent off: it must be distributed anew."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    rests, equal = Rests(), True
    for batch in dmt_compile.prefetch(batches_of(model, rank), step_model):
        for ids in batch[1]:
            ids.fill_(3)
        output = step_model(*batch)
        again = step_model(*copy.deepcopy(batch))
        equal = equal and torch.equal(output, again)
    return equal and rests.number == 0


class Scaled(nn.Module):
    """Ids that are computed with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.Embedding(9, 3) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        ids = (numbers * self.scale.detach()).long()
        return torch.cat([table(ids) for table in self.emb], dim=1) * self.scale


class Shifted(Scaled):
    """Ids of a batch that the model writes to."""

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers.add_(1)
        return torch.cat([table(numbers.long()) for table in self.emb], dim=1) * self.scale


def computed_ids(rank: int, written: bool) -> list[str]:
    """Return what the log says where ids cannot be distributed ahead."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dmt_compile.runtime.prefetch").addHandler(handler)
    torch.manual_seed(0)
    model = Shifted() if written else Scaled()
    step_model = compiled(model)
    for k, number in enumerate(dmt_compile.prefetch([torch.full((2 + rank,), float(k)) for k in range(5)], step_model)):
        step_model(number).sum().backward()
        assert torch.equal(number, torch.full((2 + rank,), float(k + written)))
    assert dist.is_initialized()
    return lines
