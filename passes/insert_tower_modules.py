"""Compress each tower before its embeddings cross hosts: insert a Tower Module per tower, and fit the rest to it.

Before, the vectors of all features meet in a join; after, what the towers send meets there:

    tower_input(features of a tower)         (B, W)
    the features' own projections, if any    (B, F, N), or (B, W) where widths differ
    the Tower Module                         (B, O)
    tower_output

The join is made anew of the towers' outputs. Dot products become those of the new vectors. Every parameter that depends
on the number or the width of the joined vectors gets its new size and new values: the bottom MLP's last layer, a cross
network, the first layer of the over-arch. Anything that fixes these sizes is the reason why nothing is changed.

Where features meet in another way than in one join (pairs, several joins of some of them, attention over a history), a
module that sends one vector for each feature, such as ``"dlrm"`` with p=0, still fits: each vector takes the place of
its feature's wherever that is read.

A graph that came from a transformed model has its towers already and stays as it is. Source: section 3.2 of the DMT
paper.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, cast

from torch import fx

from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import source_line
from dmt_compile.ir.inlining import inline
from dmt_compile.ir.joins import Family, NoFamily, find_family, find_vectors
from dmt_compile.ir.pass_base import (
    Pass,
    PassContext,
    PassReport,
    calls,
    dependents,
    erase_unused,
    placeholders,
    sort_graph,
)
from dmt_compile.ir.resizing import CannotResize, Resizing
from dmt_compile.ir.size_rules import rewrite_sizes
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.tower_joins import SendingTower, Sent, columns_of, exchange_vectors, feed_tower, join_again
from dmt_compile.ir.tower_sizes import lookups_of, sizes_behind
from dmt_compile.plan import TowerModules, TowerPlan
from dmt_compile.tower_modules import TowerSpec, build_tower_module, output_width
from dmt_compile.towers import NAME, Towers, resized

logger = logging.getLogger(__name__)

REFUSED = "Tower Modules are refused"


class _OtherTowers(ConfigError):
    """The model has Tower Modules already, of other features."""


@dataclass(frozen=True)
class _Design:
    """What is to be compressed, by which towers, and the sizes that follow."""

    family: Family
    towers: list[SendingTower]
    sizes: Resizing


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
            UnsupportedGraphError: the plan has the pieces of a feature's table in several towers.
        """
        inside = calls(gm, ops.tower_input)
        if inside:
            return PassReport(changed=False, matched=len(inside), notes=("the model has its Tower Modules already",))
        recipe = None if ctx.plan is None else ctx.options.recipe(ctx.plan)
        if recipe is None or ctx.plan is None:
            return PassReport(changed=False, skipped=(("graph", "no Tower Module was asked for"),))
        try:
            design = self._design(gm, ctx, recipe, ctx.plan)
        except (NoFamily, CannotResize) as refusal:
            left = ctx.leave(refusal.node, f"{REFUSED}: {refusal}", self.name)
            logger.warning("insert_tower_modules: %s", left[1])
            said = f"no Tower Modules: {refusal} ({source_line(refusal.node)})"
            ctx.plan = replace(ctx.plan, notes=(*ctx.plan.notes, said))
            return PassReport(changed=False, skipped=(left,))
        notes = self._rewrite(gm, ctx, design, recipe)
        tables = {table.name: table.dim for table in ctx.embedding_graph.tables}
        dims = {feature.name: tables[feature.table] for feature in ctx.embedding_graph.features}
        ctx.plan = _with_widths(ctx.plan, design.towers, recipe, dims)
        return PassReport(changed=True, matched=len(design.towers), skipped=design.family.left, notes=notes)

    # ------------------------------------------------------------------------------------------------------ the design

    def _design(self, gm: fx.GraphModule, ctx: PassContext, recipe: TowerModules, plan: TowerPlan) -> _Design:
        """Return what can be compressed: joined features, or else vectors wherever they are read.

        Raises:
            NoFamily, CannotResize: neither.
        """
        try:
            return self._sized(gm, ctx, find_family(gm, ctx), recipe, plan)
        except (NoFamily, CannotResize, _OtherTowers) as refusal:
            try:
                return self._sized(gm, ctx, find_vectors(gm, ctx), recipe, plan)
            except (NoFamily, CannotResize, _OtherTowers):
                raise refusal from None

    def _sized(
        self, gm: fx.GraphModule, ctx: PassContext, family: Family, recipe: TowerModules, plan: TowerPlan
    ) -> _Design:
        towers = self._towers(gm, ctx, recipe, family, plan)
        if not family.operands and any(tower.of_features is None or tower.scalars for tower in towers):
            raise NoFamily("towers send something else than a vector for each feature", calls(gm, ops.lookup)[0])
        vectors, scalars = sum(tower.vectors for tower in towers), sum(tower.scalars for tower in towers)
        if not scalars:  # as many vectors as before: what selects pairs of them may stay
            same = {n for n, parts in family.operands.items() if vectors == sum(p.feature is not None for p in parts)}
            family = replace(family, pairs={n: pairs for n, pairs in family.pairs.items() if n not in same})
        elif not family.pairs and all(node.meta["val"].ndim == 3 for node in family.operands):
            raise CannotResize("this interaction has no place for a tower's scalars", next(iter(family.operands)))
        return _Design(family, towers, sizes_behind(gm, ctx, family, towers, lookups_of(gm, ctx)))

    def _towers(
        self, gm: fx.GraphModule, ctx: PassContext, recipe: TowerModules, family: Family, plan: TowerPlan
    ) -> list[SendingTower]:
        """Build each tower's module, or take the one that the model has."""
        lookups = lookups_of(gm, ctx)
        held = () if ctx.towers is None else [name for names in ctx.towers.features.values() for name in names]
        if held and set(held).isdisjoint(family.features):
            raise NoFamily(
                "the Tower Modules of this model are those of another of its graphs", next(iter(lookups.values()))
            )
        parts = {p.feature: p.node for p in next(iter(family.operands.values()), ()) if p.feature is not None}
        widths = {name: columns_of(parts.get(name, lookups[name])) for name in family.features}
        vectors = not family.operands or any(node.meta["val"].ndim == 3 for node in family.operands)
        tables = {feature.name: feature.table for feature in ctx.embedding_graph.features}
        dim = int(recipe.options.get("dim", max(widths.values())))
        found: list[SendingTower] = []
        for index, tower in enumerate(plan.towers):
            names = tuple(name for name in family.features if self._home(plan, tables[name]) == tower.name)
            if not names:
                continue
            spec = TowerSpec(tower.name, names, tuple(widths[n] for n in names), dim, vectors, index)
            kind: Any = ctx.options.tower_module if callable(ctx.options.tower_module) else recipe.kind
            if ctx.towers is None:
                module = build_tower_module(kind, spec, recipe.options, recipe.seed)
                like = lookups[names[0]].meta["val"] if not parts else parts[names[0]].meta["val"]
                module = module.to(like.device, like.dtype)
            elif ctx.towers.recipe != recipe or ctx.towers.features.get(tower.name) != names:
                raise _OtherTowers(
                    f"{self.name}: expected the towers that the model already has ({ctx.towers.features}, "
                    f"{ctx.towers.recipe}), found {tower.name} of {names} and {recipe}; give the same plan and options"
                )
            else:
                module = ctx.towers.get_submodule(tower.name)
            found.append(SendingTower(spec, module, output_width(module, spec)))
        owners: dict[int, str] = {}
        for sending in found:
            for name, parameter in sending.module.named_parameters():
                if owners.setdefault(id(parameter), sending.spec.name) != sending.spec.name:
                    raise ConfigError(
                        f"{self.name}: expected a module of its own for each tower, found that "
                        f"{owners[id(parameter)]} and {sending.spec.name} share {name}; build a new module in each call"
                    )
        return found

    def _home(self, plan: TowerPlan, table: str) -> str:
        home = plan.home(table)
        if home is None:
            held = sorted({plan.tower_of(piece.name).name for piece in plan.pieces_of(table)})
            raise UnsupportedGraphError(
                f"{self.name}: expected the pieces of {table} in one tower under Tower Modules, found them in {held}; "
                "keep them together, or drop tower_module"
            )
        return home.name

    # ----------------------------------------------------------------------------------------------------- the rewrite

    def _rewrite(self, gm: fx.GraphModule, ctx: PassContext, design: _Design, recipe: TowerModules) -> tuple[str, ...]:
        family, towers, sizes = design.family, design.towers, design.sizes
        changed = [node for node in sizes.nodes if sizes.changed(node)]
        if ctx.towers is None:
            ctx.towers = _new_towers(ctx, towers, recipe)
            for node in changed:
                if node.op == "placeholder":
                    flat_name, old = ctx.flat_names[node.name], ctx.parameters[node.name]
                    ctx.towers.replace(flat_name, resized(ctx.root, flat_name, old, sizes.shape(node), recipe.seed))
        if not hasattr(gm, NAME):
            gm.add_submodule(NAME, ctx.towers)
        notes = [*map(str, towers), *(f"{name} stays as it is: {reason}" for name, reason in family.left)]
        last = placeholders(gm)[-1]
        for node in changed:
            if node.op == "placeholder":
                flat_name, old_shape = ctx.flat_names[node.name], tuple(node.meta["val"].shape)
                notes.append(f"{flat_name}: {old_shape} -> {sizes.shape(node)}")
                node.replace_all_uses_with(_attribute(gm, ctx, f"replaced.{flat_name}", last))
            elif node not in sizes.sources:
                rewrite_sizes(node, sizes)
        lookups = lookups_of(gm, ctx)
        vectors = [] if family.operands else [lookups[name] for name in family.features]
        _derive_again(gm, ctx, dependents([*family.operands, *sizes.sources, *vectors]))  # they wait for the new ones
        output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        with gm.graph.inserting_before(output):
            outputs = [_send(gm, ctx, family, lookups, tower) for tower in towers]

            def call(target: Callable[..., Any], *args: Any) -> fx.Node:
                return ctx.call(gm, target, *args, like=outputs[0])

            sent = Sent(call, towers, outputs)
            if family.operands:
                replaced = join_again(gm, ctx, family, sent, sizes)
            else:
                replaced = exchange_vectors(lookups, call, sent)
        for before, after in replaced.items():
            before.replace_all_uses_with(after, lambda user: user.target is not ops.tower_input)
        for before in replaced:
            erase_unused(gm, before)
        _keep_lookups_in_order(gm)
        sort_graph(gm)
        _derive_again(gm, ctx)
        return tuple(notes)


