"""The batched lookup as one autograd node over whole and sharded tables.

Shape suffixes: B bags, N ids, D width of a feature, W sum of the owned features' widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.tables import Block, ShardedTable, flat_sparse

__all__ = ["Pooling", "batched_lookup"]

_MODES = {"sum": 0, "mean": 1, "max": 2}


def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: tuple[Pooling, ...],
    bags: int,
) -> torch.Tensor:
    """Return the pooled features that this rank owns, side by side; ``reference.py`` defines the numbers.

    Args:
        tables: per feature (rows, D); a ``ShardedTable`` is read through its local block.
        ids: per feature (N,) int32 or int64; ``None`` where another rank owns the table.
        offsets: per feature (B,) of the ids' dtype; ``None`` likewise.
        pooling: per feature.
        bags: B.

    Returns:
        (B, W); width 0 on a rank that owns nothing. It takes part in the backward pass wherever a table needs a
        gradient, on every rank alike, since the exchanges behind it do.
    """
    out: torch.Tensor = _BatchedLookup.apply(tuple(ids), tuple(offsets), pooling, bags, *tables)  # type: ignore[no-untyped-call]
    return out


class _BatchedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: tuple[torch.Tensor | None, ...],
        offsets: tuple[torch.Tensor | None, ...],
        pooling: tuple[Pooling, ...],
        bags: int,
        *tables: torch.Tensor,
    ) -> torch.Tensor:
        owned = [feature for feature, feature_ids in enumerate(ids) if feature_ids is not None]
        locals_ = [t.local if isinstance(t, ShardedTable) else t for t in tables]
        width = sum(locals_[feature].shape[1] for feature in owned)
        out_BW = locals_[0].new_empty(bags, width)
        saved: list[torch.Tensor] = []
        column = 0
        for feature in owned:
            feature_ids, feature_offsets, how = ids[feature], offsets[feature], pooling[feature]
            assert feature_ids is not None
            assert feature_offsets is not None
            # the operator behind torch.nn.functional.embedding_bag reads ids and offsets as if they were contiguous
            feature_ids, feature_offsets = feature_ids.contiguous(), feature_offsets.contiguous()
            pooled, *rest = torch.ops.aten._embedding_bag(
                locals_[feature],
                feature_ids,
                feature_offsets,
                False,
                _MODES[how.mode],
                how.sparse,
                None,
                False,
                -1 if how.padding_idx is None else how.padding_idx,
            )
            out_BW[:, column : column + pooled.shape[1]] = pooled
            column += pooled.shape[1]
            saved += [feature_ids, feature_offsets, *rest]
        ctx.save_for_backward(*saved)
        ctx.owned, ctx.pooling = owned, pooling
        ctx.tables = [(t.shape, t.block if isinstance(t, ShardedTable) else None) for t in tables]
        ctx.local_shapes = [t.shape for t in locals_]
        return out_BW

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_BW = grads[0]
        table_grads: list[torch.Tensor | None] = [None] * len(ctx.tables)
        column = 0
        for position, feature in enumerate(ctx.owned):
            feature_ids, feature_offsets, *rest = ctx.saved_tensors[5 * position : 5 * position + 5]
            rows, width = ctx.local_shapes[feature]
            grad_BD = grad_BW[:, column : column + width].contiguous()
            column += width
            if not ctx.needs_input_grad[4 + feature]:
                continue
            how = ctx.pooling[feature]
            local = torch.ops.aten._embedding_bag_backward(
                grad_BD,
                feature_ids,
                feature_offsets,
                *rest,
                rows,
                False,
                _MODES[how.mode],
                how.sparse,
                None,
                -1 if how.padding_idx is None else how.padding_idx,
            )
            shape, block = ctx.tables[feature]
            table_grads[feature] = local if block is None else _flat_gradient(local, shape, block)
        return None, None, None, None, *table_grads


def _flat_gradient(local: torch.Tensor, shape: torch.Size, block: Block) -> torch.Tensor:
    if local.layout == torch.sparse_coo:
        return flat_sparse(local._indices()[0], local._values(), shape, block)
    return ShardedTable(local, shape, block)
