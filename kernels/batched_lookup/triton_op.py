"""The batched lookup on Triton as one autograd node; its gradients have every row of a table once.

Shape suffixes: B bags, W sum of the owned features' widths, U distinct rows of a table, D width of a table.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dmt_compile.kernels.batched_lookup import op
from dmt_compile.kernels.batched_lookup.features import Feature
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.kernels.batched_lookup.triton_distinct import DistinctRows, Group, distinct_gradients, weight_gradients
from dmt_compile.kernels.batched_lookup.triton_look_up import Kept, look_up
from dmt_compile.runtime import in_backward
from dmt_compile.runtime.tables import Block, ShardedTable, flat_sparse, local_of


def batched_lookup(
    tables: Sequence[torch.Tensor], ids: Sequence[torch.Tensor | None], offsets: Sequence[torch.Tensor | None],
    pooling: tuple[Pooling, ...], bags: int, weights: Sequence[torch.Tensor | None], out_dtype: torch.dtype | None,
    out_rows_B: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return what ``op.batched_lookup`` does; what is not in ``op.supports`` is not looked at here."""
    out: torch.Tensor = _TritonLookup.apply(  # type: ignore[no-untyped-call]
        tuple(ids), tuple(offsets), pooling, bags, out_dtype, out_rows_B, torch.is_grad_enabled(), *weights, *tables
    )
    return out


class _TritonLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: tuple[torch.Tensor | None, ...], offsets: tuple[torch.Tensor | None, ...],
        pooling: tuple[Pooling, ...], bags: int, out_dtype: torch.dtype | None, out_rows_B: torch.Tensor | None,
        recorded: bool, *tensors: Any,
    ) -> torch.Tensor:  # fmt: skip
        weights, tables = tensors[: len(ids)], tensors[len(ids) :]
        locals_ = [local_of(table) for table in tables]
        blocks = [t.block if isinstance(t, ShardedTable) else None for t in tables]
        dtype = functools.reduce(torch.promote_types, (local.dtype for local in locals_))
        owned = [index for index, feature_ids in enumerate(ids) if feature_ids is not None]
        features: list[Feature] = []
        width = 0
        for index in owned:
            local = op._columns(locals_[index], blocks[index], pooling[index])
            features.append(
                _feature(local, blocks[index], ids[index], offsets[index], weights[index], pooling[index], width)
            )
            width += local.shape[1]
        out_BW = locals_[0].new_empty(bags, width, dtype=dtype if out_dtype is None else out_dtype)
        keep = recorded and any(ctx.needs_input_grad)
        kept = look_up(features, bags, out_BW, out_rows_B, keep)
        if keep:
            # Whoever changes one of these before the backward pass is told so; rows may change that no gradient needs.
            ctx.save_for_backward(
                kept.counts_MB, kept.winners_BX, out_rows_B,
                *(tensor for f in features for tensor in (f.ids, f.offsets, f.weights)),
                *(f.table for f in features if f.weights is not None),
            )  # fmt: skip
        ctx.features, ctx.owned, ctx.bags, ctx.inputs = features, owned, bags, len(ids)
        ctx.tables = [(table.shape, block, how) for table, block, how in zip(tables, blocks, pooling, strict=True)]
        ctx.groups = _groups(owned, tables, pooling, ctx.needs_input_grad[7 + len(ids) :])
        ctx.elsewhere = {i: w.dtype for i, w in enumerate(weights) if w is not None and ids[i] is None}
        ctx.readings = in_backward.read(tables, owned, pooling, ctx.needs_input_grad[7 + len(ids) :])
        return out_BW

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op.refuse_second_derivative()
        given: list[torch.Tensor | None] = [None] * (2 * ctx.inputs)
        for index, dtype in ctx.elsewhere.items():
            given[index] = grads[0].new_empty(0, dtype=dtype)
        due = [reading for reading in dict.fromkeys(ctx.readings.values()) if reading.due()]
        counts_MB, winners_BX, out_rows_B, *_ = ctx.saved_tensors
        grad_BW = grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
        weighted = [n for n, i in enumerate(ctx.owned) if ctx.needs_input_grad[7 + i]]
        of_weights = weight_gradients(ctx.features, weighted, ctx.bags, grad_BW, out_rows_B)
        for number, gradient in zip(weighted, of_weights, strict=True):
            given[ctx.owned[number]] = gradient
        kept = Kept(counts_MB, winners_BX)
        readings = [ctx.readings.get(ctx.owned[group.members[0]]) for group in ctx.groups]
        groups = [replace(g, dense=g.dense and r not in due) for g, r in zip(ctx.groups, readings, strict=True)]
        of_tables = distinct_gradients(ctx.features, groups, ctx.bags, grad_BW, kept, out_rows_B)
        stepped: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for group, reading, found in zip(groups, readings, of_tables, strict=True):
            index = ctx.owned[group.members[0]]
            shape, block, how = ctx.tables[index]
            gradient = _local_gradient(found, shape, block, how)
            if reading in due:
                stepped[reading].append(gradient)
            else:
                given[ctx.inputs + index] = gradient if block is None else _flat_gradient(gradient, shape, block)
        for reading, gradients in stepped.items():
            reading.step(gradients, "triton")
        return None, None, None, None, None, None, None, *given


