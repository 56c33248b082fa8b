"""Find how the features meet: pairwise dot products over stacked feature vectors.

Matched: ``bmm`` or ``matmul`` of a (B, F, D) tensor with its own transpose, where the tensor is a view of one ``cat``
over lookups and at most one dense vector. Nothing is rewritten: SPTT needs the lookups alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import Interaction
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Stage

_PRODUCTS = (torch.bmm, torch.matmul, operator.matmul)
_VIEWS = ("view", "reshape", "contiguous")


@dataclass(frozen=True)
class FindInteraction(Pass):
    """Name the dot interaction and the features it joins."""

    name: ClassVar[str] = "find_interaction"
    needs: ClassVar[Stage] = Stage.FLAT
    gives: ClassVar[Stage] = Stage.FLAT

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Fill ``ctx.embedding_graph``; the graph stays as it is."""
        nearest: tuple[tuple[str, str], ...] = ()
        features = {feature.node: feature.name for feature in ctx.embedding_graph.features}
        products = [n for n in gm.graph.nodes if (n.op, n.target) == ("call_method", "bmm")] + calls(gm, *_PRODUCTS)
        for node in products:
            stacked = node.args[0]
            if not self._is_transpose(node.args[1], stacked):
                nearest = ((node.name, "its operands are not one tensor and its transpose"),)
                continue
            parts = self._parts(stacked)
            if parts is None:
                nearest = ((node.name, "its operand is not a view of one concatenation"),)
                continue
            names = tuple(features[part.name] for part in parts if part.name in features)
            dense = [part.name for part in parts if part.name not in features]
            if not names or len(dense) > 1:
                nearest = ((node.name, f"it joins {len(names)} lookups and {len(dense)} other tensors"),)
                continue
            ctx.embedding_graph.set_interaction(Interaction("dot", node.name, names, dense[0] if dense else None))
            return PassReport(changed=False, matched=1)
        if not nearest and calls(gm, ops.lookup):
            nearest = (("graph", "no product of stacked feature vectors with their transpose"),)
        return PassReport(changed=False, skipped=nearest)

    def _is_transpose(self, node: Any, stacked: Any) -> bool:
        if not isinstance(node, fx.Node) or not node.args or node.args[0] is not stacked:
            return False
        swapped = tuple(sorted(dim % 3 for dim in node.args[1:] if isinstance(dim, int))) == (1, 2)
        return (node.target in ("transpose", torch.transpose) and swapped) or (
            node.target in ("permute", torch.permute) and tuple(node.args[1:]) in ((0, 2, 1), ((0, 2, 1),))
        )

    def _behind_views(self, node: fx.Node, views: tuple[str, ...]) -> fx.Node:
        while node.op == "call_method" and node.target in views:
            node = cast(fx.Node, node.args[0])
        return node

    def _parts(self, node: fx.Node) -> list[fx.Node] | None:
        """Return what the stacked tensor was concatenated or stacked from."""
        node = self._behind_views(node, _VIEWS)
        if node.target not in (torch.cat, torch.stack, torch.concat):
            return None
        parts: list[fx.Node] = []
        for part in node.args[0]:  # type: ignore[union-attr]
            parts.append(self._behind_views(part, (*_VIEWS, "unsqueeze")))  # type: ignore[arg-type]
        return parts
