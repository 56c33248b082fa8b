"""Captures a model's graph through Dynamo and runs the pipeline pass by pass, each result verified as by the driver."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from dmt_compile.backend import compile_graph, copy_graph
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.embedding_graph import EmbeddingGraph
from dmt_compile.ir.metadata import FakeEnvironment
from dmt_compile.ir.pass_base import PassContext, PassReport, calls, placeholders
from dmt_compile.ir.stages import Stage
from dmt_compile.ir.verifier import verify
from dmt_compile.pipeline import passes_in_order
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.session import Passes, plan_for
from dmt_compile.topology import Topology
from tests._tolerances import assert_reordered
from tests.models import DLRM, dense_of, make_batch


@dataclass
class Captured(BaseException):
    """A captured graph, and how far the passes have brought it."""

    gm: fx.GraphModule
    ctx: PassContext
    reports: dict[str, PassReport] = field(default_factory=dict)

    def on(self, topology: str, **options: Any) -> Captured:
        """Return a copy of a graph that no pass has run on, for another topology and other options."""
        parsed = Options.from_mapping({"dense_compiler": "eager", **options})
        ranks = Topology.parse(topology)
        ctx = replace(
            self.ctx,
            options=parsed,
            flat_names=dict(self.ctx.flat_names),  # passes add to them
            parameters=dict(self.ctx.parameters),
            topology=ranks,
            choose_plan=lambda tables: plan_for(parsed, ranks, tables),
            environment=FakeEnvironment(),
            embedding_graph=EmbeddingGraph(),
        )
        gm = copy_graph(self.gm)
        for node in placeholders(gm):
            del node.meta["val"]  # that of another environment
        with torch.set_grad_enabled(ctx.training):
            ctx.begin(gm)
        return Captured(gm, ctx)

    def advance(self, last: str) -> PassReport:
        """Run the passes that have not run yet, up to the one named ``last``, and return its report."""
        with torch.set_grad_enabled(self.ctx.training):
            for step in passes_in_order(self.ctx.options):
                if step.name in self.reports:
                    continue
                self.reports[step.name] = step.run(self.gm, self.ctx)
                self.gm.recompile()
                verify(self.gm, self.ctx, step.gives, step.name)
                if step.name == last:
                    return self.reports[last]
        raise AssertionError(f"{last} is no pass that is still to run")

    def count(self, *targets: Callable[..., Any]) -> int:
        """Return how many nodes call one of ``targets``."""
        return len(calls(self.gm, *targets))

    def node(self, target: Callable[..., Any], index: int = 0) -> fx.Node:
        """Return the ``index``-th node that calls ``target``."""
        return calls(self.gm, target)[index]

    def input(self, flat_name: str) -> fx.Node:
        """Return the graph input of a parameter or buffer."""
        return next(n for n in placeholders(self.gm) if self.ctx.flat_names.get(n.name) == flat_name)

    def code(self) -> str:
        """Return the graph as text, to see whether it changed."""
        return str(self.gm.graph)

    def outputs(self) -> torch.Tensor:
        """Run the graph, from ``normalize_graph`` on, in this process on the batch it was captured for."""
        values = {**self.ctx.parameters, **self.ctx.inputs}
        with torch.set_grad_enabled(self.ctx.training):
            return self.gm(*(values.get(node.name) for node in placeholders(self.gm)))[0]


class _Session:
    """Stops at the first graph, before any pass."""

    options = Options()
    topology = Topology(1, 1)

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, self.options, self)

    def prepare(self, capture: Capture, run: Passes) -> None:
        pass

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        raise AssertionError("no pass runs during a capture")

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        training = torch.is_grad_enabled()
        ctx = PassContext(
            self.options, self.topology, capture.flat_names, capture.parameters, capture.inputs, plan_for, training
        )
        captured = Captured(copy_graph(capture.gm), ctx)
        ctx.begin(captured.gm)
        verify(captured.gm, ctx, Stage.CAPTURED, "capture")
        raise captured

    def dump(self) -> GraphDump | None:
        return None


def capture(model: nn.Module, batch: tuple[Any, ...], training: bool = True) -> Captured:
    """Return the graph that Dynamo hands to the backend for ``model(*batch)``; use it through :meth:`Captured.on`."""
    torch._dynamo.reset()  # numbers that differ from the model before it would be symbols
    with torch.set_grad_enabled(training), pytest.raises(Captured) as raised:
        torch.compile(model, backend=_Session().backend)(*batch)
    return raised.value


def assert_compiled_is_eager(
    model: nn.Module, *batches: tuple[Any, ...], longest_sum: int | None = None, **options: Any
) -> nn.Module:
    """Run ``batches`` forward and backward, compiled for one process and eagerly, and return the compiled model.

    Bitwise the same, or where ``longest_sum`` is given within what another order of that many terms may change.
    """
    torch._dynamo.reset()
    flat, mine = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(mine, backend="dmt", options={"dense_compiler": "eager", **options})
    pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        output, expected = compiled(*batch), flat(*batch)
        pairs.append(("output", output, expected))
        for out in (output, expected):
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    for (name, parameter), theirs in zip(mine.named_parameters(), flat.parameters(), strict=True):
        assert (parameter.grad is None) == (theirs.grad is None), name
        pairs.append((name, parameter, theirs))
        pairs.append((f"gradient of {name}", dense_of(parameter.grad, parameter), dense_of(theirs.grad, theirs)))
    for name, found, wanted in pairs:
        if longest_sum is None:
            assert torch.equal(found, wanted), name
        else:
            assert_reordered(found.detach(), wanted.detach(), longest_sum, gradient="gradient" in name)
    return compiled


@lru_cache
def _dlrm(training: bool) -> Captured:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4))
    return capture(model, make_batch(model, 3, torch.Generator().manual_seed(0)), training)


def dlrm(topology: str = "1x1", training: bool = True, **options: Any) -> Captured:
    """Return the captured graph of a flat DLRM with tables ``emb.0`` to ``emb.2``."""
    return _dlrm(training).on(topology, **options)


def ragged(topology: str) -> tuple[DLRM, list[tuple[Any, ...]]]:
    """Return a flat DLRM of five tables, and a batch for each of up to six ranks: of different sizes, one empty."""
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4, 3, 7))
    sizes = (3, 0, 2, 5, 1, 4)[: Topology.parse(topology).world_size]
    generator = torch.Generator().manual_seed(0)
    return model, [make_batch(model, samples, generator) for samples in sizes]


class Lookups(nn.Module):
    """One ordinary table, and beside it what ``look_up(model, ids, offsets)`` returns; ``odd`` is for its use."""

    def __init__(self, look_up: Callable[..., torch.Tensor], odd: nn.Module | None = None) -> None:
        super().__init__()
        self.plain = nn.EmbeddingBag(6, 4, mode="sum")
        self.odd = odd
        self.look_up = look_up
        self.top = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.top(torch.cat([self.plain(ids, offsets), self.look_up(self, ids, offsets)], dim=1))


def bags() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids below 4 and the offsets of three bags, one of them empty."""
    return torch.tensor([0, 3, 1, 2]), torch.tensor([0, 2, 2])


class Fields(nn.Module):
    """Three fields in one table of 21 rows, and a layer over them."""

    ROWS = (7, 5, 9)

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.Embedding(sum(self.ROWS), 4)
        self.register_buffer("starts", torch.tensor([0, 7, 12]))
        self.top = nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.fields(ids + self.starts).flatten(1))

    @classmethod
    def batch(cls, samples: int = 8, seed: int = 0) -> tuple[torch.Tensor]:
        """Return ids that count from 0 in each field."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.stack([torch.randint(0, rows, (samples,), generator=generator) for rows in cls.ROWS], dim=1),)


@lru_cache
def _fields(training: bool) -> Captured:
    torch.manual_seed(0)
    return capture(Fields(), Fields.batch(), training)


def fields(topology: str = "1x1", training: bool = True, **options: Any) -> Captured:
    """Return the captured graph of a model whose fields share one table."""
    return _fields(training).on(topology, **options)


class Dense(nn.Module):
    """A model without tables."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, dense: torch.Tensor) -> torch.Tensor:
        return self.layer(dense)


def dense(topology: str = "1x1", **options: Any) -> Captured:
    """Return the captured graph of a model without tables."""
    return capture(Dense(), (torch.ones(2, 3),)).on(topology, **options)
