"""One rank of a ``torch.distributed`` run: plan once, shard, keep replicas equal.

A model is planned at its first graph, keyed by the identity of its parameters; later graphs of the same model
(evaluation, another grad mode, the part after a graph break) find it sharded and communicate nothing but their steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dmt_compile import torch_internals
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.errors import DmtError, UnsupportedGraphError
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.embedding_graph import Table
from dmt_compile.ir.metadata import LOOKUP_RULES
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Stage
from dmt_compile.ir.tower_regions import held_by_one_group
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.agreement import agree, describe_options, signature
from dmt_compile.runtime.prefetch import Ahead, RanksAhead
from dmt_compile.runtime.program import Program
from dmt_compile.runtime.session import (
    Passes,
    Session,
    attach_towers,
    next_dump,
    note_without_tables,
    plan_for,
)
from dmt_compile.runtime.sharding import guard_state_dict, replicate, shard_tables
from dmt_compile.runtime.tables import ShardedTable
from dmt_compile.runtime.world import ProcessWorld
from dmt_compile.topology import Topology

CHECKSUM_EVERY = 64  # steps; a replica that drifts is reported by then
COMPILING_CALLS = 2  # of a program; its first backward pass still compiles
COMPILE_SKEW = 10  # how much longer than this one another rank may compile, with its caches cold
_LOCAL_OPTIONS = ("dump_dir",)  # may differ between ranks


@dataclass
class ModelState:
    """What the ranks agreed on for one model, and what its programs do about dense parameters.

    ``synchronized``: those whose gradients a program averages over all ranks. ``towers``: the tower group of a Tower
    Module's parameters and buffers, whose ranks alone run and train it. Both by identity.
    """

    plan: TowerPlan
    world: ProcessWorld
    synchronized: dict[int, torch.Tensor] = field(default_factory=dict)
    towers: dict[int, int] = field(default_factory=dict)
    hooks: dict[int, Any] = field(default_factory=dict)
    steps: int = 0
    ahead: RanksAhead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        return self  # a copied model keeps its place among the ranks

    def leader(self, tensor: torch.Tensor) -> int | None:
        """The first rank of those that alone hold a Tower Module's parameter or buffer; ``None`` for any other."""
        group = self.towers.get(id(tensor))
        return None if group is None else group * self.plan.tower_groups().local_ranks

    def ranks_ahead(self) -> RanksAhead:
        """Return the ranks for collectives that distribute ids ahead."""
        if self.ahead is None:
            self.ahead = RanksAhead(self.world)
        return self.ahead

    def checksum(self) -> int:
        """Return a number that is equal on all ranks as long as the dense replicas are; 0 in most steps."""
        self.steps += 1
        if self.steps % CHECKSUM_EVERY:
            return 0
        self.world.settle(False)
        total = 0
        for parameter in self.synchronized.values():
            words = parameter.detach().contiguous().view(-1).view(torch.uint8)
            total += int(words.sum(dtype=torch.int64))
        return total


def state_of(tensor: torch.Tensor) -> ModelState | None:
    """Return the state of the model that a parameter or buffer belongs to."""
    if isinstance(tensor, ShardedTable):
        return cast("ModelState | None", tensor.block.model)
    # An attribute, not a table of weak references: those would forbid `.to()` to swap parameters.
    return getattr(tensor, "_dmt_state", None)


