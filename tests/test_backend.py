"""What a user of ``torch.compile(model, backend="dmt")`` relies on in one process."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import dmt_compile
from dmt_compile import torch_internals
from dmt_compile.errors import BatchError, ConfigError, PlanError, UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.runtime.checks import find_fault
from tests._tolerances import assert_reordered
from tests.models import DLRM, Batch, dense_of, make_batch

LONGEST_SUM = 64  # ids of one row, and the widest layer


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(model: Any, **options: Any) -> Any:
    """Compile with dense regions in eager mode, which keeps every number."""
    return torch.compile(model, backend="dmt", options={"dense_compiler": "eager", **options})


def pair(**arguments: Any) -> tuple[DLRM, DLRM]:
    """Return a model and its flat twin."""
    torch.manual_seed(0)
    model = DLRM(**arguments)
    return model, copy.deepcopy(model)


def batches(model: DLRM, sizes: Sequence[int], seed: int = 1) -> list[Batch]:
    """Return a ragged batch of each size."""
    generator = torch.Generator().manual_seed(seed)
    return [make_batch(model, size, generator) for size in sizes]


def assert_same_step(model: nn.Module, flat: nn.Module, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert bitwise equal outputs, run both backward passes, and assert bitwise equal gradients."""
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert torch.equal(dense_of(mine.grad, mine), dense_of(theirs.grad, theirs)), name


# -------------------------------------------------------------------------------------------------------------- numbers


