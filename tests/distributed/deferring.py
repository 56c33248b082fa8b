"""What ranks do in the tests of deferred steps; each function runs in every rank."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch

import dmt_compile
from dmt_compile.runtime.coming_gradients import ComingGradient
from dmt_compile.runtime.deferred_step import DeferredStep
from dmt_compile.runtime.tables import ShardedTable
from tests.distributed.prefetching import local
from tests.distributed.scenarios import compiled
from tests.models import DLRM, make_batch


class Training:
    """A model in training, its steps done in all the ways that tell whether a step is late.

    A way takes a batch and does what is to be compared; it returns numbers that a late step would change.
    """

    def __init__(self, deferred: bool, topology: str, state: dict[str, Any], **options: Any) -> None:
        self.model = DLRM()
        self.model.load_state_dict(copy.deepcopy(state))
        self.compiled = compiled(self.model, topology=topology, **options)
        if "tower_module" in options:
            dmt_compile.warmup(self.compiled, make_batch(self.model, 2, torch.Generator().manual_seed(0)))
        self.optimizer = torch.optim.Adagrad(self.model.parameters(), 0.1)
        before = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)  # both wrap the optimizer's step
        self.deferred = dmt_compile.defer_step(self.optimizer, self.compiled) if deferred else None
        self.schedules = before, torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.8)
        self.late: dict[str, int] = {}

    @property
    def dense(self) -> list[torch.Tensor]:
        """Dense parameters that the program holds."""
        towered = getattr(self.model, "dmt_towers", None)
        replaced = {} if towered is None else towered.replacements()
        return [*replaced.values()] + [
            p
            for name, p in self.model.named_parameters()
            if not isinstance(p, ShardedTable) and not name.startswith("dmt_towers") and name not in replaced
        ]

    def backward(self, batch: Any) -> torch.Tensor:
        output = self.compiled(*batch)
        output.square().sum().backward()
        return output.detach()

    def ends(self, way: str) -> None:
        self.optimizer.step()
        if self.deferred is not None:
            self.late[way] = self.late.get(way, 0) + (self.deferred._due is not None)

    def plain(self, batch: Any) -> Any:
        output = self.backward(batch)
        self.ends("plain")
        self.optimizer.zero_grad()
        return output

    def scheduled(self, batch: Any) -> Any:
        output = self.backward(batch)
        self.ends("scheduled")
        for schedule in self.schedules:
            schedule.step()
        self.optimizer.zero_grad()
        return output

    def clipped(self, batch: Any) -> Any:
        self.backward(batch)
        norm = dmt_compile.clip_grad_norm_(self.model.parameters(), 0.01)
        self.ends("clipped")
        self.optimizer.zero_grad()
        return norm

    def clipped_by_pytorch(self, batch: Any) -> Any:
        self.backward(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.dense, 0.01)
        self.ends("clipped_by_pytorch")
        self.optimizer.zero_grad()
        return norm

    def gradients_are_read_after(self, batch: Any) -> Any:
        self.backward(batch)
        self.ends("gradients_are_read_after")
        assert all(p.grad is not None for p in self.dense)
        norms = [torch.linalg.vector_norm(p.grad) for p in self.dense]  # type: ignore[arg-type]
        weights = [p.detach().clone() for p in self.dense]
        self.optimizer.zero_grad()
        return norms + weights

    def zeroed_in_place(self, batch: Any) -> Any:
        output = self.backward(batch)
        self.ends("zeroed_in_place")
        self.optimizer.zero_grad(set_to_none=False)
        return output

    def accumulated(self, batch: Any) -> Any:
        outputs = self.backward(batch), self.backward(batch)
        self.ends("accumulated")
        self.optimizer.zero_grad()
        return outputs

    def kept(self, batch: Any) -> Any:
        first = self.backward(batch)
        self.ends("kept")  # the next step's gradients are added to this one's
        second = self.backward(batch)
        self.ends("kept")
        self.optimizer.zero_grad()
        return first, second

    def evaluated(self, batch: Any) -> Any:
        self.backward(batch)
        self.ends("evaluated")
        with torch.no_grad():
            output = self.compiled(*batch)  # the program for it is compiled while gradients are on their way
        self.optimizer.zero_grad()
        return output

    def saved(self, batch: Any) -> Any:
        self.plain(batch)
        state = dmt_compile.full_state_dict(self.model)
        return [state[name] for name in sorted(state)]

    def optimizer_saved(self, batch: Any) -> Any:
        self.plain(batch)
        state = self.optimizer.state_dict()["state"]
        return [state[key]["sum"] for key in sorted(state) if not isinstance(state[key]["sum"], ShardedTable)]

    def loaded(self, batch: Any) -> Any:
        self.plain(batch)
        self.model.top.load_state_dict({name: torch.full_like(p, 0.5) for name, p in self.model.top.named_parameters()})
        return self.plain(batch)

    def finished(self, batch: Any) -> Any:
        self.plain(batch)
        if self.deferred is not None:
            self.deferred.finish()
        return [p.detach().clone() for p in self.dense]

    def frozen(self, batch: Any) -> Any:
        self.plain(batch)
        self.model.bottom.requires_grad_(False)  # read in the next step without a gradient of its own
        output = self.plain(batch)
        self.model.bottom.requires_grad_(True)
        return output

    def of_the_caller(self, batch: Any) -> Any:
        return torch.autograd.grad(self.compiled(*batch).square().sum(), self.dense)


WAYS: list[Callable[[Training, Any], Any]] = [
    Training.plain, Training.scheduled, Training.clipped, Training.plain, Training.clipped_by_pytorch,
    Training.gradients_are_read_after, Training.zeroed_in_place, Training.plain, Training.accumulated, Training.kept,
    Training.evaluated, Training.saved, Training.optimizer_saved, Training.loaded, Training.finished,
    Training.frozen, Training.of_the_caller, Training.scheduled, Training.plain,
]  # fmt: skip


def with_and_without(rank: int, topology: str, prefetched: bool = False, **options: Any) -> dict[str, Any]:
    """Train twice, deferred and not; return the ways that differ, and how many steps of each way were deferred."""
    torch.manual_seed(0)
    state = DLRM().state_dict()
    seen, late = [], {}
    for deferred in (False, True):
        torch.manual_seed(0)
        training = Training(deferred, topology, state, **options)
        generator = torch.Generator().manual_seed(rank)
        batches: Any = [make_batch(training.model, (number + rank) % 4, generator) for number in range(len(WAYS))]
        found = []
        if prefetched:
            batches = dmt_compile.prefetch(batches, training.compiled)
        for way, batch in zip(WAYS, batches, strict=True):
            found.append((way.__name__, _flat(way(training, batch))))
        if training.deferred is not None:
            training.deferred.finish()
            late = training.late
        found.append(("at the end", list(map(local, training.model.parameters()))))
        seen.append(found)
    differ = [
        name
        for (name, mine), (_, theirs) in zip(*seen, strict=True)
        if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    ]
    return {"differ": differ, "late": late}


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    return [] if value is None else [leaf for part in value for leaf in _flat(part)]


def without_finishing(rank: int) -> list[str]:
    """Train with steps that are never finished, and return the ways whose numbers differ: the tests above can fail."""
    finish = DeferredStep.finish
    DeferredStep.finish = lambda self: setattr(self, "_due", None)  # type: ignore[method-assign,assignment]
    try:
        return list(dict.fromkeys(with_and_without(rank, "1x2")["differ"]))
    finally:
        DeferredStep.finish = finish  # type: ignore[method-assign]


def two_optimizers(rank: int) -> bool:
    """Defer the steps of the optimizer of a part of the dense parameters; return whether gradients come later."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, topology="1x2")
    dmt_compile.defer_step(torch.optim.SGD(model.top.parameters(), 0.1), step_model)
    step_model(*make_batch(model, 3, torch.Generator().manual_seed(rank))).sum().backward()
    return any(isinstance(p.grad, ComingGradient) for p in model.parameters())


