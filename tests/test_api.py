"""``plan`` and ``explain``: what a user sees before anything is compiled for real."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import dmt_compile
from dmt_compile import Topology, TowerPlan
from dmt_compile.config import Options
from dmt_compile.errors import ConfigError, PlanError, UnsupportedGraphError
from dmt_compile.ir.stages import Effect
from dmt_compile.pipeline import passes_in_order
from tests.models import DLRM, Batch, make_batch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def one_id_each(model: DLRM, samples: int, seed: int = 0) -> Batch:
    """Return a batch with one id in every bag: what the traffic model takes for granted."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, table.num_embeddings, (samples,), generator=generator) for table in model.emb]
    return torch.randn(samples, 5, generator=generator), ids, [torch.arange(samples) for _ in ids]


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("topology", ["1x1", "3x2"])
def test_a_plan_is_the_same_each_time_on_the_meta_device_and_from_a_file(topology: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DLRM(dims=(4, 8, 8, 3, 9))
    batch = make_batch(model, 6, torch.Generator().manual_seed(0))
    made = dmt_compile.plan(model, batch, topology)
    with torch.device("meta"):
        unbuilt = DLRM(dims=(4, 8, 8, 3, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = dmt_compile.plan(model, batch, Topology.parse(topology))
    assert made == again == dmt_compile.plan(copy.deepcopy(model), batch, topology)
    assert made.to_json() == again.to_json()
    assert made.fingerprint == again.fingerprint
    on_meta = dmt_compile.plan(unbuilt, batch, topology)
    assert all(parameter.is_meta for parameter in unbuilt.parameters())
    assert [(t.name, t.rows, t.dim) for t in on_meta.tables] == [(t.name, t.rows, t.dim) for t in made.tables]
    assert on_meta == made
    made.save(tmp_path / "plan.json")
    assert TowerPlan.load(tmp_path / "plan.json") == made
    assert [(t.name, t.rows, t.dim) for t in made.tables] == [
        ("emb.0", 50, 4), ("emb.1", 20, 8), ("emb.2", 7, 8), ("emb.3", 33, 3), ("emb.4", 11, 9),
    ]  # fmt: skip
    assert str(made.topology) == topology
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert type(value) is torch.Tensor  # nothing was sharded


def test_a_plan_weighs_tables_by_the_ids_of_its_batch() -> None:
    model = DLRM()
    dense, ids, offsets = one_id_each(model, 4)
    ids[1] = torch.arange(20)
    offsets[1] = torch.tensor([0, 5, 5, 15])
    made = dmt_compile.plan(model, (dense, ids, offsets), "2x1")
    assert [table.pooling for table in made.tables] == [1.0, 5.0, 1.0, 1.0, 1.0]


def test_options_reach_the_planner() -> None:
    model = DLRM()
    batch = one_id_each(model, 4)
    lists = [["emb.4", "emb.0"], ["emb.1", "emb.2", "emb.3"]]
    explicit = dmt_compile.plan(model, batch, "2x2", partition=lists)
    assert [list(tower.tables) for tower in explicit.towers] == lists
    strided = dmt_compile.plan(model, batch, "2x2", partition="strided", towers=1)
    assert [tower.hosts for tower in strided.towers] == [(0, 1)]
    assert dmt_compile.plan(model, batch, "2x2", plan=explicit) == explicit
    with pytest.raises(ConfigError, match="found 'tower'; did you mean 'towers'"):
        dmt_compile.plan(model, batch, "2x2", tower=2)
    with pytest.raises(PlanError, match=r"found 'emb\.9'; did you mean"):
        dmt_compile.plan(model, batch, "2x2", partition=[["emb.9"], []])
    with pytest.raises(PlanError, match="expected a plan for topology 4x1, found one for 2x2"):
        dmt_compile.plan(model, batch, "4x1", plan=explicit)


def test_the_topology_is_one_rank_without_a_process_group() -> None:
    model = DLRM()
    assert "WORLD_SIZE" not in os.environ
    assert str(dmt_compile.plan(model, one_id_each(model, 2)).topology) == "1x1"


def test_a_compiled_model_is_planned_as_its_own() -> None:
    model = DLRM()
    batch = one_id_each(model, 3)
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    assert dmt_compile.plan(compiled, batch, "2x2") == dmt_compile.plan(model, batch, "2x2")


def test_a_model_without_tables_has_an_empty_plan() -> None:
    made = dmt_compile.plan(nn.Linear(3, 2), torch.randn(4, 3), "2x2")
    assert made.tables == ()
    assert made.notes == ("the model has no embedding tables",)
    explanation = dmt_compile.explain(nn.Linear(3, 2), torch.randn(4, 3), "2x2")
    assert explanation.tables == ()
    assert "Found 0 embedding tables" in str(explanation)


class Anything(nn.Module):
    """One lookup, and a record of how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(10, 4, mode="sum")


class Positional(Anything):
    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.emb(ids, offsets)


class Single(Anything):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids, torch.arange(3))


class Mapped(Anything):
    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.emb(features["ids"], features["offsets"])


class Listed(Anything):
    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.emb(features[0], features[1])


class Keyword(Anything):
    def forward(self, ids: torch.Tensor, *, offsets: torch.Tensor) -> torch.Tensor:
        return self.emb(ids, offsets)


IDS, OFFSETS = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("model", "batch", "kwargs"),
    [
        (Positional, (IDS, OFFSETS), None),
        (Single, IDS, None),
        (Single, (IDS,), None),
        (Mapped, {"ids": IDS, "offsets": OFFSETS}, None),
        (Listed, [IDS, OFFSETS], None),
        (Keyword, IDS, {"offsets": OFFSETS}),
        (Keyword, (), {"ids": IDS, "offsets": OFFSETS}),
    ],
    ids=["tuple", "tensor", "tuple of one", "dict", "list", "keyword beside", "keywords only"],
)
@pytest.mark.parametrize("on_meta", [False, True])
def test_batch_conventions(model: type[nn.Module], batch: Any, kwargs: dict[str, Any] | None, on_meta: bool) -> None:
    with torch.device("meta" if on_meta else "cpu"):
        built = model()
    made = dmt_compile.plan(built, batch, "2x1", kwargs=kwargs)
    assert [(table.name, table.rows, table.dim) for table in made.tables] == [("emb", 10, 4)]
    assert IDS.device.type == "cpu"
    assert IDS.__dict__ == OFFSETS.__dict__ == {}


# --------------------------------------------------------------------------------------------------------- explanations


@pytest.mark.parametrize(("topology", "towers"), [("3x2", "host"), ("1x3", "host"), ("4x1", "host"), ("4x2", 2)])
@pytest.mark.parametrize("id_exchange", ["auto", "hierarchical"])
def test_predicted_bytes_are_those_that_a_simulated_step_moves(
    topology: str, towers: int | str, id_exchange: str
) -> None:
    torch.manual_seed(0)
    model = DLRM(dims=(4, 8, 8, 3, 9))
    batch = one_id_each(model, 6)
    options: dict[str, Any] = {"towers": towers, "id_exchange": id_exchange}
    explanation = dmt_compile.explain(model, batch, topology, **options)
    assert explanation.batch_size == 6
    world = dmt_compile.SimulatedWorld(topology)
    ranks = world.topology.world_size
    distinct = [one_id_each(model, 6, seed) for seed in range(ranks)]
    outputs = world.run(model, distinct, dense_compiler="eager", **options)
    sum(output.sum() for output in outputs).backward()
    moved = {"intra": 0, "cross": 0}
    for (collective, _, link), sent in world.ledger.records.items():
        if collective in ("ids", "ids_across", "ids_host", "intra", "peer"):
            moved[link] += sent
    assert moved == explanation.bytes_per_link["sptt"]
    assert sum(moved.values()) > 0


class Mixed(nn.Module):
    """A matched lookup beside two that stay flat."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"b": nn.EmbeddingBag(20, 4, mode="sum"), "i": nn.Embedding(9, 4)})
        self.tied = nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
        out = self.tables["b"](ids, offsets)
        for i in "i":
            out = out + F.embedding(single, self.tables[i].weight * 2)  # as markup, [i] would be dropped
        return (out + self.tied(single)) @ self.tied.weight.T


def mixed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor([1, 19, 3]), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 6])


def test_an_explanation_names_what_stays_flat_with_its_line() -> None:
    model = Mixed()
    explanation = dmt_compile.explain(model, mixed_batch(), "2x2")
    assert [table.name for table in explanation.tables] == ["tables.b"]
    assert explanation.plan == dmt_compile.plan(model, mixed_batch(), "2x2")
    assert {item.reason for item in explanation.unmatched} == {
        "its table is not a parameter of the model",
        "its table is used outside lookups too",
    }
    source = Path(__file__).read_text().splitlines()
    for item in explanation.unmatched:
        found = re.fullmatch(r"(.*test_api\.py):(\d+): (.*)", item.source_line)
        assert found, item.source_line
        assert source[int(found[2]) - 1].strip() == found[3]
    text = str(explanation)
    for item in explanation.unmatched:
        assert f"stays flat: {item.node}: {item.reason}" in text
        assert item.source_line in text  # brackets and colons as they are
    with pytest.raises(UnsupportedGraphError, match="drop strict=True"):
        dmt_compile.explain(model, mixed_batch(), "2x2", strict=True)


def test_an_explanation_prints_all_of_its_parts() -> None:
    torch.manual_seed(0)
    model = DLRM()
    explanation = dmt_compile.explain(model, one_id_each(model, 6), "2x2")
    assert explanation.interaction is not None
    assert explanation.interaction.kind == "dot"
    assert explanation.interaction.features == ("emb.0", "emb.1", "emb.2", "emb.3", "emb.4")
    assert explanation.unmatched == ()
    assert [record.name for record in explanation.passes] == [step.name for step in passes_in_order(Options())]
    effects = {record.name: record.effect for record in explanation.passes}
    assert effects["lower_to_sptt"] is Effect.EXACT
    assert effects["sync_dense_gradients"] is Effect.REORDERED
    assert effects["compile_dense_regions"] is Effect.REORDERED
    assert explanation.effect is Effect.REORDERED
    text = str(explanation)
    lines = text.splitlines()
    assert lines[0] == "Found 5 embedding tables; 0 lookups stay flat."
    assert lines[1] == "Interaction: dot over 5 features and one dense vector."
    for line in str(explanation.plan).splitlines():
        assert line in lines, line
    for record in explanation.passes:
        effect = record.effect.name if record.report.changed else "-"
        assert any(record.name in line and effect in line for line in lines), record.name
    for form in ("flat", "sptt"):
        row = next(line for line in lines if re.match(rf"\W+{form}\W", line))
        assert [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", row)] == [
            explanation.bytes_per_link[form]["intra"],
            explanation.bytes_per_link[form]["cross"],
        ]
    assert "local batch 6" in " ".join(text.split())
    assert "Effect on numbers: REORDERED" in text


def test_one_process_with_eager_dense_parts_keeps_every_number() -> None:
    model = DLRM()
    explanation = dmt_compile.explain(model, one_id_each(model, 4), dense_compiler="eager")
    assert explanation.effect is Effect.EXACT
    assert "bitwise the flat model's numbers" in str(explanation)
    assert explanation.bytes_per_link == {form: {"intra": 0, "cross": 0} for form in ("flat", "sptt")}
    assert dmt_compile.explain(model, one_id_each(model, 4)).effect is Effect.REORDERED  # Inductor by default


def test_an_interaction_that_is_not_recognised_is_said_to_be() -> None:
    explanation = dmt_compile.explain(Mixed(), mixed_batch())  # adds its features up
    assert explanation.interaction is None
    assert "Interaction: not recognised; SPTT needs the lookups alone." in str(explanation)


class InTwoGraphs(nn.Module):
    """Tables on both sides of a graph break, and a buffer that a training forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Embedding(7, 4), nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.norm(self.before(ids))
        torch._dynamo.graph_break()
        return rows + self.after(ids)


# Dynamo itself looks at the gradient of what an earlier graph returned, with any backend.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning:torch\..*")
def test_all_graphs_of_a_model_are_explained_and_its_buffers_kept() -> None:
    model = InTwoGraphs()
    explanation = dmt_compile.explain(model, torch.tensor([1, 2, 6]), topology="2x1")
    assert [table.name for table in explanation.tables] == ["before", "after"]
    assert sorted(explanation.plan.placements) == ["after", "before"]
    assert explanation.batch_size == 3
    assert next(r for r in explanation.passes if r.name == "find_tables").report.matched == 2
    assert not model.norm.running_mean.any()
    assert int(model.norm.num_batches_tracked) == 0
