"""The batched lookup as one autograd node over whole and sharded tables.

Shape suffixes: B bags, N ids, D width of a feature, W sum of the owned features' widths.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.kernels.batched_lookup import fbgemm
from dmt_compile.kernels.batched_lookup.reference import Pooling, width_of
from dmt_compile.kernels.batched_lookup.support import supports
from dmt_compile.kernels.choice import REFERENCE
from dmt_compile.kernels.pack_rows.reference import cast
from dmt_compile.runtime import in_backward
from dmt_compile.runtime.tables import Block, ShardedTable, flat_sparse, local_of

__all__ = ["KERNELS", "Pooling", "batched_lookup", "try_out"]

# Kernel -> why it cannot do some lookups together, ``None`` where it can; the fastest first.
KERNELS = {"triton": supports, "fbgemm": fbgemm.supports}

_MODES = {"sum": 0, "mean": 1, "max": 2}
_NO_TENSORS = 6  # arguments of the autograd node before weights and tables
aten = torch.ops.aten


def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: tuple[Pooling, ...],
    bags: int,
    weights: Sequence[torch.Tensor | None] | None = None,
    kernel: str = REFERENCE,
    out_dtype: torch.dtype | None = None,
    out_rows_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the pooled features that this rank owns, side by side; ``reference.py`` defines the numbers.

    Args:
        tables: per feature (rows, D); a ``ShardedTable`` is read through its local block.
        ids: per feature (N,) int32 or int64; ``None`` where another rank owns the table.
        offsets: per feature (B,) of the ids' dtype; ``None`` likewise, and for one id a bag.
        pooling: per feature.
        bags: B.
        weights: per feature (N,) factors of the rows of a sum, of the table's dtype, or ``None``; empty where another
            rank owns the table.
        kernel: one of ``KERNELS`` that has nothing against these lookups, or the reference.
        out_dtype: of the result, such as that of the wire, rounded as ``pack_rows`` does; by default the tables'
            promoted dtype.
        out_rows_B: int64, a permutation: the result's row of each bag, such as its place among the samples of all
            destinations; by default its number.

    Returns:
        (B, W) of ``out_dtype``; width 0 on a rank that owns nothing. It takes part in the backward pass
        wherever a table needs a gradient, on every rank alike, since the exchanges behind it do.
    """
    weights = [None] * len(tables) if weights is None else weights
    if kernel == "triton":
        from dmt_compile.kernels.batched_lookup import triton_op

        return triton_op.batched_lookup(tables, ids, offsets, pooling, bags, weights, out_dtype, out_rows_B)
    out: torch.Tensor = _BatchedLookup.apply(  # type: ignore[no-untyped-call]
        tuple(ids), tuple(offsets), pooling, bags, kernel, out_dtype, *weights, *tables
    )
    return out if out_rows_B is None else torch.empty_like(out).index_copy(0, out_rows_B, out)


def try_out(
    kernel: str,
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: Sequence[Pooling],
    weights: Sequence[torch.Tensor | None],
) -> None:
    """Do one lookup of each kind among these, which may be fake, forward and backward: it compiles the kernels."""
    kinds = {}
    for table, id_, starts, how, factor in zip(tables, ids, offsets, pooling, weights, strict=True):
        index = torch.int64 if id_ is None else id_.dtype
        kind = table.dtype, width_of(table, how), index, starts is None, how.mode, how.sparse, factor is None
        kinds[kind] = table.device
    for (dtype, width, index, single, mode, sparse, plain), device in kinds.items():
        with torch.enable_grad():
            row = torch.zeros(1, width, dtype=dtype, device=device, requires_grad=True)
            first = torch.zeros(1, dtype=index, device=device)
            factors = None if plain else row.detach()[0, :1]
            how = Pooling(mode, sparse)
            batched_lookup([row], [first], [None if single else first], (how,), 1, [factors], kernel).sum().backward()


@dataclass
class _Lookup:
    """What one owned lookup keeps for its backward pass; ``shape`` and ``block`` are those of its table."""

    feature: int
    how: Pooling
    rows: int
    width: int
    dtype: torch.dtype
    shape: torch.Size
    block: Block | None
    saved: slice  # its tensors among all saved ones: ids, then for bags offsets and what embedding_bag gave, weights


