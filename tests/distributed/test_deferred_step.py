"""Steps that wait for the next one: the same numbers whatever is done between, and never a hang."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.distributed import deferring
from tests.ranks import run_ranks, values

# Ways that ask for a gradient before the step, or add to one: nothing is left to defer.
AT_ONCE = {"clipped", "clipped_by_pytorch", "accumulated"}
TOWERS = {"tower_module": "dlrm", "tower_module_options": {"dim": 2}}


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("2x2", {"prefetched": True}),
        ("1x2", {}),
        pytest.param("2x2", {"comm_dtype": {"dense": "bfloat16"}}, marks=pytest.mark.slow),
        pytest.param("2x2", TOWERS, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_without_deferring(topology: str, options: dict[str, Any]) -> None:
    run, ranks = partial(deferring.with_and_without, **options), 4 if topology == "2x2" else 2
    for result in values(run_ranks(run, ranks, topology)):
        assert result["differ"] == []
        assert {way for way, steps in result["late"].items() if not steps} == AT_ONCE, result["late"]


def test_a_step_that_is_left_out_is_seen_in_the_numbers() -> None:
    for differ in values(run_ranks(deferring.without_finishing, 2)):
        expected = {"plain", "evaluated", "optimizer_saved", "gradients_are_read_after", "finished"}
        assert expected <= set(differ), differ


def test_nothing_is_deferred_where_an_optimizer_holds_some_dense_parameters_alone() -> None:
    assert values(run_ranks(deferring.two_optimizers, 2)) == [False] * 2


def test_two_optimizers_of_a_model_of_two_programs() -> None:
    for equal, late in values(run_ranks(deferring.optimizers_of_two_programs, 2)):
        assert equal
        assert late == [True] * 6


def test_a_rank_that_ends_after_its_step_is_a_named_error_on_the_others() -> None:
    outcomes = run_ranks(deferring.a_rank_that_ends, 4)
    for rank in (0, 2, 3):
        assert outcomes[rank].error == "CollectiveError", outcomes[rank]
        assert outcomes[rank].seconds < 60
