"""compile_dense_regions: how many regions, what stays outside, and what happens where the compiler fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dmt_compile import torch_internals
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.exchange_ops import start_all_to_all
from dmt_compile.ir.gradient_ops import start_gradients
from dmt_compile.ir.stages import Effect
from dmt_compile.runtime.regions import DenseRegion
from tests.models import DLRM, make_batch, with_two_top_buckets
from tests.passes._harness import Captured, Lookups, assert_compiled_is_eager, bags, capture, dense, dlrm

LINEAR = torch._C._nn.linear
NAME = "compile_dense_regions"


def regions(graph: Captured) -> list[fx.GraphModule]:
    """Return the graphs of the regions, in the order they run."""
    found = [graph.gm.get_submodule(n.target) for n in graph.gm.graph.nodes if n.op == "call_module"]
    assert all(isinstance(region, DenseRegion) for region in found)
    return [region.graph_module for region in found]


def linears(gm: fx.GraphModule) -> int:
    return sum(node.target is LINEAR for node in gm.graph.nodes)


def test_one_rank_has_one_region_with_the_same_numbers() -> None:
    graph = dlrm()
    graph.advance("batch_lookups")
    expected = graph.outputs()
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.skipped, report.effect) == (True, 1, (), Effect.EXACT)
    assert [linears(region) for region in regions(graph)] == [4]
    assert graph.count(LINEAR) == 0
    assert torch.equal(graph.outputs(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_bottom_layers_run_while_embeddings_travel(training: bool) -> None:
    graph = dlrm("2x2", training)
    report = graph.advance(NAME)
    assert (report.matched, report.skipped) == (2, ())
    bottom, top = regions(graph)
    assert (linears(bottom), linears(top)) == (2, 2)
    order = [node for node in graph.gm.graph.nodes if node.op == "call_module" or node.target is start_all_to_all]
    assert order[0].op == "call_module"  # the bottom layers do not wait for the first exchange
    assert order[-1].op == "call_module"


def test_a_region_is_cut_where_a_bucket_of_gradients_leaves() -> None:
    model = with_two_top_buckets(DLRM())
    graph = capture(model, make_batch(model, 4, torch.Generator().manual_seed(0)))
    cut = graph.on("2x2")
    assert cut.advance(NAME).matched == 3
    assert [linears(region) for region in regions(cut)] == [2, 2, 1]
    cut.advance("overlap_collectives")
    order = [node for node in cut.gm.graph.nodes if node.op == "call_module" or node.target is start_gradients]
    assert [node.op == "call_module" for node in order] == [False, True] * 3  # each bucket right before its region
    assert [node.args[2] for node in order[::2]] == [2, 1, 0]
    whole = graph.on("1x1")
    assert whole.advance(NAME).matched == 1


def test_a_layer_that_is_used_again_cuts_nothing() -> None:
    class Twice(nn.Module):
        """A layer before the exchange and after it."""

        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.EmbeddingBag(6, 4, mode="sum")
            self.twice, self.top = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            return self.top(self.twice(self.emb(ids, offsets) + self.twice(dense)))

    graph = capture(Twice(), (*bags(), torch.randn(3, 4))).on("2x2")
    assert graph.advance(NAME).matched == 2
    assert [linears(region) for region in regions(graph)] == [1, 2]


def test_what_feeds_ids_into_lookups_stays_outside() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(ids.remainder(3), offsets), nn.EmbeddingBag(3, 4, mode="sum"))
    graph = capture(model, bags()).on("1x1")
    graph.advance("batch_lookups")
    expected = graph.outputs()
    assert graph.advance(NAME).matched == 1
    outside = [node for node in graph.gm.graph.nodes if node.target == "remainder"]
    assert len(outside) == 1
    assert graph.node(ops.check_batch).args[0][1] is outside[0]
    assert torch.equal(graph.outputs(), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_only_a_sparse_lookup_that_stayed_flat_is_outside(sparse: bool) -> None:
    def from_a_lookup(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return m.odd(m.plain(ids, offsets)[:, 0].long().clamp(0, 5))

    graph = capture(Lookups(from_a_lookup, nn.Embedding(6, 4, sparse=sparse)), bags()).on("1x1")
    graph.advance(NAME)
    assert graph.count(F.embedding) == sparse


def test_trained_layers_that_feed_weights_into_lookups_stay_outside() -> None:
    class Weighted(nn.Module):
        """Weights of the ids from a layer over features of theirs."""

        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.EmbeddingBag(6, 4, mode="sum")
            self.score = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            self.top = nn.Linear(4, 1)

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor, of_ids: torch.Tensor) -> torch.Tensor:
            return self.top(self.emb(ids, offsets, per_sample_weights=torch.sigmoid(self.score(of_ids)).squeeze(1)))

    torch.manual_seed(0)
    model, batch = Weighted(), (*bags(), torch.randn(4, 2))
    graph = capture(model, batch).on("1x1")
    graph.advance("batch_lookups")
    expected = graph.outputs()
    assert graph.advance(NAME).matched == 1
    assert [linears(region) for region in regions(graph)] == [1]
    assert graph.count(LINEAR) == 2
    assert torch.equal(graph.outputs(), expected)
    capture(model, batch).on("2x2").advance(NAME)
    assert_compiled_is_eager(model, batch)


def test_a_graph_without_tables_is_one_region() -> None:
    graph = dense()
    assert graph.advance(NAME).matched == 1
    assert [linears(region) for region in regions(graph)] == [1]


def test_a_lookup_alone_is_one_copy() -> None:
    """The caller gets memory of its own."""

    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.EmbeddingBag(6, 4, mode="sum")

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return self.emb(ids, offsets)

    graph = capture(Identity(), bags()).on("1x1")
    assert graph.advance(NAME).matched == 1
    [region] = regions(graph)
    assert [node.target for node in region.graph.nodes if node.op == "call_function"] == [torch.clone]


def test_the_effect_is_that_of_the_compiler() -> None:
    assert dlrm(dense_compiler="aot_eager").advance(NAME).effect is Effect.REORDERED


def failing(*args: Any) -> Any:
    raise RuntimeError("no such instruction\nand more")


def test_a_region_that_does_not_compile_runs_eagerly_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_internals, "compile_with_inductor", failing)
    graph = dlrm(dense_compiler="inductor")
    graph.advance("batch_lookups")
    expected = graph.outputs()
    with caplog.at_level(logging.WARNING, "dmt_compile"):
        report = graph.advance(NAME)
    reason = "inductor failed: RuntimeError: no such instruction"
    assert (report.changed, report.matched) == (True, 1)
    assert [why for _, why in report.skipped] == [reason]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("dmt_compile")]
    assert told == [f"compile_dense_regions: dense_0 runs in eager mode: {reason}"]
    assert graph.ctx.embedding_graph.unmatched[-1].reason == reason
    assert torch.equal(graph.outputs(), expected)


def test_strict_makes_that_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "compile_with_inductor", failing)
    text = (
        r"compile_dense_regions: expected a region that can be rewritten for squeeze, found that inductor failed: "
        r"RuntimeError: no such instruction \(.*models.py:\d+: return self.top\(.*\); change the line or drop strict"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        dlrm(dense_compiler="inductor", strict=True).advance(NAME)


def test_an_empty_batch_runs_uncompiled() -> None:
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    graph.output((graph.call_function(torch.mul, (rows, 2)),))
    region = DenseRegion(fx.GraphModule({}, graph), "inductor")
    region._compiled = [lambda rows: ("compiled",)]
    assert region(torch.ones(1, 3)) == ("compiled",)
    assert region(torch.ones(0, 3))[0].shape == (0, 3)
