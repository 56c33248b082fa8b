"""Bytes that cross each link in a training step: the flat model-parallel exchange beside the tower transform's.

Every byte is counted once, at its sender; what a rank keeps for itself crosses no link. Counted are ids, pooled
embeddings and their gradients; the few bytes of the step's header and the dense gradients are the same either way and
are not.

Shape suffixes: S sending ranks, R receiving ranks, G ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmt_compile.kernels.pack_rows.reference import packed_dtype, packed_width
from dmt_compile.plan import TowerPlan
from dmt_compile.topology import Topology

Matrix = NDArray[np.int64]
Forms = Mapping[str, tuple[str | None, str | None]]
NO_FORM = (None, None)
NO_FORMS: Forms = {}


@dataclass(frozen=True)
class Hop:
    """One exchange of a step in one direction.

    Args:
        name: ``"ids"``, or ``"ids across hosts"`` and ``"ids in hosts"``; ``"flat embeddings"``, ``"in-host
            embeddings"`` (inside a tower's hosts), ``"peer embeddings"`` or ``"peer tower outputs"``.
        direction: ``"forward"``, or ``"backward"`` for the gradients that mirror it.
        intra_bytes: bytes inside hosts, all ranks.
        cross_bytes: bytes between hosts, all ranks.
        largest_rank_bytes: bytes that the busiest rank sends, over both links.
    """

    name: str
    direction: str
    intra_bytes: int
    cross_bytes: int
    largest_rank_bytes: int


@dataclass(frozen=True)
class Traffic:
    """The exchanges of one training step: flat, with the tower transform (SPTT), and with the plan's Tower Modules.

    ``sptt_tm`` is empty for a plan without Tower Modules.
    """

    flat: tuple[Hop, ...]
    sptt: tuple[Hop, ...]
    sptt_tm: tuple[Hop, ...] = ()

    def bytes_per_link(self) -> dict[str, dict[str, int]]:
        """Return ``{"flat", "sptt" or "sptt+tm": {"intra" or "cross": bytes}}``, summed over hops and ranks."""
        return {
            form: {"intra": sum(hop.intra_bytes for hop in hops), "cross": sum(hop.cross_bytes for hop in hops)}
            for form, hops in (("flat", self.flat), ("sptt", self.sptt), ("sptt+tm", self.sptt_tm))
            if hops
        }


def bytes_per_link(
    plan: TowerPlan, batch_size: int, id_exchange: str = "global", forms: Forms = NO_FORMS
) -> dict[str, dict[str, int]]:
    """Return the bytes of one training step in which every rank has ``batch_size`` samples.

    Args:
        plan: whole tables, or pieces of them, on single ranks.
        batch_size: samples of each rank.
        id_exchange, forms: as for :func:`embedding_traffic`.

    Returns:
        ``{"flat", "sptt" or "sptt+tm": {"intra" or "cross": bytes}}``, summed over all ranks, ids and both directions;
        ``"sptt+tm"`` where the plan has Tower Modules.

    Raises:
        PlanError: a table has several shards.
    """
    sizes = [batch_size] * plan.topology.world_size
    return embedding_traffic(plan, sizes, id_exchange=id_exchange, forms=forms).bytes_per_link()


def embedding_traffic(
    plan: TowerPlan,
    batch_sizes: Sequence[int],
    id_counts: Mapping[str, Sequence[int]] | None = None,
    id_exchange: str = "global",
    forms: Forms = NO_FORMS,
) -> Traffic:
    """Return every exchange of one training step.

    Args:
        plan: whole tables, or pieces of them, on single ranks.
        batch_sizes: samples of each rank.
        id_counts: for each table, or piece, the ids that each rank looks up in it; by default its mean pooling times
            the rank's samples and the table's features.
        id_exchange: how ids reach the owners under SPTT, ``"global"`` or ``"hierarchical"``; flat they go at once.
        forms: hop (``"intra"``, ``"peer"``) -> the forms in which embeddings travel on it under SPTT, forward and
            backward; see :meth:`dmt_compile.config.Options.wire_forms`. Of a form that is scaled by row, one scale is
            counted for each sample, as many as there are where all lookups have one bag a sample.

    Raises:
        PlanError: a table has several shards.

    Source: "Cost analysis" in section 3 of the DMT paper, without its assumption of even tables.
    """
    topology, groups = plan.topology, plan.tower_groups()
    ranks = np.arange(topology.world_size)
    batch_R = np.asarray(batch_sizes, dtype=np.int64)
    width_S = np.zeros(topology.world_size, dtype=np.int64)  # bytes per sample, of every piece
    feature_S = np.zeros_like(width_S)  # of features: pieces of rows are added up, the flat exchange adds none
    added: set[object] = set()
    ids_SR = np.zeros((topology.world_size, topology.world_size), dtype=np.int64)
    for table in plan.tables:
        owner = plan.owner(table.name)
        width_S[owner] += table.output_bytes_per_sample
        feature_S[owner] += 0 if table.added in added else table.output_bytes_per_sample
        added.add(table.added)
        bags_S = table.features * table.bags * batch_R
        counts_S = table.pooling * bags_S if id_counts is None else np.asarray(id_counts[table.name], dtype=np.int64)
        weights_S = table.weighted * table.element_bytes * counts_S
        ids_SR[:, owner] += np.rint(plan.id_bytes * (counts_S + table.jagged * bags_S) + weights_S).astype(np.int64)

    group, position = ranks // groups.local_ranks, ranks % groups.local_ranks
    group_width = np.bincount(group, feature_S, groups.hosts).astype(np.int64)
    peer_rows = np.bincount(position, batch_R, groups.local_ranks).astype(np.int64)
    in_host_SR = peer_rows[position] * (group[:, None] == group)
    peers_SR = batch_R * (position[:, None] == position)
    element_bytes = max((table.element_bytes for table in plan.tables), default=1)

    def hop(name: str, link: str, width_S: NDArray[np.int64], rows_SR: Matrix) -> tuple[Hop, Hop]:
        there, back = (_packed(width_S, element_bytes, form)[:, None] * rows_SR for form in forms.get(link, NO_FORM))
        return _hop(name, "forward", there, topology), _hop(name, "backward", back.T, topology)

    def with_peers(name: str, width: NDArray[np.int64]) -> tuple[Hop, ...]:
        return (
            *(_by_way_of_hosts(ids_SR, topology) if id_exchange == "hierarchical" else [ids]),
            *hop("in-host embeddings", "intra", width_S, in_host_SR),
            *hop(name, "peer", width[group], peers_SR),
        )

    ids = _hop("ids", "forward", ids_SR, topology)
    return Traffic(
        flat=(ids, *hop("flat embeddings", "flat", width_S, np.broadcast_to(batch_R, ids_SR.shape))),
        sptt=with_peers("peer embeddings", group_width),
        sptt_tm=with_peers("peer tower outputs", group_width - _saved_bytes(plan)) if plan.tower_modules else (),
    )


def _by_way_of_hosts(bytes_SR: Matrix, topology: Topology) -> list[Hop]:
    """Return the two hops of the hierarchical id exchange: to the sender's peers, then inside their hosts."""
    hosts, local = topology.hosts, topology.local_ranks
    across_SR, inside_SR = np.zeros_like(bytes_SR), np.zeros_like(bytes_SR)
    by_host = bytes_SR.reshape(hosts, local, hosts, local)  # sender's host and local rank, owner's host and local rank
    for host in range(hosts):
        for position in range(local):
            peer = host * local + position
            across_SR[position::local, peer] = by_host[:, position, host].sum(axis=1)
            inside_SR[peer, host * local : (host + 1) * local] = by_host[:, position, host].sum(axis=0)
    return [
        _hop("ids across hosts", "forward", across_SR, topology),
        _hop("ids in hosts", "forward", inside_SR, topology),
    ]


