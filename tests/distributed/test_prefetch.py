"""Ids of the next batch go ahead of its step: the same numbers, errors when a batch is used, and never a hang."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile import Topology
from dmt_compile.errors import ConfigError
from tests.distributed import prefetching
from tests.distributed.prefetching import STEPS
from tests.ranks import run_ranks, values


@pytest.mark.parametrize(
    ("kind", "topology", "id_exchange"),
    [
        ("dlrm", "2x2", "hierarchical"),
        ("every lookup", "1x2", "global"),
        pytest.param("dlrm", "2x1", "global", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_without_prefetching(kind: str, topology: str, id_exchange: str) -> None:
    run, ranks = partial(prefetching.with_and_without, id_exchange=id_exchange), Topology.parse(topology).world_size
    for result in values(run_ranks(run, ranks, kind, topology)):
        assert result == {"equal": True, "training": STEPS - 2, "evaluation": STEPS - 2}


@pytest.mark.parametrize(
    ("deferred", "waits"),
    [
        (False, ["intra", "peer", "ids of the next batch leave"]),
        (True, ["intra", "dense_gradients", "ids of the next batch leave", "dense_gradients", "peer"]),
    ],
)
def test_ids_of_the_next_batch_leave_while_a_rank_waits_for_other_hosts(deferred: bool, waits: list[str]) -> None:
    for events in values(run_ranks(prefetching.order_of_a_step, 4, deferred)):
        assert events == waits


def test_a_faulty_batch_raises_when_it_is_used_on_all_ranks() -> None:
    found = values(run_ranks(prefetching.faulty_next_batch, 2))
    assert [done for done, _ in found] == [4] * 2
    assert {message for _, message in found} == {found[0][1]}
    assert "expected ids of table emb.2 in [0, 7), found 99" in found[0][1]
    assert "of rank 1's batch" in found[0][1]


@pytest.mark.parametrize("fewer", [1, 4])  # 4: before anything was sent off
def test_a_loader_that_ends_early_is_a_named_error_on_the_others(fewer: int) -> None:
    outcomes = run_ranks(prefetching.loader_that_ends_early, 4, fewer)
    assert outcomes[1].value == "finished"
    for rank in (0, 2, 3):
        assert outcomes[rank].error == "CollectiveError", outcomes[rank]
        assert outcomes[rank].seconds < 60


def test_a_batch_that_was_written_to_is_distributed_anew() -> None:
    assert values(run_ranks(prefetching.changed_batch, 2)) == [True] * 2


@pytest.mark.parametrize(
    ("written", "reason"), [(False, r"its ids depend on \w*scale\w*"), (True, "the model writes in place to its ids")]
)
def test_ids_that_only_their_step_has_stay_with_it(written: bool, reason: str) -> None:
    for lines in values(run_ranks(prefetching.computed_ids, 2, written)):
        [line] = lines
        assert re.fullmatch(f"prefetch: batches pass through as they are, since {reason}", line)


def test_one_process_passes_batches_through() -> None:
    model = torch.compile(nn.Linear(2, 2), backend="dmt")
    batches = [torch.ones(1, 2), torch.ones(3, 2)]
    assert list(dmt_compile.prefetch(batches, model)) == batches  # type: ignore[comparison-overlap]


def test_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefetch: expected what torch\.compile\(model, backend='dmt'\) returned"):
        dmt_compile.prefetch([], nn.Linear(2, 2))
