from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dmt_compile.config import DENSE_COMPILERS, DENSE_REDUCTIONS, ID_EXCHANGES, PARTITIONS, Options
from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.partition.assign import STRATEGIES, make_plan
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.topology import Topology


def small_plan() -> TowerPlan:
    return make_plan([TableSpec("emb.0", 10, 4)], Topology(2, 2))


def test_no_options_are_the_defaults() -> None:
    assert Options.from_mapping(None) == Options.from_mapping({}) == Options()
    assert Options().towers == "host"
    assert Options().partition == "balanced"


@pytest.mark.parametrize(
    "values",
    [
        {"topology": "2x4"},
        {"topology": Topology(2, 4)},
        {"towers": 4},
        {"partition": [["emb.0"], []]},
        {"towers": 2, "partition": "strided"},
        {"check_ids": False, "strict": True, "verify": False},
        {"timeout_s": 5, "first_timeout_s": 0.5},
        {"comm_dtype": {"peer": "bfloat16", "dense": "float16", "intra": "float32"}},
        {"comm_dtype": {"peer": ("float8", "int8")}},
        {"dump_dir": "dump"},
        {"dump_dir": Path("dump")},
        {"plan": "plan.json"},
        *({"partition": name} for name in PARTITIONS if name not in STRATEGIES),
        *({"partition": name, "interactions": "interactions.json"} for name in STRATEGIES),
        {"partition": "diverse", "interactions": Path("interactions.json"), "max_imbalance": 1.5},
        {"partition": "strided", "memory_bytes": 1 << 30},
        *({"dense_compiler": name} for name in DENSE_COMPILERS),
        *({"id_exchange": name} for name in ID_EXCHANGES),
        *({"dense_reduction": name} for name in DENSE_REDUCTIONS),
    ],
)
def test_valid_values_are_kept(values: dict[str, Any]) -> None:
    options = Options.from_mapping(values)
    assert {name: getattr(options, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topolgy": "2x2"}, "options: expected a known option, found 'topolgy'; did you mean 'topology'?"),
        ({"tower": 2}, "options: expected a known option, found 'tower'; did you mean 'towers'?"),
        ({"zzz": 1}, "options: expected a known option, found 'zzz'; valid are 'plan', 'topology', 'towers', "),
        (
            {"partition": "coherent"},
            "options: expected 'interactions' beside 'partition' 'coherent', found none; measure them on the trained "
            "flat model with dmt_compile.interactions(model, batches) and pass the result",
        ),
        (
            {"id_exchange": "hierarchic"},
            "options: expected a known 'id_exchange', found 'hierarchic'; did you mean 'hierarchical'?",
        ),
        ({"id_exchange": None}, "expected a known 'id_exchange', found None; valid are 'auto', 'global', 'hierarch"),
        ({"partition": "coherant"}, "found 'coherant'; did you mean 'coherent'?"),
        (
            {"interactions": "m.json"},
            "expected 'partition' 'coherent' or 'diverse' beside 'interactions', found 'balanced'",
        ),
        (
            {"max_imbalance": 1.2},
            "expected 'partition' 'coherent' or 'diverse' beside 'max_imbalance', found 'balanced'",
        ),
        (
            {"partition": "coherent", "interactions": 3},
            "options: expected an InteractionMatrix, a networkx graph or a path for 'interactions', found 3",
        ),
        (
            {"partition": "coherent", "interactions": "m.json", "max_imbalance": 0.9},
            "options: expected a number of at least 1 for 'max_imbalance', found 0.9",
        ),
        ({"memory_bytes": 0}, "options: expected bytes above 0 for 'memory_bytes', found 0"),
        ({"plan": "plan.json", "memory_bytes": 5}, "expected 'plan' alone, found it beside 'memory_bytes'"),
        ({"topology": 4}, "options: expected text or a Topology for 'topology', found 4"),
        ({"topology": "2-4"}, "topology: expected '<hosts>x<local ranks>' such as '2x4', found '2-4'"),
        ({"towers": 0}, "options: expected 'host' or a positive number for 'towers', found 0"),
        ({"towers": True}, "options: expected 'host' or a positive number for 'towers', found True"),
        ({"towers": "rank"}, "options: expected 'host' or a positive number for 'towers', found 'rank'"),
        ({"towers": 1.5}, "options: expected 'host' or a positive number for 'towers', found 1.5"),
        (
            {"partition": "balancd"},
            "options: expected a known 'partition', found 'balancd'; did you mean 'balanced'?",
        ),
        ({"partition": "x"}, "options: expected a known 'partition', found 'x'; valid are 'balanced', 'strided'"),
        ({"partition": 3}, "options: expected a list of lists of table names for 'partition', found 3"),
        ({"partition": ["emb.0"]}, "expected a list of lists of table names for 'partition', found ['emb.0']"),
        ({"partition": [[0]]}, "options: expected a list of lists of table names for 'partition', found [[0]]"),
        (
            {"partition": [["emb.0"]], "towers": 1},
            "options: expected either 'towers' or an explicit 'partition', found both; "
            "the number of lists is the number of towers, drop 'towers'",
        ),
        (
            {"dense_compiler": "inducter"},
            "options: expected a known 'dense_compiler', found 'inducter'; did you mean 'inductor'?",
        ),
        ({"comm_dtype": "bfloat16"}, "options: expected a dict for 'comm_dtype', found 'bfloat16'"),
        (
            {"comm_dtype": {"pear": "bfloat16"}},
            "options: expected a known hop in 'comm_dtype', found 'pear'; did you mean 'peer'?",
        ),
        (
            {"comm_dtype": {"peer": "bfloat"}},
            "options: expected a known form for hop 'peer' in 'comm_dtype', found 'bfloat'; did you mean 'bfloat16'?",
        ),
        (
            {"comm_dtype": {"dense": "int8"}},
            "options: expected a known form for hop 'dense' in 'comm_dtype', found 'int8'; valid are 'float32', "
            "'bfloat16', 'float16'",
        ),
        (
            {"comm_dtype": {"dense": ("bfloat16", "float16")}},
            "options: expected one form for hop 'dense' in 'comm_dtype', found ('bfloat16', 'float16')",
        ),
        (
            {"comm_dtype": {"peer": ()}},
            "options: expected a form, or one for each direction, for hop 'peer' in 'comm_dtype', found ()",
        ),
        (
            {"dense_reduction": "hierarchic"},
            "options: expected a known 'dense_reduction', found 'hierarchic'; did you mean 'hierarchical'?",
        ),
        (
            {"dense_reduction": None},
            "options: expected a known 'dense_reduction', found None; valid are 'auto', 'flat', 'hierarchical'",
        ),
        (
            {"comm_dtype": {"dense": "bfloat16"}, "dense_reduction": "flat"},
            "options: expected a hierarchical 'dense_reduction' for hop 'dense' in 'comm_dtype', found 'flat'",
        ),
        ({"timeout_s": 0}, "options: expected seconds above 0 for 'timeout_s', found 0"),
        ({"timeout_s": float("nan")}, "options: expected seconds above 0 for 'timeout_s', found nan"),
        ({"first_timeout_s": -1.0}, "options: expected seconds above 0 for 'first_timeout_s', found -1.0"),
        ({"timeout_s": "60"}, "options: expected seconds above 0 for 'timeout_s', found '60'"),
        ({"check_ids": "no"}, "options: expected True or False for 'check_ids', found 'no'"),
        ({"strict": 1}, "options: expected True or False for 'strict', found 1"),
        ({"verify": None}, "options: expected True or False for 'verify', found None"),
        ({"plan": 3}, "options: expected a TowerPlan or a path for 'plan', found 3"),
        (
            {"plan": "plan.json", "towers": 2},
            "options: expected 'plan' alone, found it beside 'towers' or 'partition'; drop those",
        ),
        ({"plan": small_plan(), "partition": "strided"}, "options: expected 'plan' alone, found it beside 'towers'"),
        ({"plan": small_plan(), "partition": [["emb.0"], []]}, "options: expected 'plan' alone, found it beside"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Options.from_mapping(values)


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Options().towers = 3  # type: ignore[misc]


def test_topology_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Options().resolve_topology(1) == Topology(1, 1)
    assert Options().resolve_topology(8) == Topology(2, 4)
    assert Options(topology="4x2").resolve_topology(8) == Topology(4, 2)
    mine = Topology(1, 2, intra_bytes_per_s=1.0)
    assert Options(topology=mine).resolve_topology(2) is mine


def test_a_topology_of_another_size() -> None:
    expected = (
        "options: expected 4 ranks for topology 2x2, found 1; start torchrun with 4 processes, or use "
        "dmt_compile.SimulatedWorld('2x2') to run all of its ranks in this process"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Options(topology="2x2").resolve_topology(1)


def test_the_user_s_plan(tmp_path: Path) -> None:
    plan = small_plan()
    assert Options().resolve_plan() is None
    assert Options(plan=plan).resolve_plan() is plan
    plan.save(tmp_path / "plan.json")
    assert Options(plan=tmp_path / "plan.json").resolve_plan() == plan
    assert Options(plan=str(tmp_path / "plan.json")).resolve_plan() == plan
    with pytest.raises(PlanError, match="expected a readable file"):
        Options(plan=tmp_path / "absent.json").resolve_plan()
