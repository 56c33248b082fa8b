"""The planar embedding: recovers points, lowers the stress, repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from dmt_compile.partition.planar import _classical_scaling, _stress_and_gradient, distances, planar_embedding, stress


def between(points_TN: np.ndarray) -> np.ndarray:
    return np.sqrt(((points_TN[:, None] - points_TN) ** 2).sum(axis=2))


def random_distances(tables: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).random((tables, tables))
    return distances((matrix + matrix.T) / 2, "coherent")


def test_strategies_are_the_papers_functions() -> None:
    matrix = np.array([[0.0, 0.25], [0.25, 0.0]])
    assert distances(matrix, "coherent").tolist() == [[0, 0.75], [0.75, 0]]
    assert distances(matrix, "diverse").tolist() == [[0, 0.25], [0.25, 0]]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_planted_points_are_recovered(dimensions: int) -> None:
    wished = between(np.random.default_rng(dimensions).normal(size=(40, dimensions)))
    found = planar_embedding(wished, dimensions)
    assert found.shape == (40, dimensions)
    assert np.abs(between(found) - wished).max() < 1e-3 * wished.max()


@pytest.mark.parametrize("seed", range(5))
def test_the_stress_falls_below_that_of_classical_scaling(seed: int) -> None:
    wished = random_distances(30, seed)
    assert stress(planar_embedding(wished), wished) < 0.9 * stress(_classical_scaling(wished, 2), wished)


def test_the_stress_is_the_papers_sum_and_its_gradient_is_right() -> None:
    rng = np.random.default_rng(0)
    points, wished = rng.normal(size=(6, 3)), random_distances(6, 1)
    expected = sum((np.linalg.norm(points[i] - points[j]) - wished[i, j]) ** 2 for i in range(6) for j in range(i))
    value, gradient = _stress_and_gradient(points, wished)
    assert value == pytest.approx(expected)
    moved = points.copy()
    moved[2, 1] += 1e-6
    assert gradient[2, 1] == pytest.approx((stress(moved, wished) - value) / 1e-6, rel=1e-4)


def test_a_seed_gives_the_same_points() -> None:
    wished = random_distances(20, 3)
    assert np.array_equal(planar_embedding(wished, seed=1), planar_embedding(wished, seed=1))
    assert not np.array_equal(planar_embedding(wished, seed=1), planar_embedding(wished, seed=2))


def test_nothing_to_place_is_placed() -> None:
    assert planar_embedding(np.zeros((0, 0))).shape == (0, 2)
    assert planar_embedding(np.zeros((1, 1))).tolist() == [[0, 0]]
    assert planar_embedding(np.zeros((4, 4))).tolist() == [[0, 0]] * 4
    assert planar_embedding(np.array([[0.0, 1.0], [1.0, 0.0]]), dimensions=5).shape == (2, 5)