def test_found_with_no_import_of_ours() -> None:
    script = """
import sys, torch
torch.manual_seed(0)
table = torch.nn.EmbeddingBag(9, 4, mode="sum")
ids, offsets = torch.tensor([1, 8, 3, 3]), torch.tensor([0, 1, 1])
assert "dmt_compile" not in sys.modules
compiled = torch.compile(table, backend="dmt", options={"dense_compiler": "eager"})
assert torch.equal(compiled(ids, offsets), table(ids, offsets))
print(sorted(name for name in sys.modules if name == "dmt_compile.backend"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True, env=environment
    )
    assert run.stdout == "['dmt_compile.backend']\n", run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparse": True},
        {"modes": ("sum", "mean", "max", "mean", "sum")},
        {"dims": (4, 8, 8, 3, 9), "modes": "mean"},
        {"rows": (1,), "dims": 1},
    ],
)
def test_training_and_evaluation_equal_eager_bitwise(arguments: dict[str, Any]) -> None:
    model, flat = pair(**arguments)
    step_model = compiled(model)
    for batch in batches(model, [5, 3, 8]):
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
    with torch.no_grad():
        for batch in batches(model, [4, 6], seed=2):
            output = step_model(*batch)
            assert torch.equal(output, flat(*batch))
            assert not output.requires_grad
    model.eval(), flat.eval()
    batch = batches(model, [7], seed=3)[0]
    assert_same_step(model, flat, step_model(*batch), flat(*batch))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_padding_rows_are_not_pooled(mode: str) -> None:
    model, flat = pair(modes=mode)
    for bare in (model, flat):
        bare.emb[0].padding_idx, bare.emb[2].padding_idx = 3, 0
    step_model = compiled(model)
    for dense, ids, offsets in batches(model, [6, 4]):
        ids[0][::2], ids[2][::3] = 3, 0
        assert_same_step(model, flat, step_model(dense, ids, offsets), flat(dense, ids, offsets))
    assert not dense_of(model.emb[0].weight.grad, model.emb[0].weight)[3].any()
    without = copy.deepcopy(flat)
    without.emb[0].padding_idx = without.emb[2].padding_idx = None
    assert not torch.equal(flat(dense, ids, offsets), without(dense, ids, offsets))


@pytest.mark.parametrize("dense_compiler", ["aot_eager", "inductor"])
def test_dense_compilers_stay_within_the_tolerances(dense_compiler: str) -> None:
    model, flat = pair(sparse=dense_compiler == "aot_eager")
    step_model = compiled(model, dense_compiler=dense_compiler, strict=True)
    optimizers = [torch.optim.SGD(bare.parameters(), 0.1) for bare in (model, flat)]
    for batch in batches(model, [5, 3, 8, 1]):
        output, expected = step_model(*batch), flat(*batch)
        assert_reordered(output.detach(), expected.detach(), LONGEST_SUM)
        output.sum().backward()
        expected.sum().backward()
        for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
            assert_reordered(dense_of(mine.grad, mine), dense_of(theirs.grad, theirs), LONGEST_SUM, gradient=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert step_model(*batches(model, [0])[0]).shape == (0,)
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        assert_reordered(mine.detach(), theirs.detach(), LONGEST_SUM, gradient=True)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("first", "sparse"), [(0, False), (1, True), (6, False)])
def test_fifty_batch_shapes_share_one_graph_for_training_and_one_for_evaluation(first: int, sparse: bool) -> None:
    model, flat = pair(sparse=sparse)
    step_model = compiled(model)
    rng = random.Random(first)
    sizes = [first, 0, 1, *(rng.randint(0, 12) for _ in range(47))]
    for batch, size in zip(batches(model, sizes), sizes, strict=True):
        output = step_model(*batch)
        output.sum().backward()
        with torch.no_grad():
            evaluated = step_model(*batch)
        assert output.shape == evaluated.shape == (size,)
        if size:  # the flat model's view cannot tell the sizes of an empty batch
            expected = flat(*batch)
            expected.sum().backward()
            assert torch.equal(output, expected)
            assert torch.equal(evaluated, expected)
    for (name, mine), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
        assert torch.equal(dense_of(mine.grad, mine), dense_of(theirs.grad, theirs)), name
    assert counters["stats"]["unique_graphs"] == 2


def test_an_optimizer_of_sparse_gradients() -> None:
    model, flat = pair(sparse=True)
    step_model = compiled(model)
    optimizers = [
        optimizer
        for bare in (model, flat)
        for optimizer in (
            torch.optim.SparseAdam(list(bare.emb.parameters()), lr=0.05),
            torch.optim.Adam([*bare.bottom.parameters(), *bare.top.parameters()], lr=0.05),
        )
    ]
    for batch in batches(model, [5, 3, 8]):
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
        assert all(table.weight.grad.layout == torch.sparse_coo for table in model.emb)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


# -------------------------------------------------------------------------------------------- ways to call the compiler


class Parent(nn.Module):
    """A model of which only a part is compiled."""

    def __init__(self, dlrm: nn.Module) -> None:
        super().__init__()
        self.dlrm = dlrm
        torch.manual_seed(4)
        self.head = nn.Linear(1, 2)

    def forward(self, *batch: Any) -> torch.Tensor:
        return self.head(self.dlrm(*batch).unsqueeze(1))


def whole_model(model: DLRM) -> tuple[Callable[..., torch.Tensor], nn.Module]:
    return compiled(model), model


def method_of_the_model(model: DLRM) -> tuple[Callable[..., torch.Tensor], nn.Module]:
    model.compile(backend="dmt", options={"dense_compiler": "eager"})
    return model, model


def function_over_the_model(model: DLRM) -> tuple[Callable[..., torch.Tensor], nn.Module]:
    def scores(dense: torch.Tensor, ids: Any, offsets: Any) -> torch.Tensor:
        return torch.sigmoid(model(dense, ids, offsets))

    return compiled(scores), model


def submodule_of_a_parent(model: DLRM) -> tuple[Callable[..., torch.Tensor], nn.Module]:
    parent = Parent(compiled(model))
    return parent, parent


@pytest.mark.parametrize(
    "way",
    [whole_model, method_of_the_model, function_over_the_model, submodule_of_a_parent],
    ids=lambda way: way.__name__,
)
def test_each_way_to_compile_finds_the_tables(way: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, flat = pair()
    caplog.set_level(logging.WARNING, logger="dmt_compile")
    step_model, trained = way(model)
    expected_of: dict[Any, Callable[..., torch.Tensor]] = {
        function_over_the_model: lambda *batch: torch.sigmoid(flat(*batch)),
        submodule_of_a_parent: Parent(flat),
    }
    reference = expected_of.get(way, flat)
    for batch in batches(model, [5, 1, 8]):
        output, expected = step_model(*batch), reference(*batch)
        assert_same_step(trained, reference if isinstance(reference, nn.Module) else flat, output, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not caplog.records  # with no table there would be a notice


class SharedTable(nn.Module):
    """Two features that read one table, and a third with its own."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.shared = nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse)
        self.own = nn.EmbeddingBag(9, 4, mode="mean", sparse=sparse)

    def forward(self, ids: list[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        first, second, third = offsets
        return torch.cat([self.shared(ids[0], first), self.own(ids[1], second), self.shared(ids[2], third)], dim=1)


def stacked_offsets(samples: int, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return ids of three features and offsets as one (features, samples) tensor."""
    lengths = torch.randint(0, 4, (3, samples), generator=generator)
    ids = [torch.randint(0, 9, (int(total),), generator=generator) for total in lengths.sum(1)]
    return ids, lengths.cumsum(1) - lengths


@pytest.mark.parametrize(("first", "sparse"), [(0, True), (1, False), (5, False)])
def test_two_features_share_a_table_and_offsets_come_as_one_tensor(first: int, sparse: bool) -> None:
    torch.manual_seed(0)
    model = SharedTable(sparse)
    flat = copy.deepcopy(model)
    step_model = compiled(model)
    generator = torch.Generator().manual_seed(1)
    graphs = []
    for samples in (first, 3, 1, 7, 0, 2, 0):
        ids, offsets = stacked_offsets(samples, generator)
        output, expected = step_model(ids, offsets), flat(ids, offsets)
        graphs.append(counters["stats"]["unique_graphs"])
        assert torch.equal(output, expected)
        weights = torch.arange(1.0, 13.0)  # integers: sums of them are exact in any order
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
    shared, own = (dense_of(table.weight.grad, table.weight) for table in (model.shared, model.own))
    assert torch.equal(shared, dense_of(flat.shared.weight.grad, flat.shared.weight))
    assert_reordered(own, dense_of(flat.own.weight.grad, flat.own.weight), 16, gradient=True)
    # An empty tensor's strides are other ones than its sizes say: one graph for all empty batches, one for the others.
    assert graphs == ([1, 2, 2, 2, 2, 2, 2] if first == 0 else [1, 1, 1, 1, 2, 2, 2])


class WeightedBags(nn.Module):
    """Bags whose ids have a weight each, of the batch: two inputs that are equally long in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(9, 4, mode="sum")

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bags(ids, offsets, weights)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_weights_of_an_empty_first_batch_are_as_many_as_its_ids(first: int) -> None:
    torch.manual_seed(0)
    model = WeightedBags()
    step_model = compiled(model)
    for samples in (first, 3, 1, 0, 5):
        batch = torch.randint(9, (2 * samples,)), torch.arange(samples) * 2, torch.rand(2 * samples)
        assert torch.equal(step_model(*batch), model(*batch))
    assert counters["stats"]["unique_graphs"] == 1
    ids, offsets, weights = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2]), torch.ones(3)
    with pytest.raises(BatchError, match="expected one weight for each of 4 ids of table bags, found 3"):
        step_model(ids, offsets, weights)


class MatrixBags(nn.Module):
    """Bags that are rows of a matrix; PyTorch counts them by the ids, not by the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(9, 4, mode="sum")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.bags(ids)], dim=1)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 2])
def test_an_empty_first_matrix_of_ids_has_as_many_bags_as_rows(first: int, columns: int) -> None:
    torch.manual_seed(0)
    model = MatrixBags()
    step_model = compiled(model)
    for samples in (first, 3, 1, 0, 5):
        ids = torch.randint(9, (samples, columns))
        assert torch.equal(step_model(ids), model(ids))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_model_without_tables_is_compiled_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    flat = copy.deepcopy(model)
    caplog.set_level(logging.WARNING, logger="dmt_compile")
    step_model = compiled(model)
    for samples in (4, 1, 0, 9):
        dense = torch.randn(samples, 5)
        assert_same_step(model, flat, step_model(dense), flat(dense))
    assert [record.getMessage() for record in caplog.records] == [
        "dmt: found no embedding table in this graph; eager compiles it as one dense region"
    ]
    assert counters["stats"]["unique_graphs"] == 1


class WithEmbedding(nn.Module):
    """A pooled table, an nn.Embedding with a single id a sample, and a table that is scaled before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, mode="sum")
        self.single = nn.Embedding(9, 4)
        self.scaled = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(single, self.scaled.weight * 2)
        return self.bag(ids, offsets) * self.single(single) + rows


