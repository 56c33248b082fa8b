"""Compute what a cross layer does after its matrix product, x0 * (W x + b) + x, in one operator.

Eager code and a dense compiler that cuts at the product read and write the tensors of that tail two or three times; the
kernel of ``dmt::cross_tail`` does once, in the backward pass too. Inductor fuses the tail with what surrounds it, so
beside it the graph stays as it is unless the kernel is asked for.

A tail is a product, element by element, of what the network was given (x0) and what a matrix product made of x, plus x.
The bias may be added before the product (TorchRec, deepctr), after it (torch-rechub), or by the layer (``nn.Linear``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir.pass_base import (
    Pass,
    PassContext,
    PassReport,
    ancestors,
    dependents,
    erase_unused,
    mutates,
    name_of,
)
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.choice import REFERENCE, against, fails
from dmt_compile.kernels.cross_layer.op import supports, try_out

_PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "tensordot"}
_MULTIPLY = {"mul", "multiply"}
_ADD = {"add", "iadd", "add_"}


@dataclass(frozen=True)
class _Tail:
    """The nodes of one tail; ``end`` gives its value."""

    x0: fx.Node
    wx: fx.Node
    bias: fx.Node | None
    x: fx.Node
    bias_last: bool
    end: fx.Node


@dataclass(frozen=True)
class FuseCross(Pass):
    """Replace the multiplications and additions of cross layers by ``dmt::cross_tail``."""

    kernels: str = "auto"

    name: ClassVar[str] = "fuse_cross"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        crosses = [i for i in ctx.embedding_graph.interactions if i.kind == "cross"]
        if self.kernels == REFERENCE or not crosses:
            return PassReport(changed=False)
        if self.kernels == "auto" and ctx.options.dense_compiler == "inductor":
            return PassReport(changed=False, skipped=((crosses[0].node, "Inductor fuses it with what surrounds it"),))
        skipped: list[tuple[str, str]] = []
        matched = 0
        for node in list(gm.graph.nodes):
            found = _match(node, self.kernels)
            if isinstance(found, _Tail):
                self._replace(gm, ctx, found)
                matched += 1
            elif found is not None:
                skipped.append((node.name, found))
        if not matched and not skipped:
            skipped.append(_nearest(gm, crosses[0].node))
        return PassReport(bool(matched), matched, tuple(skipped))

    def _replace(self, gm: fx.GraphModule, ctx: PassContext, tail: _Tail) -> None:
        arguments = tail.x0, tail.wx, tail.bias, tail.x, tail.bias_last, "triton"
        with gm.graph.inserting_before(tail.end):
            fused = ctx.call(gm, torch.ops.dmt.cross_tail.default, *arguments, like=tail.end)
        tail.end.replace_all_uses_with(fused)
        erase_unused(gm, tail.end)


def _match(node: fx.Node, kernels: str) -> _Tail | str | None:
    """Return the tail whose product a node is; why it is none where it comes near, ``None`` where it does not."""
    factors = _operands(node, _MULTIPLY)
    added = next((user for user in node.users if name_of(user) in _ADD), None)
    terms = () if added is None else _operands(added, _ADD)
    if added is None or not factors or not terms:
        return None
    end, bias = added, None
    x = terms[terms[0] is node]
    after = next(iter(added.users), None)
    if _is_bias(x, node) and after is not None and (rest := _operands(after, _ADD)):
        end, bias, x = after, x, rest[rest[0] is added]
    for wx, x0 in (factors, factors[::-1]):
        if _goes_through_product(wx, x):
            return _tail(node, x0, wx, bias, x, added, end, kernels)
    return None


def _tail(
    node: fx.Node, x0: fx.Node, wx: fx.Node, bias: fx.Node | None, x: fx.Node, added: fx.Node, end: fx.Node,
    kernels: str,
) -> _Tail | str:  # fmt: skip
    shapes = [_shape(n) for n in (x0, wx, x)]
    if shapes != [_shape(end)] * 3:
        return f"x0, W x and x differ in shape: {', '.join(map(str, shapes))}"
    for inner in {node, added} - {end}:
        if len(inner.users) > 1:
            return f"{inner.name} has other users"
    for part in (added, end):
        if mutates(part):
            return f"{part.name} writes in place"
    bias_last = bias is not None
    if not bias_last and len(wx.users) == 1 and not mutates(wx):
        terms = _operands(wx, _ADD)
        for term, other in (terms, terms[::-1]) if terms else ():
            if _is_bias(term, wx) and _shape(other) == shapes[0]:
                wx, bias = other, term
                break
    for part in (x0, wx, x, *(() if bias is None else (bias,))):
        value = part.meta["val"]
        reason = against("triton", kernels, value.device) or supports(value.dtype, value.device)
        if reason is not None:
            return reason
    width, out = shapes[0][-1], end.meta["val"]
    reason = fails("triton", lambda: try_out(int(width), bias is not None, bias_last, out.dtype, out.device))
    if reason is not None:
        return reason
    return _Tail(x0, wx, bias, x, bias_last, end)


def _operands(node: fx.Node, names: set[str]) -> tuple[fx.Node, ...]:
    """Return the two tensors that a node of one of ``names`` takes; nothing where it takes anything else."""
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)]
    two = name_of(node) in names and len(node.args) == len(nodes) == 2 and not node.kwargs
    return tuple(nodes) if two else ()


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(torch_internals.canonical_expression(size) for size in node.meta["val"].shape)


def _is_bias(node: fx.Node, of: fx.Node) -> bool:
    """Tell whether a tensor has the trailing dimensions of another, and not all."""
    shape = _shape(node)
    return 0 < len(shape) < len(_shape(of)) and _shape(of)[-len(shape) :] == shape


def _goes_through_product(wx: fx.Node, x: fx.Node) -> bool:
    """Tell whether a matrix product lies between ``x`` and ``wx``."""
    return any(name_of(n) in _PRODUCTS and n is not x for n in ancestors([wx]) & dependents([x]))


def _nearest(gm: fx.GraphModule, name: str) -> tuple[str, str]:
    node = next((n for n in gm.graph.nodes if n.name == name), None)
    if node is None:
        return "graph", "no product of x0 and W x in it; Tower Modules have their own graphs"
    users = ", ".join(sorted({name_of(user) for user in node.users}))
    return name, f"a {name_of(node)} that {users} reads, not a product by elements that is added to x"
