"""The operators that move ids and embeddings between ranks, and keep replicas equal.

One graph serves every rank: what differs (who owns which table, how many samples each rank has) is in the layout and in
the step's route. Steps (a) to (f) are those of section 3.1 of the DMT paper.

Shape suffixes: B samples of this rank, G samples of all ranks, P samples of this rank's peers, W columns of several
features side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


# ------------------------------------------------------------------------------------------- ids to the tables' owners


@operator(lambda sizes, *args: make_layout(*args))
def layout(
    hosts: int,
    local_ranks: int,
    owners: tuple[int, ...],
    widths: tuple[int, ...],
    jagged: tuple[bool, ...],
    weighted: tuple[bool, ...],
    outputs: tuple[int, ...] = (),
) -> Layout:
    """Return the static layout: tower groups x ranks in a group; each feature's owner, width and what it sends.

    ``outputs``: columns that each group sends to its peers where Tower Modules make them.
    """
    return make_layout(hosts, local_ranks, owners, widths, jagged, weighted, outputs)


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
    headers = world.all_to_all(sent, each, each, "world", "exchange_headers", "forward").reshape(ranks, fields).cpu()
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


def _fake_all_to_all(sizes: FreshSizes, tensor: Any, *rest: Any) -> Any:
    return requires_grad(tensor.new_empty(sizes.make()), tensor)


@operator(_fake_all_to_all, collective=True)
def all_to_all(tensor: torch.Tensor, route: Route, hop: str, group: str, dtype: str) -> torch.Tensor:
    """Exchange row blocks of ``tensor`` with the ranks of ``group``; the gradient goes back the same way.

    Args:
        tensor: contiguous; its elements in the order of the group's ranks.
        route: holds the element counts of ``hop``.
        hop: ``ids`` or ``weights`` (step a), ``intra`` (step d) or ``peer`` (step f).
        group: ``world``, ``intra`` or ``peer``.
        dtype: the element type on the wire; equal to the tensor's.

    Returns:
        1-D received elements, in the order of the group's ranks.
    """
    send, receive = route.sizes(hop)
    sent = tensor.reshape(-1)
    if not sent.requires_grad:
        return runtime.current().world.all_to_all(sent, send, receive, group, hop, "forward")
    out: torch.Tensor = _AllToAll.apply(sent, runtime.current().world, send, receive, group, hop)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: torch.Tensor, world: runtime.World, send: list[int], receive: list[int], group: str, hop: str
    ) -> torch.Tensor:
        ctx.saved = world, send, receive, group, hop
        return world.all_to_all(sent, send, receive, group, hop, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        world, send, receive, group, hop = ctx.saved
        back = world.all_to_all(grads[0].contiguous(), receive, send, group, hop, "backward")
        return back, None, None, None, None, None


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


# ------------------------------------------------------------------------------------------------ embeddings to samples


def _fake_join_features(sizes: FreshSizes, pooled: Any, route: Any) -> Any:
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in pooled))
    return requires_grad(pooled[0].new_empty(route.global_batch_size, sizes.make(), dtype=dtype), *pooled)


@operator(_fake_join_features)
def join_features(pooled: Sequence[torch.Tensor], route: Route) -> torch.Tensor:
    """Return the pooled features that this rank owns side by side, (G, W), rows in rank order (end of step b)."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in pooled))
    owned = [pooled[feature].to(dtype) for feature in route.layout.features_by_rank[route.rank]]
    if owned:
        return torch.cat(owned, dim=1)
    # Nothing owned: no columns, but still a part of the backward pass, in which all ranks exchange gradients.
    return (
        pooled[0].new_empty(route.global_batch_size, 0, dtype=dtype)
        + torch.stack([part.sum() for part in pooled]).sum()
    )


@operator(lambda sizes, joined, route: joined.clone())
def peer_permute(joined_GW: torch.Tensor, route: Route) -> torch.Tensor:
    """Return the rows in peer order, so that each local rank's samples are one block (step c)."""
    order = route.layout.topology.peer_order()
    blocks = joined_GW.split(list(route.batch_sizes))
    return torch.cat([blocks[rank] for rank in order])


def _fake_join_blocks(sizes: FreshSizes, received: Any, route: Any, hop: str) -> Any:
    layout = route.layout
    if hop == "peer" or (layout.topology.hosts == 1 and not layout.outputs):
        width = sum(layout.group_width(group) for group in range(layout.topology.hosts))
        return requires_grad(received.new_empty(route.batch_size, width), received)
    return requires_grad(received.new_empty(sizes.make(), sizes.make()), received)


@operator(_fake_join_blocks)
def join_blocks(received: torch.Tensor, route: Route, hop: str) -> torch.Tensor:
    """Lay the blocks that a hop delivered side by side: (P, W) after ``intra`` (step e), (B, W) after ``peer``."""
    rows = route.block_rows(hop)
    blocks = received.split(route.sizes(hop)[1])
    widths = route.block_widths(hop)
    return torch.cat([block.view(rows, width) for block, width in zip(blocks, widths, strict=True)], dim=1)


class TowerRun(NamedTuple):
    """Features of a tower group that go through one Tower Module, or, with ``region`` -1, are sent as they are.

    ``dtype`` is what the module takes; ``width`` what it gives.
    """

    group: int
    features: tuple[int, ...]
    region: int
    dtype: str
    width: int


def _fake_run_towers(sizes: FreshSizes, joined: Any, route: Any, towers: Any, regions: Any, given: Any) -> Any:
    tensors = [tensor for tensors in given for tensor in tensors]
    outputs = route.layout.outputs
    rows = route.batch_size if len(outputs) == 1 and route.layout.topology.local_ranks == 1 else joined.shape[0]
    return requires_grad(joined.new_empty(rows, outputs[0] if len(outputs) == 1 else sizes.make()), joined, *tensors)


