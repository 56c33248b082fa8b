"""Where the vectors of several features become one tensor, and who reads it.

A *part* is what one feature, or something else such as the bottom MLP, brings to a join; between its lookup and the
join a feature may pass through operators of its own, such as a projection to the common width.

Shape suffixes: B samples, V vectors, D width of a vector, W columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import Feature
from dmt_compile.ir.pairs import Pairs, find_pairs
from dmt_compile.ir.pass_base import JOINS, PassContext, mutates, name_of

_KEEP_ORDER = {"view", "reshape", "flatten", "unflatten", "squeeze", "contiguous", "clone"}


@dataclass(frozen=True)
class Part:
    """What one source brings to a join: the node that is joined, and the feature whose it is, or ``None``."""

    node: fx.Node
    feature: str | None


@dataclass(frozen=True)
class Family:
    """Features that are compressed together, and every node that they reach the rest of the model through.

    Args:
        features: in the order of the first join.
        operands: (B, W) or (B, V, D) joins that are read, with their parts in order; none where each feature is read
            by itself.
        local: the nodes between each feature's lookup and its joins, lookups left out.
        pairs: dot products, by the operand they are of.
        left: features that are joined with them and stay as they are: the feature and the reason.
        inside: what lies between lookups and operands; all of it goes.
    """

    features: tuple[str, ...]
    operands: dict[fx.Node, tuple[Part, ...]] = field(default_factory=dict)
    local: dict[str, list[fx.Node]] = field(default_factory=dict)
    pairs: dict[fx.Node, Pairs] = field(default_factory=dict)
    left: tuple[tuple[str, str], ...] = ()
    inside: frozenset[fx.Node] = frozenset()


class NoFamily(Exception):
    """Why features cannot be compressed together, and the node that says so."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


def find_family(gm: fx.GraphModule, ctx: PassContext) -> Family:
    """Return the largest set of features that are joined.

    A feature that is also used apart from its joins, meets the batch before them, or has not one vector a sample stays
    as it is.

    Raises:
        NoFamily: nothing is joined, or features of the set are joined in parts.
    """
    flow = _Flow(gm, ctx)
    operands = {
        node: parts for node, parts in flow.joined.items() if any(user not in flow.joined for user in node.users)
    }
    several = [node for node, parts in operands.items() if len(_features(parts)) > 1]
    if not several:
        raise flow.nearest()
    largest = max(several, key=lambda node: math.prod(node.meta["val"].shape[1:]))
    joined = _features(operands[largest])
    reasons = {name: reason for name in joined if (reason := flow.stays(name, largest)) is not None}
    features = tuple(name for name in joined if name not in reasons)
    if len(features) < 2:
        said, node = next(iter(reasons.values()))
        raise NoFamily(f"{said}, and fewer than two features are left", node)
    if len(set(features)) < len(features):
        twice = next(name for name, times in Counter(features).items() if times > 1)
        raise NoFamily(f"feature {twice} is joined twice", largest)
    chosen: dict[fx.Node, tuple[Part, ...]] = {}
    for node, parts in operands.items():
        names = [name for name in _features(parts) if name in features]
        if names and sorted(names) != sorted(features):
            raise NoFamily(f"it joins {len(names)} of the {len(features)} features that another join has", node)
        if names:
            chosen[node] = tuple(p if p.feature in features else Part(p.node, None) for p in parts)
    chains = {
        name: [n for n, owner in flow.local.items() if owner == name and n.target is not ops.lookup]
        for name in features
    }
    pairs = {node: found for node in chosen if (found := find_pairs(gm, ctx, node)) is not None}
    inside = {node for chain in chains.values() for node in chain}
    inside |= {node for node, parts in flow.joined.items() if set(_features(parts)) & set(features)}
    left = tuple((name, reason) for name, (reason, _) in reasons.items())
    return Family(features, chosen, chains, pairs, left, frozenset(inside - chosen.keys()))


def find_vectors(gm: fx.GraphModule, ctx: PassContext) -> Family:
    """Return the features of one width whose vectors can each be exchanged for another one, wherever they are read.

    Of several widths, the one that most columns have.

    Raises:
        NoFamily: fewer than two features have one vector a sample.
    """
    by_name = {node.name: node for node in gm.graph.nodes}
    of_width: dict[tuple[int, int], list[str]] = {}
    node = next(iter(gm.graph.nodes))
    for feature in ctx.embedding_graph.features:
        node = by_name[feature.node]
        if feature.bags == 1 and not any(mutates(user) for user in node.users):
            of_width.setdefault((feature.group, int(node.meta["val"].shape[1])), []).append(feature.name)
    largest = max(of_width, key=lambda key: key[1] * len(of_width[key]), default=None)
    if largest is None or len(of_width[largest]) < 2:
        raise NoFamily("fewer than two features of one width have one vector a sample", node)
    names = tuple(of_width[largest])
    return Family(names, local={name: [] for name in names})


