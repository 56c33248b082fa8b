"""The command line: what it prints and writes, and how it names mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import dmt_compile
from dmt_compile import Certificate, Topology, TowerPlan
from dmt_compile.cli import main

EXAMPLE = "examples/dlrm.py:example"
MODEL = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.EmbeddingBag(20, 3, mode="sum")
        self.other = nn.EmbeddingBag(9, 5, mode="mean")
        self.top = nn.Linear(8, 1)

    def forward(self, ids, offsets):
        return self.top(torch.cat([self.emb(ids, offsets), self.other(ids, offsets)], dim=1))

def batch():
    return torch.tensor([1, 8, 3, 0]), torch.tensor([0, 1, 1])

def both():
    torch.manual_seed(0)
    return Tiny(), batch()

built = Tiny()
nothing = 3
"""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file ``tiny_model.py``."""
    (tmp_path / "tiny_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    return tmp_path


@pytest.mark.parametrize("model", ["tiny_model.py:Tiny", "tiny_model:Tiny", "tiny_model:built"])
def test_a_plan_is_printed_and_written(folder: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    arguments = ["--model", model, "--batch", "tiny_model:batch", "--topology", "2x2", "--json", "plan.json"]
    lists = '[["other"], ["emb"]]'
    assert main(["plan", *arguments, "--option", f"partition={lists}"]) == 0
    made = TowerPlan.load(folder / "plan.json")
    assert capsys.readouterr().out.strip() == str(made)
    assert made.topology == Topology(2, 2)
    assert [list(tower.tables) for tower in made.towers] == json.loads(lists)


def test_an_explanation_is_printed_and_written_with_its_certificate(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "tiny_model.py:both", "--topology", "1x2", "--option", "dense_compiler=eager"]
    assert main(["explain", *arguments, "--certify", "--json", "all.json", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "Found 2 embedding tables; 0 lookups stay flat." in out
    assert "Certificate: HOLDS" in out
    written = json.loads((folder / "all.json").read_text())
    assert written["effect"] == "REORDERED"
    assert TowerPlan.from_json(json.dumps(written["plan"])).topology == Topology(1, 2)
    assert {"name", "effect", "changed", "matched", "left_alone", "notes"} == written["passes"][0].keys()
    assert written["bytes_per_link"]["sptt"]["cross"] == 0 < written["bytes_per_link"]["sptt"]["intra"]
    certificate = Certificate.from_json(json.dumps(written["certificate"]))
    assert (certificate.topology, certificate.seed, certificate.holds) == ("1x2", 3, True)
    torch._dynamo.reset()
    assert main(["explain", *arguments]) == 0
    assert "Certificate" not in capsys.readouterr().out


def test_a_certificate_that_does_not_hold_is_the_exit_status(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", "tiny_model.py:both", "--topology", "2x2", "--option", "dense_compiler=eager"]
    arguments += ["--json", "certificate.json"]
    assert main(["certify", *arguments]) == 0
    assert Certificate.load(folder / "certificate.json").holds
    monkeypatch.setattr(Topology, "peer_order", lambda self: tuple(range(self.world_size)))
    assert main(["certify", *arguments]) == 1
    assert main(["explain", "--certify", *arguments]) == 1
    assert capsys.readouterr().out.count("DOES NOT HOLD") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny_model"], "expected --model as package.module:callable or path.py:callable"),
        (["--model", "tiny_model:Huge"], "expected 'Huge' in tiny_model for --model, found no such name"),
        (["--model", "no_such_module:x"], "expected an importable module or file for --model"),
        (["--model", "no_such_file.py:x"], "expected an importable module or file for --model"),
        (["--model", "tiny_model:Tiny"], "found a model alone; name what returns one local batch with --batch"),
        (["--model", "tiny_model:both", "--batch", "tiny_model:batch"], "found both; drop --batch"),
        (["--model", "tiny_model:nothing", "--batch", "tiny_model:batch"], "expected an nn.Module from --model"),
        (["--model", "tiny_model:both", "--topology", "two"], "expected '<hosts>x<local ranks>'"),
        (["--model", "tiny_model:both", "--option", "tower=2"], "found 'tower'; did you mean 'towers'"),
        (["--model", "tiny_model:both", "--option", "towers"], "expected --option KEY=VALUE, found 'towers'"),
        (["--model", "tiny_model:both", "--option", "plan=none.json"], "expected a readable file"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dmt: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_command_is_installed_and_runs_as_a_module() -> None:
    root = Path(dmt_compile.__file__).parents[1]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"dmt": "dmt_compile.cli:main"}
    command = [sys.executable, "-m", "dmt_compile", "plan", "--model", EXAMPLE, "--topology", "2x4"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("Tower plan: 6 tables in 2 towers, 2 hosts x 4 ranks")


def test_plan_takes_interactions_and_draws_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("emb", "other")
    dmt_compile.InteractionMatrix(names, names, np.array([[0, 0.5], [0.5, 0]]), "cosine", 9).save("interactions.json")
    command = ["plan", "--model", "tiny_model.py:both", "--topology", "2x1", "--partition", "coherent"]
    drawn = [*command, "--interactions", "interactions.json", "--picture", "towers.svg", "--json", "plan.json"]
    assert main(drawn) == 0
    assert "coherent towers by cosine interaction over 9 samples" in capsys.readouterr().out
    assert TowerPlan.load("plan.json").partition == "coherent"
    assert "other" in (folder / "towers.svg").read_text()
    assert main(command) == 2
    assert "options: expected 'interactions' beside 'partition' 'coherent'" in capsys.readouterr().err
    assert main([*command[:5], "--picture", "towers.svg"]) == 2
    assert "cli: expected --interactions beside --picture, found none" in capsys.readouterr().err
