"""The operators that exchange ids and embeddings, and run Tower Modules in between.

Steps (b) to (f) are those of section 3.1 of the DMT paper; ``id_ops`` makes the layout and the step's route.

Shape suffixes: B samples of this rank, G samples of all ranks, P samples of this rank's peers, W columns of several
features side by side, O columns that towers give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from dmt_compile.ir.ops import FreshSizes, column_widths, in_feature_order, operator, requires_grad
from dmt_compile.kernels.choice import REFERENCE
from dmt_compile.runtime import world as runtime
from dmt_compile.runtime.route import Route
from dmt_compile.runtime.transfer import Block, Transfer


class InFlight(NamedTuple):
    """An all-to-all that was started: a stand-in for its result, which ties it into the backward pass, and the rest."""

    stand_in: torch.Tensor
    transfer: Transfer | None


def _fake_start_all_to_all(sizes: FreshSizes, tensor: Any, *rest: Any, dtype: Any = None, **how: Any) -> Any:
    return InFlight(requires_grad(tensor.new_empty(sizes.make(), dtype=dtype or tensor.dtype), tensor), None)


@operator(_fake_start_all_to_all, collective=True)
def start_all_to_all(
    tensor: torch.Tensor, route: Route, hop: str, group: str, forward: str, backward: str, kernel: str = REFERENCE,
    dtype: torch.dtype | None = None,
) -> InFlight:  # fmt: skip
    """Start to exchange row blocks of ``tensor`` with the ranks of ``group``; gradients go back the same way.

    In the backward pass, this operator is where the gradients that ``wait_all_to_all`` started to send are waited for:
    what stands between the two runs, in either pass, while they travel.

    Args:
        tensor: contiguous; its elements in the order of the group's ranks.
        route: holds the sizes of ``hop``.
        hop: ``ids`` or ``weights`` (step a), ``intra`` (step d) or ``peer`` (step f).
        group: ``world``, ``intra`` or ``peer``.
        forward, backward: the form on the wire: the tensor's element type, or a form of ``pack_rows``.
        kernel: the implementation of ``pack_rows`` that ``select_kernels`` chose.
        dtype: of what arrives, where that is another than the tensor's.
    """
    send, receive = route.blocks(hop)
    forms, dtypes = (forward, backward), (dtype or tensor.dtype, tensor.dtype)
    transfer = Transfer(runtime.current().world, send, receive, hop, group, forms, dtypes, kernel)
    if not tensor.requires_grad:
        return InFlight(transfer.start(tensor), transfer)
    return InFlight(_Start.apply(tensor.reshape(-1), transfer), transfer)  # type: ignore[no-untyped-call]


@operator(lambda sizes, flight: flight.stand_in.view_as(flight.stand_in), collective=True)
def wait_all_to_all(flight: InFlight) -> torch.Tensor:
    """Return what an all-to-all delivered: 1-D, in the order of the group's ranks."""
    stand_in, transfer = flight
    assert transfer is not None
    if not stand_in.requires_grad:
        return transfer.finish()
    out: torch.Tensor = _Wait.apply(stand_in, transfer)  # type: ignore[no-untyped-call]
    return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, transfer: Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        return transfer.start(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.transfer.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: torch.Tensor, transfer: Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.transfer.start(grads[0].contiguous(), backward=True)
        return grads[0].new_empty(()).expand_as(grads[0]), None  # the start's backward brings the gradient itself


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


def _blocks_of(flat: torch.Tensor, blocks: Sequence[Block]) -> list[torch.Tensor]:
    parts = flat.split([rows * width for rows, width in blocks])
    return [part.view(block) for part, block in zip(parts, blocks, strict=True)]


def _fake_join_blocks(sizes: FreshSizes, received: Any, route: Any, hop: str) -> Any:
    layout = route.layout
    if hop == "peer" or (layout.topology.hosts == 1 and not layout.outputs):
        return requires_grad(received.new_empty(route.batch_size, sum(layout.last_widths)), received)
    return requires_grad(received.new_empty(sizes.make(), sizes.make()), received)


@operator(_fake_join_blocks)
def join_blocks(received: torch.Tensor, route: Route, hop: str) -> torch.Tensor:
    """Lay the blocks that a hop delivered side by side: (P, W) after ``intra`` (step e), (B, W) after ``peer``."""
    out: torch.Tensor = _JoinBlocks.apply(received, route.blocks(hop)[1])  # type: ignore[no-untyped-call]
    return out


class _JoinBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: torch.Tensor, blocks: list[Block]) -> torch.Tensor:
        ctx.blocks = blocks
        return torch.cat(_blocks_of(received, blocks), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        back = grads[0].new_empty(grads[0].numel())
        parts = grads[0].split([width for _, width in ctx.blocks], dim=1)
        for block, part in zip(_blocks_of(back, ctx.blocks), parts, strict=True):
            block.copy_(part)
        return back, None


def _fake_split_blocks(
    sizes: FreshSizes, received: Any, route: Any, hop: str, factor: float, widths: Any = None
) -> Any:
    by_block = _widths_by_block(route, widths)
    blocks = [requires_grad(received.new_empty(route.batch_size, sum(own)), received) for own in by_block]
    columns = [column for block, own in zip(blocks, by_block, strict=True) for column in block.split(own, dim=1)]
    return in_feature_order(columns, None if widths else route.layout)


@operator(_fake_split_blocks)
def split_blocks(
    received: torch.Tensor, route: Route, hop: str, factor: float, widths: tuple[int, ...] | None = None
) -> tuple[torch.Tensor | None, ...]:
    """Return each feature's columns (B, D) where the last hop put them, as ``split_features`` of joined blocks would.

    Args:
        received: what the hop delivered, 1-D.
        route: of the step.
        hop: ``peer``, or ``intra`` where there is one tower group.
        factor: of the gradient, as ``scale_gradient`` would have it.
        widths: of the towers' outputs in their order; ``None`` for features.
    """
    columns = _SplitBlocks.apply(  # type: ignore[no-untyped-call]
        received, route.blocks(hop)[1], _widths_by_block(route, widths), factor
    )
    return in_feature_order(columns, None if widths else route.layout)


def _widths_by_block(route: Route, widths: tuple[int, ...] | None) -> list[list[int]]:
    """Return the widths of the columns in each block of the last hop; none reaches from one block into the next."""
    remaining = iter(column_widths(None if widths else route.layout, widths))
    out: list[list[int]] = []
    for width in route.layout.last_widths:
        own: list[int] = []
        while sum(own) < width:
            own.append(next(remaining))
        out.append(own)
    return out


class _SplitBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, received: torch.Tensor, blocks: list[Block], widths: list[list[int]], factor: float
    ) -> tuple[torch.Tensor, ...]:
        ctx.saved = blocks, [len(own) for own in widths], factor
        found = zip(_blocks_of(received, blocks), widths, strict=True)
        return tuple(column for block, own in found for column in block.split(own, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        # Written where the exchange takes them from, a block at a time, which is scaled while a cache still holds it.
        blocks, numbers, factor = ctx.saved
        back, remaining = grads[0].new_empty(sum(rows * width for rows, width in blocks)), iter(grads)
        for block, number in zip(_blocks_of(back, blocks), numbers, strict=True):
            if number:
                torch.cat([next(remaining) for _ in range(number)], dim=1, out=block)
                block.mul_(factor)
        return back, None, None, None


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
    single = sum(tower.group == route.group for tower in towers) == 1
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
        # Features that lie as the exchange laid them, with no other reader, are not copied.
        embs_PW = joined_PW if single and tower.features == order else torch.cat(mine, dim=1)
        embs_PW = embs_PW.to(getattr(torch, tower.dtype))
        out.append(regions[tower.region](embs_PW, *given[tower.region])[0].to(joined_PW.dtype))
    sent_PO = out[0].contiguous() if len(out) == 1 else torch.cat(out, dim=1) if out else joined_PW
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
