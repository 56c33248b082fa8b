"""Groups by interaction: the optimum of small problems, bounds, planted blocks, repeatability."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_compile.partition.affinity import group_by_interaction, targets
from dmt_compile.partition.balance import balance, imbalance
from dmt_compile.partition.interaction import inside_share


def random_matrix(tables: int, rng: np.random.Generator) -> np.ndarray:
    matrix = rng.random((tables, tables))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 0)
    return matrix


def worth(matrix: np.ndarray, groups: list[int], strategy: str) -> float:
    """Interaction inside groups above that of the mean pair, from its definition."""
    tables = len(matrix)
    mean = matrix.sum() / (tables * (tables - 1))
    inside = sum(matrix[i, j] - mean for i in range(tables) for j in range(tables) if i != j and groups[i] == groups[j])
    return float(inside if strategy == "coherent" else -inside)


@pytest.mark.parametrize("strategy", ["coherent", "diverse"])
def test_finds_the_optimum_of_small_problems(strategy: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(15):
        tables, groups = int(rng.integers(4, 8)), int(rng.integers(2, 4))
        matrix = random_matrix(tables, rng)
        loads = [rng.integers(1, 5, tables).tolist(), rng.integers(1, 5, tables).tolist()]
        bounds = targets(loads, groups, 1.3)
        feasible = [
            list(a)
            for a in itertools.product(range(groups), repeat=tables)
            if all(x <= b + 1e-9 for x, b in zip(imbalance(loads, a, groups), bounds, strict=True))
        ]
        found = group_by_interaction(
            matrix, loads, groups, strategy=strategy, bounds=bounds, start=balance(loads, groups)
        )
        if feasible:
            assert worth(matrix, found, strategy) == pytest.approx(max(worth(matrix, a, strategy) for a in feasible))
            assert all(x <= b + 1e-6 for x, b in zip(imbalance(loads, found, groups), bounds, strict=True))


@settings(max_examples=25)
@given(
    tables=st.integers(1, 24),
    groups=st.integers(1, 6),
    strategy=st.sampled_from(["coherent", "diverse"]),
    seed=st.integers(0, 9),
)
def test_what_is_even_at_the_start_stays_within_the_bounds(tables: int, groups: int, strategy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads = [rng.integers(1, 100, tables).tolist() for _ in range(3)]
    start = balance(loads, groups)
    bounds = [max(1.1, peak) for peak in imbalance(loads, start, groups)]
    matrix = random_matrix(tables, rng)
    found = group_by_interaction(matrix, loads, groups, strategy=strategy, bounds=bounds, start=start, seed=seed)
    assert len(found) == tables
    assert set(found) <= set(range(groups))
    assert all(x <= b + 1e-6 for x, b in zip(imbalance(loads, found, groups), bounds, strict=True))
    again = group_by_interaction(matrix, loads, groups, strategy=strategy, bounds=bounds, start=start, seed=seed)
    assert found == again


def test_planted_blocks_are_found_and_the_diverse_towers_take_one_table_of_each() -> None:
    rng = np.random.default_rng(3)
    blocks = rng.permutation(np.repeat(np.arange(8), 8))
    matrix = 0.2 * random_matrix(64, rng) + 0.3 * (blocks[:, None] == blocks)
    np.fill_diagonal(matrix, 0)
    loads = [[1.0] * 64]
    arguments = {"bounds": [1.1], "start": [i % 8 for i in range(64)]}
    coherent = group_by_interaction(matrix, loads, 8, strategy="coherent", **arguments)
    assert len(set(zip(blocks, coherent, strict=True))) == 8
    diverse = group_by_interaction(matrix, loads, 8, strategy="diverse", **arguments)
    assert len(set(zip(blocks, diverse, strict=True))) == 64
    assert inside_share(matrix, diverse) < inside_share(matrix, arguments["start"]) < inside_share(matrix, coherent)


def test_a_start_beyond_the_bounds_is_mended_first() -> None:
    found = group_by_interaction(
        np.ones((8, 8)) - np.eye(8), [[1.0] * 8], 4, strategy="coherent", bounds=[1.0], start=[0] * 8
    )
    assert sorted(map(found.count, range(4))) == [2, 2, 2, 2]


def test_targets_are_no_lower_than_what_can_be_reached() -> None:
    assert targets([[1.0] * 8, [9.0, 1, 1, 1, 1, 1, 1, 1]], 4, 1.1) == pytest.approx([1.1, 2.25 * 1.1])
    assert targets([[0.0, 0.0]], 2, 1.1) == [1.1]


def test_one_table_or_one_group_needs_no_search() -> None:
    one = {"strategy": "coherent", "bounds": [1.1]}
    assert group_by_interaction(np.zeros((1, 1)), [[1.0]], 3, start=[0], **one) == [0]
    assert group_by_interaction(np.zeros((3, 3)), [[1.0] * 3], 1, start=[0] * 3, **one) == [0, 0, 0]
