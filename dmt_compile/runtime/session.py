"""How a captured graph becomes a program, and the simplest way: one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from dmt_compile import torch_internals
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.stages import Stage
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.program import Program
from dmt_compile.runtime.untrained import watch_optimizers
from dmt_compile.table_names import whole_among
from dmt_compile.topology import Topology
from dmt_compile.towers import NAME, Towers

logger = logging.getLogger(__name__)

Passes = Callable[[Stage], tuple[Any, Any]]  # runs the passes up to a stage; returns their context and report


class Session(Protocol):
    """What the backend asks of its surroundings."""

    topology: Topology
    inline_towers: bool = True  # Dynamo does not see the towers; a module that is traced again keeps them as modules
    rank: int | None = None  # that runs the program; all of them where it is None
    towers: Towers | None = None  # of a model that does not hold its own

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Do what must be true of the model before Dynamo makes its guards."""

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Return the plan for a graph's tables."""

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Lower the graph and return what runs it."""

    def dump(self) -> GraphDump | None:
        """Return where to write the graphs of the next pipeline run."""


_dumped: dict[Path, int] = {}


def next_dump(folder: str | Path | None) -> GraphDump | None:
    """Return a dump in a new numbered folder below ``folder``, one for each graph."""
    if folder is None:
        return None
    path = Path(folder)
    _dumped[path] = _dumped.get(path, -1) + 1
    return GraphDump(path / f"graph{_dumped[path]}")


def plan_for(
    options: Options, topology: Topology, tables: Sequence[TableSpec], capture: Capture | None = None
) -> TowerPlan:
    """Return the user's plan, checked against topology and tables, or a new one.

    ``capture`` tells what else the model has: tables that this graph does not hold, which a user's plan may name, and
    Tower Modules, whose tables stay together without other wishes.

    Raises:
        PlanError: the plan belongs to another model or topology.
    """
    given = options.resolve_plan()
    elsewhere = [] if capture is None else capture.other_tables(tables)
    towers: Towers | None = None if capture is None else getattr(capture.root, NAME, None)
    if given is None:
        partition = options.partition
        held = {name: k for k, names in enumerate(towers.tables.values()) for name in names} if towers else {}
        if towers is not None and partition == "balanced" and all(table.name in held for table in tables):
            partition = [list(names) for names in towers.tables.values()]
        if not isinstance(partition, str):  # tables behind a graph break are planned with their own graph
            others = whole_among([table.name for table in elsewhere], [name for group in partition for name in group])
            partition = [[name for name in group if name not in others] for group in partition]
        return make_plan(tables, topology, partition=partition, **options.planner())
    if (given.topology.hosts, given.topology.local_ranks) != (topology.hosts, topology.local_ranks):
        raise PlanError(
            f"plan: expected a plan for topology {topology}, found one for {given.topology}; make it again with "
            f"dmt_compile.plan(model, batch, topology='{topology}')"
        )
    given.check_tables(tables, elsewhere)
    return given


def compiled_model(compiled: object, asking: str) -> nn.Module:
    """Return the model of which ``torch.compile`` made a compiled module; ``asking``: who wants it, for the error.

    Raises:
        ConfigError: it is no compiled module.
    """
    model = getattr(compiled, "_orig_mod", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{asking}: expected what torch.compile(model, backend='dmt') returned, found {type(compiled).__name__}"
        )
    return model


def world_size() -> int:
    """Return the number of ranks that run this script together.

    Raises:
        ConfigError: torchrun started several, and the script has no process group yet.
    """
    initialised = dist.is_available() and dist.is_initialized()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not initialised:
        raise ConfigError(
            f"launch: expected an initialised process group for WORLD_SIZE={launched}, found none; add "
            "torch.distributed.init_process_group() before the first call of the model"
        )
    return dist.get_world_size() if initialised else 1


def attach_towers(options: Options, capture: Capture, run: Passes) -> None:
    """Give the model its Tower Modules as child ``dmt_towers``, where they are asked for and it has none yet.

    Raises:
        ConfigError: no module that could hold them was compiled.
    """
    plan = options.resolve_plan()
    asked = options.tower_module is not None or (plan is not None and plan.tower_modules is not None)
    if not asked or hasattr(capture.root, NAME):
        return
    towers = run(Stage.TOWERED)[0].towers
    if towers is None:
        return
    if capture.root is None:
        raise ConfigError(
            "towers: expected a module that can hold the Tower Modules' parameters, found a function of tensors alone; "
            "compile the module"
        )
    capture.root.add_module(NAME, towers)
    watch_optimizers(capture.root)


class LocalSession(Session):
    """One process: nothing is sharded."""

    def __init__(self, options: Options, topology: Topology) -> None:
        self.options = options
        self.topology = topology

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Attach Tower Modules."""
        attach_towers(self.options, capture, run)

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Plan one rank."""
        return plan_for(self.options, self.topology, tables, capture)

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Lower the graph for this process."""
        ctx, report = run(Stage.LOWERED)
        note_without_tables(ctx)
        guard_towers(ctx)
        return Program(capture.gm, report, None)

    def dump(self) -> GraphDump | None:
        """Dump into the user's folder."""
        return next_dump(self.options.dump_dir)


def guard_towers(ctx: Any) -> None:
    """Let a program that holds a model's Tower Modules serve that model alone, not others of its class."""
    if ctx.towers is not None and any(name.startswith(NAME) for name in ctx.parameters):
        torch_internals.guard_identity(ctx.root)


def note_without_tables(ctx: Any) -> None:
    """Say that a graph has no table, so that only the dense compiler works on it."""
    if not ctx.embedding_graph.tables:
        logger.warning(
            "dmt: found no embedding table in this graph; %s compiles it as one dense region",
            ctx.options.dense_compiler,
        )
