"""lower_to_sptt: the exchanges of a topology around the lookups."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dmt_compile.errors import PlanError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, weight_ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.runtime.route import IdExchange
from dmt_compile.topology import Topology
from tests.passes._harness import Captured, Lookups, bags, capture, dense, dlrm, fields


@pytest.mark.parametrize(
    ("topology", "hops", "permutes"),
    [
        ("2x2", ["ids", "intra", "peer"], 1),
        ("4x1", ["ids", "peer"], 0),
        ("1x4", ["ids", "intra"], 0),
        ("2x3", ["ids", "intra", "peer"], 1),
    ],
)
def test_the_hops_of_a_topology(topology: str, hops: list[str], permutes: int) -> None:
    graph = dlrm(topology)
    graph.advance("place_tables")
    assert graph.count(ops.check_batch) == 1
    report = graph.advance("lower_to_sptt")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert [graph.node(ex.start_all_to_all, i).args[2] for i in range(graph.count(ex.start_all_to_all))] == hops
    assert graph.count(ex.peer_permute) == permutes
    assert graph.count(ex.join_blocks) == len(hops) - 1
    assert graph.count(ops.lookup) == 3
    assert graph.count(ops.check_batch) == 0  # it rides in the header
    for target in (
        id_ops.layout,
        id_ops.pack_ids,
        id_ops.exchange_headers,
        id_ops.route,
        id_ops.unpack_ids,
        ex.join_features,
    ):
        assert graph.count(target) == 1
    hosts, local_ranks, owners, widths, jagged, weighted, outputs, exchange, summed = graph.node(id_ops.layout).args
    assert outputs == summed == ()  # features are exchanged as they are
    assert exchange == IdExchange("int32", 0, (False,) * 3)
    assert f"{hosts}x{local_ranks}" == topology
    assert graph.ctx.plan is not None
    assert owners == tuple(graph.ctx.plan.owner(f"emb.{i}") for i in range(3))
    assert (widths, jagged, weighted) == ((8, 8, 8), (True,) * 3, (False,) * 3)
    world = graph.ctx.topology.world_size
    assert graph.node(gradient_ops.scale_gradient).args[1] == 1 / world
    split = graph.node(ops.split_features)
    assert {user.args[1] for user in split.users} == {0, 1, 2}


def test_evaluation_scales_no_gradient() -> None:
    graph = dlrm("2x2", training=False)
    graph.advance("lower_to_sptt")
    assert graph.count(gradient_ops.scale_gradient) == 0
    assert graph.count(ex.start_all_to_all) == 3


def test_a_tower_over_two_hosts_is_one_group() -> None:
    graph = dlrm("2x2", towers=1)
    graph.advance("lower_to_sptt")
    assert graph.node(id_ops.layout).args[:2] == (1, 4)
    assert [graph.node(ex.start_all_to_all, i).args[2] for i in range(2)] == ["ids", "intra"]


def test_two_towers_may_share_a_host() -> None:
    graph = dlrm("1x2", towers=2)
    graph.advance("lower_to_sptt")
    assert graph.node(id_ops.layout).args[:2] == (1, 2)


def test_new_nodes_carry_the_users_line() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    for target in (id_ops.layout, ex.start_all_to_all, ex.join_blocks, ops.split_features):
        assert "looked_up = [table(i, o)" in graph.node(target).meta["stack_trace"]


def test_one_rank_exchanges_nothing() -> None:
    graph = dlrm()
    graph.advance("place_tables")
    before = graph.code()
    report = graph.advance("lower_to_sptt")
    assert (report.changed, report.skipped) == (False, (("graph", "one rank: nothing to exchange"),))
    assert graph.code() == before


def test_without_lookups_nothing_is_exchanged() -> None:
    report = dense("2x2").advance("lower_to_sptt")
    assert (report.changed, report.skipped) == (False, (("graph", "no lookup"),))


def hops_of(graph: Captured) -> list[tuple[object, object]]:
    """Return each all-to-all's hop and group, in order."""
    return [(node.args[2], node.args[3]) for node in calls(graph.gm, ex.start_all_to_all)]


