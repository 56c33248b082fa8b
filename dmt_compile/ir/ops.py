"""The canonical operators of a dmt program: what each means, and what shape it has.

They are plain Python functions, not ``torch.library`` operators: their gradients may be sparse, their arguments may be
sharded tables and routes, and a program calls them outside any tracer. Each has a *fake rule* beside it, from which the
verifier derives the metadata of every node. Operators marked ``collective`` communicate; a simulated world replaces
exactly those.

This file holds the operators of one rank; ``exchange_ops`` holds those of several.

Shape suffixes: F features, B samples of this rank, G samples of all ranks, N ids, D width of a feature, W columns of
several features side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmt_compile.kernels.batched_lookup import op as batched
from dmt_compile.runtime.checks import find_fault
from dmt_compile.runtime.route import Layout, Route


@dataclass(frozen=True)
class Operator:
    """An operator's name, its fake rule ``(sizes, *args) -> value`` and whether it communicates."""

    name: str
    fake: Callable[..., Any]
    collective: bool = False


class FreshSizes:
    """Makes symbolic sizes for what only a step can tell, such as another rank's number of ids."""

    def __init__(self, make: Callable[[], torch.SymInt]) -> None:
        self.make = make


OPERATORS: dict[Callable[..., Any], Operator] = {}


def operator(fake: Callable[..., Any], collective: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[function] = Operator(f"dmt::{function.__name__}", fake, collective)
        torch.fx.node.has_side_effect(function)  # a check or a collective without users must not be dropped
        return function

    return register


def requires_grad(out: torch.Tensor, *tensors: Any) -> torch.Tensor:
    needed = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
    return out.requires_grad_() if needed else out


def _fake_check_batch(sizes: FreshSizes, ids: Any, offsets: Any, *rest: Any) -> Any:
    return (*ids, *offsets)


@operator(_fake_check_batch)
def check_batch(
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    rows: tuple[int, ...],
    labels: tuple[str, ...],
    check_ids: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the ids, then the offsets, after checking sizes, offsets and ids against the tables.

    Args:
        ids: per feature (N,) integer.
        offsets: per feature (B,) integer.
        others: the model's other inputs of B samples.
        rows: rows of each feature's table.
        labels: the table of each feature, then a name for each of ``others``.
        check_ids: look at the ids and offsets, not at sizes alone.

    Raises:
        BatchError: names table, position and bound.
    """
    fault = find_fault(ids, offsets, others, rows, check_ids)
    if fault is not None:
        raise fault.error(labels, rows)
    return (*ids, *offsets)


def _fake_lookup(sizes: FreshSizes, table: Any, ids: Any, offsets: Any, *rest: Any) -> Any:
    return requires_grad(table.new_empty(offsets.shape[0], table.shape[1]), table)


@operator(_fake_lookup)
def lookup(
    table: torch.Tensor,
    ids: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weights: None,
    mode: str,
    sparse: bool,
    padding_idx: int | None,
) -> torch.Tensor:
    """Return one pooled row per bag, (B, D); (0, 0) with ids ``None``, where another rank owns the table.

    ``torch.nn.functional.embedding_bag`` defines the meaning of every argument. ``weights`` (per-sample weights) is
    reserved; ``find_tables`` leaves weighted lookups flat.
    """
    bags = 0 if offsets is None else len(offsets)
    return batched.batched_lookup([table], [ids], [offsets], (batched.Pooling(mode, sparse, padding_idx),), bags)


def _fake_batched_lookup(sizes: FreshSizes, tables: Any, ids: Any, offsets: Any, pooling: Any, route: Any) -> Any:
    bags = offsets[0].shape[0]
    width = sum(table.shape[1] for table in tables) if route is None else sizes.make()
    return requires_grad(tables[0].new_empty(bags, width), *tables)


@operator(_fake_batched_lookup)
def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    pooling: tuple[tuple[str, bool, int | None], ...],
    route: Route | None,
) -> torch.Tensor:
    """Look up all features that this rank owns and join them: (B or G, W).

    Args:
        tables: the table of each feature.
        ids: per feature (N_f,), ``None`` where another rank owns the table.
        offsets: per feature (B,) or (G,), ``None`` likewise.
        pooling: (mode, sparse, padding_idx) of each feature.
        route: the step's route where features are spread over ranks.
    """
    first = offsets[0]
    bags = route.global_batch_size if route is not None else 0 if first is None else len(first)
    return batched.batched_lookup(tables, ids, offsets, tuple(batched.Pooling(*p) for p in pooling), bags)


def _fake_split_features(sizes: FreshSizes, joined: Any, layout: Any, widths: Any = None) -> Any:
    order = range(len(widths)) if layout is None else layout.column_order
    widths = widths if layout is None else layout.widths
    parts = joined.split([widths[i] for i in order], dim=1)
    return tuple(part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0]))


@operator(_fake_split_features)
def split_features(
    joined_BW: torch.Tensor, layout: Layout | None, widths: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, ...]:
    """Return each feature's columns (B, D) in feature order, as views."""
    out: tuple[torch.Tensor, ...] = _fake_split_features(None, joined_BW, layout, widths)  # type: ignore[arg-type]
    return out
