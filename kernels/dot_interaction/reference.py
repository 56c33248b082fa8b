"""The meaning of the dot interaction in plain PyTorch.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, E columns of the leading vector, P pairs.
"""

from __future__ import annotations

import functools

import torch


def pair_indices(vectors: int, diagonal: bool, upper: bool) -> torch.Tensor:
    """Return the pairs as (2, P) int64: a triangle of an F x F matrix by rows, with or without its diagonal."""
    if upper:
        return torch.triu_indices(vectors, vectors, 0 if diagonal else 1)
    return torch.tril_indices(vectors, vectors, 0 if diagonal else -1)


def pair_count(vectors: int, diagonal: bool) -> int:
    """Return P."""
    return vectors * (vectors + (1 if diagonal else -1)) // 2


@functools.lru_cache(maxsize=64)
def _selections(vectors: int, diagonal: bool, upper: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each pair's place in a flattened F x F matrix, (P,), and each place's pair, (F * F,), both int64.

    Both places of a pair have it; a place on a diagonal that is no pair has pair 0.
    """
    with torch.inference_mode(False):  # they outlive the call
        rows_P, columns_P = pair_indices(vectors, diagonal, upper)
        pair_FF = torch.zeros(vectors, vectors, dtype=torch.int64)
        pair_FF[rows_P, columns_P] = pair_FF[columns_P, rows_P] = torch.arange(len(rows_P))
        return (rows_P * vectors + columns_P).to(device), pair_FF.flatten().to(device)


def dot_interaction(
    vectors_BFD: torch.Tensor, leading_BE: torch.Tensor | None, diagonal: bool, upper: bool
) -> torch.Tensor:
    """Return the dot products of all pairs of a sample's vectors, behind its leading vector.

    Args:
        vectors_BFD: (B, F, D) floating point.
        leading_BE: (B, E) of the same dtype, or ``None`` for E = 0.
        diagonal: each vector with itself, too.
        upper: pairs in the order of ``torch.triu_indices``, else of ``torch.tril_indices``.

    Returns:
        (B, E + P) of the same dtype.
    """
    places_P, _ = _selections(vectors_BFD.shape[1], diagonal, upper, vectors_BFD.device)
    pairs_BP = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2)).flatten(1).index_select(1, places_P)
    return pairs_BP if leading_BE is None else torch.cat([leading_BE, pairs_BP], dim=1)


def dot_interaction_backward(
    grad_BP: torch.Tensor, vectors_BFD: torch.Tensor, diagonal: bool, upper: bool
) -> torch.Tensor:
    """Return the gradient of the vectors, (B, F, D), from that of the pairs, (B, P)."""
    vectors = vectors_BFD.shape[1]
    _, pair_FF = _selections(vectors, diagonal, upper, vectors_BFD.device)
    if not grad_BP.shape[1]:  # one vector has no pair
        return torch.zeros_like(vectors_BFD)
    both_BFF = grad_BP.index_select(1, pair_FF).unflatten(1, (vectors, vectors))  # G + G^T, but for the diagonal
    of_itself_BF = both_BFF.diagonal(dim1=1, dim2=2)
    of_itself_BF.mul_(2) if diagonal else of_itself_BF.zero_()
    return torch.bmm(both_BFF, vectors_BFD)
