"""Ranks agree on one plan, or end in the same error; here each rank is a thread over one store."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dmt_compile import torch_internals
from dmt_compile.errors import CollectiveError, ConfigError, PlanError
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime import agreement
from dmt_compile.runtime.agreement import agree, describe_options, signature
from dmt_compile.topology import Topology

TABLES = (TableSpec("emb.0", 10, 4), TableSpec("emb.1", 20, 8))
WORLD = 4


class Ranks(threading.local):
    """What differs between threads: their rank and their count of agreements."""

    rank = 0

    def __init__(self) -> None:
        self.rounds = itertools.count()

    def __next__(self) -> int:
        return next(self.rounds)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Let each thread be a rank of one world over one store."""
    ranks, store = Ranks(), dist.HashStore()
    monkeypatch.setattr(dist, "get_rank", lambda: ranks.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: WORLD)
    monkeypatch.setattr(torch_internals, "default_store", lambda: store)
    monkeypatch.setattr(agreement, "_rounds", ranks)
    return ranks


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time limits pass twenty times as fast."""
    clock = SimpleNamespace(monotonic=lambda: 20 * time.monotonic(), sleep=time.sleep)
    monkeypatch.setattr(agreement, "time", clock)


def together(ranks: Ranks, call: Callable[[int], Any], present: tuple[int, ...] = tuple(range(WORLD))) -> list[Any]:
    """Call once on every rank that is present; return each one's result or exception."""
    results: dict[int, Any] = {}

    def one(rank: int) -> None:
        ranks.rank = rank
        try:
            results[rank] = call(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in present]


def plan() -> TowerPlan:
    return make_plan(TABLES, Topology(2, 2))


def never() -> TowerPlan:
    raise AssertionError("only rank 0 plans, and only when all agree")


def test_every_rank_gets_the_plan_that_rank_zero_made_time_after_time(ranks: Ranks) -> None:
    makers: list[int] = []

    def make() -> TowerPlan:
        makers.append(ranks.rank)
        return make_plan(TABLES, Topology(2, 2), partition="strided" if len(makers) > 1 else "balanced")

    def twice(rank: int) -> list[TowerPlan]:
        return [agree(make, lambda: "same", 60.0) for _ in range(2)]

    first = plan()
    second = make_plan(TABLES, Topology(2, 2), partition="strided")
    assert together(ranks, twice) == [[first, second]] * WORLD
    assert makers == [0, 0]


@pytest.mark.parametrize("faulty", [0, 2])
def test_an_error_of_one_rank_is_raised_on_all(ranks: Ranks, faulty: int) -> None:
    def mine() -> str:
        if ranks.rank == faulty:
            raise ConfigError("options: expected a known option, found 'x'")
        return "same"

    results = together(ranks, lambda rank: agree(never, mine, 60.0))
    assert [type(result) for result in results] == [ConfigError] * WORLD
    for rank, result in enumerate(results):
        where = "" if rank == faulty else f"rank {faulty}: "
        assert str(result) == f"{where}options: expected a known option, found 'x'"


def test_an_error_of_the_planner_is_raised_on_all(ranks: Ranks) -> None:
    def make() -> TowerPlan:
        raise PlanError("partition: expected every table in a list, found none for emb.0")

    results = together(ranks, lambda rank: agree(make, lambda: "same", 60.0))
    assert [(type(result), str(result)) for result in results] == [
        (PlanError, "partition: expected every table in a list, found none for emb.0")
    ] * WORLD


def test_ranks_that_differ_are_named_on_all(ranks: Ranks) -> None:
    def mine() -> str:
        return "5 tables, abc" if ranks.rank < 2 else f"5 tables, other{ranks.rank}"

    results = together(ranks, lambda rank: agree(never, mine, 60.0))
    assert {type(result) for result in results} == {PlanError}
    assert len({str(result) for result in results}) == 1
    assert "found 5 tables, abc on rank 0 and 5 tables, other2 on rank 2 (ranks [2, 3] differ)" in str(results[0])


def test_a_missing_rank_is_named_on_all(ranks: Ranks, hasty: None) -> None:
    results = together(ranks, lambda rank: agree(never, lambda: "same", 10.0), present=(0, 2))
    for result in results:
        assert isinstance(result, CollectiveError)
        assert "expected all 4 ranks within 10 s, found that ranks [1, 3] did not arrive" in str(result)


def test_a_missing_rank_zero_is_named(ranks: Ranks, hasty: None) -> None:
    results = together(ranks, lambda rank: agree(never, lambda: "same", 5.0), present=(1, 3))
    for result in results:
        assert isinstance(result, CollectiveError)
        assert "expected rank 0's plan within 5 s, found that rank 0 did not arrive" in str(result)


def test_a_store_that_went_away_counts_as_a_missing_rank_zero(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(keys: list[str]) -> bool:
        raise RuntimeError("Connection was closed")

    gone = SimpleNamespace(set=lambda key, value: None, check=check)
    monkeypatch.setattr(torch_internals, "default_store", lambda: gone)
    [result] = together(ranks, lambda rank: agree(never, lambda: "same", 60.0), present=(3,))
    assert isinstance(result, CollectiveError)
    assert "found that rank 0 did not arrive" in str(result)


def test_a_signature_holds_the_model_and_the_options_and_not_the_batch() -> None:
    options = describe_options({"towers": "host", "topology": Topology(2, 2)})
    shapes = [("top.weight", (1, 4), "torch.float32")]
    base = signature(TABLES, options, shapes)
    assert base.startswith("2 tables, ")
    assert signature((TableSpec("emb.0", 10, 4, pooling=3.5), TABLES[1]), options, shapes) == base
    others = [
        signature(TABLES[:1], options, shapes),
        signature((TableSpec("emb.0", 11, 4), TABLES[1]), options, shapes),
        signature((TableSpec("emb.0", 10, 5), TABLES[1]), options, shapes),
        signature((TableSpec("emb.9", 10, 4), TABLES[1]), options, shapes),
        signature((TableSpec("emb.0", 10, 4, dtype="bfloat16"), TABLES[1]), options, shapes),
        signature((TableSpec("emb.0", 10, 4, features=2), TABLES[1]), options, shapes),
        signature(TABLES[::-1], options, shapes),
        signature(TABLES, describe_options({"towers": 2, "topology": Topology(2, 2)}), shapes),
        signature(TABLES, options, [("top.weight", (2, 4), "torch.float32")]),
    ]
    assert len({base, *others}) == len(others) + 1
    assert describe_options({"b": 1, "a": 2}) == describe_options({"a": 2, "b": 1})
