"""fold_blocks: features are read where the last exchange put them."""

from __future__ import annotations

import pytest
import torch

from dmt_compile import SimulatedWorld
from dmt_compile.errors import VerifyError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, ops
from dmt_compile.ir.pass_base import PassReport
from dmt_compile.ir.verifier import verify
from dmt_compile.passes.fold_blocks import FoldBlocks
from tests.passes._harness import dlrm, ragged
from tests.passes.test_fold_joins import Joins, batch, fold

NAME = "fold_blocks"


@pytest.mark.parametrize(
    ("topology", "hop", "factor"), [("2x2", "peer", 0.25), ("1x2", "intra", 0.5), ("2x1", "peer", 0.5)]
)
def test_blocks_are_split_and_not_joined(topology: str, hop: str, factor: float) -> None:
    graph = dlrm(topology)
    graph.advance("fold_joins")
    before = graph.count(ex.join_blocks)
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    assert graph.node(ex.split_blocks).args[2:4] == (hop, factor)
    assert graph.count(ex.join_blocks) == before - 1
    assert graph.count(ops.split_features) == graph.count(gradient_ops.scale_gradient) == 0


def test_rows_lie_as_far_apart_as_those_of_a_block() -> None:
    graph = dlrm("2x2")
    graph.advance(NAME)
    split = graph.node(ex.split_blocks)
    layout = split.args[1].meta["val"].layout  # type: ignore[union-attr]
    for item in split.users:
        group = layout.topology.host_of(layout.owners[item.args[1]])
        assert item.meta["val"].stride() == (layout.group_width(group), 1)


def test_without_gradients_nothing_is_scaled() -> None:
    graph = dlrm("2x2", training=False)
    assert graph.advance(NAME).matched == 1
    assert graph.node(ex.split_blocks).args[3] == 1.0


def test_sums_of_row_pieces_stay_joined() -> None:
    graph = dlrm("1x2", partition=[["emb.2", "emb.0[0:3]", "emb.0[3:6]", "emb.1"]])
    report = graph.advance(NAME)
    assert not report.changed
    assert [why for _, why in report.skipped] == ["its features come from add_blocks, not from blocks"]


@pytest.mark.parametrize(
    ("partition", "slices", "splits"),
    [
        ([["emb.0", "emb.1"], ["emb.2", "emb.3"]], 1, 0),  # all features in the model's order
        ([["emb.0", "emb.2"], ["emb.1", "emb.3"]], 0, 1),  # no two side by side
        ([["emb.2", "emb.3"], ["emb.0", "emb.1"]], 0, 1),  # two slices
    ],
)
def test_what_is_no_single_slice_is_left_to_it(partition: list[list[str]], slices: int, splits: int) -> None:
    model = Joins(lambda x, v: torch.stack([x, *v], dim=1), (4, 4, 4, 4))
    graph, _ = fold(model, "2x1", partition=partition)
    assert graph.count(torch.narrow) == slices
    assert graph.advance(NAME).matched == splits
    outputs = SimulatedWorld("2x1").run(model, [batch(3, 4), batch(2, 4)], dense_compiler="eager", partition=partition)
    for output, (x, ids) in zip(outputs, (batch(3, 4), batch(2, 4)), strict=True):
        assert torch.equal(output, model(x, ids))


def test_a_slice_of_several_features_keeps_them_joined() -> None:
    graph = dlrm("2x2")
    graph.advance("fold_joins")
    scaled = graph.node(gradient_ops.scale_gradient)
    with graph.gm.graph.inserting_after(scaled):
        graph.ctx.call(graph.gm, torch.narrow, scaled, 1, 0, 2, like=scaled)
    report = FoldBlocks().run(graph.gm, graph.ctx)
    assert (report.changed, [reason for _, reason in report.skipped]) == (
        False,
        ["several features are read as one slice"],
    )


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (3, 0.5, "scales its gradient by 0.5, expected 0.25"),
        (4, (8, 8, 8), r"comes from the steps .* expected .*'run_towers'"),
        (4, (1,), "does not accept its arguments: StopIteration"),
    ],
)
def test_the_verifier_holds_it_to_the_steps_that_it_replaces(place: int, wrong: object, said: str) -> None:
    graph = dlrm("2x2")
    graph.advance(NAME)
    split = graph.node(ex.split_blocks)
    given = [*split.args, None][:5]
    given[place] = wrong
    split.args = tuple(given)
    with pytest.raises(VerifyError, match=said):
        verify(graph.gm, graph.ctx, FoldBlocks.gives, NAME)


@pytest.mark.parametrize("topology", ["2x2", "1x4", "4x1", "3x2"])
def test_gradients_are_bitwise_those_of_joined_blocks(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = ragged(topology)
    found = []
    for matches in (True, False):
        if not matches:
            monkeypatch.setattr(FoldBlocks, "run", lambda *_: PassReport(changed=False))
        model.zero_grad()
        outputs = SimulatedWorld(topology).run(model, batches, dense_compiler="eager")
        torch.cat(outputs).square().sum().backward()
        found.append([torch.cat(outputs).detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for mine, theirs in zip(found[0], found[1], strict=True):
        assert torch.equal(mine, theirs)
