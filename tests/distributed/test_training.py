"""Four real ranks train as the flat model on the concatenated batch does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dmt_compile import Topology
from tests._tolerances import FORWARD, GRADIENT
from tests.distributed import scenarios
from tests.passes.test_split_tables import PIECES, in_rows
from tests.ranks import run_ranks, values

slow = pytest.mark.slow

LONGEST_SUM = 64  # ids of one row in a global batch, and the widest layer


@pytest.mark.parametrize(
    ("kind", "sparse", "topology", "built_after", "clip"),
    [
        pytest.param("sgd", False, "1x2", False, None, marks=slow),
        ("sgd", True, "4x1", False, 0.5),
        pytest.param("momentum", False, "1x4", True, None, marks=slow),
        ("adagrad", False, "2x2", False, 0.5),
        pytest.param("adagrad", True, "2x1", True, None, marks=slow),
        ("adam", False, "2x1", True, None),
        ("sparse_adam", True, "1x2", False, None),
    ],
)
def test_training_equals_the_flat_model(
    kind: str, sparse: bool, topology: str, built_after: bool, clip: float | None
) -> None:
    check_training(kind, sparse, topology, built_after, clip)


@pytest.mark.parametrize(
    ("kind", "sparse", "topology", "options"),
    [
        ("adagrad", False, "2x2", {}),
        pytest.param("sparse_adam", True, "2x2", {"towers": 1}, marks=slow),
        ("sgd", True, "2x1", {}),
        pytest.param("adam", False, "2x2", {"towers": 4}, marks=slow),
    ],
)
def test_training_with_ids_by_way_of_hosts_equals_the_flat_model(
    kind: str, sparse: bool, topology: str, options: dict[str, Any]
) -> None:
    check_training(kind, sparse, topology, False, None, id_exchange="hierarchical", **options)


def check_training(
    kind: str, sparse: bool, topology: str, built_after: bool, clip: float | None, **options: Any
) -> None:
    step, ranks = partial(scenarios.train, **options), Topology.parse(topology).world_size
    results = values(run_ranks(step, ranks, kind, sparse, topology, built_after, clip))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        for name in ("gradient", "norm", "weights"):
            assert result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5, name
    owned = [sum(result["owned"]) for result in results]
    assert sum(owned) == (50 + 20 + 7 + 33 + 11) * 8  # every element once
    per_element = {"sgd": 0, "momentum": 1, "adagrad": 1, "adam": 2, "sparse_adam": 2}[kind]
    assert [result["state"] for result in results] == [per_element * elements for elements in owned]


@pytest.mark.parametrize(
    ("kind", "sparse", "attached_after", "ranks"),
    [("row_wise_adagrad", True, False, 4), ("adagrad", False, True, 2)],
)
def test_optimizers_in_the_backward_pass_step_as_the_flat_model_s(
    kind: str, sparse: bool, attached_after: bool, ranks: int
) -> None:
    results = values(run_ranks(scenarios.train_in_backward, ranks, kind, sparse, attached_after))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        assert result["weights"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5
        assert result["steps"] == len(scenarios.SIZES) * result["owned"]
    rows = 50 + 20 + 7 + 33 + 11
    elements = rows if kind == "row_wise_adagrad" else 8 * rows  # each once
    assert sum(result["state"] for result in results) == elements


@pytest.mark.parametrize("id_exchange", [pytest.param("global", marks=slow), "hierarchical"])
def test_lookups_of_every_kind_train_as_the_flat_model_s(id_exchange: str) -> None:
    step = partial(scenarios.train_every_lookup, id_exchange=id_exchange)
    results = values(run_ranks(step, 4, "2x2", False))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        assert result["evaluation"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        assert result["gradient"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5
        assert result["graphs"] == 2
    assert results[0]["weights"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5


DLRM_PIECES = [
    ["emb.0[:, 0:4]", "emb.1[:, 4:8]"],
    ["emb.0[:, 4:8]", "emb.2"],
    ["emb.3[:, 2:8]", "emb.1[:, 0:4]"],
    ["emb.3[:, 0:2]", "emb.4"],
]
# Rank 3 holds the columns between its pieces of emb.3 as well, which it never reads: their gradient is 0.
WITH_A_GAP = [*DLRM_PIECES[:2], ["emb.3[:, 2:6]", "emb.1[:, 0:4]"], ["emb.3[:, 0:2]", "emb.3[:, 6:8]", "emb.4"]]


@pytest.mark.parametrize(
    ("kind", "sparse", "clip", "options", "compared"),
    [
        ("adagrad", False, 0.5, {"partition": DLRM_PIECES}, ("gradient", "norm", "weights")),
        pytest.param("sparse_adam", True, None, {"partition": WITH_A_GAP}, ("weights",), marks=slow),
        pytest.param("adam", False, None, {"towers": 8, "split_columns": True}, ("weights",), marks=slow),
    ],
)
def test_column_pieces_train_as_the_flat_model(
    kind: str, sparse: bool, clip: float | None, options: dict[str, Any], compared: tuple[str, ...]
) -> None:
    results = values(run_ranks(partial(scenarios.train, **options), 4, kind, sparse, "4x1", False, clip))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        for name in compared:
            assert result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5, name


def test_pieces_of_every_lookup_train_as_the_flat_model_s() -> None:
    results = values(run_ranks(partial(scenarios.train_every_lookup, partition=PIECES), 4, "4x1", False))
    for result in results:
        assert max(result["output"], result["evaluation"]) <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        assert result["gradient"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5
    assert results[0]["weights"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5


# Whole tables, pieces of columns, of rows and of both; one rank of the second tower has no table.
DLRM_ROWS = [
    [
        *("emb.0[0:20]", "emb.0[20:50]", "emb.1[:, 0:4]", "emb.1[:, 4:8]", "emb.4"),
        *("emb.3[0:9, 0:4]", "emb.3[9:33, 0:4]", "emb.3[:, 4:8]"),
    ],
    ["emb.2"],
]


@pytest.mark.parametrize(
    ("kind", "sparse", "built_after", "clip"),
    [("adagrad", False, True, 0.5), pytest.param("adagrad", True, False, None, marks=slow)],
)
def test_row_pieces_train_as_the_flat_model(kind: str, sparse: bool, built_after: bool, clip: float | None) -> None:
    job = partial(scenarios.train, partition=DLRM_ROWS)
    results = values(run_ranks(job, 4, kind, sparse, "2x2", built_after, clip))
    assert any(sum(result["owned"]) == 0 for result in results)
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        for name in ("norm", "weights"):
            assert result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5, name
    assert [result["state"] for result in results] == [sum(result["owned"]) for result in results]  # Adagrad's sums


# Beside pieces of rows and columns at once, ranks hold what lies between them, whose gradient is 0.
ONLY_ROWS = [
    [*("bag[0:4]", "bag[4:11]", "item[0:6]", "item[6:13]"), "fields[0:7]", "first_order[7:12]", "pooled"],
    [
        *("frozen[0:5]", "frozen[5:6]", "fields[7:10]", "fields[10:12]", "fields[12:21]"),
        *("first_order[0:5]", "first_order[5:7]", "first_order[12:21]"),
    ],
]


@pytest.mark.parametrize(
    ("partition", "compared"), [(ONLY_ROWS, ["gradient"]), pytest.param(in_rows(2), [], marks=slow)]
)
def test_row_pieces_of_every_lookup_train_as_the_flat_model_s(partition: list[list[str]], compared: list[str]) -> None:
    results = values(run_ranks(partial(scenarios.train_every_lookup, partition=partition), 4, "2x2", False))
    for result in results:
        assert max(result["output"], result["evaluation"]) <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        assert all(result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5 for name in compared)
    assert results[0]["weights"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5


DLRM_TOWERS = {"tower_module": "dlrm", "tower_module_options": {"dim": 4}}


@pytest.mark.parametrize(
    ("topology", "shared", "clip", "options", "towers"),
    [
        ("2x2", False, 0.5, DLRM_TOWERS, [["tower0"], ["tower0"], ["tower1"], ["tower1"]]),
        (
            "2x2",
            True,
            0.5,
            {"tower_module": "dot", "towers": 4},
            [[], [], ["tower2"], ["tower2"]],  # a tower of one feature has no parameters
        ),
        pytest.param(
            "4x1", False, None, {"tower_module": "dcn", "towers": 2}, [["tower0"]] * 2 + [["tower1"]] * 2, marks=slow
        ),
    ],
)
def test_towers_train_as_the_towered_model_of_one_process(
    topology: str, shared: bool, clip: float | None, options: dict[str, Any], towers: list[list[str]]
) -> None:
    results = values(run_ranks(partial(scenarios.train_towers, **options), 4, shared, topology, clip))
    for result in results:
        assert result["output"] <= FORWARD[torch.float32] * LONGEST_SUM**0.5
        for name in ("gradient", "norm", "weights"):
            assert result[name] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5, name
    assert [result["towers"] for result in results] == towers  # only a tower's own ranks train it


def test_batches_of_any_size_share_two_graphs_on_every_rank_and_each_is_traced_once() -> None:
    assert values(run_ranks(scenarios.evaluate_and_train, 2)) == [(2, 2)] * 2


@pytest.mark.parametrize("empty", [pytest.param(0, marks=slow), 1])
def test_a_rank_may_begin_with_an_empty_batch(empty: int) -> None:
    assert values(run_ranks(scenarios.empty_first_batch, 2, empty)) == [[True] * 3] * 2


@pytest.mark.parametrize("how", ["head", "graph break"])
def test_dense_parameters_outside_the_graph_are_averaged(how: str) -> None:
    for result in values(run_ranks(scenarios.partly_compiled, 2, how)):
        assert result["gradient"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5


def test_a_model_without_tables_is_data_parallel() -> None:
    for result in values(run_ranks(scenarios.without_tables, 2)):
        assert result["gradient"] <= GRADIENT[torch.float32] * LONGEST_SUM**0.5


def test_buffers_are_those_of_rank_zero_before_each_step() -> None:
    results = values(run_ranks(scenarios.buffers, 2))
    own, common = ([result[i] for result in results] for i in range(2))
    # All started from rank 0's mean of 0 (not from their own rank), then took up 0.1 of their own batch's mean.
    assert all(max(map(abs, running_mean)) < 0.2 for running_mean in own)
    # The same batch on top of rank 0's running mean leaves the same on every rank.
    assert len({tuple(running_mean) for running_mean in common}) == 1


def test_a_sharded_model_in_the_hands_of_users() -> None:
    for said in values(run_ranks(scenarios.handling, 2)):
        assert said["eager"].startswith("UnsupportedGraphError sharded table emb.0: expected use inside the compiled")
        assert "full_state_dict" in said["eager"]
        assert said["state_dict"].startswith("CheckpointError checkpoint: expected dmt_compile.full_state_dict")
        assert "dmt_compile.clip_grad_norm_" in said["clip"]
        assert said["deepcopy"] == "ok ShardedTable"
        assert said["adagrad"].startswith("ok")
        assert said["load_state_dict"] == "ok <All keys matched successfully>"
        assert said["loaded"] == "True"
        assert said["double"] == "ok torch.float64"


def test_models_of_one_class_have_programs_of_their_own() -> None:
    assert values(run_ranks(scenarios.two_of_a_class, 2)) == [[1, 2]] * 2


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("2x2", {"comm_dtype": {"peer": ("float8", "bfloat16")}}),
        pytest.param("4x1", {"comm_dtype": {"peer": "int8"}}, marks=slow),
        ("2x2", {"comm_dtype": {"intra": "float16"}, "kernels": "triton"}),  # lookups write what travels
    ],
)
def test_real_ranks_send_what_simulated_ranks_send(topology: str, options: dict[str, Any]) -> None:
    results = values(run_ranks(scenarios.compressed, 4, topology, options))
    sent: dict[Any, int] = {}
    for result in results:
        assert result["output"]
        assert all(result["gradients"])
        for key, count in result["bytes"].items():
            sent[key] = sent.get(key, 0) + count
    assert sent == results[0]["simulated"]
