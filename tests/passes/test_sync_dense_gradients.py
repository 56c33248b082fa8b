"""sync_dense_gradients: dense parameters pass through bucketed averaging, buffers are rank 0's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmt_compile.ir import gradient_ops
from dmt_compile.ir.pass_base import placeholders
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.verifier import verify
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients
from tests.passes._harness import Lookups, bags, capture, dlrm


def test_every_trained_dense_parameter_passes_through() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    assert graph.count(gradient_ops.synchronize) == 0
    report = graph.advance("sync_dense_gradients")
    assert (report.changed, report.matched, report.skipped, report.effect) == (True, 8, (), None)
    synchronize = graph.node(gradient_ops.synchronize)
    names = [graph.ctx.flat_names[n.name] for n in synchronize.args[0]]
    assert sorted(names) == sorted(
        f"{p}.{i}.{w}" for p in ("bottom", "top") for i in (0, 2) for w in ("weight", "bias")
    )
    for node in synchronize.args[0]:
        assert list(node.users) == [synchronize]
    tables = [graph.input(f"emb.{i}.weight") for i in range(3)]
    assert not any(synchronize in table.users for table in tables)
    assert graph.count(gradient_ops.broadcast_buffers) == 0  # integer buffers do not drift


@pytest.mark.parametrize(("topology", "training"), [("1x1", True), ("2x2", False)])
def test_without_gradients_or_other_ranks_nothing_changes(topology: str, training: bool) -> None:
    graph = dlrm(topology, training)
    graph.advance("lower_to_sptt")
    before = graph.code()
    report = graph.advance("sync_dense_gradients")
    reason = "no gradients: evaluation" if topology == "2x2" else "one rank: nothing to average"
    assert (report.changed, report.skipped, report.effect) == (False, (("graph", reason),), Effect.EXACT)
    assert graph.code() == before


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 8), (64 * 4, 6), (10**6, 1)])
def test_buckets_hold_up_to_their_bytes(bucket_bytes: int, buckets: int) -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    SyncDenseGradients(bucket_bytes).run(graph.gm, graph.ctx)
    verify(graph.gm, graph.ctx, Stage.DISTRIBUTED, "sync_dense_gradients")
    assert graph.count(gradient_ops.synchronize) == buckets
    for index in range(buckets):
        bucket = graph.node(gradient_ops.synchronize, index).args[0]
        sizes = [node.meta["val"].numel() * 4 for node in bucket]
        assert sum(sizes[1:]) <= bucket_bytes or len(sizes) == 1


def test_a_bucket_has_one_element_type() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(m.plain(ids, offsets).double()).float(), nn.Linear(4, 4).double())
    graph = capture(model, bags()).on("2x2")
    graph.advance("sync_dense_gradients")
    types = [
        {node.meta["val"].dtype for node in graph.node(gradient_ops.synchronize, i).args[0]}
        for i in range(graph.count(gradient_ops.synchronize))
    ]
    assert len(types) == 2
    assert all(len(found) == 1 for found in types)


def test_frozen_parameters_are_left_alone() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(ids, offsets), nn.EmbeddingBag(6, 4, mode="sum"))
    model.top.weight.requires_grad_(False)
    graph = capture(model, bags()).on("2x2")
    assert graph.advance("sync_dense_gradients").matched == 1
    assert [graph.ctx.flat_names[n.name] for n in graph.node(gradient_ops.synchronize).args[0]] == ["top.bias"]


class Scale(nn.Module):
    """Multiplies by a buffer, counted in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("used", torch.zeros(4, dtype=torch.int64))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled * self.scale + self.used


@pytest.mark.parametrize("training", [True, False])
def test_floating_buffers_are_rank_zeros_in_training(training: bool) -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(m.plain(ids, offsets)), Scale())
    graph = capture(model, bags(), training).on("2x2")
    graph.advance("sync_dense_gradients")
    assert graph.count(gradient_ops.broadcast_buffers) == training
    if training:
        broadcast = graph.node(gradient_ops.broadcast_buffers)
        assert [graph.ctx.flat_names[n.name] for n in broadcast.args[0]] == ["odd.scale"]
        assert list(graph.input("odd.scale").users) == [broadcast]


def test_a_graph_without_parameters_does_not_change() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    ctx = replace(graph.ctx, parameters={})
    before = [node.name for node in placeholders(graph.gm)], graph.code()
    report = SyncDenseGradients().run(graph.gm, ctx)
    assert (report.changed, report.matched) == (False, 0)
    assert ([node.name for node in placeholders(graph.gm)], graph.code()) == before
