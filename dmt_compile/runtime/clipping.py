"""One global gradient norm over dense replicas and sharded tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dmt_compile.runtime.distributed_session import state_of
from dmt_compile.runtime.tables import ShardedTable


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does for the flat model.

    Dense gradients, equal on every rank after the backward pass, count once; each rank adds its own tables, the first
    rank of a tower its Tower Module. Sparse gradients are coalesced first. PyTorch's own function would compute another
    norm on every rank.

    Args:
        parameters: the model's parameters; the same on every rank.
        max_norm: largest norm that is left as it is.
        norm_type: p of the p-norm, or ``inf``.
        error_if_nonfinite: raise where the norm is not finite.
        foreach: accepted for PyTorch's signature; unused.

    Returns:
        The norm before clipping, a 0-dim tensor, equal on every rank.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    Cost: one all-reduce of one number where tables are sharded.
    """
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    tables = [p for p in listed if isinstance(p, ShardedTable)]
    state = next((s for s in map(state_of, tables) if s is not None), None)
    dense_norms: list[torch.Tensor] = []
    own_norms: list[torch.Tensor] = []  # of what this rank alone counts
    for parameter in listed:
        if parameter.grad is None:
            continue
        if parameter.grad.layout == torch.sparse_coo and not parameter.grad.is_coalesced():
            parameter.grad = parameter.grad.coalesce()
        leader = None if state is None else state.leader(parameter)
        if state is not None and leader not in (None, state.world.rank):
            continue
        norms = dense_norms if leader is None and not isinstance(parameter, ShardedTable) else own_norms
        norms.append(torch.linalg.vector_norm(_values(parameter.grad).float(), norm_type))
    device = (dense_norms + own_norms)[0].device if dense_norms or own_norms else torch.device("cpu")
    infinite = norm_type == float("inf")

    def combine(norms: list[torch.Tensor]) -> torch.Tensor:
        if not norms:
            return torch.zeros((), device=device)
        stacked = torch.stack(norms)
        return stacked.max() if infinite else stacked.pow(norm_type).sum()

    from_ranks = combine(own_norms)
    if state is not None:
        wire = from_ranks.to(state.world.device)
        from_ranks = state.world.start_all_reduce(wire, "clip_grad_norm_", maximum=infinite).wait().to(device)
    from_dense = combine(dense_norms)
    total = torch.maximum(from_dense, from_ranks) if infinite else (from_dense + from_ranks).pow(1 / norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"clip_grad_norm_: expected a finite norm of order {norm_type}, found {total.item()}; "
            "pass error_if_nonfinite=False to go on"
        )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for parameter in listed:
        if parameter.grad is not None:
            values = _values(parameter.grad)
            values.mul_(factor.to(values.dtype))
    return total


def _values(gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(gradient, ShardedTable):
        return gradient.local
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient
