"""Compute a dot interaction in one operator: the products of all pairs that are read, behind the dense vector.

    products = torch.bmm(vectors, vectors.transpose(1, 2))    (B, F, F); matmul, einsum and mT alike
    pairs = products[:, rows, columns]                        one triangle, also of products that were flattened
    torch.cat([dense, pairs], dim=1)

becomes one ``dmt::dot_interaction``. In Triton it never writes the (B, F, F). On a CPU it is PyTorch's own operators
still, of which the backward pass needs fewer: the gradients of the pairs are read into both triangles at once, so that
one product with the vectors takes the place of two and their sum, and no zeros are written to be added to. Outputs are
bitwise those before; gradients are other sums, as averages over several ranks are, and so one rank whose gradients are
the eager model's bit for bit (``dense_compiler="eager"``) goes without it.

Indices may be made in the graph or be buffers; what they select is found out by selecting from numbers, and a
``check_constant`` holds a buffer to its values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir.constant_ops import check_constant, digest_of
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, erase_unused, name_of
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.triangles import NoTriangle, Triangle, find_triangle, is_written, own_product
from dmt_compile.kernels.choice import REFERENCE, Choice, choose, fails
from dmt_compile.kernels.dot_interaction.op import allows_tf32, supports, try_out


@dataclass(frozen=True)
class FuseInteraction(Pass):
    """Replace products of all pairs and the selection of a triangle of them by one operator.

    Args:
        kernels: which may compute it; with ``"reference"`` the graph stays as it is.
    """

    kernels: str = "auto"

    name: ClassVar[str] = "fuse_interaction"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        if self.kernels == REFERENCE:
            return PassReport(changed=False)
        products = {node: vectors for node in gm.graph.nodes if (vectors := own_product(node)) is not None}
        skipped: list[tuple[str, str]] = []
        found: list[tuple[Triangle, Choice, bool]] = []
        for product, vectors in products.items():
            try:
                same_product = name_of(product) in {"bmm", "matmul"} and product.args[0] is vectors
                found.append((*self._find(gm, ctx, product, vectors), same_product))
            except NoTriangle as reason:
                skipped.append((product.name, str(reason)))
        checked: set[fx.Node] = set()
        for triangle, choice, _ in found:
            self._replace(gm, ctx, triangle, choice.kernel, checked)
        if not products:
            skipped.append(("graph", "no bmm, matmul or einsum of vectors with their own transpose"))
        notes = tuple(f"{count} by {choice}" for choice, count in Counter(choice for _, choice, _ in found).items())
        exact = (
            bool(found)
            and ctx.topology.world_size > 1
            and all(choice.kernel == REFERENCE and same_product for _, choice, same_product in found)
        )
        return PassReport(bool(found), len(found), tuple(skipped), Effect.EXACT if exact else None, notes)

    def _find(
        self, gm: fx.GraphModule, ctx: PassContext, product: fx.Node, vectors: fx.Node
    ) -> tuple[Triangle, Choice]:
        value = vectors.meta["val"]
        choice = self._choose(gm, ctx, value)
        triangle = find_triangle(gm, ctx, product, vectors)
        if choice.kernel != REFERENCE:
            count, width, how = int(value.shape[1]), int(value.shape[2]), (triangle.diagonal, triangle.upper)
            reason = fails(choice.kernel, lambda: try_out(count, width, how, value.dtype, value.device))
            if reason is not None:
                raise NoTriangle(reason)
        return triangle, choice

    def _choose(self, gm: fx.GraphModule, ctx: PassContext, vectors: torch.Tensor) -> Choice:
        """Return what computes the products of these vectors, or raise why the graph stays as it is."""
        if any(name_of(node) == "_enter_autocast" for node in gm.graph.nodes):
            raise NoTriangle("autocast changes the type of its products")
        choice = choose(self.kernels, vectors.device, {"triton": lambda: supports(vectors, None)})
        if choice.kernel != REFERENCE:
            return choice
        against_triton = choice.rejected[0][1]
        if self.kernels != "auto" or vectors.device.type != "cpu":
            raise NoTriangle(against_triton)
        if ctx.topology.world_size == 1 and ctx.options.dense_compiler == "eager":
            raise NoTriangle(f"gradients stay the eager model's, bit for bit; {against_triton}")
        return choice

    def _replace(
        self, gm: fx.GraphModule, ctx: PassContext, triangle: Triangle, kernel: str, checked: set[fx.Node]
    ) -> None:
        selected = triangle.selected
        join, parts = _join_of(triangle)
        place = parts.index(selected)
        with gm.graph.inserting_before(join):
            for buffer in triangle.constants:
                if buffer not in checked:
                    self._hold(gm, ctx, buffer)
            checked.update(triangle.constants)
            leading = parts[place - 1] if place else None
            pairs = ctx.call(
                gm, torch.ops.dmt.dot_interaction.default, triangle.vectors, leading, triangle.diagonal, triangle.upper,
                kernel, allows_tf32(), like=selected,
            )  # fmt: skip
            joined = [*parts[: max(place - 1, 0)], pairs, *parts[place + 1 :]]
            result = ctx.call(gm, torch.cat, joined, 1, like=join) if len(joined) > 1 else pairs
        join.replace_all_uses_with(result)
        erase_unused(gm, join)

    def _hold(self, gm: fx.GraphModule, ctx: PassContext, buffer: fx.Node) -> None:
        if buffer.op == "placeholder":
            value, name = ctx.parameters[buffer.name], ctx.flat_names[buffer.name]
        else:
            value, name = attrgetter(str(buffer.target))(gm), str(buffer.target)
        ctx.call(gm, check_constant, buffer, digest_of(value), name)


def _join_of(triangle: Triangle) -> tuple[fx.Node, list[fx.Node]]:
    """Return the ``cat`` that puts a vector in front of the pairs, and its parts; where none does, the pairs alone."""
    selected = triangle.selected
    alone = selected, [selected]
    join = next(iter(selected.users), None)
    if join is None or len(selected.users) > 1 or name_of(join) not in {"cat", "concat", "concatenate"}:
        return alone
    arguments: dict[str, Any] = {**dict(zip(("tensors", "dim"), join.args, strict=False)), **join.kwargs}
    if not arguments.keys() <= {"tensors", "dim"} or arguments.get("dim", 0) not in (1, -1):
        return alone
    parts = list(arguments["tensors"])
    place = parts.index(selected)
    if parts.count(selected) > 1 or not place or parts[place - 1].meta["val"].ndim != 2:
        return alone
    leading = parts[place - 1]
    if is_written(leading) or supports(triangle.vectors.meta["val"], leading.meta["val"]) is not None:
        return alone
    return join, parts
