"""Run a model and look at its features on the way: the compiler's own front end, up to the flat graph, with taps.

Shape suffixes: B samples, L vectors of one sample, D width, W columns, H hidden units, V joined vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from dmt_compile.backend import compile_graph
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.errors import ConfigError
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.embedding_graph import Feature
from dmt_compile.ir.joins import Family, NoFamily, find_family
from dmt_compile.ir.pass_base import PassContext, name_of
from dmt_compile.ir.stages import Stage
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.session import Passes, Session
from dmt_compile.topology import Topology

# The place of the input and of the weight, and whether the weight is (in, out).
_LINEAR = {"linear": (0, 1, False), "addmm": (1, 2, True), "mm": (0, 1, True), "matmul": (0, 1, True)}


@dataclass
class Reader:
    """What reads joined features first, in one forward pass.

    Args:
        kind: ``"linear"`` (a linear layer on their concatenation), ``"cross"`` (the same, and its units are multiplied
            with what they read), or ``"pairs"`` (dot products of all pairs).
        parts: the feature and the width of each part of the join, in order; ``None`` for the dense part.
        units: (B, H), or (B, V, V) for pairs; the model goes on with exactly this tensor.
        inputs: (B, W) and ``weight`` (H, W), both ``None`` for pairs.
    """

    kind: str
    parts: tuple[tuple[str | None, int], ...]
    units: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    weight: torch.Tensor | None = None


@dataclass
class Probe(Session):
    """One model under observation; what it holds is that of the last forward pass.

    Args:
        output: takes the score (B,) from what the model returns; ``None`` takes its first floating tensor.
    """

    output: Callable[[Any], torch.Tensor] | None = None
    topology: Topology = field(default_factory=lambda: Topology(1, 1))
    features: dict[str, Feature] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    _options: Options = field(default_factory=lambda: Options(dense_compiler="eager"))
    _looked_up: dict[str, torch.Tensor] = field(default_factory=dict)
    _joined: dict[str, torch.Tensor] = field(default_factory=dict)
    _given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def run(self, call: Callable[[], Any], given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Run the model and return its score (B,), summed over further outputs of a sample.

        Args:
            call: runs the model on a batch.
            given: lookups' results to go on with instead of the model's own.

        Raises:
            ConfigError: no output has a value for each sample.
        """
        self._given = given or {}
        returned = call()
        self._given = {}
        if self.output is not None:
            returned = self.output(returned)
        samples = self.samples
        for value in tree_leaves(returned):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (samples,):
                return value if value.ndim == 1 else value.flatten(1).sum(dim=1)
        raise ConfigError(
            f"interactions: expected a floating output of {samples} samples, found none among the model's outputs; "
            "pass output=, a function that takes the scores from what the model returns"
        )

    @property
    def samples(self) -> int:
        """Samples of the last batch: rows of a feature with one vector a sample, else the fewest rows of one."""
        rows = {name: len(value) for name, value in self._looked_up.items()}
        single = [rows[name] for name, feature in self.features.items() if name in rows and feature.bags == 1.0]
        return single[0] if single else min(rows.values(), default=0)

    def lookups(self) -> dict[str, torch.Tensor]:
        """Return each feature's looked-up vectors (B, L, D); features whose samples differ in L are left out."""
        samples = self.samples
        return {
            name: value.reshape(samples, -1, value.shape[1])
            for name, value in self._looked_up.items()
            if samples and len(value) % samples == 0
        }

    def vectors(self) -> dict[str, torch.Tensor]:
        """Return one vector a sample and feature (B, D): as looked up, or after a projection of its own.

        The latter where the compiler finds what joins the features (:func:`dmt_compile.ir.joins.find_family`). Several
        vectors of a sample (a sequence used before it is pooled) count as their mean.
        """
        found = {name: value.mean(dim=1) for name, value in self.lookups().items()}
        joined = {name: value.flatten(1) for name, value in self._joined.items() if len(value) == self.samples}
        return {name: joined.get(name, value).detach() for name, value in found.items()}

    # ---------------------------------------------------------------------------------------------------- the session

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Capture a graph."""
        return compile_graph(gm, self._options, self)

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Change nothing."""

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Plan one rank."""
        return make_plan(tables, self.topology)

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Tap the flat graph."""
        gm = capture.gm
        ctx, _ = run(Stage.FLAT)
        self.features |= {feature.name: feature for feature in ctx.embedding_graph.features}
        nodes = {node.name: node for node in gm.graph.nodes}
        try:
            self._tap_joins(gm, find_family(gm, ctx), ctx)
        except NoFamily as reason:
            self.unread.append(str(reason))
        for feature in ctx.embedding_graph.features:
            _tap(gm, nodes[feature.node], self._switch(feature.name))
        gm.recompile()
        return gm

    def dump(self) -> GraphDump | None:
        """Write nothing."""
        return None

    def _switch(self, name: str) -> Callable[..., torch.Tensor]:
        def tap(value: torch.Tensor) -> torch.Tensor:
            self._looked_up[name] = value.detach()
            given = self._given.get(name)
            return value if given is None else given.reshape(value.shape)

        return tap

    def _tap_joins(self, gm: fx.GraphModule, family: Family, ctx: PassContext) -> None:
        readers: list[tuple[Reader, fx.Node, tuple[fx.Node, ...]]] = []
        for operand, parts in family.operands.items():
            sizes = tuple((part.feature, int(part.node.meta["val"].shape[-1])) for part in parts)
            if operand in family.pairs:
                readers.append((Reader("pairs", sizes), family.pairs[operand].product, ()))
            for user in operand.users if operand.meta["val"].ndim == 2 else ():
                if name_of(user) in _LINEAR and (found := _linear(user, operand, ctx)) is not None:
                    kind = "cross" if _is_cross(user, operand) else "linear"
                    readers.append((Reader(kind, sizes), user, (operand, found)))
        first = next(iter(family.operands.values()))
        for part in {part.feature: part for part in first if part.feature is not None}.values():
            _tap(gm, part.node, self._record(str(part.feature)))
        for reader, node, sources in readers:
            _tap(gm, node, self._read(reader, name_of(node)), sources)
        self.readers = [reader for reader, *_ in readers] or self.readers
        if not readers:
            self.unread.append("no linear layer reads the joined features, and no dot products of all pairs follow")

    def _record(self, name: str) -> Callable[..., torch.Tensor]:
        def tap(value: torch.Tensor) -> torch.Tensor:
            self._joined[name] = value.detach()
            return value

        return tap

    def _read(self, reader: Reader, name: str) -> Callable[..., torch.Tensor]:
        def tap(
            units: torch.Tensor, inputs: torch.Tensor | None = None, weight: torch.Tensor | None = None
        ) -> torch.Tensor:
            reader.units = units.detach().requires_grad_(torch.is_grad_enabled())
            if inputs is not None and weight is not None:
                reader.inputs = inputs.detach()
                reader.weight = weight.detach().T if _LINEAR[name][2] else weight.detach()
            return reader.units

        return tap


