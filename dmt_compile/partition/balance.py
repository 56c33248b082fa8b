"""Spread items with several weights (such as load and memory) over equal bins, deterministically.

Searches run one after the other until one meets a bound, and the best assignment that any of them met is taken: greedy
ones, pairwise exchanges from their results, and, for small problems that are still open, an integer program. Work is
bounded by counts, never by time, so that every machine finds the same assignment.

Shape suffixes: N items, B bins, R resources (such as load and memory).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron, vstack

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Peaks that differ by less than this part of the mean count as equal: then the other resource decides.
RESOLUTION = 0.01
# Beyond this many unknowns (N x B) even the root of the integer program's search tree takes long.
MILP_MAX_UNKNOWNS = 128
MILP_UNITS = 10 / RESOLUTION
# No time limit: it would make the result depend on the machine.
MILP_OPTIONS = {"node_limit": 20, "mip_rel_gap": RESOLUTION}
# What bounds the exchanges: sweeps over the bins, exchanges in all, and the items of one bin and of all others that are
# weighed against each other.
SWEEPS = 3
MAX_EXCHANGES = 400
MAX_CANDIDATES = 16, 256


def balance(resources: Sequence[Sequence[float]], bins: int, exact: bool = True) -> list[int]:
    """Assign each item to a bin so that the largest bin is as small as found possible.

    Args:
        resources: per resource the need of each item, any unit, not negative.
        bins: number of bins, at least 1.
        exact: let an integer program try what the quicker searches leave open; tenths of a second.

    Returns:
        The bin of each item; bins are numbered in the order of their first items. Of the peaks that
        :func:`imbalance` returns, the largest is minimised, then their sum, then the spread over the bins.
    """
    items = len(resources[0])
    if bins == 1 or not items:
        return [0] * items
    weights_NR = relative_weights(resources, bins)
    bound = max(lower_bounds(weights_NR, bins))
    found: list[Ints] = [np.arange(items) % bins]  # strided: so that the result is never worse
    reached = np.inf
    for by_peak in (False, True):
        if reached > bound + RESOLUTION:
            found.append(_greedy(weights_NR, bins, by_peak))
            found.append(_exchange(weights_NR, found[-1], bins, squarings=2))
            found.append(_exchange(weights_NR, found[-1], bins, squarings=4))
            reached = min(_peak(weights_NR, assignment, bins) for assignment in found)
    if exact and reached > bound + RESOLUTION and items * bins <= MILP_MAX_UNKNOWNS:
        solved = _integer_program(weights_NR, bins, bound, reached)
        found += [] if solved is None else [solved, _exchange(weights_NR, solved, bins, squarings=4)]
    best = min(found, key=lambda assignment: _key(weights_NR, assignment, bins)).tolist()
    numbers = {old: new for new, old in enumerate(dict.fromkeys(best))}
    return [numbers[old] for old in best]


def imbalance(resources: Sequence[Sequence[float]], assignment: Sequence[int], bins: int) -> tuple[float, ...]:
    """Return for each resource the most that a bin holds, relative to the mean over all bins.

    Args:
        resources: per resource the need of each item, any unit.
        assignment: the bin of each item.
        bins: number of bins.

    Returns:
        One number a resource; 1 is perfect balance, 0 means that no item needs any.
    """
    weights_NR = relative_weights(resources, bins)
    peaks_R = _totals(weights_NR, np.asarray(assignment, dtype=np.int64), bins).max(axis=0)
    return tuple(float(peak) for peak in peaks_R)


def relative_weights(resources: Sequence[Sequence[float]], bins: int) -> Floats:
    """Return what each item needs, (N, R), scaled so that the mean bin holds 1 of each resource."""
    weights_NR = np.array(resources, dtype=np.float64).T.reshape(-1, len(resources))
    means_R = weights_NR.sum(axis=0) / bins
    return weights_NR / np.where(means_R > 0, means_R, 1)


def _totals(weights_NR: Floats, assignment: Ints, bins: int) -> Floats:
    return np.stack([np.bincount(assignment, weights_NR[:, r], bins) for r in range(weights_NR.shape[1])], axis=1)


def _key(weights_NR: Floats, assignment: Ints, bins: int) -> tuple[int, int, float]:
    """Order assignments, the best first: by the largest peak, the sum of the peaks, the spread."""
    totals_BR = _totals(weights_NR, assignment, bins)
    peaks_R = totals_BR.max(axis=0)
    spread = round(float((totals_BR**2).sum()), 9)
    return round(float(peaks_R.max()) / RESOLUTION), round(float(peaks_R.sum()) / RESOLUTION), spread


def _peak(weights_NR: Floats, assignment: Ints, bins: int) -> float:
    return float(_totals(weights_NR, assignment, bins).max())


def lower_bounds(weights_NR: Floats, bins: int) -> list[float]:
    """Return for each resource a largest bin that no assignment can beat, in units of the mean."""
    bounds_R = np.maximum(weights_NR.max(axis=0, initial=0.0), 1.0)
    if len(weights_NR) > bins:  # two of the B + 1 largest items must share a bin
        largest_NR = np.sort(weights_NR, axis=0)[::-1]
        bounds_R = np.maximum(bounds_R, largest_NR[bins - 1] + largest_NR[bins])
    return [float(bound) for bound in bounds_R]


def _greedy(weights_NR: Floats, bins: int, by_peak: bool) -> Ints:
    """Place the largest items first, each where the fuller resource stays lowest, or the sum of squares grows least."""
    totals_BR = np.zeros((bins, weights_NR.shape[1]))
    assignment = np.zeros(len(weights_NR), dtype=np.int64)
    for item in np.argsort(-weights_NR.max(axis=1), kind="stable"):
        cost_B = (totals_BR + weights_NR[item]).max(axis=1) if by_peak else totals_BR @ weights_NR[item]
        assignment[item] = target = np.round(cost_B, 12).argmin()
        totals_BR[target] += weights_NR[item]
    return assignment


def _strain(totals: Floats, squarings: int) -> Floats:
    """Sum a high power over resources: the higher, the closer to the peak, and the less is made of what is below it."""
    power = totals
    for _ in range(squarings):
        power = power * power
    return np.asarray(power.sum(axis=-1))


def _exchange(weights_NR: Floats, assignment: Ints, bins: int, squarings: int) -> Ints:
    """Move one item, or swap two, between one bin and any other, the fullest bins first, while that lowers strain."""
    assignment = assignment.copy()
    left = MAX_EXCHANGES
    for _ in range(SWEEPS):
        before = left
        strain_B = _strain(_totals(weights_NR, assignment, bins), squarings)
        for bin_ in np.argsort(-strain_B, kind="stable"):
            while left and _improve(weights_NR, assignment, bins, bin_, squarings):
                left -= 1
        if left == before:
            break
    return assignment


def _improve(weights_NR: Floats, assignment: Ints, bins: int, bin_: int, squarings: int) -> bool:
    """Apply the best exchange between ``bin_`` and any other one; tell whether there was one that helps."""
    inside, outside = np.flatnonzero(assignment == bin_), np.flatnonzero(assignment != bin_)
    if not len(inside):
        return False
    inside, outside = (
        items[:: -(-len(items) // most) or 1] for items, most in zip((inside, outside), MAX_CANDIDATES, strict=True)
    )
    other_bins = np.delete(np.arange(bins), bin_)
    # A move is a swap with an item of no weight.
    partners_KR = np.concatenate([np.zeros((bins - 1, weights_NR.shape[1])), weights_NR[outside]])
    partner_bins_K = np.concatenate([other_bins, assignment[outside]])
    shifted_IKR = weights_NR[inside][:, None] - partners_KR
    totals_BR = _totals(weights_NR, assignment, bins)
    strain_B = _strain(totals_BR, squarings)
    before_K = strain_B[bin_] + strain_B[partner_bins_K]
    gain_IK = before_K - (
        _strain(totals_BR[bin_] - shifted_IKR, squarings) + _strain(totals_BR[partner_bins_K] + shifted_IKR, squarings)
    )
    gain_IK[gain_IK <= 1e-9 * before_K] = 0  # rounding, not a gain
    item, partner = np.unravel_index(int(gain_IK.argmax()), gain_IK.shape)
    if gain_IK[item, partner] <= 0:
        return False
    assignment[inside[item]] = partner_bins_K[partner]
    if partner >= len(other_bins):
        assignment[outside[partner - len(other_bins)]] = bin_
    return True


def _integer_program(weights_NR: Floats, bins: int, bound: float, reached: float) -> Ints | None:
    """Solve the assignment as a mixed-integer program with HiGHS.

    Args:
        weights_NR: relative weights.
        bins: number of bins.
        bound: a peak that cannot be beaten; the solver stops near it.
        reached: a peak that is already reached; only better ones are looked for.

    Returns:
        The bin of each item, or ``None`` where nothing better was found within the node limit.

    Unknowns: x[i, b] = item i is in bin b; then the largest peak, which is minimised.
    """
    items, resources = weights_NR.shape
    order = np.argsort(-weights_NR.max(axis=1), kind="stable")
    # Weights over ten orders of magnitude make HiGHS slow and inexact: count in whole units, ten to the resolution.
    units_NR = np.round(weights_NR[order] * MILP_UNITS)
    placed_once = hstack([kron(eye_array(items), np.ones((1, bins))), csr_array((items, 1))])
    bin_totals = [hstack([kron(units_NR[:, r][None], eye_array(bins)), -np.ones((bins, 1))]) for r in range(resources)]
    # Bins are alike, so item k may be kept to the first k + 1 of them: mirrored solutions are not searched again.
    allowed = np.tril(np.ones((items, bins))).ravel()
    solution = milp(
        np.append(np.zeros(items * bins), 1.0),
        integrality=np.append(np.ones(items * bins), 0.0),
        bounds=Bounds(np.append(np.zeros(items * bins), bound * MILP_UNITS), np.append(allowed, reached * MILP_UNITS)),
        constraints=[
            LinearConstraint(placed_once, 1.0, 1.0),
            LinearConstraint(vstack(bin_totals), -np.inf, 0.0),
        ],
        options=dict(MILP_OPTIONS),  # milp changes what it is given
    )
    if solution.x is None:
        return None
    assignment = np.empty(items, dtype=np.int64)
    assignment[order] = solution.x[:-1].reshape(items, bins).argmax(axis=1)
    return assignment
