"""Dot products of all pairs of joined vectors: how a model selects them, and how they are made of other vectors.

Shape suffixes: B samples, V vectors, P pairs.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir.pass_base import PassContext, ancestors, dependents, name_of

_PRODUCTS = {"bmm", "matmul", "einsum"}
_TRANSPOSES = {"transpose", "permute", "swapaxes", "getattr"}
_SELECT = {"getitem", "masked_select", "index_select", "view", "flatten", "reshape", "index", "take"}


@dataclass(frozen=True)
class Pairs:
    """Products of all pairs of joined vectors.

    Args:
        product: (B, V, V).
        selected: (B, P), what is read of it.
        kind: ``"distinct"``, ``"with itself"`` for the squares too, or ``"all"`` for both orders of each.
    """

    product: fx.Node
    selected: fx.Node
    kind: str

    def count(self, vectors: int) -> int:
        """Return the number of pairs of so many vectors."""
        return len(_of_kind(self.kind, vectors))

    @property
    def inside(self) -> set[fx.Node]:
        """What lies between the joined vectors and the selected pairs."""
        behind = dependents([self.product, *(n for n in self.product.all_input_nodes if name_of(n) in _TRANSPOSES)])
        return (ancestors([self.selected]) & behind) - {self.selected}


def find_pairs(gm: fx.GraphModule, ctx: PassContext, operand: fx.Node) -> Pairs | None:
    """Return the dot products of all pairs of an operand's vectors, or ``None`` where it has none that are known.

    Each pair must be selected once, in any order: lists of indices, a buffer of them, a mask and a view are the same.
    """
    value = operand.meta["val"]
    if value.ndim != 3:
        return None
    vectors = int(value.shape[1])
    same = {operand, *(user for user in operand.users if name_of(user) in _TRANSPOSES)}
    for node in [user for one in same for user in one.users]:
        found = node.meta.get("val")
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        shape = tuple(found.shape[1:]) if isinstance(found, torch.Tensor) else ()
        if name_of(node) in _PRODUCTS and set(tensors) <= same and shape == (vectors, vectors):
            return _selected(gm, ctx, node, vectors)
    return None


def select_pairs(
    gm: fx.GraphModule, call: Callable[..., fx.Node], ctx: PassContext, pairs: Pairs, joined: fx.Node
) -> fx.Node:
    """Insert the same kind of pairs of other vectors (B, V, D), and return them, (B, P), the lower triangle by rows."""
    vectors = int(joined.meta["val"].shape[1])
    products = call(torch.bmm, joined, call(torch.transpose, joined, 1, 2))
    if pairs.kind == "all":
        return call(torch.flatten, products, 1)
    diagonal, device = -1 if pairs.kind == "distinct" else 0, products.meta["val"].device
    indices = gm.graph.call_function(torch.tril_indices, (vectors, vectors, diagonal), {"device": device})
    ctx.environment.record(indices, gm)
    rows, columns = (call(operator.getitem, indices, i) for i in range(2))
    return call(operator.getitem, products, (slice(None), rows, columns))


def _of_kind(kind: str, vectors: int) -> list[tuple[int, int]]:
    beyond = {"distinct": 0, "with itself": 1, "all": vectors}[kind]
    return [(i, j) for i in range(vectors) for j in range(min(i + beyond, vectors))]


def _selected(gm: fx.GraphModule, ctx: PassContext, product: fx.Node, vectors: int) -> Pairs | None:
    kinds = {len(_of_kind(kind, vectors)): kind for kind in ("all", "with itself", "distinct")}
    node, chain = product, []
    while len(node.users) == 1:
        node = next(iter(node.users))
        chain.append(node)
        value = node.meta.get("val")
        if name_of(node) not in _SELECT or not isinstance(value, torch.Tensor):
            return None
        if value.ndim == 2 and value.shape[1] in kinds:
            kind = kinds[int(value.shape[1])]
            return Pairs(product, node, kind) if _is_kind(gm, ctx, product, chain, kind, vectors) else None
    return None


def _is_kind(
    gm: fx.GraphModule, ctx: PassContext, product: fx.Node, chain: Sequence[fx.Node], kind: str, vectors: int
) -> bool:
    """Tell whether each pair of a kind is selected once, by selecting from numbers in place of products."""
    try:
        found = selected_numbers(gm, ctx, product, chain[-1], 1)
    except OnMeta:  # a model without numbers: as many pairs of indices as there are pairs
        return True
    except Exception:  # whatever an operator says of one sample on the CPU: it is no mere selection
        return False
    chosen = [divmod(int(number), vectors) for number in found.flatten()]
    one_order = kind != "all"  # products do not depend on the order of the two
    wanted = _of_kind(kind, vectors)
    return Counter(tuple(sorted(p)) if one_order else p for p in chosen) == Counter(
        tuple(sorted(p)) if one_order else p for p in wanted
    )


def selected_numbers(
    gm: fx.GraphModule, ctx: PassContext, product: fx.Node, selected: fx.Node, samples: int
) -> torch.Tensor:
    """Return what a node selects of a batch of so many samples whose products are numbered, from 0 on.

    Raises:
        OnMeta: it reads a buffer on the meta device.
        LookupError: it depends on the batch.
        Exception: whatever an operator says of these samples on the CPU: it is no mere selection.
    """
    vectors = int(product.meta["val"].shape[1])
    numbers = torch.arange(samples * vectors**2).view(samples, vectors, vectors)
    values: dict[fx.Node, Any] = {product: numbers}
    batch = torch_internals.canonical_expression(product.meta["val"].shape[0])

    def value(node: fx.Node) -> Any:
        if node not in values:
            values[node] = _value(gm, ctx, node, value, batch, samples)
        return values[node]

    found: torch.Tensor = value(selected)
    return found


class OnMeta(Exception):
    """A buffer has no numbers."""


def _value(
    gm: fx.GraphModule, ctx: PassContext, node: fx.Node, value: Callable[[fx.Node], Any], batch: Any, samples: int
) -> Any:
    """Return what a node of indices, or of a selection, is on the CPU for a batch of so many samples."""
    if node.op in ("placeholder", "get_attr"):
        tensor = ctx.parameters[node.name] if node.op == "placeholder" else operator.attrgetter(str(node.target))(gm)
        if tensor.is_meta:
            raise OnMeta
        return tensor.detach().cpu()
    size = node.meta.get("val")
    if isinstance(size, torch.SymInt):
        if torch_internals.canonical_expression(size) != batch:
            raise LookupError(node.name)
        return samples
    if isinstance(size, torch.Tensor) and math.prod(int(s) for s in size.shape if isinstance(s, int)) > 1 << 24:
        raise LookupError(node.name)
    cpu = torch.device("cpu")
    args = fx.node.map_aggregate(fx.map_arg(node.args, value), lambda a: cpu if isinstance(a, torch.device) else a)
    kwargs = {key: cpu if key == "device" else part for key, part in fx.map_arg(node.kwargs, value).items()}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
