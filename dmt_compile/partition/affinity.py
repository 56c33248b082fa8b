"""Group tables by how they interact, with bounds on what each group may hold.

The paper clusters points on a plane and balances how many there are. Here its clusters, and those of a spectral
clustering, are starts of a local search on the interaction itself, which exchanges tables between groups for as long
as that helps and breaks no bound. Work is bounded by counts, never by time, so that every machine finds the same.

Shape suffixes: T tables, B groups, R resources (such as load and memory), C candidates of an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmt_compile.partition.balance import Floats, Ints, lower_bounds, relative_weights
from dmt_compile.partition.kmeans import constrained_kmeans
from dmt_compile.partition.planar import distances, planar_embedding

# Tables that are looked at in all, once for each exchange that is sought; a thousand take 0.2 s.
MAX_LOOKS = 20_000
MAX_SHAKES = 100
SHAKEN = 0.1  # of the tables, moved at random between two searches


def group_by_interaction(
    matrix_TT: Floats,
    resources: Sequence[Sequence[float]],
    groups: int,
    *,
    strategy: str,
    bounds: Sequence[float],
    start: Sequence[int],
    seed: int = 0,
) -> list[int]:
    """Assign tables to groups.

    Args:
        matrix_TT: interaction of each pair, symmetric, 0 to 1.
        resources: per resource the need of each table, any unit.
        groups: number of groups.
        strategy: ``"coherent"`` puts tables that interact into one group, ``"diverse"`` into different ones.
        bounds: per resource what a group may hold, relative to the mean over groups.
        start: an assignment to improve on, such as one that is balanced.
        seed: of clusterings and random exchanges.

    Returns:
        The group of each table; groups are numbered in the order of their first tables. Of all that was found, the
        assignment that exceeds the bounds least, then the one with the most (``"diverse"``: the least) interaction
        inside groups, counted from the mean of all pairs, so that groups gain nothing by being large.

    Cost: at most 20,000 looks for an exchange, each O((T + B) R): about 4 s for 1,000 tables and 64 groups.
    """
    tables = len(matrix_TT)
    if tables < 2 or groups == 1:
        return [0] * tables
    worth_TT = matrix_TT - matrix_TT.sum() / (tables * (tables - 1))
    np.fill_diagonal(worth_TT, 0.0)
    search = _Search(worth_TT if strategy == "coherent" else -worth_TT, resources, groups, bounds)
    rng = np.random.default_rng(seed)
    found = [
        search.run(np.asarray(assignment, dtype=np.int64))
        for assignment in (
            start,
            constrained_kmeans(planar_embedding(distances(matrix_TT, strategy), seed=seed), groups, seed=seed),
            constrained_kmeans(_spectral_embedding(search.worth_TT, groups), groups, seed=seed),
        )
    ]
    best = min(found, key=search.key)
    for shake in range(MAX_SHAKES):
        if search.looks >= MAX_LOOKS:
            break
        shaken = best.copy()
        chosen = rng.permutation(tables)[: max(2, round(SHAKEN * tables))]
        # In turn between groups, which keeps their sizes, and anywhere, which does not.
        shaken[chosen] = np.roll(shaken[chosen], 1) if shake % 2 else rng.integers(groups, size=len(chosen))
        best = min(best, search.run(shaken), key=search.key)
    numbers = {old: new for new, old in enumerate(dict.fromkeys(best.tolist()))}
    return [numbers[old] for old in best.tolist()]


def targets(resources: Sequence[Sequence[float]], groups: int, limit: float) -> list[float]:
    """Return bounds of ``limit`` times the mean; of ``limit`` times the best that can be, where that is no less."""
    best = lower_bounds(relative_weights(resources, groups), groups)
    return [limit if bound <= limit else limit * bound for bound in best]


def _spectral_embedding(worth_TT: Floats, groups: int) -> Floats:
    """Return a direction for each table: its entries in the leading eigenvectors of the normalised affinities."""
    affinity_TT = worth_TT - worth_TT.min()
    np.fill_diagonal(affinity_TT, 0.0)
    scale_T = 1 / np.sqrt(np.maximum(affinity_TT.sum(axis=1), 1e-12))
    _, vectors_TT = np.linalg.eigh(scale_T[:, None] * affinity_TT * scale_T)
    leading = vectors_TT[:, -groups:]
    return np.asarray(leading / np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-12))


class _Search:
    """Exchanges tables between groups: first to exceed the bounds less, then to gain worth inside groups."""

    def __init__(
        self, worth_TT: Floats, resources: Sequence[Sequence[float]], groups: int, bounds: Sequence[float]
    ) -> None:
        self.worth_TT = worth_TT
        self.weights_TR = relative_weights(resources, groups) / np.asarray(bounds)
        self.groups = groups
        self.looks = 0
        # More than all exchanges together can gain: a bound is never traded for worth.
        self.penalty = 1e3 * max(float(np.abs(worth_TT).sum()), 1e-12)
        # A move is an exchange with a table that needs nothing.
        self.partners_CR = np.concatenate([self.weights_TR, np.zeros((groups, self.weights_TR.shape[1]))])

    def key(self, assignment: Ints) -> tuple[float, float]:
        """Order assignments, the best first."""
        same_TT = assignment[:, None] == assignment
        excess = _excess(self._totals(assignment)).sum()
        return round(float(excess), 9), -round(float(self.worth_TT[same_TT].sum()), 9)

    def run(self, assignment: Ints) -> Ints:
        """Improve an assignment until no exchange helps, or too many were sought."""
        assignment = assignment.copy()
        totals_BR = self._totals(assignment)
        member_TB = (assignment[:, None] == np.arange(self.groups)).astype(np.float64)
        inside_TB = self.worth_TT @ member_TB
        tables, unchanged, table = len(assignment), 0, 0
        while unchanged < tables and self.looks < MAX_LOOKS:
            self.looks += 1
            changed = self._exchange(assignment, totals_BR, inside_TB, table)
            unchanged = 0 if changed else unchanged + 1
            table = (table + 1) % tables
        return assignment

    def _exchange(self, assignment: Ints, totals_BR: Floats, inside_TB: Floats, table: int) -> bool:
        """Apply the best exchange of one table; tell whether there was one that helps."""
        tables, here = len(assignment), assignment[table]
        there_C = np.concatenate([assignment, np.arange(self.groups)])
        shift_CR = self.weights_TR[table] - self.partners_CR
        before_B = _excess(totals_BR)
        excess_C = _excess(totals_BR[here] - shift_CR) + _excess(totals_BR[there_C] + shift_CR)
        excess_C -= before_B[here] + before_B[there_C]
        gain_C = inside_TB[table, there_C] - inside_TB[table, here]
        gain_C[:tables] += inside_TB[:, here] - inside_TB[np.arange(tables), assignment] - 2 * self.worth_TT[table]
        score_C = gain_C - self.penalty * excess_C
        score_C[there_C == here] = -np.inf
        best = int(np.round(score_C, 9).argmax())
        if excess_C[best] > 1e-9 or (excess_C[best] > -1e-9 and gain_C[best] <= 1e-9):
            return False
        there = there_C[best]
        totals_BR[here] -= shift_CR[best]
        totals_BR[there] += shift_CR[best]
        self._move(assignment, inside_TB, table, there)
        if best < tables:
            self._move(assignment, inside_TB, best, here)
        return True

    def _move(self, assignment: Ints, inside_TB: Floats, table: int, there: int) -> None:
        inside_TB[:, assignment[table]] -= self.worth_TT[table]
        inside_TB[:, there] += self.worth_TT[table]
        assignment[table] = there

    def _totals(self, assignment: Ints) -> Floats:
        totals = [np.bincount(assignment, weights, self.groups) for weights in self.weights_TR.T]
        return np.stack(totals, axis=1)


def _excess(totals_CR: Floats) -> NDArray[np.float64]:
    """Return by how much groups exceed their bounds, which are 1 here."""
    return np.asarray(np.maximum(totals_CR - 1 - 1e-9, 0).sum(axis=1))
