"""The sizes that follow from what towers send: of joins, of what they are joined with, of all that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from dmt_compile.ir import ops
from dmt_compile.ir.joins import Family
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.ir.resizing import CannotResize, Resizing
from dmt_compile.ir.size_rules import follow_sizes
from dmt_compile.ir.tower_joins import SendingTower, columns_of


def lookups_of(gm: fx.GraphModule, ctx: PassContext) -> dict[str, fx.Node]:
    """Return the lookup of each feature."""
    features = {feature.node: feature.name for feature in ctx.embedding_graph.features}
    return {features[node.name]: node for node in gm.graph.nodes if node.name in features}


def sizes_behind(
    gm: fx.GraphModule,
    ctx: PassContext,
    family: Family,
    towers: Sequence[SendingTower],
    lookups: dict[str, fx.Node],
) -> Resizing:
    """Return the sizes of everything else, given what the towers send.

    Raises:
        CannotResize: a size that would have to change is fixed.
    """
    exchanged = set() if family.operands else {lookups[name] for name in family.features}
    sources = set(family.operands) | {pairs.selected for pairs in family.pairs.values()} | exchanged
    hidden = set(family.inside) | {n for n in gm.graph.nodes if n.target in ops.OPERATORS}
    hidden.update(*(pairs.inside for pairs in family.pairs.values()))
    sizes = follow_sizes([n for n in gm.graph.nodes if n not in hidden - set(family.operands)], sources)
    tables = {table.placeholder for table in ctx.embedding_graph.tables}
    kept = {source for chain in family.local.values() for node in chain for source in node.all_input_nodes}
    for node in gm.graph.nodes:
        free = node.name in ctx.parameters and node.name not in tables
        if node in kept and node.op == "placeholder":
            sizes.fix(node, "it is also what features pass through before they meet")
        elif node.op in ("placeholder", "get_attr") and not free:
            sizes.fix(node, "an input or a constant has a fixed size")
        elif node.target is ops.lookup and node not in sources:
            sizes.fix(node, "a feature that no Tower Module takes has a fixed width")
    dim, vectors, scalars = towers[0].spec.dim, sum(t.vectors for t in towers), sum(t.scalars for t in towers)
    for lookup in exchanged:
        sizes.set(lookup, 1, dim)
    joined = {node: [p.node for p in parts if p.feature is None] for node, parts in family.operands.items()}
    for node, others in joined.items():
        if node.meta["val"].ndim == 3:
            old, count = int(node.meta["val"].shape[2]), vectors
            for other in others:
                count += columns_of(other) // old
                if dim != old:
                    sizes.set(other, -1, int(other.meta["val"].shape[-1]) * dim // old)
            sizes.set(node, 1, count)
            sizes.set(node, 2, dim)
            if node in family.pairs:
                sizes.set(family.pairs[node].selected, 1, family.pairs[node].count(count) + scalars)
    sizes.solve()
    for node, others in joined.items():
        if node.meta["val"].ndim == 2:
            kept_columns = sum(math.prod(sizes.shape(other)[1:]) for other in others)
            sizes.set(node, 1, sum(tower.width for tower in towers) + kept_columns)
        elif any(
            other.meta["val"].ndim == 3 and sizes.size(other, 1) != other.meta["val"].shape[1] for other in others
        ):
            raise CannotResize("as many vectors as features are joined with them", node)
    sizes.solve()
    return sizes
