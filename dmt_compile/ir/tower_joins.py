"""What takes the place of joined features: towers before the exchange, and joins of what they send behind it.

Shape suffixes: B samples, F features of a tower, N width of a feature, V vectors, D width of a vector, O columns that a
tower sends, W columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dmt_compile.ir import ops
from dmt_compile.ir.joins import Family, Part
from dmt_compile.ir.pairs import select_pairs
from dmt_compile.ir.pass_base import PassContext, name_of, only_joined
from dmt_compile.ir.resizing import Resizing
from dmt_compile.tower_modules import TowerSpec

_LAY_OUT = {"view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "unflatten"}


@dataclass(frozen=True)
class SendingTower:
    """A tower with a module: what it was made for, and how many columns it sends; ``scalars`` come last of them."""

    spec: TowerSpec
    module: nn.Module
    width: int

    @property
    def scalars(self) -> int:
        """Columns that belong to no vector."""
        return int(getattr(self.module, "scalars", 0))

    @property
    def vectors(self) -> int:
        """Vectors of ``dim`` columns that it sends."""
        return (self.width - self.scalars) // self.spec.dim

    @property
    def of_features(self) -> tuple[int, ...] | None:
        """Columns that it sends for each feature, in their order; ``None`` where it sends something else."""
        columns, features = self.width - self.scalars, len(self.spec.features)
        if columns == sum(self.spec.widths):
            return self.spec.widths
        return (self.spec.dim,) * features if columns == self.spec.dim * features else None

    def __str__(self) -> str:
        before = sum(self.spec.widths)
        return f"{self.spec.name}: {len(self.spec.features)} features, {before} -> {self.width} columns"


def columns_of(node: fx.Node) -> int:
    """Return how many columns a (B, D), (B, 1, D) or (B, V, D) value has for a sample."""
    columns = 1
    for size in node.meta["val"].shape[1:]:
        columns *= int(size)
    return columns


def feed_tower(
    gm: fx.GraphModule, ctx: PassContext, family: Family, lookups: dict[str, fx.Node], tower: SendingTower
) -> tuple[fx.Node, fx.Node]:
    """Insert what a tower's module reads: its features through what each passes before the join, inside the tower.

    Returns:
        The tower's input mark (B, W), and the module's argument, (B, F, N), or (B, W) where widths differ.
    """
    mine = [lookups[name] for name in tower.spec.features]
    first = next(iter(family.operands.values()), ())
    ends = {part.feature: part.node for part in first}

    def call(target: Any, *args: Any) -> fx.Node:
        return ctx.call(gm, target, *args, like=mine[0])

    joined = call(ops.tower_input, mine, tower.spec.name)
    even = tower.spec.even
    if any(name_of(node) not in _LAY_OUT for name in tower.spec.features for node in family.local[name]):
        columns = [
            _own_chain(gm, ctx, family.local[name], lookup, piece, ends[name])
            for lookup, name, piece in zip(
                mine, tower.spec.features, _apart(call, joined, [columns_of(lookup) for lookup in mine]), strict=True
            )
        ]
        return joined, call(torch.stack if even else torch.cat, columns, 1)
    return joined, call(torch.unflatten, joined, 1, (len(mine), tower.spec.widths[0])) if even else joined


def _own_chain(
    gm: fx.GraphModule, ctx: PassContext, chain: list[fx.Node], lookup: fx.Node, piece: fx.Node, end: fx.Node
) -> fx.Node:
    """Copy what a feature passes through before the join, reading its columns of the tower instead."""
    copies = {lookup: piece}
    for node in chain:
        copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        ctx.environment.record(copies[node], gm)
    vector = copies[end]
    return vector if vector.meta["val"].ndim == 2 else ctx.call(gm, torch.flatten, vector, 1, like=end)


class Sent:
    """What towers sent, taken apart where the features' own order asks for it.

    Args:
        call: inserts a call.
        towers: in any order.
        outputs: of each tower, (B, O).
    """

    def __init__(
        self, call: Callable[..., fx.Node], towers: Sequence[SendingTower], outputs: Sequence[fx.Node]
    ) -> None:
        self.call, self.towers, self.outputs = call, towers, outputs
        self._pieces: dict[tuple[fx.Node, int, int], fx.Node] = {}
        self._features: dict[fx.Node, list[fx.Node]] = {}

    def columns(self, output: fx.Node, start: int, width: int) -> fx.Node:
        """Return columns of what a tower sent."""
        if width == int(output.meta["val"].shape[1]):
            return output
        if (output, start, width) not in self._pieces:
            self._pieces[output, start, width] = self.call(torch.narrow, output, 1, start, width)
        return self._pieces[output, start, width]

    def features(self, tower: SendingTower, output: fx.Node) -> list[fx.Node]:
        """Return the vector of each feature of a tower that sends one for each, and its scalars if there are some."""
        if output not in self._features:
            widths = [*(tower.of_features or ()), *([tower.scalars] if tower.scalars else [])]
            self._features[output] = _apart(self.call, output, widths)
        return self._features[output]

    def scalars(self) -> list[fx.Node]:
        """Return the scalars of every tower that sends some, (B, scalars)."""
        return [
            self.columns(out, tower.width - tower.scalars, tower.scalars)
            for tower, out in zip(self.towers, self.outputs, strict=True)
            if tower.scalars
        ]

    def in_order(self, parts: Sequence[Part], scalars: bool) -> list[fx.Node]:
        """Return what is joined: towers at the places of their features, everything else where it was.

        A tower whose features are neighbours stays in one piece, and so does one that sends something else than a
        vector for each feature: at the place of its first. Of any other one each feature keeps its own place.
        """
        place = {part.feature: index for index, part in enumerate(parts) if part.feature is not None}
        placed = [(index, part.node) for index, part in enumerate(parts) if part.feature is None]
        for tower, out in zip(self.towers, self.outputs, strict=True):
            places = [place[name] for name in tower.spec.features]
            widths = tower.of_features
            vectors = tower.width - tower.scalars
            if widths is None or places == list(range(places[0], places[0] + len(places))):
                width = tower.width if scalars else vectors
                placed += [(min(places), self.columns(out, 0, width))] if width else []
                continue
            pieces = self.features(tower, out)
            placed += list(zip(places, pieces, strict=False))
            if tower.scalars and scalars:
                placed.append((max(places), pieces[-1]))
        return [node for _, node in sorted(placed, key=lambda pair: pair[0])]

    def of_each(self) -> dict[str, fx.Node]:
        """Return the vector of each feature, where towers send one for each."""
        found: dict[str, fx.Node] = {}
        for tower, out in zip(self.towers, self.outputs, strict=True):
            found |= dict(zip(tower.spec.features, self.features(tower, out), strict=False))
        return found


def _apart(call: Callable[..., fx.Node], joined: fx.Node, widths: list[int]) -> list[fx.Node]:
    """Take columns apart in one piece of work: a slice for each would add up as many gradients of the whole."""
    if len(widths) == 1:
        return [joined]
    pieces = call(torch.split, joined, widths, 1)
    return [call(operator.getitem, pieces, index) for index in range(len(widths))]


def join_again(
    gm: fx.GraphModule, ctx: PassContext, family: Family, sent: Sent, sizes: Resizing
) -> dict[fx.Node, fx.Node]:
    """Insert the joins, and the dot products, of what the towers sent; return what replaces what."""
    call, replaced = sent.call, {}
    for node, parts in family.operands.items():
        if node.meta["val"].ndim == 2:
            pieces = [
                call(torch.flatten, n, 1) if n.meta["val"].ndim > 2 else n for n in sent.in_order(parts, scalars=True)
            ]
            replaced[node] = call(torch.cat, pieces, 1)
            continue
        dim = int(sizes.size(node, 2))
        joined = call(torch.cat, [_as_vectors(call, n, dim) for n in sent.in_order(parts, scalars=False)], 1)
        replaced[node] = joined
        if node in family.pairs:
            pairs, scalars = family.pairs[node], sent.scalars()
            chosen = select_pairs(gm, call, ctx, pairs, joined)
            replaced[pairs.selected] = call(torch.cat, [chosen, *scalars], 1) if scalars else chosen
    return replaced


def exchange_vectors(lookups: dict[str, fx.Node], call: Callable[..., fx.Node], sent: Sent) -> dict[fx.Node, fx.Node]:
    """Return what replaces each feature's own lookup: its columns of what its tower sent."""
    replaced = {}
    for name, piece in sent.of_each().items():
        # Rows that lie apart may be added up in another order by whatever reads them than rows side by side.
        replaced[lookups[name]] = piece if only_joined(lookups[name]) else call(torch.clone, piece)
    return replaced


def _as_vectors(call: Callable[..., fx.Node], node: fx.Node, dim: int) -> fx.Node:
    value = node.meta["val"]
    if value.ndim == 3:
        return node
    return call(torch.unflatten, node, 1, (int(value.shape[1]) // dim, dim))
