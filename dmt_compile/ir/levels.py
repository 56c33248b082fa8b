"""How many operators of ours stand before each node: what is between the same exchanges is computed together."""

from __future__ import annotations

from torch import fx

from dmt_compile.ir.gradient_ops import averaging, broadcast_buffers, start_gradients, wait_gradients
from dmt_compile.ir.metadata import LOOKUP_RULES
from dmt_compile.ir.ops import OPERATORS

_IDENTITIES = (averaging, wait_gradients, start_gradients, broadcast_buffers)  # nothing waits for them in the forward


def is_sparse(node: fx.Node) -> bool:
    """Tell whether a node is a lookup that stayed flat and gives its table a sparse gradient."""
    return node.target in LOOKUP_RULES and (True in (node.kwargs.get("sparse"), *node.args[6:8]))


def is_operator(node: fx.Node) -> bool:
    """Tell whether a node stays in the outer program: an operator of ours, or a sparse lookup."""
    return node.target in OPERATORS or is_sparse(node)


def levels(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """Return the most operators on any way to each node, itself included."""
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        before = max((found[source] for source in node.all_input_nodes), default=0)
        found[node] = before + (is_operator(node) and node.target not in _IDENTITIES)
    return found
