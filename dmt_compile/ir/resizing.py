"""What becomes of a graph when some of its dimensions get another size.

Dimensions that must agree form one class: a linear layer's input and the columns of its weight, operands of a sum, the
two sides of a matrix product. A class that gets a new size takes every parameter with it; sizes of joins and views
follow by sums and products. What an operator does with a dimension that this file does not know keeps its size: if it
would have to change, that is the reason why the graph cannot be resized, and it is reported with the user's line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir.pass_base import JOINS, name_of

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

    def __post_init__(self) -> None:
        for node in self.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._freeze_all(source, node, "the model's output would change")
            elif node.op in ("call_function", "call_method") and node not in self.sources:
                self._connect(node)

    # ------------------------------------------------------------------------------------------------------- questions

    def set(self, node: fx.Node, dim: int, size: int) -> None:
        """Give dimension ``dim`` of a node a new size.

        Raises:
            CannotResize: its class has another new size already.
        """
        self._assign((node, dim % node.meta["val"].ndim), size, node)

    def fix(self, node: fx.Node, reason: str) -> None:
        """Let a node keep its sizes; ``reason`` is given where it would have to change."""
        self._freeze_all(node, node, reason)

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

    def size(self, node: fx.Node, dim: int) -> Any:
        """Return the size that a dimension has after :meth:`solve`; symbols stay symbols."""
        return self._now((node, dim))

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return a node's shape after :meth:`solve`."""
        return tuple(self.size(node, dim) for dim in range(node.meta["val"].ndim))

    def changed(self, node: fx.Node) -> bool:
        """Tell whether a node that gives one tensor has another shape after :meth:`solve`."""
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and self.shape(node) != tuple(map(_size, value.shape))

    # --------------------------------------------------------------------------------------------------------- classes

    def _root(self, axis: Axis) -> Axis:
        while (parent := self._parents.get(axis, axis)) != axis:
            axis = parent
        return axis

    def _same(self, a: Axis, b: Axis) -> None:
        left, right = self._root(a), self._root(b)
        if left != right:
            self._parents[left] = right

    def _old(self, axis: Axis) -> Any:
        value = axis[0].meta["val"]
        return _size((value if len(axis) == 2 else value[axis[1]]).shape[axis[-1]])

    def _now(self, axis: Axis) -> Any:
        return self._new.get(self._root(axis), self._old(axis))

    def _assign(self, axis: Axis, size: int, node: fx.Node) -> bool:
        root = self._root(axis)
        if self._new.get(root, size) != size:
            raise CannotResize(f"{node.name} would need {self._new[root]} and {size} columns at once", node)
        known = root in self._new
        self._new[root] = size
        return not known

    def _freeze(self, axis: Axis, node: fx.Node, reason: str) -> None:
        self._frozen.setdefault(axis, (reason, node))

    def _freeze_all(self, operand: Any, node: fx.Node, reason: str | None = None) -> None:
        for axis in _axes(operand):
            self._freeze(axis, node, reason or f"{name_of(node)} has a fixed size")

    def _follow(self, relation: _Relation) -> bool:
        parts, whole = [self._now(p) for p in relation.parts], self._now(relation.whole)
        node = relation.whole[0]
        if not all(isinstance(size, int) for size in (*parts, whole)):
            return False
        total = math.prod(parts) if relation.product else sum(parts)
        if total == whole:
            return False
        if self._root(relation.whole) not in self._new:
            return self._assign(relation.whole, total, node)
        free = [p for p in relation.parts if self._root(p) not in self._new]
        if relation.product and free:
            others = math.prod(self._now(p) for p in relation.parts if p != free[0])
            if whole % others == 0:
                return self._assign(free[0], whole // others, node)
        raise CannotResize(f"{name_of(node)} would have {total} columns where {whole} are needed", node)

    # ------------------------------------------------------------------------------------------------------- operators

    def _connect(self, node: fx.Node) -> None:
        name = name_of(node)
        value = node.meta.get("val")
        if not any(True for operand in node.all_input_nodes for _ in _axes(operand)):
            return
        rule = _RULES.get(name)
        if rule is not None:
            rule(self, node)
        elif name in _ELEMENTWISE and isinstance(value, torch.Tensor):
            self._broadcast(node, [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)])
        else:
            for operand in node.all_input_nodes:
                self._freeze_all(operand, node)
            self._freeze_all(node, node)

    def _broadcast(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        out = node.meta["val"].shape
        for operand in operands:
            shape = operand.meta["val"].shape
            for back in range(1, len(shape) + 1):
                axis = (operand, len(shape) - back)
                if back > len(out):
                    self._freeze(axis, node, f"{name_of(node)} has a fixed size")
                elif _size(shape[-back]) == _size(out[-back]):
                    self._same(axis, (node, len(out) - back))
                else:  # one column for all, which must stay one
                    self._freeze(axis, node, f"{name_of(node)} has a fixed size")

    def _like(self, node: fx.Node) -> None:
        self._broadcast(node, [_operand(node)])

    def _linear(self, node: fx.Node) -> None:
        x, weight, *bias = [n for n in (*node.args, node.kwargs.get("bias")) if isinstance(n, fx.Node)]
        last = node.meta["val"].ndim - 1
        for dim in range(last):
            self._same((x, dim), (node, dim))
        self._same((x, last), (weight, 1))
        self._same((node, last), (weight, 0))
        for b in bias:
            self._same((b, 0), (weight, 0))

    def _matmul(self, node: fx.Node) -> None:
        a, b = (n for n in node.args[:2] if isinstance(n, fx.Node))
        rank_a, rank_b, rank = a.meta["val"].ndim, b.meta["val"].ndim, node.meta["val"].ndim
        self._same((a, rank_a - 1), (b, max(rank_b - 2, 0)))
        if rank_a > 1:
            self._same((a, rank_a - 2), (node, rank - (2 if rank_b > 1 else 1)))
        if rank_b > 1:
            self._same((b, rank_b - 1), (node, rank - 1))
        for operand, rank_of in ((a, rank_a), (b, rank_b)):
            for back in range(3, rank_of + 1):
                if _size(operand.meta["val"].shape[-back]) == _size(node.meta["val"].shape[-back]):
                    self._same((operand, rank_of - back), (node, rank - back))

    def _addmm(self, node: fx.Node) -> None:
        bias, x, weight = (n for n in node.args[:3] if isinstance(n, fx.Node))
        self._same((x, 0), (node, 0))
        self._same((x, 1), (weight, 0))
        self._same((weight, 1), (node, 1))
        self._broadcast(node, [bias])

    def _einsum(self, node: fx.Node) -> None:
        equation, *operands = node.args
        operands = list(operands[0]) if isinstance(operands[0], tuple | list) else operands
        left, _, right = str(equation).replace(" ", "").partition("->")
        if not right or "." in left:
            return self._opaque(node)
        letters: dict[str, Axis] = {}
        for term, operand in zip((*left.split(","), right), (*operands, node), strict=True):
            for dim, letter in enumerate(term):
                self._same(letters.setdefault(letter, (operand, dim)), (operand, dim))

    def _opaque(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            self._freeze_all(operand, node)
        self._freeze_all(node, node)

    def _cat(self, node: fx.Node) -> None:
        parts = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        rank = node.meta["val"].ndim
        dim = _given_dim(node, 0) % rank
        for part in parts:
            for other in range(rank):
                if other != dim:
                    self._same((part, other), (node, other))
        self._relations.append(_Relation((node, dim), tuple((part, dim) for part in parts), product=False))

    def _hstack(self, node: fx.Node) -> None:
        parts = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        self._relations.append(_Relation((node, 1), tuple((part, 1) for part in parts), product=False))

    def _stack(self, node: fx.Node) -> None:
        rank = node.meta["val"].ndim
        dim = _given_dim(node, 0) % rank
        for part in (n for n in node.args[0] if isinstance(n, fx.Node)):  # type: ignore[union-attr]
            for other in range(rank - 1):
                self._same((part, other), (node, other + (other >= dim)))
        self._freeze((node, dim), node, "stack joins a fixed number")

    def _permute(self, node: fx.Node) -> None:
        x, rank, name = _operand(node), node.meta["val"].ndim, name_of(node)
        if name == "permute":
            given = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            order = [int(dim) % rank for dim in given]  # type: ignore[arg-type]
        else:
            given = node.args[1:3] if name in ("transpose", "swapaxes") else (-2, -1)
            a, b = (int(dim) % rank for dim in given)  # type: ignore[arg-type]
            order = list(range(rank))
            order[a], order[b] = order[b], order[a]
        for dim, source in enumerate(order):
            self._same((x, source), (node, dim))

    def _getattr(self, node: fx.Node) -> None:
        self._permute(node) if node.args[1] in ("T", "mT") else self._opaque(node)

    def _unsqueeze(self, node: fx.Node) -> None:
        x, rank = _operand(node), node.meta["val"].ndim
        at = _given_dim(node, 0) % rank
        for dim in range(rank - 1):
            self._same((x, dim), (node, dim + (dim >= at)))

    def _squeeze(self, node: fx.Node) -> None:
        x = _operand(node)
        rank = x.meta["val"].ndim
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(given, int) or node.meta["val"].ndim == rank:
            return self._opaque(node)
        self._freeze((x, given % rank), node, "squeeze drops one column")
        for dim in range(rank):
            if dim != given % rank:
                self._same((x, dim), (node, dim - (dim > given % rank)))

    def _reduce(self, node: fx.Node) -> None:
        x, value = _operand(node), node.meta["val"]
        rank = x.meta["val"].ndim
        position = 2 if name_of(node) in ("norm", "vector_norm") else 1
        given = node.kwargs.get("dim", node.args[position] if len(node.args) > position else None)
        if not isinstance(value, torch.Tensor) or (given is not None and not isinstance(given, int | tuple | list)):
            return self._opaque(node)
        listed: Any = [given] if isinstance(given, int) else list(range(rank)) if given is None else given
        reduced = {dim % rank for dim in listed}
        kept = value.ndim == rank
        target = 0
        for dim in range(rank):
            if dim not in reduced:
                self._same((x, dim), (node, target))
            target += dim not in reduced or kept
        return None

    def _view(self, node: fx.Node) -> None:
        x = _operand(node)
        for one in (x, node):
            for dim, size in enumerate(one.meta["val"].shape):
                if _size(size) == 1:
                    self._freeze((one, dim), node, f"{name_of(node)} lays out one column")
        for before, after in _groups(x.meta["val"].shape, node.meta["val"].shape):
            if len(before) == len(after) == 1:
                self._same((x, before[0]), (node, after[0]))
            elif len(after) == 1:
                self._relations.append(_Relation((node, after[0]), tuple((x, dim) for dim in before), product=True))
            elif len(before) == 1:
                self._relations.append(_Relation((x, before[0]), tuple((node, dim) for dim in after), product=True))
            else:
                for axis in (*((x, dim) for dim in before), *((node, dim) for dim in after)):
                    self._freeze(axis, node, f"{name_of(node)} lays out several dimensions anew")

    def _expand(self, node: fx.Node) -> None:
        self._broadcast(node, [_operand(node)])

    def _getitem(self, node: fx.Node) -> None:
        x = _operand(node)
        value, index = x.meta.get("val"), node.args[1]
        if isinstance(value, tuple | list):
            if isinstance(index, int) and isinstance(node.meta.get("val"), torch.Tensor):
                for dim in range(node.meta["val"].ndim):
                    self._same((x, index % len(value), dim), (node, dim))
            return
        entries = list(index) if isinstance(index, tuple) else [index]
        if not isinstance(value, torch.Tensor) or any(isinstance(e, fx.Node) for e in entries):
            return self._opaque(node)
        if Ellipsis in entries:
            at = entries.index(Ellipsis)
            missing = value.ndim - sum(e is not None for e in entries) + 1
            entries[at : at + 1] = [slice(None)] * missing
        entries += [slice(None)] * (value.ndim - sum(e is not None for e in entries))
        source = target = 0
        for entry in entries:
            if entry is None:
                target += 1
                continue
            if entry == slice(None):
                self._same((x, source), (node, target))
            else:
                self._freeze((x, source), node, "a slice of fixed columns is read")
                if isinstance(entry, slice):
                    self._freeze((node, target), node, "a slice of fixed columns is read")
            target += isinstance(entry, slice)
            source += 1

    def _layer_norm(self, node: fx.Node) -> None:
        x = _operand(node)
        self._broadcast(node, [x])
        for parameter in (n for n in (*node.args[1:], *node.kwargs.values()) if isinstance(n, fx.Node)):
            self._broadcast(node, [parameter])

    def _batch_norm(self, node: fx.Node) -> None:
        x = _operand(node)
        self._broadcast(node, [x])
        for parameter in (n for n in (*node.args[1:], *node.kwargs.values()) if isinstance(n, fx.Node)):
            if isinstance(parameter.meta.get("val"), torch.Tensor) and parameter.meta["val"].ndim:
                self._same((parameter, 0), (x, 1))

    def _conv1d(self, node: fx.Node) -> None:
        x, weight, *bias = [n for n in (*node.args, node.kwargs.get("bias")) if isinstance(n, fx.Node)]
        if weight.meta["val"].shape[2] != 1 or x.meta["val"].shape[1] != weight.meta["val"].shape[1]:
            return self._opaque(node)
        self._same((x, 0), (node, 0))
        self._same((x, 1), (weight, 1))
        self._same((x, 2), (node, 2))
        for axis in ((node, 1), *((b, 0) for b in bias)):
            self._same(axis, (weight, 0))

    def _attention(self, node: fx.Node) -> None:
        query = _operand(node)
        for operand in node.all_input_nodes:
            value = operand.meta["val"]
            fixed = range(2, value.ndim) if operand in node.args[:3] else range(value.ndim)
            for dim in fixed:
                self._freeze((operand, dim), node, "attention has a fixed width")
        for dim in range(3):
            self._same((query, dim), (node, 0, dim))
        for other in node.args[1:3]:
            self._same((other, 0), (query, 0))


def _given_dim(node: fx.Node, default: int) -> int:
    return int(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else default))  # type: ignore[arg-type]


def _operand(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else node.kwargs.get("input")
    assert isinstance(first, fx.Node)
    return first


def _axes(node: Any) -> Iterator[Axis]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, torch.Tensor):
        yield from ((node, dim) for dim in range(value.ndim))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            if isinstance(item, torch.Tensor):
                yield from ((node, index, dim) for dim in range(item.ndim))


def _size(size: Any) -> Any:
    return torch_internals.canonical_expression(size)


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of a view's input make which of its output, dimensions of size 1 left out."""
    left = [(dim, _size(size)) for dim, size in enumerate(before) if _size(size) != 1]
    right = [(dim, _size(size)) for dim, size in enumerate(after) if _size(size) != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        dims_in, dims_out = [left[i][0]], [right[j][0]]
        product_in, product_out = left[i][1], right[j][1]
        i, j = i + 1, j + 1
        while product_in != product_out and (i < len(left) or j < len(right)):
            more_in = j >= len(right) or (i < len(left) and not _larger(product_in, product_out))
            if more_in and i < len(left):
                product_in, i = product_in * left[i][1], i + 1
                dims_in.append(left[i - 1][0])
            elif j < len(right):
                product_out, j = product_out * right[j][1], j + 1
                dims_out.append(right[j - 1][0])
        groups.append((dims_in, dims_out))
    return groups


def _larger(a: Any, b: Any) -> bool:
    """Tell whether a product is a multiple of another one."""
    ratio = a / b
    return bool(ratio > 1) if isinstance(ratio, float) or ratio.is_number else not (b / a).free_symbols


_ELEMENTWISE = {
    *("add", "iadd", "sub", "isub", "rsub", "mul", "imul", "multiply", "truediv", "itruediv", "div", "pow", "neg"),
    *("add_", "mul_", "sub_", "div_", "maximum", "minimum", "where", "abs", "square", "sqrt", "rsqrt", "exp", "log"),
    *("relu", "relu_", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "leaky_relu", "softplus", "mish"),
    *("hardtanh", "hardsigmoid", "hardswish", "softmax", "log_softmax", "dropout", "clamp", "normalize", "lerp"),
    *("clone", "contiguous", "to", "float", "half", "bfloat16", "double", "detach", "type_as", "logsigmoid"),
    *("zeros_like", "ones_like", "scale_gradient", "reciprocal", "log1p", "sign", "prelu", "alpha_dropout"),
}

_RULES: dict[str, Callable[[Resizing, fx.Node], Any]] = {
    "linear": Resizing._linear,
    **dict.fromkeys(("matmul", "bmm", "mm"), Resizing._matmul),
    "addmm": Resizing._addmm,
    "einsum": Resizing._einsum,
    **dict.fromkeys(JOINS - {"stack", "hstack"}, Resizing._cat),
    "hstack": Resizing._hstack,
    "stack": Resizing._stack,
    **dict.fromkeys(("transpose", "swapaxes", "permute", "t"), Resizing._permute),
    "getattr": Resizing._getattr,
    "unsqueeze": Resizing._unsqueeze,
    "squeeze": Resizing._squeeze,
    **dict.fromkeys(("sum", "mean", "norm", "vector_norm", "prod", "logsumexp", "std", "var"), Resizing._reduce),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), Resizing._view),
    **dict.fromkeys(("expand", "expand_as"), Resizing._expand),
    "getitem": Resizing._getitem,
    "layer_norm": Resizing._layer_norm,
    "batch_norm": Resizing._batch_norm,
    "conv1d": Resizing._conv1d,
    "multi_head_attention_forward": Resizing._attention,
}


def rewrite_sizes(node: fx.Node, resizing: Resizing) -> None:
    """Write a node's new sizes into the numbers that it states, such as those of a view.

    Raises:
        CannotResize: a size is stated where this cannot tell.
    """
    name, shape = name_of(node), resizing.shape(node)
    if name in ("view", "reshape", "expand"):
        listed = isinstance(node.args[1], tuple | list)
        stated: Any = list(node.args[1] if listed else node.args[1:])  # type: ignore[arg-type]
        stated = [new if isinstance(old, int) and old > 0 and isinstance(new, int) else old
                  for old, new in zip(stated, shape[-len(stated) :], strict=True)]  # fmt: skip
        node.args = (node.args[0], stated) if listed else (node.args[0], *stated)
    elif name == "unflatten":
        dim = int(node.args[1]) % (node.meta["val"].ndim - len(node.args[2]) + 1)  # type: ignore[arg-type]
        node.args = (*node.args[:2], tuple(shape[dim : dim + len(node.args[2])]))  # type: ignore[arg-type]
    elif name == "layer_norm":
        node.args = (node.args[0], tuple(shape[-len(node.args[1]) :]), *node.args[2:])  # type: ignore[arg-type]
