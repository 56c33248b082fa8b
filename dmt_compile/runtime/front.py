"""Cuts a lowered graph in two: what distributes a batch's ids, which can run ahead of its step, and the rest.

The front is what ``unpack_ids`` depends on: checks, the exchange of headers, the exchanges of ids. It may read the
batch, and integer buffers such as the offsets of fields. Of weights of ids that a model computes, the front looks at
the sizes only; the rest computes them again, with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dmt_compile.ir import id_ops
from dmt_compile.ir.gradient_ops import broadcast_buffers
from dmt_compile.ir.pass_base import ancestors, calls, mutates, nodes_in, placeholders


@dataclass(frozen=True)
class Front:
    """A graph in two parts.

    Args:
        first: takes the graph's inputs at ``positions`` and returns what ``rest`` needs of them.
        rest: takes all of the graph's inputs, then what ``first`` returned.
        positions: of the inputs that ``first`` reads.
        names: of the same.
        held: those among them that may change until the step: of them the sizes alone matter.
    """

    first: fx.GraphModule
    rest: fx.GraphModule
    positions: tuple[int, ...]
    names: tuple[str, ...]
    held: frozenset[str]


def cut_front(gm: fx.GraphModule, of_batch: frozenset[str]) -> Front | str:
    """Return a lowered graph in two parts, or why it cannot be cut.

    Args:
        gm: the lowered graph of several ranks; it is left as it is.
        of_batch: names of the inputs that are the batch's.
    """
    unpacked = calls(gm, id_ops.unpack_ids)
    if not unpacked:
        return "the graph distributes no ids"
    inside = ancestors(unpacked)
    if any(map(mutates, inside)):
        return "the model writes in place to its ids"
    inputs = placeholders(gm)
    held = {node for node in inputs if node in inside and node.name not in of_batch and _may_change(node)}
    computed: set[fx.Node] = set()  # of parameters
    for node in gm.graph.nodes:
        if node in inside and (node in held or any(source in computed for source in _read(node))):
            computed.add(node)
    ahead = [node for node in gm.graph.nodes if node in inside and node not in computed]
    if any(node not in ahead for node in unpacked):
        return "its ids depend on " + ", ".join(sorted(node.name for node in held))
    if any(node.target is broadcast_buffers for node in computed):
        return "weights of its ids depend on buffers"
    return _cut(gm, inputs, inside, computed)


def _may_change(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node depends on: of weights, packing ids reads the sizes alone."""
    return nodes_in([*node.args[:4], *node.args[5:]]) if node.target is id_ops.pack_ids else node.all_input_nodes


def _cut(gm: fx.GraphModule, inputs: list[fx.Node], inside: set[fx.Node], computed: set[fx.Node]) -> Front:
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    later = [node for node in nodes if node not in inside or node in computed]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    needed = {source for node in (*later, output) for source in node.all_input_nodes}
    handed_on = [node for node in nodes if node in inside and node not in computed and node in needed]
    first, copies = fx.Graph(), {}
    read = [node for node in inputs if node in inside]
    for node in read:
        copies[node] = first.node_copy(node)
    for node in nodes:
        if node in inside:
            copies[node] = first.node_copy(node, lambda n: copies[n])
    first.output(tuple(copies[node] for node in handed_on))
    rest, again = fx.Graph(), {}
    for node in inputs:
        again[node] = rest.node_copy(node)
    for node in handed_on:
        again[node] = rest.placeholder(f"ahead_{node.name}")
    for node in later:
        again[node] = rest.node_copy(node, lambda n: again[n])
    rest.output(fx.map_arg(output.args[0], lambda n: again[n]))
    positions = tuple(position for position, node in enumerate(inputs) if node in inside)
    names = tuple(node.name for node in read)
    held = frozenset(node.name for node in read if node in computed)
    return Front(fx.GraphModule(gm, first), fx.GraphModule(gm, rest), positions, names, held)


@dataclass
class Coming:
    """A batch whose ids go before its step.

    Args:
        front: that sends them.
        given: what it is given, with the version of each tensor when the batch came.
        begin: has the front run, the first time that it is called; returns what the front returns, or the error that it
            ends in.
    """

    front: Front
    given: list[tuple[Any, int]]
    begin: Callable[[], Future[tuple[Any, ...]]]

    def fits(self, args: tuple[Any, ...]) -> bool:
        """Tell whether a call of the program is for this very batch, unchanged."""
        for position, name, (value, version) in zip(self.front.positions, self.front.names, self.given, strict=True):
            same = args[position] is value if isinstance(value, torch.Tensor) else args[position] == value
            if not same or (name not in self.front.held and version_of(value) != version):
                return False
        return True


def version_of(value: Any) -> int:
    """Return how often a tensor was written to."""
    return int(value._version) if isinstance(value, torch.Tensor) and not value.is_inference() else 0
