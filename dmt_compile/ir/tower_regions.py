"""The Tower Modules of a graph as regions of their own, which only the ranks of their tower run."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, ops
from dmt_compile.ir.embedding_graph import source_line
from dmt_compile.ir.pass_base import PassContext, calls, erase_unused, nodes_in
from dmt_compile.runtime.regions import DenseRegion


@dataclass(frozen=True)
class TowerModule:
    """One Tower Module in the graph: its marks, its operators between them, and the parameters that these read."""

    name: str
    input: fx.Node
    output: fx.Node
    inside: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]


@dataclass
class TowerRegions:
    """What each tower group sends, piece by piece: the outputs of its modules, and features as they are.

    Args:
        modules: in tower order; none where features are exchanged as they are.
        runs: the pieces, in the order of their columns after the exchange among peers.
    """

    modules: list[TowerModule] = field(default_factory=list)
    runs: tuple[ex.TowerRun, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each piece."""
        return tuple(run.width for run in self.runs)

    def group_widths(self, groups: int) -> tuple[int, ...]:
        """Return the columns that each tower group sends; nothing without modules."""
        of_group = [[run.width for run in self.runs if run.group == group] for group in range(groups)]
        return tuple(map(sum, of_group)) if self.modules else ()

    def place(self, feature: int) -> int:
        """Return the piece that is a feature as it is."""
        if not self.modules:
            return feature
        return next(i for i, run in enumerate(self.runs) if run.region < 0 and run.features == (feature,))

    def place_of(self, module: TowerModule) -> int:
        """Return the piece that a module gives."""
        return next(i for i, run in enumerate(self.runs) if run.region == self.modules.index(module))

    def run(self, gm: fx.GraphModule, ctx: PassContext, joined: fx.Node, route: fx.Node) -> fx.Node:
        """Insert the call of the modules, each as a dense region."""
        regions = []
        for module in self.modules:
            region = _region(gm, ctx, module)
            gm.add_submodule(module.name, region)
            node = gm.graph.get_attr(module.name)
            node.meta["val"] = region
            regions.append(node)
        given = tuple(module.given for module in self.modules)
        return ctx.call(gm, ex.run_towers, joined, route, self.runs, tuple(regions), given, like=self.modules[0].input)

    def erase(self, gm: fx.GraphModule) -> None:
        """Drop the modules' operators, which are in regions now."""
        for module in self.modules:
            erase_unused(gm, module.output)


def behind_averaging(node: fx.Node) -> fx.Node:
    """Return the parameter or buffer that a node is, where it passed through ``start_gradients`` or the like."""
    bucket = node.args[0] if node.target is operator.getitem else None
    if isinstance(bucket, fx.Node) and bucket.target is gradient_ops.broadcast_buffers:
        passed: Any = bucket.args[0]
        return cast(fx.Node, passed[node.args[1]])
    if isinstance(bucket, fx.Node) and bucket.target is gradient_ops.start_gradients:
        start: Any = bucket.args
        waited, averaging, number = start
        return cast(fx.Node, waited.args[0][averaging.args[0].span(number)][node.args[1]])
    return node


def held_by_one_group(gm: fx.GraphModule, ctx: PassContext) -> dict[fx.Node, int]:
    """Return the parameters and buffers that only Tower Modules of one tower group read, and that group."""
    groups: dict[fx.Node, set[int]] = {}
    for run in calls(gm, ex.run_towers):
        towers: Any = run.args[2]
        given: Any = run.args[4]
        for tower in towers:
            for node in given[tower.region] if tower.region >= 0 else ():
                groups.setdefault(behind_averaging(node), set()).add(tower.group)

    def inside(user: Any) -> bool:
        waits = user.target is gradient_ops.wait_gradients
        return user.target is ex.run_towers or (waits and user.args[1].args[0].tower >= 0)

    return {
        node: groups[node].pop()
        for node in list(groups)
        if node.name in ctx.parameters and len(groups[node]) == 1 and all(map(inside, node.users))
    }


