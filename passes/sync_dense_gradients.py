"""Make dense parameters data-parallel inside the program: their gradients are averaged over all ranks.

Each bucket of parameters passes through one ``dmt::synchronize``; its backward is one all-reduce, started as soon as
the bucket's gradients are there. Floating-point buffers are rank 0's in every training forward, as under DDP.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, placeholders
from dmt_compile.ir.stages import Effect, Stage


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
        inputs = placeholders(gm)
        tables = {table.placeholder for table in ctx.embedding_graph.tables}
        dense = [n for n in inputs if n.name in ctx.parameters and n.name not in tables and n.users]
        trained = [n for n in dense if n.meta["val"].requires_grad]
        buffers = [
            n for n in dense
            if not isinstance(ctx.parameters[n.name], torch.nn.Parameter) and n.meta["val"].is_floating_point()
        ]  # fmt: skip
        for bucket in self._buckets(trained):
            self._pass_through(gm, ctx, bucket, inputs[-1], ex.synchronize)
        if buffers:
            self._pass_through(gm, ctx, buffers, inputs[-1], ex.broadcast_buffers)
        return PassReport(changed=bool(trained or buffers), matched=len(trained) + len(buffers))

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
