"""The operators that bring ids to the tables' owners (step a of section 3.1 of the DMT paper).

One graph serves every rank: what differs (who owns which table, how many samples each rank has) is in the layout and in
the step's route.

Shape suffixes: B samples of this rank, G samples of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmt_compile.errors import CollectiveError
from dmt_compile.ir.ops import FreshSizes, operator, requires_grad
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime import world as runtime
from dmt_compile.runtime.checks import Fault, bag_bounds, find_fault, number_of_bags, trim
from dmt_compile.runtime.route import HEADER_FIELDS, Layout, Route, make_layout


@dataclass(frozen=True)
class FakeRoute:
    """A route whose sizes are symbols."""

    layout: Layout
    batch_size: Any
    global_batch_size: Any


@operator(lambda sizes, *args: make_layout(*args))
def layout(
    hosts: int,
    local_ranks: int,
    owners: tuple[int, ...],
    widths: tuple[int, ...],
    jagged: tuple[bool, ...],
    weighted: tuple[bool, ...],
    outputs: tuple[int, ...] = (),
    summed: tuple[tuple[int, ...], ...] = (),
) -> Layout:
    """Return the static layout: tower groups x ranks in a group; each feature's owner, width and what it sends.

    ``outputs``: columns that each group sends to its peers where Tower Modules make them. ``summed``: features of row
    pieces that are added up.
    """
    return make_layout(hosts, local_ranks, owners, widths, jagged, weighted, outputs, summed)


def _fake_pack_ids(sizes: FreshSizes, layout: Any, ids: Any, offsets: Any, *rest: Any) -> Any:
    world, fields = layout.topology.world_size, len(HEADER_FIELDS) + layout.most_features
    return ids[0].new_empty(sizes.make(), dtype=torch.int64), torch.empty(world, fields, dtype=torch.int64)


@operator(_fake_pack_ids)
def pack_ids(
    layout: Layout,
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor | None],
    how: tuple[Pooling, ...],
    weights: Sequence[torch.Tensor | None],
    others: Sequence[torch.Tensor],
    rows: tuple[tuple[int, int], ...],
    check_ids: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's bag lengths and ids, by owner, and the header that announces them.

    A fault in the batch does not raise here: it rides in the header, so that every rank raises it. The arguments are
    those of ``check_batch``.

    Returns:
        1-D int64 payload, for each owner its features' bag lengths, then their ids; and the (ranks, fields) int64
        header on the CPU.
    """
    execution = runtime.current()
    fault = find_fault(ids, offsets, how, weights, others, rows, check_ids)
    bags = number_of_bags(ids[0], offsets[0], how[0])
    words = (execution.fingerprint, bags, *_fault_words(fault), execution.checksum())
    header = torch.zeros(layout.topology.world_size, len(HEADER_FIELDS) + layout.most_features, dtype=torch.int64)
    header[:, : len(words)] = torch.tensor(words)
    if fault is not None:
        return ids[0].new_empty(0, dtype=torch.int64), header
    read = trim(ids, offsets, how)
    pieces: list[torch.Tensor] = []
    for rank, features in enumerate(layout.features_by_rank):
        counts = torch.tensor([len(read[i]) for i in features], dtype=torch.int64)
        header[rank, len(words) : len(words) + len(features)] = counts
        pieces += [bag_bounds(read[i], offsets[i], how[i]).diff() for i in features if layout.jagged[i]]
        pieces += [read[i].long() for i in features]
    return torch.cat(pieces), header


