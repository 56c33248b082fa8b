"""The quality benchmark on made-up rows: resume, statistics, and what its variants send."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import torch
from quality_data import QualityData
from quality_models import SETTINGS, Settings
from quality_report import frontier, grid, report, rows_of
from quality_training import Variant, evaluate, flat_model, make_plan, towered, train
from rich.console import Console
from scipy.stats import mannwhitneyu

SMALL = Settings(dim=4, bottom=(4,), top=(8,), cross_rank=2, epochs=2, batch_size=64, lr=1e-2)


def made_up(rows: int = 400, features: int = 8) -> QualityData:
    """Return rows in which the label is whether two ids are equal; the last feature has up to 3 values a sample."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 5, (rows, 1), generator=generator) for _ in range(features - 1)]
    several = torch.randint(0, 5, (rows, 3), generator=generator)
    order = torch.arange(rows)
    return QualityData(
        "made_up", torch.randn(rows, 2, generator=generator), (*ids, several), (ids[0] == ids[1])[:, 0].float(),
        (5,) * features, tuple(f"f{i}" for i in range(features)),
        order[: rows // 2], order[rows // 2 : rows * 3 // 4], order[rows * 3 // 4 :],
    )  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the benchmark on made-up rows; returns the lines of the results file."""
    monkeypatch.setitem(quality.LOADERS, "nycflights", lambda path, limit: made_up())
    for model in ("dlrm", "dcn"):
        monkeypatch.setitem(SETTINGS, (model, "made_up"), SMALL)

    def start(*arguments: str) -> list[dict[str, Any]]:
        quality.main(["--out", str(tmp_path / "results.jsonl"), *arguments])
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    return start


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines without the seconds that they took."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_run_resumes_where_it_stopped(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--model", "dcn", "--rows", "paper", "--seeds", "1")
    whole = run(*arguments)
    assert [line["variant"].split("(")[0] for line in whole] == [
        "sptt",
        "flat",
        "strided T4 4x dcn",
        "strided T4 2x dcn",
    ]
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:40])  # stopped while it wrote
    trained: list[str] = []
    original = quality.Bench.run

    def recorded(self: Any, model: str, variant: Variant, *others: Any) -> Any:
        trained.append(variant.key)
        return original(self, model, variant, *others)

    monkeypatch.setattr(quality.Bench, "run", recorded)
    again = run(*arguments)
    assert trained == [line["variant"] for line in whole[-2:]]
    assert without_time(again) == without_time(whole)
    run(*arguments)
    assert len(trained) == 2


def test_what_towers_send_is_what_was_asked_for(tmp_path: Path) -> None:
    data = made_up()
    bench = quality.Bench(data, quality.Results(tmp_path / "results.jsonl"))
    for kind, partition, compression, columns in (
        ("each", "strided", 2, 16),
        ("together", "balanced", 4, 8),
        ("dot", "coherent:nid", 2, 8 * 1 + 4),
    ):
        variant = quality.variant_of(kind, partition, 4, compression, 8, SMALL.dim)
        assert variant is not None
        sent = bench.sent("dlrm", variant, SMALL)
        # 4 bytes a column, to 4 hosts and back: three quarters of the samples are elsewhere.
        assert sent == {"cross_host_bytes": columns * 6, "flat_cross_host_bytes": 8 * 4 * 6}
    assert (tmp_path / f"results.made_up-400-dlrm-nid-{quality.digest(SMALL)}.json").exists()


def test_products_that_leave_no_room_for_vectors_are_no_variant() -> None:
    assert quality.variant_of("dot", "strided", 1, 16, 8, 4) is None


@pytest.mark.parametrize("model", ["dlrm", "dcn"])
def test_rows_hold_no_variant_twice(model: str) -> None:
    for rows in ("flat", "paper", "headline", "signals", "modules", "all"):
        keys = [variant.key for variant in quality.variants(model, rows, 21, 32)]
        assert len(set(keys)) == len(keys)
        assert keys[0] == "flat"
    singles = [v for v in quality.variants(model, "all", 21, 32) if v.towers == 21]
    assert [v.compression for v in singles] == [2, 4, 8, 16]


def test_the_transform_without_modules_is_certified_once(run: Any) -> None:
    lines = run("--model", "dlrm", "--rows", "flat", "--seeds", "2")
    assert [line["variant"] for line in lines] == ["sptt", "flat", "flat"]
    assert lines[0]["max_abs_error"] < 1e-6
    assert lines[1]["test_auc"] != lines[2]["test_auc"]


def test_training_is_the_same_for_the_same_seed() -> None:
    data = made_up()
    variant = Variant("strided", 2, 2, "dlrm", {"dim": 2})
    scores = []
    for seed in (0, 0, 1):
        flat = flat_model(data, "dlrm", SMALL, seed)
        plan = make_plan(flat, data, variant, "strided")
        module = towered(flat, data, plan, seed)
        scores.append(replace(train(module, data, SMALL, seed), seconds=0.0))
    assert scores[0] == scores[1] != scores[2]


def test_training_learns_what_is_there() -> None:
    data = made_up(rows=4000)
    module = flat_model(data, "dlrm", replace(SMALL, epochs=6, lr=3e-2), 0)
    assert train(module, data, replace(SMALL, epochs=6, lr=3e-2), 0).test_auc > 0.9
    assert evaluate(module, data, data.test)[0] > 0.9


def made_lines() -> list[dict[str, Any]]:
    """Return lines of a flat model and three variants of two partitions."""
    generator = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for partition, compression, mean in (
        ("flat", 1, 0.8),
        ("strided", 2, 0.79),
        ("coherent:nid", 2, 0.8),
        ("strided", 4, 0.7),
    ):
        for seed in range(9):
            line = {
                "data": "made_up", "rows": 10, "model": "dlrm", "settings": {"dim": 4}, "seed": seed,
                "variant": partition if partition == "flat" else f"{partition} T4 {compression}x dlrm(dim=2)",
                "partition": partition, "towers": 4, "compression": compression,
                "test_auc": mean + generator.normal() / 1000,
            }  # fmt: skip
            if partition != "flat":
                line |= {"flat_cross_host_bytes": 64.0, "cross_host_bytes": 64.0 / compression}
            lines.append(line)
    return lines


def test_statistics_are_those_of_scipy() -> None:
    lines = made_lines()
    flat, strided, coherent, small = rows_of(lines)
    aucs = {
        row.line["variant"]: [x["test_auc"] for x in lines if x["variant"] == row.line["variant"]]
        for row in rows_of(lines)
    }
    assert list(coherent.aucs) == aucs["coherent:nid T4 2x dlrm(dim=2)"]
    assert coherent.median == np.median(coherent.aucs)
    assert coherent.std == pytest.approx(np.std(coherent.aucs, ddof=1))
    assert coherent.against_flat == mannwhitneyu(coherent.aucs, flat.aucs).pvalue
    assert coherent.against_strided == mannwhitneyu(coherent.aucs, strided.aucs).pvalue < 0.001
    assert coherent.loss == np.median(flat.aucs) - np.median(coherent.aucs)
    assert flat.against_flat is flat.against_strided is strided.against_strided is None
    assert small.flat_std == pytest.approx(np.std(flat.aucs, ddof=1))
    assert small.fewer_bytes == 4


def test_rows_of_other_settings_are_not_mixed() -> None:
    lines = made_lines()
    others = [{**line, "settings": {"dim": 8}} for line in lines if line["variant"] == "flat"]
    assert [len(row.aucs) for row in rows_of([*lines, *others])] == [9] * 5
    assert rows_of([line for line in lines if line["variant"] != "flat"])[0].loss is None


def test_the_grid_has_a_row_for_towers_module_and_partition() -> None:
    lines = [{**line, "module": None if line["variant"] == "flat" else "dlrm"} for line in made_lines()]
    flat, strided, coherent, small = rows_of(lines)
    assert grid([flat, strided, coherent, small]) == {
        (4, "dlrm", "strided"): {2: strided.loss, 4: small.loss},
        (4, "dlrm", "coherent:nid"): {2: coherent.loss},
    }
    console = Console(width=200, record=True)
    report(lines, None, console)
    assert "by compression" not in console.export_text()  # of one number of towers
    more = [{**line, "towers": 8, "variant": line["variant"].replace("T4", "T8")} for line in lines if line["module"]]
    report([*lines, *more], None, console)
    [cells] = [
        text.split() for text in console.export_text().splitlines() if text.startswith("│      8 │ dlrm   │ str")
    ]
    assert strided.loss is not None
    assert small.loss is not None
    assert cells[-4:-1] == [f"{strided.loss:+.4f}", "│", f"{small.loss:+.4f}"]


def test_the_frontier_holds_what_nothing_beats() -> None:
    rows = rows_of(made_lines())
    assert [row.line["variant"] for row in frontier(rows)] == [
        "strided T4 4x dlrm(dim=2)",
        "coherent:nid T4 2x dlrm(dim=2)",
    ]


def test_the_report_prints_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    console = Console(width=200, record=True)
    report(made_lines(), tmp_path / "frontier.svg", console)
    text = console.export_text()
    assert "coherent:nid T4 2x dlrm(dim=2)" in text
    assert "frontier" in text
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"expected one file train\*.parquet for --data frappe under --path .*, found 0"
    ):
        quality.main(["--data", "frappe", "--path", str(tmp_path), "--out", str(tmp_path / "results.jsonl")])
    with pytest.raises(
        SystemExit, match=r"expected one file ratings\.parquet for --data ml1m under --path None, found 0"
    ):
        quality.main(["--data", "ml1m", "--out", str(tmp_path / "results.jsonl")])