def _keep_lookups_in_order(gm: fx.GraphModule) -> None:
    """Put lookups right behind their check, in its order: a join may read now what was looked up after it."""
    for check in calls(gm, ops.check_batch):
        lookups = [node for node in calls(gm, ops.lookup) if node.args[1] in check.users]
        place = [node for node in gm.graph.nodes if node in check.users][-1]
        for lookup in lookups:
            place.append(lookup)
            place = lookup


def _new_towers(ctx: PassContext, towers: Sequence[SendingTower], recipe: TowerModules) -> Towers:
    assert ctx.plan is not None
    wholes = {table.name: table.whole or table.name for table in ctx.plan.tables}
    partition = {t.name: tuple(dict.fromkeys(wholes[name] for name in t.tables)) for t in ctx.plan.towers}
    found = Towers(recipe, {t.spec.name: t.spec.features for t in towers}, partition)
    for tower in towers:
        found.add_module(tower.spec.name, tower.module)
    return found


def _send(
    gm: fx.GraphModule, ctx: PassContext, family: Family, lookups: dict[str, fx.Node], tower: SendingTower
) -> fx.Node:
    """Insert one tower, and return the node of its output (B, O)."""
    start, embs = feed_tower(gm, ctx, family, lookups, tower)
    name = tower.spec.name
    if ctx.inline_towers:
        last = placeholders(gm)[-1]
        out = inline(gm, ctx, tower.module, name, embs, lambda path: _attribute(gm, ctx, f"{name}.{path}", last))
    else:
        out = gm.graph.call_module(f"{NAME}.{name}", (embs,))
        ctx.environment.record(out, gm)
    sent: fx.Node = ctx.call(gm, ops.tower_output, out, name, like=start)
    return sent


