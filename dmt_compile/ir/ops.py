"""The canonical operators of a dmt program: what each means, and what shape it has.

They are plain Python functions, not ``torch.library`` operators: their gradients may be sparse, their arguments may be
sharded tables and routes, and a program calls them outside any tracer. Each has a *fake rule* beside it, from which the
verifier derives the metadata of every node. Operators marked ``collective`` communicate; a simulated world replaces
exactly those.

This file holds the operators of one rank; ``id_ops``, ``exchange_ops`` and ``gradient_ops`` hold those of several.

Shape suffixes: F features, B samples of this rank, G samples of all ranks, N ids, D width of a feature, W columns of
several features side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmt_compile import torch_internals
from dmt_compile.kernels.batched_lookup import op as batched
from dmt_compile.kernels.batched_lookup.reference import Pooling, width_of
from dmt_compile.kernels.choice import REFERENCE
from dmt_compile.runtime.checks import find_fault, trim
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


class _Result(torch.autograd.Function):
    """Makes a fake tensor depend on others, at no cost; there is no backward pass on fake tensors."""

    @staticmethod
    def forward(ctx: Any, held: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return held[0]


def requires_grad(out: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """Return a new fake tensor as a result of ``tensors``: no leaf, the model may go on in place."""
    needed = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
    result: torch.Tensor = _Result.apply([out], *tensors) if needed else out  # type: ignore[no-untyped-call]
    return result


def fake_rows(table: torch.Tensor, *sizes: Any, width: int | None = None) -> torch.Tensor:
    """Return a fake tensor of a table's rows, (*sizes, D), or of ``width`` of its columns."""
    # half the cost of new_empty, which goes by way of it
    return torch.empty((*sizes, width or table.shape[1]), dtype=table.dtype, device=table.device)


def _fake_check_batch(sizes: FreshSizes, ids: Any, offsets: Any, how: Any, *rest: Any) -> Any:
    ends = [h.last_offset for h in how]
    out_ids = [i.new_empty(sizes.make()) if last else i for i, last in zip(ids, ends, strict=True)]
    return (*out_ids, *(o[:-1] if last else o for o, last in zip(offsets, ends, strict=True)))


@operator(_fake_check_batch)
def check_batch(
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor | None],
    how: tuple[Pooling, ...],
    weights: Sequence[torch.Tensor | None],
    others: Sequence[torch.Tensor],
    rows: tuple[tuple[int, int], ...],
    labels: tuple[str, ...],
    check_ids: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the ids, then the starts of the bags, after checking sizes, offsets and ids against the tables.

    Args:
        ids: per feature (N,) integer.
        offsets: per feature (B,) integer, (B + 1,) where ``how`` says so, or ``None`` for one id a bag.
        how: per feature.
        weights: per feature (N,) or ``None``; only their sizes are looked at.
        others: the model's other inputs of B samples.
        rows: per feature the first and the end of the rows it may read.
        labels: the table of each feature, then a name for each of ``others``.
        check_ids: look at the ids and offsets, not at sizes alone.

    Raises:
        BatchError: names table, position and bound.
    """
    fault = find_fault(ids, offsets, how, weights, others, rows, check_ids)
    if fault is not None:
        raise fault.error(labels, rows)
    starts = (o[:-1] if o is not None and h.last_offset else o for o, h in zip(offsets, how, strict=True))
    return (*trim(ids, offsets, how), *starts)


@operator(lambda sizes, ids_BL: ids_BL.new_empty(ids_BL.shape[0]))
def even_offsets(ids_BL: torch.Tensor) -> torch.Tensor:
    """Return the offsets (B,) of bags that all have L ids."""
    bags, length = ids_BL.shape
    return torch.arange(bags, dtype=ids_BL.dtype, device=ids_BL.device) * length


def _fake_lookup(sizes: FreshSizes, table: Any, ids: Any, offsets: Any, weights: Any, how: Any) -> Any:
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - int(how.last_offset)
    return requires_grad(fake_rows(table, bags, width=width_of(table, how)), table, weights)


@operator(_fake_lookup)
def lookup(
    table: torch.Tensor,
    ids: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    how: Pooling,
) -> torch.Tensor:
    """Return one pooled row per bag, (B, D); (0, 0) with ids ``None``, where another rank owns the table.

    ``torch.nn.functional.embedding_bag``, and with offsets ``None`` ``torch.nn.functional.embedding``, define the
    meaning of every argument.
    """
    if torch_internals.is_fake(table):  # a transformed model is traced again
        traced: torch.Tensor = _fake_lookup(FreshSizes(lambda: 0), table, ids, offsets, weights, how)  # type: ignore[arg-type, return-value]
        return traced
    if how.last_offset and ids is not None and offsets is not None:
        ids, offsets = trim([ids], [offsets], [how])[0], offsets[:-1]
    bags = 0 if ids is None else len(ids) if offsets is None else len(offsets)
    return batched.batched_lookup([table], [ids], [offsets], (how,), bags, [weights])


def _fake_batched_lookup(
    sizes: FreshSizes, tables: Any, ids: Any, offsets: Any, weights: Any, pooling: Any, route: Any,
    out_dtype: Any = None, **how: Any,
) -> Any:  # fmt: skip
    dtype = out_dtype or functools.reduce(torch.promote_types, (table.dtype for table in tables))
    if route is None:
        bags = ids[0].shape[0] if offsets[0] is None else offsets[0].shape[0]
        width: Any = sum(width_of(table, how) for table, how in zip(tables, pooling, strict=True))
    else:
        bags, width = route.global_batch_size, sizes.make()
    return requires_grad(tables[0].new_empty(bags, width, dtype=dtype), *tables, *weights)


@operator(_fake_batched_lookup)
def batched_lookup(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor | None],
    offsets: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    pooling: tuple[Pooling, ...],
    route: Route | None,
    kernel: str = REFERENCE,
    peer_order: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Look up all features that this rank owns and join them: (B or G, W).

    Args:
        tables: the table of each feature.
        ids: per feature (N_f,), ``None`` where another rank owns the table.
        offsets: per feature (B,) or (G,), ``None`` likewise, and for one id a bag.
        weights: per feature (N_f,), or ``None``.
        pooling: of each feature.
        route: the step's route where features are spread over ranks.
        kernel: the implementation that ``select_kernels`` chose.
        peer_order: rows as ``peer_permute`` would put them.
        out_dtype: of the result, by default the tables'.
    """
    order = route.places_in_peer_order(tables[0].device) if peer_order and route is not None else None
    if route is not None:
        bags = route.global_batch_size
    else:
        starts = ids[0] if offsets[0] is None else offsets[0]
        bags = 0 if starts is None else len(starts)
    return batched.batched_lookup(tables, ids, offsets, tuple(pooling), bags, weights, kernel, out_dtype, order)


