"""Constrained k-means: sizes within the ratio, clusters found, the optimum of the assignment step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.partition.kmeans import _assign, constrained_kmeans, size_bounds


@given(points=st.integers(1, 60), clusters=st.integers(1, 9), ratio=st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0]))
def test_sizes_keep_the_ratio(points: int, clusters: int, ratio: float) -> None:
    found = constrained_kmeans(np.random.default_rng(points).normal(size=(points, 2)), clusters, ratio)
    sizes = np.bincount(found, minlength=clusters)
    assert len(found) == points
    assert len(sizes) == clusters
    assert sizes.max() <= max(ratio * sizes.min() + 1e-9, sizes.min() + 1)


def test_bounds_leave_room_on_both_sides_of_the_mean() -> None:
    assert size_bounds(24, 8, 1.0) == (3, 3)
    assert size_bounds(26, 8, 1.0) == (3, 4)
    assert size_bounds(64, 8, 2.0) == (6, 12)
    assert size_bounds(3, 8, 1.0) == (0, 1)


def test_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 6)
    points = np.array([[0, 0], [0, 9], [9, 0], [9, 9]])[truth] + rng.normal(0, 0.5, (24, 2))
    found = constrained_kmeans(points, 4)
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 4


def test_the_assignment_is_the_cheapest_within_the_bounds() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        cost = rng.random((6, 3))
        allowed = [
            a
            for a in itertools.product(range(3), repeat=6)
            if min(map(a.count, range(3))) >= 1 and max(map(a.count, range(3))) <= 3
        ]
        best = min(sum(cost[i, k] for i, k in enumerate(a)) for a in allowed)
        assert cost[range(6), _assign(cost, 1, 3)].sum() == pytest.approx(best)


def test_the_same_seed_gives_the_same_clusters() -> None:
    points = np.random.default_rng(2).normal(size=(50, 3))
    assert np.array_equal(constrained_kmeans(points, 7, seed=3), constrained_kmeans(points, 7, seed=3))


def test_equal_points_and_no_points_are_taken() -> None:
    assert sorted(constrained_kmeans(np.zeros((4, 2)), 2).tolist()) == [0, 0, 1, 1]
    assert constrained_kmeans(np.zeros((0, 2)), 3).tolist() == []
    assert constrained_kmeans(np.ones((3, 2)), 1).tolist() == [0, 0, 0]
