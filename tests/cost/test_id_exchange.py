"""Which way ids take: the formulas, term by term, and what they choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmt_compile.cost.id_exchange import (
    BATCH_SIZE,
    COLLECTIVE_S,
    MEMORY_BYTES_PER_S,
    MESSAGE_S,
    id_exchange_of,
    id_exchange_seconds,
)
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.topology import Topology


def even_plan(
    hosts: int, local_ranks: int, dim: int = 16, pooling: float = 1.0, towers: int | str = "host"
) -> TowerPlan:
    """Return a plan of two equal tables a rank."""
    tables = [TableSpec(f"emb.{i}", 100, dim, pooling=pooling, jagged=0.0) for i in range(2 * hosts * local_ranks)]
    return make_plan(tables, Topology(hosts, local_ranks), towers=towers)


@pytest.mark.parametrize(("hosts", "local_ranks"), [(2, 2), (4, 8), (8, 4)])
def test_the_formulas(hosts: int, local_ranks: int) -> None:
    plan = even_plan(hosts, local_ranks, pooling=3.0)
    ranks, topology = hosts * local_ranks, plan.topology
    id_bytes = BATCH_SIZE * 2 * ranks * 3 * 4  # of one rank, for all owners
    across = id_bytes * (hosts - 1) / hosts
    inside = id_bytes * (local_ranks - 1) / ranks
    forwarded = across * (local_ranks - 1) / local_ranks
    embedding_bytes = BATCH_SIZE * 2 * ranks * 16 * 4
    seconds = id_exchange_seconds(plan)
    assert seconds["global"] == pytest.approx(
        COLLECTIVE_S
        + MESSAGE_S * ((hosts - 1) * local_ranks + local_ranks - 1)
        + across / topology.cross_bytes_per_s
        + inside / topology.intra_bytes_per_s
        + 4 * embedding_bytes / MEMORY_BYTES_PER_S
    )
    assert seconds["hierarchical"] == pytest.approx(
        2 * COLLECTIVE_S
        + MESSAGE_S * (hosts - 1 + local_ranks - 1)
        + across / topology.cross_bytes_per_s
        + (inside + forwarded) / topology.intra_bytes_per_s
    )


def test_what_is_chosen() -> None:
    assert id_exchange_of("auto", even_plan(2, 2, dim=4)) == "global"  # one message saved is no collective's worth
    assert id_exchange_of("auto", even_plan(8, 8)) == "hierarchical"
    assert id_exchange_of("auto", even_plan(2, 2, dim=128)) == "hierarchical"  # wide rows to permute
    assert id_exchange_of("auto", even_plan(2, 2, dim=128, pooling=1000.0)) == "global"  # more ids than rows
    slow = even_plan(2, 2, dim=128)
    slow = replace(slow, topology=replace(slow.topology, intra_bytes_per_s=1e9))
    assert id_exchange_of("auto", slow) == "global"  # where ids are forwarded slowly


def test_a_tower_over_all_hosts_has_nothing_to_permute() -> None:
    assert id_exchange_seconds(even_plan(2, 2, dim=128, towers=1))["global"] < 1e-3
    assert id_exchange_of("auto", even_plan(2, 2, dim=128, towers=1)) == "global"


@pytest.mark.parametrize("option", ["global", "hierarchical"])
def test_a_wish_is_followed_where_there_are_two_ways(option: str) -> None:
    assert id_exchange_of(option, even_plan(2, 2)) == option
    assert id_exchange_of(option, even_plan(1, 4)) == "global"
    assert id_exchange_of(option, even_plan(4, 1)) == "global"
