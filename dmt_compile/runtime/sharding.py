"""Turns a replicated model into a sharded one, in place: rank 0's values, tables cut down to what each rank owns."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dmt_compile import torch_internals
from dmt_compile.errors import CheckpointError, UnsupportedGraphError
from dmt_compile.ir.embedding_graph import Table
from dmt_compile.plan import TowerPlan
from dmt_compile.runtime.tables import Block, ShardedTable
from dmt_compile.runtime.world import ProcessWorld


def block_of(plan: TowerPlan, table: Table, rank: int, model: Any) -> Block:
    """Return the block that ``rank`` holds of the parameter of a table: the shards of all its tables, or no rows.

    Of several column ranges it is the columns from the first to the last, of row ranges that overlap all of their rows:
    a block is one tensor, and each of its rows is there once.
    """
    owned = [shard for _, shard in plan.parts_of(table.parameter_name) if shard.rank == rank]
    columns = [column for shard in owned for column in shard.columns] or [0, table.dim]
    rows: list[tuple[int, int]] = []
    for first, end in sorted({shard.rows for shard in owned}) or [(0, 0)]:
        if rows and first < rows[-1][1]:
            rows[-1] = rows[-1][0], max(end, rows[-1][1])
        else:
            rows.append((first, end))
    return Block(table.parameter_name, tuple(rows), (min(columns), max(columns)), model)


def replicate(tensors: Iterable[torch.Tensor], world: ProcessWorld) -> None:
    """Overwrite dense parameters and buffers with rank 0's, as DDP does when it is built."""
    for tensor in tensors:
        data = tensor.data  # not detach(): an eager part of the first step may have saved a buffer for its backward
        wire = data.contiguous().to(world.device)
        world.broadcast(wire, "initial values")
        data.copy_(wire)


def shard_tables(tables: Sequence[Table], plan: TowerPlan, world: ProcessWorld, model: Any) -> None:
    """Cut table parameters down to this rank's blocks, keeping their identity, gradients, hooks and optimizer state.

    Args:
        tables: whole on entry.
        plan: the agreed plan.
        world: moves rank 0's rows to their owners.
        model: what the tables should remember of their model.

    Raises:
        UnsupportedGraphError: an autograd graph of an earlier step still holds a table.
    """
    optimizers = _living_optimizers()
    pieces: dict[str, list[Table]] = defaultdict(list)
    for table in tables:
        pieces[table.parameter_name].append(table)
    for name, of_parameter in pieces.items():
        parameter = of_parameter[0].parameter
        assert parameter is not None
        whole = parameter.detach()
        for part_name, shard in plan.parts_of(name):
            if shard.rank != 0 and world.rank in (0, shard.rank):
                part = Block(name, (shard.rows,), shard.columns).cut(whole)
                wire = part.contiguous().to(world.device)
                world.move(wire, 0, shard.rank, f"initial rows of {part_name}")
                part.copy_(wire)
        _shard(name, parameter, block_of(plan, of_parameter[0], world.rank, model), optimizers)


def _living_optimizers() -> list[torch.optim.Optimizer]:
    """Return all optimizers there are; of hundreds of thousands of objects, which have a few thousand types."""
    objects = gc.get_objects()
    types = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.optim.Optimizer)}
    return [found for found in objects if type(found) in types] if types else []


def _shard(name: str, parameter: torch.Tensor, block: Block, optimizers: list[torch.optim.Optimizer]) -> None:
    shape, whole, gradient = parameter.shape, parameter.detach(), parameter.grad
    local = block.cut(whole)
    local = local if local.shape == shape else local.clone()
    parameter.grad = None
    replacement = nn.Parameter(ShardedTable(local, shape, block), parameter.requires_grad)
    try:
        torch_internals.swap_in_backward(parameter, partial(torch_internals.swap_contents, parameter, replacement))
    except RuntimeError as error:
        raise UnsupportedGraphError(
            f"sharding: expected table {name} free of earlier autograd graphs, found that {error}; drop the outputs "
            "and losses of earlier eager steps before the first compiled call"
        ) from error
    del replacement
    if gradient is not None and gradient.layout == torch.strided:
        parameter.grad = ShardedTable(block.cut(gradient).clone(), shape, block)
    elif gradient is not None and local.numel():
        parameter.grad = _own_rows(gradient, block)
    of_rows = Block(block.name, block.rows, (0, 1), block.model)  # what RowWiseAdagrad keeps for each row
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            for part, whole_shape in ((block, shape), (of_rows, torch.Size((shape[0], 1)))):
                if isinstance(value, torch.Tensor) and value.shape == whole_shape:
                    optimizer.state[parameter][key] = ShardedTable(part.cut(value).clone(), whole_shape, part)
                    break


def _own_rows(gradient: torch.Tensor, block: Block) -> torch.Tensor:
    """Return a flat sparse gradient without the rows of other ranks."""
    indices, values = gradient._indices(), gradient._values()
    mine_N = torch.stack([(indices[0] >= first) & (indices[0] < end) for first, end in block.rows]).any(0)
    return torch.sparse_coo_tensor(
        indices[:, mine_N], values[mine_N], gradient.shape, is_coalesced=gradient.is_coalesced(), check_invariants=False
    )


_allowed: list[bool] = []


@contextmanager
def sharded_state_allowed() -> Any:
    """Let ``state_dict`` of a sharded model through, for those who gather it."""
    _allowed.append(True)
    try:
        yield
    finally:
        _allowed.pop()


def guard_state_dict(model: nn.Module) -> None:
    """Make ``state_dict`` of every module that holds a sharded table end in an error that says what to call."""
    for module in model.modules():
        if any(isinstance(p, ShardedTable) for p in module.parameters(recurse=False)):
            module.register_state_dict_pre_hook(_refuse_state_dict)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not _allowed and any(isinstance(p, ShardedTable) for p in module.parameters(recurse=False)):
        raise CheckpointError(
            f"checkpoint: expected dmt_compile.full_state_dict(model) for a model whose tables are sharded, found "
            f"state_dict() at '{prefix}'; full_state_dict is a collective call that gives rank 0 the flat model's dict"
        )
