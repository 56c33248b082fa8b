"""place_tables: the plan's shards on the graph's inputs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.plan import Shard
from tests.passes._harness import dense, dlrm, fields


def test_every_table_input_carries_its_shard() -> None:
    graph = dlrm("2x2")
    graph.advance("partition_towers")
    before = graph.code()
    report = graph.advance("place_tables")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert graph.code() == before
    assert graph.ctx.plan is not None
    for name in ("emb.0", "emb.1", "emb.2"):
        assert graph.input(f"{name}.weight").meta["shards"] == {name: graph.ctx.plan.placements[name]}
    assert "shards" not in graph.input("top.0.weight").meta


def test_an_input_carries_the_shards_of_all_its_fields() -> None:
    graph = fields("2x2")
    report = graph.advance("place_tables")
    assert report.matched == 3
    assert graph.ctx.plan is not None
    placed = graph.input("fields.weight").meta["shards"]
    assert placed == graph.ctx.plan.placements
    assert list(placed) == ["fields[0:7]", "fields[7:12]", "fields[12:21]"]
    assert [shards[0].rows for shards in placed.values()] == [(0, 7), (0, 5), (0, 9)]  # of each field


def test_without_tables_nothing_changes() -> None:
    report = dense("2x2").advance("place_tables")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_split_table_is_refused_by_name(axis: str) -> None:
    graph = dlrm("1x2")
    graph.advance("partition_towers")
    plan = graph.ctx.plan
    assert plan is not None
    halves = {
        "rows": (Shard(0, (0, 3), (0, 8)), Shard(1, (3, 6), (0, 8))),
        "columns": (Shard(0, (0, 6), (0, 4)), Shard(1, (0, 6), (4, 8))),
    }
    graph.ctx.plan = replace(plan, placements={**plan.placements, "emb.0": halves[axis]})
    text = (
        "place_tables: expected one shard for table emb.0, found 2; write its parts as tables of their "
        "own, such as emb[0:500] or emb[:, 0:32]"
    )
    with pytest.raises(UnsupportedGraphError, match=re.escape(text)):
        graph.advance("place_tables")
