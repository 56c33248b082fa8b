"""sync_dense_gradients: dense parameters pass through bucketed averaging, buffers are rank 0's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from dmt_compile.ir import gradient_ops
from dmt_compile.ir.pass_base import calls, placeholders
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.verifier import verify
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients
from dmt_compile.runtime.program import fingerprint
from tests.passes._harness import Captured, Lookups, bags, capture, dlrm


def buckets_of(graph: Captured) -> list[list[fx.Node]]:
    """Return the parameters of each bucket, in the order in which their gradients leave."""
    wait = graph.node(gradient_ops.wait_gradients)
    reduction = graph.node(gradient_ops.averaging).args[0]
    return [list(wait.args[0])[reduction.span(bucket)] for bucket in range(len(reduction.buckets))]


def names(graph: Captured, nodes: Sequence[fx.Node]) -> list[str]:
    return [graph.ctx.flat_names[node.name] for node in nodes]


def test_every_trained_dense_parameter_passes_through() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    assert graph.count(gradient_ops.wait_gradients) == 0
    report = graph.advance("sync_dense_gradients")
    assert (report.changed, report.matched, report.skipped, report.effect) == (True, 8, (), None)
    wait = graph.node(gradient_ops.wait_gradients)
    assert sorted(names(graph, wait.args[0])) == sorted(
        f"{p}.{i}.{w}" for p in ("bottom", "top") for i in (0, 2) for w in ("weight", "bias")
    )
    for node in wait.args[0]:
        assert list(node.users) == [wait]
    tables = [graph.input(f"emb.{i}.weight") for i in range(3)]
    assert not any(wait in table.users for table in tables)
    assert graph.count(gradient_ops.broadcast_buffers) == 0  # integer buffers do not drift


def test_gradients_leave_in_the_order_in_which_they_are_there() -> None:
    graph = dlrm("2x2")
    graph.advance("sync_dense_gradients")
    top, bottom = (names(graph, bucket) for bucket in buckets_of(graph))  # no region's gradients wait for another's
    assert top == [f"top.{i}.{w}" for i in (2, 0) for w in ("weight", "bias")]
    assert bottom == [f"bottom.{i}.{w}" for i in (2, 0) for w in ("weight", "bias")]
    graph.advance("compile_dense_regions")
    nodes = list(graph.gm.graph.nodes)
    assert nodes[len(placeholders(graph.gm)) + 1].target is gradient_ops.wait_gradients
    for start in calls(graph.gm, gradient_ops.start_gradients):
        region = nodes[nodes.index(start) + 1 + len(start.users)]
        assert region.op == "call_module"
        assert set(start.users) <= set(region.all_input_nodes)


def test_inside_one_host_buckets_are_cut_by_their_bytes_alone() -> None:
    graph = dlrm("1x4")
    graph.advance("sync_dense_gradients")
    [everything] = buckets_of(graph)
    assert names(graph, everything) == [
        f"{mlp}.{i}.{w}" for mlp in ("top", "bottom") for i in (2, 0) for w in ("weight", "bias")
    ]


class Twice(nn.Module):
    """Reads one layer before the features are there and again behind them, and another behind them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(6, 4, mode="sum")
        self.late, self.twice = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.late(self.twice(self.twice(dense) * self.emb(ids, offsets)))


def test_a_parameter_that_is_read_twice_leaves_after_the_earlier_reader() -> None:
    graph = capture(Twice(), (torch.ones(3, 4), *bags())).on("2x2")
    graph.advance("sync_dense_gradients")
    assert [names(graph, bucket) for bucket in buckets_of(graph)] == [["late.weight"], ["twice.weight"]]
    assert len(graph.node(gradient_ops.wait_gradients).args[0]) == 2


