"""Bring Dynamo's graph into one form: no assertions, no writes past its edges, one node per size, no inferred sizes.

Dynamo asserts what it learnt of symbolic sizes; ``check_batch`` checks the same with an error that names the input. A
size comes in as a graph input or as ``size()``; one ``sym_size`` node per symbol is left. A view's ``-1`` cannot be
inferred for an empty batch, so it is written out where the size is known: a compiled model takes batches of 0. Writes
in place that others would see go to copies (``ir/writes.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, mutates, placeholders
from dmt_compile.ir.stages import Stage
from dmt_compile.ir.writes import write_to_copies

_VIEWS = ("view", "reshape")


@dataclass(frozen=True)
class NormalizeGraph(Pass):
    """Remove assertions, write to copies what others read, unify sizes, write out ``-1`` in views."""

    name: ClassVar[str] = "normalize_graph"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        removed = calls(gm, torch.ops.aten._assert_scalar.default, torch._check)
        for node in removed:
            gm.graph.erase_node(node)
        gm.graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))
        writes = write_to_copies(gm, ctx)
        sizes = self._size_nodes(gm, ctx)
        views = sum(self._write_out_view(node, sizes) for node in list(gm.graph.nodes))
        changed = bool(removed or writes or sizes or views)
        return PassReport(changed=changed, matched=len(removed) + writes + views)

    def _size_nodes(self, gm: fx.GraphModule, ctx: PassContext) -> dict[Any, fx.Node]:
        """Replace each use of a symbolic size by the one node that reads it off an input; return those by symbol."""
        inputs = placeholders(gm)
        wanted = {
            torch_internals.canonical_expression(size)
            for node in gm.graph.nodes
            for size in _sizes(node)
            if isinstance(size, torch.SymInt)
        }
        nodes: dict[Any, fx.Node] = {}
        for node in inputs:
            value = node.meta["val"]
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                expression = torch_internals.canonical_expression(size)
                if isinstance(size, torch.SymInt) and expression in wanted and expression not in nodes:
                    with gm.graph.inserting_after(inputs[-1]):
                        nodes[expression] = ctx.call(gm, torch.ops.aten.sym_size.int, node, dim, like=node)
        for node in list(gm.graph.nodes):
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and node not in nodes.values():
                replacement = nodes.get(torch_internals.canonical_expression(value))
                if replacement is not None:
                    node.replace_all_uses_with(replacement)
                    if node.op != "placeholder":
                        gm.graph.erase_node(node)
        for expression in [e for e, node in nodes.items() if not node.users]:
            gm.graph.erase_node(nodes.pop(expression))
        return nodes

    def _write_out_view(self, node: fx.Node, sizes: dict[Any, fx.Node]) -> bool:
        if node.op != "call_method" or node.target not in _VIEWS:
            return False
        shape = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        if -1 not in shape or len(node.meta["val"].shape) != len(shape):
            return False
        written: list[Any] = []
        for given, size in zip(shape, node.meta["val"].shape, strict=True):
            if given != -1:
                written.append(given)
            elif isinstance(size, int):
                written.append(size)
            else:
                written.append(sizes.get(torch_internals.canonical_expression(size), -1))
        if -1 in written:
            return False
        node.args = (node.args[0], *written)
        return True


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape) if node.op in ("call_method", "call_function") else ()
    return (value,)
