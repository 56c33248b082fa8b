"""Rewrite the lookups of all ranks into the Semantic-Preserving Tower Transform (section 3.1 of the DMT paper).

A rank has the ids of its own samples for all features, and ends with all features of its own samples, as before; in
between each table is read by its owner alone:

    pack_ids, exchange_headers, route        sizes; faults of any rank are raised by all of them here
    all-to-all ids (world)                   a: every owner gets its features' ids of the global batch
    unpack_ids, lookup, join_features        b: pooled rows in rank order
    peer_permute                             c: rows in peer order
    all-to-all intra, join_blocks            d, e: all features of the tower, for the samples of this rank's peers
    add_blocks                               the row pieces of a table added up, where it is split
    run_towers                               the Tower Modules, where there are some
    all-to-all peer, join_blocks             f: all features, or towers' outputs, of this rank's samples
    scale_gradient, split_features           1 / ranks in the backward pass; columns back to features

With the hierarchical id exchange (``id_exchange``), step a goes by way of hosts, and c falls away:

    all-to-all ids_across (across)           a: ids cross hosts once, to the rank with the sender's local rank
    regroup_by_owner
    all-to-all ids_host (host)               ... which forwards them to their owners
    unpack_ids, lookup, join_features        b: pooled rows in peer order

Step c also falls away where there is one tower group, whose peer order is rank order. Steps c to e fall away where a
tower has one rank, step f where there is one tower group. The backward pass mirrors the exchanges. A tower over K hosts
makes its K x local ranks one group.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from dmt_compile.cost.id_exchange import id_exchange_of
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, piece_ops, weight_ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, nodes_in, only_joined, sort_graph
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.tower_regions import find_towers
from dmt_compile.runtime.route import ID_HOPS, IdExchange

Call = Callable[..., fx.Node]  # (target, *arguments) -> the node that calls it, at the graph's insertion point


def all_to_all(call: Call, tensor: fx.Node, route: fx.Node, hop: str, group: str) -> fx.Node:
    """Start an all-to-all in the tensor's own type and wait for it; ``overlap_collectives`` draws the two apart."""
    dtype = str(tensor.meta["val"].dtype).removeprefix("torch.")
    return call(ex.wait_all_to_all, call(ex.start_all_to_all, tensor, route, hop, group, dtype, dtype))


