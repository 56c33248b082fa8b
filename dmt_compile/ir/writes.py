"""Writes in place, which a graph's edges do not tell of: who reads a tensor by its own name reads what was written.

Passes order nodes by their edges, so a write must not be seen past them. What others read is written to a copy, and
read from there; what nobody else reads, as behind ``ReLU(inplace=True)``, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from dmt_compile.ir import id_ops, ops
from dmt_compile.ir.pass_base import VIEWS, PassContext, ancestors, inplace_position, mutates, name_of, nodes_in

_SHARES = VIEWS - {"clone"}


def write_copy(tensor: torch.Tensor, method: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return a copy of ``tensor`` on which one of its methods that write in place was called."""
    copy = tensor.clone()
    getattr(copy, method)(*args, **kwargs)
    return copy


def write_to_copies(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Write to copies wherever others read what is written, before or after; return how many writes changed.

    Not where the batch or a buffer is written, which must stay written: there the later readers read what the write
    gives back. Writes to parameters, and to a part of a tensor that is read as a whole, stay as they are.
    """
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    changed = 0
    for node in list(gm.graph.nodes):
        if not _writes(node):
            continue
        target: Any = node.args[0]
        origin = _origin(target)
        if isinstance(ctx.parameters.get(origin.name), nn.Parameter):
            continue
        later = [user for user in target.users if places[user] > places[node]]
        if origin.op in ("placeholder", "get_attr"):
            if name_of(node) != "setitem" and not _is_view(target):
                for user in later:
                    user.replace_input_with(target, node)
                changed += bool(later)
            continue
        others = (u for view in _shared(origin) - {target} if places[view] < places[node] for u in view.users)
        if (len(target.users) == 1 and not _is_view(target)) or any(places[u] > places[node] for u in others):
            continue
        written = _on_a_copy(gm, ctx, node)
        if written is not None:
            places[written] = places[node]
            for user in later:
                user.replace_input_with(target, written)
            if written is not node:
                node.replace_all_uses_with(written)
                gm.graph.erase_node(node)
            changed += 1
    return changed


def unordered_readers(gm: fx.GraphModule, regions: Mapping[fx.Node, int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Return writes in place, each with a reader of the same memory that neither region nor edges hold in its order.

    Args:
        gm: in the order of the user's model.
        regions: of nodes that run together, in this order.
    """
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if not _writes(node):
            continue
        before, target = ancestors([node]), cast(fx.Node, node.args[0])
        shared = _shared(_origin(target))
        readers = {user for view in shared for user in view.users if view in _read_by(user)} - {node}
        for reader in sorted(readers, key=places.__getitem__):
            together = node in regions and regions.get(reader) == regions[node]
            ordered = reader in before if places[reader] < places[node] else node in ancestors([reader])
            if not together and not ordered:
                yield node, reader


def _writes(node: fx.Node) -> bool:
    """Tell whether a node writes in place to a tensor."""
    target = node.args[0] if node.args else None
    return mutates(node) and isinstance(target, fx.Node) and isinstance(target.meta["val"], torch.Tensor)


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads, not their sizes alone; the output comes last anyway."""
    if node.op == "output" or node.target is torch.ops.aten.sym_size.int:
        return []
    checks: dict[Any, slice] = {ops.check_batch: slice(0, 2), id_ops.pack_ids: slice(1, 3)}
    ids_and_offsets = checks.get(node.target)
    return node.all_input_nodes if ids_and_offsets is None else nodes_in(node.args[ids_and_offsets])


def _is_view(node: fx.Node) -> bool:
    return name_of(node) in _SHARES


def _origin(node: fx.Node) -> fx.Node:
    """Return whose memory a node shares."""
    while (_is_view(node) or mutates(node)) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _shared(origin: fx.Node) -> set[fx.Node]:
    """Return a node and what shares its memory: views, and what writes in place give back."""
    found: set[fx.Node] = set()
    stack = [origin]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [user for user in node.users if user.args[:1] == (node,) and (_is_view(user) or mutates(user))]
    return found


def _on_a_copy(gm: fx.GraphModule, ctx: PassContext, node: fx.Node) -> fx.Node | None:
    """Return what gives what a write in place gives, and writes nothing; ``None`` where it is not known how."""
    position = inplace_position(node)
    if position is not None:
        if position < len(node.args):
            node.update_arg(position, False)
        else:
            node.update_kwarg("inplace", False)
        ctx.environment.record(node, gm)
        return node
    name = name_of(node)
    method = name if node.op == "call_method" or name.endswith("_") else f"__{name}__"
    if not hasattr(torch.Tensor, method):
        return None
    with gm.graph.inserting_before(node):
        written = gm.graph.call_function(write_copy, (node.args[0], method, *node.args[1:]), dict(node.kwargs))
    ctx.environment.record(written, gm)
    if "stack_trace" in node.meta:
        written.meta["stack_trace"] = node.meta["stack_trace"]
    return written
