"""Process groups: their store, and collectives whose names differ between versions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store


def default_store() -> Store:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def all_gather_single(gathered: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Start to gather equal parts into one tensor."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the old name until torch 2.12
    return gather(gathered, part, group=group, async_op=True)