class _BatchedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: tuple[torch.Tensor | None, ...],
        offsets: tuple[torch.Tensor | None, ...],
        pooling: tuple[Pooling, ...],
        bags: int,
        kernel: str,
        out_dtype: torch.dtype | None,
        *tensors: Any,
    ) -> torch.Tensor:
        weights, tables = tensors[: len(ids)], tensors[len(ids) :]
        owned = [feature for feature, feature_ids in enumerate(ids) if feature_ids is not None]
        locals_ = [local_of(table) for table in tables]
        dtype = functools.reduce(torch.promote_types, (local.dtype for local in locals_))
        lookups: list[_Lookup] = []
        together: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        saved: list[torch.Tensor] = []
        pieces: list[torch.Tensor] = []
        for feature in owned:
            table, local, how = tables[feature], locals_[feature], pooling[feature]
            block = table.block if isinstance(table, ShardedTable) else None
            local = _columns(local, block, how)
            ids_N, offsets_B = _local_ids(block, ids[feature], offsets[feature], how)
            if kernel == "fbgemm":
                together.append((local, ids_N, offsets_B))
                kept = [ids_N] if offsets_B is None else [ids_N, offsets_B, *[ids_N.new_empty(0)] * 3]
            else:
                kept, pooled = _forward(local, block, ids_N, offsets_B, weights[feature], how)
                pieces.append(pooled)
            here = slice(len(saved), len(saved) + len(kept))
            rows, width = local.shape
            lookups.append(_Lookup(feature, how, rows, width, local.dtype, table.shape, block, here))
            saved += kept
        if together:
            out_BW = fbgemm.look_up(together, bags)
        elif len(pieces) == 1:
            out_BW = pieces[0].to(dtype)
        else:
            # Row by row: all pieces into one row, then into the next, which writes memory in order.
            out_BW = torch.cat(pieces, dim=1).to(dtype) if pieces else locals_[0].new_empty(bags, 0, dtype=dtype)
        ctx.save_for_backward(*saved)
        ctx.lookups, ctx.inputs = lookups, len(tensors)
        ctx.elsewhere = {i: w.dtype for i, w in enumerate(weights) if w is not None and ids[i] is None}
        ctx.fields = _fields(pooling, tables)
        ctx.readings = in_backward.read(tables, owned, pooling, ctx.needs_input_grad[_NO_TENSORS + len(ids) :])
        return out_BW if out_dtype is None else cast(out_BW, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivative()
        given: list[torch.Tensor | None] = [None] * ctx.inputs
        due = [reading for reading in dict.fromkeys(ctx.readings.values()) if reading.due()]
        of_fields: dict[Any, list[tuple[_Lookup, torch.Tensor]]] = defaultdict(list)
        for feature, dtype in ctx.elsewhere.items():
            given[feature] = grads[0].new_empty(0, dtype=dtype)
        column, first_table = 0, ctx.inputs // 2
        for lookup in ctx.lookups:
            grad_BD = grads[0][:, column : column + lookup.width].to(lookup.dtype)
            column += lookup.width
            saved = ctx.saved_tensors[lookup.saved]
            if ctx.needs_input_grad[_NO_TENSORS + lookup.feature]:
                given[lookup.feature] = _weights_gradient(grad_BD, lookup, saved)
            if ctx.needs_input_grad[_NO_TENSORS + first_table + lookup.feature]:
                if ctx.fields[lookup.feature] is not None:
                    of_fields[ctx.fields[lookup.feature]].append((lookup, grad_BD))
                else:
                    alone = ctx.readings.get(lookup.feature) in due
                    given[first_table + lookup.feature] = _table_gradient(grad_BD, lookup, saved, alone)
        for fields in of_fields.values():  # fields have rows of their own: one gradient for all, in the order of each
            first = fields[0][0]
            ids_N = torch.cat([ctx.saved_tensors[lookup.saved][0] for lookup, _ in fields])
            grad_ND = torch.cat([grad_BD for _, grad_BD in fields])
            alone = ctx.readings.get(first.feature) in due
            given[first_table + first.feature] = _table_gradient(grad_ND, first, [ids_N], alone)
        for reading in due:
            of_table = [first_table + feature for feature, other in ctx.readings.items() if other is reading]
            reading.step([gradient for index in of_table if (gradient := given[index]) is not None])
            for index in of_table:
                given[index] = None
        return *[None] * _NO_TENSORS, *given


def refuse_second_derivative() -> None:
    """Raise inside a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise UnsupportedGraphError(
            "batched_lookup: expected a first derivative, found create_graph=True: the gradients of lookups have "
            "no gradient of their own; compute second derivatives with the eager model"
        )


def _local_ids(block: Block | None, ids: Any, offsets: Any, how: Pooling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids as rows of this rank's block, and offsets of their type.

    The operators behind ``torch.nn.functional`` read both as if they were contiguous.
    """
    ids = ids.contiguous()
    if block is not None and (shift := _shift(block, how)):
        ids = ids - shift
    return ids, None if offsets is None else offsets.contiguous().to(ids.dtype)


def _forward(
    local: torch.Tensor, block: Block | None, ids: Any, offsets: Any, weights: Any, how: Pooling
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what the backward pass needs, and the pooled rows."""
    if how.max_norm is not None:
        aten.embedding_renorm_(local, ids, how.max_norm, how.norm_type)
    if offsets is None or _needs_no_bags(ids, offsets, weights, how):
        return [ids], aten.embedding(local, ids)
    padding = -1 if how.padding_counts else _padding_row(block, how)
    pooled, *rest = aten._embedding_bag(
        local, ids, offsets, how.scale_grad_by_freq, _MODES[how.mode], how.sparse, weights, False, padding
    )
    if weights is None:
        return [ids, offsets, *rest], pooled
    return [ids, offsets, *rest, weights, local], pooled


def _needs_no_bags(ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, how: Pooling) -> bool:
    """Tell whether each bag has one id and its row and gradient are what it pools to, on a CPU, where asking is cheap.

    Rows then are read, and sparse gradients written, once and not twice.
    """
    if ids.device.type != "cpu" or len(ids) != len(offsets) or how.mode not in ("sum", "mean") or not how.sparse:
        return False
    if weights is not None or how.padding_idx is not None or how.scale_grad_by_freq:
        return False
    return torch.equal(offsets, torch.arange(len(offsets), dtype=offsets.dtype))


def _columns(local: torch.Tensor, block: Block | None, how: Pooling) -> torch.Tensor:
    """Return the columns that a lookup gives, as a view; a rank holds at least these."""
    if how.columns is None:
        return local
    first = 0 if block is None else block.columns[0]
    return local[:, how.columns[0] - first : how.columns[1] - first]


def _widened(gradient: torch.Tensor, width: int, first: int) -> torch.Tensor:
    """Return the gradient of columns from ``first`` on as one of ``width`` columns, zero elsewhere."""
    values = gradient._values() if gradient.layout == torch.sparse_coo else gradient
    padded = torch.nn.functional.pad(values, (first, width - first - values.shape[1]))
    if gradient.layout != torch.sparse_coo:
        return padded
    return torch.sparse_coo_tensor(
        gradient._indices(), padded, (gradient.shape[0], width), is_coalesced=gradient.is_coalesced(),
        check_invariants=False,
    )  # fmt: skip


def _shift(block: Block, how: Pooling) -> int:
    """Return how much larger an id in flat rows is than in this rank's rows; a lookup stays inside one row range."""
    first = block.rows[0][0] if how.field_rows is None else how.field_rows[0]
    return first - block.local_row(first)


def _padding_row(block: Block | None, how: Pooling) -> int:
    """Return the padding row among this rank's rows; -1 for none, and where another rank holds it."""
    row = how.padding_idx
    if row is None or block is None:
        return -1 if row is None else row
    return block.local_row(row) if any(first <= row < end for first, end in block.rows) else -1


def _fields(pooling: tuple[Pooling, ...], tables: Sequence[Any]) -> list[Any]:
    """Return for each field which lookup it is a part of: table, columns, how often the field was read before."""
    seen: Counter[Any] = Counter()
    found: list[Any] = []
    for how, table in zip(pooling, tables, strict=True):
        if how.field_rows is None or how.mode != "none":  # a piece of rows has bags
            found.append(None)
            continue
        key = (id(table), how.columns, how.field_rows)
        found.append((id(table), how.columns, seen[key]))
        seen[key] += 1
    return found


def _weights_gradient(grad_BD: torch.Tensor, lookup: _Lookup, saved: Sequence[torch.Tensor]) -> torch.Tensor:
    ids, offsets, offset2bag, _, _, _, local = saved
    if not len(offset2bag):
        offset2bag = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets, right=True).to(ids.dtype) - 1
    how = lookup.how
    padding = -1 if how.padding_counts else _padding_row(lookup.block, how)
    gradient: torch.Tensor = aten._embedding_bag_per_sample_weights_backward(
        grad_BD.contiguous(), local, ids, offsets, offset2bag, _MODES[how.mode], padding
    )
    return gradient


def _table_gradient(
    grad: torch.Tensor, lookup: _Lookup, saved: Sequence[torch.Tensor], rows_alone: bool = False
) -> torch.Tensor:
    """Return the gradient as the table's own; with ``rows_alone`` sparse, and of this rank's rows."""
    how = lookup.how._replace(sparse=True) if rows_alone else lookup.how
    padding = _padding_row(lookup.block, how)
    grad = grad.contiguous()
    if len(saved) == 1:
        local = aten.embedding_backward(grad, saved[0], lookup.rows, padding, how.scale_grad_by_freq, how.sparse)
    else:
        ids, offsets, *rest = saved[:5]
        weights = saved[5] if len(saved) > 5 else None
        local = aten._embedding_bag_backward(
            grad, ids, offsets, *rest, lookup.rows, how.scale_grad_by_freq, _MODES[how.mode], how.sparse, weights,
            padding,
        )  # fmt: skip
        if how.mode == "max" and padding >= 0:
            local[padding] = 0  # the operator leaves padding rows out of sums and means alone
    if how.columns is not None:
        first, end = (0, lookup.shape[1]) if lookup.block is None else lookup.block.columns
        local = _widened(local, end - first, how.columns[0] - first)
    return local if lookup.block is None or rows_alone else _flat_gradient(local, lookup.shape, lookup.block)


def _flat_gradient(local: torch.Tensor, shape: torch.Size, block: Block) -> torch.Tensor:
    if local.layout == torch.sparse_coo:
        return flat_sparse(local._indices()[0], local._values(), shape, block)
    return ShardedTable(local, shape, block)
