"""partition_towers: every table gets a tower; the graph stays as it is."""

from __future__ import annotations

import pytest

from dmt_compile.errors import PlanError
from dmt_compile.ir.stages import Stage
from dmt_compile.ir.verifier import verify
from tests.passes._harness import dense, dlrm


def test_the_plan_covers_what_find_tables_found() -> None:
    graph = dlrm("2x2")
    graph.advance("find_interaction")
    before = graph.code()
    report = graph.advance("partition_towers")
    assert (report.changed, report.matched, report.skipped) == (False, 3, ())
    assert graph.code() == before
    plan = graph.ctx.plan
    assert plan is not None
    assert plan.tables == graph.ctx.embedding_graph.table_specs()
    assert sorted(name for tower in plan.towers for name in tower.tables) == ["emb.0", "emb.1", "emb.2"]
    assert report.notes == plan.notes


def test_the_users_partition_is_kept() -> None:
    graph = dlrm("2x2", partition=[["emb.2"], ["emb.0", "emb.1"]])
    graph.advance("partition_towers")
    assert graph.ctx.plan is not None
    assert [tower.tables for tower in graph.ctx.plan.towers] == [("emb.2",), ("emb.0", "emb.1")]
    verify(graph.gm, graph.ctx, Stage.TOWERED, "partition_towers")


def test_the_users_plan_is_taken_as_it_is_and_must_fit() -> None:
    first = dlrm("2x2")
    first.advance("partition_towers")
    second = dlrm("2x2", plan=first.ctx.plan)
    second.advance("partition_towers")
    assert second.ctx.plan is first.ctx.plan
    with pytest.raises(PlanError, match="expected a plan for topology 4x1, found one for 2x2"):
        dlrm("4x1", plan=first.ctx.plan).advance("partition_towers")


def test_without_tables_there_is_no_plan() -> None:
    graph = dense("2x2")
    report = graph.advance("partition_towers")
    assert (report.changed, report.matched, report.skipped) == (False, 0, (("graph", "no table was found"),))
    assert graph.ctx.plan is None
