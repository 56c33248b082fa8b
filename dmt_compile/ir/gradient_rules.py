"""Rules for the gradients of graphs that several ranks run; each yields a sentence a breach."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, weight_ops
from dmt_compile.ir.pass_base import PassContext, calls, nodes_in
from dmt_compile.runtime.averaging import Reduction


def scaled(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    ranks = ctx.topology.world_size
    averaged = {user for node in calls(gm, gradient_ops.start_gradients) for user in node.users}
    for node in calls(gm, gradient_ops.scale_gradient):
        of_weights = isinstance(node.args[0], fx.Node) and node.args[0].target is weight_ops.pack_weights
        of_towers = node.args[0] in averaged and {user.target for user in node.users} == {ex.run_towers}
        expected = float(ranks) if of_weights or of_towers else 1 / ranks
        if node.args[1] != expected:
            yield f"{node.name} scales its gradient by {node.args[1]}, expected {expected}"
    for node in calls(gm, ex.split_blocks):
        expected = 1 / ranks if ctx.training else 1.0
        if node.args[3] != expected:
            yield f"{node.name} scales its gradient by {node.args[3]}, expected {expected}"


def averaged_once(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    waits = calls(gm, gradient_ops.wait_gradients)
    times = Counter(n.name for node in waits for n in nodes_in(node.args[0]))
    for name, number in times.items():
        if number > 1:
            yield f"the gradient of {ctx.flat_names.get(name, name)} is averaged {number} times"


def started_and_waited(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    starts, waits = calls(gm, gradient_ops.start_gradients), calls(gm, gradient_ops.wait_gradients)
    for averaging in calls(gm, gradient_ops.averaging):
        reduction: Any = averaging.args[0]
        own = [wait for wait in waits if wait.args[1] is averaging]
        if len(own) != 1:
            yield f"{averaging.name} is waited for {len(own)} times, expected 1"
        begun = Counter(start.args[2] for start in starts if start.args[1] is averaging)
        for bucket in range(len(reduction.buckets)):
            if begun[bucket] != 1:
                yield f"bucket {bucket} of {averaging.name} is started {begun[bucket]} times, expected 1"
        for wait in own:
            yield from _in_buckets(wait, reduction)
    for start in starts:
        waited: Any = start.args[0]
        if waited.target is not gradient_ops.wait_gradients:
            yield f"{start.name} reads {waited.name}, which does not wait for gradients"
        elif waited.args[1] is not start.args[1]:
            yield f"{start.name} starts what {waited.name} does not wait for"
    for wait in waits:
        for user in wait.users:
            if user.target is not gradient_ops.start_gradients:
                yield f"{user.name} reads what waits for gradients that it does not start"


def _in_buckets(wait: fx.Node, reduction: Reduction) -> Iterator[str]:
    parameters = nodes_in(wait.args[0])
    if len(parameters) != sum(reduction.buckets):
        yield f"{wait.name} holds {len(parameters)} parameters, its buckets {sum(reduction.buckets)}"
    for bucket in range(len(reduction.buckets)):
        types = {str(node.meta["val"].dtype) for node in parameters[reduction.span(bucket)]}
        if len(types) > 1:
            yield f"bucket {bucket} of {wait.name} holds {' and '.join(sorted(types))}"


_BEFORE_WAITS = (gradient_ops.averaging, gradient_ops.wait_gradients, gradient_ops.broadcast_buffers, operator.getitem)


def waited_last(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    earlier = None
    for node in gm.graph.nodes:
        if node.target is gradient_ops.wait_gradients and earlier is not None:
            yield f"{node.name} stands behind {earlier.name}, so that its backward waits before that of {earlier.name}"
        if node.op not in ("placeholder", "get_attr") and node.target not in _BEFORE_WAITS:
            earlier = node if earlier is None else earlier


def synchronized(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if not (ctx.distributed and ctx.training):
        return
    tables = {table.placeholder for table in ctx.embedding_graph.tables}
    for node in gm.graph.nodes:
        held = node.op in ("placeholder", "get_attr") and node.name in ctx.parameters and node.name not in tables
        for user in node.users if held and node.meta["val"].requires_grad else ():
            if user.target is not gradient_ops.wait_gradients:
                yield f"parameter {ctx.flat_names[node.name]} reaches {user.name} without averaging its gradient"
