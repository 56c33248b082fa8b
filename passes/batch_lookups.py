"""Fuse the lookups of a rank into one ``dmt::batched_lookup`` per element type and device."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, only_joined, sort_graph
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class BatchLookups(Pass):
    """Replace many lookups by one operator that writes all features side by side."""

    name: ClassVar[str] = "batch_lookups"
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        lookups = calls(gm, ops.lookup)
        joins = calls(gm, ex.join_features)
        for join in joins:
            fused = self._fuse(gm, ctx, join.args[0], join.args[1])  # type: ignore[arg-type]
            join.replace_all_uses_with(fused)
            gm.graph.erase_node(join)
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in [] if joins else lookups:
            check = node.args[1].args[0]  # type: ignore[union-attr]
            groups[check, node.meta["val"].dtype, node.meta["val"].device].append(node)
        for group in groups.values():
            self._fuse_flat(gm, ctx, group)
        for lookup in lookups:
            gm.graph.erase_node(lookup)
        sort_graph(gm)
        return PassReport(changed=bool(lookups), matched=len(lookups))

    def _fuse(self, gm: fx.GraphModule, ctx: PassContext, lookups: list[fx.Node], route: fx.Node | None) -> fx.Node:
        columns = list(zip(*(lookup.args for lookup in lookups), strict=True))
        tables, ids, offsets, weights, pooling = columns
        with gm.graph.inserting_before(lookups[-1]):
            return ctx.call(
                gm, ops.batched_lookup, list(tables), list(ids), list(offsets), list(weights), tuple(pooling), route,
                like=lookups[0],
            )  # fmt: skip

    def _fuse_flat(self, gm: fx.GraphModule, ctx: PassContext, lookups: list[fx.Node]) -> None:
        fused = self._fuse(gm, ctx, lookups, None)
        widths = tuple(int(lookup.meta["val"].shape[1]) for lookup in lookups)
        with gm.graph.inserting_after(fused):
            split = ctx.call(gm, ops.split_features, fused, None, widths, like=lookups[0])
        for index, lookup in enumerate(lookups):
            joined = only_joined(lookup)
            with gm.graph.inserting_before(split.next):
                column = ctx.call(gm, operator.getitem, split, index, like=lookup)
                column = column if joined else ctx.call(gm, torch.clone, column, like=lookup)
            lookup.replace_all_uses_with(column)
