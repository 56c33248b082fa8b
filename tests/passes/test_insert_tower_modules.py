"""The pass that compresses towers, case by case, and towered models written by hand beside what it makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.tower_modules import TowerSpec
from tests._tolerances import assert_reordered
from tests.passes._harness import capture, dense, dlrm

ROWS, DIM = (9, 8, 7, 6), 4
TOWERS = [["tables.0", "tables.1"], ["tables.2", "tables.3"]]


class Model(nn.Module):
    """Four tables of one id a sample, a bottom MLP, and a head that joins them in its own way."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        self.bottom = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, DIM))
        self.head = head

    def vectors(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return [table(ids[:, i]) for i, table in enumerate(self.tables)]

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bottom(x), self.vectors(ids))


class Dot(nn.Module):
    """Dot products below the diagonal, and the dense vector."""

    def __init__(self, vectors: int = 5, dim: int = DIM) -> None:
        super().__init__()
        self.top = nn.Linear(dim + vectors * (vectors - 1) // 2, 1)

    def forward(self, bottom: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        t = torch.stack([bottom, *vectors], dim=1)
        rows, columns = torch.tril_indices(t.shape[1], t.shape[1], -1)
        return self.top(torch.cat([bottom, torch.bmm(t, t.transpose(1, 2))[:, rows, columns]], dim=1))


class Cross(nn.Module):
    """Two cross layers of full rank."""

    def __init__(self, width: int = 5 * DIM) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.top = nn.Linear(width, 1)

    def forward(self, bottom: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        x0 = torch.cat([bottom, *vectors], dim=1)
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return self.top(x)


class Concatenated(nn.Module):
    def __init__(self, width: int = 5 * DIM) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, bottom: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.top(torch.cat([bottom, *vectors], dim=1))


class Towered(Model):
    """The same with towers, written by hand: each feature's vector through the tower's own linear layer."""

    def __init__(self, head: nn.Module, dim: int, bottom: int) -> None:
        super().__init__(head)
        self.towers = nn.ModuleList(nn.Linear(DIM, dim) for _ in TOWERS)
        self.bottom[2] = nn.Linear(5, bottom)

    def vectors(self, ids: torch.Tensor) -> list[torch.Tensor]:
        flat = super().vectors(ids)
        return [self.towers[index // 2](vector) for index, vector in enumerate(flat)]


def batch(samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(rows, (samples,), generator=generator) for rows in ROWS], dim=1)
    return torch.randn(samples, 3, generator=generator), ids


def transformed(head: nn.Module, kind: object = "dlrm", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = Model(head)
    chosen = {"tower_module": kind, **({"tower_module_options": options} if options else {})}
    plan = dmt_compile.plan(model, batch(), "1x1", partition=TOWERS, **chosen)
    return dmt_compile.transform(model, batch(), plan, tower_module=None if isinstance(kind, str) else kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flat", "by_hand", "bottom"),
    [
        (Dot, lambda: Dot(5, 2), 2),
        (Cross, lambda: Cross(DIM + 8), DIM),
        (Concatenated, lambda: Concatenated(DIM + 8), DIM),
    ],
    ids=["dot", "cross", "concatenation"],
)
def test_it_is_the_towered_model_that_one_would_write(
    flat: Callable[[], nn.Module], by_hand: Callable[[], nn.Module], bottom: int
) -> None:
    mine = transformed(flat(), dim=2, step=1)  # plain layers
    theirs = Towered(by_hand(), 2, bottom)
    names = {
        f"dmt_towers.tower{i}.each.4.{leaf}": f"towers.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias")
    }
    state = {names.get(name, name): copy.deepcopy(tensor) for name, tensor in mine.state_dict().items()}
    theirs.load_state_dict(state)
    for training in (True, False):
        mine.train(training), theirs.train(training)
        output, expected = mine(*batch()), theirs(*batch())
        assert_reordered(output, expected, longest_sum=32)
        output.square().sum().backward()
        expected.square().sum().backward()
        gradients = dict(theirs.named_parameters())
        for name, parameter in mine.named_parameters():
            assert_reordered(parameter.grad, gradients[names.get(name, name)].grad, longest_sum=64, gradient=True)


def report_of(head: nn.Module, **options: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    case = capture(Model(head), batch()).on("1x1", partition=TOWERS, **options)
    return case, case.advance("insert_tower_modules")


def test_the_report_lists_every_layer_replaced_with_both_shapes() -> None:
    case, report = report_of(Dot(), tower_module="dlrm", tower_module_options={"dim": 2})
    assert report.notes == (
        "tower0: 2 features, 8 -> 4 columns",
        "tower1: 2 features, 8 -> 4 columns",
        "bottom.2.weight: (4, 5) -> (2, 5)",
        "bottom.2.bias: (4,) -> (2,)",
        "head.top.weight: (1, 14) -> (1, 12)",
    )
    assert case.ctx.plan is not None
    assert [tower.output_width for tower in case.ctx.plan.towers] == [4, 4]
    assert case.count(ops.tower_input) == case.count(ops.tower_output) == 2


def test_a_layer_whose_size_stays_is_not_replaced() -> None:
    case, report = report_of(Concatenated(), tower_module="dlrm")
    assert [note for note in report.notes if "->" in note and not note.startswith("tower")] == []
    assert case.ctx.towers is not None
    assert case.ctx.towers.replacements() == {}


def test_fewer_vectors_make_fewer_pairs() -> None:
    case, report = report_of(Dot(), tower_module="dlrm", tower_module_options={"c": 0, "p": 1})
    assert "head.top.weight: (1, 14) -> (1, 7)" in report.notes
    assert case.outputs().shape == (6, 1)


def test_scalars_of_towers_stand_behind_the_pairs() -> None:
    _, report = report_of(Dot(), tower_module="dot", tower_module_options={"dim": 2})
    assert "head.top.weight: (1, 14) -> (1, 14)" not in report.notes  # 2 + 10 + 2 x 1: as many, but other ones
    case, report = report_of(Dot(), tower_module="dot")
    assert "head.top.weight: (1, 14) -> (1, 16)" in report.notes
    assert case.outputs().isfinite().all()


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    report = dlrm().advance("insert_tower_modules")
    assert not report.changed
    assert report.skipped == (("graph", "no Tower Module was asked for"),)


class Mixing(nn.Module):
    """Sends something else than a vector for each feature."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.layer = nn.Linear(sum(spec.widths), spec.dim)

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        return self.layer(embs.flatten(1))


class Head(nn.Module):
    """Does what a test says."""

    def __init__(self, forward: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        self.does = forward

    def forward(self, bottom: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.does(bottom, vectors)


REFUSALS = {
    "no join": (lambda b, v: b + v[0] * v[1] + v[2] * v[3], "no cat or stack joins the vectors of several features"),
    "samples": (lambda b, v: torch.cat(list(v), 0), "cat joins 2 dimensions along dimension 0"),
    "apart": (
        lambda b, v: torch.cat(list(v), 1).sum(1) + sum(x.sum(1) for x in v),
        "feature tables.0 is also used apart from the join",
    ),
    "in parts": (
        lambda b, v: torch.cat(list(v), 1).sum(1) + torch.cat(list(v[:3]), 1).square().sum(1),
        "it joins 3 of the 4 features that another join has",
    ),
    "twice": (lambda b, v: torch.cat([*v, v[0]], 1).sum(1), "feature tables.0 is joined twice"),
    "output": (lambda b, v: torch.cat(list(v), 1), "the model's output would change: 16 columns would become 8"),
    "a column": (lambda b, v: torch.cat(list(v), 1)[:, 5:7].sum(1), "a slice of fixed columns is read"),
    "unknown": (lambda b, v: torch.cat(list(v), 1).cumsum(1)[:, -1], "cumsum has a fixed size"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_the_reason_and_the_line(name: str) -> None:
    head, reason = REFUSALS[name]
    case, report = report_of(Head(head), tower_module=Mixing)
    before = case.code()
    assert not report.changed
    assert reason in report.skipped[0][1]
    assert case.ctx.embedding_graph.unmatched[-1].source_line.split(":")[0].endswith("test_insert_tower_modules.py")
    assert case.ctx.plan is not None
    assert reason in case.ctx.plan.notes[-1]
    assert case.ctx.plan.tower_modules is None
    assert case.code() == before
    with pytest.raises(UnsupportedGraphError, match="Tower Modules are refused"):
        report_of(Head(head), tower_module=Mixing, strict=True)


@pytest.mark.parametrize("name", ["no join", "apart", "in parts", "twice"])
def test_a_vector_for_each_feature_fits_wherever_features_are_read(name: str) -> None:
    head, _ = REFUSALS[name]
    case, report = report_of(Head(head), tower_module="dlrm", tower_module_options={"dim": DIM})
    assert report.changed
    assert case.outputs().isfinite().all()


def test_features_used_apart_stay_as_they_are_beside_the_others() -> None:
    def head(bottom: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(vectors), 1).square().sum(1) + vectors[0].sum(1)

    case, report = report_of(Head(head), tower_module=Mixing)
    assert report.changed
    assert report.skipped == (("tables.0", "feature tables.0 is also used apart from the join"),)
    assert case.outputs().shape == (6,)


def test_transform_says_why_a_model_does_not_fit() -> None:
    model = Model(Head(REFUSALS["no join"][0]))
    plan = dmt_compile.plan(model, batch(), "1x1", partition=TOWERS, tower_module="dcn")
    with pytest.raises(ConfigError, match="no Tower Modules: no cat or stack joins"):
        dmt_compile.transform(model, batch(), plan)


def test_a_model_without_tables_has_no_towers() -> None:
    report = dense(tower_module="dlrm").advance("insert_tower_modules")
    assert not report.changed
    assert report.skipped == (("graph", "no Tower Module was asked for"),)
