"""Gathers a sharded model's state under the flat model's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmt_compile.errors import CheckpointError
from dmt_compile.plan import parameter_of
from dmt_compile.runtime.distributed_session import ModelState, state_of
from dmt_compile.runtime.sharding import sharded_state_allowed
from dmt_compile.runtime.tables import ShardedTable


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the flat model's state dict: full tensors under the flat names.

    Args:
        model: the model, or what ``torch.compile`` returned for it.

    Returns:
        On rank 0 (and in one process) a dict that ``load_state_dict`` of the plain flat model takes; tables on the CPU.
        ``{}`` on the other ranks. Tower Modules come beside it, as ``dmt_towers.*``.

    Raises:
        CheckpointError: a table is sharded by another model's plan.

    Cost: a collective call; moves every table to rank 0 once, one at a time.
    """
    bare = getattr(model, "_orig_mod", model)
    with sharded_state_allowed():
        values = bare.state_dict(keep_vars=True)
    values = {name.replace("_orig_mod.", ""): value for name, value in values.items()}
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
    states = [state for state in map(state_of, tensors) if state is not None]
    if not states:
        return {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    rank = states[0].world.rank
    full: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, ShardedTable):
            gathered = _gather(value)
        elif isinstance(value, torch.Tensor):
            gathered = _from_tower(states[0], name, value)
        else:
            gathered = value
        if rank == 0:
            full[name] = gathered
    return full


def _from_tower(state: ModelState, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return, on rank 0, what a Tower Module's own ranks have; anything else as it is."""
    leader = state.leader(value)
    if not leader:
        return value.detach()
    wire = value.detach().to(state.world.device, copy=True)
    state.world.move(wire, leader, 0, f"gathering {name}")
    return wire.to(value.device)


def _gather(table: ShardedTable) -> torch.Tensor | None:
    state = state_of(table)
    if state is None:
        raise CheckpointError(
            f"checkpoint: expected table {table.block.name} as the program that sharded it left it, found a copy; call "
            "full_state_dict on the compiled model"
        )
    world, block = state.world, table.block
    full = torch.empty(table.shape, dtype=table.dtype) if world.rank == 0 else None
    for name, shards in state.plan.placements.items():
        parameter, first_row = parameter_of(name)
        for shard in shards if parameter == block.name else ():
            rows = (first_row + shard.rows[0], first_row + shard.rows[1])
            if shard.rank == world.rank:
                start = block.local_row(rows[0])
                wire = table.local[start : start + rows[1] - rows[0]].contiguous().to(world.device)
            else:
                shape = (rows[1] - rows[0], shard.columns[1] - shard.columns[0]) if full is not None else (0, 0)
                wire = torch.empty(shape, dtype=table.dtype, device=world.device)
            if shard.rank != 0:
                world.move(wire, shard.rank, 0, f"gathering {name}")
            if full is not None:
                full[rows[0] : rows[1], shard.columns[0] : shard.columns[1]] = wire.cpu()
    return full