def column_widths(layout: Layout | None, widths: tuple[int, ...] | None) -> list[int]:
    """Return the widths of a layout's features in the order of their columns, or where there is none, ``widths``."""
    return list(widths or ()) if layout is None else [layout.widths[index] for index in layout.column_order]


def in_feature_order(columns: Sequence[Any], layout: Layout | None) -> tuple[Any, ...]:
    """Return columns by feature, ``None`` for what was added to another; without a layout, as they are."""
    if layout is None:
        return tuple(columns)
    features = dict(zip(layout.column_order, columns, strict=True))
    return tuple(features.get(index) for index in range(len(layout.widths)))


def _fake_split_features(sizes: FreshSizes, joined: Any, layout: Any, widths: Any = None) -> Any:
    return in_feature_order(joined.split(column_widths(layout, widths), dim=1), layout)


@operator(_fake_split_features)
def split_features(
    joined_BW: torch.Tensor, layout: Layout | None, widths: tuple[int, ...] | None = None
) -> tuple[torch.Tensor | None, ...]:
    """Return each feature's columns (B, D) in feature order, as views; ``None`` for what was added to another."""
    out: tuple[torch.Tensor | None, ...] = _fake_split_features(None, joined_BW, layout, widths)  # type: ignore[arg-type]
    return out


def _fake_tower_input(sizes: FreshSizes, features: Any, tower: str) -> Any:
    return torch.cat(features, dim=1)


@operator(_fake_tower_input)
def tower_input(features_BD: Sequence[torch.Tensor], tower: str) -> torch.Tensor:
    """Return a tower's features side by side, (B, W): what follows, up to ``tower_output``, is its Tower Module.

    Its ranks compute it for the samples of all their peers, before anything crosses hosts.
    """
    return torch.cat(list(features_BD), dim=1)


@operator(lambda sizes, out_BO, tower: out_BO.view_as(out_BO))
def tower_output(out_BO: torch.Tensor, tower: str) -> torch.Tensor:
    """Return what a tower sends to each sample, (B, O), as it is."""
    return out_BO.view_as(out_BO)


# A transformed model holds these in its own code; Dynamo keeps them whole, so that its graph shows where towers end.
for _whole in (lookup, even_offsets, tower_input, tower_output):
    torch.compiler.allow_in_graph(_whole)
