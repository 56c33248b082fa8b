"""Bytes that dense gradients move across each link of a topology, exactly, in one backward pass."""

from __future__ import annotations

from dmt_compile.cost.traffic import Hop
from dmt_compile.topology import Topology


def gradient_traffic(
    topology: Topology, elements: int, element_bytes: int, hierarchical: bool, wire_bytes: int | None = None
) -> Hop:
    """Return what one bucket of gradients that all ranks hold moves to be averaged over all of them.

    Args:
        topology: H hosts of L ranks each.
        elements: in the bucket; a hierarchical reduction pads them to a multiple of the ranks.
        element_bytes: of one in memory.
        hierarchical: reduce-scatter in the host, all-reduce across, all-gather in the host; else one ring of all ranks.
        wire_bytes: of an element between hosts, for a hierarchical reduction; ``None``: ``element_bytes``.

    Returns:
        ``dense gradients``, backward. Each rank sends 2 (HL-1) / HL of the bytes to its neighbour in the ring, and H
        ranks have theirs on another host; or 2 (L-1) / L of them inside its host, and 2 (H-1) / H of a part of 1 / L
        to other hosts.
    """
    hosts, local, ranks = topology.hosts, topology.local_ranks, topology.world_size
    if not hierarchical:
        sent = 2 * elements * element_bytes * (ranks - 1) // ranks
        leaving = hosts if hosts > 1 else 0
        return Hop("dense gradients", "backward", (ranks - leaving) * sent, leaving * sent, sent)
    part = -(-elements // ranks)
    in_host = 2 * (local - 1) * hosts * part * element_bytes
    across = 2 * (hosts - 1) * part * (wire_bytes or element_bytes)
    return Hop("dense gradients", "backward", ranks * in_host, ranks * across, in_host + across)