def test_a_lookup_that_does_not_match_stays_flat_and_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithEmbedding()
    flat = copy.deepcopy(model)
    step_model = compiled(model, dump_dir=str(tmp_path))
    for samples in (4, 1, 7):
        batch = (torch.randint(20, (2 * samples,)), 2 * torch.arange(samples), torch.randint(9, (samples,)))
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
    report = json.loads((tmp_path / "graph0" / "report.json").read_text())
    found = {entry["name"]: entry for entry in report["passes"]}["find_tables"]
    assert found["matched"] == 2
    assert [reason for _, reason in found["skipped"]] == ["its table is not a parameter of the model"]
    with pytest.raises(
        UnsupportedGraphError,
        match=r"a parameter of the model \(.*test_backend.py:\d+: rows = nn.functional.*strict=True",
    ):
        compiled(WithEmbedding(), strict=True)(*batch)


# ----------------------------------------------------------------------------------------------- sizes and their guards


class Asking(nn.Module):
    """A model that does something else for a batch of one sample, and another thing for more than five."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(20, 4, mode="sum")

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        out = self.emb(ids, offsets)
        if offsets.size(0) == 1:
            return out * 2
        return out * 3 if len(offsets) > 5 else out


def test_a_size_that_the_model_asks_for_itself_gets_its_guard() -> None:
    torch.manual_seed(0)
    model = Asking()
    flat = copy.deepcopy(model)
    step_model = compiled(model)
    graphs = []
    for samples in (4, 1, 3, 8, 1, 6, 2):
        batch = torch.randint(20, (2 * samples,)), 2 * torch.arange(samples)
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 3, 3, 3, 3]


class Products(nn.Module):
    """Operators whose own shape rules ask whether a size is 0 or 1: tensordot, matmul, einsum, batch norm, expand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.EmbeddingBag(20, 4, mode="sum")
        self.b = nn.EmbeddingBag(9, 4, mode="sum")
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        vectors = torch.stack([self.a(ids, offsets), self.b(ids % 9, offsets)], dim=1)
        projected = torch.tensordot(vectors, self.weight, dims=([2], [0]))
        products = torch.matmul(projected, self.matrix) + torch.einsum("bfd,de->bfe", projected, self.matrix)
        pairs = torch.matmul(products, projected.transpose(1, 2)).flatten(1)
        bias = self.matrix[:1].expand(len(offsets), -1)
        return (self.norm(products.sum(1) + bias) @ self.matrix).sum(1) + pairs.sum(1)


