"""Which lookups the Triton kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.tables import ShardedTable

_ROWS = (torch.float32, torch.bfloat16, torch.float16)
_IDS = (torch.int32, torch.int64)


def supports(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: Sequence[Pooling],
    weights: Sequence[torch.Tensor | None] | None = None,
) -> str | None:
    """Return why Triton kernels cannot do these lookups together; ``None`` where they can.

    Args are those of ``batched_lookup``, which may be fake: only types, shapes, strides and devices are looked at.
    """
    weights = [None] * len(tables) if weights is None else weights
    if len({table.device for table in tables}) > 1:
        return "the tables are on several devices"
    if (reason := triton_support.why_not(tables[0].device)) is not None:
        return reason
    for feature in zip(tables, ids, offsets, pooling, weights, strict=True):
        if (reason := _why_not(*feature)) is not None:
            return reason
    return None


def _why_not(table: torch.Tensor, ids: Any, offsets: Any, how: Pooling, weights: Any) -> str | None:
    local = table.local if isinstance(table, ShardedTable) else table
    if local.dtype not in _ROWS:
        return f"rows of {local.dtype}"
    if how.max_norm is not None:
        return "max_norm changes the table before it is read"
    if how.scale_grad_by_freq:
        return "scale_grad_by_freq needs the number of times that an id occurs"
    if ids is None:
        return None
    if ids.dtype not in _IDS or (offsets is not None and offsets.dtype not in _IDS):
        return f"ids of {ids.dtype}"
    if local.shape[1] > 1 and local.stride(1) != 1:
        return "a row's columns are not next to each other"
    if weights is not None and (offsets is None or how.mode != "sum"):
        return "weights of what is not a sum"
    if weights is not None and weights.dtype != local.dtype:
        return f"weights of {weights.dtype} for rows of {local.dtype}"
    return None
