"""The AUC against its definition, and gathering from ranks that hold different numbers of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics import auc, gather_rows

GATHER = """
import torch, torch.distributed as dist, sys
from metrics import gather_rows
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=3)
sizes = [2, 0, 3]
start = sum(sizes[:rank])
assert gather_rows(torch.arange(start, start + sizes[rank], dtype=torch.float32)).tolist() == [0, 1, 2, 3, 4]
assert gather_rows(torch.zeros(0)).tolist() == []
dist.barrier()
dist.destroy_process_group()
sys.stdout.write("gathered")
sys.stdout.flush()
import os
os._exit(0)
"""


def brute_force(scores: np.ndarray, labels: np.ndarray) -> float:
    wins = [float(p > n) + 0.5 * float(p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(wins))


@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_auc_is_the_share_of_pairs_in_the_right_order(distinct: int) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        scores = random.integers(distinct, size=90) / 7
        labels = (random.random(90) < 0.3).astype(np.float32)
        assert auc(scores, labels) == pytest.approx(brute_force(scores, labels), abs=1e-12)


def test_auc_of_perfect_reversed_and_constant_scores() -> None:
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auc(torch.tensor([-2.0, -1.0, 0.0, 5.0]), labels) == 1.0
    assert auc(torch.tensor([2.0, 1.0, 0.0, -5.0]), labels) == 0.0
    assert auc(torch.zeros(4), labels) == 0.5


def test_auc_refuses_nan_and_a_single_class() -> None:
    with pytest.raises(ValueError, match="auc: expected numbers as scores, found 1 NaN among 2"):
        auc([0.1, float("nan")], [0, 1])
    with pytest.raises(ValueError, match="auc: expected samples of both classes, found 2 positive and 0 negative"):
        auc([0.1, 0.2], [1, 1])


def test_gather_rows_without_a_process_group_is_the_identity() -> None:
    values = torch.randn(3)
    assert gather_rows(values) is values


def test_gather_rows_concatenates_unequal_ranks_in_order(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, str(rank), str(tmp_path / "store")],
            env=dict(os.environ, PYTHONPATH=str(examples)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    assert [(process.communicate()[0], process.returncode) for process in ranks] == [("gathered", 0)] * 3
