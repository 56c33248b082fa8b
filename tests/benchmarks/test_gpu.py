"""The one script for a GPU machine: its parts, their limits, and the block that it appends to the results."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import gpu
import pytest
import torch

PRINTS = "import sys; print('| a |', flush=True); print('said', file=sys.stderr, flush=True); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", PRINTS + code]


def test_a_machine_without_a_gpu_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = tmp_path / "RESULTS.md"
    assert gpu.main(["--results", str(results)]) == 1
    assert (
        capsys.readouterr().err == f"gpu: expected a GPU, found none; torch {torch.__version__} is what looked for it\n"
    )
    monkeypatch.setattr(gpu, "PACKAGES", ("torch", "no_such_package"))
    assert gpu.main(["--results", str(results)]) == 1
    assert capsys.readouterr().err.endswith("found no no_such_package\n")
    assert not results.exists()


def test_a_failed_and_a_stopped_part_keep_what_they_printed_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = "import subprocess, time; subprocess.run(['sleep', '60'])"
    parts = {"tests": python("sys.exit(3)"), "kernels": python(slow), "train_step": python("")}
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda: ("NVIDIA H100", "torch 2.11"))
    monkeypatch.setattr(gpu, "commands", lambda out, minutes: parts)
    monkeypatch.setattr(gpu, "SHARES", {"tests": 1.0, "kernels": 0.1, "train_step": 1.0})
    results, out, began = tmp_path / "RESULTS.md", tmp_path / "out", time.monotonic()
    results.write_text("# Results\n")
    assert gpu.main(["--results", str(results), "--out", str(out), "--minutes", "0.5"]) == 1
    assert time.monotonic() - began < 50  # the sleep was ended with its part
    text = results.read_text()
    assert text.startswith("# Results\n\n## GPU, 20")
    assert " UTC: NVIDIA H100\n\ntorch 2.11; `make gpu`.\n\n### tests\n" in text
    tests, kernels, train_step = text.split("### ")[1:]
    assert "**Exit status 3.**\n\n```\n| a |\n```" in tests
    assert "| a |\n\n**Stopped after 3 s.**\n\n```\nsaid\n```" in kernels
    assert train_step.endswith("| a |\n")
    assert (out / "kernels.log").read_text() == "said\n"


def test_a_part_that_went_well_is_its_command_and_what_it_printed() -> None:
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "kernels.py"), "--json", "x"]
    kernels = gpu.Outcome("kernels", command, 0, 9, "| a |\n", "warning\n")
    assert kernels.markdown() == "### kernels\n\n`python benchmarks/kernels.py --json x`\n\n| a |"
    tests = gpu.Outcome("tests", [sys.executable, "-m", "pytest"], 0, 9, "....\n==== 4 passed in 1s ====\n", "")
    assert tests.markdown() == "### tests\n\n`python -m pytest`\n\n4 passed in 1s"
    block = gpu.block([kernels, tests], "card", "versions", datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    assert block.startswith("\n## GPU, 2026-01-02 03:04 UTC: card\n\nversions; `make gpu`.\n\n### kernels\n")


def test_parts_end_before_they_are_stopped_and_fit_into_the_minutes(tmp_path: Path) -> None:
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    found = gpu.commands(tmp_path, 8)
    assert list(found) == list(gpu.SHARES)
    for name in ("kernels", "train_step"):
        limit = float(found[name][found[name].index("--limit-s") + 1])
        assert limit < 0.75 * 60 * 8 * gpu.SHARES[name]
        assert Path(found[name][1]).is_file()
    assert str(gpu.ROOT / "tests" / "kernels" / "test_pack_rows.py") in found["tests"]


def test_parts_run_without_the_interpreter_and_find_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os; print(os.environ['PYTHONPATH'], 'TRITON_INTERPRET' in os.environ)"
    outcome = gpu.run("kernels", [sys.executable, "-c", code], 60, tmp_path)
    assert outcome.status == 0
    assert outcome.out.split() == [f"{gpu.ROOT}:/elsewhere", "False"]
