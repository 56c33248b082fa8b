"""The operators that bring ids to the tables' owners (step a of section 3.1 of the DMT paper).

One graph serves every rank: what differs (who owns which table, how many samples each rank has) is in the layout and in
the step's route.

Ids and bag lengths travel as int32 where every table's rows can be counted in it: half the bytes, and the lookup takes
them as they come. An id beyond it is out of its table's range. A bag beyond it would need as many ids, which the sender
counts (fault ``NUMBER``); the owner goes on in int64 where all ranks' ids together are more.

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
from dmt_compile.plan import MOST_INT32
from dmt_compile.runtime import world as runtime
from dmt_compile.runtime.checks import NUMBER, Fault, bag_bounds, find_fault, number_of_bags, trim
from dmt_compile.runtime.route import AT_ONCE, HEADER_FIELDS, IdExchange, Layout, Route, make_layout


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
    exchange: IdExchange = AT_ONCE,
    summed: tuple[tuple[int, ...], ...] = (),
) -> Layout:
    """Return the static layout: tower groups x ranks in a group; each feature's owner, width and what it sends.

    ``outputs``: columns that each group sends to its peers where Tower Modules make them. ``exchange``: how ids travel.
    ``summed``: features of row pieces that are added up.
    """
    return make_layout(hosts, local_ranks, owners, widths, jagged, weighted, outputs, exchange, summed)


def _fake_pack_ids(sizes: FreshSizes, layout: Any, ids: Any, offsets: Any, *rest: Any) -> Any:
    header = torch.empty(layout.topology.world_size, layout.header_width, dtype=torch.int64)
    return ids[0].new_empty(sizes.make(), dtype=getattr(torch, layout.exchange.dtype)), header


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
        1-D payload of the layout's type, for each owner its features' bag lengths, then their ids; and the (ranks,
        fields) int64 header on the CPU.
    """
    execution = runtime.current()
    dtype = getattr(torch, layout.exchange.dtype)
    fault = find_fault(ids, offsets, how, weights, others, rows, check_ids) or _too_many(ids, dtype)
    bags = number_of_bags(ids[0], offsets[0], how[0])
    words = (execution.fingerprint, bags, *_fault_words(fault), execution.checksum())
    header = torch.zeros(layout.topology.world_size, layout.header_width, dtype=torch.int64)
    header[:, : len(words)] = torch.tensor(words)
    if fault is not None:
        return ids[0].new_empty(0, dtype=dtype), header
    read = trim(ids, offsets, how)
    counts = tuple(tuple(read[i].numel() for i in features) for features in layout.features_by_rank)
    _announce(header, layout, execution.world.rank, bags, counts)
    jagged = [feature for feature, is_jagged in enumerate(layout.jagged) if is_jagged]
    bounds = dict(zip(jagged, bag_bounds(read, offsets, how, jagged), strict=True))
    lengths = {shared: _convert(shared.diff(), dtype, check_ids) for shared in set(bounds.values())}
    pieces: list[torch.Tensor] = []
    for features in layout.features_by_rank:
        pieces += [lengths[bounds[feature]] for feature in features if feature in bounds]
        pieces += [_convert(read[feature], dtype, check_ids) for feature in features]
    return torch.cat(pieces), header


def plain_header() -> torch.Tensor:
    """Return the header of a step without lookups: which program this rank runs."""
    execution = runtime.current()
    header = torch.zeros(execution.world.topology.world_size, len(HEADER_FIELDS), dtype=torch.int64)
    header[:, HEADER_FIELDS.index("fingerprint")] = execution.fingerprint
    header[:, HEADER_FIELDS.index("checksum")] = execution.checksum()
    return header


def _too_many(ids: Sequence[torch.Tensor], dtype: torch.dtype) -> Fault | None:
    """Return the first feature whose ids cannot be counted in the type that travels."""
    numbers = [] if dtype == torch.int64 else [feature_ids.numel() for feature_ids in ids]
    return next((Fault(NUMBER, i, MOST_INT32, n) for i, n in enumerate(numbers) if n > MOST_INT32), None)


def _convert(tensor: torch.Tensor, dtype: torch.dtype, checked: bool) -> torch.Tensor:
    """Return ids or lengths in the type that travels; what nothing checked and does not fit stays out of range."""
    if dtype == torch.int32 and tensor.dtype == torch.int64 and not checked:
        tensor = tensor.clamp(-1, MOST_INT32)
    return tensor.to(dtype)


