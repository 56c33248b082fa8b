"""The meaning of the batched lookup in plain PyTorch: every feature's ``embedding`` or ``embedding_bag``, side by side.

Shape suffixes: B bags, N ids, D width of a feature, W sum of the widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Pooling(NamedTuple):
    """How one lookup reads its table and pools its bags.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"`` of a bag's rows; ``"none"`` for one id a bag, whose row it gives.
        sparse: the table's gradient is sparse.
        padding_idx: row without a gradient, left out of its bag; ``None`` for none.
        padding_counts: the padding row is read like any other, as ``embedding`` does, and only has no gradient.
        max_norm: rows that are looked up are first scaled down to this ``norm_type``-norm, in the table.
        norm_type: see ``max_norm``.
        scale_grad_by_freq: the gradient of a row is divided by how often its id occurs in this lookup.
        field_rows: (first, end) of the table's rows that this lookup may read; ``None`` for all.
        last_offset: the offsets end in the end of the last bag (``include_last_offset``).
        columns: (first, end) of the table's columns that this lookup gives; ``None`` for all.
    """

    mode: str
    sparse: bool
    padding_idx: int | None = None
    padding_counts: bool = False
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    field_rows: tuple[int, int] | None = None
    last_offset: bool = False
    columns: tuple[int, int] | None = None


def width_of(table: torch.Tensor, how: Pooling) -> int:
    """Return how many columns a lookup gives."""
    return table.shape[1] if how.columns is None else how.columns[1] - how.columns[0]


def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor | None],
    pooling: Sequence[Pooling],
    weights: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Return the pooled features side by side.

    Args:
        tables: per feature (rows, D), one dtype.
        ids: per feature (N,) int32 or int64.
        offsets: per feature (B,) of the ids' dtype; ``None`` for one id a bag.
        pooling: per feature.
        weights: per feature (N,) factors of the rows, or ``None``; mode ``"sum"`` only.

    Returns:
        (B, W) of the tables' dtype.
    """
    weights = [None] * len(tables) if weights is None else weights
    columns = zip(tables, ids, offsets, pooling, weights, strict=True)
    return torch.cat([_lookup(*column) for column in columns], dim=1)


def _lookup(
    table: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor | None, how: Pooling, weights: torch.Tensor | None
) -> torch.Tensor:
    table = table if how.columns is None else table[:, slice(*how.columns)]
    if offsets is None:
        return F.embedding(ids, table, how.padding_idx, how.max_norm, how.norm_type, how.scale_grad_by_freq, how.sparse)
    if how.padding_counts and how.padding_idx is not None:  # rows as they are, without the padding row's gradient
        kept = torch.ones(len(table), 1, dtype=table.dtype).index_fill(0, torch.tensor([how.padding_idx]), 0)
        table = table * kept + (table * (1 - kept)).detach()
        how = how._replace(padding_idx=None)
    return F.embedding_bag(
        ids, table, offsets, how.max_norm, how.norm_type, how.scale_grad_by_freq, how.mode, how.sparse, weights,
        padding_idx=how.padding_idx,
    )  # fmt: skip
