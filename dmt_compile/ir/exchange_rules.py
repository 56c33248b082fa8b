"""Rules for graphs that several ranks run: placements, exchanges, gradients; each yields a sentence a breach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, piece_ops
from dmt_compile.ir.pass_base import PassContext, calls, nodes_in, placeholders

_LOOKUPS = (ops.lookup, ops.batched_lookup)
_HOPS = {"ids": "world", "weights": "world", "intra": "intra", "peer": "peer"}


def placed(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    inputs = {node.name: node for node in placeholders(gm)}
    for table in ctx.embedding_graph.tables:
        shards = inputs[table.placeholder].meta.get("shards", {}).get(table.name)
        if shards is None:
            yield f"table {table.name} has no placement"
        elif ctx.plan is not None and shards != ctx.plan.placements[table.name]:
            yield f"table {table.name} is placed otherwise than the plan says"


def exchanged(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if ctx.distributed and calls(gm, *_LOOKUPS):
        for node in calls(gm, ops.check_batch):
            yield f"{node.name} reads this rank's samples only"


def steps(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if ctx.plan is None or not ctx.distributed:
        return
    groups = ctx.plan.tower_groups()
    inside = [ex.peer_permute, "intra", ex.join_blocks] if groups.local_ranks > 1 else []
    after = ["peer", ex.join_blocks] if groups.hosts > 1 else []
    after += [gradient_ops.scale_gradient] if ctx.training else []
    for split in calls(gm, ops.split_features):
        route: Any = None
        found: list[Any] = []
        node = split.args[0]
        while isinstance(node, fx.Node) and node.target not in (ex.join_features, ops.batched_lookup):
            found.insert(0, node.args[2] if node.target is ex.all_to_all else node.target)
            if node.target in (ex.all_to_all, ex.peer_permute, ex.join_blocks, piece_ops.add_blocks, ex.run_towers):
                route = route or node.args[1]
                if node.args[1] is not route:
                    yield f"{node.name} follows another route than the rest of {split.name}"
            node = node.args[0]
        added = [piece_ops.add_blocks] if route is not None and route.meta["val"].layout.summed else []
        expected = inside + added + ([ex.run_towers] if split.args[1] is None else []) + after
        if found != expected:
            names = [
                [s if isinstance(s, str) else getattr(s, "__name__", s) for s in steps] for steps in (found, expected)
            ]
            yield f"{split.name} comes from the steps {names[0]}, expected {names[1]}"


def scaled(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    ranks = ctx.topology.world_size
    averaged = {user for node in calls(gm, gradient_ops.synchronize) for user in node.users}
    for node in calls(gm, gradient_ops.scale_gradient):
        of_weights = isinstance(node.args[0], fx.Node) and node.args[0].target is id_ops.pack_weights
        of_towers = node.args[0] in averaged and {user.target for user in node.users} == {ex.run_towers}
        expected = float(ranks) if of_weights or of_towers else 1 / ranks
        if node.args[1] != expected:
            yield f"{node.name} scales its gradient by {node.args[1]}, expected {expected}"


def averaged_once(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    times = Counter(n.name for node in calls(gm, gradient_ops.synchronize) for n in nodes_in(node.args[0]))
    for name, number in times.items():
        if number > 1:
            yield f"the gradient of {ctx.flat_names.get(name, name)} is averaged {number} times"


def collectives(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    hops: dict[fx.Node, list[str]] = {}
    for node in calls(gm, ex.all_to_all):
        tensor, route, hop, group, dtype = node.args
        if _HOPS.get(str(hop)) != group:
            yield f"{node.name} sends hop {hop} in group {group}, expected {_HOPS.get(str(hop))}"
        actual = str(tensor.meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        if actual != dtype:
            yield f"{node.name} declares {dtype} on the wire for a tensor of {actual}"
        hops.setdefault(route, []).append(str(hop))  # type: ignore[arg-type]
    for route, found in hops.items():
        if found != sorted(found, key=list(_HOPS).index) or len(set(found)) != len(found):
            yield f"hops of {route.name} are in the order {found}, expected a part of {list(_HOPS)}, each once"


def widths(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    dims = {table.name: table.dim for table in ctx.embedding_graph.tables}
    for node, tables in zip(calls(gm, id_ops.layout), _groups(ctx), strict=False):
        owners, widths = node.args[2], node.args[3]
        if list(widths) != [dims[table] for table, _ in tables]:  # type: ignore[arg-type]
            yield f"{node.name} splits the columns into {widths}, expected the widths of the features"
        if ctx.plan is not None and list(owners) != [ctx.plan.owner(table) for table, _ in tables]:  # type: ignore[arg-type]
            yield f"{node.name} sends ids to {owners}, expected the owners of the plan"


def summed(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    added = {table.name: table.added for table in ctx.plan.tables} if ctx.plan is not None else {}
    for node, tables in zip(calls(gm, id_ops.layout), _groups(ctx), strict=False):
        sets: dict[Any, list[int]] = {}
        for index, (table, number) in enumerate(tables):
            sets.setdefault((added.get(table, table), number), []).append(index)
        expected = tuple(tuple(pieces) for pieces in sets.values() if len(pieces) > 1)
        if node.args[7] != expected:
            yield f"{node.name} adds up features {node.args[7]}, expected those of row pieces, {expected}"


def _groups(ctx: PassContext) -> list[list[tuple[str, str]]]:
    """Return each group's features in order: the table, and which of the lookups of its table it is."""
    groups: dict[int, list[tuple[str, str]]] = {}
    for feature in ctx.embedding_graph.features:
        groups.setdefault(feature.group, []).append((feature.table, feature.name.removeprefix(feature.table)))
    return list(groups.values())


def synchronized(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if not (ctx.distributed and ctx.training):
        return
    tables = {table.placeholder for table in ctx.embedding_graph.tables}
    for node in gm.graph.nodes:
        held = node.op in ("placeholder", "get_attr") and node.name in ctx.parameters and node.name not in tables
        for user in node.users if held and node.meta["val"].requires_grad else ():
            if user.target not in (gradient_ops.synchronize, gradient_ops.synchronize_tower):
                yield f"parameter {ctx.flat_names[node.name]} reaches {user.name} without averaging its gradient"


def towers_apart(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, ex.run_towers):
        args: Any = node.args
        joined, route, towers, regions, given = args
        layout = route.meta["val"].layout
        sent = [sum(t.width for t in towers if t.group == group) for group in range(layout.topology.hosts)]
        if list(layout.outputs) != sent:
            yield f"{node.name} gives {sent} columns by group, but {list(layout.outputs)} are exchanged"
        for region in regions:
            start = next(iter(region.meta["val"].graph_module.graph.nodes)).meta["val"]
            if start.requires_grad != joined.meta["val"].requires_grad:
                yield f"{region.name} and the features that it reads disagree on gradients"
        for tower in towers:
            away = set(tower.features) - set(layout.group_features(tower.group))
            if away:
                yield f"{node.name} takes features {sorted(away)} in group {tower.group}, which does not hold them"
            for source in nodes_in(given[tower.region]) if tower.region >= 0 else ():
                bucket = source.args[0] if source.args else None
                summed = isinstance(bucket, fx.Node) and bucket.target is gradient_ops.synchronize_tower
                if isinstance(bucket, fx.Node) and summed and bucket.args[2] != tower.group:
                    yield f"{source.name} is summed over group {bucket.args[2]}, expected {tower.group}"