class DistributedSession(Session):
    """One rank of a ``torch.distributed`` run.

    Args:
        options: as the user passed them. An error in them is raised where all ranks meet, so that none waits.
    """

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self.options = Options()
        self.rank = dist.get_rank()
        self.topology = Topology(1, dist.get_world_size())
        self._failure: DmtError | None = None
        self._agreed: TowerPlan | None = None
        self._started = time.monotonic()
        try:
            self.options = Options.from_mapping(options)
            self.topology = self.options.resolve_topology(dist.get_world_size())
        except DmtError as error:
            self._failure = error

    def prepare(self, capture: Capture, run: Passes) -> None:
        """At a model's first graph: agree on the plan, take over rank 0's values, shard the tables."""
        state = next((s for s in map(state_of, capture.parameters.values()) if s is not None), None)
        if state is not None and self._failure is None and not _reads_whole_tables(capture):
            return
        specs: tuple[TableSpec, ...] = ()
        tables: list[Table] = []
        if self._failure is None:
            try:
                graph = run(Stage.FLAT)[0].embedding_graph
                tables = [table for table in graph.tables if not isinstance(table.parameter, ShardedTable)]
                names = {table.name for table in tables}
                specs = tuple(spec for spec in graph.table_specs() if spec.name in names)
            except DmtError as error:
                self._failure = error
        if state is not None and not tables:
            if self._failure is not None:
                raise self._failure
            return
        plan = self._agree(capture, specs)
        if state is None:
            groups = plan.tower_groups()
            mine = groups.host_of(dist.get_rank())
            towers = [tower.name for tower in plan.towers if tower.hosts[0] // len(tower.hosts) == mine]
            world = ProcessWorld(self.topology, groups, self.options.first_timeout_s, towers)
            state = ModelState(plan, world)
        else:
            state.plan = state.plan.merge(plan)
        self._agreed = state.plan
        attach_towers(self.options, capture, run)
        self._take_over(capture, state, tables)

    def _agree(self, capture: Capture, specs: tuple[TableSpec, ...]) -> TowerPlan:
        def mine() -> str:
            if self._failure is not None:
                raise self._failure
            options = {k: v for k, v in asdict(self.options).items() if k not in (*_LOCAL_OPTIONS, "plan")}
            given = self.options.resolve_plan()
            options["plan"] = None if given is None else given.fingerprint
            return signature(specs, describe_options(options), _shapes(capture.outer))

        return agree(
            lambda: plan_for(self.options, self.topology, specs, capture),
            mine,
            self.options.first_timeout_s,
        )

    def _take_over(self, capture: Capture, state: ModelState, tables: list[Table]) -> None:
        model = capture.outer
        everything = [] if model is None else [*model.parameters(), *model.buffers()]
        own = {id(table.parameter) for table in tables}
        fresh = [t for t in everything if id(t) not in own and state_of(t) is None and not isinstance(t, ShardedTable)]
        replicate(fresh, state.world)
        shard_tables(tables, state.plan, state.world, state)
        for tensor in fresh:
            tensor._dmt_state = state  # type: ignore[attr-defined]
        if model is not None:
            guard_state_dict(model)

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Return the plan that the ranks agreed on."""
        return self._state(capture).plan if self._agreed is None else self._agreed

    def _state(self, capture: Capture) -> ModelState:
        return next(state for state in map(state_of, capture.parameters.values()) if state is not None)

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Lower the graph for this rank."""
        ctx, report = run(Stage.LOWERED)
        note_without_tables(ctx)
        if not capture.parameters:
            return Program(capture.gm, report, None)
        if ctx.root is not None:  # ranks, ledger, buffers and replicas of a program are one model's
            torch_internals.guard_identity(ctx.root)
        state = self._state(capture)
        of_towers = held_by_one_group(capture.gm, ctx)
        state.towers.update({id(ctx.parameters[node.name]): group for node, group in of_towers.items()})
        if ctx.training:
            averaged = {
                id(p): p
                for p in ctx.parameters.values()
                if p.requires_grad and not isinstance(p, ShardedTable) and id(p) not in state.towers
            }
            state.synchronized.update(averaged)
            _hook_others(capture.outer, state)
        outside = _buffers_outside(capture) if ctx.training and ctx.embedding_graph.tables else []
        limit_s = self._limit(first=state.steps == 0)
        ahead = Ahead(capture.sources, state.ranks_ahead, state.checksum)
        return Program(capture.gm, report, state.world, state.checksum, outside, limit_s, ahead)

    def _limit(self, first: bool) -> Callable[[int], float]:
        """Return how long a program waits in its n-th call: longer while ranks compile, each in its own time."""
        options, compiling_s = self.options, time.monotonic() - self._started
        compiled_s = min(options.first_timeout_s, max(options.timeout_s, COMPILE_SKEW * compiling_s))
        early_s = options.first_timeout_s if first else compiled_s
        return lambda call: early_s if call <= COMPILING_CALLS else options.timeout_s

    def dump(self) -> GraphDump | None:
        """Dump into a folder of this rank's own."""
        folder = self.options.dump_dir
        return None if folder is None else next_dump(f"{folder}/rank{dist.get_rank()}")


def _shapes(model: nn.Module | None) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and element type of all parameters and buffers."""
    tensors = [] if model is None else [*model.named_parameters(), *model.named_buffers()]
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]


def _reads_whole_tables(capture: Capture) -> bool:
    """Tell whether a lookup of this graph reads a table that is not sharded yet."""
    lookups = calls(capture.gm, *LOOKUP_RULES)
    weights = [str(node.args[1] if len(node.args) > 1 else node.kwargs["weight"]) for node in lookups]
    return any(not isinstance(capture.parameters.get(name), ShardedTable) for name in weights)


def _hook_others(model: nn.Module | None, state: ModelState) -> None:
    """Average the gradients of dense parameters that no program holds: before, between or after compiled parts."""
    for parameter in () if model is None else model.parameters():
        key = id(parameter)
        if key in state.synchronized:
            if key in state.hooks:
                state.hooks.pop(key).remove()
        elif key in state.towers or isinstance(parameter, ShardedTable):
            continue
        elif parameter.requires_grad and key not in state.hooks:
            average = functools.partial(_average, world=state.world)
            state.hooks[key] = parameter.register_post_accumulate_grad_hook(average)


def _buffers_outside(capture: Capture) -> list[torch.Tensor]:
    """Return floating-point buffers that this graph does not hold; the program with the lookups keeps them equal."""
    held = {id(tensor) for tensor in capture.parameters.values()}
    buffers = [] if capture.outer is None else capture.outer.buffers()
    return [buffer for buffer in buffers if id(buffer) not in held and buffer.is_floating_point()]


def _average(parameter: torch.Tensor, world: ProcessWorld) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise UnsupportedGraphError(
            f"sync_dense_gradients: expected a dense gradient for a parameter of shape {tuple(parameter.shape)} "
            "outside the compiled graph, found a sparse one; use sparse=False there, or compile that part too"
        )
    world.start_all_reduce(gradient, "average of a gradient outside the compiled graph").wait()
    gradient /= world.topology.world_size