def test_questions_of_operators_cost_no_graph() -> None:
    torch.manual_seed(0)
    model = Products().eval()
    flat = copy.deepcopy(model)
    step_model = compiled(model)
    for samples in (4, 1, 7, 2, 1):
        batch = torch.randint(20, (2 * samples,)), 2 * torch.arange(samples)
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
    assert counters["stats"]["unique_graphs"] == 1
    model.train(), flat.train()
    for samples in (4, 7, 2):
        batch = torch.randint(20, (2 * samples,)), 2 * torch.arange(samples)
        assert torch.equal(step_model(*batch), flat(*batch))
    assert counters["stats"]["unique_graphs"] == 2


def test_sizes_that_happen_to_be_equal_stay_two_sizes() -> None:
    """Three ids in three bags at first, and a dense width that is the number of samples."""
    torch.manual_seed(0)
    model, flat = pair(rows=(20, 9), dense=3)
    step_model = compiled(model)
    generator = torch.Generator().manual_seed(0)
    for samples, ids in ((3, 3), (4, 9), (1, 3), (2, 2)):
        starts = torch.arange(samples).clamp(max=ids)
        draw = [torch.randint(9, (ids,), generator=generator) for _ in range(2)]
        batch = torch.randn(samples, 3, generator=generator), draw, [starts, starts.clone()]
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------------ options, errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"topologie": "2x2"}, "expected a known option, found 'topologie'; did you mean 'topology'?"),
        ({"zzz": 1}, "found 'zzz'; valid are 'plan', 'topology'"),
        ({"dense_compiler": "induktor"}, "found 'induktor'; did you mean 'inductor'?"),
        ({"partition": "balance"}, "found 'balance'; did you mean 'balanced'?"),
        ({"partition": [["emb.0"]], "towers": 1}, "expected either 'towers' or an explicit 'partition', found both"),
        ({"plan": "some.json", "towers": 2}, "expected 'plan' alone, found it beside 'towers'"),
        ({"topology": "two by two"}, "expected '<hosts>x<local ranks>' such as '2x4', found 'two by two'"),
        ({"topology": 4}, "expected text or a Topology for 'topology', found 4"),
        ({"towers": 0}, "expected 'host' or a positive number for 'towers', found 0"),
        ({"partition": ["emb.0"]}, "expected a list of lists of table names for 'partition'"),
        ({"check_ids": "no"}, "expected True or False for 'check_ids', found 'no'"),
        ({"timeout_s": -1}, "expected seconds above 0 for 'timeout_s', found -1"),
        ({"plan": 3}, "expected a TowerPlan or a path for 'plan', found 3"),
        ({"topology": "0x2"}, "expected a positive number for hosts, found 0"),
        ({"topology": "2x2"}, "start torchrun with 4 processes, or use dmt_compile.SimulatedWorld('2x2')"),
        ({"towers": 3}, ""),
    ],
)
def test_a_bad_option_reaches_the_user_as_what_it_is(options: dict[str, Any], text: str) -> None:
    model = nn.EmbeddingBag(9, 4)
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 1])
    step_model = torch.compile(model, backend="dmt", options={"dense_compiler": "eager", **options})
    if not text:
        assert torch.equal(step_model(ids, offsets), model(ids, offsets))  # towers that share one host
        return
    with pytest.raises(ConfigError) as raised:
        step_model(ids, offsets)
    assert text in str(raised.value)
    assert ids.__dict__ == offsets.__dict__ == {}


