"""The operators of tables in pieces of rows: ids to the pieces that hold them, and what the pieces give added up.

Shape suffixes: B bags of this rank, N ids, D width of a feature, P samples of this rank's peers, W columns of
several features side by side.
"""

from __future__ import annotations

import functools
import operator as python
from collections.abc import Sequence
from typing import Any

import torch

from dmt_compile.ir.ops import FreshSizes, operator, requires_grad
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.checks import bag_bounds, find_fault, trim
from dmt_compile.runtime.route import Route


def _fake_select_rows(
    sizes: FreshSizes, ids: Any, offsets: Any, weights: Any, how: Any, pieces: Any, *rest: Any
) -> Any:
    numbers = [sizes.make() for _ in pieces]
    starts = ids if offsets is None else offsets
    return (
        *(ids.new_empty(number) for number in numbers),
        *(starts.new_empty(starts.shape) for _ in pieces),
        *(None if weights is None else requires_grad(weights.new_empty(number), weights) for number in numbers),
    )


@operator(_fake_select_rows)
def select_rows(
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    how: Pooling,
    pieces: tuple[tuple[int, int], ...],
    rows: tuple[int, int],
    check_ids: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the part of each bag whose rows each piece of a table holds; the order inside a bag stays.

    Args:
        ids: (N,) integer.
        offsets: (B,) starts of bags, (B + 1,) where ``how`` says so, ``None`` for one id a bag.
        weights: (N,) or ``None``; gradients come back to them.
        how: of the whole table's lookup.
        pieces: the first row and the end of each.
        rows: those of the whole table.
        check_ids: look for faulty ids and offsets. A faulty batch passes as it is, for ``check_batch`` to name.

    Returns:
        Of each piece its ids, then of each its offsets, of as many bags, then of each its weights or ``None``.

    Cost: one pass over ids and offsets, and one for each piece; one synchronisation with the device and one a piece.
    """
    starts = _bags_of_one(ids) if offsets is None else offsets
    if find_fault([ids], [offsets], [how], [weights], [], [rows], check_ids) is not None:
        return (*(ids for _ in pieces), *(starts for _ in pieces), *(weights for _ in pieces))
    read = trim([ids], [offsets], [how])[0]
    factors = None if weights is None else weights[: len(read)]
    inside = [(read >= first) & (read < end) for first, end in pieces]
    before = [torch.nn.functional.pad(mask_N.cumsum(0), (1, 0)).to(starts.dtype) for mask_N in inside]
    return (
        *(read[mask_N] for mask_N in inside),
        *(before_N[starts.long()] for before_N in before),
        *(None if factors is None else factors[mask_N] for mask_N in inside),
    )


def _bags_of_one(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(ids), dtype=ids.dtype, device=ids.device)


@operator(lambda sizes, parts: requires_grad(parts[0].new_empty(parts[0].shape), *parts))
def add_pieces(parts_BD: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of what the pieces of a table give, (B, D), added in their order."""
    return functools.reduce(python.add, parts_BD)


@operator(lambda sizes, total, ids, offsets, how: requires_grad(total.new_empty(total.shape), total))
def divide_by_lengths(total_BD: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, how: Pooling) -> torch.Tensor:
    """Return the means of bags, (B, D), from their sums; of an empty bag 0, as ``embedding_bag`` gives.

    Args:
        total_BD: sums of the bags' rows.
        ids: (N,) of the whole bags, checked before ``total_BD`` was made.
        offsets: (B,), or (B + 1,) where ``how`` says so.
        how: a bag's ids that are ``padding_idx`` do not count, unless it says that they do.
    """
    [bounds] = bag_bounds([ids], [offsets], [how], [0])
    lengths_B = bounds.diff()
    if how.padding_idx is not None and not how.padding_counts:
        read = trim([ids], [offsets], [how])[0]
        lengths_B = torch.nn.functional.pad((read != how.padding_idx).cumsum(0), (1, 0))[bounds].diff()
    return total_BD / lengths_B.clamp(min=1).to(total_BD.dtype).unsqueeze(1)


def _fake_add_blocks(sizes: FreshSizes, joined: Any, route: Any) -> Any:
    layout = route.layout
    width = layout.features_width(0) if layout.topology.hosts == 1 else sizes.make()
    return requires_grad(joined.new_empty(joined.shape[0], width), joined)


@operator(_fake_add_blocks)
def add_blocks(joined_PW: torch.Tensor, route: Route) -> torch.Tensor:
    """Return a tower group's features, (P, W), of its lookups: those of one table's pieces added in their order.

    With the exchange inside the group before it this is a reduce-scatter: the same bytes, and always the same order.
    """
    layout = route.layout
    lookups, features = layout.group_lookups(route.group), layout.group_features(route.group)
    if len(lookups) == len(features):
        return joined_PW
    columns = dict(zip(lookups, joined_PW.split([layout.widths[i] for i in lookups], dim=1), strict=True))
    pieces = {pieces[0]: pieces for pieces in layout.summed}
    return torch.cat(
        [functools.reduce(python.add, [columns[piece] for piece in pieces.get(i, (i,))]) for i in features], dim=1
    )
