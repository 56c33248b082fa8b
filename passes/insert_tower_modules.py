"""Compress each tower before its embeddings cross hosts: insert a Tower Module per tower, and fit the rest to it.

Before, the vectors of all features meet in a join; after, what the towers send meets there:

    tower_input(features of a tower)         (B, W)
    the features' own projections, if any    (B, F, N), or (B, W) where widths differ
    the Tower Module                         (B, O)
    tower_output

The join is made anew of the towers' outputs. Dot products become those of the new vectors. Every parameter that depends
on the number or the width of the joined vectors gets its new size and new values: the bottom MLP's last layer, a cross
network, the first layer of the over-arch. Anything that fixes these sizes is the reason why nothing is changed.

A graph that came from a transformed model has its towers already and stays as it is. Source: section 3.2 of the DMT
paper.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from dmt_compile import torch_internals
from dmt_compile.errors import ConfigError, PlanError, UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.joins import Family, NoFamily, Part, find_family
from dmt_compile.ir.pass_base import (
    Pass,
    PassContext,
    PassReport,
    ancestors,
    calls,
    dependents,
    erase_unused,
    nodes_in,
    placeholders,
    sort_graph,
)
from dmt_compile.ir.resizing import CannotResize, Resizing, rewrite_sizes
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.plan import TowerModules, TowerPlan
from dmt_compile.tower_modules import TowerSpec, build_tower_module, output_width
from dmt_compile.towers import NAME, Towers, resized

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tower:
    """A tower with a module: its name, its features in join order, what the module gives."""

    spec: TowerSpec
    module: nn.Module
    width: int

    @property
    def scalars(self) -> int:
        return int(getattr(self.module, "scalars", 0))


@dataclass(frozen=True)
class InsertTowerModules(Pass):
    """Insert Tower Modules and resize what reads them."""

    name: ClassVar[str] = "insert_tower_modules"
    effect: ClassVar[Effect] = Effect.MODEL
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place, and set ``ctx.towers`` where it is not set yet.

        Raises:
            ConfigError: a bad kind or option, or towers that the model already has from another plan.
        """
        inside = calls(gm, ops.tower_input)
        if inside:
            self._check_towers(inside, ctx)
            return PassReport(changed=False, matched=len(inside), notes=("the model has its Tower Modules already",))
        recipe = None if ctx.plan is None else ctx.options.recipe(ctx.plan)
        if recipe is None or ctx.plan is None:
            return PassReport(changed=False, skipped=(("graph", "no Tower Module was asked for"),))
        try:
            family = find_family(gm, ctx)
            _check_samples(gm, ctx, family)
            towers = self._towers(ctx, recipe, family, ctx.plan)
            resizing = self._resizing(gm, ctx, family, towers)
        except (NoFamily, CannotResize) as refusal:
            left = ctx.leave(refusal.node, f"Tower Modules are refused: {refusal}", self.name)
            logger.warning("insert_tower_modules: %s", left[1])
            return PassReport(changed=False, skipped=(left,))
        notes = self._rewrite(gm, ctx, family, towers, resizing, recipe)
        tables = {table.name: table.dim for table in ctx.embedding_graph.tables}
        dims = {feature.name: tables[feature.table] for feature in ctx.embedding_graph.features}
        ctx.plan = _with_widths(ctx.plan, towers, recipe, dims)
        return PassReport(changed=True, matched=len(towers), notes=notes)

    def _check_towers(self, inside: list[fx.Node], ctx: PassContext) -> None:
        """Hold the towers of a transformed model against the plan.

        Raises:
            PlanError: the plan puts a tower's tables elsewhere.
        """
        assert ctx.plan is not None
        tables = {feature.node: feature.table for feature in ctx.embedding_graph.features}
        planned = {tower.name: tower.tables for tower in ctx.plan.towers}
        for node in inside:
            name = str(node.args[1])
            read = [tables[feature.name] for feature in nodes_in(node.args[0])]
            away = [table for table in read if table not in planned.get(name, ())]
            if away:
                raise PlanError(
                    f"{self.name}: expected the tables of the transformed model's {name} together, found {away[0]} "
                    "in another tower of the plan; compile it with the plan that it was transformed with"
                )

    # ------------------------------------------------------------------------------------------------------ the towers

    def _towers(self, ctx: PassContext, recipe: TowerModules, family: Family, plan: TowerPlan) -> list[_Tower]:
        """Build each tower's module, or take the one that the model has."""
        parts = {p.feature: p.node for p in next(iter(family.operands.values())) if p.feature is not None}
        widths = {name: _columns(node) for name, node in parts.items()}
        vectors = any(node.meta["val"].ndim == 3 for node in family.operands)
        tables = {feature.name: feature.table for feature in ctx.embedding_graph.features}
        flat_width = max(widths.values())
        dim = int(recipe.options.get("dim", flat_width))
        found: list[_Tower] = []
        for index, tower in enumerate(plan.towers):
            names = tuple(name for name in family.features if tables[name] in tower.tables)
            if not names:
                continue
            spec = TowerSpec(tower.name, names, tuple(widths[n] for n in names), dim, vectors, index)
            kind: Any = ctx.options.tower_module if callable(ctx.options.tower_module) else recipe.kind
            if ctx.towers is None:
                module = build_tower_module(kind, spec, recipe.options, recipe.seed)
                like = next(iter(family.operands)).meta["val"]
                module = module.to(like.device, like.dtype)
            elif ctx.towers.recipe != recipe or ctx.towers.features.get(tower.name) != names:
                raise ConfigError(
                    f"{self.name}: expected the towers that the model already has ({ctx.towers.features}, "
                    f"{ctx.towers.recipe}), found {tower.name} of {names} and {recipe}; give the same plan and options"
                )
            else:
                module = ctx.towers.get_submodule(tower.name)
            found.append(_Tower(spec, module, output_width(module, spec)))
        if not vectors or all((t.width - t.scalars) % dim == 0 for t in found):
            return found
        raise ConfigError(f"{self.name}: expected outputs of a multiple of {dim} columns for vectors")

    # ------------------------------------------------------------------------------------------------------ the resize

    def _resizing(self, gm: fx.GraphModule, ctx: PassContext, family: Family, towers: Sequence[_Tower]) -> Resizing:
        """Return the sizes of everything else, given what the towers send."""
        sources = set(family.operands) | {pairs.selected for pairs in family.pairs.values()}
        hidden = _inside(gm, ctx, family) | {n for n in gm.graph.nodes if n.target in ops.OPERATORS}
        resizing = Resizing([n for n in gm.graph.nodes if n not in hidden], sources)
        tables = {table.placeholder for table in ctx.embedding_graph.tables}
        kept = {source for chain in family.local.values() for node in chain for source in node.all_input_nodes}
        for node in gm.graph.nodes:
            free = node.name in ctx.parameters and node.name not in tables
            if node in kept and node.op == "placeholder":
                resizing.fix(node, "it is also what features pass through before they meet")
            elif node.op in ("placeholder", "get_attr") and not free:
                resizing.fix(node, "an input or a constant has a fixed size")
            elif node.target is ops.lookup and node not in sources:
                resizing.fix(node, "a feature that no Tower Module takes has a fixed width")
        vectors, dim = sum((t.width - t.scalars) // t.spec.dim for t in towers), towers[0].spec.dim
        scalars = sum(t.scalars for t in towers)
        flat = any(node.meta["val"].ndim == 2 for node in family.operands)
        if scalars and not flat and not family.pairs:
            raise CannotResize("this interaction has no place for a tower's scalars", next(iter(family.operands)))
        for node, parts in family.operands.items():
            if node.meta["val"].ndim == 3:
                old = int(node.meta["val"].shape[2])
                others = 0
                for part in parts:
                    if part.feature is None:
                        columns = _columns(part.node)
                        others += columns // old
                        if dim != old:
                            resizing.set(part.node, -1, _stated(part.node) * dim // old)
                resizing.set(node, 1, vectors + others)
                resizing.set(node, 2, dim)
                if node in family.pairs:
                    pairs = family.pairs[node]
                    resizing.set(pairs.selected, 1, pairs.count(vectors + others) + scalars)
        resizing.solve()
        for node, parts in family.operands.items():
            if node.meta["val"].ndim == 2:
                kept = sum(math.prod(resizing.shape(p.node)[1:]) for p in parts if p.feature is None)
                resizing.set(node, 1, sum(t.width for t in towers) + kept)
        resizing.solve()
        return resizing

    # ----------------------------------------------------------------------------------------------------- the rewrite

    def _rewrite(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        family: Family,
        towers: Sequence[_Tower],
        resizing: Resizing,
        recipe: TowerModules,
    ) -> tuple[str, ...]:
        changed = [node for node in resizing.nodes if resizing.changed(node)]
        if ctx.towers is None:
            partition = {tower.name: tower.tables for tower in ctx.plan.towers}  # type: ignore[union-attr]
            ctx.towers = Towers(recipe, {t.spec.name: t.spec.features for t in towers}, partition)
            for tower in towers:
                ctx.towers.add_module(tower.spec.name, tower.module)
            for node in changed:
                if node.op == "placeholder":
                    flat_name, old = ctx.flat_names[node.name], ctx.parameters[node.name]
                    shape = resizing.shape(node)
                    ctx.towers.replace(flat_name, resized(ctx.root, flat_name, old, shape, recipe.seed))
        if not hasattr(gm, NAME):
            gm.add_submodule(NAME, ctx.towers)
        notes = [_describe(tower) for tower in towers]
        last = placeholders(gm)[-1]
        for node in changed:
            if node.op == "placeholder":
                shape = tuple(node.meta["val"].shape)
                notes.append(f"{ctx.flat_names[node.name]}: {shape} -> {resizing.shape(node)}")
                new = self._attribute(gm, ctx, f"replaced.{ctx.flat_names[node.name]}", last)
                node.replace_all_uses_with(new)
            elif node not in resizing.sources:
                rewrite_sizes(node, resizing)
        stale = dependents([*family.operands, *resizing.sources])  # they wait for the new joins
        _derive_again(gm, ctx, stale)
        output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        with gm.graph.inserting_before(output):
            sent = [self._tower(gm, ctx, family, tower) for tower in towers]
            replaced = self._joins(gm, ctx, family, towers, sent, resizing)
        for before, after in replaced.items():
            before.replace_all_uses_with(after)
        for before in replaced:
            erase_unused(gm, before)
        sort_graph(gm)
        _derive_again(gm, ctx)
        return tuple(notes)

    def _attribute(self, gm: fx.GraphModule, ctx: PassContext, path: str, after: fx.Node) -> fx.Node:
        """Read a parameter of the towers, right after the graph's inputs."""
        target = f"{NAME}.{path}"
        name = target.replace(".", "_")
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == target:
                return cast(fx.Node, node)
        with gm.graph.inserting_after(after):
            node = gm.graph.create_node("get_attr", target, (), {}, name)
        node.meta["val"] = ctx.environment.derive(node, gm)
        ctx.parameters[node.name] = _at(ctx.towers, path)
        ctx.flat_names[node.name] = target
        return node

    def _tower(self, gm: fx.GraphModule, ctx: PassContext, family: Family, tower: _Tower) -> fx.Node:
        """Insert one tower, and return the node of its output (B, O)."""
        lookups = {feature.name: feature.node for feature in ctx.embedding_graph.features}
        by_name = {node.name: node for node in gm.graph.nodes}
        mine = [by_name[lookups[name]] for name in tower.spec.features]
        parts = {p.feature: p.node for p in next(iter(family.operands.values())) if p.feature is not None}

        def call(target: Any, *args: Any) -> fx.Node:
            return ctx.call(gm, target, *args, like=mine[0])

        joined = call(ops.tower_input, mine, tower.spec.name)
        even = len(set(tower.spec.widths)) == 1
        if any(_computes(node) for name in tower.spec.features for node in family.local[name]):
            columns, start = [], 0
            for lookup, name in zip(mine, tower.spec.features, strict=True):
                width = _columns(lookup)
                piece = call(torch.narrow, joined, 1, start, width)
                columns.append(self._own_chain(gm, ctx, family.local[name], lookup, piece, parts[name]))
                start += width
            embs = call(torch.stack if even else torch.cat, columns, 1)
        elif even:
            embs = call(torch.unflatten, joined, 1, (len(mine), tower.spec.widths[0]))
        else:
            embs = joined
        if ctx.inline_towers:
            out = self._inline(gm, ctx, tower, embs)
        else:
            out = gm.graph.call_module(f"{NAME}.{tower.spec.name}", (embs,))
            out.meta["val"] = ctx.environment.derive(out, gm)
        return call(ops.tower_output, out, tower.spec.name)

    def _own_chain(
        self, gm: fx.GraphModule, ctx: PassContext, chain: list[fx.Node], lookup: fx.Node, piece: fx.Node, end: fx.Node
    ) -> fx.Node:
        """Copy what a feature passes through before the join, reading its columns of the tower instead."""
        copies = {lookup: piece}
        for node in chain:
            copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
            copies[node].meta["val"] = ctx.environment.derive(copies[node], gm)
        vector = copies[end]
        return vector if vector.meta["val"].ndim == 2 else ctx.call(gm, torch.flatten, vector, 1, like=end)

    def _inline(self, gm: fx.GraphModule, ctx: PassContext, tower: _Tower, embs: fx.Node) -> fx.Node:
        """Write a module's operators into the graph, its parameters as attributes."""
        graph = _trace(tower.module, tower.spec.name)
        last = placeholders(gm)[-1]
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = embs
            elif node.op == "get_attr":
                copies[node] = self._attribute(gm, ctx, f"{tower.spec.name}.{node.target}", last)
            elif node.op == "output":
                return copies[node.args[0]]
            else:
                copies[node] = gm.graph.node_copy(node, lambda n: copies[n])
                copies[node].meta = {"val": ctx.environment.derive(copies[node], gm)}
        raise AssertionError("a graph ends in its output")

    def _joins(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        family: Family,
        towers: Sequence[_Tower],
        sent: Sequence[fx.Node],
        resizing: Resizing,
    ) -> dict[fx.Node, fx.Node]:
        """Make the joins, and the dot products, of what the towers send; return what replaces what."""

        def call(target: Any, *args: Any) -> fx.Node:
            return ctx.call(gm, target, *args, like=sent[0])

        replaced: dict[fx.Node, fx.Node] = {}
        scalars = [
            call(torch.narrow, out, 1, t.width - t.scalars, t.scalars)
            for t, out in zip(towers, sent, strict=True)
            if t.scalars
        ]
        vectors: list[fx.Node] = []
        for node, parts in family.operands.items():
            shape = resizing.shape(node)
            if node.meta["val"].ndim == 2:
                others = [call(torch.flatten, p.node, 1) if p.node.meta["val"].ndim > 2 else p.node
                          for p in parts if p.feature is None]  # fmt: skip
                replaced[node] = call(torch.cat, _in_order(parts, others, list(sent)), 1)
                continue
            if not vectors:
                for t, out in zip(towers, sent, strict=True):
                    columns = t.width - t.scalars
                    kept = call(torch.narrow, out, 1, 0, columns) if t.scalars else out
                    if columns:
                        vectors.append(call(torch.unflatten, kept, 1, (columns // t.spec.dim, t.spec.dim)))
            others = [_as_vectors(call, p.node, int(shape[2])) for p in parts if p.feature is None]
            joined = call(torch.cat, _in_order(parts, others, vectors), 1)
            replaced[node] = joined
            if node in family.pairs:
                pairs = family.pairs[node]
                products = call(torch.bmm, joined, call(torch.transpose, joined, 1, 2))
                chosen = _select(gm, ctx, products, pairs.kind, int(shape[1]))
                replaced[pairs.selected] = call(torch.cat, [chosen, *scalars], 1) if scalars else chosen
        return replaced


def _check_samples(gm: fx.GraphModule, ctx: PassContext, family: Family) -> None:
    """Let only features of one vector a sample be compressed together.

    Raises:
        NoFamily: a feature is a sequence, or is exchanged with others.
    """
    lookups = {feature.node: feature for feature in ctx.embedding_graph.features if feature.name in family.features}
    samples = torch_internals.canonical_expression(next(iter(family.operands)).meta["val"].shape[0])
    groups = {feature.group for feature in lookups.values()}
    for node in gm.graph.nodes:
        if node.name in lookups:
            bags = torch_internals.canonical_expression(node.meta["val"].shape[0])
            if bags != samples or len(groups) > 1:
                raise NoFamily(f"{lookups[node.name].name} has not one vector a sample like the others", node)


def _in_order(parts: Sequence[Part], others: list[fx.Node], towers: list[fx.Node]) -> list[fx.Node]:
    """Return what else is joined and the towers, whichever came first before."""
    return [*others, *towers] if parts[0].feature is None else [*towers, *others]


def _as_vectors(call: Any, node: fx.Node, dim: int) -> fx.Node:
    value = node.meta["val"]
    if value.ndim == 3:
        return node
    found: fx.Node = call(torch.unflatten, node, 1, (int(value.shape[1]) // dim, dim))
    return found


def _select(gm: fx.GraphModule, ctx: PassContext, products: fx.Node, kind: str, vectors: int) -> fx.Node:
    """Return the wanted ones of all products, (B, pairs)."""
    if kind == "all":
        return ctx.call(gm, torch.flatten, products, 1, like=products)
    diagonal, device = -1 if kind == "below" else 0, products.meta["val"].device
    indices = gm.graph.call_function(torch.tril_indices, (vectors, vectors, diagonal), {"device": device})
    indices.meta["val"] = ctx.environment.derive(indices, gm)
    rows, columns = (ctx.call(gm, operator.getitem, indices, i, like=products) for i in range(2))
    return ctx.call(gm, operator.getitem, products, (slice(None), rows, columns), like=products)


def _stated(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _columns(node: fx.Node) -> int:
    """Return how many columns a (B, D), (B, 1, D) or (B, V, D) value has for a sample."""
    columns = 1
    for size in node.meta["val"].shape[1:]:
        columns *= int(size)
    return columns


def _computes(node: fx.Node) -> bool:
    """Tell whether a node does more than lay out its operand."""
    return str(getattr(node.target, "__name__", node.target)) not in {
        *("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "unflatten"),
    }


def _inside(gm: fx.GraphModule, ctx: PassContext, family: Family) -> set[fx.Node]:
    """Return what lies between lookups and joins, and between joins and selected pairs: all of it goes."""
    lookups = {feature.node for feature in ctx.embedding_graph.features if feature.name in family.features}
    after = dependents([n for n in gm.graph.nodes if n.name in lookups])
    found = (ancestors(family.operands) & after) - set(family.operands)
    for operand, pairs in family.pairs.items():
        found |= (ancestors([pairs.selected]) & dependents([operand])) - {operand, pairs.selected}
    return found - set(family.operands)


def _trace(module: nn.Module, name: str) -> fx.Graph:
    """Return a module's operators.

    Raises:
        UnsupportedGraphError: it cannot be traced, or it is another one in evaluation than in training.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            return False

    graphs = []
    modes = {child: child.training for child in module.modules()}
    try:
        for mode in (True, False):
            graphs.append(Tracer().trace(module.train(mode)))
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise UnsupportedGraphError(
            f"insert_tower_modules: expected a module for {name} that torch.fx can trace, found {type(error).__name__}: "
            f"{said}; use dmt_compile.transform, whose result torch.compile reads itself"
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise UnsupportedGraphError(
            f"insert_tower_modules: expected a module for {name} that is the same in training and evaluation, found "
            "dropout, batch normalisation or the like; use dmt_compile.transform, whose result torch.compile reads "
            "itself"
        )
    return graphs[0]


def _at(towers: Towers | None, path: str) -> Any:
    value: Any = towers
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def _derive_again(gm: fx.GraphModule, ctx: PassContext, stale: set[fx.Node] | None = None) -> None:
    """Bring the metadata of all nodes but the stale ones up to date."""
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and node not in (stale or ()):
            node.meta["val"] = ctx.environment.derive(node, gm)


def _with_widths(plan: TowerPlan, towers: Sequence[_Tower], recipe: TowerModules, dims: dict[str, int]) -> TowerPlan:
    """Return the plan with what each tower sends; ``dims``: columns of each feature's lookup."""
    saved = {t.spec.name: sum(dims[name] for name in t.spec.features) - t.width for t in towers}
    sending = [replace(t, output_width=t.output_width - saved.get(t.name, 0)) for t in plan.towers]
    return plan if plan.tower_modules else replace(plan, towers=tuple(sending), tower_modules=recipe)


def _describe(tower: _Tower) -> str:
    before = sum(tower.spec.widths)
    return f"{tower.spec.name}: {len(tower.spec.features)} features, {before} -> {tower.width} columns"
