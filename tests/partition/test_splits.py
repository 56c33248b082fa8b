"""Splitting tables by columns: what is split, into what, and the plans and names that come of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.errors import PlanError
from dmt_compile.partition.assign import make_plan
from dmt_compile.partition.splits import split_as_named, split_by_columns
from dmt_compile.plan import Shard, TableSpec, TowerPlan, parameter_of, piece_name, whole_of
from dmt_compile.topology import Topology


def test_names_say_where_a_piece_is() -> None:
    assert piece_name("emb.3", (0, 32)) == "emb.3[:, 0:32]"
    assert piece_name("emb[100:150]", (8, 16)) == "emb[100:150, 8:16]"
    for table in ("emb.3", "emb[100:150]"):
        assert whole_of(piece_name(table, (8, 16))) == (table, (8, 16))
        assert whole_of(table) == (table, None)
    assert parameter_of("emb.3[:, 8:16]") == ("emb.3", 0, 8)
    assert parameter_of("emb[100:150, 8:16]") == ("emb", 100, 8)
    assert parameter_of("emb[100:150]") == ("emb", 100, 0)
    assert parameter_of("emb.3") == ("emb.3", 0, 0)


def test_fewer_tables_than_towers_are_split_until_each_tower_has_a_piece() -> None:
    tables = [TableSpec("a", 100, 64), TableSpec("b", 100, 32)]
    pieces = split_by_columns(tables, 6)
    assert [piece.name for piece in pieces] == [
        *(f"a[:, {k}:{k + 16}]" for k in (0, 16, 32, 48)),
        "b[:, 0:16]",
        "b[:, 16:32]",
    ]
    plan = make_plan(tables, Topology(6, 1), split_columns=True)
    assert all(len(tower.tables) == 1 for tower in plan.towers)
    assert plan.placements["a[:, 16:32]"][0].columns == (0, 16)
    assert len({shard.rank for shards in plan.placements.values() for shard in shards}) == 6


def test_a_table_that_outweighs_a_tower_is_split_and_the_plan_is_even() -> None:
    tables = [TableSpec("big", 100_000, 64), *(TableSpec(f"emb.{k}", 5_000, 64) for k in range(12))]
    whole, split = (make_plan(tables, Topology(4, 1), split_columns=how) for how in (False, True))
    assert "table big alone has 2.50x the mean rank memory: whole tables cannot be more even" in whole.notes
    assert [t.name for t in split.tables[:3]] == ["big[:, 0:20]", "big[:, 20:40]", "big[:, 40:64]"]
    largest = max(sum(t.memory_bytes for t in split.tables if t.name in tower.tables) for tower in split.towers)
    assert largest < 1.2 * sum(t.memory_bytes for t in tables) / 4


def test_a_table_beyond_the_memory_of_a_rank_is_split() -> None:
    tables = [TableSpec("big", 1000, 16), *(TableSpec(f"emb.{k}", 500, 8) for k in range(4))]
    assert split_by_columns(tables, 2) == tables
    plan = make_plan(tables, Topology(2, 2), memory_bytes=48_000, split_columns=True)
    assert {whole_of(table.name)[0] for table in plan.tables if whole_of(table.name)[1]} == {"big"}


@given(
    dims=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    towers=st.integers(1, 12),
    memory=st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_pieces_cover_their_tables_once(dims: list[int], towers: int, memory: int | None) -> None:
    tables = [TableSpec(f"emb.{k}", 10, dim) for k, dim in enumerate(dims)]
    pieces = split_by_columns(tables, towers, memory)
    assert all(piece.dim >= min(4, tables[int(parameter_of(piece.name).parameter[4:])].dim) for piece in pieces)
    plan = make_plan(tables, Topology(towers, 1), split_columns=True)
    assert plan.whole_tables() == tables
    plan.check_tables(tuple(tables))
    for table in tables:
        area = [shard.columns for _, shard in plan.parts_of(table.name)]
        assert sorted(column for first, end in area for column in range(first, end)) == list(range(table.dim))


def test_a_plan_of_pieces_is_saved_and_loaded() -> None:
    plan = make_plan([TableSpec("a", 100, 64)], Topology(4, 1), split_columns=True)
    assert TowerPlan.from_json(plan.to_json()) == plan
    assert plan.parts_of("a")[1] == ("a[:, 16:32]", Shard(1, (0, 100), (16, 32)))


def test_an_explicit_partition_names_the_pieces_it_wants() -> None:
    tables = [TableSpec("a", 10, 8), TableSpec("emb[3:9]", 6, 4)]
    plan = make_plan(tables, Topology(2, 1), partition=[["a[:, 0:2]", "emb[3:9, 2:4]"], ["a[:, 2:8]", "emb[3:9, 0:2]"]])
    assert [(t.name, t.dim) for t in plan.tables] == [
        *(("a[:, 0:2]", 2), ("a[:, 2:8]", 6)),
        *(("emb[3:9, 0:2]", 2), ("emb[3:9, 2:4]", 2)),
    ]
    assert plan.parts_of("emb")[1] == ("emb[3:9, 2:4]", Shard(0, (3, 9), (2, 4)))


@pytest.mark.parametrize("names", [["a[:, 0:2]"], ["a[:, 0:5]", "a[:, 4:8]"], ["a[:, 0:9]"], ["a[:, 1:8]"]])
def test_pieces_that_do_not_cover_a_table_once_are_refused(names: list[str]) -> None:
    with pytest.raises(PlanError, match=re.escape("partition: expected pieces that cover the 8 columns of a once")):
        split_as_named([TableSpec("a", 10, 8)], names)


def test_a_plan_whose_pieces_leave_columns_out_is_refused() -> None:
    plan = make_plan([TableSpec("a", 100, 64)], Topology(4, 1), split_columns=True)
    tables = (*plan.tables[:1], *plan.tables[2:])
    towers = tuple(replace(t, tables=tuple(n for n in t.tables if n != "a[:, 16:32]")) for t in plan.towers)
    placements = {name: shards for name, shards in plan.placements.items() if name != "a[:, 16:32]"}
    broken = replace(plan, tables=tables, towers=towers, placements=placements)
    with pytest.raises(
        PlanError, match=r"plan: expected pieces that cover the columns of a once, found \[\(0, 16\), \(32"
    ):
        broken.check_tables((TableSpec("a", 100, 64),))
