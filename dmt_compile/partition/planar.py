"""Put tables on a plane so that distances between points are as given: the paper's embedding of its features.

Shape suffixes: T tables, N dimensions of the plane.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS = 300
LEARNING_RATE = 0.05  # of the largest distance
BETAS = 0.9, 0.999
PATIENCE = 30  # steps without 0.1% less stress, after which it has converged


def distances(matrix_TT: Floats, strategy: str) -> Floats:
    """Return the wished distance of each pair of tables.

    Args:
        matrix_TT: interaction, 0 to 1.
        strategy: ``"coherent"``: tables that interact are close (1 - I); ``"diverse"``: they are far apart (I).

    Source: section 3.3 of the DMT paper, its functions f.
    """
    distance_TT = 1 - matrix_TT if strategy == "coherent" else matrix_TT.copy()
    np.fill_diagonal(distance_TT, 0.0)
    return np.asarray(distance_TT)


def planar_embedding(distance_TT: Floats, dimensions: int = 2, seed: int = 0) -> Floats:
    """Return a point for each table, by Adam on the stress from a classical scaling on.

    Args:
        distance_TT: wished distances, symmetric, not negative.
        dimensions: of the plane.
        seed: of the noise that separates points which start in the same place.

    Returns:
        float64 (T, N); the best points that any step had. The same for the same arguments on one machine.

    Cost: one eigendecomposition and at most 300 steps of O(T^2 N); 1,000 tables take about 3 s on one core.
    Source: section 3.3 of the DMT paper: the sum over pairs of (|X_i - X_j| - D_ij)^2 by gradient descent. It does
        not say from where; classical scaling saves most of the steps.
    """
    tables = len(distance_TT)
    scale = float(distance_TT.max(initial=0.0))
    if tables < 2 or scale == 0:
        return np.zeros((tables, dimensions))
    points_TN = _classical_scaling(distance_TT, dimensions)
    points_TN += np.random.default_rng(seed).normal(0, 1e-2 * scale, points_TN.shape)
    best_TN, best, since = points_TN, np.inf, 0
    mean_TN, square_TN = np.zeros_like(points_TN), np.zeros_like(points_TN)
    for step in range(1, STEPS + 1):
        value, gradient_TN = _stress_and_gradient(points_TN, distance_TT)
        since = 0 if value < 0.999 * best else since + 1
        if value < best:
            best, best_TN = value, points_TN
        if since > PATIENCE:
            break
        mean_TN = BETAS[0] * mean_TN + (1 - BETAS[0]) * gradient_TN
        square_TN = BETAS[1] * square_TN + (1 - BETAS[1]) * gradient_TN**2
        mean, square = mean_TN / (1 - BETAS[0] ** step), square_TN / (1 - BETAS[1] ** step)
        rate = LEARNING_RATE * scale * (1 - (step - 1) / STEPS)
        points_TN = points_TN - rate * mean / (np.sqrt(square) + 1e-12)
    return best_TN


def stress(points_TN: Floats, distance_TT: Floats) -> float:
    """Return the sum over pairs of (|X_i - X_j| - D_ij)^2."""
    return _stress_and_gradient(points_TN, distance_TT)[0]


def _stress_and_gradient(points_TN: Floats, distance_TT: Floats) -> tuple[float, Floats]:
    square_T = (points_TN**2).sum(axis=1)
    found_TT = square_T[:, None] + square_T - 2 * (points_TN @ points_TN.T)
    np.sqrt(np.maximum(found_TT, 0, out=found_TT), out=found_TT)
    np.fill_diagonal(found_TT, 0.0)
    error_TT = found_TT - distance_TT
    value = float(np.vdot(error_TT, error_TT)) / 2
    pull_TT = np.divide(error_TT, found_TT, out=np.zeros_like(error_TT), where=found_TT > 1e-12)
    gradient_TN = 2 * (pull_TT.sum(axis=1, keepdims=True) * points_TN - pull_TT @ points_TN)
    return value, gradient_TN


def _classical_scaling(distance_TT: Floats, dimensions: int) -> Floats:
    """Return the points whose inner products come closest to those that the distances imply."""
    square_TT = distance_TT**2
    row_T = square_TT.mean(axis=1)
    values, vectors_TN = np.linalg.eigh(-0.5 * (square_TT - row_T[:, None] - row_T + row_T.mean()))
    values, vectors_TN = values[::-1][:dimensions], vectors_TN[:, ::-1][:, :dimensions]
    signs = np.sign(vectors_TN[np.abs(vectors_TN).argmax(axis=0), range(vectors_TN.shape[1])])
    points_TN = vectors_TN * signs * np.sqrt(np.maximum(values, 0))
    return np.pad(points_TN, ((0, 0), (0, dimensions - points_TN.shape[1])))