class _Flow:
    """What becomes of each feature: nodes of its own, joins, and nodes that several features or the batch went into.

    Attributes:
        local: nodes of one feature alone, and whose they are.
        joined: joins and other layouts of them, with their parts.
        misses: what looks like a join and is none, and why.
    """

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.lookups: dict[str, Feature] = {feature.node: feature for feature in ctx.embedding_graph.features}
        self.local: dict[fx.Node, str] = {}
        self.joined: dict[fx.Node, tuple[Part, ...]] = {}
        self.misses: list[tuple[str, fx.Node]] = []
        self._first = next(iter(gm.graph.nodes))
        mixed: set[fx.Node] = set()
        of_batch: set[fx.Node] = set()
        for node in gm.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "placeholder":
                if node.name not in ctx.parameters and isinstance(node.meta["val"], torch.Tensor):
                    of_batch.add(node)
                continue
            if node.name in self.lookups:
                self.local[node] = self.lookups[node.name].name
                continue
            known = [n for n in sources if n in self.local or n in self.joined or n in mixed]
            if not known:
                if any(n in of_batch for n in sources) and isinstance(node.meta.get("val"), torch.Tensor):
                    of_batch.add(node)
                continue
            parts = self._join(node)
            names = {self.local[n] for n in known if n in self.local}
            sizes = {_size(n) for n in sources if isinstance(n.meta.get("val"), torch.SymInt)}
            alone = len(names) == 1 and all(n in self.local for n in known) and not of_batch.intersection(sources)
            if parts is not None:
                self.joined[node] = parts
            elif alone and sizes <= {_size(n) for n in known} and node.op != "output":
                self.local[node] = names.pop()
            else:
                mixed.add(node)

    def stays(self, name: str, join: fx.Node) -> tuple[str, fx.Node] | None:
        """Return why a joined feature cannot be compressed with the others, and the node that says so."""
        own = [node for node, owner in self.local.items() if owner == name]
        feature = self.lookups[own[0].name]
        groups = Counter(
            self.lookups[n.name].group for n, owner in self.local.items() if n.name in self.lookups and owner in
            _features(self.joined[join])
        )  # fmt: skip
        if _size(own[0]) != _size(join):
            return f"feature {name} has not one vector a sample", own[0]
        if feature.group != groups.most_common(1)[0][0]:
            return (
                f"feature {name} is exchanged apart from the others, since its ids come in another number of bags",
                own[0],
            )
        for node in own:
            for user in node.users:
                if user not in self.local and user not in self.joined:
                    return f"feature {name} is also used apart from the join", user
        return None

    def nearest(self) -> NoFamily:
        """Return the error for a model that joins nothing."""
        said = "no cat or stack joins the vectors of several features side by side"
        if self.misses:
            reason, node = self.misses[-1]
            return NoFamily(f"{said}: {reason}", node)
        return NoFamily(said, next(reversed(self.local), self._first))

    def _join(self, node: fx.Node) -> tuple[Part, ...] | None:
        """Return the parts of a node that is a join, or another layout of one."""
        name, value = name_of(node), node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        if name in _KEEP_ORDER and node.args and node.args[0] in self.joined:
            source: Any = node.args[0]
            return self.joined[source] if value.ndim in (2, 3) and _lays_out(source.meta["val"], value) else None
        if name not in JOINS:
            return None
        listed = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 1 if name == "hstack" else 0)
        if value.ndim == 3 and name != "stack" and given in (-1, 2) and value.shape[1] == 1 and _flattened(node):
            given = 1  # (B, 1, W): one vector, whose columns are joined
        if not isinstance(given, int) or given % value.ndim != 1 or value.ndim not in (2, 3):
            self.misses.append((f"{name} joins {value.ndim} dimensions along dimension {given}", node))
            return None
        if value.ndim == 3 and name != "stack" and any(n.meta["val"].ndim != 3 for n in listed):
            return None
        parts: list[Part] = []
        for part in listed:
            parts.extend(self.joined.get(part) or [Part(part, self.local.get(part))])
        if len(_features(parts)) < 2:
            self.misses.append((f"{name} joins {len(_features(parts))} of them as they are, without the batch", node))
        return tuple(parts) if _features(parts) else None


def _flattened(node: fx.Node) -> bool:
    """Tell whether all that reads a (B, 1, W) value lays it out as (B, W)."""
    return all(name_of(u) in _KEEP_ORDER and u.meta["val"].ndim == 2 for u in node.users)


def _size(node: fx.Node) -> Any:
    """Return a size, or the first one of a tensor, as an expression."""
    value = node.meta["val"]
    return torch_internals.canonical_expression(value.shape[0] if isinstance(value, torch.Tensor) else value)


def _features(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.feature for part in parts if part.feature is not None)


def _lays_out(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Tell whether a view keeps samples apart and goes between (B, W) and (B, V, D)."""
    same = torch_internals.canonical_expression(before.shape[0]) == torch_internals.canonical_expression(after.shape[0])
    return same and all(isinstance(size, int) for size in (*before.shape[1:], *after.shape[1:]))
