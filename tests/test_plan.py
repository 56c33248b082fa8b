from __future__ import annotations

import dataclasses
import difflib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.errors import PlanError
from dmt_compile.inspection.tables import WIDTH, plan_text
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import PLAN_VERSION, Shard, TableSpec, Tower, TowerPlan
from dmt_compile.topology import Topology

TABLES = tuple(TableSpec(f"emb.{i}", rows=100 + i, dim=8) for i in range(6))


def small_plan() -> TowerPlan:
    """Two hosts with two ranks each; tables 0 to 2 on the first host, 3 to 5 on the second."""
    return make_plan(TABLES, Topology(2, 2), partition=[[t.name for t in TABLES[:3]], [t.name for t in TABLES[3:]]])


def moved(plan: TowerPlan, table: str, rank: int) -> TowerPlan:
    old = plan.placements[table][0]
    placements = plan.placements | {table: (dataclasses.replace(old, rank=rank),)}
    return dataclasses.replace(plan, placements=placements)


def changed_lines(one: TowerPlan, two: TowerPlan) -> list[str]:
    lines = difflib.ndiff(one.to_json().splitlines(), two.to_json().splitlines())
    return [line for line in lines if line.startswith(("-", "+"))]


def test_table_sizes() -> None:
    table = TableSpec("emb.0", rows=10, dim=4, dtype="bfloat16", features=2, pooling=2.5)
    assert table.element_bytes == 2
    assert table.memory_bytes == 80
    assert table.output_bytes_per_sample == 16
    assert table.id_bytes_per_sample == 2 * 4 * 3.5


