"""The driver: the one order of passes, the strongest effect, verification, dumps and logs."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
from pathlib import Path

import pytest
import torch

import dmt_compile
from dmt_compile import pipeline
from dmt_compile.config import Options
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.pass_base import PassReport
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.passes.compile_dense_regions import CompileDenseRegions
from dmt_compile.pipeline import PassRecord, PipelineReport, passes_in_order, run_pipeline
from tests.models import DLRM, make_batch
from tests.passes._harness import dense, dlrm

NAMES = [
    "normalize_graph",
    "find_tables",
    "split_field_tables",
    "pool_sequences",
    "check_lookups",
    "find_interaction",
    "partition_towers",
    "insert_tower_modules",
    "split_tables",
    "place_tables",
    "lower_to_sptt",
    "compress_collectives",
    "sync_dense_gradients",
    "batch_lookups",
    "fuse_optimizers",
    "fold_joins",
    "fold_blocks",
    "fuse_interaction",
    "fuse_cross",
    "select_kernels",
    "fold_permutes",
    "fold_casts",
    "compile_dense_regions",
    "overlap_collectives",
]
# What these passes look for, the tests' DLRM on several ranks does not have, or nobody asked for.
NOT_HERE = (
    "split_field_tables",
    "pool_sequences",
    "split_tables",
    "insert_tower_modules",
    "fuse_optimizers",
    "fold_joins",
    "fuse_cross",
    "select_kernels",
    "fold_permutes",
    "fold_casts",
    "compress_collectives",
)


def test_the_order_of_passes() -> None:
    steps = passes_in_order(Options())
    assert [step.name for step in steps] == NAMES
    stage = Stage.CAPTURED
    for step in steps:
        assert step.needs <= stage, step.name
        assert step.gives >= stage, step.name
        stage = step.gives
    assert stage is Stage.LOWERED


def test_file_pass_and_test_share_a_name() -> None:
    root = Path(__file__).parents[1]
    assert sorted(path.stem for path in (root / "passes").glob("*.py")) == sorted([*NAMES, "__init__"])
    assert sorted(path.stem for path in (root / "tests" / "passes").glob("test_*.py")) == sorted(
        f"test_{name}" for name in NAMES
    )
    for step in passes_in_order(Options()):
        assert type(step).__module__ == f"dmt_compile.passes.{step.name}"


def test_the_dense_compiler_reaches_its_pass() -> None:
    [step] = [
        step for step in passes_in_order(Options(dense_compiler="aot_eager")) if isinstance(step, CompileDenseRegions)
    ]
    assert step.dense_compiler == "aot_eager"


@pytest.mark.parametrize(
    ("until", "ran"),
    [(Stage.CAPTURED, 4), (Stage.FLAT, 6), (Stage.TOWERED, 10), (Stage.DISTRIBUTED, 22), (Stage.LOWERED, 24)],
)
def test_a_pipeline_stops_at_its_stage(until: Stage, ran: int) -> None:
    graph = dlrm("2x2")
    report = run_pipeline(graph.gm, graph.ctx, until)
    assert [record.name for record in report.records] == NAMES[:ran]


@pytest.mark.parametrize(
    ("topology", "training", "compiler", "effect"),
    [
        ("1x1", True, "eager", Effect.EXACT),
        ("1x1", True, "aot_eager", Effect.REORDERED),
        ("2x2", True, "eager", Effect.REORDERED),
        ("2x2", False, "eager", Effect.EXACT),
    ],
)
def test_the_effect_is_the_strongest_that_ran(topology: str, training: bool, compiler: str, effect: Effect) -> None:
    graph = dlrm(topology, training, dense_compiler=compiler)
    with torch.set_grad_enabled(training):
        report = run_pipeline(graph.gm, graph.ctx)
    assert report.effect is effect
    assert report.as_dict()["effect"] == effect.name


def test_a_pass_that_changed_nothing_has_no_effect() -> None:
    def record(effect: Effect, changed: bool) -> PassRecord:
        return PassRecord("a_pass", effect, 0.0, PassReport(changed))

    assert PipelineReport(()).effect is Effect.EXACT
    assert PipelineReport((record(Effect.MODEL, False), record(Effect.LOSSY, True))).effect is Effect.LOSSY


@pytest.mark.parametrize("wanted", [True, False])
def test_every_pass_is_verified_unless_that_is_off(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Stage, str]] = []
    monkeypatch.setattr(pipeline, "verify", lambda gm, ctx, stage, after: seen.append((stage, after)))
    graph = dense(verify=wanted)
    run_pipeline(graph.gm, graph.ctx)
    steps = [(Stage.CAPTURED, "capture"), *((step.gives, step.name) for step in passes_in_order(Options()))]
    assert seen == (steps if wanted else [])


def test_dumps_show_each_pass(tmp_path: Path) -> None:
    graph = dlrm("2x2")
    report = run_pipeline(graph.gm, graph.ctx, Stage.LOWERED, GraphDump(tmp_path))
    stems = [f"{number:02d}_{name}" for number, name in enumerate(NAMES)]
    endings = (".before.py", ".after.py", ".diff")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(stem + ending for stem in stems for ending in endings), "report.json"]
    )
    previous = ""
    for stem, record in zip(stems, report.records, strict=True):
        before, after, diff = ((tmp_path / (stem + ending)).read_text() for ending in endings)
        namespace: dict[str, object] = {}
        exec(compile(after, stem, "exec"), namespace)  # its imports resolve
        assert callable(namespace["forward"])
        assert previous in ("", before)
        assert bool(diff) == (before != after)
        if record.name in NOT_HERE or record.name in ("find_interaction", "partition_towers", "place_tables"):
            assert before == after
        else:
            assert diff.startswith(f"--- {record.name} before\n+++ {record.name} after\n")
        previous = after
    assert "# float32[" in previous  # shapes stand beside the nodes
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert [(row["name"], row["effect"]) for row in written["passes"]] == [
        (record.name, record.effect.name) for record in report.records
    ]
    assert written["passes"][1]["matched"] == 3
    assert written["passes"][-1]["effect"] == "EXACT"


def test_the_users_folder_has_one_dump_for_each_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5))
    options = {"dense_compiler": "eager", "dump_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="dmt", options=options)
    batch = make_batch(model, 3, torch.Generator().manual_seed(0))
    compiled(*batch)
    with torch.no_grad():
        compiled(*batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph0", "graph1"]
    assert json.loads((tmp_path / "graph1" / "report.json").read_text())["effect"] == "EXACT"
    assert len(list((tmp_path / "graph0").glob("*.after.py"))) == len(NAMES)


def test_every_logger_is_below_the_packages(caplog: pytest.LogCaptureFixture) -> None:
    loggers = {}
    for module in pkgutil.walk_packages(dmt_compile.__path__, "dmt_compile."):
        if module.name.endswith(".__main__"):
            continue  # runs the command line when it is imported
        logger = getattr(importlib.import_module(module.name), "logger", None)
        if isinstance(logger, logging.Logger):
            loggers[module.name] = logger.name
    assert {"dmt_compile.pipeline", "dmt_compile.passes.compile_dense_regions"} <= set(loggers)
    assert all(name == module for module, name in loggers.items())
    graph = dense()
    with caplog.at_level(logging.DEBUG, "dmt_compile"):
        run_pipeline(graph.gm, graph.ctx)
    lines = [record.getMessage() for record in caplog.records if record.name == "dmt_compile.pipeline"]
    assert [line.split(":")[0] for line in lines] == NAMES