def _saved_bytes(plan: TowerPlan) -> NDArray[np.int64]:
    """Return the bytes of a sample that each tower group's modules keep off the peer exchange."""
    groups = plan.tower_groups()
    saved = np.zeros(groups.hosts, dtype=np.int64)
    for tower in plan.towers:
        tables = [table for table in plan.tables if table.name in tower.tables]
        columns = sum(t.features * t.dim for t in {t.added: t for t in tables}.values()) - tower.output_width
        saved[tower.hosts[0] // len(tower.hosts)] += columns * max((table.element_bytes for table in tables), default=0)
    return saved


def message_counts(plan: TowerPlan) -> dict[str, dict[str, int]]:
    """Return how many messages one rank sends to exchange the embeddings of one direction.

    Returns:
        ``{"flat" or "sptt": {"intra" or "cross": messages}}``. Ids take as many as ``"flat"`` in one exchange, and in
        the hierarchical one as many as ``"sptt"`` with a tower a host.

    Source: "Cost analysis" in section 3 of the DMT paper: ranks - 1 against (local ranks - 1) + (hosts - 1).
    """
    topology, groups = plan.topology, plan.tower_groups()
    intra = topology.local_ranks - 1
    return {
        "flat": {"intra": intra, "cross": topology.world_size - topology.local_ranks},
        "sptt": {"intra": intra, "cross": groups.local_ranks - topology.local_ranks + groups.hosts - 1},
    }


def _packed(width: NDArray[np.int64], element_bytes: int, form: str | None) -> NDArray[np.int64]:
    """Return the bytes of a sample in a form on the wire, given those of the embeddings as they are."""
    if form is None:
        return width
    columns = width // element_bytes
    return packed_dtype(form).itemsize * np.array([packed_width(int(n), form) for n in columns], dtype=np.int64)


def _hop(name: str, direction: str, bytes_SR: Matrix, topology: Topology) -> Hop:
    """Sum a matrix of bytes by link; its diagonal stays on its rank."""
    host = np.arange(topology.world_size) // topology.local_ranks
    sent_SR = bytes_SR * ~np.eye(topology.world_size, dtype=bool)
    intra = int(sent_SR[host[:, None] == host].sum())
    return Hop(name, direction, intra, int(sent_SR.sum()) - intra, int(sent_SR.sum(axis=1).max()))