class _Tap(nn.Module):
    """A call in a graph that sees a value and gives the one to go on with."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return what the graph goes on with."""
        return self.function(*values)


def _tap(
    gm: fx.GraphModule, node: fx.Node, function: Callable[..., torch.Tensor], sources: tuple[fx.Node, ...] = ()
) -> None:
    name = f"tap_{sum(1 for _ in gm.children())}"
    gm.add_submodule(name, _Tap(function))
    users = list(node.users)
    with gm.graph.inserting_after(node):
        tap = gm.graph.call_module(name, (node, *sources))
    for user in users:
        user.replace_input_with(node, tap)


def _linear(node: fx.Node, operand: fx.Node, ctx: PassContext) -> fx.Node | None:
    """Return the weight of a layer that reads a join; ``None`` where it reads something else, or with no parameter."""
    at_input, at_weight, _ = _LINEAR[name_of(node)]
    if len(node.args) <= at_weight or node.args[at_input] is not operand:
        return None
    weight = node.args[at_weight]
    known = isinstance(weight, fx.Node) and weight.name in ctx.parameters and weight.meta["val"].ndim == 2
    return weight if known else None  # type: ignore[return-value]


def _is_cross(node: fx.Node, operand: fx.Node) -> bool:
    """Tell whether a layer's units are multiplied one by one with what it reads."""
    same = tuple(node.meta["val"].shape[1:]) == tuple(operand.meta["val"].shape[1:])
    return same and any(name_of(user) in {"mul", "multiply"} and operand in user.args for user in node.users)
