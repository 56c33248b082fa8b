"""The meaning of the batched lookup in plain PyTorch: every feature's ``embedding_bag``, side by side.

Shape suffixes: B bags, N ids, D width of a feature, W sum of the widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Pooling:
    """How a feature's bags are pooled: ``mode`` sum, mean or max; whether its gradient is sparse; its padding row."""

    mode: str
    sparse: bool
    padding_idx: int | None = None


def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    pooling: Sequence[Pooling],
) -> torch.Tensor:
    """Return the pooled features side by side.

    Args:
        tables: per feature (rows, D), one dtype.
        ids: per feature (N,) int32 or int64.
        offsets: per feature (B,) of the ids' dtype.
        pooling: per feature.

    Returns:
        (B, W) of the tables' dtype.
    """
    return torch.cat(
        [
            F.embedding_bag(i, t, o, mode=p.mode, sparse=p.sparse, padding_idx=p.padding_idx)
            for t, i, o, p in zip(tables, ids, offsets, pooling, strict=True)
        ],
        dim=1,
    )
