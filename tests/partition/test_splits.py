"""Splitting tables: what is split, into what, and the plans and names that come of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.errors import PlanError
from dmt_compile.partition.assign import make_plan
from dmt_compile.partition.splits import seconds_in_columns, seconds_in_rows, split_as_named, split_by_columns
from dmt_compile.plan import Shard, TableSpec, TowerPlan
from dmt_compile.table_names import parameter_of, piece_name, whole_among
from dmt_compile.topology import Topology


def test_names_say_where_a_piece_is() -> None:
    assert piece_name("emb.3", None, (0, 32)) == "emb.3[:, 0:32]"
    assert piece_name("emb.3", (0, 50), None) == "emb.3[0:50]"
    assert piece_name("emb.3", None, None) == "emb.3"
    assert piece_name("emb[100:150]", None, (8, 16)) == "emb[100:150, 8:16]"
    assert piece_name("emb[100:150, 8:16]", (100, 120), None) == "emb[100:120, 8:16]"
    assert parameter_of("emb.3[:, 8:16]") == ("emb.3", 0, 8)
    assert parameter_of("emb[100:150, 8:16]") == ("emb", 100, 8)
    assert parameter_of("emb[100:150]") == ("emb", 100, 0)
    assert parameter_of("emb.3") == ("emb.3", 0, 0)


def test_a_piece_belongs_to_the_table_that_has_its_rows() -> None:
    tables = ["emb[0:7]", "emb[7:12]", "a"]
    pieces = {"emb[0:3]": tables[0], "emb[7:12, 0:2]": tables[1], "a[:, 0:4]": "a", "a[2:3]": "a", "a": "a"}
    assert whole_among(tables, pieces) == pieces
    assert whole_among(tables, ["emb[5:9]", "emb[:, 0:2]", "emb[3:3]", "b", "b[0:2]"]) == {}


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
    assert {table.whole for table in plan.tables if table.whole} == {"big"}


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


@pytest.mark.parametrize(
    "names",
    [
        *(["a[:, 0:2]"], ["a[:, 0:5]", "a[:, 4:8]"], ["a[:, 0:9]"], ["a[:, 1:8]"]),
        *(["a[0:5]"], ["a[0:5]", "a[4:10]"], ["a[0:5]", "a[5:11]"], ["a[0:5, 0:4]", "a[5:10, 0:4]", "a[0:5, 4:8]"]),
    ],
)
def test_pieces_that_do_not_cover_a_table_once_are_refused(names: list[str]) -> None:
    with pytest.raises(
        PlanError, match=re.escape("partition: expected pieces that cover the 10 rows and 8 columns of a once")
    ):
        split_as_named([TableSpec("a", 10, 8)], names)


def test_a_plan_whose_pieces_leave_columns_out_is_refused() -> None:
    plan = make_plan([TableSpec("a", 100, 64)], Topology(4, 1), split_columns=True)
    tables = (*plan.tables[:1], *plan.tables[2:])
    towers = tuple(replace(t, tables=tuple(n for n in t.tables if n != "a[:, 16:32]")) for t in plan.towers)
    placements = {name: shards for name, shards in plan.placements.items() if name != "a[:, 16:32]"}
    broken = replace(plan, tables=tables, towers=towers, placements=placements)
    with pytest.raises(
        PlanError, match=r"plan: expected pieces that cover the 100 rows and 64 columns of a once, found \['a\[:, 0:16"
    ):
        broken.check_tables((TableSpec("a", 100, 64),))


# -------------------------------------------------------------------------------------------------------------- rows


def test_a_table_that_outweighs_a_rank_is_split_by_rows_in_its_tower() -> None:
    tables = [TableSpec("big", 10_001, 64, pooling=5.0), *(TableSpec(f"emb.{k}", 500, 64) for k in range(7))]
    whole, split = (make_plan(tables, Topology(2, 4), split_rows=how) for how in (False, True))
    pieces = split.pieces_of("big")
    assert [piece.name for piece in pieces] == [
        *("big[0:2500]", "big[2500:5000]"),
        *("big[5000:7500]", "big[7500:10001]"),
    ]
    assert len({split.owner(piece.name) for piece in pieces}) == 4
    home = split.home("big")
    assert home is not None
    assert {split.topology.host_of(split.owner(piece.name)) for piece in pieces} == set(home.hosts)
    assert (pieces[0].pooling, pieces[0].jagged, pieces[0].dim) == (1.25, 1.0, 64)
    assert [tower.output_width for tower in split.towers] == [tower.output_width for tower in whole.towers]
    owners = sorted({split.owner(piece.name) for piece in pieces})
    assert f"table big is split into 4 ranges of rows, on ranks {', '.join(map(str, owners))}" in split.notes
    assert TowerPlan.from_json(split.to_json()) == split
    split.check_tables(tables)
    assert split.unsplit(tables).tables == tuple(tables)


def test_rows_and_columns_are_chosen_by_what_a_sample_costs() -> None:
    short, long = (TableSpec("big", 1000, 64, pooling=pooling) for pooling in (1.0, 200.0))
    for table, way in ((short, "columns"), (long, "rows")):
        plan = make_plan(
            [table], Topology(2, 2), towers=2, split_rows=True, split_columns=True, partition=[["big"], []]
        )
        assert f"table big is split into 2 ranges of {way}, on ranks 0, 1" in plan.notes
    topology = Topology(2, 2, intra_bytes_per_s=2.0, cross_bytes_per_s=1.0)
    assert seconds_in_rows(short, 2, topology) == (4 + 2 * 4) / 1 + 2 * 2 * 256 / 2  # an id, and a length a piece
    assert seconds_in_columns(short, 2, topology) == 2 * 8 / 1 + 2 * 256 / 2
    assert seconds_in_columns(short, 2, Topology(1, 2, intra_bytes_per_s=2.0)) == 2 * 8 / 2 + 2 * 256 / 2


def test_a_table_of_few_columns_is_split_by_rows_where_a_rank_s_memory_asks_for_it() -> None:
    tables = [TableSpec("big", 1000, 4), TableSpec("small", 10, 4)]
    with pytest.raises(PlanError, match="raise the bound or set split_columns or split_rows"):
        make_plan(tables, Topology(1, 4), memory_bytes=5000, split_columns=True)
    plan = make_plan(tables, Topology(1, 4), memory_bytes=5000, split_columns=True, split_rows=True)
    assert [piece.rows for piece in plan.pieces_of("big")] == [250] * 4


@pytest.mark.parametrize(("splits", "rows", "columns"), [("none", 0, 0), ("columns", 0, 4), ("rows and columns", 4, 4)])
def test_what_may_not_be_split_is_left_whole(splits: str, rows: int, columns: int) -> None:
    tables = [TableSpec("big", 1000, 64, splits=splits)]
    assert len(make_plan(tables, Topology(1, 4), split_rows=True).pieces_of("big")) == rows
    assert len(make_plan(tables, Topology(4, 1), split_columns=True).pieces_of("big")) == columns


def test_pieces_of_columns_stay_in_a_tower_where_they_must() -> None:
    tables = [TableSpec("big", 1000, 64), TableSpec("small", 100, 64)]
    plan = make_plan(tables, Topology(2, 2), split_columns=True, across_towers=False)
    assert [piece.dim for piece in plan.pieces_of("big")] == [32, 32]
    assert plan.home("big") is not None


def test_pieces_of_rows_in_two_towers_are_refused() -> None:
    with pytest.raises(PlanError, match="plan: expected the row pieces of a in one tower, where they are added up"):
        make_plan([TableSpec("a", 10, 8)], Topology(2, 1), partition=[["a[0:5]"], ["a[5:10]"]])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=6),
    hosts=st.integers(1, 3),
    local_ranks=st.integers(1, 4),
    columns=st.booleans(),
)
def test_plans_with_pieces_of_rows_cover_every_table(
    sizes: list[tuple[int, int]], hosts: int, local_ranks: int, columns: bool
) -> None:
    tables = [TableSpec(f"emb.{k}", rows, dim, pooling=k + 1.0) for k, (rows, dim) in enumerate(sizes)]
    plan = make_plan(tables, Topology(hosts, local_ranks), split_rows=True, split_columns=columns)
    plan.check_tables(tables)
    assert sum(table.memory_bytes for table in plan.tables) == sum(table.memory_bytes for table in tables)
    width = sum(table.dim for table in tables)
    assert sum(tower.output_width for tower in plan.towers) == width