def _announce(
    header: torch.Tensor, layout: Layout, rank: int, batch_size: int, counts: tuple[tuple[int, ...], ...]
) -> None:
    """Write how many ids each owner gets, and for those who forward them, how many elements to whom."""
    first = len(HEADER_FIELDS)
    for owner, numbers in enumerate(counts):
        header[owner, first : first + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    if not layout.exchange.hosts:
        return
    mine = Route(layout, rank, (batch_size,) * len(counts), counts, ())
    elements_KG = torch.tensor([mine.sent(what) for what in _FORWARDED])
    local = layout.run_topology.local_ranks
    for peer in layout.run_topology.peer_ranks(rank):
        host = peer // local * local
        header[peer, first + layout.most_features :] = elements_KG[:, host : host + local].reshape(-1)


_FORWARDED = ("ids", "weights")


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
    execution = runtime.current()
    world = execution.world
    ranks, fields = header.shape
    each = [fields] * ranks
    sent = header.reshape(-1).to(world.device)
    received = world.start_all_to_all(sent, each, each, "world", "exchange_headers", "forward").wait()
    headers = received.reshape(ranks, fields).cpu()
    check_headers(headers, rows, labels)
    execution.agreed()
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
    forwarded = {}
    if layout.exchange.hosts:
        local = layout.run_topology.local_ranks
        peers = received[list(layout.run_topology.peer_ranks(rank)), first + layout.most_features :]
        forwarded = {
            what: tuple(map(tuple, block.tolist()))
            for what, block in zip(_FORWARDED, peers.split(local, dim=1), strict=True)
        }
    rows: list[list[int]] = received.tolist()
    counts: list[list[int]] = sent[:, first:].tolist()
    mine = len(layout.features_by_rank[rank])
    return Route(
        layout=layout,
        rank=rank,
        batch_sizes=tuple(row[HEADER_FIELDS.index("batch_size")] for row in rows),
        sent_ids=tuple(tuple(row[: len(f)]) for row, f in zip(counts, layout.features_by_rank, strict=True)),
        received_ids=tuple(tuple(row[first : first + mine]) for row in rows),
        forwarded=forwarded,
    )


@operator(lambda sizes, received, route, what: requires_grad(received.new_empty(sizes.make()), received))
def regroup_by_owner(received: torch.Tensor, route: Route, what: str) -> torch.Tensor:
    """Return what came across hosts, by the rank of this host that owns it; before, by the rank that it came from.

    Args:
        received: 1-D, ``ids`` or ``weights``, of the ranks with this local rank.
        route: of the step.
        what: which of the two.
    """
    forwarded = route.forwarded[what]
    pieces = received.split([size for by_owner in forwarded for size in by_owner])
    local = len(forwarded[0])
    return torch.cat([piece for owner in range(local) for piece in pieces[owner::local]])


def _fake_unpack_ids(sizes: FreshSizes, received: Any, route: Any) -> Any:
    out: list[Any] = []
    for feature, jagged in enumerate(route.layout.jagged):
        several = jagged or route.layout.is_even(feature)
        ids = received.new_empty(sizes.make() if several else route.global_batch_size)
        out += [ids, received.new_empty(route.global_batch_size) if several else None]
    return tuple(out)


@operator(_fake_unpack_ids)
def unpack_ids(received: torch.Tensor, route: Route) -> tuple[torch.Tensor | None, ...]:
    """Return (ids, offsets) of every feature over the samples of all ranks, in the layout's ``sample_order``.

    Returns:
        2F entries: ids (N,) and offsets (G,) of each feature, in the type that travelled, ``None`` for offsets where
        each bag has one id; ``None`` twice where another rank owns it.
    """
    layout = route.layout
    features = layout.features_by_rank[route.rank]
    jagged = [feature for feature in features if layout.jagged[feature]]
    sizes = [
        size
        for rank in layout.arrival_order
        for size in (*(route.batch_sizes[rank] for _ in jagged), *route.received_ids[rank])
    ]
    by_rank = layout.in_sample_order(received.split(sizes))
    out: list[torch.Tensor | None] = [None] * (2 * len(layout.owners))
    for position, feature in enumerate(features):
        ids = torch.cat([pieces[len(jagged) + position] for pieces in by_rank])
        ids = ids.long() if len(ids) > MOST_INT32 else ids
        out[2 * feature] = ids
        if layout.jagged[feature]:
            lengths_G = torch.cat([pieces[jagged.index(feature)] for pieces in by_rank])
            out[2 * feature + 1] = lengths_G.cumsum(0, dtype=ids.dtype) - lengths_G
        elif layout.is_even(feature):
            out[2 * feature + 1] = _even_offsets(route, position, ids)
    return tuple(out)


def _even_offsets(route: Route, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Return where the bags of a feature start, (G,): those of one rank have the same number of ids."""
    starts, first = [], 0
    for rank in route.layout.sample_order:
        bags, number = route.batch_sizes[rank], route.received_ids[rank][position]
        length = number // max(bags, 1)
        starts.append(torch.arange(bags, dtype=ids.dtype, device=ids.device) * length + first)
        first += number
    return torch.cat(starts)
