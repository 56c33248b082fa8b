"""Random models, plans, topologies and batches: each pass alone, and the whole pipeline, equal to the flat model."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings

from dmt_compile import Topology
from dmt_compile.ir import gradient_ops
from dmt_compile.ir.stages import Effect
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients
from dmt_compile.runtime.regions import DenseRegion
from tests.equivalence import run
from tests.equivalence.checks import Tally, check
from tests.equivalence.models import Feature, Spec, Table
from tests.equivalence.strategies import STEPS, Case, World, cases

EXAMPLES = max(1, settings().max_examples // 25)  # about 26 cases each; `make equivalence` runs thousands


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@given(case=cases())
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
def test_random_models_equal_the_flat_ones(case: Case) -> None:
    torch._dynamo.reset()
    check(case, Tally())


FEATURES = {
    "bag, sum": Feature(1),
    "bag, mean, last offset": Feature(1, mode="mean", last_offset=True),
    "bag, max": Feature(1, mode="max"),
    "bag, weights": Feature(1, weights="batch"),
    "bag, learned weights": Feature(1, weights="learned"),
    "fixed bag": Feature(1, "fixed bag", length=3),
    "fixed bag, weights": Feature(1, "fixed bag", weights="batch"),
    **{kind: Feature(1, kind) for kind in ("single", "column", "number", "fields", "masked sum", "masked mean")},
    "sequence": Feature(1, "sequence", length=3),
    "sequence of one": Feature(1, "sequence", length=1),
}


def case_of(feature: Feature = FEATURES["bag, sum"], topology: str = "2x2") -> Case:
    """Return a bag on a table of its own, beside ``feature`` on a table with dense and on one with sparse gradients."""
    sparse = feature.mode != "max"  # which PyTorch has not
    tables = (Table(7, 5), Table(9, 3), Table(11, 4, sparse, padding=2))
    spec = Spec(tables, (Feature(0), feature, replace(feature, table=2)))
    ranks = Topology.parse(topology)
    sizes = tuple(tuple((rank + 2 * step + 1) % 4 for rank in range(ranks.world_size)) for step in range(STEPS))
    return Case(spec, (World(ranks, {"partition": "strided"}, sizes, seed=3),), "Adagrad")


@pytest.mark.parametrize("feature", FEATURES)
def test_each_kind_of_lookup(feature: str) -> None:
    tally = Tally()
    check(case_of(FEATURES[feature]), tally)
    assert tally.cases["pipeline"] == 1
    assert tally.cases["pass alone"] >= 9
    assert tally.compared[Effect.EXACT] > 30
    assert tally.largest[Effect.EXACT] == 0


# ------------------------------------------------------------------------------------------------- planted faults


def test_a_wrong_order_of_peers_is_found_at_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "peer_order", lambda self: tuple(range(self.world_size)))
    with pytest.raises(AssertionError, match=r"'lower_to_sptt', 'output', 0"):
        check(case_of(), Tally())


def test_a_lost_mean_over_ranks_is_found_at_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_ops._ScaleGradient, "backward", staticmethod(lambda ctx, *grads: (grads[0], None)))
    with pytest.raises(AssertionError, match=r"'lower_to_sptt', 'emb\.0\.weight'"):
        check(case_of(topology="1x3"), Tally())


def test_dense_gradients_that_nobody_averages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SyncDenseGradients, "_average", lambda self, *args: "nothing")
    case = case_of()
    world = World(case.worlds[0].topology, {"verify": False}, case.worlds[0].sizes, 3)
    monkeypatch.setattr("tests.passes._harness.verify", lambda *args: None)  # which would find it too
    with pytest.raises(AssertionError, match=r"'sync_dense_gradients', 'bottom\.0\.weight'"):
        check(Case(case.spec, (world,), "SGD"), Tally())


def test_a_region_that_is_off_by_one_ulp_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DenseRegion.forward

    def off(self: DenseRegion, *args: object) -> tuple[torch.Tensor, ...]:
        return tuple(t + 2e-7 * t if t.requires_grad else t for t in forward(self, *args))

    monkeypatch.setattr(DenseRegion, "forward", off)
    with pytest.raises(AssertionError, match=r"'compile_dense_regions', 'output', .*expected equal numbers"):
        check(case_of(), Tally())


# ----------------------------------------------------------------------------------------------------- the runner


def test_the_runner_counts_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--cases", "20", "--processes", "1", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "passes alone" in out
    assert "EXACT" in out
    assert "largest relative error 0," in out


def test_the_runner_shows_the_case_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case: Case, tally: Tally) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(run, "check", fail)
    assert run.main(["--cases", "20", "--processes", "1"]) == 1
    out = capsys.readouterr().out
    assert "planted" in out
    command = shlex.split(out.strip().splitlines()[-1])
    seen: list[Case] = []
    monkeypatch.setattr(run, "check", lambda case, tally: seen.append(case))
    assert run.main(command[command.index("--case") :]) == 0
    assert seen[0].spec.build().spec == seen[0].spec
    assert run.parse_case(repr(case_of())) == case_of()
