"""The train-step benchmark: tiny models train as eager does, wrong steps have no speed, and its table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_step
from step_contestants import CONTESTANTS, TOWERS, Setting, Step
from step_models import MODELS, Size, StepBatch, fill, make_batch
from step_report import HEADER, Result, lines

CPU = torch.device("cpu")
TINY = Size().tiny()
# Dynamo, where a compiled part of a model gets the results of lookups that are not
LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"


def setting(dumps: Path, model: str = "dlrm") -> Setting:
    """Return a tiny model's setting."""
    tables = [torch.empty(TINY.rows, TINY.dim) for _ in range(TINY.tables)]
    return Setting(model, TINY, tables, batches()[0], "eager", {"dense_compiler": "eager"}, dumps)


def batches() -> list[StepBatch]:
    return [make_batch(TINY, CPU, seed) for seed in range(train_step.BATCHES)]


@pytest.mark.filterwarnings(LEAF)
@pytest.mark.parametrize("model", MODELS)
def test_contestants_train_as_eager_does(model: str, tmp_path: Path) -> None:
    steps, results = train_step.prepare(list(CONTESTANTS), setting(tmp_path, model), batches(), "fp32", math.inf)
    assert list(steps) == list(CONTESTANTS), [result.note for result in results.values()]
    assert all(result.error is not None and result.error <= 1 for result in results.values())
    assert "SGD steps in the backward pass of the lookups, without gradients, for 4 tables" in results["dmt-fused"].ran
    assert "batched_lookup: " in results["dmt"].ran
    assert "SGD steps" not in results["dmt"].ran
    assert results["eager"].ran == ""
    assert results["dmt"].ran in lines([results["dmt"]])[0]


def test_contestants_share_tables_and_have_dense_parts_of_their_own(tmp_path: Path) -> None:
    here = setting(tmp_path)
    first, second = here.flat("one"), here.flat("other", sparse=False)
    assert [t.weight.data_ptr() for t in first.emb] == [t.weight.data_ptr() for t in second.emb]
    assert all(t.weight.data_ptr() == mine.data_ptr() for t, mine in zip(first.emb, here.tables, strict=True))
    for mine, theirs in zip(first.rest.parameters(), second.rest.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert first.forward.__code__ != second.forward.__code__  # Dynamo compiles each as a function of its own


def wrong(setting: Setting, scale: float, lag: float) -> Step:
    """Return eager's step with a wrong loss, or with tables that learn less."""
    right = CONTESTANTS["eager"](setting)

    def step(batch: StepBatch) -> torch.Tensor:
        before = [table.clone() for table in setting.tables]
        loss = right(batch)
        for table, old in zip(setting.tables, before, strict=True):
            table.lerp_(old, lag)
        return loss * scale

    return step


@pytest.mark.parametrize(
    ("scale", "lag", "what"), [(1.001, 0.0, "loss"), (1.0, 0.02, "rows"), (1.0, 1.0, "rows"), (math.nan, 0.0, "loss")]
)
def test_what_trains_otherwise_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, scale: float, lag: float, what: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(CONTESTANTS, "dmt", lambda setting: wrong(setting, scale, lag))  # type: ignore[misc]
    steps, results = train_step.prepare(["eager", "dmt"], setting(tmp_path), batches(), "tf32", math.inf)
    assert list(steps) == ["eager"], what
    assert results["dmt"].note.startswith("FAILED: error ")
    monkeypatch.setitem(CONTESTANTS, "dmt", lambda setting: wrong(setting, 1.0, 0.0))  # type: ignore[misc]
    steps, _ = train_step.prepare(["eager", "dmt"], setting(tmp_path), batches(), "fp32", math.inf)
    assert list(steps) == ["eager", "dmt"]


def test_towers_have_losses_of_their_own_but_finite_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CONTESTANTS, TOWERS, lambda setting: wrong(setting, 1.5, 0.0))  # type: ignore[misc]
    assert TOWERS in train_step.prepare(["eager", TOWERS], setting(tmp_path), batches(), "fp32", math.inf)[0]
    monkeypatch.setitem(CONTESTANTS, TOWERS, lambda setting: wrong(setting, math.inf, 0.0))  # type: ignore[misc]
    assert TOWERS not in train_step.prepare(["eager", TOWERS], setting(tmp_path), batches(), "fp32", math.inf)[0]