@pytest.mark.parametrize(
    ("topology", "options"), [("2x2", {}), ("2x3", {}), ("3x2", {"towers": 6}), ("4x2", {"towers": 2})]
)
def test_ids_by_way_of_hosts(topology: str, options: dict[str, Any]) -> None:
    graph = dlrm(topology, id_exchange="hierarchical", **options)
    graph.advance("lower_to_sptt")
    hops = [("ids_across", "across"), ("ids_host", "host"), ("intra", "intra"), ("peer", "peer")]
    assert hops_of(graph) == hops
    assert graph.count(ex.peer_permute) == 0  # the samples arrive in peer order
    regrouped = graph.node(id_ops.regroup_by_owner)
    assert regrouped.args[0].args[0].args[2] == "ids_across"  # type: ignore[union-attr]
    assert [user.args[2] for user in regrouped.users] == ["ids_host"]
    assert graph.node(id_ops.layout).args[7].hosts == graph.ctx.topology.hosts  # type: ignore[union-attr]


@pytest.mark.parametrize("topology", ["1x4", "4x1"])
def test_there_is_no_way_by_hosts_without_two_of_them_and_two_ranks_on_each(topology: str) -> None:
    graph = dlrm(topology, id_exchange="hierarchical")
    graph.advance("lower_to_sptt")
    assert hops_of(graph)[0] == ("ids", "world")
    assert graph.node(id_ops.layout).args[7].hosts == 0  # type: ignore[union-attr]


def test_weights_go_the_way_of_their_ids() -> None:
    graph = mixed("2x2", id_exchange="hierarchical")
    graph.advance("lower_to_sptt")
    by_route: dict[fx.Node, list[object]] = {}
    for node in calls(graph.gm, ex.start_all_to_all):
        by_route.setdefault(node.args[1], []).append(node.args[2])
    ids, weights, rows = ["ids_across", "ids_host"], ["weights_across", "weights_host"], ["intra", "peer"]
    assert list(by_route.values()) == [[*ids, *weights, *rows], [*ids, *rows]]
    assert [node.args[2] for node in calls(graph.gm, id_ops.regroup_by_owner)] == ["ids", "weights", "ids"]


def test_one_table_of_more_rows_than_int32_counts_makes_all_ids_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("dmt_compile.plan"), "MOST_INT32", 5)
    graph = dlrm("2x2")
    graph.advance("place_tables")
    assert graph.ctx.plan is not None
    assert [(table.rows, table.id_bytes) for table in graph.ctx.plan.tables] == [(6, 8), (5, 4), (4, 4)]
    assert graph.ctx.plan.id_bytes == 8
    graph.advance("lower_to_sptt")
    assert graph.node(id_ops.layout).args[7].dtype == "int64"  # type: ignore[union-attr]
    assert graph.node(ex.start_all_to_all).args[4] == "int64"
    assert {ids.dtype for ids in graph.node(id_ops.unpack_ids).meta["val"]} == {torch.int64}