@operator(_fake_run_towers)
def run_towers(
    joined_PW: torch.Tensor,
    route: Route,
    towers: tuple[TowerRun, ...],
    regions: Sequence[Callable[..., Any]],
    given: Sequence[Sequence[torch.Tensor]],
) -> torch.Tensor:
    """Return what this rank's tower group sends to its peers, (P, O): its Tower Modules' outputs, in tower order.

    Args:
        joined_PW: the group's features for the samples of this rank's peers (end of step e).
        route: of the step.
        towers: of all groups, in order.
        regions: the Tower Modules, each called with the tower's (P, W) features and its parameters.
        given: the parameters of each region.

    Source: step f with Tower Modules in section 3 of the DMT paper.
    """
    layout = route.layout
    order = layout.group_features(route.group)
    parts = joined_PW.split([layout.widths[i] for i in order], dim=1)
    columns = dict(zip(order, parts, strict=True))
    out: list[torch.Tensor] = []
    idle: list[torch.Tensor] = []
    for tower in towers:
        if tower.group != route.group:
            idle += [p for p in given[tower.region] if p.requires_grad] if tower.region >= 0 else []
            continue
        mine = [columns[i] for i in tower.features]
        if tower.region < 0:
            out += mine
            continue
        embs_PW = torch.cat(mine, dim=1).to(getattr(torch, tower.dtype))
        out.append(regions[tower.region](embs_PW, *given[tower.region])[0].to(joined_PW.dtype))
    sent_PO = torch.cat(out, dim=1) if out else joined_PW
    if idle:
        sent_PO = _Idle.apply(sent_PO, *idle)  # type: ignore[no-untyped-call]
    return sent_PO


class _Idle(torch.autograd.Function):
    """Lets parameters that other towers read take part in this rank's backward pass, where all ranks average them."""

    @staticmethod
    def forward(ctx: Any, sent_PO: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return sent_PO.view_as(sent_PO)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)


# ------------------------------------------------------------------------------------------------------------ gradients


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


@operator(lambda sizes, tensor, factor: tensor.view_as(tensor))
def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor as it is; its gradient is multiplied by ``factor``.

    The objective is the mean over ranks of each rank's loss, so every gradient carries 1 / number of ranks.
    """
    out: torch.Tensor = _ScaleGradient.apply(tensor, factor)  # type: ignore[no-untyped-call]
    return out


class _ScaleByFrequency(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids_N)
        return rows_ND.view_as(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, places_N, counts = torch.unique(ctx.saved_tensors[0], return_inverse=True, return_counts=True)
        return grads[0] / counts[places_N].unsqueeze(1), None


@operator(lambda sizes, rows_ND, ids_N: rows_ND.view_as(rows_ND))
def scale_by_frequency(rows_ND: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """Return the rows as they are; their gradients are divided by how often each id occurs in this rank's batch.

    This is ``scale_grad_by_freq`` as every rank's own flat model understands it.
    """
    out: torch.Tensor = _ScaleByFrequency.apply(rows_ND, ids_N)  # type: ignore[no-untyped-call]
    return out


@operator(lambda sizes, tensors, group: tuple(t.view_as(t) for t in tensors), collective=True)
def synchronize(tensors: Sequence[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Return dense parameters as they are; their gradients are averaged over all ranks in one all-reduce.

    Cost: the parameters' bytes, twice across each link of a ring, once per backward pass.
    """
    world = runtime.current().world
    return _reduce_gradients(world, "synchronize", "world", world.topology.world_size, tensors)


def _reduce_gradients(
    world: runtime.World, label: str, group: str, divisor: int, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    out: tuple[torch.Tensor, ...] = _ReduceGradients.apply(world, label, group, divisor, *tensors)  # type: ignore[no-untyped-call]
    return out


class _ReduceGradients(torch.autograd.Function):
    """Sums gradients over the ranks of a group in one all-reduce, and divides them."""

    @staticmethod
    def forward(ctx: Any, world: runtime.World, label: str, group: str, divisor: int, *tensors: torch.Tensor) -> Any:
        ctx.saved = world, label, group, divisor
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        world, label, group, divisor = ctx.saved
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        world.all_reduce(flat, label, group=group)
        flat /= divisor
        parts = flat.split([grad.numel() for grad in grads])
        return None, None, None, None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


@operator(lambda sizes, tensors, route, group: tuple(t.view_as(t) for t in tensors), collective=True)
def synchronize_tower(tensors: Sequence[torch.Tensor], route: Route, group: int) -> tuple[torch.Tensor, ...]:
    """Return a tower's parameters as they are; their gradients are summed over the ranks of tower group ``group``.

    They carry 1 / ranks of the world already, through ``scale_gradient``. Ranks of other groups do not take part: there
    the parameters have no gradient.

    Cost: the parameters' bytes, twice across each link of a ring inside the tower, once per backward pass.
    """
    if route.group != group:
        return tuple(tensor.detach() for tensor in tensors)
    return _reduce_gradients(runtime.current().world, "synchronize_tower", "intra", 1, tensors)


@operator(lambda sizes, tensors, group: tuple(tensors), collective=True)
def broadcast_buffers(tensors: Sequence[torch.Tensor], group: str) -> tuple[torch.Tensor, ...]:
    """Overwrite buffers with rank 0's and return them, as DDP does before each training forward."""
    for tensor in tensors:
        runtime.current().world.broadcast(tensor.data, "broadcast_buffers")  # .data: no new version for autograd
    return tuple(tensors)
