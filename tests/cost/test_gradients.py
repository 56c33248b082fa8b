"""Bytes of dense gradients: the closed formula against what is said of it; the ledgers are held to it elsewhere."""

from __future__ import annotations

import pytest

from dmt_compile.cost.gradients import gradient_traffic
from dmt_compile.topology import Topology


@pytest.mark.parametrize(("hosts", "local_ranks"), [(2, 2), (4, 8), (3, 5), (4, 1), (1, 4), (64, 8)])
def test_a_part_of_each_gradient_crosses_hosts(hosts: int, local_ranks: int) -> None:
    topology = Topology(hosts, local_ranks)
    ranks, elements = topology.world_size, 6 * topology.world_size
    size = 4 * elements
    flat, tall = (gradient_traffic(topology, elements, 4, hierarchical) for hierarchical in (False, True))
    assert flat.cross_bytes == (hosts if hosts > 1 else 0) * 2 * (ranks - 1) * size // ranks
    assert flat.intra_bytes + flat.cross_bytes == 2 * (ranks - 1) * size
    assert tall.cross_bytes == ranks * 2 * (hosts - 1) * (size // hosts // local_ranks)
    assert tall.intra_bytes == ranks * 2 * (local_ranks - 1) * (size // local_ranks)
    assert tall.largest_rank_bytes * ranks == tall.intra_bytes + tall.cross_bytes
    half = gradient_traffic(topology, elements, 4, True, wire_bytes=2)
    assert (half.cross_bytes, half.intra_bytes) == (tall.cross_bytes // 2, tall.intra_bytes)


def test_every_rank_has_an_equal_part_of_what_does_not_divide() -> None:
    assert gradient_traffic(Topology(2, 2), 5, 4, True) == gradient_traffic(Topology(2, 2), 8, 4, True)
    assert gradient_traffic(Topology(2, 2), 0, 4, True).largest_rank_bytes == 0
