"""The generator's promises, the recovery of its blocks by every signal, and the example as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics import adjusted_rand_index
from partition_towers import measure, towers_of, train_probe
from synthetic import planted_blocks

import dmt_compile

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "partition_towers.py"


def test_planted_ids_follow_a_power_law_and_one_feature_tells_nothing() -> None:
    data, blocks = planted_blocks(features=6, blocks=2, rows=40_000, ids=10, exponent=1.0, seed=1)
    assert sorted(blocks) == [0, 0, 0, 1, 1, 1]
    assert data.table_rows == (10,) * 6
    counts = torch.bincount(data.categorical_NF[:, 0], minlength=10).double()
    expected = 1 / torch.arange(1, 11, dtype=torch.float64)
    assert torch.allclose(counts / counts.sum(), expected / expected.sum(), atol=0.01)
    for feature in range(6):
        for value in range(3):
            share = data.labels_N[data.categorical_NF[:, feature] == value].mean()
            assert share == pytest.approx(float(data.labels_N.mean()), abs=0.05)


def test_the_same_seed_plants_the_same_blocks() -> None:
    first, second = (planted_blocks(rows=500, seed=4) for _ in range(2))
    assert first[1] == second[1]
    assert torch.equal(first[0].categorical_NF, second[0].categorical_NF)
    assert torch.equal(first[0].labels_N, second[0].labels_N)


def test_adjusted_rand_index_against_scikit_learn() -> None:
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(0)
    for groups in (1, 2, 5):
        a, b = rng.integers(groups, size=30), rng.integers(4, size=30)
        assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b))
    assert adjusted_rand_index([0, 0, 1, 1], [5, 5, 2, 2]) == 1
    assert adjusted_rand_index([], []) == 1


def test_every_signal_recovers_the_planted_blocks() -> None:
    torch._dynamo.reset()
    data, blocks = planted_blocks()
    model = train_probe(data)
    batch = next(data.batches(data.valid, 8)).inputs()
    for signal in ("cosine", "nid", "archdetect"):
        interactions = measure(model, data, signal, batches=2)
        plan = dmt_compile.plan(model, batch, "4x2", partition="coherent", interactions=interactions)
        assert adjusted_rand_index(blocks, towers_of(plan)) == 1
    strided = dmt_compile.plan(model, batch, "4x2", partition="strided")
    assert adjusted_rand_index(blocks, towers_of(strided)) < 0.3


def test_the_example_runs_on_flights(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--rows", "20000", "--save", str(tmp_path / "interactions.json")]
    done = subprocess.run([*command, "--picture", str(tmp_path / "towers.svg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"coherent towers by cosine interaction over 2,\d00 samples|over 2,000 samples", done.stdout)
    assert re.search(r"^tower3: .*\w", done.stdout, re.MULTILINE)
    assert dmt_compile.InteractionMatrix.load(tmp_path / "interactions.json").signal == "cosine"
    assert "tailnum" in (tmp_path / "towers.svg").read_text()


def test_the_example_finds_planted_blocks() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "--data", "synthetic"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "agreement with the planted blocks (adjusted Rand index): 1.00, strided 0." in done.stdout
