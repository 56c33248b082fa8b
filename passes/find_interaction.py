"""Find how the features meet: where their vectors are joined, and what is computed of the join.

A *join* is a ``cat`` or ``stack`` over lookups, seen through views, projections and further joins. What is computed of
it gives the kind:

    dot            products of all pairs: the join times its own transpose, by bmm, matmul or einsum
    cross          DCN: x0 * (W x + b) + x, any rank
    fm             square of the sum minus sum of the squares
    compressed     products of fields under a convolution (CIN)
    attention      softmax over the fields
    convolution    convolution over the fields (FGCNN)
    product        element-wise product of two joins (two towers, bilinear)
    concatenation  a linear layer on the join alone

A model may have several; the first kind in this order comes first. Nothing is rewritten: SPTT needs the lookups alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmt_compile.ir.embedding_graph import Interaction
from dmt_compile.ir.pass_base import (
    JOINS,
    VIEWS,
    Pass,
    PassContext,
    PassReport,
    ancestors,
    dependents,
    name_of,
    nodes_in,
    views_of,
)
from dmt_compile.ir.stages import Stage

_PRODUCTS = {"bmm", "matmul", "einsum", "tensordot", "baddbmm", "mm", "linear", "addmm", "scaled_dot_product_attention"}
_MULTIPLY = {"mul", "imul", "multiply", "mul_"}
_ADD = {"add", "iadd", "add_"}
_SQUARE = {"pow", "square", *_MULTIPLY}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


@dataclass
class _Join:
    """A join: its node, its features in order, its other parts, and what is the same or follows."""

    node: fx.Node
    features: tuple[str, ...]
    others: tuple[fx.Node, ...]
    same: set[fx.Node]
    after: set[fx.Node]


@dataclass(frozen=True)
class FindInteraction(Pass):
    """Name the joins of features and what is computed of them."""

    name: ClassVar[str] = "find_interaction"
    needs: ClassVar[Stage] = Stage.FLAT
    gives: ClassVar[Stage] = Stage.FLAT

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Fill ``ctx.embedding_graph``; the graph stays as it is."""
        features = {feature.node: feature.name for feature in ctx.embedding_graph.features}
        if not features:
            return PassReport(changed=False)
        joins = self._joins(gm, features)
        found: list[Interaction] = []
        for kind, recognise in _KINDS.items():
            for join in joins:
                node = recognise(join, joins)
                if node is not None and not any((i.kind, i.features) == (kind, join.features) for i in found):
                    dense = join.others[0].name if len(join.others) == 1 else None
                    found.append(Interaction(kind, node.name, join.features, dense))
        for interaction in found:
            ctx.embedding_graph.add_interaction(interaction)
        skipped = () if found else ((self._nearest(gm, joins)),)
        return PassReport(changed=False, matched=len(found), skipped=skipped)

    def _joins(self, gm: fx.GraphModule, features: dict[str, str]) -> list[_Join]:
        """Return the joins of at least two features, those of most columns first."""
        dependent = dependents([node for node in gm.graph.nodes if node.name in features])
        found: list[_Join] = []
        for node in gm.graph.nodes:
            if name_of(node) not in JOINS or node not in dependent:
                continue
            parts = _parts(node, features, dependent)
            names = tuple(features[part.name] for part in parts if part.name in features)
            if len(set(names)) > 1:
                others = tuple(part for part in parts if part.name not in features)
                found.append(_Join(node, names, others, views_of(node), dependents([node])))
        return sorted(found, key=lambda join: -math.prod(s for s in join.node.meta["val"].shape if isinstance(s, int)))

    def _nearest(self, gm: fx.GraphModule, joins: list[_Join]) -> tuple[str, str]:
        if not joins:
            return "graph", "no cat or stack of the vectors of several features"
        users = sorted({name_of(user) for same in joins[0].same for user in same.users if user not in joins[0].same})
        return joins[
            0
        ].node.name, f"it joins {len(joins[0].features)} features, but {', '.join(users)} is no known kind"


def _parts(node: fx.Node, features: dict[str, str], dependent: set[fx.Node]) -> list[fx.Node]:
    """Return what a join is made of, through views, further joins and projections of single features."""
    parts: list[fx.Node] = []
    stack = [node]
    while stack:
        part = stack.pop()
        if part not in dependent:
            parts.append(_behind_views(part))
        elif part.name in features:
            parts.append(part)
        elif name_of(part) in JOINS:
            stack.extend(reversed(nodes_in((part.args, part.kwargs))))
        else:
            sources = [source for source in part.all_input_nodes if source in dependent]
            one = len(sources) == 1 and (name_of(part) in VIEWS | {"linear", "div", "truediv"})
            stack.append(sources[0]) if one else parts.append(part)
    return parts


