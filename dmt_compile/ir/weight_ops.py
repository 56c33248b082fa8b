"""The operators that bring the weights of ids to the tables' owners, the way of the ids, and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmt_compile.ir.ops import operator, requires_grad
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.checks import trim
from dmt_compile.runtime.route import Route


@operator(lambda sizes, weights, offsets, how, route: requires_grad(weights[0].new_empty(sizes.make()), *weights))
def pack_weights(
    weights: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor], how: tuple[Pooling, ...], route: Route
) -> torch.Tensor:
    """Return the weights of this rank's ids, by owner, 1-D; ``weights``: of the weighted features, in order."""
    layout = route.layout
    ordered = [feature for feature, weighted in enumerate(layout.weighted) if weighted]
    read = dict(zip(ordered, trim(weights, offsets, how), strict=True))
    return torch.cat([read[i] for features in layout.features_by_rank for i in features if i in read])


@operator(
    lambda sizes, received, route: tuple(
        requires_grad(received.new_empty(sizes.make()), received) if weighted else None
        for weighted in route.layout.weighted
    )
)
def unpack_weights(received: torch.Tensor, route: Route) -> tuple[torch.Tensor | None, ...]:
    """Return each feature's weights over the samples of all ranks, in the order of the ids; ``None`` without weights.

    Where another rank owns the table they are empty, but still a part of the backward pass, in which all ranks exchange
    gradients.
    """
    layout = route.layout
    features = [feature for feature in layout.features_by_rank[route.rank] if layout.weighted[feature]]
    sizes = [size for r in layout.arrival_order for size in route.weights_of(route.rank, route.received_ids[r])]
    by_rank = layout.in_sample_order(received.split(sizes))
    out = [received[:0] if weighted else None for weighted in layout.weighted]
    for position, feature in enumerate(features):
        out[feature] = torch.cat([pieces[position] for pieces in by_rank])
    return tuple(out)
