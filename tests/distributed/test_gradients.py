"""Dense gradients among real ranks: their sums, what they send, every way backward, and ranks that do not come."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dmt_compile import Topology
from dmt_compile.cost.gradients import gradient_traffic
from dmt_compile.runtime.averaging import Reduction
from tests._tolerances import FORWARD, GRADIENT
from tests.distributed import gradients, scenarios
from tests.distributed.gradients import BUCKETS, TYPES, wire_of
from tests.ranks import run_ranks, values

slow = pytest.mark.slow

LONGEST_SUM = 64  # ids of one row in a global batch, and the widest layer


@pytest.mark.parametrize(
    ("topology", "reduction"),
    [
        ("2x2", wire_of(None)),
        ("2x2", wire_of("bfloat16")),
        ("4x1", wire_of("float16", hosts=4)),
        ("1x4", wire_of(None, hosts=1)),
        ("1x3", wire_of("bfloat16", hosts=1)),
    ],
)
def test_hierarchical_sums_are_those_of_the_simulated_ranks_bit_by_bit(topology: str, reduction: Reduction) -> None:
    shape = Topology.parse(topology)
    results = values(run_ranks(gradients.sums, shape.world_size, topology, reduction))
    assert all(result["same"] for result in results)
    sent: dict[str, int] = {"intra": 0, "cross": 0}
    for shapes, dtype in zip(BUCKETS, TYPES, strict=True):
        elements = sum(torch.Size(s).numel() for s in shapes)
        hop = gradient_traffic(shape, elements, dtype.itemsize, True, reduction.wire(dtype).itemsize)
        sent = {"intra": sent["intra"] + hop.intra_bytes, "cross": sent["cross"] + hop.cross_bytes}
    for link, expected_bytes in sent.items():
        key = "dense_gradients", "backward", link
        assert sum(result["sent"].get(key, 0) for result in results) == expected_bytes


@pytest.mark.parametrize("wire_dtype", [pytest.param(None, marks=slow), "bfloat16"])
def test_towers_over_several_hosts_sum_among_their_own_ranks(wire_dtype: str | None) -> None:
    results = values(run_ranks(gradients.sums, 8, "4x2", wire_of(wire_dtype, hosts=2, tower=0)))
    assert all(result["same"] for result in results)
    assert [result["first"] == results[0]["first"] for result in results] == [True] * 4 + [False] * 4


def test_each_step_that_breaks_is_seen_in_the_sums() -> None:
    for said in values(run_ranks(gradients.broken, 4)):
        assert said.pop("nothing")
        assert len(said) == 5
        assert not any(said.values()), said


@pytest.mark.parametrize("hierarchical", [True, pytest.param(False, marks=slow)])
def test_every_way_backward_gives_averages(hierarchical: bool) -> None:
    for said in values(run_ranks(gradients.passes, 4, hierarchical)):
        assert len(said) == 8
        assert all(said.values()), said


@pytest.mark.parametrize("hierarchical", [True, pytest.param(False, marks=slow)])
def test_a_rank_that_stays_away_from_the_backward_pass_is_named(hierarchical: bool) -> None:
    outcomes = run_ranks(gradients.absent, 4, hierarchical)
    for outcome in outcomes[:3]:
        assert outcome.error == "CollectiveError", outcome
        assert "dense_gradients: expected all of ranks" in outcome.message
        assert "ranks [3] did not arrive" in outcome.message
        assert outcome.seconds < 30
    assert outcomes[3].value == "stayed away"


@pytest.mark.parametrize(
    ("kind", "topology", "options"),
    [
        ("adam", "2x2", {"dense_reduction": "flat"}),
        pytest.param("momentum", "1x2", {"dense_reduction": "hierarchical"}, marks=slow),
        pytest.param("adagrad", "2x1", {"dense_reduction": "hierarchical"}, marks=slow),
    ],
)
def test_either_reduction_trains_as_the_flat_model(kind: str, topology: str, options: dict[str, Any]) -> None:
    ranks = Topology.parse(topology).world_size
    results = values(run_ranks(partial(scenarios.train, **options), ranks, kind, False, topology, False, None))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        for name in ("gradient", "weights"):
            assert result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5, name


@pytest.mark.parametrize("wire_dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_replicas_stay_equal_bit_by_bit_under_low_precision(wire_dtype: str) -> None:
    results = values(run_ranks(gradients.low_precision, 4, wire_dtype))
    for result in results:
        assert result["weights"] == results[0]["weights"]
        assert result["same"], result["worst"]


@pytest.mark.parametrize("dense_compiler", ["eager", pytest.param("inductor", marks=slow)])
def test_gradients_leave_before_embeddings_go_back_and_are_waited_for_last(dense_compiler: str) -> None:
    of_the_top = ["dense_2 goes back", "bucket 0 leaves", "dense_1 goes back", "bucket 1 leaves"]
    for events in values(run_ranks(gradients.order_of_a_backward_pass, 4, dense_compiler)):
        assert events[:4] == of_the_top
        assert events[-1] == "all are waited for"
        rest = ["bucket 2 leaves", "dense_0 goes back", "intra backward", "peer backward"]
        assert sorted(events[4:-1]) == rest