@given(
    number=st.integers(0, 12),
    shape=st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 1)]),
    partition=st.sampled_from(["balanced", "strided"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_json_round_trip(number: int, shape: tuple[int, int], partition: str, dtype: str) -> None:
    tables = [TableSpec(f'e"mb.{i}[0:7]', 10 + i, 4, dtype, 1 + i % 2, i / 3) for i in range(number)]
    plan = make_plan(tables, Topology(*shape), partition=partition)
    again = TowerPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert json.loads(plan.to_json())["version"] == PLAN_VERSION


def test_save_and_load(tmp_path: Path) -> None:
    small_plan().save(tmp_path / "plan.json")
    assert TowerPlan.load(tmp_path / "plan.json") == small_plan()
    assert TowerPlan.load(str(tmp_path / "plan.json")) == small_plan()


def test_split_tables_round_trip() -> None:
    halves = (Shard(0, (0, 100), (0, 4)), Shard(1, (0, 100), (4, 8)))
    plan = dataclasses.replace(small_plan(), placements=small_plan().placements | {"emb.0": halves})
    assert TowerPlan.from_json(plan.to_json()) == plan
    assert len(changed_lines(small_plan(), plan)) == 3  # one shard's line becomes two


def test_another_owner_changes_one_line() -> None:
    plan = small_plan()
    owner = plan.owner("emb.1")
    before, after = changed_lines(plan, moved(plan, "emb.1", 1 - owner))
    assert before[0] + after[0] == "-+"
    for line, rank in ((before, owner), (after, 1 - owner)):
        assert f'{{"table": "emb.1", "rank": {rank}, ' in line


def test_another_tower_changes_both_towers_and_the_shard() -> None:
    plan = small_plan()
    first, second = plan.towers
    towers = (
        dataclasses.replace(first, tables=first.tables[1:], output_width=16),
        dataclasses.replace(second, tables=(*second.tables, "emb.0"), output_width=32),
    )
    shard = dataclasses.replace(plan.placements["emb.0"][0], rank=2)
    other = dataclasses.replace(plan, towers=towers, placements=plan.placements | {"emb.0": (shard,)})
    lines = changed_lines(plan, other)
    assert len(lines) == 6
    assert sum('"name": "tower' in line for line in lines) == 4
    assert sum('"table": "emb.0"' in line for line in lines) == 2


def test_fingerprint_follows_the_content() -> None:
    plan = small_plan()
    assert plan.fingerprint == small_plan().fingerprint
    assert plan.fingerprint != moved(plan, "emb.1", 1 - plan.owner("emb.1")).fingerprint
    assert 0 <= plan.fingerprint < 2**62


def test_tower_and_owner_of_a_table() -> None:
    plan = small_plan()
    assert plan.tower_of("emb.4").name == "tower1"
    assert plan.owner("emb.4") in (2, 3)
    with pytest.raises(PlanError, match=re.escape("expected a tower for table emb.9, found none; the plan belongs to")):
        plan.tower_of("emb.9")
    halves = (Shard(0, (0, 50), (0, 8)), Shard(1, (50, 100), (0, 8)))
    split = dataclasses.replace(plan, placements=plan.placements | {"emb.0": halves})
    with pytest.raises(PlanError, match=re.escape("plan: expected one shard for table emb.0, found 2")):
        split.owner("emb.0")


def towers(*tables: tuple[str, ...], hosts: tuple[int, ...] = (0,)) -> tuple[Tower, ...]:
    return tuple(Tower(f"tower{k}", names, hosts, 8 * len(names)) for k, names in enumerate(tables))


@pytest.mark.parametrize(
    ("of_towers", "found"),
    [
        (towers(("a",)), "found missing ['b'], unknown [], in two towers []"),
        (towers(("a", "b", "c")), "found missing [], unknown ['c'], in two towers []"),
        (towers(("a", "b"), ("b",)), "found missing [], unknown [], in two towers ['b']"),
    ],
)
def test_tables_that_are_not_in_exactly_one_tower(of_towers: tuple[Tower, ...], found: str) -> None:
    tables = (TableSpec("a", 10, 8), TableSpec("b", 10, 8))
    placements = {table.name: (Shard(0, (0, 10), (0, 8)),) for table in tables}
    with pytest.raises(PlanError, match=re.escape(f"plan: expected every table in exactly one tower, {found}")):
        TowerPlan(Topology(1, 2), tables, of_towers, placements)


def test_a_placement_of_a_table_that_the_plan_does_not_have() -> None:
    placements = {name: (Shard(0, (0, 10), (0, 8)),) for name in ("a", "gone")}
    with pytest.raises(PlanError, match=re.escape("found missing [], unknown ['gone'], in two towers []")):
        TowerPlan(Topology(1, 2), (TableSpec("a", 10, 8),), towers(("a",)), placements)


@pytest.mark.parametrize("hosts", [(1,), (-1,), (0, 1), ()])
def test_hosts_that_the_topology_does_not_have(hosts: tuple[int, ...]) -> None:
    placements = {"a": (Shard(0, (0, 10), (0, 8)),)}
    with pytest.raises(PlanError, match=re.escape(f"plan: expected hosts below 1 for tower0, found {hosts}")):
        TowerPlan(Topology(1, 2), (TableSpec("a", 10, 8),), towers(("a",), hosts=hosts), placements)


@pytest.mark.parametrize(
    "shard",
    [
        Shard(0, (0, 11), (0, 8)),
        Shard(0, (-1, 10), (0, 8)),
        Shard(0, (0, 10), (0, 9)),
        Shard(0, (10, 0), (0, 8)),
        Shard(4, (0, 10), (0, 8)),
        Shard(-1, (0, 10), (0, 8)),
        Shard(2, (0, 10), (0, 8)),
    ],
)
def test_shards_outside_their_table_or_tower(shard: Shard) -> None:
    expected = (
        "plan: expected shards of a inside 10x8 on the ranks of hosts (0,), found rows "
        f"{shard.rows} columns {shard.columns} on rank {shard.rank}"
    )
    with pytest.raises(PlanError, match=re.escape(expected)):
        TowerPlan(Topology(2, 2), (TableSpec("a", 10, 8),), towers(("a",)), {"a": (shard,)})


@pytest.mark.parametrize(
    "shards",
    [
        (),
        (Shard(0, (0, 5), (0, 8)),),
        (Shard(0, (0, 10), (0, 8)), Shard(1, (0, 10), (0, 8))),
        (Shard(0, (0, 5), (0, 8)), Shard(1, (4, 9), (0, 8))),
        (Shard(0, (0, 10), (0, 4)), Shard(1, (0, 10), (3, 7))),
    ],
)
def test_shards_that_do_not_cover_their_table_once(shards: tuple[Shard, ...]) -> None:
    expected = (
        "plan: expected the shards of a to cover its 10x8 elements once, found "
        f"{[(shard.rank, shard.rows, shard.columns) for shard in shards]}"
    )
    with pytest.raises(PlanError, match=re.escape(expected)):
        TowerPlan(Topology(1, 2), (TableSpec("a", 10, 8),), towers(("a",)), {"a": shards} if shards else {})


def test_check_tables() -> None:
    plan = small_plan()
    plan.check_tables(TABLES)
    plan.check_tables(tuple(reversed(TABLES)))
    # Pooling is a measurement of one batch and features a matter of the graph; neither makes it another model.
    plan.check_tables(tuple(dataclasses.replace(table, pooling=7.0, features=3) for table in TABLES))
    other = (TableSpec("emb.0", 7, 8), *TABLES[1:5])
    expected = (
        "plan: expected table emb.0 as (rows, dim, dtype) = (100, 8, 'float32'), found (7, 8, 'float32') "
        "(2 tables differ); the plan was made for another model, make a new one with dmt_compile.plan"
    )
    with pytest.raises(PlanError, match=re.escape(expected)):
        plan.check_tables(other)


def test_another_version() -> None:
    text = small_plan().to_json().replace(f'"version": {PLAN_VERSION}', '"version": 99')
    with pytest.raises(
        PlanError, match=re.escape(f"plan: expected version {PLAN_VERSION}, found 99; make the plan again")
    ):
        TowerPlan.from_json(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("not json", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError('version')"),
        ('{"version": 3}', "KeyError('placements')"),
        ('{"version": 3, "placements": [], "topology": {"hosts": 1}}', "TypeError"),
    ],
)
def test_text_that_is_no_plan(text: str, found: str) -> None:
    with pytest.raises(PlanError, match=re.escape("plan: expected a tower plan in JSON, found ") + re.escape(found)):
        TowerPlan.from_json(text)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"plan: expected a readable file, found .*absent\.json.*; pass the path that save"
    ):
        TowerPlan.load(tmp_path / "absent.json")


def test_text_shows_towers_ranks_and_tables() -> None:
    plan = small_plan()
    text = str(plan)
    assert text == plan_text(plan)
    first, *rest = text.splitlines()
    assert first == "Tower plan: 6 tables in 2 towers, 2 hosts x 2 ranks, partition explicit"
    assert rest[0] == "- largest tower load 1.00x the mean, memory 1.01x"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest if line.startswith("|")]
    assert rows[0] == ["tower", "hosts", "tables", "output width", "memory"]
    assert rows[1] == ["tower0", "0", "3", "24", "9.5 KiB"]
    ranks = [row for row in rows if len(row) == 5 and row[0].isdigit()]
    assert [row[:2] for row in ranks] == [["0", "0"], ["1", "0"], ["2", "1"], ["3", "1"]]
    assert sum(int(row[2]) for row in ranks) == 6
    owner = str(plan.owner("emb.5"))
    assert rows[-1] == ["emb.5", "105", "8", "3.3 KiB", "tower1", owner]