def _fault_words(fault: Fault | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if fault is None else (fault.kind, fault.feature, fault.position, fault.value)


@operator(lambda sizes, header, *rest: torch.empty_like(header), collective=True)
def exchange_headers(header: torch.Tensor, rows: tuple[tuple[int, int], ...], labels: tuple[str, ...]) -> torch.Tensor:
    """Exchange one header row with every rank and raise, on all ranks alike, what any of them found.

    Returns:
        (ranks, fields) int64 on the CPU: row ``s`` is what rank ``s`` announced to this rank.

    Raises:
        BatchError: a rank's batch is faulty.
        CollectiveError: ranks run different programs, or their dense replicas drifted apart.
    """
    world = runtime.current().world
    ranks, fields = header.shape
    each = [fields] * ranks
    sent = header.reshape(-1).to(world.device)
    received = world.start_all_to_all(sent, each, each, "world", "exchange_headers", "forward").wait()
    headers = received.reshape(ranks, fields).cpu()
    check_headers(headers, rows, labels)
    return headers


def check_headers(headers: torch.Tensor, rows: tuple[tuple[int, int], ...], labels: tuple[str, ...]) -> None:
    """Raise what the headers of all ranks report; equal on every rank."""
    columns = {name: headers[:, i].tolist() for i, name in enumerate(HEADER_FIELDS)}
    other = [rank for rank, value in enumerate(columns["fingerprint"]) if value != columns["fingerprint"][0]]
    if other:
        raise CollectiveError(
            "exchange_headers: expected the same program on every rank, "
            f"found another one than rank 0's on ranks {other}; "
            "give every rank the same model, options, mode (train or eval) and grad mode"
        )
    for rank, kind in enumerate(columns["fault"]):
        if kind:
            fault = Fault(kind, *(columns[name][rank] for name in ("feature", "position", "value")))
            raise fault.error(labels, rows, f" of rank {rank}'s batch")
    if len(set(columns["checksum"])) > 1:
        raise CollectiveError(
            "exchange_headers: expected equal dense parameters on every rank, found that they differ; update them "
            "alike on every rank (clip with dmt_compile.clip_grad_norm_, step the same optimizer)"
        )


def _fake_route(sizes: FreshSizes, layout: Any, sent: Any, received: Any, batch_size: Any) -> Any:
    return FakeRoute(layout, batch_size, sizes.make())


@operator(_fake_route)
def route(layout: Layout, sent: torch.Tensor, received: torch.Tensor, batch_size: int) -> Route:
    """Return the sizes of this step's exchanges from the headers that this rank sent and received."""
    rank, first = runtime.current().world.rank, len(HEADER_FIELDS)
    rows: list[list[int]] = received.tolist()
    counts: list[list[int]] = sent[:, first:].tolist()
    mine = len(layout.features_by_rank[rank])
    return Route(
        layout=layout,
        rank=rank,
        batch_sizes=tuple(row[HEADER_FIELDS.index("batch_size")] for row in rows),
        sent_ids=tuple(tuple(row[: len(f)]) for row, f in zip(counts, layout.features_by_rank, strict=True)),
        received_ids=tuple(tuple(row[first : first + mine]) for row in rows),
    )


def _fake_unpack_ids(sizes: FreshSizes, received: Any, route: Any) -> Any:
    out: list[Any] = []
    for jagged in route.layout.jagged:
        ids = received.new_empty(sizes.make() if jagged else route.global_batch_size)
        out += [ids, received.new_empty(route.global_batch_size) if jagged else None]
    return tuple(out)


@operator(_fake_unpack_ids)
def unpack_ids(received: torch.Tensor, route: Route) -> tuple[torch.Tensor | None, ...]:
    """Return (ids, offsets) of every feature over the samples of all ranks, in rank order.

    Returns:
        2F entries: ids (N,) and offsets (G,) int64 of each feature, ``None`` for offsets where each bag has one id;
        ``None`` twice where another rank owns it.
    """
    layout = route.layout
    features = layout.features_by_rank[route.rank]
    jagged = [feature for feature in features if layout.jagged[feature]]
    sizes = [
        size
        for batch_size, counts in zip(route.batch_sizes, route.received_ids, strict=True)
        for size in (*(batch_size for _ in jagged), *counts)
    ]
    pieces = received.split(sizes)
    step = len(jagged) + len(features)
    out: list[torch.Tensor | None] = [None] * (2 * len(layout.owners))
    for position, feature in enumerate(features):
        out[2 * feature] = torch.cat(pieces[len(jagged) + position :: step])
    for position, feature in enumerate(jagged):
        lengths_G = torch.cat(pieces[position::step])
        out[2 * feature + 1] = lengths_G.cumsum(0) - lengths_G
    return tuple(out)


@operator(lambda sizes, weights, offsets, how, route: requires_grad(weights[0].new_empty(sizes.make()), *weights))
def pack_weights(
    weights: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor], how: tuple[Pooling, ...], route: Route
) -> torch.Tensor:
    """Return the weights of this rank's ids, by owner, 1-D; ``weights``: of the weighted features, in order."""
    layout = route.layout
    ordered = [feature for feature, weighted in enumerate(layout.weighted) if weighted]
    read = dict(zip(ordered, trim(weights, offsets, how), strict=True))
    return torch.cat([read[i] for features in layout.features_by_rank for i in features if i in read])


@operator(
    lambda sizes, received, route: tuple(
        requires_grad(received.new_empty(sizes.make()), received) if weighted else None
        for weighted in route.layout.weighted
    )
)
def unpack_weights(received: torch.Tensor, route: Route) -> tuple[torch.Tensor | None, ...]:
    """Return each feature's weights over the samples of all ranks, ``None`` without weights.

    Where another rank owns the table they are empty, but still a part of the backward pass, in which all ranks exchange
    gradients.
    """
    layout = route.layout
    features = [feature for feature in layout.features_by_rank[route.rank] if layout.weighted[feature]]
    sizes = [size for counts in route.received_ids for size in route.weights_of(route.rank, counts)]
    pieces = received.split(sizes)
    out = [received[:0] if weighted else None for weighted in layout.weighted]
    for position, feature in enumerate(features):
        out[feature] = torch.cat(pieces[position :: len(features)])
    return tuple(out)
