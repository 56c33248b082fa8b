"""Train one variant of one model once: the same loop, epochs and choice of epoch for flat models and towers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from quality_data import Inputs, QualityData
from quality_models import MODELS, Settings
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import dmt_compile

from metrics import auc  # isort: skip  (examples/ is on the path since quality_data)

EVALUATION_SAMPLES = 16_384
PLANNING_SAMPLES = 64


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Args:
        partition: ``"flat"`` (no towers), or a partition of the compiler, such as ``"strided"`` or, with the signal
            that its interactions were measured by, ``"coherent:cosine"``.
        towers: their number; 0 for ``"flat"``.
        compression: columns that all features have / columns that all towers send, as asked for.
        module: kind of Tower Module.
        options: of that kind.
    """

    partition: str = "flat"
    towers: int = 0
    compression: int = 1
    module: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for it, the same for the same variant."""
        if self.module is None:
            return self.partition
        options = ",".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.partition} T{self.towers} {self.compression}x {self.module}({options})"


@dataclass(frozen=True)
class Score:
    """Results of one training: AUC and log loss at the epoch that was best on validation rows, and that epoch."""

    valid_auc: float
    test_auc: float
    test_logloss: float
    epoch: int
    seconds: float


def flat_model(data: QualityData, model: str, settings: Settings, seed: int) -> nn.Module:
    """Return the untrained flat model of a seed."""
    torch.manual_seed(seed)
    return MODELS[model](data.table_rows, data.dense_NI.shape[1], settings)


def planning_batch(data: QualityData) -> Inputs:
    """Return the few samples that the compiler traces with."""
    return next(iter(data.batches(data.train[:PLANNING_SAMPLES], PLANNING_SAMPLES)))[0]


def make_plan(
    flat: nn.Module, data: QualityData, variant: Variant, partition: str | Sequence[Sequence[str]]
) -> dmt_compile.TowerPlan:
    """Return the plan of a variant's towers and modules; each tower is one host of one rank."""
    return dmt_compile.plan(
        flat, planning_batch(data), f"{variant.towers}x1", partition=partition, tower_module=variant.module,
        tower_module_options=dict(variant.options),
    )  # fmt: skip


def towered(flat: nn.Module, data: QualityData, plan: dmt_compile.TowerPlan, seed: int) -> nn.Module:
    """Return the model with the plan's Tower Modules, their initial values those of a seed."""
    assert plan.tower_modules is not None
    seeded = replace(plan, tower_modules=replace(plan.tower_modules, seed=seed))
    return dmt_compile.transform(flat, planning_batch(data), seeded)


def train(
    module: nn.Module,
    data: QualityData,
    settings: Settings,
    seed: int,
    show: Callable[[int, float], None] = lambda epoch, valid_auc: None,
) -> Score:
    """Train a model; the same for the same arguments on one machine.

    Args:
        module: in its initial state; left as the last epoch leaves it.
        data: what to train, choose the epoch and test on.
        settings: hyper-parameters.
        seed: of the order of the rows and of dropout.
        show: is told the epoch and its validation AUC.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    tables = [p for name, p in module.named_parameters() if name.startswith("emb.")]
    others = [p for name, p in module.named_parameters() if not name.startswith("emb.")]
    optimizer = torch.optim.Adam(
        [{"params": tables, "weight_decay": settings.weight_decay}, {"params": others}], lr=settings.lr, fused=True
    )
    steps = settings.epochs * -(-data.train.numel() // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best = Score(0.0, 0.0, 0.0, 0, 0.0)
    for epoch in range(1, settings.epochs + 1):
        module.train()
        for inputs, labels_B in data.batches(data.train, settings.batch_size, shuffle_seed=seed * 1000 + epoch):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(module(*inputs), labels_B).backward()
            optimizer.step()
            schedule.step()
        valid_auc, _ = evaluate(module, data, data.valid)
        show(epoch, valid_auc)
        if valid_auc > best.valid_auc:
            best = Score(valid_auc, *evaluate(module, data, data.test), epoch, 0.0)
    seconds = time.perf_counter() - start
    return Score(best.valid_auc, best.test_auc, best.test_logloss, best.epoch, seconds)


@torch.no_grad()
def evaluate(module: nn.Module, data: QualityData, rows: Tensor) -> tuple[float, float]:
    """Return AUC and log loss over some rows."""
    module.eval()
    scores, labels = [], []
    for inputs, labels_B in data.batches(rows, EVALUATION_SAMPLES):
        scores.append(module(*inputs))
        labels.append(labels_B)
    logits_N, labels_N = torch.cat(scores), torch.cat(labels)
    return auc(logits_N, labels_N), float(binary_cross_entropy_with_logits(logits_N, labels_N))