def test_a_plan_that_does_not_fit_reaches_the_user_as_what_it_is(tmp_path: Path) -> None:
    model, _ = pair()
    batch = batches(model, [3])[0]
    for plan, text in (
        (str(tmp_path / "none.json"), "plan: expected a readable file, found"),
        (dmt_compile.plan(model, batch, "2x2"), "plan: expected a plan for topology 1x1, found one for 2x2"),
        (
            dmt_compile.plan(DLRM(rows=(9, 20, 7, 33, 11)), batch),
            "expected table emb.0 as (rows, dim, dtype) = (9, 8, 'float32')",
        ),
    ):
        with pytest.raises(PlanError) as raised:
            compiled(model, plan=plan)(*batch)
        assert text in str(raised.value)
    saved = tmp_path / "plan.json"
    dmt_compile.plan(model, batch).save(saved)
    assert torch.equal(compiled(model, plan=str(saved))(*batch), model(*batch))


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("high", "expected ids of table emb.2 in [0, 7), found 7 at position 1"),
        ("negative", "expected ids of table emb.0 in [0, 50), found -1 at position 0"),
        ("offsets", "expected offsets of table emb.1 that start at 0 and grow to at most the number of ids"),
        ("start", "expected offsets of table emb.3 that start at 0"),
        ("samples", "expected 4 samples in every input, found 3"),
    ],
)
def test_a_faulty_batch_names_table_and_bound_and_updates_nothing(fault: str, text: str) -> None:
    model, _ = pair()
    step_model = compiled(model)
    generator = torch.Generator().manual_seed(1)
    dense, ids, offsets = make_batch(model, 4, generator, longest=0)
    ids = [torch.tensor([0, 1, 2, 3]) for _ in ids]
    offsets = [torch.arange(4) for _ in offsets]
    step_model(dense, ids, offsets).sum().backward()
    before = [(p.detach().clone(), dense_of(p.grad, p).clone()) for p in model.parameters()]
    bad = [i.clone() for i in ids]
    starts = [o.clone() for o in offsets]
    if fault == "high":
        bad[2][1] = 7
    elif fault == "negative":
        bad[0][0] = -1
    elif fault == "offsets":
        starts[1][3] = 9
    elif fault == "start":
        starts[3][0] = 1
    else:
        starts[4] = starts[4][:3]
    for _ in range(2):
        with pytest.raises(BatchError) as raised:
            step_model(dense, bad, starts)
        assert text in str(raised.value)
    for parameter, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(dense_of(parameter.grad, parameter), gradient)
    assert step_model(dense, ids, offsets).shape == (4,)  # and goes on
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("check_ids", [True, False])
def test_the_check_of_ids_can_be_turned_off(check_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def record(*args: Any) -> Any:
        asked.append(args[-1])
        return find_fault(*args)

    monkeypatch.setattr(ops, "find_fault", record)
    model, flat = pair()
    step_model = compiled(model, check_ids=check_ids)
    for batch in batches(model, [5, 2]):
        assert_same_step(model, flat, step_model(*batch), flat(*batch))
    assert asked == [check_ids] * 2


class Refused(nn.Module):
    """A lookup that strict mode refuses, reached through offsets of shape (tables, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = SharedTable(sparse=False)
        self.scaled = nn.Parameter(torch.randn(9, 4))

    def forward(self, ids: list[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding_bag(ids[1], self.scaled * 2, offsets[1], mode="sum")
        return self.bags(ids, offsets) + rows.sum()


class Breaking(nn.Module):
    """A model that Dynamo cannot trace in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = SharedTable(sparse=False)

    def forward(self, ids: list[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.bags(ids, offsets)


def tracing_settings() -> tuple[Any, ...]:
    """Return what the backend sets while Dynamo analyses a frame of its own."""
    sizes, dynamo = torch.fx.experimental._config, torch._dynamo.config
    of_sizes = sizes.backed_size_oblivious, sizes.use_duck_shape
    return *of_sizes, dynamo.capture_scalar_outputs, dynamo.fake_tensor_cache_enabled


@pytest.mark.parametrize(
    ("model", "options", "error", "early"),
    [
        (SharedTable, {}, None, True),
        (SharedTable, {}, None, False),
        (Refused, {"strict": True}, UnsupportedGraphError, True),
        (Refused, {"strict": True}, UnsupportedGraphError, False),
        (SharedTable, {"strict": "?"}, ConfigError, True),
        (SharedTable, {"strict": "?"}, ConfigError, False),
        (Breaking, {}, torch._dynamo.exc.Unsupported, True),
    ],
)
def test_the_user_s_tensors_and_settings_are_as_before(
    model: Any, options: dict[str, Any], error: Any, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not early:  # as in a version of PyTorch whose callbacks do not lead to the frame
        for name in ("start_callbacks", "end_callbacks"):
            monkeypatch.setattr(torch._dynamo.callback.callback_handler, name, [])
    before = tracing_settings()
    during: list[tuple[Any, ...]] = []
    restart = torch_internals.restart_analysis
    monkeypatch.setattr(
        torch_internals, "restart_analysis", lambda reason: (during.append(tracing_settings()), restart(reason))
    )
    ids, offsets = stacked_offsets(3, torch.Generator().manual_seed(0))
    bare = SharedTable(sparse=False) if model is SharedTable else model()
    all_options = {"dense_compiler": "eager", **options}
    step_model = torch.compile(bare, backend="dmt", fullgraph=True, options=all_options)
    if error is None:
        assert torch.equal(step_model(ids, offsets), bare(ids, offsets))
    else:
        with pytest.raises(error):
            step_model(ids, offsets)
    assert tracing_settings() == before
    assert all(settings != before for settings in during)
    assert len(during) == (error not in (ConfigError, torch._dynamo.exc.Unsupported))
    for tensor in (*ids, offsets):
        assert tensor.__dict__ == {}


def test_another_backend_traces_as_it_always_does() -> None:
    torch.manual_seed(0)
    model = Asking()
    batch = torch.tensor([1, 19, 3]), torch.tensor([0, 1, 2])
    compiled(model)(*batch)
    seen: list[tuple[Any, ...]] = []

    def other(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(tracing_settings())
        return gm.forward

    torch._dynamo.reset()
    before = tracing_settings()
    torch.compile(model, backend=other)(*batch)
    assert seen == [before]
