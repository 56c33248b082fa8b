"""What becomes of a graph when some of its dimensions get another size.

Dimensions that must agree form one class: a linear layer's input and the columns of its weight, operands of a sum, the
two sides of a matrix product. A class that gets a new size takes every parameter with it; sizes of joins and views
follow by sums and products. Which dimensions these are, operator by operator, is in ``size_rules``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir.pass_base import name_of

Axis = tuple[Any, ...]  # (node, dim), or (node, index, dim) for one of several outputs


class CannotResize(Exception):
    """A dimension that would have to change is fixed: the reason, and the node that says so."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class _Relation:
    """``whole`` is the sum or the product of ``parts``."""

    whole: Axis
    parts: tuple[Axis, ...]
    product: bool


@dataclass
class Resizing:
    """Classes of equal dimensions, and the new sizes of some.

    Args:
        nodes: the nodes to follow, in graph order; others neither change nor count.
        sources: nodes whose own sizes are free, whatever made them.
    """

    nodes: Sequence[fx.Node]
    sources: set[fx.Node]
    _parents: dict[Axis, Axis] = field(default_factory=dict)
    _new: dict[Axis, int] = field(default_factory=dict)
    _frozen: dict[Axis, tuple[str, fx.Node]] = field(default_factory=dict)
    _relations: list[_Relation] = field(default_factory=list)
    _multiples: list[tuple[Axis, int, fx.Node]] = field(default_factory=list)

    # ---------------------------------------------------------------------------------------------------------- sizes

    def set(self, node: fx.Node, dim: int, size: int) -> None:
        """Give dimension ``dim`` of a node a new size.

        Raises:
            CannotResize: its class has another new size already.
        """
        self._assign((node, dim % node.meta["val"].ndim), size, node)

    def fix(self, node: fx.Node, reason: str) -> None:
        """Let a node keep its sizes; ``reason`` is given where it would have to change."""
        self.freeze_all(node, node, reason)

    def solve(self) -> None:
        """Follow the new sizes through joins and views.

        Raises:
            CannotResize: a dimension that would have to change is fixed.
        """
        changed = True
        while changed:
            changed = sum(self._follow(relation) for relation in self._relations) > 0
        for axis, (reason, node) in self._frozen.items():
            root = self._root(axis)
            if root in self._new and self._new[root] != self._old(root):
                raise CannotResize(f"{reason}: {self._old(root)} columns would become {self._new[root]}", node)
        for axis, number, node in self._multiples:
            if self._now(axis) % number:
                raise CannotResize(f"{name_of(node)} needs a multiple of {number} columns, not {self._now(axis)}", node)

    def size(self, node: fx.Node, dim: int) -> Any:
        """Return the size that a dimension has after :meth:`solve`; symbols stay symbols."""
        return self._now((node, dim))

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return a node's shape after :meth:`solve`."""
        return tuple(self.size(node, dim) for dim in range(node.meta["val"].ndim))

    def changed(self, node: fx.Node) -> bool:
        """Tell whether what a node gives has another shape after :meth:`solve`."""
        return any(self._now(axis) != self._old(axis) for axis in axes_of(node))

    # --------------------------------------------------------------------------------------------------------- classes

    def _root(self, axis: Axis) -> Axis:
        while (parent := self._parents.get(axis, axis)) != axis:
            axis = parent
        return axis

    def same(self, a: Axis, b: Axis) -> None:
        """Put two dimensions into one class."""
        left, right = self._root(a), self._root(b)
        if left != right:
            self._parents[left] = right

    def relate(self, whole: Axis, parts: tuple[Axis, ...], product: bool) -> None:
        """Make one dimension the sum, or the product, of others."""
        self._relations.append(_Relation(whole, parts, product))

    def keep_multiple(self, axis: Axis, number: int, node: fx.Node) -> None:
        """Let a dimension have sizes that are multiples of a number, such as the heads of an attention, alone."""
        self._multiples.append((axis, number, node))

    def _old(self, axis: Axis) -> Any:
        value = axis[0].meta["val"]
        return size_of((value if len(axis) == 2 else value[axis[1]]).shape[axis[-1]])

    def _now(self, axis: Axis) -> Any:
        return self._new.get(self._root(axis), self._old(axis))

    def _assign(self, axis: Axis, size: int, node: fx.Node) -> bool:
        root = self._root(axis)
        if self._new.get(root, size) != size:
            raise CannotResize(f"{node.name} would need {self._new[root]} and {size} columns at once", node)
        known = root in self._new
        self._new[root] = size
        return not known

    def freeze(self, axis: Axis, node: fx.Node, reason: str) -> None:
        """Let a dimension keep its size; ``node`` and ``reason`` are given where it would have to change."""
        self._frozen.setdefault(axis, (reason, node))

    def freeze_all(self, operand: Any, node: fx.Node, reason: str | None = None) -> None:
        """Let all dimensions of a node keep their sizes."""
        for axis in axes_of(operand):
            self.freeze(axis, node, reason or f"{name_of(node)} has a fixed size")

    def match_products(self) -> None:
        """Let what is laid out as one dimension and then as before have its dimensions back."""
        known: dict[tuple[Any, ...], tuple[Axis, ...]] = {}
        for relation in self._relations:
            if relation.product:
                key = (self._root(relation.whole), *map(self._old, relation.parts))
                for one, other in zip(known.setdefault(key, relation.parts), relation.parts, strict=True):
                    self.same(one, other)

    def _follow(self, relation: _Relation) -> bool:
        parts, whole = [self._now(p) for p in relation.parts], self._now(relation.whole)
        node = relation.whole[0]
        if not all(isinstance(size, int) for size in (*parts, whole)):
            if any(self._now(axis) != self._old(axis) for axis in (*relation.parts, relation.whole)):
                raise CannotResize(f"{name_of(node)} lays out samples and columns together", node)
            return False
        total = math.prod(parts) if relation.product else sum(parts)
        if total == whole:
            return False
        if self._root(relation.whole) not in self._new:
            return self._assign(relation.whole, total, node)
        free = [p for p in relation.parts if self._root(p) not in self._new]
        if relation.product and len(free) > 1:
            sizes = " x ".join(str(self._old(part)) for part in relation.parts)
            view = relation.parts[0][0]
            raise CannotResize(f"{name_of(view)} lays out {sizes} columns, of which any could become fewer", view)
        if relation.product and free:
            others = math.prod(self._now(p) for p in relation.parts if p != free[0])
            if whole % others == 0:
                return self._assign(free[0], whole // others, node)
        raise CannotResize(f"{name_of(node)} would have {total} columns where {whole} are needed", node)


def axes_of(node: Any) -> Iterator[Axis]:
    """Yield the dimensions of what a node gives: a tensor, or several."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, torch.Tensor):
        yield from ((node, dim) for dim in range(value.ndim))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            if isinstance(item, torch.Tensor):
                yield from ((node, index, dim) for dim in range(item.ndim))


def size_of(size: Any) -> Any:
    """Return a size as a number or an expression."""
    return torch_internals.canonical_expression(size)
