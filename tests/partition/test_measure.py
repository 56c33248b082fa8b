"""Interactions measured on models: against their definitions, on models whose interactions are known, and faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile.errors import ConfigError
from dmt_compile.partition.signals import SIGNALS, cosine
from tests.models import DLRM, Batch, make_batch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def batches_for(model: DLRM, *sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [make_batch(model, size, generator) for size in sizes]


def joined(batches: list[Batch]) -> Batch:
    """All batches as one."""
    ids = [torch.cat(parts) for parts in zip(*(b[1] for b in batches), strict=True)]
    offsets = []
    for table in range(len(ids)):
        shifts = np.cumsum([0, *(len(b[1][table]) for b in batches)])
        offsets.append(torch.cat([b[2][table] + int(shift) for b, shift in zip(batches, shifts, strict=False)]))
    return torch.cat([b[0] for b in batches]), ids, offsets


class Lookups(nn.Module):
    """One ``nn.Embedding`` a column of ids; ``head`` makes the score of the vectors."""

    def __init__(self, features: int, dim: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.ModuleList(nn.Embedding(12, dim) for _ in range(features))

    def vectors(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return [table(ids[:, k]) for k, table in enumerate(self.emb)]


def ids_for(features: int, samples: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 12, (samples, features), generator=torch.Generator().manual_seed(seed))


class Product(Lookups):
    """Multiplies features 1 and 2, adds the others."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.vectors(ids)
        return a.sum(1) + (b * c).sum(1) + d.sum(1) ** 2


class Shared(Lookups):
    """An over-arch on the concatenation whose hidden units read features 0 and 2, or 1 and 3."""

    def __init__(self) -> None:
        super().__init__(4)
        self.first = nn.Linear(16, 6)
        self.last = nn.Linear(6, 1)
        with torch.no_grad():
            self.first.weight[:3, 4:8] = self.first.weight[:3, 12:] = 0
            self.first.weight[3:, :4] = self.first.weight[3:, 8:12] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(torch.cat(self.vectors(ids), dim=1)))).squeeze(1)


