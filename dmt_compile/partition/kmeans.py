"""K-means whose clusters have nearly the same number of points.

Shape suffixes: T points, N dimensions, K clusters, S places.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDS = 30
# Assignment problems of a thousand points take a tenth of a second and more: fewer starts then.
STARTS, STARTS_OF_MANY, MANY = 8, 1, 300


def size_bounds(points: int, clusters: int, ratio: float) -> tuple[int, int]:
    """Return the least and the largest size of a cluster, the largest at most ``ratio`` times the least.

    Where no whole numbers are so close, sizes differ by at most one. Of all bounds that the ratio allows these leave
    as much room above the mean as below.
    """
    mean = points / clusters
    for least in sorted(range(1, math.floor(mean) + 1), key=lambda size: abs(math.log(size * math.sqrt(ratio) / mean))):
        largest = math.floor(least * ratio + 1e-9)
        if largest * clusters >= points:
            return least, largest
    return math.floor(mean), math.ceil(mean)


def constrained_kmeans(points_TN: Floats, clusters: int, ratio: float = 1.0, seed: int = 0) -> Ints:
    """Cluster points with balanced sizes.

    Args:
        points_TN: the points.
        clusters: number of clusters; where it exceeds the points, some stay empty.
        ratio: the largest cluster has at most ``ratio`` times the points of the smallest (the paper's R), or one point
            more.
        seed: of the starts.

    Returns:
        int64 (T,): the cluster of each point; the best of several starts. The same for the same arguments.

    Cost: an assignment problem of (clusters x largest size)^2 a round, at most 30 rounds a start.
    Source: Bradley, Bennett and Demiriz, Constrained K-Means Clustering (2000); section 3.3 of the DMT paper.
    """
    if clusters == 1 or not len(points_TN):
        return np.zeros(len(points_TN), dtype=np.int64)
    bounds = size_bounds(len(points_TN), clusters, ratio)
    rng = np.random.default_rng(seed)
    best, least = np.zeros(len(points_TN), dtype=np.int64), np.inf
    for _ in range(STARTS if len(points_TN) <= MANY else STARTS_OF_MANY):
        centers_KN = _spread_centers(points_TN, clusters, rng)
        found = np.full(len(points_TN), -1)
        for _ in range(ROUNDS):
            cost_TK = _square_distances(points_TN, centers_KN)
            before, found = found, _assign(cost_TK, *bounds)
            if (before == found).all():
                break
            for cluster in np.unique(found):
                centers_KN[cluster] = points_TN[found == cluster].mean(axis=0)
        total = float(_square_distances(points_TN, centers_KN)[range(len(found)), found].sum())
        if total < least - 1e-9:
            best, least = found, total
    return best


def _square_distances(points_TN: Floats, centers_KN: Floats) -> Floats:
    crossed_TK = points_TN @ centers_KN.T
    return np.asarray((points_TN**2).sum(axis=1)[:, None] + (centers_KN**2).sum(axis=1) - 2 * crossed_TK)


def _spread_centers(points_TN: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """Draw first centers far from each other (k-means++)."""
    chosen = [int(rng.integers(len(points_TN)))]
    nearest_T = np.full(len(points_TN), np.inf)
    for _ in range(clusters - 1):
        nearest_T = np.minimum(nearest_T, _square_distances(points_TN, points_TN[chosen[-1:]])[:, 0])
        weights_T = np.maximum(nearest_T, 0) + 1e-12
        chosen.append(int(rng.choice(len(points_TN), p=weights_T / weights_T.sum())))
    return points_TN[chosen].copy()


def _assign(cost_TK: Floats, least: int, largest: int) -> Ints:
    """Assign points to clusters at the least total cost, with bounds on the sizes.

    Every cluster has ``least`` places that must be taken and ``largest - least`` that may be: points without a point
    fill the latter for nothing, and the former never.
    """
    points, clusters = cost_TK.shape
    must_S = np.repeat(np.arange(clusters), least)
    may_S = np.repeat(np.arange(clusters), largest - least)
    places_S = np.concatenate([must_S, may_S])
    forbidden = 1 + cost_TK.max() * points
    spare = np.zeros((len(places_S) - points, len(places_S)))
    spare[:, : len(must_S)] = max(forbidden, 1.0)
    rows, places = linear_sum_assignment(np.concatenate([cost_TK[:, places_S], spare]))
    return np.asarray(places_S[places[rows < points]].astype(np.int64))
