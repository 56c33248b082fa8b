"""Make dense parameters data-parallel inside the program: their gradients are averaged over all ranks.

Each bucket of parameters passes through one ``dmt::synchronize``; its backward is one all-reduce, started as soon as
the bucket's gradients are there. Floating-point buffers are rank 0's in every training forward, as under DDP.

The gradients of a Tower Module are summed over the ranks of its tower alone, since they carry 1 / ranks already; its
buffers are each rank's own. A parameter that towers of several groups read, or that is read outside too, is averaged
over all ranks like any other, after what comes from towers got its factor back.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.tower_regions import held_by_one_group


@dataclass(frozen=True)
class SyncDenseGradients(Pass):
    """Insert gradient averaging for dense parameters, and buffer broadcasts."""

    bucket_bytes: int = 25 * 2**20

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
        summed = self._sum_over_towers(gm, ctx, of_towers)
        trained = [n for n in dense if n.meta["val"].requires_grad]
        buffers = [
            n for n in dense
            if not isinstance(ctx.parameters[n.name], torch.nn.Parameter) and n.meta["val"].is_floating_point()
        ]  # fmt: skip
        for bucket in self._buckets(trained):
            self._pass_through(gm, ctx, bucket, held[-1], gradient_ops.synchronize)
        if buffers:
            self._pass_through(gm, ctx, buffers, held[-1], gradient_ops.broadcast_buffers)
        matched = len(trained) + len(buffers) + summed
        return PassReport(changed=bool(matched), matched=matched)

    def _sum_over_towers(self, gm: fx.GraphModule, ctx: PassContext, of_towers: dict[fx.Node, int]) -> int:
        """Sum the gradients of each Tower Module's parameters over its tower's ranks; return how many they are."""
        matched = 0
        for run in calls(gm, ex.run_towers):
            args: Any = run.args
            joined, route, towers, regions, given = args
            passed: list[Any] = list(given)
            for tower in towers:
                nodes = [] if tower.region < 0 else list(passed[tower.region])
                trained = [n for n in nodes if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].requires_grad]
                alone = [n for n in trained if n in of_towers]
                places: dict[fx.Node, fx.Node] = {}
                with gm.graph.inserting_before(run):
                    for node in (n for n in trained if n not in of_towers):
                        places[node] = ctx.call(
                            gm, gradient_ops.scale_gradient, node, ctx.topology.world_size, like=run
                        )
                    if alone:
                        together = ctx.call(gm, gradient_ops.synchronize_tower, alone, route, tower.group, like=run)
                        places |= {n: ctx.call(gm, operator.getitem, together, i) for i, n in enumerate(alone)}
                passed[tower.region] = tuple(places.get(n, n) for n in nodes)
                matched += len(trained)
            run.args = (joined, route, towers, regions, tuple(passed))
        return matched

    def _pass_through(
        self, gm: fx.GraphModule, ctx: PassContext, bucket: list[fx.Node], last: fx.Node, target: object
    ) -> None:
        users = [(node, list(node.users)) for node in bucket]
        with gm.graph.inserting_before(last.next):
            together = ctx.call(gm, target, list(bucket), "world")  # type: ignore[arg-type]
            outputs = [ctx.call(gm, operator.getitem, together, index) for index in range(len(bucket))]
        for (node, node_users), output in zip(users, outputs, strict=True):
            for user in node_users:
                user.replace_input_with(node, output)

    def _buckets(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        buckets: list[list[fx.Node]] = []
        room, dtype = 0, None
        for node in nodes:
            value = node.meta["val"]
            size = value.numel() * value.element_size()
            if size > room or value.dtype != dtype:
                buckets.append([])
                room, dtype = self.bucket_bytes, value.dtype
            buckets[-1].append(node)
            room -= size
        return buckets