def find_towers(
    gm: fx.GraphModule, ctx: PassContext, lookups: Sequence[fx.Node], features: Mapping[int, fx.Node]
) -> TowerRegions:
    """Return the Tower Modules that read some of ``features``, which are exchanged together.

    Args:
        gm: the graph.
        ctx: the plan, and the tables of the lookups.
        lookups: of the group.
        features: what is read of them, by the index of a lookup: it, or the sum of the pieces of which it is the first.

    Raises:
        UnsupportedGraphError: a module reads something else than its tower's features and parameters.
    """
    assert ctx.plan is not None
    outputs = {node.args[1]: node for node in calls(gm, ops.tower_output)}
    places = {node: index for index, node in features.items()}
    inputs = [n for n in calls(gm, ops.tower_input) if nodes_in(n.args[0])[0] in places]
    if not inputs:
        return TowerRegions()
    modules = [_module(gm, ctx, node, outputs[node.args[1]]) for node in inputs]
    by_name = {module.name: index for index, module in enumerate(modules)}
    tables = {feature.node: feature.table for feature in ctx.embedding_graph.features}
    span = len(ctx.plan.towers[0].hosts)
    runs: list[ex.TowerRun] = []
    for tower in sorted(ctx.plan.towers, key=lambda tower: tower.hosts[0]):
        group = tower.hosts[0] // span
        compressed: list[fx.Node] = []
        if tower.name in by_name:
            module = modules[by_name[tower.name]]
            compressed = list(module.input.args[0])  # type: ignore[arg-type]
            indices = tuple(places[feature] for feature in compressed)
            dtype = str(module.input.meta["val"].dtype).removeprefix("torch.")
            width = int(module.output.meta["val"].shape[1])
            runs.append(ex.TowerRun(group, indices, by_name[tower.name], dtype, width))
        for index, feature in features.items():
            as_it_is = feature not in compressed or any(u.target is not ops.tower_input for u in feature.users)
            if tables[lookups[index].name] in tower.tables and as_it_is:
                runs.append(ex.TowerRun(group, (index,), -1, "", int(feature.meta["val"].shape[1])))
    return TowerRegions(modules, tuple(runs))


def _module(gm: fx.GraphModule, ctx: PassContext, start: fx.Node, end: fx.Node) -> TowerModule:
    inside: set[fx.Node] = set()
    given: dict[fx.Node, None] = {}
    stack = [end.args[0]]
    while stack:
        node = stack.pop()
        assert isinstance(node, fx.Node)
        if node is start or node in inside or node in given or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if node.name in ctx.parameters or node.op == "get_attr":
            given[node] = None
        elif node.op == "placeholder" or node.target in ops.OPERATORS:
            raise UnsupportedGraphError(
                f"lower_to_sptt: expected a Tower Module for {start.args[1]} that reads its tower's features alone, "
                f"found {node.name} ({source_line(node)}); what reads anything else belongs behind the towers"
            )
        else:
            inside.add(node)
            stack.extend(node.all_input_nodes)
    ordered = [node for node in gm.graph.nodes if node in inside]
    return TowerModule(str(start.args[1]), start, end, tuple(ordered), tuple(given))


def _region(gm: fx.GraphModule, ctx: PassContext, module: TowerModule) -> DenseRegion:
    """Copy a module's operators into a region: its features (P, W), then its parameters, to (P, O)."""
    graph = fx.Graph()
    start = graph.placeholder("embs")
    before = module.input.meta["val"]
    # Without requires_grad a compiled region would give its features no gradient.
    start.meta["val"] = ops.requires_grad(before.new_empty(ctx.environment.fresh_size(), before.shape[1]), before)
    copies: dict[fx.Node, fx.Node] = {module.input: start}
    for node in module.given:
        copies[node] = graph.placeholder(node.name)
    samples = torch_internals.canonical_expression(before.shape[0])

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a size: this rank's samples outside are its peers' samples here
            size = torch_internals.canonical_expression(node.meta["val"])
            if size != samples:
                raise UnsupportedGraphError(
                    f"lower_to_sptt: expected sizes of the batch alone in the Tower Module of {module.name}, found "
                    f"{node.name} ({source_line(node)})"
                )
            copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (start, 0))
        return copies[node]

    for node in module.inside:
        needed = [copied(source) for source in node.all_input_nodes]
        assert len(needed) == len(node.all_input_nodes)
        copies[node] = graph.node_copy(node, copied)
    graph.output((copies[module.output.args[0]],))  # type: ignore[index]
    return DenseRegion(fx.GraphModule(gm, graph, class_name=module.name), ctx.options.dense_compiler)
