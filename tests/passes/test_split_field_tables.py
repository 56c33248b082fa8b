"""split_field_tables: one table of many fields becomes a table for each field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dmt_compile.errors import BatchError
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.runtime.simulated_world import SimulatedWorld
from tests._tolerances import assert_reordered
from tests.passes._harness import Captured, Fields, assert_compiled_is_eager, capture, dense, dlrm, fields

RANGES = ((0, 7), (7, 12), (12, 21))


class Model(nn.Module):
    """A table of three fields, and what ``look_up(model, ids)`` returns of it: (samples, 12)."""

    def __init__(self, look_up: Callable[[Any, torch.Tensor], torch.Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(21, 4, **options)
        nn.init.normal_(self.emb.weight)  # a padding row that is not zero
        self.register_buffer("starts", torch.tensor([0, 7, 12]))
        self.register_buffer("sizes", torch.tensor([7, 5, 9]))
        self.offsets = np.array((0, *np.cumsum((7, 5, 9))[:-1]), dtype=np.int64)
        self.look_up = look_up
        self.top = nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.look_up(self, ids))


def before_pass(look_up: Callable[[Any, torch.Tensor], torch.Tensor], **options: Any) -> Captured:
    graph = capture(Model(look_up, **options), Fields.batch()).on("1x1")
    graph.advance("find_tables")
    return graph


def in_place(m: Any, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.clone()
    ids += m.starts
    return m.emb(ids).flatten(1)


MATCHED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "buffer": lambda m, ids: m.emb(ids + m.starts).flatten(1),
    "buffer in front": lambda m, ids: m.emb(m.starts + ids).view(-1, 12),
    "row of a buffer": lambda m, ids: m.emb(ids + m.starts.unsqueeze(0)).flatten(1),
    "computed from a buffer": lambda m, ids: m.emb(ids + (m.sizes.cumsum(0) - m.sizes)).flatten(1),
    "new_tensor of numpy": lambda m, ids: m.emb(ids + ids.new_tensor(m.offsets).unsqueeze(0)).flatten(1),
    "new_tensor of numbers": lambda m, ids: m.emb(torch.add(ids, ids.new_tensor((0, 7, 12)))).flatten(1),
    "tensor of numbers": lambda m, ids: m.emb(ids + torch.tensor([0, 7, 12])).flatten(1),
    "numpy": lambda m, ids: m.emb(ids + torch.as_tensor(m.offsets)).flatten(1),
    "method": lambda m, ids: m.emb(ids.add(m.starts)).flatten(1),
    "in place": in_place,
    "32 bits": lambda m, ids: m.emb(ids.int() + m.starts.int()).flatten(1),
}


@pytest.mark.filterwarnings("ignore:To copy construct")  # Dynamo's own way with new_tensor of a numpy array
@pytest.mark.parametrize("case", MATCHED)
def test_constant_offsets_split_a_table(case: str) -> None:
    graph = before_pass(MATCHED[case])
    expected = graph.outputs()
    assert graph.count(ops.lookup) == 1
    report = graph.advance("split_field_tables")
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    lookups = calls(graph.gm, ops.lookup)
    assert [node.args[4].field_rows for node in lookups] == list(RANGES)
    assert {node.args[0] for node in lookups} == {graph.input("emb.weight")}
    assert all(node.args[2] is None for node in lookups)
    assert torch.equal(graph.outputs(), expected)


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"padding_idx": 0}, {"padding_idx": 9}, {"padding_idx": -1}])
def test_outputs_and_gradients_are_bitwise_those_of_the_one_table(options: dict[str, Any]) -> None:
    batches = [Fields.batch(samples, seed=samples) for samples in (40, 3)]
    assert_compiled_is_eager(Model(MATCHED["buffer"], **options), *batches)


def test_a_row_that_pads_is_read_and_gets_no_gradient() -> None:
    model = Model(MATCHED["buffer"], padding_idx=9)  # id 2 of the second field
    batch = (torch.tensor([[1, 2, 8]]),)
    compiled = assert_compiled_is_eager(model, batch)
    touched = compiled.emb.weight.grad.any(1).nonzero()[:, 0].tolist()
    assert touched == [1, 20]
    assert model.emb.weight[9].any()


class SecondOrder(nn.Module):
    """A factorization machine: first-order weights and second-order vectors over the same fields."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fields = Fields()
        self.linear = nn.Embedding(21, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        index = ids + self.fields.starts
        vectors = self.fields.fields(index)
        products = vectors.sum(dim=1).square() - vectors.square().sum(dim=1)
        return self.linear(index).sum(dim=1) + 0.5 * products.sum(dim=1, keepdim=True) + self.bias


def test_two_tables_are_split_alike() -> None:
    model = SecondOrder()
    graph = capture(model, Fields.batch()).on("1x1")
    assert graph.advance("split_field_tables").matched == 2
    assert graph.count(ops.lookup) == 6
    graph.advance("check_lookups")
    names = [table.name for table in graph.ctx.embedding_graph.tables]
    assert names == [f"{name}[{a}:{b}]" for name in ("fields.fields", "linear") for a, b in RANGES]
    assert_compiled_is_eager(model, Fields.batch(), Fields.batch(5, seed=1))


def test_a_table_that_is_looked_up_twice_is_split_once() -> None:
    def twice(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return m.emb(ids + m.starts).flatten(1) * m.emb(ids.flip(0) + m.starts).flatten(1)

    graph = before_pass(twice)
    expected = graph.outputs()
    assert graph.advance("split_field_tables").matched == 2
    assert graph.count(ops.lookup) == 6
    graph.advance("check_lookups")
    assert len(graph.ctx.embedding_graph.tables) == 3
    assert torch.equal(graph.outputs(), expected)
    assert_compiled_is_eager(Model(twice), Fields.batch(40))


def otherwise(m: Any, ids: torch.Tensor) -> torch.Tensor:
    return m.emb(ids + m.starts).flatten(1) + m.emb(ids + torch.tensor([0, 5, 12])).flatten(1)


def plain_too(m: Any, ids: torch.Tensor) -> torch.Tensor:
    return m.emb(ids).flatten(1) + m.emb(ids + m.starts).flatten(1)


@pytest.mark.parametrize("look_up", [otherwise, plain_too])
def test_a_table_that_is_split_in_two_ways_stays_whole(look_up: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    graph = before_pass(look_up)
    report = graph.advance("split_field_tables")
    name = graph.input("emb.weight").name
    assert report.skipped == ((name, "its lookups do not all split it into the same fields"),)
    assert (report.changed, report.matched, graph.count(ops.lookup)) == (False, 0, 2)
    assert_compiled_is_eager(Model(look_up), Fields.batch())


OTHERS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "no offsets": (lambda m, ids: m.emb(ids).flatten(1), {}),
    "offsets that fall": (lambda m, ids: m.emb(ids + torch.tensor([0, 12, 7])).flatten(1), {}),
    "equal offsets": (lambda m, ids: m.emb(ids + torch.tensor([0, 7, 7])).flatten(1), {}),
    "offsets from 1 on": (lambda m, ids: m.emb(ids + torch.tensor([1, 8, 12])).flatten(1), {}),
    "offsets past the end": (lambda m, ids: m.emb((ids + torch.tensor([0, 7, 21])) % 21).flatten(1), {}),
    "one offset": (lambda m, ids: m.emb(ids + 7).flatten(1), {}),
    "offsets of the batch": (lambda m, ids: m.emb(ids + ids[:1]).flatten(1), {}),
    "a difference": (lambda m, ids: m.emb(ids - torch.tensor([0, -7, -12])).flatten(1), {}),
    "one row of ids": (lambda m, ids: m.emb((ids + m.starts).flatten()).view(-1, 12), {}),
    "bags": (lambda m, ids: nn.functional.embedding_bag(ids + m.starts, m.emb.weight).repeat(1, 3), {}),
    "max_norm": (MATCHED["buffer"], {"max_norm": 1.0}),
    "frequency": (MATCHED["buffer"], {"scale_grad_by_freq": True}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_does_not_split_a_table_into_fields(case: str) -> None:
    look_up, options = OTHERS[case]
    graph = before_pass(look_up, **options)
    expected, lookups = graph.outputs(), graph.count(ops.lookup)
    report = graph.advance("split_field_tables")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert graph.count(ops.lookup) == lookups == 1
    assert torch.equal(graph.outputs(), expected)


@pytest.mark.parametrize("graph", [dlrm, dense])
def test_models_without_fields_stay_as_they_are(graph: Callable[[], Captured]) -> None:
    captured = graph()
    captured.advance("find_tables")
    before = captured.code()
    report = captured.advance("split_field_tables")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert captured.code() == before


def test_a_buffer_that_changes_after_compilation_ends_in_an_error() -> None:
    torch.manual_seed(0)
    model = Fields()
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    batch = (torch.tensor([[6, 0, 0]]),)
    assert torch.equal(compiled(*batch), model(*batch))
    model.starts += 1
    with pytest.raises(BatchError, match=r"expected ids of table fields\[0:7\] in \[0, 7\), found 7 at position 0"):
        compiled(*batch)


def test_an_id_of_another_field_names_its_own() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(Fields(), backend="dmt", options={"dense_compiler": "eager"})
    with pytest.raises(BatchError, match=r"expected ids of table fields\[7:12\] in \[7, 12\), found 12 at position 1"):
        compiled(torch.tensor([[0, 4, 0], [0, 5, 0]]))  # row 12 is a row of the table, but not of this field


@pytest.mark.parametrize("topology", ["1x2", "2x2"])
def test_the_fields_of_one_table_live_on_several_ranks(topology: str) -> None:
    torch.manual_seed(0)
    model = Fields()
    world = SimulatedWorld(topology)
    batches = [Fields.batch(3 + rank, seed=rank) for rank in range(world.topology.world_size)]
    outputs = world.run(model, batches, dense_compiler="eager")
    sum(output.sum() for output in outputs).backward()
    gradient, model.fields.weight.grad = model.fields.weight.grad, None
    expected = [model(*batch) for batch in batches]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))
    (sum(output.sum() for output in expected) / len(batches)).backward()
    assert_reordered(gradient, model.fields.weight.grad, 24, gradient=True)
    graph = fields(topology)
    graph.advance("place_tables")
    assert graph.ctx.plan is not None
    assert len({graph.ctx.plan.owner(table.name) for table in graph.ctx.embedding_graph.tables}) > 1
