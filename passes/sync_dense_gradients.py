"""Make dense parameters data-parallel inside the program: their gradients are averaged over all ranks.

All of them pass through one ``dmt::wait_gradients`` at the front, and bucket by bucket through one
``dmt::start_gradients`` before what first reads one of the bucket. Autograd runs the backward of what was made last
first: a bucket leaves as soon as its gradients are there, and is waited for when nothing else is left to do, or by the
next step where the optimizer's can wait (``dmt_compile.defer_step``). With several hosts, what is read before and what
is read behind an exchange have buckets of their own: gradients of the latter travel while the backward waits for it.
Floating-point buffers are rank 0's in every training forward, as under DDP.

The gradients of a Tower Module are summed over the ranks of its tower alone, since they carry 1 / ranks already; its
buffers are each rank's own. A parameter that towers of several groups read, or that is read outside too, is averaged
over all ranks like any other, after what comes from towers got its factor back.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.cost.gradients import gradient_traffic
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops
from dmt_compile.ir.levels import levels
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.tower_regions import held_by_one_group
from dmt_compile.runtime.averaging import Reduction

Bucket = list[fx.Node]


@dataclass(frozen=True)
class SyncDenseGradients(Pass):
    """Insert gradient averaging for dense parameters, and buffer broadcasts.

    Args:
        bucket_bytes: the most that leaves together, but for single parameters that are larger.
        first_bucket_bytes: the same for what leaves first, so that something is on its way soon. Both as in DDP.
        wire_dtype: element type of gradients between hosts, ``"bfloat16"`` or ``"float16"``; ``None``: their own.
    """

    bucket_bytes: int = 25 * 2**20
    first_bucket_bytes: int = 2**20
    wire_dtype: str | None = None

    name: ClassVar[str] = "sync_dense_gradients"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        reason = "one rank: nothing to average" if not ctx.distributed else "no gradients: evaluation"
        if not ctx.distributed or not ctx.training:
            return PassReport(changed=False, skipped=(("graph", reason),), effect=Effect.EXACT)
        tables = {table.placeholder for table in ctx.embedding_graph.tables}
        held = [n for n in gm.graph.nodes if n.op == "placeholder" or n.name in ctx.parameters]
        of_towers = held_by_one_group(gm, ctx)
        dense = [
            n for n in held if n.name in ctx.parameters and n.name not in tables and n not in of_towers and n.users
        ]
        trained = [n for n in dense if n.meta["val"].requires_grad]
        buffers = [
            n for n in dense
            if not isinstance(ctx.parameters[n.name], torch.nn.Parameter) and n.meta["val"].is_floating_point()
        ]  # fmt: skip
        self._scale_for_towers(gm, ctx, of_towers)
        sets = {-1: trained}
        for node, group in of_towers.items():
            if node.meta["val"].requires_grad:
                sets.setdefault(group, []).append(node)
        notes = [self._average(gm, ctx, sets[tower], held[-1], tower) for tower in sorted(sets) if sets[tower]]
        lossy = any(node.args[0].wire_dtype for node in calls(gm, gradient_ops.averaging))  # type: ignore[union-attr]
        if buffers:
            self._broadcast(gm, ctx, buffers, held[-1])
        matched = len(buffers) + sum(map(len, sets.values()))
        return PassReport(bool(matched), matched, effect=Effect.LOSSY if lossy else None, notes=tuple(notes))

    def _scale_for_towers(self, gm: fx.GraphModule, ctx: PassContext, of_towers: dict[fx.Node, int]) -> None:
        """Give gradients from Tower Modules to parameters that others read too the factor that those have."""
        for run in calls(gm, ex.run_towers):
            args: Any = run.args
            joined, route, towers, regions, given = args
            passed: list[Any] = list(given)
            for tower in (tower for tower in towers if tower.region >= 0):
                nodes = list(passed[tower.region])
                with gm.graph.inserting_before(run):
                    for place, node in enumerate(nodes):
                        value = node.meta["val"]
                        if isinstance(value, torch.Tensor) and value.requires_grad and node not in of_towers:
                            ranks = ctx.topology.world_size
                            nodes[place] = ctx.call(gm, gradient_ops.scale_gradient, node, ranks, like=run)
                passed[tower.region] = tuple(nodes)
            run.args = (joined, route, towers, regions, tuple(passed))

    def _average(
        self, gm: fx.GraphModule, ctx: PassContext, nodes: Sequence[fx.Node], last: fx.Node, tower: int
    ) -> str:
        """Pass parameters through a wait and their starts, and say how they travel."""
        places = {node: place for place, node in enumerate(gm.graph.nodes)}
        first = {node: min(node.users, key=places.__getitem__) for node in nodes}
        users = {node: list(node.users) for node in nodes}
        # Inside one host a further collective costs more than what it could travel beside.
        level = levels(gm) if ctx.topology.hosts > 1 else {}
        buckets = self._buckets(sorted(nodes, key=lambda n: -places[first[n]]), first, level)
        buckets.sort(key=lambda bucket: -places[first[bucket[-1]]])  # by the gradient that comes last
        reduction = self._reduction(ctx, tower, buckets)
        with gm.graph.inserting_before(last.next):
            averaging = ctx.call(gm, gradient_ops.averaging, reduction)
            together = [node for bucket in buckets for node in bucket]
            waited = ctx.call(gm, gradient_ops.wait_gradients, together, averaging)
        for number, bucket in enumerate(buckets):
            with gm.graph.inserting_before(first[bucket[-1]]):
                started = ctx.call(gm, gradient_ops.start_gradients, waited, averaging, number)
                self._replace(gm, ctx, bucket, started, users)
        return _describe(ctx, reduction, buckets)

    def _reduction(self, ctx: PassContext, tower: int, buckets: Sequence[Bucket]) -> Reduction:
        topology = ctx.topology
        hosts = topology.hosts
        if tower >= 0 and ctx.plan is not None:
            hosts //= ctx.plan.tower_groups().hosts
        hierarchical = hosts > 1 and (topology.local_ranks > 1 or self.wire_dtype is not None)
        if ctx.options.dense_reduction != "auto":
            hierarchical = ctx.options.dense_reduction == "hierarchical"
        wire_dtype = self.wire_dtype if hierarchical and hosts > 1 else None
        return Reduction(tower, hosts, hierarchical, wire_dtype, tuple(map(len, buckets)))

    def _broadcast(self, gm: fx.GraphModule, ctx: PassContext, buffers: Bucket, last: fx.Node) -> None:
        users = {node: list(node.users) for node in buffers}
        with gm.graph.inserting_before(last.next):
            together = ctx.call(gm, gradient_ops.broadcast_buffers, list(buffers), "world")
            self._replace(gm, ctx, buffers, together, users)

    def _replace(
        self, gm: fx.GraphModule, ctx: PassContext, nodes: Bucket, together: fx.Node, users: dict[fx.Node, Bucket]
    ) -> None:
        """Let the users of ``nodes`` read what an operator gives in their place."""
        outputs = [ctx.call(gm, operator.getitem, together, index) for index in range(len(nodes))]
        for node, output in zip(nodes, outputs, strict=True):
            for user in users[node]:
                user.replace_input_with(node, output)

    def _buckets(
        self, nodes: Sequence[fx.Node], first: dict[fx.Node, fx.Node], level: dict[fx.Node, int]
    ) -> list[Bucket]:
        """Put parameters into buckets of one type and device that are read, first, on one level."""
        buckets: list[Bucket] = []
        open_: dict[Any, tuple[Bucket, int]] = {}  # and the bytes that still go in
        for node in nodes:
            value = node.meta["val"]
            size = value.numel() * value.element_size()
            kind = level.get(first[node]), value.dtype, value.device
            bucket, room = open_.get(kind, ([], -1))
            if size > room:
                bucket, room = [], self.bucket_bytes if buckets else self.first_bucket_bytes
                buckets.append(bucket)
            bucket.append(node)
            open_[kind] = bucket, room - size
        return buckets


def _describe(ctx: PassContext, reduction: Reduction, buckets: Sequence[Bucket]) -> str:
    """Say which reduction was chosen, why, and what it sends between hosts."""
    topology, asked = ctx.topology, ctx.options.dense_reduction
    whose = "dense gradients" if reduction.tower < 0 else f"gradients of tower group {reduction.tower}"
    form = "hierarchical" if reduction.hierarchical else "flat"
    if asked != "auto":
        why = f"dense_reduction is {asked!r}"
    elif reduction.hierarchical:
        why = f"{reduction.hosts} hosts x {topology.local_ranks}" + (
            f", {reduction.wire_dtype} between hosts" if reduction.wire_dtype else ""
        )
    else:
        why = "one host" if reduction.hosts == 1 else "one rank on each host"
    text = f"{whose}: {form} ({why}), {len(buckets)} bucket{'s' if len(buckets) > 1 else ''}"
    if topology.hosts == 1 or reduction.tower >= 0:
        return text
    cross = {True: 0, False: 0}
    for bucket in buckets:
        elements = sum(node.meta["val"].numel() for node in bucket)
        dtype = bucket[0].meta["val"].dtype
        for hierarchical in cross:
            wire = reduction.wire(dtype).itemsize
            cross[hierarchical] += gradient_traffic(topology, elements, dtype.itemsize, hierarchical, wire).cross_bytes
    chosen, other = cross[reduction.hierarchical], cross[not reduction.hierarchical]
    return f"{text}, {chosen:,} bytes between hosts in all, {other:,} if {'flat' if form != 'flat' else 'hierarchical'}"