def _feature(
    local: torch.Tensor, block: Block | None, ids: Any, offsets: Any, weights: Any, how: Pooling, column: int
) -> Feature:
    padding = op._padding_row(block, how)
    return Feature(
        table=local,
        ids=ids.contiguous(),
        offsets=None if offsets is None else offsets.contiguous().to(ids.dtype),
        weights=None if weights is None else weights.detach().contiguous(),
        mode="none" if offsets is None else how.mode,
        skipped=-1 if offsets is None or how.padding_counts else padding,
        padding=padding,
        shift=0 if block is None else op._shift(block, how),
        column=column,
    )


def _groups(
    owned: Sequence[int], tables: Sequence[Any], pooling: Sequence[Pooling], needed: Sequence[bool]
) -> tuple[Group, ...]:
    """Return the lookups by table and columns: one gradient, the first's, has the rows of all, fields among them."""
    members: dict[Any, list[int]] = {}
    for number, index in enumerate(owned):
        if needed[index]:
            key = id(tables[index]), pooling[index].columns, pooling[index].sparse
            members.setdefault(key, []).append(number)
    return tuple(Group(tuple(numbers), not sparse) for (_, _, sparse), numbers in members.items())


def _local_gradient(
    found: DistinctRows | torch.Tensor, shape: torch.Size, block: Block | None, how: Pooling
) -> torch.Tensor:
    """Return the gradient of this rank's rows and columns."""
    first, end = (0, shape[1]) if block is None else block.columns
    rows = shape[0] if block is None else block.shape[0]
    gradient = found
    if isinstance(found, DistinctRows):
        gradient = torch.sparse_coo_tensor(
            found.rows_U[None], found.grads_UD, (rows, found.grads_UD.shape[1]), is_coalesced=True,
            check_invariants=False,
        )  # fmt: skip
    assert isinstance(gradient, torch.Tensor)
    if how.columns is not None:
        gradient = op._widened(gradient, end - first, how.columns[0] - first)
    return gradient


def _flat_gradient(gradient: torch.Tensor, shape: torch.Size, block: Block) -> torch.Tensor:
    """Return a gradient of this rank's rows as one of the table, whose shape is the flat one."""
    if gradient.layout != torch.sparse_coo:
        return ShardedTable(gradient, shape, block)
    flat = flat_sparse(gradient._indices()[0], gradient._values(), shape, block)
    return flat._coalesced_(list(block.rows) == sorted(block.rows))  # rows are in order where the block's ranges are
