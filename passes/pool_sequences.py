"""Pool sequences where they are looked up: a sum over positions becomes a lookup that sums its bag.

``nn.Embedding`` on a (B, L) matrix of ids gives one row a position; where the model goes on with nothing but their sum,
mean or maximum, or with their sum weighted by a mask, L rows a sample need not travel. Matched on a lookup of one id a
bag, laid out as (B, L, D), with one user:

    e.sum(1), e.mean(1), e.max(1)[0]           mode "sum", "sum" divided by L, "max"
    (e * m).sum(1), m of (B, L, 1)             mode "sum", with the weights m
    torch.bmm(m, e), m of (B, 1, L)            mode "sum", with the weights m
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, ancestors, calls, erase_unused, name_of
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.torch_internals import canonical_expression

_PRODUCTS = ("mul", "matmul", "bmm")


@dataclass(frozen=True)
class PoolSequences(Pass):
    """Fuse pooling into the lookups of sequences."""

    name: ClassVar[str] = "pool_sequences"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        matched = 0
        skipped: list[tuple[str, str]] = []
        for lookup in calls(gm, ops.lookup):
            sequence = next(iter(lookup.users), None)
            if not self._is_sequence(lookup, sequence):
                continue
            assert sequence is not None
            reason = self._pool(gm, ctx, lookup, sequence)
            matched += reason is None
            skipped += [] if reason is None else [(lookup.name, reason)]
        return PassReport(bool(matched), matched, tuple(skipped))

    def _is_sequence(self, lookup: fx.Node, sequence: fx.Node | None) -> bool:
        how, ids = lookup.args[4], lookup.args[1]
        assert isinstance(how, Pooling)
        return (
            how.mode == "none"
            and sequence is not None
            and len(lookup.users) == 1
            and sequence.target is torch.reshape
            and sequence.meta["val"].ndim == 3
            and canonical_expression(sequence.meta["val"].shape[1]) != 1
            and isinstance(ids, fx.Node)
            and ids.target is torch.reshape
        )

    def _pool(self, gm: fx.GraphModule, ctx: PassContext, lookup: fx.Node, sequence: fx.Node) -> str | None:
        """Rewrite one sequence, or say why it stays as it is."""
        users = [user for user in sequence.users if name_of(user) != "expand_as"]  # it asks for the shape alone
        if len(users) != 1:
            return f"its rows have {len(users)} users, pooled rows would serve one"
        user = users[0]
        weights: fx.Node | None = None
        if name_of(user) in _PRODUCTS:
            weights, reason = self._weights(user, sequence)
            if reason is not None:
                return reason
        how = lookup.args[4]
        assert isinstance(how, Pooling)
        pooling, keep, mode = user, False, "sum"
        if weights is None or name_of(user) == "mul":
            if weights is not None:
                if len(user.users) != 1:
                    return "its weighted rows have several users"
                pooling = next(iter(user.users))
            mode, keep = _reduction(pooling)
            if mode is None or (weights is not None and mode != "sum"):
                return f"{name_of(pooling)} is no sum, mean or maximum over positions that a lookup can take over"
        else:
            keep = True  # bmm gives (B, 1, D)
        if how.scale_grad_by_freq or (mode == "max" and how.sparse):
            return "a pooled lookup has no such gradient"
        self._rewrite(gm, ctx, lookup, sequence, pooling, weights, mode, keep)
        return None

    def _weights(self, product: fx.Node, sequence: fx.Node) -> tuple[fx.Node | None, str | None]:
        """Return the factor of each position in a product with a sequence, or why there is none."""
        others = [n for n in product.args[:2] if n is not sequence]
        factor = others[0] if len(others) == 1 else None
        if not isinstance(factor, fx.Node) or not isinstance(factor.meta["val"], torch.Tensor):
            return None, "it is not multiplied with one factor a position"
        if name_of(product) == "mul":
            factor = _unexpanded(factor)
        value, rows = factor.meta["val"], sequence.meta["val"]
        positions = tuple(rows.shape[:2])
        expected = (*positions, 1) if name_of(product) == "mul" else (positions[0], 1, positions[1])
        if (
            value.ndim != 3
            or not _equal(value.shape, expected)
            or (name_of(product) != "mul" and product.args[1] is not sequence)
        ):
            return None, "it is not multiplied with one factor a position"
        if torch.promote_types(value.dtype, rows.dtype) != rows.dtype:
            return None, "its factors are of a wider type"
        if any(n.target is ops.lookup for n in ancestors([factor])):
            return None, "its factors depend on a lookup"
        return factor, None

    def _rewrite(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        lookup: fx.Node,
        sequence: fx.Node,
        pooling: fx.Node,
        weights: fx.Node | None,
        mode: str,
        keep: bool,
    ) -> None:
        table, flat_ids, _, _, how = lookup.args
        assert isinstance(how, Pooling)
        assert isinstance(flat_ids, fx.Node)
        ids_BL = flat_ids.args[0]
        with gm.graph.inserting_before(pooling):
            offsets = ctx.call(gm, ops.even_offsets, ids_BL, like=lookup)
            factors = None
            if weights is not None:
                factors = ctx.call(gm, torch.reshape, weights, (-1,), like=lookup)
                if weights.meta["val"].dtype != sequence.meta["val"].dtype:
                    factors = ctx.call(gm, torch.Tensor.to, factors, sequence.meta["val"].dtype, like=lookup)
            pooled_how = how._replace(mode="sum" if mode == "mean" else mode)
            out = ctx.call(gm, ops.lookup, table, flat_ids, offsets, factors, pooled_how, like=lookup)
            if mode == "mean":
                length = sequence.args[1][1]  # type: ignore[index]
                out = ctx.call(gm, torch.div, out, length, like=pooling)
            if keep:
                out = ctx.call(gm, torch.unsqueeze, out, 1, like=pooling)
        if mode == "max":
            for item in list(pooling.users):  # the values
                item.replace_all_uses_with(out)
                gm.graph.erase_node(item)
        pooling.replace_all_uses_with(out)
        erase_unused(gm, pooling)


def _reduction(node: fx.Node) -> tuple[Any, bool]:
    """Return the mode of a reduction over positions and whether it keeps the dimension; ``None`` for another node."""
    name = name_of(node)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name not in ("sum", "mean", "max") or dims not in (1, -2, [1], (1,), [-2], (-2,)) or "dtype" in node.kwargs:
        return None, False
    keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    if name == "max":
        values_only = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        return ("max" if values_only else None), keep
    return name, keep


def _unexpanded(node: fx.Node) -> fx.Node:
    """Return what a factor was before it was converted, and repeated along the embedding's width."""
    source = node
    while name_of(source) in ("float", "to", "type", "type_as", "expand", "expand_as", "repeat_interleave"):
        source = source.all_input_nodes[0]
        value = source.meta["val"]
        if value.ndim == 3 and value.shape[2] == 1:
            return source
    return node


def _equal(shape: Any, expected: Any) -> bool:
    return len(shape) == len(expected) and all(
        canonical_expression(a) == canonical_expression(b) for a, b in zip(shape, expected, strict=True)
    )
