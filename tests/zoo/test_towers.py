"""Tower Modules over the zoo: one that changes nothing leaves all as it is; others train, or the reason is given."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.errors import ConfigError
from dmt_compile.ir.pass_base import PassReport, placeholders
from dmt_compile.ir.verifier import verify
from dmt_compile.pipeline import passes_in_order
from dmt_compile.tower_modules import TowerSpec
from tests._tolerances import assert_reordered
from tests.passes._harness import Captured, capture
from tests.zoo.entry import Entry
from tests.zoo.libraries import LIBRARIES
from tests.zoo.models import ZOO

# Model -> part of the reason why not even a module that changes nothing fits.
REFUSED = {
    "mixed_dimension": "stack joins 3 dimensions along dimension 0",
    "tied_projection": "no cat or stack joins the vectors of several features",
    "graph_break": "no cat or stack joins the vectors of several features",
    "codebook": "feature assignment is joined twice",
}
# Not one graph of tensors alone, which is all that can be looked at here without running Dynamo's own code around it.
ELSEWHERE = {"torchrec.DLRM", "torchrec.DLRM_DCN"}
ENTRIES = tuple(entry for entry in (*ZOO, *LIBRARIES) if entry.name not in ELSEWHERE)
every_model = pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=pytest.mark.slow if entry in LIBRARIES else []) for entry in ENTRIES], ids=str
)


class Unchanged(nn.Module):
    """Sends what it gets."""

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        return embs.flatten(1)


def unchanged(tower: TowerSpec) -> nn.Module:
    return Unchanged()


@lru_cache
def _captured(name: str) -> Captured:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    torch.manual_seed(0)
    model = entry.build()
    return capture(model, entry.batch(6, torch.Generator().manual_seed(0)))


def captured(entry: Entry) -> Captured:
    """Return a model's first graph, captured once for all tests."""
    return _captured(entry.name)


def towered(entry: Entry, **options: Any) -> tuple[Captured, PassReport]:
    """Return a model's graph with Tower Modules, three towers of tables that are no neighbours."""
    case = captured(entry).on("1x1", towers=3, partition="strided", **options)
    return case, advance(case, "insert_tower_modules")


def advance(case: Captured, last: str) -> PassReport:
    """Run the passes up to ``last`` and verify once: other tests verify after each."""
    with torch.set_grad_enabled(case.ctx.training):
        for step in passes_in_order(case.ctx.options):
            report = step.run(case.gm, case.ctx)
            if step.name == last:
                break
        case.gm.recompile()
        verify(case.gm, case.ctx, step.gives, step.name)
    return report


def run(case: Captured) -> list[torch.Tensor]:
    values = {**case.ctx.parameters, **case.ctx.inputs}
    return [out for out in case.gm(*(values.get(node.name) for node in placeholders(case.gm))) if torch.is_tensor(out)]


def gradients(case: Captured, outputs: list[torch.Tensor]) -> tuple[list[str], list[torch.Tensor | None]]:
    """Return the flat parameters' names, and their gradients for a loss of all outputs."""
    flat = {n: p for n, p in captured_parameters(case).items() if p.requires_grad}
    loss = torch.stack([out.float().square().sum() for out in outputs if out.requires_grad]).sum()
    return list(flat), list(torch.autograd.grad(loss, list(flat.values()), allow_unused=True))


def captured_parameters(case: Captured) -> dict[str, torch.Tensor]:
    """Return the parameters among the graph's inputs."""
    inputs = [node.name for node in placeholders(case.gm)]
    return {name: case.ctx.parameters[name] for name in inputs if name in case.ctx.parameters}


@every_model
def test_a_module_that_changes_nothing_leaves_every_number_as_it_is(entry: Entry) -> None:
    flat = captured(entry).on("1x1")
    advance(flat, "partition_towers")
    case, report = towered(entry, tower_module=unchanged)
    if entry.name in REFUSED:
        assert not report.changed
        assert REFUSED[entry.name] in report.skipped[0][1]
        return
    assert report.changed
    assert case.ctx.towers is not None
    assert case.ctx.towers.replacements() == {}
    outputs, expected = run(case), run(flat)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(mine, theirs)
    for name, mine, theirs in zip(*gradients(case, outputs), gradients(flat, expected)[1], strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_reordered(mine.to_dense(), theirs.to_dense(), longest_sum=64, gradient=True)


@every_model
@pytest.mark.parametrize(("kind", "half"), [("dlrm", True), pytest.param("dcn", False, marks=pytest.mark.slow)])
def test_a_model_with_towers_trains_or_says_why_not(entry: Entry, kind: str, half: bool) -> None:
    graph = captured(entry).on("1x1")
    advance(graph, "partition_towers")
    tables = graph.ctx.embedding_graph.tables
    dim = max((table.dim for table in tables), default=2)
    shapes = [out.shape for out in run(graph)]
    options = {"dim": dim // 2} if half else {}
    try:
        case, report = towered(entry, tower_module=kind, tower_module_options=options)
    except ConfigError as error:  # a kind that does not take these features at all
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "features of one width" in refusal
        return
    if not report.changed:
        node, reason = report.skipped[0]
        assert reason.startswith("Tower Modules are refused: ")
        assert case.ctx.embedding_graph.unmatched[-1].node == node
        assert ".py:" in case.ctx.embedding_graph.unmatched[-1].source_line
        assert case.ctx.plan is not None
        assert reason.removeprefix("Tower Modules are refused: ") in case.ctx.plan.notes[-1]
        return
    outputs = run(case)
    assert [out.shape for out in outputs] == shapes
    torch.stack([out.square().sum() for out in outputs if out.requires_grad]).sum().backward()
    assert case.ctx.towers is not None
    for name, parameter in case.ctx.towers.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    case.ctx.towers.zero_grad()