def test_what_breaks_is_told_and_what_is_late_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(setting: Setting) -> Step:
        raise ValueError("a|b\nc")

    monkeypatch.setitem(CONTESTANTS, "dmt", broken)  # type: ignore[misc]
    steps, results = train_step.prepare(["dmt", "eager"], setting(tmp_path), batches(), "fp32", math.inf)
    assert list(steps) == ["eager"]
    assert results["dmt"].note == "FAILED: ValueError: a|b c"
    assert lines([results["dmt"]])[0].count("|") == HEADER[0].count("|")
    steps, results = train_step.prepare(["eager"], setting(tmp_path), batches(), "fp32", -math.inf)
    assert not steps
    assert results["eager"].note == "not run: no time left"


def test_a_row_holds_times_ratios_and_memory() -> None:
    eager = Result("dlrm", "eager", 0.0, 1.0, 0.03, 0.01, 0.02, 2**30)
    ours = Result("dlrm", "dmt", 0.25, 20.0, 0.01, 0.0125, 0.002, 2**29)
    rest = Result("dlrm", "inductor-rest", note="FAILED: x")
    assert lines([eager, ours, rest]) == [
        "| dlrm | eager | 30.00 | 1.0% | 20.00 | 1.00 | 1.00 | - | - | 0 | 1 |  |",
        "| dlrm | dmt | 10.00 | 1.2% | 2.00 | 0.50 | 3.00 | - | - | 0.25 | 20 |  |",
        "| dlrm | inductor-rest | - | - | - | - | - | - | - | - | - | FAILED: x |",
    ]


def test_turns_alternate_and_a_turn_s_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    clock = iter(range(1000))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: float(next(clock)))  # a second a look
    for name, given in (
        ("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 5), ("max_memory_allocated", 12),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda given=given: given)
    steps: dict[str, Any] = {name: lambda batch, name=name: calls.append((name, batch)) for name in "ab"}
    found = train_step.take_turns(steps, [0, 1, 2], turns=2, length=4)  # type: ignore[list-item]
    assert calls == [(name, batch) for _ in range(3) for name in "ab" for batch in (0, 1, 2, 0)]
    assert found["a"] == {"step_s": 0.5, "spread": 0.0, "host_s": 0.25, "peak_bytes": 7}


def test_first_values_and_batches_are_the_same_every_time() -> None:
    tables = [torch.empty(50, 8), torch.empty(50, 8)]
    fill(tables)
    first = [table.clone() for table in tables]
    fill(tables)
    assert all(map(torch.equal, tables, first))
    assert not torch.equal(*tables)
    one, again, other = (make_batch(TINY, CPU, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, one.ids, again.ids))
    assert not torch.equal(one.dense_BI, other.dense_BI)
    for ids, offsets in zip(one.ids, one.offsets, strict=True):
        lengths = torch.diff(offsets, append=torch.tensor([len(ids)]))
        assert 1 <= int(lengths.min()) <= int(lengths.max()) <= 2 * TINY.pooling - 1
    assert Size().longest_sum == 16_384
    assert replace(Size(), samples=1).longest_sum == 27 * 128


def test_a_run_prints_a_table_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "train_step.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--compiler",
        "eager",
        "--contestants",
        "eager",
        "dmt",
        "--json",
        str(out),
    ]
    assert train_step.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        [f"| {model}", name, "-"] for model in ("dlrm", "dcn") for name in ("eager", "dmt")
    ]
    assert len({line.count("|") for line in table}) == 1
    assert "4 tables of 50 rows x 8, 16 samples" in printed[2]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step_s"] for line in written] == [None] * 4


def test_bad_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--device", "cpu", "--tiny", "--options", "kernels"], "--options: expected NAME=VALUE, found kernels"),
        *([] if torch.cuda.is_available() else [([], "--device cuda: expected a GPU, found none")]),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_step.main(arguments)
        assert said in capsys.readouterr().err