def _behind_views(node: fx.Node) -> fx.Node:
    while name_of(node) in {"unsqueeze", "view", "reshape", "contiguous"} and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return a node's operands, those in a list too; a pair may name one twice."""
    listed = [inner for arg in node.args for inner in (arg if isinstance(arg, list | tuple) else [arg])]
    return [arg for arg in listed if isinstance(arg, fx.Node)]


def _dot(join: _Join, joins: list[_Join]) -> fx.Node | None:
    vectors = len(join.features) + len(join.others)
    for node in sorted(join.after - join.same):
        operands = _operands(node)
        if name_of(node) in {"bmm", "matmul", "einsum"} and len(operands) == 2 and set(operands) <= join.same:
            pairs = tuple(node.meta["val"].shape[1:]) == (vectors, vectors)
            if pairs and len(join.others) <= 1:
                return node
    return None


def _cross(join: _Join, joins: list[_Join]) -> fx.Node | None:
    for node in sorted(join.after):
        operands = _operands(node)
        if name_of(node) not in {*_MULTIPLY, "matmul"} or len(operands) != 2:
            continue
        mixed = [n for n in operands if n in join.after - join.same and _goes_through(n, join, _PRODUCTS)]
        if len(mixed) == 1 and any(n in join.same for n in operands) and _added_to_input(node, join):
            return node
    return None


def _added_to_input(node: fx.Node, join: _Join) -> bool:
    """Tell whether a product is added to something else that comes from the join, after biases and gates of experts."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if name_of(user) in _ADD and any(n in join.after and node not in ancestors([n]) for n in _operands(user)):
                return True
            if name_of(user) in _ADD | VIEWS | JOINS | {"matmul", "sum"} and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _goes_through(node: fx.Node, join: _Join, names: set[str]) -> bool:
    """Tell whether one of ``names`` lies between a join and a node."""
    return any(name_of(n) in names for n in ancestors([node]) & join.after)


def _fm(join: _Join, joins: list[_Join]) -> fx.Node | None:
    of_sums = squares = None
    for same in sorted(join.same):
        for user in same.users:
            if name_of(user) == "sum":
                of_sums = of_sums or next((n for s in views_of(user) for n in s.users if name_of(n) in _SQUARE), None)
            if name_of(user) in _SQUARE and set(_operands(user)) <= join.same:
                squares = squares or next((n for s in views_of(user) for n in s.users if name_of(n) == "sum"), None)
    if of_sums is None or squares is None:
        return None
    return next(
        (n for n in sorted(dependents([of_sums]) & dependents([squares])) if name_of(n) in {"sub", "isub"}), None
    )


def _convolution(join: _Join, joins: list[_Join]) -> fx.Node | None:
    return next((n for n in sorted(join.after) if name_of(n) in _CONVOLUTIONS and not _after_products(n, join)), None)


def _compressed(join: _Join, joins: list[_Join]) -> fx.Node | None:
    return next((n for n in sorted(join.after) if name_of(n) in _CONVOLUTIONS and _after_products(n, join)), None)


def _after_products(node: fx.Node, join: _Join) -> bool:
    return _goes_through(node, join, {"einsum", "bmm", "matmul", *_MULTIPLY})


def _attention(join: _Join, joins: list[_Join]) -> fx.Node | None:
    names = {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
    return next((n for n in sorted(join.after) if name_of(n) in names), None)


def _product(join: _Join, joins: list[_Join]) -> fx.Node | None:
    for node in sorted(join.after):
        operands = _operands(node)
        if name_of(node) in {*_MULTIPLY, "cosine_similarity"} and len(operands) == 2 and operands[0] is not operands[1]:
            apart = [other for other in joins if set(other.features).isdisjoint(join.features)]
            if any((a in join.after) != (b in join.after) for a, b in [operands]) and any(
                n in other.after and n not in join.after for other in apart for n in operands
            ):
                return node
    return None


def _concatenation(join: _Join, joins: list[_Join]) -> fx.Node | None:
    users = [user for same in sorted(join.same) for user in same.users]
    return next((user for user in users if name_of(user) in {"linear", "addmm", "mm"}), None)


_KINDS: dict[str, Callable[[_Join, list[_Join]], fx.Node | None]] = {
    "dot": _dot,
    "cross": _cross,
    "fm": _fm,
    "compressed": _compressed,
    "attention": _attention,
    "convolution": _convolution,
    "product": _product,
    "concatenation": _concatenation,
}
