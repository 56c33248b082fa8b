"""Holds a graph to the rules of its stage, after every pass.

A rule is an id, the stage from which it holds, one sentence, and a function that yields what breaks it.
``passes/README.md`` lists them; each has a test that plants the fault.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dmt_compile.errors import VerifyError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.metadata import describe, same, symbols_of
from dmt_compile.ir.pass_base import PassContext, calls, placeholders
from dmt_compile.ir.stages import Stage

_LOOKUPS = (ops.lookup, ops.batched_lookup)
_HOPS = {"ids": "world", "intra": "intra", "peer": "peer"}


@dataclass(frozen=True)
class Rule:
    """A rule of the verifier: ``check`` yields one sentence for each breach."""

    id: str
    since: Stage
    text: str
    check: Callable[[fx.GraphModule, PassContext], Iterator[str]]


def _lint(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lint warns of attributes that are no parameters
            gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error).splitlines()[0]


def _metadata(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    known = set().union(*(symbols_of(n.meta.get("val")) for n in placeholders(gm)), set())
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if "val" not in node.meta:
            yield f"{node.name} has no metadata"
            continue
        if any("val" not in source.meta for source in node.all_input_nodes):
            continue
        values = [id(source.meta["val"]) for source in node.all_input_nodes]
        key = (node.target, node.args, node.kwargs, values, id(node.meta["val"]))
        if node.meta.get("verified") == key:
            continue
        try:
            derived = ctx.environment.derive(node, gm)
        except Exception as error:
            yield f"{node.name} does not accept its arguments: {str(error).splitlines()[0]}"
            continue
        if not same(node.meta["val"], derived, lambda symbol: symbol in known):
            yield f"{node.name} is recorded as {describe(node.meta['val'])} but gives {describe(derived)}"
        node.meta["verified"] = key


def _parameters(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    names = {node.name for node in placeholders(gm)}
    for name in ctx.parameters.keys() - names:
        yield f"parameter {ctx.flat_names[name]} lost its graph input {name}"
    flat = [ctx.flat_names[name] for name in ctx.parameters]
    for name in sorted({name for name in flat if flat.count(name) > 1}):
        yield f"flat name {name} belongs to several graph inputs"


def _tables(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    inputs = {node.name: node for node in placeholders(gm)}
    for table in ctx.embedding_graph.tables:
        for user in inputs[table.placeholder].users:
            if user.target not in _LOOKUPS:
                yield f"table {table.name} is read by {user.name}, which is no lookup"


def _checked(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, *_LOOKUPS):
        read = node.args[1:3]
        for source in _nodes(read):
            origin = source.args[0] if source.target is operator.getitem else source
            if not isinstance(origin, fx.Node) or origin.target not in (ops.check_batch, ex.unpack_ids):
                yield f"{node.name} reads {source.name}, which nothing has checked"


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _one_tower(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for table in ctx.embedding_graph.tables:
        towers = [t.name for t in ctx.plan.towers if table.name in t.tables] if ctx.plan is not None else []
        if len(towers) != 1:
            yield f"table {table.name} is in {len(towers)} towers"


def _placed(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    inputs = {node.name: node for node in placeholders(gm)}
    for table in ctx.embedding_graph.tables:
        shards = inputs[table.placeholder].meta.get("shards")
        if shards is None:
            yield f"table {table.name} has no placement"
        elif ctx.plan is not None and shards != ctx.plan.placements[table.name]:
            yield f"table {table.name} is placed otherwise than the plan says"


def _exchanged(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if ctx.distributed and calls(gm, *_LOOKUPS):
        for node in calls(gm, ops.check_batch):
            yield f"{node.name} reads this rank's samples only"


def _collectives(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    hops: list[str] = []
    for node in calls(gm, ex.all_to_all):
        tensor, _, hop, group, dtype = node.args
        if _HOPS.get(str(hop)) != group:
            yield f"{node.name} sends hop {hop} in group {group}, expected {_HOPS.get(str(hop))}"
        actual = str(tensor.meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        if actual != dtype:
            yield f"{node.name} declares {dtype} on the wire for a tensor of {actual}"
        hops.append(str(hop))
    if hops != sorted(hops, key=list(_HOPS).index) or len(set(hops)) != len(hops):
        yield f"hops are in the order {hops}, expected a part of {list(_HOPS)}, each once"


def _widths(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, ex.layout):
        owners, widths = node.args[2], node.args[3]
        features = ctx.embedding_graph.features
        dims = {table.name: table.dim for table in ctx.embedding_graph.tables}
        if list(widths) != [dims[f.table] for f in features]:  # type: ignore[arg-type]
            yield f"{node.name} splits the columns into {widths}, expected the widths of the features"
        if ctx.plan is not None and list(owners) != [ctx.plan.owner(f.table) for f in features]:  # type: ignore[arg-type]
            yield f"{node.name} sends ids to {owners}, expected the owners of the plan"


def _synchronized(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if not (ctx.distributed and ctx.training):
        return
    tables = {table.placeholder for table in ctx.embedding_graph.tables}
    for node in placeholders(gm):
        if node.name in ctx.parameters and node.name not in tables and node.meta["val"].requires_grad:
            for user in node.users:
                if user.target is not ex.synchronize:
                    yield f"parameter {ctx.flat_names[node.name]} reaches {user.name} without averaging its gradient"


def _fused(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, ops.lookup, ex.join_features):
        yield f"{node.name} was not fused"


def _regions(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in gm.graph.nodes:
        trained = node.op in ("call_function", "call_method") and node.target not in ops.OPERATORS
        value = node.meta.get("val")
        reads = [n for n in node.all_input_nodes if n.target is ex.synchronize or n.op == "placeholder"]
        if trained and node.target is not operator.getitem and isinstance(value, torch.Tensor) and value.requires_grad:
            dense = [n.name for n in reads if n.name in ctx.parameters]
            if dense and not _stays_outside(node):
                yield f"{node.name} computes on {dense} outside every dense region"


def _stays_outside(node: fx.Node) -> bool:
    functions = (torch.nn.functional.embedding_bag, torch.nn.functional.embedding)
    return node.target in functions or any(user.target in ops.OPERATORS for user in node.users)


RULES: tuple[Rule, ...] = (
    Rule("lint", Stage.CAPTURED, "The graph is well formed: nodes stand after their inputs, attributes exist.", _lint),
    Rule("metadata", Stage.CAPTURED, "Each node's recorded shape, dtype and device are those derived anew.", _metadata),
    Rule("parameters", Stage.CAPTURED, "Graph inputs and flat parameter names are one to one.", _parameters),
    Rule("tables", Stage.FLAT, "A table is read by lookups only.", _tables),
    Rule("checked", Stage.FLAT, "Lookups read ids and offsets that were checked.", _checked),
    Rule("one-tower", Stage.TOWERED, "Every table belongs to exactly one tower.", _one_tower),
    Rule("placed", Stage.DISTRIBUTED, "Every table has the placement of the plan.", _placed),
    Rule("exchanged", Stage.DISTRIBUTED, "With several ranks, lookups read the samples of all of them.", _exchanged),
    Rule("collectives", Stage.DISTRIBUTED, "Hops run in order, each once, in their own group and type.", _collectives),
    Rule("widths", Stage.DISTRIBUTED, "Exchanges are laid out by the features' widths and the plan's owners.", _widths),
    Rule("synchronized", Stage.LOWERED, "Every trained dense parameter's gradient is averaged.", _synchronized),
    Rule("fused", Stage.LOWERED, "No lookup is left alone.", _fused),
    Rule("regions", Stage.LOWERED, "Dense computation is inside dense regions.", _regions),
)


def verify(gm: fx.GraphModule, ctx: PassContext, stage: Stage, after: str) -> None:
    """Hold a graph to the rules of ``stage`` and all stages before.

    Raises:
        VerifyError: names the pass, the rule and the first nodes that break it.
    """
    for rule in RULES:
        if stage >= rule.since:
            breaches = list(rule.check(gm, ctx))
            if breaches:
                more = f" (and {len(breaches) - 3} more)" if len(breaches) > 3 else ""
                raise VerifyError(
                    f"{after}: expected stage {stage.name.lower()}, found rule '{rule.id}' broken: "
                    f"{'; '.join(breaches[:3])}{more}. Rule: {rule.text} This is a bug of dmt_compile; dump_dir keeps "
                    "the graph, verify=False goes on without the check"
                )
