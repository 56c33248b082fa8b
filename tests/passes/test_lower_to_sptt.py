"""lower_to_sptt: the exchanges of a topology around the lookups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmt_compile.errors import PlanError, UnsupportedGraphError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.topology import Topology
from tests.passes._harness import Lookups, bags, capture, dense, dlrm


@pytest.mark.parametrize(
    ("topology", "hops", "permutes"),
    [
        ("2x2", ["ids", "intra", "peer"], 1),
        ("4x1", ["ids", "peer"], 0),
        ("1x4", ["ids", "intra"], 1),
        ("2x3", ["ids", "intra", "peer"], 1),
    ],
)
def test_the_hops_of_a_topology(topology: str, hops: list[str], permutes: int) -> None:
    graph = dlrm(topology)
    graph.advance("place_tables")
    assert graph.count(ops.check_batch) == 1
    report = graph.advance("lower_to_sptt")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert [graph.node(ex.all_to_all, i).args[2] for i in range(graph.count(ex.all_to_all))] == hops
    assert graph.count(ex.peer_permute) == permutes
    assert graph.count(ex.join_blocks) == len(hops) - 1
    assert graph.count(ops.lookup) == 3
    assert graph.count(ops.check_batch) == 0  # it rides in the header
    for target in (ex.layout, ex.pack_ids, ex.exchange_headers, ex.route, ex.unpack_ids, ex.join_features):
        assert graph.count(target) == 1
    hosts, local_ranks, owners, widths = graph.node(ex.layout).args
    assert f"{hosts}x{local_ranks}" == topology
    assert graph.ctx.plan is not None
    assert owners == tuple(graph.ctx.plan.owner(f"emb.{i}") for i in range(3))
    assert widths == (8, 8, 8)
    world = graph.ctx.topology.world_size
    assert graph.node(ex.scale_gradient).args[1] == 1 / world
    split = graph.node(ops.split_features)
    assert {user.args[1] for user in split.users} == {0, 1, 2}


def test_evaluation_scales_no_gradient() -> None:
    graph = dlrm("2x2", training=False)
    graph.advance("lower_to_sptt")
    assert graph.count(ex.scale_gradient) == 0
    assert graph.count(ex.all_to_all) == 3


def test_a_tower_over_two_hosts_is_one_group() -> None:
    graph = dlrm("2x2", towers=1)
    graph.advance("lower_to_sptt")
    assert graph.node(ex.layout).args[:2] == (1, 4)
    assert [graph.node(ex.all_to_all, i).args[2] for i in range(2)] == ["ids", "intra"]


def test_two_towers_may_share_a_host() -> None:
    graph = dlrm("1x2", towers=2)
    graph.advance("lower_to_sptt")
    assert graph.node(ex.layout).args[:2] == (1, 2)


def test_new_nodes_carry_the_users_line() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    for target in (ex.layout, ex.all_to_all, ex.join_blocks, ops.split_features):
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


def test_tables_of_two_element_types_are_refused() -> None:
    model = Lookups(lambda m, ids, offsets: m.odd(ids, offsets).float(), nn.EmbeddingBag(6, 4, mode="sum").double())
    text = (
        r"lower_to_sptt: expected tables of one element type, found \['torch.float32', 'torch.float64'\]; convert them"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        capture(model, bags()).on("2x2").advance("lower_to_sptt")


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
    assert [graph.node(ex.all_to_all, i).args[4] for i in range(3)] == ["int64", "float64", "float64"]
    assert graph.node(ops.split_features).meta["val"][0].dtype == torch.float64
