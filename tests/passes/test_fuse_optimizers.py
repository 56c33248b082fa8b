"""What the report says of optimizers in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.api import explain
from dmt_compile.inspection.explanation import explanation_text
from dmt_compile.ir.pass_base import PassReport
from dmt_compile.ir.stages import Effect
from dmt_compile.optim import RowWiseAdagrad
from tests.in_backward import attach
from tests.models import DLRM, make_batch
from tests.passes._harness import capture


class TwoLengths(nn.Module):
    """One table read for each sample and for each position of a sequence; another read for samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(20, 4, sparse=True)
        self.alone = nn.Embedding(10, 4, sparse=True)
        self.mix = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        attended = torch.softmax(self.mix(self.shared(history)), dim=1).sum(1)
        return (attended + self.shared(ids) + self.alone(ids % 10)).sum(1)


def report_of(model: nn.Module, batch: tuple[Any, ...], topology: str = "1x1", training: bool = True) -> PassReport:
    return capture(model, batch, training).on(topology).advance("fuse_optimizers")


def dlrm(sparse: bool = True) -> DLRM:
    torch.manual_seed(0)
    return DLRM(sparse=sparse)


def batch_of(model: DLRM) -> tuple[Any, ...]:
    return make_batch(model, 4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("topology", ["1x1", "2x2"])
def test_names_and_reasons(topology: str) -> None:
    model = dlrm()
    weights = [table.weight for table in model.emb]
    attach(torch.optim.Adagrad, weights[:2], {"lr": 0.1})
    attach(RowWiseAdagrad, weights[2:3], {"lr": 0.1})
    attach(torch.optim.SGD, weights[3:4], {"lr": 0.1, "momentum": 0.9})
    report = report_of(model, batch_of(model), topology=topology)
    assert report.notes == (
        "Adagrad steps in the backward pass of the lookups, without gradients, for 2 tables: emb.0, emb.1",
        "RowWiseAdagrad steps in the backward pass of the lookups, without gradients, for 1 tables: emb.2",
    )
    assert report.skipped == (("emb.3", "SGD with momentum moves rows without gradient"),)
    assert (report.changed, report.matched, report.effect) == (True, 3, Effect.EXACT)


@pytest.mark.parametrize(("sparse", "optimizer"), [(False, torch.optim.Adagrad), (True, torch.optim.SGD)])
def test_sums_in_another_order_are_said(sparse: bool, optimizer: type[torch.optim.Optimizer]) -> None:
    model = dlrm(sparse)
    attach(optimizer, model.emb.parameters(), {"lr": 0.1})
    report = report_of(model, batch_of(model))
    assert (report.matched, report.effect) == (5, None)  # the pass's own: REORDERED


def test_a_table_that_is_read_with_two_numbers_of_bags() -> None:
    model = TwoLengths()
    attach(torch.optim.SparseAdam, [model.shared.weight, model.alone.weight], {})
    report = report_of(model, (torch.tensor([1, 2, 3]), torch.tensor([[1, 2], [3, 4], [5, 6]])))
    assert [name for name, _ in report.skipped] == ["shared"]
    assert "other numbers of bags" in report.skipped[0][1]
    assert report.matched == 1


@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_say(training: bool) -> None:
    model = dlrm()
    if not training:
        attach(torch.optim.SGD, model.emb.parameters(), {"lr": 0.1})
    report = report_of(model, batch_of(model), training=training)
    assert report == PassReport(changed=False, effect=Effect.EXACT)


def test_an_explanation_shows_it() -> None:
    model = dlrm()
    attach(RowWiseAdagrad, [table.weight for table in model.emb][:4], {"lr": 0.1})
    attach(torch.optim.SparseAdam, [model.emb[4].weight], {"maximize": True})
    text = explanation_text(explain(model, batch_of(model), topology="2x2"))
    assert "RowWiseAdagrad steps in the backward pass of the lookups, without gradients, for 4 tables: emb.0" in text
    assert "SparseAdam with maximize is not done on rows alone" in text
