"""Where the vectors of several features become one tensor, and who reads it.

A *part* is what one feature, or something else such as the bottom MLP, brings to a join; between its lookup and the
join a feature may pass through operators of its own, such as a projection to the common width.

Shape suffixes: B samples, V vectors, D width of a vector, W columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import JOINS, PassContext, name_of

_KEEP_ORDER = {"view", "reshape", "flatten", "unflatten", "contiguous", "clone"}
_PRODUCTS = {"bmm", "matmul", "einsum"}
_TRANSPOSES = {"transpose", "permute", "swapaxes", "getattr"}
_SELECT = {"getitem", "masked_select", "index_select", "view", "flatten", "reshape", "index", "take", "tril", "triu"}


@dataclass(frozen=True)
class Part:
    """What one source brings to a join: the node that is joined, and the feature whose it is, or ``None``."""

    node: fx.Node
    feature: str | None


@dataclass(frozen=True)
class Pairs:
    """Products of all pairs of joined vectors: the first product, and the (B, pairs) node that selects from it."""

    product: fx.Node
    selected: fx.Node
    kind: str  # "below" the diagonal, "with diagonal", or "all"

    def count(self, vectors: int) -> int:
        """Return the number of pairs of so many vectors."""
        return {"below": vectors * (vectors - 1), "with diagonal": vectors * (vectors + 1), "all": 2 * vectors**2}[
            self.kind
        ] // 2


@dataclass(frozen=True)
class Family:
    """Features that are joined together, and every node that is the join of all of them for somebody else.

    Args:
        features: in the order of the first join.
        operands: (B, W) or (B, V, D) joins that are read, with their parts in order.
        local: the nodes between each feature's lookup and its joins, lookups left out.
        pairs: dot products, by the operand they are of.
    """

    features: tuple[str, ...]
    operands: dict[fx.Node, tuple[Part, ...]]
    local: dict[str, list[fx.Node]]
    pairs: dict[fx.Node, Pairs]


class NoFamily(Exception):
    """Why features cannot be compressed together, and the node that says so."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


def find_family(gm: fx.GraphModule, ctx: PassContext) -> Family:
    """Return the largest set of features that are joined.

    Raises:
        NoFamily: nothing is joined, or a feature of the set is also used apart from the others.
    """
    lookups = {feature.node: feature for feature in ctx.embedding_graph.features}
    local: dict[fx.Node, str] = {}
    joined: dict[fx.Node, tuple[Part, ...]] = {}
    mixed: set[fx.Node] = set()
    of_batch: set[fx.Node] = set()
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            if node.name not in ctx.parameters and isinstance(node.meta["val"], torch.Tensor):
                of_batch.add(node)
            continue
        if node.name in lookups:
            local[node] = lookups[node.name].name
            continue
        from_features = [n for n in sources if n in local or n in joined or n in mixed]
        if not from_features:
            if any(n in of_batch for n in sources) and isinstance(node.meta.get("val"), torch.Tensor):
                of_batch.add(node)
            continue
        parts = _join(node, local, joined, mixed)
        names = {local[n] for n in from_features if n in local}
        sizes = {_size(n) for n in sources if isinstance(n.meta.get("val"), torch.SymInt)}
        alone = len(names) == 1 and all(n in local for n in from_features) and not of_batch.intersection(sources)
        alone = alone and sizes <= {_size(n) for n in from_features}
        if parts is not None:
            joined[node] = parts
        elif alone and node.op != "output":
            local[node] = names.pop()
        else:
            mixed.add(node)
    operands = {
        node: parts for node, parts in joined.items() if any(u not in joined for u in node.users) and _several(parts)
    }
    if not operands:
        last = next((n for n in reversed(gm.graph.nodes) if n in local), next(iter(gm.graph.nodes)))
        raise NoFamily("no cat or stack joins the vectors of several features", last)
    largest = max(operands, key=lambda node: math.prod(node.meta["val"].shape[1:]))
    features = _features(operands[largest])
    return _family(features, operands, local, joined)


