"""The meaning of the dot interaction in plain PyTorch.

Shape suffixes: B samples, F vectors of a sample, D width of a vector, E columns of the leading vector, P pairs.
"""

from __future__ import annotations

import torch


def pair_indices(vectors: int, diagonal: bool, upper: bool) -> torch.Tensor:
    """Return the pairs as (2, P) int64: a triangle of an F x F matrix by rows, with or without its diagonal."""
    if upper:
        return torch.triu_indices(vectors, vectors, 0 if diagonal else 1)
    return torch.tril_indices(vectors, vectors, 0 if diagonal else -1)


def pair_count(vectors: int, diagonal: bool) -> int:
    """Return P."""
    return vectors * (vectors + (1 if diagonal else -1)) // 2


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
    rows_P, columns_P = pair_indices(vectors_BFD.shape[1], diagonal, upper).to(vectors_BFD.device)
    pairs_BP = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))[:, rows_P, columns_P]
    return pairs_BP if leading_BE is None else torch.cat([leading_BE, pairs_BP], dim=1)


def dot_interaction_backward(
    grad_BP: torch.Tensor, vectors_BFD: torch.Tensor, diagonal: bool, upper: bool
) -> torch.Tensor:
    """Return the gradient of the vectors, (B, F, D), from that of the pairs, (B, P)."""
    samples, vectors, _ = vectors_BFD.shape
    rows_P, columns_P = pair_indices(vectors, diagonal, upper).to(vectors_BFD.device)
    grad_BFF = grad_BP.new_zeros(samples, vectors, vectors)
    grad_BFF[:, rows_P, columns_P] = grad_BP
    return torch.bmm(grad_BFF + grad_BFF.transpose(1, 2), vectors_BFD)