class Dot(Lookups):
    """A DLRM's interaction of which the over-arch uses the product of features 0 and 3 alone."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1))
        self.last = nn.Linear(6, 1)
        with torch.no_grad():
            self.last.weight.zero_()[0, 3] = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        stacked = torch.stack(self.vectors(ids), dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        return self.last(products[:, self.pairs[0], self.pairs[1]]).squeeze(1)


class Cross(Lookups):
    """A DCN layer whose columns of feature 1 read feature 2 alone, and no others anything."""

    def __init__(self) -> None:
        super().__init__(3)
        self.cross = nn.Linear(12, 12)
        self.last = nn.Linear(12, 1)
        with torch.no_grad():
            self.cross.weight.zero_()[4:8, 8:] = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x0 = torch.cat(self.vectors(ids), dim=1)
        return self.last(x0 * self.cross(x0) + x0).squeeze(1)


class Projected(Lookups):
    """Features of two widths, projected to one before they are joined; a sequence, used before it is pooled."""

    def __init__(self) -> None:
        super().__init__(2)
        self.wide = nn.Embedding(12, 6)
        self.to_common = nn.Linear(6, 4, bias=False)
        self.history = nn.Embedding(12, 4)

    def forward(self, ids: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        rows = self.history(history)
        scores = torch.softmax((rows * self.emb[0](ids[:, 0])[:, None]).sum(2), dim=1)
        attended = (rows * scores[:, :, None]).sum(1)
        parts = [*self.vectors(ids), self.to_common(self.wide(ids[:, 2]))]
        return torch.stack(parts, dim=1).sum((1, 2)) + attended.sum(1)


def test_cosine_is_the_mean_of_absolute_cosines() -> None:
    torch.manual_seed(0)
    model = DLRM()
    batch = batches_for(model, 50)[0]
    found = dmt_compile.interactions(model, [batch])
    vectors = [table(i, o).detach() for table, i, o in zip(model.emb, batch[1], batch[2], strict=True)]
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            expected = 0.0 if i == j else float(torch.cosine_similarity(a, b, dim=1).abs().mean())
            assert found.matrix[i, j] == pytest.approx(expected, abs=1e-6)
    assert found.features == found.tables == tuple(f"emb.{k}" for k in range(5))
    assert (found.signal, found.samples) == ("cosine", 50)


@pytest.mark.parametrize("signal", ["cosine", "nid"])
@pytest.mark.parametrize("dims", [8, (8, 4, 8, 4, 4)])
def test_batches_one_after_the_other_give_what_one_batch_gives(signal: str, dims: Any) -> None:
    torch.manual_seed(0)
    model = DLRM(dims=dims)
    parts = batches_for(model, 30, 1, 17, 0, 52)
    streamed = dmt_compile.interactions(model, iter(parts), signal)
    at_once = dmt_compile.interactions(model, [joined(parts)], signal)
    assert streamed.samples == at_once.samples == 100
    assert np.abs(streamed.matrix - at_once.matrix).max() < 1e-5


def test_parts_of_a_large_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {str(k): torch.randn(40, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)}
    whole = cosine(vectors)
    monkeypatch.setattr("dmt_compile.partition.signals.MAX_ELEMENTS", 64)
    assert torch.allclose(cosine(vectors), whole, atol=1e-6)


def test_archdetect_finds_the_product_and_nothing_else() -> None:
    found = dmt_compile.interactions(Product(), [(ids_for(4, seed=k),) for k in range(2)], "archdetect").matrix
    assert found[1, 2] == 1
    found[1, 2] = found[2, 1] = 0
    assert found.max() < 1e-5


def test_archdetect_repeats_itself() -> None:
    first, second = (dmt_compile.interactions(Shared(), [(ids_for(4),)], "archdetect", seed=3) for _ in range(2))
    assert np.array_equal(first.matrix, second.matrix)


@pytest.mark.parametrize("signal", ["nid", "archdetect"])
@pytest.mark.parametrize(("model", "interacting"), [(Shared, {(0, 2), (1, 3)}), (Dot, {(0, 3)}), (Cross, {(1, 2)})])
def test_known_interactions_are_found(signal: str, model: type[Lookups], interacting: set[tuple[int, int]]) -> None:
    built = model()
    matrix = dmt_compile.interactions(built, [(ids_for(len(built.emb)),)], signal).matrix
    strongest = {(i, j) for i, j in zip(*np.nonzero(matrix > 0.02), strict=True) if i < j}
    assert strongest == interacting


def test_features_are_compared_where_they_are_joined_and_sequences_by_their_mean() -> None:
    model = Projected()
    ids, history = ids_for(3, 20), ids_for(5, 20, seed=1)
    found = dmt_compile.interactions(model, [(ids, history)])
    places = {name: k for k, name in enumerate(found.features)}
    assert set(places) == {"emb.0", "emb.0#2", "emb.1", "wide", "history"}
    mean, first = model.history(history).mean(1), model.emb[1](ids[:, 1])
    for name, vector in (("wide", model.to_common(model.wide(ids[:, 2]))), ("history", mean)):
        expected = float(torch.cosine_similarity(vector.detach(), first.detach(), dim=1).abs().mean())
        assert found.matrix[places[name], places["emb.1"]] == pytest.approx(expected, abs=1e-6)


def test_fields_of_one_table_and_shared_tables_are_features_of_their_own() -> None:
    class Fields(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(24, 4)
            self.register_buffer("starts", torch.tensor([0, 12]))
            self.shared = nn.Embedding(12, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            fields = self.emb(ids + self.starts).flatten(1)
            return torch.cat([fields, self.shared(ids[:, 0]), self.shared(ids[:, 1])], dim=1).sum(1)

    found = dmt_compile.interactions(Fields(), [(ids_for(2, 30),)])
    assert set(found.features) == {"emb[0:12]", "emb[12:24]", "shared", "shared#2"}
    assert found.of_tables(["shared", "emb[0:12]"]).shape == (2, 2)


def test_a_signal_of_ones_own_sees_vectors_by_name() -> None:
    def first_column(vectors: Any) -> torch.Tensor:
        assert list(vectors) == ["emb.0", "emb.1", "emb.2", "emb.3"]
        return torch.full((4, 4), 0.25)

    found = dmt_compile.interactions(Product(), [(ids_for(4),)], first_column)
    assert found.signal == "first_column"
    assert found.matrix[0, 1] == 0.25


def test_the_model_is_left_as_it_was() -> None:
    model = DLRM().train()
    model.bottom.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dmt_compile.interactions(model, batches_for(model, 8), "nid")
    assert model.training
    assert not model.bottom.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_score_can_be_taken_from_any_output() -> None:
    class Several(Product):
        def forward(self, ids: torch.Tensor) -> Any:
            return {"count": torch.ones(()), "score": super().forward(ids)}

    taken = dmt_compile.interactions(
        Several(), [(ids_for(4),)], "archdetect", output=lambda returned: returned["score"]
    )
    assert taken.matrix[1, 2] == 1

    class Scalar(Product):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).mean()

    with pytest.raises(ConfigError, match=re.escape("expected a floating output of 200 samples, found none")):
        dmt_compile.interactions(Scalar(), [(ids_for(4),)], "archdetect")


def test_nid_says_where_it_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match=r"for signal 'nid', found that no .*; use 'archdetect' or 'cosine'"):
        dmt_compile.interactions(Product(), [(ids_for(4),)], "nid")


def test_faults_are_named() -> None:
    model, batch = DLRM(), batches_for(DLRM(), 4)[0]
    cases: list[tuple[Any, Any, str, str]] = [
        (model, [batch], "cosin", "expected a known signal, found 'cosin'; did you mean 'cosine'?"),
        (model, [batch], "zzz", f"found 'zzz'; valid are {', '.join(map(repr, SIGNALS))}"),
        (model, batch, "cosine", "found a tuple, which is one batch; pass [batch]"),
        (model, [], "cosine", "found no lookup; see dmt_compile.explain"),
        (model, batches_for(model, 0), "cosine", "found batches without any; pass real ones"),
        (DLRM().to("meta"), [batch], "cosine", "expected a trained model, found parameters on the meta device"),
    ]
    for broken, batches, signal, message in cases:
        with pytest.raises(ConfigError, match=re.escape(message)):
            dmt_compile.interactions(broken, batches, signal)
    nn.init.constant_(model.emb[0].weight, float("nan"))
    with pytest.raises(ConfigError, match="expected finite numbers, found nan or inf"):
        dmt_compile.interactions(model, [batch])


def test_measured_interactions_make_the_plan_and_the_compiled_model_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DLRM()
    batches = batches_for(model, 16, 16)
    found = dmt_compile.interactions(model, batches)
    found.save(tmp_path / "interactions.json")
    plan = dmt_compile.plan(model, batches[0], "2x1", partition="coherent", interactions=found)
    assert plan.partition == "coherent"
    assert plan.notes[0].startswith("coherent towers by cosine interaction over 32 samples: ")
    for given in (tmp_path / "interactions.json", found.graph()):
        assert (
            dmt_compile.plan(model, batches[0], "2x1", partition="coherent", interactions=given).towers == plan.towers
        )
    expected = [model(*batch) for batch in batches]
    world = dmt_compile.SimulatedWorld("2x1")
    options = {"partition": "diverse", "interactions": found, "dense_compiler": "eager"}
    for output, wanted in zip(world.run(model, batches, **options), expected, strict=True):
        assert torch.equal(output, wanted)
    compiled = torch.compile(model, backend="dmt", options=options)
    assert torch.equal(compiled(*batches[0]), expected[0])
