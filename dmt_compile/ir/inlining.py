"""A module's operators written into a graph, its parameters as attributes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.tower_modules import modes_kept


def inline(
    gm: fx.GraphModule,
    ctx: PassContext,
    module: nn.Module,
    name: str,
    argument: fx.Node,
    attribute: Callable[[str], fx.Node],
) -> fx.Node:
    """Write a module of one argument into a graph at its insertion point, and return the node of its result.

    Args:
        gm: the graph.
        ctx: derives metadata.
        module: of one tensor argument and one tensor result.
        name: of what it belongs to, for errors.
        argument: of the module.
        attribute: returns the node that reads a parameter or buffer of the module by its path.

    Raises:
        UnsupportedGraphError: it cannot be traced, or it is another one in evaluation than in training.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for node in _trace(module, name).nodes:
        if node.op == "placeholder":
            copies[node] = argument
        elif node.op == "get_attr":
            copies[node] = attribute(str(node.target))
        elif node.op == "output":
            return copies[node.args[0]]
        else:
            copies[node] = gm.graph.node_copy(node, lambda n: copies[n])
            copies[node].meta = {}
            ctx.environment.record(copies[node], gm)
    raise AssertionError("a graph ends in its output")


def _trace(module: nn.Module, name: str) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            return False

    graphs = []
    try:
        with modes_kept(module):
            for mode in (True, False):
                graphs.append(Tracer().trace(module.train(mode)))
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise UnsupportedGraphError(
            f"insert_tower_modules: expected a module for {name} that torch.fx can trace, found "
            f"{type(error).__name__}: {said}; use dmt_compile.transform, whose result torch.compile reads itself"
        ) from error
    if str(graphs[0]) != str(graphs[1]):
        raise UnsupportedGraphError(
            f"insert_tower_modules: expected a module for {name} that is the same in training and evaluation, found "
            "dropout, batch normalisation or the like; use dmt_compile.transform, whose result torch.compile reads "
            "itself"
        )
    return graphs[0]
