"""Dot products of all pairs of vectors of which a model reads one triangle, and what proves that it does.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dmt_compile import torch_internals
from dmt_compile.ir.pairs import OnMeta, selected_numbers
from dmt_compile.ir.pass_base import JOINS, VIEWS, PassContext, mutates, name_of, nodes_in, origin_of, views_of
from dmt_compile.kernels.dot_interaction.reference import pair_count, pair_indices

_SELECT = {"getitem", "index_select", "gather", "view", "flatten", "reshape", "index", "take"}
_SAME = (VIEWS | JOINS) - {"dropout"}  # called twice, they give the same
_SAMPLES = 3  # of a batch of any size: what is selected of each must be its own
_MOST_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Triangle:
    """Products of all pairs, one triangle of which is read.

    Args:
        vectors: (B, F, D).
        selected: (B, P), in the order of ``torch.tril_indices`` or, with ``upper``, ``torch.triu_indices``.
        diagonal: each vector with itself, too.
        upper: see ``selected``.
        constants: buffers whose numbers say what is selected.
    """

    vectors: fx.Node
    selected: fx.Node
    diagonal: bool
    upper: bool
    constants: tuple[fx.Node, ...]


class NoTriangle(Exception):
    """Why products are not known to be read as one triangle."""


def own_product(node: fx.Node) -> fx.Node | None:
    """Return the vectors (B, F, D) of which a node is the products (B, F, F) of all pairs, or ``None``."""
    value = node.meta.get("val")
    factors = nodes_in((node.args, node.kwargs))
    if not isinstance(value, torch.Tensor) or value.ndim != 3 or len(factors) != 2:
        return None
    left, right = factors
    if any(not isinstance(n.meta.get("val"), torch.Tensor) or n.meta["val"].ndim != 3 for n in factors):
        return None
    if name_of(node) == "einsum":
        return left if _alike(left, right) and _is_own(node.args[0]) else None
    if name_of(node) in {"bmm", "matmul"} and (_transposes(right, left) or _transposes(left, right)):
        return left
    return None


def find_triangle(gm: fx.GraphModule, ctx: PassContext, product: fx.Node, vectors: fx.Node) -> Triangle:
    """Return how products are read.

    Raises:
        NoTriangle: in another way, or in one that is not proven.
    """
    _, count, width = vectors.meta["val"].shape
    if not isinstance(count, int) or not isinstance(width, int):
        raise NoTriangle("the number or the width of its vectors is not constant")
    diagonals = {pair_count(count, diagonal): diagonal for diagonal in (False, True)}
    selected = product
    while not (selected.meta["val"].ndim == 2 and selected.meta["val"].shape[1] in diagonals):
        selected = _next(selected, count)
    constants = _constants(ctx, product, selected)
    if is_written(vectors):
        raise NoTriangle("its vectors are written to in place")
    diagonal = diagonals[selected.meta["val"].shape[1]]
    upper = _is_upper(gm, ctx, product, selected, diagonal)
    return Triangle(vectors, selected, diagonal, upper, constants)


def is_written(node: fx.Node) -> bool:
    """Tell whether anything writes in place to a node, or to what it is a view of."""
    origin = origin_of(node, lambda n: name_of(n) in VIEWS)
    return any(mutates(user) for view in views_of(origin) for user in view.users)


def _next(node: fx.Node, count: int) -> fx.Node:
    """Return the one user of what is selected so far, which must select of it."""
    if len(node.users) != 1:
        raise NoTriangle(f"its products are read {len(node.users)} times")
    user = next(iter(node.users))
    if user.op == "output":
        raise NoTriangle("its products leave the graph")
    if name_of(user) == "masked_select":
        raise NoTriangle("masked_select gives as many elements as its mask says; use torch.tril_indices instead")
    value = user.meta.get("val")
    if name_of(user) not in _SELECT or not isinstance(value, torch.Tensor):
        all_read = node.meta["val"].ndim == 2 and node.meta["val"].shape[1] == count**2
        raise NoTriangle("both its triangles are read" if all_read else f"{name_of(user)} selects no triangle of it")
    return user


def _constants(ctx: PassContext, product: fx.Node, selected: fx.Node) -> tuple[fx.Node, ...]:
    """Return the buffers that say what is selected."""
    found: list[fx.Node] = []
    seen, stack = {product}, [selected]
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        seen.add(node)
        if is_written(node) or mutates(node):
            raise NoTriangle("its indices are written to in place")
        if node.op in ("placeholder", "get_attr"):
            buffer = node.op == "get_attr" or node.name in ctx.parameters
            if not buffer or isinstance(ctx.parameters.get(node.name), nn.Parameter):
                raise NoTriangle("its indices depend on the batch or are trained")
            found.append(node)
        stack.extend(node.all_input_nodes)
    return tuple(found)


def _is_upper(gm: fx.GraphModule, ctx: PassContext, product: fx.Node, selected: fx.Node, diagonal: bool) -> bool:
    """Return which triangle is selected, by selecting from numbers in place of products."""
    batch = torch_internals.canonical_expression(product.meta["val"].shape[0])
    samples, count = batch if isinstance(batch, int) else _SAMPLES, int(product.meta["val"].shape[1])
    if samples * count**2 > _MOST_NUMBERS:
        raise NoTriangle(f"there are {samples * count**2} products, too many to see what is selected")
    try:
        found_BP = selected_numbers(gm, ctx, product, selected, samples)
    except OnMeta:
        raise NoTriangle("its indices are in a buffer without numbers") from None
    except Exception as error:  # whatever an operator says of such numbers
        raise NoTriangle(f"its indices are not known: {type(error).__name__}") from error
    first_B1 = torch.arange(samples)[:, None] * count**2
    for upper in (False, True):
        rows_P, columns_P = pair_indices(count, diagonal, upper)
        for number_P in (rows_P * count + columns_P, columns_P * count + rows_P):  # products are symmetric
            if torch.equal(found_BP, first_B1 + number_P):
                return upper
    raise NoTriangle("what it selects is no triangle in the order of torch.tril_indices or torch.triu_indices")


def _is_own(equation: Any) -> bool:
    """Tell whether an equation gives products of all pairs of the vectors of its two operands."""
    if not isinstance(equation, str) or "->" not in equation:
        return False
    operands, out = equation.replace(" ", "").split("->")
    left, _, right = operands.partition(",")
    if not (len(left) == len(right) == len(out) == len(set(left)) == len(set(right)) == 3):
        return False
    (sample, row, width), (other_sample, column, other_width) = tuple(left), tuple(right)
    return sample == other_sample and width == other_width and out in (sample + row + column, sample + column + row)


def _transposes(node: fx.Node, vectors: fx.Node) -> bool:
    """Tell whether a node is (B, D, F) of (B, F, D)."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _alike(source, vectors):
        return False
    rest: Any = node.args[1:]
    if name_of(node) == "getattr":
        return bool(rest == ("mT",))
    if node.kwargs:
        return False
    if name_of(node) == "permute":
        dims = rest[0] if len(rest) == 1 else rest
        return [int(dim) % 3 for dim in dims] == [0, 2, 1]
    return name_of(node) in {"transpose", "swapaxes", "swapdims"} and {int(dim) % 3 for dim in rest} == {1, 2}


def _alike(left: Any, right: Any) -> bool:
    """Tell whether two arguments have the same value: they are the same node, or the same views of the same one."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            return len(left) == len(right) and _all_alike(zip(left, right, strict=True))
        return type(left) is type(right) and bool(left == right)
    if left is right:
        return True
    same = left.op == right.op and left.target == right.target and name_of(left) in _SAME
    return same and left.kwargs == right.kwargs and not is_written(left) and _alike(left.args, right.args)


def _all_alike(both: Iterable[tuple[Any, Any]]) -> bool:
    return all(_alike(left, right) for left, right in both)
