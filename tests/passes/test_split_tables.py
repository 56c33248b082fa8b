"""split_tables: a lookup of a split table becomes one of each piece, and computes the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld, plan
from dmt_compile.config import Options
from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Effect
from tests._tolerances import assert_reordered
from tests.models import DLRM, Mixture, make_batch
from tests.passes._harness import capture, dlrm

# Pieces of every table that has several columns, on other ranks than their neighbours.
PIECES = [
    ["bag[:, 0:1]", "item[:, 2:4]", "fields[0:7, 0:2]", "fields[7:12, 0:2]", "frozen[:, 1:2]"],
    ["bag[:, 1:3]", "item[:, 0:1]", "pooled[:, 0:2]", "first_order[0:7]", "first_order[7:12]"],
    [
        "item[:, 1:2]",
        "fields[0:7, 2:4]",
        "fields[7:12, 2:4]",
        "fields[12:21, 2:4]",
        "frozen[:, 0:1]",
        "first_order[12:21]",
    ],
    ["bag[:, 3:4]", "pooled[:, 2:3]", "fields[12:21, 0:2]"],
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def mixture(samples: tuple[int, ...]) -> tuple[Mixture, list[Any]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Mixture()
    return model, [model.batch(size, generator) for size in samples]


def dense_gradients(outputs: list[torch.Tensor], model: nn.Module, ranks: int = 1) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = sum(output.square().sum() for output in outputs) / ranks
    return [g.to_dense() if g.is_sparse else g for g in torch.autograd.grad(loss, trained)]


def test_a_lookup_becomes_one_of_each_piece_and_their_cat() -> None:
    graph = dlrm("2x1", partition=[["emb.0[:, 0:3]", "emb.1"], ["emb.0[:, 3:8]", "emb.2"]])
    graph.advance("partition_towers")
    before = graph.outputs()
    report = graph.advance("split_tables")
    assert (report.changed, report.matched, report.effect) == (True, 1, None)
    lookups = calls(graph.gm, ops.lookup)
    assert [lookup.args[4].columns for lookup in lookups[:3]] == [(0, 3), (3, 8), None]
    assert [tuple(lookup.meta["val"].shape[1:]) for lookup in lookups[:3]] == [(3,), (5,), (8,)]
    found = graph.ctx.embedding_graph
    names = ["emb.0[:, 0:3]", "emb.0[:, 3:8]", "emb.1", "emb.2"]
    assert [table.name for table in found.tables] == [feature.name for feature in found.features] == names
    assert found.interaction is not None
    assert list(found.interaction.features) == names
    assert [found.tables[k].parameter_name for k in range(2)] == ["emb.0", "emb.0"]
    assert torch.equal(graph.outputs(), before)


def test_whole_tables_are_left_alone() -> None:
    graph = dlrm("2x2")
    graph.advance("partition_towers")
    before = graph.code()
    assert not graph.advance("split_tables").changed
    assert graph.code() == before


@pytest.mark.parametrize("topology", ["4x1", "2x2", "1x1"])
def test_lookups_of_every_kind_compute_the_same_in_pieces(topology: str) -> None:
    world = SimulatedWorld(topology)
    ranks = world.topology.world_size
    model, batches = mixture((3, 5, 2, 4)[:ranks])
    partition = {"4x1": PIECES, "2x2": [PIECES[0] + PIECES[1], PIECES[2] + PIECES[3]], "1x1": PIECES}[topology]
    outputs = world.run(model, batches, partition=partition, dense_compiler="eager")
    expected = [model(*batch) for batch in batches]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_reordered(output, wanted, 13)
    gradients = dense_gradients(outputs, model)  # the program divides them by the number of ranks
    for gradient, wanted in zip(gradients, dense_gradients(expected, model, ranks), strict=True):
        assert_reordered(gradient, wanted, 64, gradient=True)


@pytest.mark.parametrize(("mode", "sparse"), [("sum", False), ("mean", True), ("max", False)])
def test_pieces_that_the_planner_chooses_are_bitwise_the_flat_lookup(mode: str, sparse: bool) -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(50, 20, 7), modes=mode, sparse=sparse)
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(model, size, generator) for size in (4, 1, 2, 6)]
    options = {"split_columns": True, "dense_compiler": "eager"}
    made = plan(model, batches[0], "4x1", **options)
    assert all(tower.tables for tower in made.towers)
    outputs = SimulatedWorld("4x1").run(model, batches, **options)
    assert all(torch.equal(output, model(*batch)) for output, batch in zip(outputs, batches, strict=True))


def test_weights_of_ids_get_their_gradient_from_all_pieces() -> None:
    model, batches = mixture((4,))
    graph = capture(model, batches[0]).on("1x1", partition=PIECES)
    assert graph.advance("split_tables").effect is Effect.REORDERED


def test_a_table_that_is_renormalised_stays_whole() -> None:
    class Renormalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.EmbeddingBag(9, 8, max_norm=1.0)

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return self.emb(ids, offsets).sum(1)

    graph = capture(Renormalised(), (torch.tensor([1, 2, 3]), torch.tensor([0, 1]))).on("2x1", split_columns=True)
    with pytest.raises(UnsupportedGraphError, match=r"expected a table without max_norm for .*, found one, whose norm"):
        graph.advance("split_tables")


def test_tower_modules_need_whole_tables() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("expected whole tables under 'tower_module', found 'split_columns'")
    ):
        Options(split_columns=True, tower_module="dlrm")
    lists = [["emb.0[:, 0:4]", "emb.1", "emb.2"], ["emb.0[:, 4:8]"]]
    graph = dlrm("2x2", partition=lists, tower_module="dlrm")
    with pytest.raises(UnsupportedGraphError, match=r"whole tables under Tower Modules, found emb\.0 split by columns"):
        graph.advance("split_tables")
