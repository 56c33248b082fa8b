"""Which way ids take to the tables' owners: a model of the seconds that the two ways take.

A step of B samples a rank, on H hosts of L ranks. X, I and I' are the bytes of ids (with bag lengths and weights) that
a rank sends across hosts, and inside its host in one exchange or in two; E those of the embeddings it looks up for all.

    global        C + M ((H - 1) L + L - 1) + X / cross + I / intra + 4 E / memory
    hierarchical  2 C + M (H - 1 + L - 1)   + X / cross + I' / intra

Bytes across hosts are the same: each id crosses once. In two exchanges they go in H - 1 messages in place of (H - 1) L,
and once more inside the host, so that I' = I + X (L - 1) / L. What the permute reads and writes, forward and backward,
is the term 4 E / memory; it falls away where there is nothing to permute.

All ranks must choose alike while their batches differ, so B is a constant: the local batch of the DMT paper.
"""

from __future__ import annotations

from dmt_compile.cost.traffic import Hop, embedding_traffic
from dmt_compile.plan import TowerPlan

BATCH_SIZE = 16384
COLLECTIVE_S = 20e-6  # C: to start a collective and wait for it
MESSAGE_S = 2e-6  # M: to send one of its messages, of no length
MEMORY_BYTES_PER_S = 2e12  # a rank's memory


def id_exchange_of(option: str, plan: TowerPlan) -> str:
    """Return how ids reach the tables' owners, ``"global"`` or ``"hierarchical"``; the same on every rank.

    Args:
        option: ``"auto"``, or one of the two; on one host, or with one rank a host, there is one way only.
        plan: the ranks' common plan.
    """
    if plan.topology.hosts == 1 or plan.topology.local_ranks == 1:
        return "global"
    if option != "auto":
        return option
    seconds = id_exchange_seconds(plan)
    return min(seconds, key=seconds.__getitem__)


def id_exchange_seconds(plan: TowerPlan) -> dict[str, float]:
    """Return the expected seconds of both ways: the formulas of this module."""
    topology, groups = plan.topology, plan.tower_groups()
    ranks, hosts, local_ranks = topology.world_size, topology.hosts, topology.local_ranks

    def sending(hops: tuple[Hop, ...]) -> float:
        ids = [hop for hop in hops if hop.name.startswith("ids")]
        cross, intra = sum(hop.cross_bytes for hop in ids), sum(hop.intra_bytes for hop in ids)
        return (cross / topology.cross_bytes_per_s + intra / topology.intra_bytes_per_s) / ranks

    at_once, by_hosts = (
        embedding_traffic(plan, [BATCH_SIZE] * ranks, id_exchange=way).sptt for way in ("global", "hierarchical")
    )
    embedding_bytes = BATCH_SIZE * sum(table.output_bytes_per_sample for table in plan.tables)
    permuted = embedding_bytes if groups.hosts > 1 and groups.local_ranks > 1 else 0
    return {
        "global": COLLECTIVE_S + MESSAGE_S * (ranks - 1) + sending(at_once) + 4 * permuted / MEMORY_BYTES_PER_S,
        "hierarchical": 2 * COLLECTIVE_S + MESSAGE_S * (hosts - 1 + local_ranks - 1) + sending(by_hosts),
    }
