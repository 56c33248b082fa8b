"""Look before you leap: the plan and the explanation of what would be compiled, with no process group."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dmt_compile import torch_internals
from dmt_compile.backend import compile_graph, copy_graph
from dmt_compile.capture import Capture
from dmt_compile.config import HOPS, Options
from dmt_compile.cost.id_exchange import id_exchange_of
from dmt_compile.cost.traffic import bytes_per_link
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.inspection.explanation import explanation_text
from dmt_compile.ir.embedding_graph import Interaction, Table, Unmatched
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.pipeline import PassRecord, PipelineReport
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.session import Passes, Session, next_dump, plan_for, world_size
from dmt_compile.topology import Topology


def plan(
    model: nn.Module,
    batch: Any,
    topology: str | Topology = "auto",
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> TowerPlan:
    """Return the tower plan that ``torch.compile(model, backend="dmt")`` would use.

    Args:
        model: flat; may be on the meta device, and needs no process group.
        batch: one local batch: a tuple is positional arguments, anything else the one argument.
        topology: ``"<hosts>x<local ranks>"``, a :class:`Topology`, or ``"auto"`` (the process group; else one rank).
        kwargs: keyword arguments of the model.
        options: as for ``torch.compile(..., options=...)``.

    Raises:
        ConfigError, PlanError: a bad option, or an impossible plan.
    """
    return _capture(model, batch, topology, kwargs, options, Stage.TOWERED).plan


@dataclass(frozen=True)
class Explanation:
    """What was found in a model, what was not and why, the plan, and what would cross each link.

    ``bytes_per_link``: ``{"flat", "sptt" or "sptt+tm": {"intra" or "cross": bytes}}``, per training step, summed over
    all ranks, for the given batch on every rank; ``"sptt+tm"`` with Tower Modules. ``effect``: the strongest effect on
    numbers of the passes that ran.
    """

    plan: TowerPlan
    tables: tuple[Table, ...]
    interaction: Interaction | None
    unmatched: tuple[Unmatched, ...]
    passes: tuple[PassRecord, ...]
    effect: Effect
    batch_size: int
    bytes_per_link: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return explanation_text(self)


def explain(
    model: nn.Module,
    batch: Any,
    topology: str | Topology = "auto",
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Return, printable, what the compiler would do with a model; arguments as for :func:`plan`."""
    captured = _capture(model, batch, topology, kwargs, options, Stage.LOWERED)
    parsed = Options.from_mapping(options)
    records = tuple(
        replace(record, effect=Effect.REORDERED)
        if record.name == "compile_dense_regions" and parsed.dense_compiler != "eager"
        else record
        for record in captured.report.records
    )
    graphs = [ctx.embedding_graph for ctx in captured.contexts]
    return Explanation(
        plan=captured.plan,
        tables=tuple(table for graph in graphs for table in graph.tables),
        interaction=next((graph.interaction for graph in graphs if graph.interaction is not None), None),
        unmatched=tuple(item for graph in graphs for item in graph.unmatched),
        passes=records,
        effect=PipelineReport(records).effect,
        batch_size=captured.batch_size,
        bytes_per_link=bytes_per_link(
            captured.plan,
            captured.batch_size,
            id_exchange_of(parsed.id_exchange, captured.plan),
            {hop: parsed.wire_forms(hop) for hop in HOPS},
        ),
    )


@dataclass(frozen=True)
class _Captured:
    """What the passes found in a model's graphs."""

    contexts: list[PassContext]
    report: PipelineReport
    plan: TowerPlan
    batch_size: int


class _Enough(BaseException):
    """Ends a capture when the model has no further graph; caught by :func:`_capture` alone."""


def _capture(
    model: nn.Module,
    batch: Any,
    topology: str | Topology,
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    until: Stage,
) -> _Captured:
    parsed = Options.from_mapping({**options, "topology": topology})
    session = _CaptureSession(replace(parsed, dense_compiler="eager"), until)
    bare = getattr(model, "_orig_mod", model)
    positional = batch if isinstance(batch, tuple) else (batch,)
    if any(parameter.is_meta for parameter in bare.parameters()):
        positional, kwargs = tree_map(_to_meta, (positional, dict(kwargs or {})))
    buffers = [(buffer, buffer.clone()) for buffer in bare.buffers()]
    try:
        with torch_internals.unlimited_recompiles(), contextlib.suppress(_Enough):
            torch.compile(bare, backend=session.backend)(*positional, **(kwargs or {}))
    finally:
        for buffer, before in buffers if session.ran else ():
            buffer.data.copy_(before)
    return session.result()


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class _CaptureSession(Session):
    """Runs the passes on each of a model's graphs, and no program."""

    def __init__(self, options: Options, until: Stage) -> None:
        self.options = options
        self.until = until
        self.inline_towers = until is not Stage.TOWERED  # a plan needs their widths alone
        ranks = world_size() if options.topology == "auto" else 0
        self.topology = options.resolve_topology(ranks) if ranks else Topology.parse(options.topology)
        self.ran = False
        self._contexts: list[PassContext] = []
        self._reports: list[PipelineReport] = []

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Capture a graph."""
        return compile_graph(gm, self.options, self)

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Change nothing."""

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture | None = None) -> TowerPlan:
        """Plan for the stated topology."""
        return plan_for(self.options, self.topology, tables, capture)

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Stop where no graph can follow; let the model run on in eager mode otherwise."""
        flat = copy_graph(capture.gm)
        ctx, report = run(self.until)
        self._contexts.append(ctx)
        self._reports.append(report)
        self.ran = self.ran or torch_internals.ends_in_graph_break()
        if not self.ran:
            raise _Enough
        return flat

    def result(self) -> _Captured:
        """Return what was found in all graphs together."""
        plans = [ctx.plan for ctx in self._contexts if ctx.plan is not None] or [self.choose_plan(())]
        return _Captured(
            contexts=self._contexts,
            report=PipelineReport.merge(self._reports),
            plan=functools.reduce(TowerPlan.merge, plans),
            batch_size=max((ctx.embedding_graph.batch_size for ctx in self._contexts), default=0),
        )

    def dump(self) -> GraphDump | None:
        """Dump into the user's folder."""
        return next_dump(self.options.dump_dir)