def test_bags_of_equal_length_send_no_lengths() -> None:
    def look_up(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return m.odd(torch.stack([offsets % 6, offsets % 5], dim=1))

    graph = capture(Lookups(look_up, nn.EmbeddingBag(6, 4)), bags()).on("2x2")
    graph.advance("place_tables")
    assert graph.ctx.plan is not None
    assert {table.name: table.jagged for table in graph.ctx.plan.tables} == {"plain": 1.0, "odd": 0.0}
    graph.advance("lower_to_sptt")
    layout = graph.node(id_ops.layout).args
    names = [graph.ctx.flat_names[n.args[0].name] for n in calls(graph.gm, ops.lookup)]  # type: ignore[union-attr]
    even = tuple(name == "odd.weight" for name in names)
    assert (layout[4], layout[7].even) == (tuple(not e for e in even), even)  # type: ignore[union-attr]
    assert all(lookup.args[2] is not None for lookup in calls(graph.gm, ops.lookup))


class Mixed(nn.Module):
    """Bags with weights from a trained importance, one id a sample, and a sequence that stays unpooled."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="sum")
        self.importance = nn.Parameter(torch.rand(6))
        self.one = nn.Embedding(5, 3)
        self.item = nn.Embedding(7, 2)
        if halves:
            self.one.bfloat16()
            self.bag.double()
        self.top = nn.Linear(9, 1)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, one: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        weights = self.importance[ids].to(self.bag.weight.dtype)
        looked_up = self.bag(ids, offsets, per_sample_weights=weights), self.one(one)
        sequence = torch.tanh(self.item(items))
        joined = torch.cat([part.float() for part in (*looked_up, sequence[:, 0])], dim=1)
        return self.top(joined).squeeze(1) + sequence.sum((1, 2))


def mixed(topology: str, training: bool = True, halves: bool = False, **options: Any) -> Captured:
    torch.manual_seed(0)
    batch = (*bags(), torch.tensor([4, 0, 2]), torch.randint(0, 7, (3, 2)))
    return capture(Mixed(halves), batch, training).on(topology, **options)


def test_every_group_has_exchanges_of_its_own() -> None:
    graph = mixed("2x2")
    graph.advance("place_tables")
    assert graph.count(ops.check_batch) == 2
    assert graph.advance("lower_to_sptt").matched == 3
    by_route: dict[fx.Node, list[object]] = {}
    for node in calls(graph.gm, ex.start_all_to_all):
        by_route.setdefault(node.args[1], []).append(node.args[2])
    assert list(by_route.values()) == [["ids", "weights", "intra", "peer"], ["ids", "intra", "peer"]]
    layouts = calls(graph.gm, id_ops.layout)
    assert [node.args[3:7] for node in layouts] == [
        ((4, 3), (True, False), (True, False), ()),  # widths, jagged, weighted, Tower Modules' outputs
        ((2,), (False,), (False,), ()),
    ]
    for target in (
        id_ops.pack_ids,
        id_ops.exchange_headers,
        id_ops.route,
        id_ops.unpack_ids,
        ex.join_features,
        ops.split_features,
    ):
        assert graph.count(target) == 2
    assert (graph.count(weight_ops.pack_weights), graph.count(weight_ops.unpack_weights)) == (1, 1)
    lookups = {graph.ctx.flat_names[n.args[0].name]: n for n in calls(graph.gm, ops.lookup)}  # type: ignore[union-attr]
    for argument in (2, 3):  # offsets and weights
        given = {name for name, lookup in lookups.items() if lookup.args[argument] is not None}
        assert given == {"bag.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_weights_are_those_of_each_rank_s_own_loss(training: bool) -> None:
    """Looked-up rows carry 1 / ranks, for the mean of all losses; a rank's own weights must not."""
    graph = mixed("2x2", training)
    graph.advance("lower_to_sptt")
    factors = [node.args[1] for node in calls(graph.gm, gradient_ops.scale_gradient)]
    assert sorted(factors) == ([0.25, 0.25, 4.0] if training else [])
    if training:
        [undone] = [node for node in calls(graph.gm, gradient_ops.scale_gradient) if node.args[1] == 4.0]
        assert undone.args[0] is graph.node(weight_ops.pack_weights)
        assert [user.args[2] for user in undone.users] == ["weights"]


def test_gradients_are_scaled_by_the_frequencies_of_each_rank_s_own_batch() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(offsets), nn.Embedding(6, 4, scale_grad_by_freq=True))
    graph = capture(model, bags()).on("2x2")
    graph.advance("place_tables")
    [check] = calls(graph.gm, ops.check_batch)
    own_ids = check.args[0][1]  # type: ignore[index]
    graph.advance("lower_to_sptt")
    scaled = graph.node(gradient_ops.scale_by_frequency)
    assert graph.count(gradient_ops.scale_by_frequency) == 1
    assert scaled.args[1] is own_ids
    assert scaled.args[0].args[0] is graph.node(ops.split_features)  # type: ignore[union-attr]
    assert [node.args[4].scale_grad_by_freq for node in calls(graph.gm, ops.lookup)] == [False, False]  # type: ignore[union-attr]