def _family(
    features: tuple[str, ...],
    operands: dict[fx.Node, tuple[Part, ...]],
    local: dict[fx.Node, str],
    joined: dict[fx.Node, tuple[Part, ...]],
) -> Family:
    inside = set(features)
    first = next(node for node, parts in operands.items() if _features(parts) == features)
    if len(features) > len(inside):
        twice = next(name for name, times in Counter(features).items() if times > 1)
        raise NoFamily(f"feature {twice} is joined twice", first)
    chosen: dict[fx.Node, tuple[Part, ...]] = {}
    for node, parts in operands.items():
        names = _features(parts)
        if inside.isdisjoint(names):
            continue
        if sorted(names) != sorted(features):
            raise NoFamily(f"it joins {len(names)} of the {len(features)} features that another join has", node)
        chosen[node] = parts
    for node, name in local.items():
        for user in node.users if name in inside else ():
            if user not in local and user not in joined:
                raise NoFamily(f"feature {name} is also used apart from the join", user)
    chains = {
        name: [n for n, owner in local.items() if owner == name and n.target is not ops.lookup] for name in features
    }
    pairs = {node: found for node, parts in chosen.items() if (found := _pairs(node)) is not None}
    return Family(features, chosen, chains, pairs)


def _size(node: fx.Node) -> Any:
    """Return a size, or the first one of a tensor, as an expression."""
    value = node.meta["val"]
    return torch_internals.canonical_expression(value.shape[0] if isinstance(value, torch.Tensor) else value)


def _features(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.feature for part in parts if part.feature is not None)


def _several(parts: Sequence[Part]) -> bool:
    return len(_features(parts)) > 1


def _join(
    node: fx.Node, local: dict[fx.Node, str], joined: dict[fx.Node, tuple[Part, ...]], mixed: set[fx.Node]
) -> tuple[Part, ...] | None:
    """Return the parts of a node that is a join, or another layout of one."""
    name, value = name_of(node), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3):
        return None
    if name in _KEEP_ORDER and node.args and node.args[0] in joined:
        source: Any = node.args[0]
        return joined[source] if _lays_out(source.meta["val"], value) else None
    if name not in JOINS:
        return None
    listed = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 1 if name == "hstack" else 0)
    if not isinstance(given, int) or given % value.ndim != 1 or mixed.intersection(listed):
        return None
    if value.ndim == 3 and name != "stack" and any(n.meta["val"].ndim != 3 for n in listed):
        return None
    parts: list[Part] = []
    for part in listed:
        if part in joined:
            parts.extend(joined[part])
        else:
            parts.append(Part(part, local.get(part)))
    return tuple(parts) if any(part.feature is not None for part in parts) else None


def _lays_out(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Tell whether a view keeps samples apart and goes between (B, W) and (B, V, D)."""
    same = torch_internals.canonical_expression(before.shape[0]) == torch_internals.canonical_expression(after.shape[0])
    return same and all(isinstance(size, int) for size in (*before.shape[1:], *after.shape[1:]))


def _pairs(operand: fx.Node) -> Pairs | None:
    """Return the dot products of all pairs of an operand's vectors, where it has some."""
    value = operand.meta["val"]
    if value.ndim != 3:
        return None
    vectors = int(value.shape[1])
    same = {operand, *(user for user in operand.users if name_of(user) in _TRANSPOSES)}
    for node in [user for one in same for user in one.users]:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        shape = tuple(node.meta["val"].shape[1:]) if isinstance(node.meta.get("val"), torch.Tensor) else ()
        if name_of(node) in _PRODUCTS and set(tensors) <= same and shape == (vectors, vectors):
            return _selected(node, vectors)
    return None


def _selected(product: fx.Node, vectors: int) -> Pairs | None:
    kinds = {vectors * (vectors - 1) // 2: "below", vectors * (vectors + 1) // 2: "with diagonal", vectors**2: "all"}
    node = product
    while len(node.users) == 1:
        node = next(iter(node.users))
        value = node.meta.get("val")
        if name_of(node) not in _SELECT or not isinstance(value, torch.Tensor):
            return None
        if value.ndim == 2 and value.shape[1] in kinds:
            return Pairs(product, node, kinds[int(value.shape[1])])
    return None
