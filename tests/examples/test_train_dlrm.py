"""The training script as a user runs it, its refusals, and what the demo makes of its results."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data import Batch
from demo import WITH_TOWERS, problems, summary
from dlrm import DLRM
from rich.console import Console
from train_dlrm import make_optimizers, parse_args, train_epoch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_dlrm.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=dict(os.environ, **environment),
        capture_output=True,
        text=True,
    )


def test_the_script_trains_and_writes_its_result(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run("--limit-rows", "3000", "--epochs", "1", "--batch-size", "500", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "eager: loss" in done.stdout
    result = json.loads(file.read_text())
    assert result["world"] == 1
    assert 0 < result["auc"] < 1
    assert 0 < result["loss"] < 1
    assert result["samples_per_s"] > 0


def test_the_script_reads_a_click_log(tmp_path: Path) -> None:
    line = "\t".join(["{label}", *["{number}"] * 13, *["0000000{label}"] * 26]) + "\n"
    path = tmp_path / "log.txt"
    path.write_text("".join(line.format(label=n // 10 % 2, number=n) for n in range(1, 401)))
    small = ("--hash-rows", "50", "--batch-size", "64", "--epochs", "1", "--quiet")
    done = run("--data", "criteo", "--path", str(path), *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("eager: loss")


@pytest.mark.parametrize("option", [("--tower-module", "dlrm"), ("--ahead",)])
def test_what_dmt_alone_does_is_refused_without_it(option: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(list(option))
    assert f"{option[0]}: expected --backend dmt, found eager" in capsys.readouterr().err


def test_the_script_trains_towers(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    small = ("--limit-rows", "3000", "--epochs", "1", "--batch-size", "500", "--quiet", "--json", str(file))
    done = run("--backend", "dmt", "--tower-module", "dlrm", "--tower-dim", "8", "--ahead", *small)
    assert done.returncode == 0, done.stderr
    assert "dmt, dlrm towers: loss" in done.stdout
    assert 0 < json.loads(file.read_text())["auc"] < 1


@pytest.mark.slow
def test_steps_that_overlap_give_the_same_numbers(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT))
    results = []
    for ahead in ((), ("--ahead",)):
        file = tmp_path / f"result{len(ahead)}.json"
        small = ("--limit-rows", "3000", "--epochs", "2", "--batch-size", "500", "--topology", "2x1")
        command = [sys.executable, *launch, "--backend", "dmt", *small, "--json", str(file), *ahead]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "batches pass through" not in done.stderr
        found = json.loads(file.read_text())
        results.append((found["loss"], found["auc"]))
    assert results[0] == results[1]


def test_several_ranks_without_dmt_are_refused() -> None:
    done = run("--limit-rows", "100", RANK="0", WORLD_SIZE="4")
    assert done.returncode != 0
    assert "train_dlrm: expected --backend dmt for 4 ranks, found eager" in done.stderr


def test_criteo_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--data", "criteo"])
    assert "--data criteo: expected --path" in capsys.readouterr().err


def test_no_training_batch_is_refused() -> None:
    model = DLRM((5,), 4, 3)
    with pytest.raises(SystemExit, match="one batch of training rows, found none; lower --batch-size"):
        train_epoch(model, make_optimizers(model, "sgd", 0.1, False), [], torch.device("cpu"), 1, lambda *_: None)


def test_the_losses_of_uneven_ranks_average_to_the_global_mean() -> None:
    torch.manual_seed(0)
    whole = Batch(torch.randn(5, 3), torch.randint(5, (5, 2)), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), 5)
    parts = [slice(0, 0), slice(0, 4), slice(4, 5)]
    model = DLRM((5, 5), 4, 3)

    def gradients(batch: Batch, world: int) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        optimizers = make_optimizers(model, "sgd", 1.0, False)
        for optimizer in optimizers:
            optimizer.zero_grad = lambda: None  # type: ignore[method-assign, assignment]
            optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        train_epoch(model, optimizers, [batch], torch.device("cpu"), world, lambda *_: None)
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone = gradients(whole, 1)
    shares = [Batch(whole.dense_BI[p], whole.categorical_BF[p], whole.labels_B[p], 5) for p in parts]
    by_rank = [gradients(share, 3) for share in shares]
    for expected, *found in zip(alone, *by_rank, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), expected)


@pytest.mark.parametrize("name", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_optimizer_moves_every_parameter(name: str, sparse: bool) -> None:
    torch.manual_seed(0)
    model = DLRM((2, 2), 4, 3, sparse=sparse)
    before = [p.detach().clone() for p in model.parameters()]
    batch = Batch(torch.randn(8, 3), torch.tensor([[0, 1], [1, 0]] * 4), torch.ones(8), 8)
    train_epoch(model, make_optimizers(model, name, 0.1, sparse), [batch], torch.device("cpu"), 1, lambda *_: None)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def result(auc: float, bytes_per_link: dict[str, dict[str, int]] | None = None) -> dict[str, object]:
    return {"loss": 0.4, "auc": auc, "samples_per_s": 1000.0, "bytes_per_link": bytes_per_link}


def test_the_demo_finds_runs_that_disagree_or_did_not_learn() -> None:
    assert problems({"a": result(0.8090), "b": result(0.8091)}, 0.8) == []
    (disagree,) = problems({"a": result(0.8090), "b": result(0.8150)}, 0.8)
    assert "expected test AUCs within 0.0005 of each other, found 0.80900 (a), 0.81500 (b)" in disagree
    (weak,) = problems({"a": result(0.7999), "b": result(0.8001)}, 0.8)
    assert weak == "demo: expected a test AUC of at least 0.8 for a, found 0.7999"
    assert problems({"a": result(0.6), "b": result(0.6)}, None) == []
    towers = {"a": result(0.81), WITH_TOWERS: result(0.805)}  # another model
    assert problems(towers, 0.8) == []
    assert len(problems(towers, 0.807)) == 1


def test_the_demo_shows_bytes_across_hosts_beside_the_flat_exchange() -> None:
    links = {"flat": {"intra": 1, "cross": 4_000_000}, "sptt": {"intra": 2, "cross": 3_500_000}}
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(summary({"one": result(0.8), "four": result(0.8, links)}))
    assert "3.50 MB (flat 4.00)" in console.export_text()
    links["sptt+tm"] = {"intra": 2, "cross": 2_000_000}
    console.print(summary({WITH_TOWERS: result(0.8, links)}))
    assert "2.00 MB (flat 4.00)" in console.export_text()
