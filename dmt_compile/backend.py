"""The Dynamo backend ``"dmt"``: options in, program out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.capture import Capture, dynamic_dims, read_capture
from dmt_compile.config import Options
from dmt_compile.ir.metadata import LOOKUP_RULES, equal_sizes, is_plain_lookup
from dmt_compile.ir.pass_base import PassContext, placeholders
from dmt_compile.ir.stages import Stage
from dmt_compile.pipeline import run_pipeline
from dmt_compile.runtime.distributed_session import DistributedSession
from dmt_compile.runtime.session import LocalSession, Session, world_size
from dmt_compile.towers import NAME


def dmt(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph; ``torch.compile(model, backend="dmt", options={...})`` calls this.

    Args:
        gm: Dynamo's graph.
        example_inputs: unused; the graph's inputs carry the real values.
        options: see :class:`dmt_compile.config.Options`.
        mode: unused, accepted because ``torch.compile`` passes it on.

    Raises:
        DmtError: see its subclasses.
    """
    if world_size() > 1:
        session = DistributedSession(options)
        return compile_graph(gm, session.options, session)
    parsed = Options.from_mapping(options)
    return compile_graph(gm, parsed, LocalSession(parsed, parsed.resolve_topology(1)))


def compile_graph(gm: fx.GraphModule, options: Options, session: Session) -> Callable[..., Any]:
    """Take a graph that Dynamo captured to a program of ``session``.

    Two things must be true before Dynamo makes its guards. Sizes of the batch are dynamic: where one is not yet, it is
    marked here and Dynamo analyses the frame again. Tables are sharded: the session does so at the model's first graph,
    whose guards then hold for the parameters as they are from there on.
    """
    capture = read_capture(gm)
    unmarked = {
        name: missing
        for name, dims in dynamic_dims(gm, capture).items()
        if (missing := set(dims) - set(torch_internals.marked_dims(capture.inputs[name])))
    }
    if unmarked:
        empty = not any(tensor.numel() for tensor in capture.inputs.values())
        for name, dims in unmarked.items():
            torch_internals.mark_dynamic_dims(capture.inputs[name], sorted(dims), empty)
        torch_internals.restart_analysis("dmt: sizes of the batch are dynamic")
    session.prepare(capture, lambda until: run_passes(copy_graph(gm), capture, options, session, until))
    torch_internals.take_back_marks()
    fakes = {node.name: node.meta["example_value"] for node in placeholders(gm)}
    program = session.program(capture, lambda until: run_passes(gm, capture, options, session, until))
    torch_internals.drop_needless_guards([[fakes[name] for name in names] for names in capture.checked])
    return program


def _early_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return what is most likely dynamic: ids and offsets of one feature, and samples; :func:`dynamic_dims` knows."""
    return (0,) if tensor.ndim else ()


def _is_ours(backend: Any) -> bool:
    return backend is dmt or hasattr(getattr(backend, "__self__", None), "choose_plan")  # or a session's own backend


torch_internals.mark_before_tracing(_is_ours, _early_dims)
for _lookup, _rule in LOOKUP_RULES.items():
    torch_internals.trace_by_rule(_lookup, _rule, is_plain_lookup, equal_sizes)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy that can be rewritten; parameters and metadata values are shared."""
    graph = fx.Graph()
    copied = graph.graph_copy(gm.graph, {})
    graph.output(copied)
    return fx.GraphModule(gm, graph)


def run_passes(
    gm: fx.GraphModule, capture: Capture, options: Options, session: Session, until: Stage
) -> tuple[PassContext, Any]:
    """Run the passes up to ``until`` and return what they shared, with the report."""
    ctx = PassContext(
        options=options,
        topology=session.topology,
        flat_names=dict(capture.flat_names),
        parameters=dict(capture.parameters),
        inputs=capture.inputs,
        choose_plan=lambda tables: session.choose_plan(tables, capture),
        training=torch.is_grad_enabled(),
        root=capture.root,
        towers=getattr(capture.root, NAME, session.towers),
        inline_towers=session.inline_towers,
        rank=session.rank,
    )
    dump = session.dump() if until is Stage.LOWERED else None
    report = run_pipeline(gm, ctx, until, dump)
    capture.checked = ctx.embedding_graph.checked_inputs
    return ctx, report
