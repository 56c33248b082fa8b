"""Bad input and missing ranks end in one named error on every rank that is there, within seconds."""

from __future__ import annotations

import re

import pytest

from tests.distributed import scenarios
from tests.ranks import run_ranks, values

IN_SECONDS = 60  # from the start of the processes, compiling included, on a busy machine


BAD_BATCHES = {
    "id": r"expected ids of table emb.2 in \[0, 7\), found 99 at position \d+ of rank 1's batch",
    "negative": r"expected ids of table emb.1 in \[0, 20\), found -1 at position 0 of rank 1's batch",
    "offsets": "expected offsets of table emb.3 that start at 0 and grow .* of rank 1's batch",
    "samples": "expected 3 samples in every input, found 2 in dense of rank 1's batch",
}


def test_bad_batches_on_one_rank_raise_on_all() -> None:
    results = values(run_ranks(scenarios.bad_batches, 4, list(BAD_BATCHES)))
    for number, text in enumerate(BAD_BATCHES.values()):
        assert len({messages[number] for messages in results}) == 1
        assert re.search(text, results[0][number]), results[0][number]


@pytest.mark.parametrize("phase", [pytest.param("evaluation", marks=pytest.mark.slow), "training"])
def test_a_rank_that_does_not_come_is_named(phase: str) -> None:
    outcomes = run_ranks(scenarios.absent_rank, 4, phase)
    assert outcomes[0].error == "CollectiveError", outcomes[0]
    assert "lower_to_sptt: exchange_headers: expected all of ranks [0, 1, 2, 3]" in outcomes[0].message
    assert "ranks [1, 2, 3] did not arrive" in outcomes[0].message
    assert [outcome.value for outcome in outcomes[1:]] == ["did not call"] * 3


def test_a_rank_that_raises_is_heard_of_by_all() -> None:
    outcomes = run_ranks(scenarios.raising_rank, 4)
    assert outcomes[2].error == "ValueError"
    for rank in (0, 1, 3):
        assert outcomes[rank].error == "CollectiveError", outcomes[rank]
        assert outcomes[rank].seconds < IN_SECONDS


def test_a_rank_missing_at_the_first_call_is_named() -> None:
    outcomes = run_ranks(scenarios.first_call_missing, 4)
    for outcome in outcomes[:3]:
        assert outcome.error == "CollectiveError"
        assert "found that ranks [3] did not arrive" in outcome.message


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("rows", "PlanError", "expected the same model and options on every rank"),
        pytest.param("dense", "PlanError", "expected the same model and options on every rank", marks=pytest.mark.slow),
        ("options", "PlanError", "expected the same model and options on every rank"),
        ("topology", "ConfigError", "expected 6 ranks for topology 2x3, found 2"),
        ("plan of another model", "PlanError", "expected table emb.4 as (rows, dim, dtype) = (12, 8, 'float32')"),
        ("plan for another topology", "PlanError", "expected a plan for topology 2x1, found one for 1x2"),
    ],
)
def test_ranks_that_disagree_raise_the_same_error(what: str, error: str, text: str) -> None:
    outcomes = run_ranks(scenarios.differing_models, 2, what)
    for outcome in outcomes:
        assert outcome.error == error, outcome
        assert text in outcome.message
        assert outcome.seconds < IN_SECONDS


def test_an_option_that_one_rank_misspells_ends_all_ranks() -> None:
    outcomes = run_ranks(scenarios.differing_models, 2, "unknown option")
    assert {outcome.error for outcome in outcomes} == {"ConfigError"}
    assert "found 'topologie'; did you mean 'topology'?" in outcomes[0].message


def test_ranks_in_different_programs_raise_the_same_error() -> None:
    for outcome in run_ranks(scenarios.differing_programs, 4):
        assert outcome.error == "CollectiveError", outcome
        assert (
            "expected the same program on every rank, found another one than rank 0's on ranks [1]" in outcome.message
        )


def test_ranks_in_different_programs_without_tables_raise_the_same_error() -> None:
    for outcome in run_ranks(scenarios.differing_heads, 2):
        assert outcome.error == "CollectiveError", outcome
        assert "expected the same program on every rank, found another one" in outcome.message


def test_a_data_parallel_wrapper_is_refused_by_name() -> None:
    for outcome in run_ranks(scenarios.data_parallel_wrapper, 2):
        assert outcome.error == "ConfigError", outcome
        assert "found DistributedDataParallel" in outcome.message


def test_a_missing_process_group_is_named_with_the_line_to_add() -> None:
    outcomes = run_ranks(scenarios.without_process_group, 2, environ={"NO_PROCESS_GROUP": "1"})
    for outcome in outcomes:
        assert outcome.error == "ConfigError", outcome
        assert "add torch.distributed.init_process_group()" in outcome.message


def test_replicas_that_drift_apart_are_reported() -> None:
    for outcome in run_ranks(scenarios.drifting_replicas, 4):
        assert outcome.error == "CollectiveError", outcome
        assert "expected equal dense parameters on every rank" in outcome.message


def test_a_model_that_dynamo_never_compiled_is_a_named_error_of_warmup() -> None:
    for outcome in run_ranks(scenarios.warmup_without_dynamo, 2):
        assert outcome.error == "UnsupportedGraphError", outcome
        assert "expected Dynamo to compile the model, found that it ran it as it is" in outcome.message


def test_a_sharded_model_that_dynamo_gives_up_on_is_a_named_error() -> None:
    for outcome in run_ranks(scenarios.recompile_limit, 2):
        assert outcome.error == "UnsupportedGraphError", outcome
        assert "Dynamo stopped compiling it: TORCH_LOGS=recompiles shows why" in outcome.message