@dataclass(frozen=True)
class LowerToSptt(Pass):
    """Insert the exchanges of SPTT around the lookups."""

    name: ClassVar[str] = "lower_to_sptt"
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        if not ctx.distributed:
            inside = self._dissolve(gm, ctx)
            return PassReport(changed=bool(inside), skipped=(("graph", "one rank: nothing to exchange"),))
        checks = calls(gm, ops.check_batch)
        if not checks:
            return PassReport(changed=False, skipped=(("graph", "no lookup"),))
        matched = sum(self._lower(gm, ctx, check) for check in checks)
        sort_graph(gm)
        # A Tower Module sees the samples of all peers at once: a matrix product of more rows is not bitwise the same.
        effect = Effect.REORDERED if calls(gm, ex.run_towers) else Effect.EXACT
        return PassReport(changed=True, matched=matched, effect=effect)

    def _dissolve(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """On one rank towers are dense computation like any other."""
        markers = calls(gm, ops.tower_input, ops.tower_output)
        for node in markers:
            features = list(node.args[0]) if node.target is ops.tower_input else []  # type: ignore[arg-type]
            with gm.graph.inserting_before(node):
                new = ctx.call(gm, torch.cat, features, 1, like=node) if features else node.args[0]
            node.replace_all_uses_with(new)  # type: ignore[arg-type]
            gm.graph.erase_node(node)
        return len(markers)

    def _lower(self, gm: fx.GraphModule, ctx: PassContext, check: fx.Node) -> int:
        """Put the exchanges around the lookups of one group, and return how many they are."""
        lookups = [n for n in calls(gm, ops.lookup) if n.args[1] in check.users]
        assert ctx.plan is not None
        groups = ctx.plan.tower_groups()
        tables = {feature.node: feature.table for feature in ctx.embedding_graph.features}
        owners = tuple(ctx.plan.owner(tables[lookup.name]) for lookup in lookups)
        values = [lookup.meta["val"] for lookup in lookups]
        widths = tuple(int(value.shape[1]) for value in values)
        sums = [node for node in calls(gm, piece_ops.add_pieces) if nodes_in(node.args[0])[0] in lookups]
        summed = tuple(tuple(map(lookups.index, nodes_in(node.args[0]))) for node in sums)
        # What the exchange gives to each feature's readers, by the lookup that stands for it.
        features = dict(enumerate(lookups)) | {pieces[0]: node for pieces, node in zip(summed, sums, strict=True)}
        for index in (piece for pieces in summed for piece in pieces[1:]):
            del features[index]
        towers = find_towers(gm, ctx, lookups, features)
        promoted = functools.reduce(torch.promote_types, (value.dtype for value in values))
        ids, offsets, how, weights, others, rows, labels, check_ids = check.args
        even = tuple(isinstance(starts, fx.Node) and starts.target is ops.even_offsets for starts in offsets)  # type: ignore[union-attr]
        jagged = tuple(starts is not None and not e for starts, e in zip(offsets, even, strict=True))  # type: ignore[arg-type]
        weighted = tuple(factors is not None for factors in weights)  # type: ignore[union-attr]

        def call(target: object, *args: object) -> fx.Node:
            return ctx.call(gm, target, *args, like=lookups[0])  # type: ignore[arg-type]

        with gm.graph.inserting_before(check):
            outputs = towers.group_widths(groups.hosts)
            exchange = IdExchange(
                "int32" if ctx.plan.id_bytes == 4 else "int64",
                ctx.topology.hosts if id_exchange_of(ctx.options.id_exchange, ctx.plan) == "hierarchical" else 0,
                even,
            )
            layout = call(
                id_ops.layout,
                groups.hosts,
                groups.local_ranks,
                owners,
                widths,
                jagged,
                weighted,
                outputs,
                exchange,
                summed,
            )
            packed = call(id_ops.pack_ids, layout, ids, offsets, how, weights, others, rows, check_ids)
            payload, sent = call(operator.getitem, packed, 0), call(operator.getitem, packed, 1)
            received = call(id_ops.exchange_headers, sent, rows, labels)
            bags = call(torch.ops.aten.sym_size.int, ids[0] if offsets[0] is None else offsets[0], 0)  # type: ignore[index]
            bags = call(operator.sub, bags, 1) if how[0].last_offset else bags  # type: ignore[index, union-attr]
            route = call(id_ops.route, layout, sent, received, bags)
            bags_of = call(id_ops.unpack_ids, self._to_owners(call, payload, route, exchange, "ids"), route)
            factors: list[fx.Node | None] = [None] * len(lookups)
            if any(weighted):
                factors = self._exchange_weights(ctx, call, check, route, exchange)
        for index, lookup in enumerate(lookups):
            with gm.graph.inserting_before(lookup):
                lookup.update_arg(1, call(operator.getitem, bags_of, 2 * index))
                if offsets[index] is not None:  # type: ignore[index]
                    lookup.update_arg(2, call(operator.getitem, bags_of, 2 * index + 1))
                lookup.update_arg(3, factors[index])
            lookup.update_arg(4, how[index]._replace(last_offset=False, scale_grad_by_freq=False))  # type: ignore[index, union-attr]
            ctx.environment.record(lookup, gm)
        with gm.graph.inserting_after(lookups[-1]):
            anchor = gm.graph.call_function(operator.getitem, (bags_of, 0))  # marks the place; erased below
        # What reads a feature as it is, apart from its tower.
        users = {i: [u for u in node.users if u.target is not ops.tower_input] for i, node in features.items()}
        joined_only = {index: only_joined(node) for index, node in features.items()}
        with gm.graph.inserting_before(anchor):
            joined = call(ex.join_features, list(lookups), route)
            if groups.local_ranks > 1:
                if groups.hosts > 1 and not exchange.hosts:
                    joined = call(ex.peer_permute, joined, route)
                moved = all_to_all(call, joined, route, "intra", "intra")
                joined = call(ex.join_blocks, moved, route, "intra")
            if summed:
                joined = call(piece_ops.add_blocks, joined, route)
            if towers.modules:
                joined = towers.run(gm, ctx, joined, route)
            if groups.hosts > 1:
                moved = all_to_all(call, joined, route, "peer", "peer")
                joined = call(ex.join_blocks, moved, route, "peer")
            if ctx.training:
                joined = call(gradient_ops.scale_gradient, joined, 1 / ctx.topology.world_size)
            split = call(ops.split_features, joined, None if towers.modules else layout, towers.widths or None)

            def column(index: int, like: torch.Tensor) -> fx.Node:
                piece = call(operator.getitem, split, index)
                return piece if like.dtype == promoted else call(torch.Tensor.to, piece, like.dtype)

            for index, own_users in users.items():
                if not own_users and towers.modules:
                    continue
                piece = column(towers.place(index), values[index])
                piece = piece if joined_only[index] else call(torch.clone, piece)
                if how[index].scale_grad_by_freq:  # type: ignore[index, union-attr]
                    piece = call(gradient_ops.scale_by_frequency, piece, ids[index])  # type: ignore[index]
                for user in own_users:
                    user.replace_input_with(features[index], piece)
            for tower in towers.modules:
                piece = column(towers.place_of(tower), tower.output.meta["val"])
                tower.output.replace_all_uses_with(piece)
        gm.graph.erase_node(anchor)
        towers.erase(gm)
        for node in calls(gm, piece_ops.add_pieces):
            if node in sums:
                gm.graph.erase_node(node)
        for node in list(check.users):
            gm.graph.erase_node(node)
        gm.graph.erase_node(check)
        return len(lookups)

    def _to_owners(self, call: Call, sent: fx.Node, route: fx.Node, exchange: IdExchange, what: str) -> fx.Node:
        """Send ids or their weights to the tables' owners."""
        for number, (hop, group) in enumerate(ID_HOPS[bool(exchange.hosts)]):
            sent = call(id_ops.regroup_by_owner, sent, route, what) if number else sent
            sent = all_to_all(call, sent, route, what + hop, group)
        return sent

    def _exchange_weights(
        self, ctx: PassContext, call: Call, check: fx.Node, route: fx.Node, exchange: IdExchange
    ) -> list[fx.Node | None]:
        """Send per-sample weights along with the ids; their gradients come back the same way."""
        columns: Any = zip(*check.args[1:4], strict=True)
        weighted = [(starts, how, factors) for starts, how, factors in columns if factors is not None]
        factors = [factors for *_, factors in weighted]
        dtypes = [factor.meta["val"].dtype for factor in factors]
        promoted = functools.reduce(torch.promote_types, dtypes)
        factors = [
            factor if d == promoted else call(torch.Tensor.to, factor, promoted)
            for factor, d in zip(factors, dtypes, strict=True)
        ]
        packed = call(
            weight_ops.pack_weights, factors, [s for s, *_ in weighted], tuple(how for _, how, _ in weighted), route
        )
        if packed.meta["val"].requires_grad:
            packed = call(gradient_ops.scale_gradient, packed, float(ctx.topology.world_size))
        received = call(weight_ops.unpack_weights, self._to_owners(call, packed, route, exchange, "weights"), route)
        out: list[fx.Node | None] = []
        remaining = iter(dtypes)
        for index, factor in enumerate(cast(Any, check.args[3])):
            mine = None if factor is None else call(operator.getitem, received, index)
            if mine is not None and (d := next(remaining)) != promoted:
                mine = call(torch.Tensor.to, mine, d)
            out.append(mine)
        return out
