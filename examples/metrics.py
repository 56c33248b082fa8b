"""The area under the ROC curve, exact; the scores of all ranks in one place; how well two groupings agree."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Compute the probability that a positive scores above a negative, ties counting one half.

    Args:
        scores: (N,), any real numbers; only their order matters.
        labels: (N,), 0 or 1.

    Returns:
        The area under the ROC curve, between 0 and 1.

    Raises:
        ValueError: a score is NaN, or one of the two classes is absent.
    """
    scores_N = np.asarray(scores, dtype=np.float64)
    positive_N = np.asarray(labels) > 0.5
    if np.isnan(scores_N).any():
        raise ValueError(
            f"auc: expected numbers as scores, found {int(np.isnan(scores_N).sum())} NaN among {scores_N.size}; "
            "the training diverged, lower the learning rate"
        )
    positives = int(positive_N.sum())
    negatives = positive_N.size - positives
    if positives == 0 or negatives == 0:
        raise ValueError(
            f"auc: expected samples of both classes, found {positives} positive and {negatives} negative; "
            "evaluate on more rows"
        )
    # Equal scores share the mean of the ranks that they occupy together (1-based), which is what makes ties count 1/2.
    _, group_N, sizes = np.unique(scores_N, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = float(mean_ranks[group_N][positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def adjusted_rand_index(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Compute how well two groupings of the same things agree.

    Args:
        first, second: (N,), the group of each thing, as any integers.

    Returns:
        1 for the same grouping, about 0 for unrelated ones.

    Source: Hubert and Arabie, Comparing Partitions (1985).
    """
    _, first_N = np.unique(np.asarray(first), return_inverse=True)
    _, second_N = np.unique(np.asarray(second), return_inverse=True)
    counts = np.zeros((first_N.max(initial=0) + 1, second_N.max(initial=0) + 1))
    np.add.at(counts, (first_N, second_N), 1)
    pairs, rows, columns = ((n * (n - 1) / 2).sum() for n in (counts, counts.sum(axis=1), counts.sum(axis=0)))
    everything = first_N.size * (first_N.size - 1) / 2
    expected = rows * columns / everything if everything else 0.0
    most = (rows + columns) / 2
    return float((pairs - expected) / (most - expected)) if most != expected else 1.0


def gather_rows(values: Tensor) -> Tensor:
    """Concatenate every rank's values, in rank order; ranks may hold different numbers of them, zero included.

    Args:
        values: (n,), on the device that the process group communicates on.

    Returns:
        (sum of n over ranks,) on every rank; ``values`` itself without a process group.

    Cost: world size x the longest rank's bytes, on every rank.
    """
    if not dist.is_initialized():
        return values
    world = dist.get_world_size()
    length = torch.tensor([values.numel()], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(lengths, length)
    # all_gather wants equal shapes, so everyone sends as much as the longest rank.
    longest = max(int(n) for n in lengths)
    padded = values.new_zeros(longest)
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, lengths, strict=True)])