def test_lookups_of_exchanged_bags_have_no_last_offset() -> None:
    def look_up(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return m.odd(ids, torch.cat([offsets, offsets.new_full((1,), 4)]))

    graph = capture(Lookups(look_up, nn.EmbeddingBag(6, 4, include_last_offset=True)), bags()).on("2x2")
    graph.advance("lower_to_sptt")
    assert [how.last_offset for how in graph.node(id_ops.pack_ids).args[3]] == [False, True]  # type: ignore[union-attr]
    assert [node.args[4].last_offset for node in calls(graph.gm, ops.lookup)] == [False, False]  # type: ignore[union-attr]


def test_element_types_of_a_group_are_promoted_on_the_wire_and_given_back() -> None:
    graph = mixed("2x2", halves=True)
    graph.advance("place_tables")
    before = {graph.ctx.flat_names[n.args[0].name]: n.meta["val"].dtype for n in calls(graph.gm, ops.lookup)}  # type: ignore[union-attr]
    assert before == {"bag.weight": torch.float64, "one.weight": torch.bfloat16, "item.weight": torch.float32}
    graph.advance("lower_to_sptt")
    first, second = calls(graph.gm, id_ops.layout)
    sent = {
        layout: [n.args[4] for n in calls(graph.gm, ex.start_all_to_all) if n.args[1].args[0] is layout]  # type: ignore[union-attr]
        for layout in (first, second)
    }
    assert sent == {first: ["int32", "float64", "float64", "float64"], second: ["int32", "float32", "float32"]}
    columns = [list(split.users) for split in calls(graph.gm, ops.split_features)]
    assert [column.meta["val"].dtype for column in columns[0]] == [torch.float64] * 2
    [back] = columns[0][1].users
    assert (back.target, back.meta["val"].dtype) == (torch.Tensor.to, torch.bfloat16)


def test_weights_of_several_types_travel_in_the_widest() -> None:
    def look_up(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        wide = F.embedding_bag(ids, m.odd, offsets, mode="sum", per_sample_weights=torch.ones(len(ids)).double())
        return wide.float() + m.plain(ids, offsets, per_sample_weights=torch.ones(len(ids)))

    model = Lookups(look_up)
    model.odd = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    graph = capture(model, bags()).on("2x2")
    graph.advance("lower_to_sptt")
    assert [n.args[4] for n in calls(graph.gm, ex.start_all_to_all)][:2] == ["int32", "float64"]
    for lookup in calls(graph.gm, ops.lookup):
        if lookup.args[3] is not None:
            assert lookup.args[3].meta["val"].dtype == lookup.args[0].meta["val"].dtype  # type: ignore[union-attr]


def test_fields_travel_to_the_owners_of_their_rows() -> None:
    graph = fields("2x2")
    graph.advance("lower_to_sptt")
    owners, widths, jagged, weighted = graph.node(id_ops.layout).args[2:6]
    assert graph.ctx.plan is not None
    assert owners == tuple(graph.ctx.plan.owner(f"fields[{rows}]") for rows in ("0:7", "7:12", "12:21"))
    assert len(set(owners)) > 1
    assert (widths, jagged, weighted) == ((4, 4, 4), (False,) * 3, (False,) * 3)
    assert graph.node(id_ops.pack_ids).args[6] == ((0, 7), (7, 12), (12, 21))


def plan_on(topology: Topology, hosts: list[tuple[int, ...]]) -> TowerPlan:
    tables = tuple(TableSpec(f"emb.{i}", 4, 2) for i in range(len(hosts)))
    return TowerPlan(
        topology,
        tables,
        tuple(Tower(f"tower{i}", (f"emb.{i}",), spanned, 2) for i, spanned in enumerate(hosts)),
        {f"emb.{i}": (Shard(h[0] * topology.local_ranks, (0, 4), (0, 2)),) for i, h in enumerate(hosts)},
    )


@pytest.mark.parametrize("hosts", [[(0, 1), (2,)], [(0, 2), (1, 3)], [(1, 2), (0, 3)]])
def test_towers_over_unequal_or_scattered_hosts_are_refused(hosts: list[tuple[int, ...]]) -> None:
    with pytest.raises(
        PlanError,
        match=r"plan: expected towers over the same number of neighbouring hosts, found \[\('tower0', ",
    ):
        plan_on(Topology(4, 2), hosts).tower_groups()


def test_tower_groups() -> None:
    assert str(plan_on(Topology(4, 2), [(0, 1), (2, 3)]).tower_groups()) == "2x4"
    assert str(plan_on(Topology(4, 2), [(0,), (3,)]).tower_groups()) == "4x2"
    assert str(replace(plan_on(Topology(4, 2), []), tables=()).tower_groups()) == "4x2"


def test_the_refusal_reaches_the_pass() -> None:
    graph = dlrm("2x2")
    graph.advance("place_tables")
    plan = graph.ctx.plan
    assert plan is not None
    wide = replace(plan.towers[0], hosts=(0, 1))
    graph.ctx.plan = replace(plan, towers=(wide, *plan.towers[1:]))
    with pytest.raises(PlanError, match="the same number of neighbouring hosts"):
        graph.advance("lower_to_sptt")


def test_element_types_on_the_wire_are_the_tables() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(ids, offsets), nn.EmbeddingBag(6, 4, mode="sum")).double()
    graph = capture(model, bags()).on("2x2")
    graph.advance("lower_to_sptt")
    assert [graph.node(ex.start_all_to_all, i).args[4] for i in range(3)] == ["int32", "float64", "float64"]
    assert graph.node(ops.split_features).meta["val"][0].dtype == torch.float64
