"""Writes in place, which a graph's edges do not tell of: who reads a tensor by its own name reads what was written.

Passes order nodes by their edges, so a write must not be seen past them. What others read is written to a copy, and
read from there; what nobody else reads, as behind ``ReLU(inplace=True)``, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from dmt_compile.ir import id_ops, ops
from dmt_compile.ir.pass_base import (
    PassContext,
    ancestors,
    closure,
    dependents,
    inplace_position,
    name_of,
    nodes_in,
    origin_of,
    shares_memory,
    written_by,
)


def write_copy(tensor: torch.Tensor, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return a copy of ``tensor`` on which one of its methods that write in place was called."""
    copy = tensor.clone()
    getattr(copy, method)(*args, **kwargs)
    return copy


def write_to_copies(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Write to copies wherever others read what is written, before or after; return how many writes changed.

    Not where the batch or a buffer is written, which must stay written: there the later readers read what the write
    gives back. Writes to parameters, to a part of a tensor that is read as a whole, and to another argument than the
    first stay as they are.
    """
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    changed = 0
    for node in list(gm.graph.nodes):
        target: Any = node.args[0] if node.args else None
        if target not in _written_tensors(node):
            continue
        origin = _origin(target)
        if isinstance(ctx.parameters.get(origin.name), nn.Parameter):
            continue
        later = [user for user in target.users if places[user] > places[node]]
        if origin.op in ("placeholder", "get_attr"):
            if name_of(node) != "setitem" and not shares_memory(target):
                for user in later:
                    user.replace_input_with(target, node)
                changed += bool(later)
            continue
        others = (u for view in _shared(origin) - {target} if places[view] < places[node] for u in view.users)
        if (len(target.users) == 1 and not shares_memory(target)) or any(places[u] > places[node] for u in others):
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
        written = _written_tensors(node)
        if not written:
            continue
        shared = set(chain.from_iterable(_shared(_origin(target)) for target in written))
        readers = {user for view in shared for user in view.users if view in _read_by(user)}
        ordered = ancestors([node]) | dependents([node])
        for reader in sorted(readers - ordered, key=places.__getitem__):
            if node not in regions or regions.get(reader) != regions[node]:
                yield node, reader


def _written_tensors(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node writes to in place."""
    return [target for target in written_by(node) if isinstance(target.meta["val"], torch.Tensor)]


def _read_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads, not their sizes alone; the output comes last anyway."""
    if node.op == "output" or node.target is torch.ops.aten.sym_size.int:
        return []
    checks: dict[Any, slice] = {ops.check_batch: slice(0, 2), id_ops.pack_ids: slice(1, 3)}
    ids_and_offsets = checks.get(node.target)
    return node.all_input_nodes if ids_and_offsets is None else nodes_in(node.args[ids_and_offsets])


def _origin(node: fx.Node) -> fx.Node:
    """Return whose memory a node shares."""
    return origin_of(node, _same_memory)


def _shared(origin: fx.Node) -> set[fx.Node]:
    """Return a node and what shares its memory."""
    return closure([origin], lambda n: (u for u in n.users if u.args[:1] == (n,) and _same_memory(u)))


def _same_memory(node: fx.Node) -> bool:
    """Tell whether a node gives its first argument's memory: a view, or what a write in place gives back."""
    return shares_memory(node) or any(node.args[:1] == (written,) for written in written_by(node))


def _on_a_copy(gm: fx.GraphModule, ctx: PassContext, node: fx.Node) -> fx.Node | None:
    """Return what gives what a write in place gives, and writes nothing; ``None`` where it is not known how."""
    position = inplace_position(node.target)
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
        return ctx.call(gm, write_copy, node.args[0], method, node.args[1:], node.kwargs, like=node)