def _attribute(gm: fx.GraphModule, ctx: PassContext, path: str, after: fx.Node) -> fx.Node:
    """Read a parameter of the towers, right after the graph's inputs."""
    target = f"{NAME}.{path}"
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            return cast(fx.Node, node)
    with gm.graph.inserting_after(after):
        node = gm.graph.create_node("get_attr", target, (), {}, target.replace(".", "_"))
    ctx.environment.record(node, gm)
    assert ctx.towers is not None
    ctx.parameters[node.name] = attrgetter(path)(ctx.towers)
    ctx.flat_names[node.name] = target
    return node


def _derive_again(gm: fx.GraphModule, ctx: PassContext, stale: set[fx.Node] | None = None) -> None:
    """Bring the metadata of all nodes but the stale ones up to date, where what they are derived from has changed."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or node in (stale or ()):
            continue
        if not ctx.environment.trusted(node):
            ctx.environment.record(node, gm)


def _with_widths(
    plan: TowerPlan, towers: Sequence[SendingTower], recipe: TowerModules, dims: dict[str, int]
) -> TowerPlan:
    """Return the plan with what each tower sends; ``dims``: columns of each feature's lookup."""
    saved = {t.spec.name: sum(dims[name] for name in t.spec.features) - t.width for t in towers}
    sending = [replace(t, output_width=t.output_width - saved.get(t.name, 0)) for t in plan.towers]
    return plan if plan.tower_modules else replace(plan, towers=tuple(sending), tower_modules=recipe)
