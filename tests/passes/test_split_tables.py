"""split_tables: a lookup of a split table becomes one of each piece, and computes the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld, certify, plan
from dmt_compile.errors import BatchError, UnsupportedGraphError
from dmt_compile.ir import id_ops, ops, piece_ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Effect
from dmt_compile.plan import TowerPlan
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

# Pieces that one tower must hold together: of rows, of rows of some columns, of rows of a field.
TOGETHER = [
    ["bag[0:4]", "bag[4:11]"],
    ["item[0:6, 0:2]", "item[6:13, 0:2]"],
    ["item[:, 2:4]"],
    ["pooled[0:1]", "pooled[1:8]"],
    ["fields[0:3]", "fields[3:7]"],
    ["fields[7:12]"],
    ["fields[12:15, 0:1]", "fields[15:20, 0:1]", "fields[20:21, 0:1]", "fields[12:21, 1:4]"],
    ["frozen[0:5]", "frozen[5:6]"],
    ["first_order[0:7]", "first_order[7:10]", "first_order[10:12]", "first_order[12:21]"],
]


def in_rows(towers: int) -> list[list[str]]:
    """Return a partition into towers of every kind of piece."""
    return [[name for unit in TOGETHER[k::towers] for name in unit] for k in range(towers)]


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


@pytest.mark.parametrize(
    ("topology", "towers"),
    [("1x1", 1), ("1x4", 1), ("2x2", 2), ("2x2", 1), ("2x2", 4), ("4x1", 4), ("3x2", 3), ("2x4", 2), ("8x1", 8)],
)
def test_lookups_of_every_kind_compute_the_same_in_pieces_of_rows(topology: str, towers: int) -> None:
    world = SimulatedWorld(topology)
    ranks = world.topology.world_size
    model, batches = mixture((3, 5, 2, 4, 2, 2, 3, 6)[:ranks])
    outputs = world.run(model, batches, partition=in_rows(towers), dense_compiler="eager")
    expected = [model(*batch) for batch in batches]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_reordered(output, wanted, 13)
    gradients = dense_gradients(outputs, model)
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


class OneBag(nn.Module):
    """One table, read with ids and offsets."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(9, 8, **how)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.emb(ids, offsets).sum(1)


HALVES = [["emb[0:4]", "emb[4:9]"]]


def test_a_lookup_in_rows_reads_what_each_piece_holds() -> None:
    model = OneBag(mode="mean", padding_idx=2)
    graph = capture(model, (torch.tensor([1, 8, 2, 3]), torch.tensor([0, 3]))).on("1x2", partition=HALVES)
    graph.advance("partition_towers")
    before = graph.outputs()
    assert graph.advance("split_tables").effect is Effect.REORDERED
    lookups = calls(graph.gm, ops.lookup)
    assert [lookup.args[4].field_rows for lookup in lookups] == [(0, 4), (4, 9)]
    assert {lookup.args[4].mode for lookup in lookups} == {"sum"}
    assert [graph.count(target) for target in (piece_ops.add_pieces, piece_ops.divide_by_lengths)] == [1, 1]
    assert [table.rows for table in graph.ctx.embedding_graph.tables] == [4, 5]
    assert torch.allclose(graph.outputs(), before)
    graph.advance("lower_to_sptt")
    assert graph.node(id_ops.layout).args[8] == ((0, 1),)
    assert graph.count(piece_ops.add_pieces) == 0
    assert graph.count(piece_ops.add_blocks) == 1


