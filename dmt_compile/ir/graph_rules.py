"""Rules that hold for any graph, and for lookups and features; each yields a sentence a breach."""

from __future__ import annotations

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import id_ops, ops, piece_ops
from dmt_compile.ir.metadata import LOOKUP_RULES, describe, same, symbols_of
from dmt_compile.ir.pass_base import (
    PassContext,
    ancestors,
    calls,
    nodes_in,
    origin_of,
    placeholders,
    shares_memory,
    written_by,
)
from dmt_compile.ir.tower_regions import behind_averaging

_LOOKUPS = (ops.lookup, ops.batched_lookup)


def lint(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lint warns of attributes that are no parameters
            gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error).splitlines()[0]


def _known(gm: fx.GraphModule) -> Callable[[Any], bool]:
    """Return what tells the symbols that stem from the graph's inputs; it looks at these once it is asked."""
    symbols = functools.cache(lambda: set().union(*(symbols_of(n.meta.get("val")) for n in placeholders(gm))))
    return lambda symbol: symbol in symbols()


def metadata(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    known = _known(gm)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if "val" not in node.meta:
            yield f"{node.name} has no metadata"
            continue
        if any("val" not in source.meta for source in node.all_input_nodes):
            continue
        if ctx.environment.trusted(node):
            continue
        try:
            with torch.no_grad():  # an in-place operation ran on these values before, autograd would refuse it now
                derived = ctx.environment.derive(node, gm)
        except Exception as error:
            said = [*str(error).splitlines(), type(error).__name__][0]
            yield f"{node.name} does not accept its arguments: {said}"
            continue
        if not same(node.meta["val"], derived, known):
            yield f"{node.name} is recorded as {describe(node.meta['val'])} but gives {describe(derived)}"
        ctx.environment.trust(node)


def parameters(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    names = {node.name for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")}
    for name in ctx.parameters.keys() - names:
        yield f"parameter {ctx.flat_names[name]} lost its graph input {name}"
    flat = [ctx.flat_names[name] for name in ctx.parameters]
    for name in sorted({name for name in flat if flat.count(name) > 1}):
        yield f"flat name {name} belongs to several graph inputs"


def inputs(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    captured, now = ctx.captured_inputs, [node.name for node in placeholders(gm)]
    if now != captured:
        yield f"the inputs are {now}, expected {captured}"


def outputs(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    given = fx.map_arg(_output(gm).args[0], lambda n: n.meta.get("val"))
    if not same(ctx.captured_outputs, given, _known(gm)):
        yield f"the outputs are {describe(given)}, expected {describe(ctx.captured_outputs)}"


def _output(gm: fx.GraphModule) -> fx.Node:
    last: fx.Node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return last


def unshared(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in gm.graph.nodes:
        origins = {origin_of(written, shares_memory).target for written in written_by(node)}
        if origins & {ops.split_features, ex.split_blocks, ops.check_batch}:
            yield f"{node.name} writes in place to what it shares with other features"


def tables(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    inputs = {node.name: node for node in placeholders(gm)}
    for table in ctx.embedding_graph.tables:
        for user in inputs[table.placeholder].users:
            if user.target not in _LOOKUPS:
                yield f"table {table.name} is read by {user.name}, which is no lookup"


def checked(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, *_LOOKUPS):
        read = node.args[1:3]  # the sizes of weights are checked with them
        for source in nodes_in(read):
            origin = source.args[0] if source.target is operator.getitem else source
            if not isinstance(origin, fx.Node) or origin.target not in (ops.check_batch, id_ops.unpack_ids):
                yield f"{node.name} reads {source.name}, which nothing has checked"


def features(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    tables = {table.name: table.placeholder for table in ctx.embedding_graph.tables}
    expected = Counter(tables[feature.table] for feature in ctx.embedding_graph.features)
    read = Counter(table.name for node in calls(gm, *_LOOKUPS) for table in nodes_in(node.args[0]))
    for name in sorted(expected.keys() | read.keys()):
        if expected[name] != read[name]:
            yield f"table {ctx.flat_names[name]} is looked up {read[name]} times, expected {expected[name]}"


def groups(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    bags: dict[fx.Node, Any] = {}
    for node in calls(gm, ops.lookup):
        ids = node.args[1]
        source = ids.args[0] if isinstance(ids, fx.Node) and ids.target is operator.getitem else None
        size = torch_internals.canonical_expression(node.meta["val"].shape[0])
        if isinstance(source, fx.Node) and source.target is ops.check_batch and bags.setdefault(source, size) != size:
            yield f"{node.name} has {size} bags in a group of {bags[source]}"


def one_tower(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for table in ctx.embedding_graph.tables:
        held = [name for tower in ctx.plan.towers for name in tower.tables] if ctx.plan is not None else []
        pieces = ctx.plan is not None and ctx.plan.pieces_of(table.name)  # until split_tables has run
        if not pieces and held.count(table.name) != 1:
            yield f"table {table.name} is in {held.count(table.name)} towers"


def towers(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    tables = {feature.node: feature.table for feature in ctx.embedding_graph.features}
    outputs = Counter(node.args[1] for node in calls(gm, ops.tower_output))
    for node in calls(gm, ops.tower_input):
        features, name = node.args
        for feature in nodes_in(features):
            lookups = nodes_in(feature.args[0]) if feature.target is piece_ops.add_pieces else [feature]
            homes = {ctx.plan.home(tables[n.name]) for n in lookups if ctx.plan is not None and n.name in tables}
            if len(homes) != 1 or {home and home.name for home in homes} != {name}:
                yield f"{node.name} of {name} reads {feature.name}, whose table is in another tower"
        if outputs[name] != 1:
            yield f"{name} has {outputs[name]} outputs"


def fused(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in calls(gm, ops.lookup, ex.join_features):
        yield f"{node.name} was not fused"


def regions(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    operators = [node for node in gm.graph.nodes if node.target in ops.OPERATORS]
    feeding = ancestors([source for node in operators for source in node.all_input_nodes])
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        outside = node in feeding or node in operators or node.target in (*LOOKUP_RULES, operator.getitem)
        if node.op not in ("call_function", "call_method") or outside:
            continue
        if isinstance(value, torch.Tensor) and value.requires_grad:
            dense = [n.name for n in map(behind_averaging, node.all_input_nodes) if n.name in ctx.parameters]
            if dense:
                yield f"{node.name} computes on {dense} outside every dense region"