def test_text_counts_the_shards_of_a_split_table() -> None:
    table = TableSpec("emb.0", rows=4, dim=16)
    halves = (Shard(0, (0, 4), (0, 8)), Shard(1, (0, 4), (8, 16)))
    plan = TowerPlan(Topology(1, 2), (table,), (Tower("tower0", ("emb.0",), (0,), 16),), {"emb.0": halves})
    lines = str(plan).splitlines()
    assert "| 0    | 0    |      1 |  128 B |            40 B |" in lines
    assert "| emb.0 |    4 |  16 |  256 B | tower0 | 0, 1  |" in lines


@pytest.mark.parametrize(("number", "hidden"), [(40, None), (41, 16), (1000, 975)])
def test_text_shortens_long_parts(number: int, hidden: int | None) -> None:
    plan = make_plan([TableSpec(f"emb.{i}", 10, 4) for i in range(number)], Topology(1, 1))
    shown = [line.split("|")[1].strip() for line in str(plan).splitlines() if line.startswith("| emb.")]
    if hidden is None:
        assert len(shown) == number
        assert "more" not in str(plan)
    else:
        assert shown == [f"emb.{i}" for i in (*range(20), *range(number - 5, number))]
        assert f"... {hidden} more" in str(plan)


def test_text_is_plain_ascii_within_its_width_and_keeps_names() -> None:
    long_name = "model.sparse." + "very_long_module_name." * 8 + "emb.0[0:100]"
    tables = [TableSpec(long_name, 2**40, 128), TableSpec(":smile:[red]", 3, 4), TableSpec("weird[/bold]", 5, 4)]
    text = str(make_plan(tables, Topology(1, 1)))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert ":smile:[red]" in text
    assert "weird[/bold]" in text
    pieces = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert long_name in "".join(pieces)
    assert "512.0 TiB" in text


def test_text_of_an_empty_plan() -> None:
    lines = str(make_plan([], Topology(1, 2))).splitlines()
    assert lines[0] == "Tower plan: 0 tables in 1 tower, 1 host x 2 ranks, partition balanced"
    assert lines[1] == "- the model has no embedding tables"
