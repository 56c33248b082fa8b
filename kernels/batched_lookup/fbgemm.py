"""Sums of float32 rows on a CPU: all features of a rank by one call of FBGEMM's table-batched lookup.

FBGEMM takes many tables as one piece of memory and the place of each one's first element in it. Tables are tensors of
their own here, so their places are counted from the first of them, wherever in memory they lie; FBGEMM holds every id
against the rows of its table, as PyTorch does. The sums are bit for bit those of PyTorch's operator, which runs the
same kernels for each table by itself.

Shape suffixes: F features, B bags, N ids, D width of a feature, W sum of the widths.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from dmt_compile.kernels.batched_lookup.reference import Pooling

FEWEST = 16  # features of a rank from which one call is faster than theirs: benchmarks/cpu_lookup.py


def too_few(features: int) -> str | None:
    """Return why PyTorch's operator is as fast for so many features of a rank; ``None`` where it is not."""
    return None if features >= FEWEST else f"{features} features a rank, it is faster from {FEWEST} on"


def supports(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: Sequence[Pooling],
    weights: Sequence[torch.Tensor | None],
) -> str | None:
    """Return why FBGEMM cannot do these lookups together; ``None`` where it can. Arguments may be fake."""
    for table, how, factors in zip(tables, pooling, weights, strict=True):
        if table.device.type != "cpu":
            return f"this is its lookup for CPUs, the tables are on {table.device.type}"
        if not table.is_contiguous():
            return "rows that do not lie side by side"
        if table.dtype != torch.float32:
            return f"rows of {table.dtype}: PyTorch's own operator is 2 to 10 times as fast"
        if how.mode not in ("sum", "none"):
            return f"pooling by {how.mode} would differ in the last bits"
        if factors is not None:
            return "weights of rows"
        if how.max_norm is not None or how.columns is not None or (how.padding_idx is not None and how.mode == "sum"):
            return "max_norm, padding or a part of the columns"
    try:
        importlib.import_module("fbgemm_gpu")
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported: {error}"
    return None


def look_up(features: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], bags: int) -> torch.Tensor:
    """Return the sums of all bags side by side, (B, W).

    Args:
        features: for each the rows (rows, D), float32 and contiguous; ids (N,) of rows; offsets (B,), or ``None`` for
            one id a bag.
        bags: B.
    """
    locals_, ids, offsets = zip(*features, strict=True)
    first = locals_[0]
    places = [(table.data_ptr() - first.data_ptr()) // first.element_size() for table in locals_]
    column_ends = [*accumulate((table.shape[1] for table in locals_), initial=0)]
    row_ends = [*accumulate((len(table) for table in locals_), initial=0)]
    id_ends = [*accumulate(map(len, ids), initial=0)]
    ids_N = torch.cat(list(ids))
    one_each = torch.arange(bags, dtype=ids_N.dtype)
    starts_FB = torch.stack([one_each if o is None else o.to(ids_N.dtype) for o in offsets])
    starts_FB += torch.tensor(id_ends[:-1], dtype=ids_N.dtype)[:, None]
    operator: Any = torch.ops.fbgemm.split_embedding_codegen_forward_cpu
    out: torch.Tensor = operator(
        first.view(-1), torch.tensor(places), torch.tensor(column_ends, dtype=torch.int32), column_ends[-1],
        torch.tensor(row_ends), ids_N, torch.cat([starts_FB.view(-1), starts_FB.new_tensor(id_ends[-1:])]),
        0, None, 0,
    )  # fmt: skip
    return out