@pytest.mark.parametrize(
    ("topology", "options", "wire_dtype", "hierarchical", "said"),
    [
        (
            "2x2",
            {},
            None,
            True,
            "hierarchical (2 hosts x 2), 2 buckets, 3,936 bytes between hosts in all, 5,868 if flat",
        ),
        ("4x1", {}, None, False, "flat (one rank on each host), 2 buckets"),
        ("1x4", {}, None, False, "flat (one host), 1 bucket"),
        ("2x2", {"dense_reduction": "flat"}, None, False, "flat (dense_reduction is 'flat'), 2 buckets"),
        ("1x4", {"dense_reduction": "hierarchical"}, None, True, "hierarchical (dense_reduction is 'hierarchical')"),
        ("4x1", {}, "bfloat16", True, "hierarchical (4 hosts x 1, bfloat16 between hosts)"),
        ("1x4", {}, "float16", False, "flat (one host)"),
    ],
)
def test_the_reduction_fits_the_topology(
    topology: str, options: dict[str, Any], wire_dtype: str | None, hierarchical: bool, said: str
) -> None:
    graph = dlrm(topology, **options)
    graph.advance("lower_to_sptt")
    report = SyncDenseGradients(wire_dtype=wire_dtype).run(graph.gm, graph.ctx)
    verify(graph.gm, graph.ctx, Stage.DISTRIBUTED, "sync_dense_gradients")
    reduction = graph.node(gradient_ops.averaging).args[0]
    assert (reduction.tower, reduction.hosts, reduction.hierarchical) == (-1, graph.ctx.topology.hosts, hierarchical)
    assert reduction.wire_dtype == (wire_dtype if hierarchical else None)
    assert report.effect is (Effect.LOSSY if reduction.wire_dtype else None)
    assert report.notes[0].startswith(f"dense gradients: {said}")


def test_the_way_of_gradients_is_a_part_of_the_program() -> None:
    found = set()
    for options in ({}, {"dense_reduction": "flat"}):
        graph = dlrm("2x2", **options)
        graph.advance("compile_dense_regions")
        found.add(fingerprint(graph.gm))
    assert len(found) == 2


@pytest.mark.parametrize(("topology", "training"), [("1x1", True), ("2x2", False)])
def test_without_gradients_or_other_ranks_nothing_changes(topology: str, training: bool) -> None:
    graph = dlrm(topology, training)
    graph.advance("lower_to_sptt")
    before = graph.code()
    report = graph.advance("sync_dense_gradients")
    reason = "no gradients: evaluation" if topology == "2x2" else "one rank: nothing to average"
    assert (report.changed, report.skipped, report.effect) == (False, (("graph", reason),), Effect.EXACT)
    assert graph.code() == before


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 8), (64 * 4, 7), (10**6, 2)])
def test_buckets_hold_up_to_their_bytes(bucket_bytes: int, buckets: int) -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    SyncDenseGradients(bucket_bytes, bucket_bytes).run(graph.gm, graph.ctx)
    verify(graph.gm, graph.ctx, Stage.DISTRIBUTED, "sync_dense_gradients")
    assert graph.count(gradient_ops.start_gradients) == buckets
    for bucket in buckets_of(graph):
        sizes = [node.meta["val"].numel() * 4 for node in bucket]
        assert sum(sizes) <= bucket_bytes or len(sizes) == 1


def test_the_first_bucket_is_a_small_one() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    SyncDenseGradients(10**6, 1).run(graph.gm, graph.ctx)
    assert [len(bucket) for bucket in buckets_of(graph)] == [1, 3, 4]


def test_a_bucket_has_one_element_type() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(m.plain(ids, offsets).double()).float(), nn.Linear(4, 4).double())
    graph = capture(model, bags()).on("2x2")
    graph.advance("sync_dense_gradients")
    types = [{node.meta["val"].dtype for node in bucket} for bucket in buckets_of(graph)]
    assert types == [{torch.float32}, {torch.float64}]


def test_frozen_parameters_are_left_alone() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(ids, offsets), nn.EmbeddingBag(6, 4, mode="sum"))
    model.top.weight.requires_grad_(False)
    graph = capture(model, bags()).on("2x2")
    assert graph.advance("sync_dense_gradients").matched == 1
    assert [names(graph, bucket) for bucket in buckets_of(graph)] == [["top.bias"]]


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


@pytest.mark.parametrize(("topology", "hierarchical"), [("2x2", True), ("4x1", True), ("1x4", False)])
def test_comm_dtype_reaches_the_hop_between_hosts(topology: str, hierarchical: bool) -> None:
    graph = dlrm(topology, comm_dtype={"dense": "bfloat16"})
    report = graph.advance("sync_dense_gradients")
    reduction = graph.node(gradient_ops.averaging).args[0]
    assert (reduction.hierarchical, reduction.wire_dtype) == (hierarchical, "bfloat16" if hierarchical else None)
    assert report.effect is (Effect.LOSSY if hierarchical else None)
