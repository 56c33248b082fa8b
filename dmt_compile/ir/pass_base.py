"""The contract of a pass: a frozen dataclass that rewrites a graph and reports what it did.

A pass never verifies, times, logs graphs or reads the environment: the driver in ``pipeline.py`` does.
"""

from __future__ import annotations

import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dmt_compile.config import Options
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.embedding_graph import EmbeddingGraph, Unmatched, source_line
from dmt_compile.ir.metadata import FakeEnvironment
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.topology import Topology
from dmt_compile.towers import Towers


@dataclass(frozen=True)
class PassReport:
    """What a pass did: whether it changed the graph, how many matches, what it left alone and why.

    ``skipped`` holds (node, reason); ``effect`` is the pass's own unless this run had a weaker or stronger one.
    """

    changed: bool
    matched: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    effect: Effect | None = None
    notes: tuple[str, ...] = ()


@dataclass
class PassContext:
    """What passes share: options, topology, the embedding graph and the parameters behind the graph's inputs.

    Args:
        options: the user's.
        topology: hosts x local ranks of the run, simulated or real.
        flat_names: graph input -> flat parameter or buffer name; for the batch, the variable that the user passed.
        parameters: graph input -> the real parameter or buffer.
        inputs: graph input -> the real value of the batch that is being compiled for.
        choose_plan: returns the plan for the model's tables; the same on every rank.
        training: gradients are enabled.
        root: the module whose parameters these are.
        towers: the model's Tower Modules; ``insert_tower_modules`` makes them where there are none.
        inline_towers: write their operators into the graph, so that no other tracer has to read the modules.
        rank: the one rank that will run the program; ``None`` where all do, as in a simulated world.
    """

    options: Options
    topology: Topology
    flat_names: dict[str, str]
    parameters: dict[str, torch.Tensor]
    inputs: dict[str, Any]
    choose_plan: Callable[[tuple[TableSpec, ...]], TowerPlan]
    training: bool
    root: nn.Module | None = None
    towers: Towers | None = None
    inline_towers: bool = True
    rank: int | None = None
    environment: FakeEnvironment = field(default_factory=FakeEnvironment)
    embedding_graph: EmbeddingGraph = field(default_factory=EmbeddingGraph)
    plan: TowerPlan | None = None
    captured_inputs: list[str] = field(default_factory=list)
    captured_outputs: Any = None

    def begin(self, gm: fx.GraphModule) -> None:
        """Derive the metadata of a captured graph, and remember what its rewrites must keep."""
        self.environment.annotate(gm)
        self.captured_inputs = [node.name for node in placeholders(gm)]
        output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
        self.captured_outputs = output.meta["val"]

    @property
    def distributed(self) -> bool:
        """More than one rank runs the program."""
        return self.topology.world_size > 1

    def call(self, gm: fx.GraphModule, target: Callable[..., Any], *args: Any, like: fx.Node | None = None) -> fx.Node:
        """Insert a call at the graph's insertion point, with its metadata; ``like`` gives the user's source line."""
        node = gm.graph.call_function(target, args)
        self.environment.record(node, gm)
        if like is not None and "stack_trace" in like.meta:
            node.meta["stack_trace"] = like.meta["stack_trace"]
        return node

    def leave(self, node: fx.Node, reason: str, pass_name: str) -> tuple[str, str]:
        """Record that something stays as it is; an error in strict mode.

        Raises:
            UnsupportedGraphError: ``strict`` is set.
        """
        line = source_line(node)
        if self.options.strict:
            raise UnsupportedGraphError(
                f"{pass_name}: expected a region that can be rewritten for {node.name}, found that {reason} ({line}); "
                "change the line or drop strict=True"
            )
        self.embedding_graph.unmatched.append(Unmatched(node.name, reason, line))
        return node.name, reason


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; fields of a subclass are its options."""

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""


def calls(gm: fx.GraphModule, *targets: Callable[..., Any]) -> list[fx.Node]:
    """Return the nodes that call one of ``targets``, in graph order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in targets]


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the graph's inputs."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


# What gives the same values in another layout or type, or a part of them.
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "chunk"),
    *(
        "transpose",
        "permute",
        "swapaxes",
        "t",
        "mT",
        "getitem",
        "split",
        "dropout",
        "expand",
        "narrow",
        "select",
        "getattr",
    ),
}


JOINS = {"cat", "concat", "concatenate", "stack", "hstack"}


def name_of(node: fx.Node) -> str:
    """Return what a node calls, without module and overload."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def views_of(node: fx.Node) -> set[fx.Node]:
    """Return a node and all views of it."""
    return closure([node], lambda n: (user for user in n.users if name_of(user) in VIEWS))


def origin_of(node: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
    """Return what a node was made of, going back from each that ``through`` accepts to its first argument."""
    while through(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def shares_memory(node: fx.Node) -> bool:
    """Tell whether a node gives a view, or may, and never a copy."""
    return name_of(node) in VIEWS - {"clone"}


def only_joined(node: fx.Node) -> bool:
    """Tell whether a node and its views are read by ``cat`` and ``stack`` alone.

    These copy anyway. Anything else gets a feature in memory of its own, not as columns of a joined tensor: a matrix
    product of rows that lie apart is not bitwise that of the same rows side by side, and nothing may write in place to
    what other features share.
    """
    views = views_of(node)
    return all(name_of(user) in JOINS for view in views for user in view.users if user not in views)


def mutates(node: fx.Node) -> bool:
    """Tell whether a node writes in place to one of its arguments."""
    return bool(written_by(node))


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node that it writes to in place."""
    if node.op not in ("call_method", "call_function"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        written = [a for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        places = {argument.name: place for place, argument in enumerate(node.target._schema.arguments)}
        return nodes_in([node.kwargs.get(a.name, node.args[places[a.name] :][:1]) for a in written])
    name, position = name_of(node), inplace_position(node.target)
    if position is not None:
        to_first = bool(node.args[position] if position < len(node.args) else node.kwargs.get("inplace"))
    else:
        to_first = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    out = node.kwargs.get("out")
    return nodes_in([node.args[:1] if to_first else (), out]) if to_first or out is not None else []


@functools.cache
def inplace_position(target: Any) -> int | None:
    """Return which argument of what a node calls says whether to write in place, if one does."""
    if getattr(target, "__module__", None) != "torch.nn.functional":
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem),
}


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return all nodes that ``nodes`` depend on, themselves included."""
    return closure(nodes, lambda node: node.all_input_nodes)


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return all nodes that depend on one of ``nodes``, these included."""
    return closure(nodes, lambda node: node.users)


def closure(nodes: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return nodes and all that ``onward`` leads to from them, step by step."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(onward(node))
    return found


def nodes_in(value: Any) -> list[fx.Node]:
    """Return the nodes among a node's arguments, nested and repeated ones too."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def erase_unused(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node without users, and what it alone used; operators of ours too, which no clean-up would drop."""
    erased: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in erased and not node.users and node.op not in ("placeholder", "output"):
            stack += node.all_input_nodes
            gm.graph.erase_node(node)
            erased.add(node)


def sort_graph(gm: fx.GraphModule) -> None:
    """Put the nodes into an order in which each stands after its inputs, disturbing the present order least."""
    nodes = list(gm.graph.nodes)
    done: set[fx.Node] = set()
    ordered: list[fx.Node] = []
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [n for n in node.all_input_nodes if n not in done]
            if node in done:
                stack.pop()
            elif waiting:
                stack.extend(reversed(waiting))
            else:
                done.add(node)
                ordered.append(node)
                stack.pop()
    for before, after in pairwise(ordered):
        if before.next is not after:
            before.append(after)