@pytest.mark.parametrize("last_offset", [False, True])
@pytest.mark.parametrize("topology", ["1x2", "2x1"])
def test_means_without_padding_rows_are_those_of_whole_bags(topology: str, last_offset: bool) -> None:
    torch.manual_seed(0)
    model = OneBag(mode="mean", padding_idx=2, include_last_offset=last_offset)
    end = [4] if last_offset else []
    batches = [
        (torch.tensor([1, 8, 2, 3, 4][: 4 if last_offset else 5]), torch.tensor([0, 3, 3, *end])),
        (torch.tensor([2, 2, 5, 0]), torch.tensor([0, 2, 2, *end])),
    ]
    partition = HALVES if topology == "1x2" else [*HALVES, []]
    outputs = SimulatedWorld(topology).run(model, batches, partition=partition, dense_compiler="eager")
    expected = [model(*batch) for batch in batches]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_reordered(output, wanted, 8)
    for gradient, wanted in zip(dense_gradients(outputs, model), dense_gradients(expected, model, 2), strict=True):
        assert_reordered(gradient, wanted, 64, gradient=True)


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([1, 8, 9, 0], [0, 3], "ids of table emb in [0, 9), found 9 at position 2 of rank 1's batch"),
        ([1, -1], [0, 2], "ids of table emb in [0, 9), found -1 at position 1 of rank 1's batch"),
        ([1, 8], [0, 3], "offsets of table emb that start at 0 and grow to at most the number of ids, found a bag"),
    ],
)
def test_a_faulty_batch_is_named_as_for_a_whole_table(ids: list[int], offsets: list[int], message: str) -> None:
    batches = [(torch.tensor(i), torch.tensor(o)) for i, o in (([0, 5], [0, 1]), (ids, offsets))]
    with pytest.raises(BatchError, match=re.escape(message)):
        SimulatedWorld("1x2").run(OneBag(mode="sum"), batches, partition=HALVES, dense_compiler="eager")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"max_norm": 1.0}, r"a lookup without max_norm for .*, found one, whose norm is that of whole rows"),
        ({"mode": "max"}, r"sums or means where pieces have rows of their own for .*, found a maximum .*by columns"),
    ],
)
def test_a_lookup_that_pieces_of_rows_cannot_give_is_refused(how: dict[str, Any], expected: str) -> None:
    graph = capture(OneBag(**how), (torch.tensor([1, 2, 3]), torch.tensor([0, 1]))).on("1x2", partition=HALVES)
    with pytest.raises(UnsupportedGraphError, match=expected):
        graph.advance("split_tables")
    planned = capture(OneBag(**how), (torch.tensor([1, 2, 3]), torch.tensor([0, 1]))).on("1x2", split_rows=True)
    assert not planned.advance("split_tables").changed


def test_ids_that_are_counted_stay_together() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 8, scale_grad_by_freq=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.emb(ids).sum(1)

    graph = capture(Counted(), (torch.tensor([1, 2, 3]),)).on("1x2", partition=HALVES)
    with pytest.raises(UnsupportedGraphError, match=r"without scale_grad_by_freq where pieces .*, found one, which"):
        graph.advance("split_tables")


def test_columns_of_renormalised_rows_stay_together() -> None:
    columns = [["emb[:, 0:4]"], ["emb[:, 4:8]"]]
    batch = (torch.tensor([1, 2, 3]), torch.tensor([0, 1]))
    graph = capture(OneBag(max_norm=1.0), batch).on("2x1", partition=columns)
    with pytest.raises(UnsupportedGraphError, match="expected a lookup without max_norm"):
        graph.advance("split_tables")
    assert not capture(OneBag(max_norm=1.0), batch).on("2x1", split_columns=True).advance("split_tables").changed


TOWERS_OF_PIECES = [
    ["emb.0[0:20]", "emb.0[20:50]", "emb.1[:, 0:4]", "emb.1[:, 4:8]"],
    ["emb.2", "emb.3[0:9, 0:4]", "emb.3[9:33, 0:4]", "emb.3[:, 4:8]", "emb.4"],
]


@pytest.mark.parametrize(
    "options",
    [
        {"partition": TOWERS_OF_PIECES, "tower_module": "dlrm", "tower_module_options": {"dim": 4}},
        pytest.param({"partition": TOWERS_OF_PIECES, "tower_module": "dcn"}, marks=pytest.mark.slow),
        {"split_rows": True, "split_columns": True, "tower_module": "dlrm"},
    ],
)
def test_tower_modules_see_a_split_feature_once_and_whole(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DLRM()
    batch = make_batch(model, 4, torch.Generator().manual_seed(0))
    made = plan(model, batch, "2x2", **options)
    assert any(table.whole for table in made.tables)
    assert TowerPlan.from_json(made.to_json()) == made
    certificate = certify(model, batch, "2x2", dense_compiler="eager", **options)
    assert certificate.holds, str(certificate)


def test_tower_modules_need_the_pieces_of_a_table_together() -> None:
    lists = [["emb.0[:, 0:4]", "emb.1", "emb.2"], ["emb.0[:, 4:8]"]]
    graph = dlrm("2x2", partition=lists, tower_module="dlrm")
    with pytest.raises(UnsupportedGraphError, match=r"expected the pieces of emb\.0 in one tower under Tower Modules"):
        graph.advance("insert_tower_modules")


def test_a_tower_module_does_not_know_the_lengths_of_bags_in_rows() -> None:
    torch.manual_seed(0)
    model = DLRM(modes="mean")
    batch = make_batch(model, 4, torch.Generator().manual_seed(0))
    with pytest.raises(
        UnsupportedGraphError, match=r"expected a lookup of sums under a Tower Module for .*, found a mean"
    ):
        plan(model, batch, "2x2", partition=TOWERS_OF_PIECES, tower_module="dlrm")
    made = plan(model, batch, "1x4", split_rows=True, tower_module="dlrm")
    assert not any(table.whole for table in made.tables)
    assert any(table.whole for table in plan(model, batch, "1x4", split_rows=True).tables)
