"""Who trains in the train-step benchmark: one step of each on the same tables, with the same optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_models import Flat, Size, StepBatch, flat_of, make_rest
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import dmt_compile

LR = 0.1  # of the dense part; tables have this for each sample, since few samples of a batch meet a row
TOWERS = "dmt-towers"


@dataclass(frozen=True)
class Setting:
    """What holds for all contestants of a model.

    Args:
        model: of ``MODELS``.
        size: of it.
        tables: all contestants train these.
        first: a batch, for what needs one to be built.
        compiler: of dense parts: ``"inductor"``, or another backend of ``torch.compile``.
        options: of ``backend="dmt"``.
        dumps: folder in which each contestant has one for what dmt leaves of compiling.
    """

    model: str
    size: Size
    tables: Sequence[torch.Tensor]
    first: StepBatch
    compiler: str
    options: Mapping[str, Any]
    dumps: Path

    def flat(self, contestant: str, sparse: bool = True) -> Flat:
        """Return a contestant's flat model over the tables, its dense part a copy."""
        rest = make_rest(self.model, self.size).to(self.tables[0].device)
        return flat_of(contestant, self.tables, rest, sparse)

    def dmt(self, contestant: str, model: nn.Module, **options: Any) -> Callable[..., torch.Tensor]:
        """Return a model compiled by our backend."""
        options |= {**self.options, "dump_dir": self.dumps / contestant}
        return torch.compile(model, backend="dmt", options=options)


Step = Callable[[StepBatch], torch.Tensor]


def trainer(call: Callable[..., torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> Step:
    """Return a function that trains on a batch and returns the loss, without waiting for the GPU."""

    def step(batch: StepBatch) -> torch.Tensor:
        loss = binary_cross_entropy_with_logits(call(*batch.inputs), batch.labels_B)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def sgd(model: nn.Module, samples: int, tables: bool = True) -> list[torch.optim.Optimizer]:
    """Return SGD for the dense part and, with ``tables``, for the tables."""
    rest = [p for name, p in model.named_parameters() if not name.startswith("emb.")]
    of_tables = [p for name, p in model.named_parameters() if name.startswith("emb.")]
    optimizers = [torch.optim.SGD(rest, lr=LR)]
    return [*optimizers, torch.optim.SGD(of_tables, lr=LR * samples)] if tables else optimizers


def eager(setting: Setting) -> Step:
    """Everything eager, sparse gradients."""
    model = setting.flat("eager")
    return trainer(model, sgd(model, setting.size.samples))


def inductor(setting: Setting) -> Step:
    """The whole model compiled, dense gradients: sparse ones do not pass through the compiler."""
    model = setting.flat("inductor", sparse=False)
    return trainer(torch.compile(model, backend=setting.compiler), sgd(model, setting.size.samples))


def inductor_rest(setting: Setting) -> Step:
    """The dense part compiled, lookups eager with sparse gradients."""
    model = setting.flat("inductor_rest")
    model.rest.compile(backend=setting.compiler)
    return trainer(model, sgd(model, setting.size.samples))


def dmt(setting: Setting) -> Step:
    """Our backend, sparse gradients and an ordinary optimizer."""
    model = setting.flat("dmt")
    return trainer(setting.dmt("dmt", model), sgd(model, setting.size.samples))


def dmt_fused(setting: Setting) -> Step:
    """Our backend, the tables' optimizer attached to their backward pass."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, samples = setting.flat("dmt_fused"), setting.size.samples
    tables = list(model.emb.parameters())
    _apply_optimizer_in_backward(torch.optim.SGD, tables, {"lr": LR * samples})
    return trainer(setting.dmt("dmt-fused", model), sgd(model, samples, tables=False))


def dmt_towers(setting: Setting) -> Step:
    """Our backend with Tower Modules, as on that many hosts: another model, so its losses are its own."""
    model, size = setting.flat("dmt_towers"), setting.size
    kind, how = ("dlrm", {"dim": size.tower_dim}) if setting.model == "dlrm" else ("dcn", {"rank": size.rank})
    towers = {"towers": size.towers, "partition": "strided", "tower_module": kind, "tower_module_options": how}
    call = setting.dmt(TOWERS, model, topology="1x1", **towers)
    dmt_compile.warmup(call, setting.first.inputs)  # the optimizer needs the towers
    return trainer(call, sgd(model, size.samples))


# In the order in which they are prepared: the last ones are left out where time runs short.
CONTESTANTS: Mapping[str, Callable[[Setting], Step]] = {
    "eager": eager,
    "dmt-fused": dmt_fused,
    "inductor-rest": inductor_rest,
    "dmt": dmt,
    "inductor": inductor,
    TOWERS: dmt_towers,
}
