"""Rewrite the lookups of all ranks into the Semantic-Preserving Tower Transform (section 3.1 of the DMT paper).

A rank has the ids of its own samples for all features, and ends with all features of its own samples, as before; in
between each table is read by its owner alone:

    pack_ids, exchange_headers, route        sizes; faults of any rank are raised by all of them here
    all_to_all ids (world)                   a: every owner gets its features' ids of the global batch
    unpack_ids, lookup, join_features        b: pooled rows in rank order
    peer_permute                             c: rows in peer order
    all_to_all intra, join_blocks            d, e: all features of the tower, for the samples of this rank's peers
    all_to_all peer, join_blocks             f: all features of this rank's samples
    scale_gradient, split_features           1 / ranks in the backward pass; columns back to features

Steps c to e fall away where a tower has one rank, step f where there is one tower group. The backward pass mirrors the
exchanges. A tower over K hosts makes its K x local ranks one group.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, sort_graph
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class LowerToSptt(Pass):
    """Insert the exchanges of SPTT around the lookups."""

    name: ClassVar[str] = "lower_to_sptt"
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        if not ctx.distributed:
            return PassReport(changed=False, skipped=(("graph", "one rank: nothing to exchange"),))
        lookups = calls(gm, ops.lookup)
        if not lookups:
            return PassReport(changed=False, skipped=(("graph", "no lookup"),))
        assert ctx.plan is not None
        check = calls(gm, ops.check_batch)[0]
        features = ctx.embedding_graph.features
        dtypes = {table.dtype for table in ctx.embedding_graph.tables}
        if len(dtypes) > 1:
            raise UnsupportedGraphError(
                f"{self.name}: expected tables of one element type, found {sorted(map(str, dtypes))}; convert them"
            )
        groups = ctx.plan.tower_groups()
        owners = tuple(ctx.plan.owner(feature.table) for feature in features)
        widths = tuple(int(lookup.meta["val"].shape[1]) for lookup in lookups)
        dtype = str(dtypes.pop()).removeprefix("torch.")
        ids, offsets, others, rows, labels, check_ids = check.args

        def call(target: object, *args: object) -> fx.Node:
            return ctx.call(gm, target, *args, like=lookups[0])  # type: ignore[arg-type]

        with gm.graph.inserting_before(check):
            layout = call(ex.layout, groups.hosts, groups.local_ranks, owners, widths)
            packed = call(ex.pack_ids, layout, ids, offsets, others, rows, check_ids)
            payload, sent = call(operator.getitem, packed, 0), call(operator.getitem, packed, 1)
            received = call(ex.exchange_headers, sent, rows, labels)
            batch_size = call(torch.ops.aten.sym_size.int, offsets[0], 0)  # type: ignore[index]
            route = call(ex.route, layout, sent, received, batch_size)
            bags = call(ex.unpack_ids, call(ex.all_to_all, payload, route, "ids", "world", "int64"), route)
        for index, lookup in enumerate(lookups):
            with gm.graph.inserting_before(lookup):
                lookup.update_arg(1, call(operator.getitem, bags, 2 * index))
                lookup.update_arg(2, call(operator.getitem, bags, 2 * index + 1))
            lookup.meta["val"] = ctx.environment.derive(lookup, gm)
        with gm.graph.inserting_after(lookups[-1]):
            anchor = gm.graph.call_function(operator.getitem, (bags, 0))  # marks the place; erased below
        users = [(lookup, list(lookup.users)) for lookup in lookups]
        with gm.graph.inserting_before(anchor):
            joined = call(ex.join_features, list(lookups), route)
            if groups.local_ranks > 1:
                joined = call(ex.peer_permute, joined, route)
                moved = call(ex.all_to_all, joined, route, "intra", "intra", dtype)
                joined = call(ex.join_blocks, moved, route, "intra")
            if groups.hosts > 1:
                moved = call(ex.all_to_all, joined, route, "peer", "peer", dtype)
                joined = call(ex.join_blocks, moved, route, "peer")
            if ctx.training:
                joined = call(ex.scale_gradient, joined, 1 / ctx.topology.world_size)
            split = call(ops.split_features, joined, layout)
            columns = [call(operator.getitem, split, index) for index in range(len(lookups))]
        gm.graph.erase_node(anchor)
        for (lookup, lookup_users), column in zip(users, columns, strict=True):
            for user in lookup_users:
                user.replace_input_with(lookup, column)
        for node in list(check.users):
            gm.graph.erase_node(node)
        gm.graph.erase_node(check)
        sort_graph(gm)
        return PassReport(changed=True, matched=len(lookups))
