"""Rules for graphs that several ranks run: placements, exchanges, towers; each yields a sentence a breach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, piece_ops, weight_ops
from dmt_compile.ir.pass_base import PassContext, calls, nodes_in, placeholders
from dmt_compile.plan import MOST_INT32
from dmt_compile.runtime.route import ID_HOPS

_LOOKUPS = (ops.lookup, ops.batched_lookup)
_HOPS = {what + hop: group for what in ("ids", "weights") for way in ID_HOPS.values() for hop, group in way}
_HOPS |= {"intra": "intra", "peer": "peer"}
_ALL_TO_ALL = (ex.start_all_to_all, ex.wait_all_to_all)
_ROUTED = (
    ex.start_all_to_all, ex.peer_permute, ex.join_blocks, ex.split_blocks, piece_ops.add_blocks, ex.run_towers
)  # fmt: skip
# Each way that data goes; ids and their weights may take turns.
_WAYS = tuple(
    tuple(hop for hop in _HOPS if hop.partition("_")[0] in (what, "intra", "peer")) for what in ("ids", "weights")
)


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
    after = ["peer", ex.join_blocks] if groups.hosts > 1 else []
    after += [gradient_ops.scale_gradient] if ctx.training else []
    for split in calls(gm, ops.split_features, ex.split_blocks):
        behind = _behind(split.args[0], lambda node: node.target not in (ex.join_features, ops.batched_lookup))
        start: Any = behind[0].args[0] if behind else split.args[0]
        folded = [ex.peer_permute] if start.kwargs.get("peer_order") else []
        found = [*folded, *(_step(node) for node in behind)]
        routed = [node for node in (*behind, split) if node.target in _ROUTED]
        route: Any = routed[-1].args[1] if routed else None
        for node in reversed(routed):
            if node.args[1] is not route:
                yield f"{node.name} follows another route than the rest of {split.name}"
        at_home = not isinstance(route, fx.Node) or route.meta["val"].layout.exchange.hosts  # rows are in peer order
        expected: list[Any] = [] if at_home or groups.hosts == 1 or groups.local_ranks == 1 else [ex.peer_permute]
        expected += ["intra", ex.join_blocks] if groups.local_ranks > 1 else []
        expected += [piece_ops.add_blocks] if route is not None and route.meta["val"].layout.summed else []
        in_blocks = split.target is ex.split_blocks
        sent_by_towers = split.args[4] is not None if in_blocks else split.args[1] is None
        expected += [ex.run_towers] if sent_by_towers else []
        expected += after
        if in_blocks:  # it joins and scales itself; ``scaled`` holds it to the factor
            found += [ex.join_blocks, *([gradient_ops.scale_gradient] if ctx.training else [])]
        if found != expected:
            yield f"{split.name} comes from the steps {_names(found)}, expected {_names(expected)}"


def _behind(node: Any, goes_on: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the chain of first arguments that ends in a node, in its order; of an all-to-all the start alone."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and goes_on(node):
        chain.insert(0, node)
        node = node.args[0]
    return [node for node in chain if node.target is not ex.wait_all_to_all]


def _step(node: fx.Node) -> Any:
    """Return the hop of an all-to-all, or what another node calls."""
    return node.args[2] if node.target is ex.start_all_to_all else node.target


def _names(steps: list[Any]) -> list[str]:
    return [step if isinstance(step, str) else getattr(step, "__name__", str(step)) for step in steps]


def delivered(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, id_ops.unpack_ids, weight_ops.unpack_weights):
        what = "ids" if node.target is id_ops.unpack_ids else "weights"
        route: Any = node.args[1]
        behind = _behind(node.args[0], lambda n: n.target in (*_ALL_TO_ALL, id_ops.regroup_by_owner))
        found = [_step(source) for source in behind]
        for source in reversed(behind):
            if source.args[1] is not route:
                yield f"{source.name} follows another route than {node.name}"
        way = [what + hop for hop, _ in ID_HOPS[bool(route.meta["val"].layout.exchange.hosts)]]
        expected = [*way[:1], *(step for hop in way[1:] for step in (id_ops.regroup_by_owner, hop))]
        if found != expected:
            yield f"{node.name} comes from the steps {_names(found)}, expected {_names(expected)}"
    for packed in calls(gm, id_ops.pack_ids):
        args: Any = packed.args
        offsets, rows, layout = args[2], args[6], args[0].meta["val"]
        exchange = layout.exchange
        if exchange.hosts not in (0, ctx.topology.hosts):
            yield f"{packed.name} sends ids by way of {exchange.hosts} hosts, expected {ctx.topology.hosts}"
        last = max(end for _, end in rows)
        if exchange.dtype != "int64" and last > MOST_INT32:
            yield f"{packed.name} sends ids below {last} as {exchange.dtype}, expected int64"
        for index, starts in enumerate(offsets):
            even = isinstance(starts, fx.Node) and starts.target is ops.even_offsets
            if layout.is_even(index) != even or layout.jagged[index] != (starts is not None and not even):
                yield f"{packed.name} and {starts} disagree on the bag lengths of feature {index} that travel"


def collectives(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    hops: dict[fx.Node, list[str]] = {}
    for node in calls(gm, ex.start_all_to_all):
        tensor, route, hop, group, *forms = node.args
        if _HOPS.get(str(hop)) != group:
            yield f"{node.name} sends hop {hop} in group {group}, expected {_HOPS.get(str(hop))}"
        actual = str(tensor.meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        asked = ctx.options.wire_forms(str(hop)) if tensor.meta["val"].is_floating_point() else (None, None)  # type: ignore[union-attr]
        for direction, form, wish in zip(("forward", "backward"), forms, asked, strict=True):
            if form not in (actual, wish):
                yield f"{node.name} declares {form} on the wire for a tensor of {actual}, {direction}"
        waits = [user for user in node.users if user.target is ex.wait_all_to_all]
        if len(waits) != 1 or len(node.users) != 1:
            yield f"{node.name} is waited for {len(waits)} times and has {len(node.users)} users, expected one wait"
        hops.setdefault(route, []).append(str(hop))  # type: ignore[arg-type]
    for route, found in hops.items():
        in_order = all([hop for hop in found if hop in way] == [hop for hop in way if hop in found] for way in _WAYS)
        if not in_order or len(set(found)) != len(found):
            yield f"hops of {route.name} are in the order {found}, expected parts of {_WAYS}, each once"


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
        if node.args[8] != expected:
            yield f"{node.name} adds up features {node.args[8]}, expected those of row pieces, {expected}"


def _groups(ctx: PassContext) -> list[list[tuple[str, str]]]:
    """Return each group's features in order: the table, and which of the lookups of its table it is."""
    groups: dict[int, list[tuple[str, str]]] = {}
    for feature in ctx.embedding_graph.features:
        groups.setdefault(feature.group, []).append((feature.table, feature.name.removeprefix(feature.table)))
    return list(groups.values())


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
                bucket: Any = source.args[0] if source.args else None
                started = isinstance(bucket, fx.Node) and bucket.target is gradient_ops.start_gradients
                summed = bucket.args[1].args[0].tower if started else tower.group
                if summed != tower.group:
                    yield f"{source.name} is summed over group {summed}, expected {tower.group}"
