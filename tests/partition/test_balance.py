from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_compile.partition import balance as module
from dmt_compile.partition.balance import RESOLUTION, balance, imbalance

items = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 10**9)), min_size=1, max_size=40)


def largest(loads: list[int], memories: list[int], assignment: list[int], bins: int) -> float:
    """The larger normalised peak, from its definition."""
    peaks = []
    for weights in (loads, memories):
        totals = [sum(w for w, b in zip(weights, assignment, strict=True) if b == bin_) for bin_ in range(bins)]
        peaks.append(max(totals) / (sum(weights) / bins))
    return max(peaks)


def longest_first(loads: list[int], memories: list[int], bins: int) -> list[int]:
    """Largest item first, to where the fuller resource stays lowest: the textbook greedy rule for two resources."""
    totals = [[0.0, 0.0] for _ in range(bins)]
    relative = [(a / sum(loads), b / sum(memories)) for a, b in zip(loads, memories, strict=True)]
    assignment = [0] * len(loads)
    for item in sorted(range(len(loads)), key=lambda i: (-max(relative[i]), i)):
        after = [max(totals[b][0] + relative[item][0], totals[b][1] + relative[item][1]) for b in range(bins)]
        assignment[item] = target = after.index(min(after))
        totals[target] = [total + weight for total, weight in zip(totals[target], relative[item], strict=True)]
    return assignment


@given(weights=items, bins=st.integers(1, 9))
def test_is_never_worse_than_strided_or_greedy(weights: list[tuple[int, int]], bins: int) -> None:
    loads, memories = map(list, zip(*weights, strict=True))
    found = largest(loads, memories, balance([loads, memories], bins), bins)
    strided = [i % bins for i in range(len(loads))]
    # Peaks closer than the resolution count as equal, so that the other resource may decide.
    assert found <= largest(loads, memories, strided, bins) + RESOLUTION
    assert found <= largest(loads, memories, longest_first(loads, memories, bins), bins) + RESOLUTION


def test_is_never_worse_than_greedy_on_tables_of_every_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        n, bins = int(rng.integers(2, 60)), int(rng.integers(2, 9))
        loads = rng.choice([80, 144, 272, 528], n).tolist()
        memories = np.exp(rng.normal(10, rng.choice([0.5, 3]), n)).astype(int).tolist()
        found = largest(loads, memories, balance([loads, memories], bins), bins)
        assert found <= largest(loads, memories, longest_first(loads, memories, bins), bins) + RESOLUTION


def test_finds_the_optimum_of_small_problems() -> None:
    rng = random.Random(0)
    for _ in range(60):
        n, bins = rng.randint(1, 7), rng.choice([2, 3])
        loads, memories = ([rng.randint(1, 20) for _ in range(n)] for _ in range(2))
        best = min(largest(loads, memories, list(a), bins) for a in itertools.product(range(bins), repeat=n))
        assert largest(loads, memories, balance([loads, memories], bins), bins) <= best * (1 + RESOLUTION)


def test_integer_program_finds_what_exchanges_miss() -> None:
    loads, memories = [7, 6, 1, 3, 9, 9, 2], [3, 4, 7, 9, 8, 6, 3]
    exact = largest(loads, memories, balance([loads, memories], 3), 3)
    assert exact < largest(loads, memories, balance([loads, memories], 3, exact=False), 3) - 0.05


def test_integer_program_keeps_its_limits_over_many_calls() -> None:
    limits = dict(module.MILP_OPTIONS)
    for _ in range(2):
        balance([[7, 6, 1, 3, 9, 9, 2], [3, 4, 7, 9, 8, 6, 3]], 3)
    assert limits == module.MILP_OPTIONS  # SciPy's milp removes entries from the options that it is given


def test_integer_program_without_an_answer_leaves_the_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    relative = module.relative_weights([[1, 1, 1, 1], [1, 1, 1, 1]], 2)
    assert module._integer_program(relative, 2, bound=0.5, reached=0.9) is None  # a perfect balance reaches 1
    loads, memories = [7, 6, 1, 3, 9, 9, 2], [3, 4, 7, 9, 8, 6, 3]
    monkeypatch.setattr(module, "_integer_program", lambda *args: None)
    assert balance([loads, memories], 3) == balance([loads, memories], 3, exact=False)


def test_one_giant_table_does_not_excuse_uneven_load() -> None:
    loads, memories = [100] * 26, [10**9] + [10] * 25
    load, memory = imbalance([loads, memories], balance([loads, memories], 2), 2)
    assert load == pytest.approx(1)
    assert memory == pytest.approx(2, abs=1e-5)


def test_bins_are_numbered_by_their_first_item() -> None:
    rng = random.Random(1)
    loads, memories = ([rng.randint(1, 99) for _ in range(30)] for _ in range(2))
    found = balance([loads, memories], 7)
    assert list(dict.fromkeys(found)) == list(range(7))


def test_same_input_gives_the_same_assignment() -> None:
    rng = random.Random(2)
    for n, bins in ((7, 3), (16, 4), (60, 8), (300, 16)):
        loads, memories = ([rng.randint(1, 999) for _ in range(n)] for _ in range(2))
        assert balance([loads, memories], bins) == balance([list(loads), list(memories)], bins)


def test_no_items_one_bin_and_items_without_memory() -> None:
    assert balance([[], []], 4) == []
    assert balance([[3, 1, 2], [1, 1, 1]], 1) == [0, 0, 0]
    assert sorted(balance([[5, 5], [0, 0]], 2)) == [0, 1]
    assert imbalance([[5, 5], [0, 0]], [0, 1], 2) == (1, 0)


def test_thousands_of_items_stay_within_the_counted_work() -> None:
    rng = np.random.default_rng(3)
    loads, memories = rng.integers(1, 500, 5000).tolist(), rng.integers(1, 10**6, 5000).tolist()
    assert largest(loads, memories, balance([loads, memories], 16), 16) < 1.01