class InTwoGraphs(DLRM):
    """A model of two programs: a graph break stands in front of the over-arch."""

    def __init__(self) -> None:
        super().__init__(dims=(8, 4, 4, 4, 4))

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        looked_up = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        joined = torch.cat([self.bottom(dense), *looked_up], dim=1)
        torch._dynamo.graph_break()
        return self.top(joined).squeeze(1)


def optimizers_of_two_programs(rank: int) -> tuple[bool, list[bool]]:
    """Train and evaluate in turn with an optimizer for each of a model's two programs, deferred and not.

    Returns:
        Whether the outputs are equal, and of each step asked for whether it was deferred.
    """
    seen, late = [], []
    for deferred in (False, True):
        torch.manual_seed(0)
        model = InTwoGraphs()
        step_model = compiled(model, topology="1x2")
        parts = [[*model.emb.parameters(), *model.bottom.parameters()], [*model.top.parameters()]]
        optimizers = [torch.optim.SGD(part, 0.1) for part in parts]
        waiting = [dmt_compile.defer_step(o, step_model) for o in optimizers] if deferred else []
        generator = torch.Generator().manual_seed(rank)
        outputs = []
        for _ in range(3):
            batch = make_batch(model, 3, generator)
            outputs.append(step_model(*batch))
            outputs[-1].square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            late += [step._due is not None for step in waiting]
            with torch.no_grad():
                outputs.append(step_model(*batch))
            for optimizer in optimizers:
                optimizer.zero_grad()
        seen.append(outputs)
    return all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), late


def a_rank_that_ends(rank: int) -> str:
    """End rank 1 between its deferred step and the next; return the error of the others."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, topology="2x2", timeout_s=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dmt_compile.defer_step(optimizer, step_model)
    generator = torch.Generator().manual_seed(rank)
    for step in range(4):
        step_model(*make_batch(model, 2, generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1 and step == 2:
            os._exit(0)
    return "finished"
