"""batch_lookups: the lookups of a rank become one operator."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import id_ops, ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.kernels.batched_lookup.reference import Pooling
from tests.passes._harness import Lookups, assert_compiled_is_eager, bags, capture, dense, dlrm


def test_one_rank_has_one_lookup_with_the_same_numbers() -> None:
    graph = dlrm()
    graph.advance("sync_dense_gradients")
    expected = graph.outputs()
    report = graph.advance("batch_lookups")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert (graph.count(ops.lookup), graph.count(ops.batched_lookup), graph.count(ops.split_features)) == (0, 1, 1)
    tables, ids, offsets, weights, pooling, route = graph.node(ops.batched_lookup).args
    assert list(tables) == [graph.input(f"emb.{i}.weight") for i in range(3)]
    assert len(ids) == len(offsets) == 3
    assert weights == [None] * 3
    assert pooling == (Pooling("sum", False),) * 3
    assert route is None
    assert graph.node(ops.split_features).args[1:] == (None, (8, 8, 8))
    assert torch.equal(graph.outputs(), expected)


def test_ranks_read_what_they_own_in_one_lookup() -> None:
    graph = dlrm("2x2")
    graph.advance("sync_dense_gradients")
    assert (graph.count(ops.lookup), graph.count(ex.join_features)) == (3, 1)
    assert graph.advance("batch_lookups").matched == 3
    assert (graph.count(ops.lookup), graph.count(ex.join_features), graph.count(ops.batched_lookup)) == (0, 0, 1)
    assert graph.node(ops.batched_lookup).args[5] is graph.node(id_ops.route)
    assert list(graph.node(ops.batched_lookup).users) == [graph.node(ex.peer_permute)]
    assert graph.count(ops.split_features) == 1


def test_modes_and_padding_stay_with_their_feature() -> None:
    odd = nn.EmbeddingBag(6, 4, mode="max", padding_idx=2)
    graph = capture(Lookups(lambda m, ids, offsets: m.odd(ids, offsets), odd), bags()).on("1x1")
    graph.advance("sync_dense_gradients")
    expected = graph.outputs()
    graph.advance("batch_lookups")
    assert graph.node(ops.batched_lookup).args[4] == (Pooling("sum", False), Pooling("max", False, 2))
    assert torch.equal(graph.outputs(), expected)


def test_element_types_are_not_mixed() -> None:
    torch.manual_seed(0)
    odd = nn.EmbeddingBag(6, 4, mode="sum").double()
    graph = capture(Lookups(lambda m, ids, offsets: m.odd(ids, offsets).float(), odd), bags()).on("1x1")
    graph.advance("sync_dense_gradients")
    expected = graph.outputs()
    assert graph.advance("batch_lookups").matched == 2
    assert [graph.node(ops.batched_lookup, i).meta["val"].dtype for i in range(2)] == [torch.float32, torch.float64]
    assert torch.equal(graph.outputs(), expected)


def in_place(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    out = m.odd(ids, offsets)
    out.view(-1, 2).clamp_(max=0.5)
    return out


def in_a_product(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return m.odd(ids, offsets) @ m.plain.weight.new_ones(4, 4)


def in_a_join(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.stack([m.odd(ids, offsets).view(-1, 4)], dim=1)[:, 0]


@pytest.mark.parametrize(("look_up", "copies"), [(in_place, 1), (in_a_product, 1), (in_a_join, 0)])
@pytest.mark.parametrize("topology", ["1x1", "2x2"])
def test_a_feature_that_is_not_only_joined_has_memory_of_its_own(look_up: Any, copies: int, topology: str) -> None:
    torch.manual_seed(0)
    model = Lookups(look_up, nn.EmbeddingBag(6, 4, mode="sum"))
    graph = capture(model, bags()).on(topology)
    graph.advance("batch_lookups")
    clones = [node for node in calls(graph.gm, torch.clone) if node.args[0].target is operator.getitem]  # type: ignore[union-attr]
    assert len(clones) == copies
    if topology == "1x1":
        assert_compiled_is_eager(model, bags())


class Sequences(nn.Module):
    """A table of samples, two of sequences that stay unpooled, and one table of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(6, 4, mode="sum")
        self.item = nn.Embedding(7, 4)
        self.shop = nn.Embedding(5, 4).bfloat16()
        self.top = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(self.item(items) + self.shop(items).float())
        return self.top(torch.tanh(self.user(ids, offsets)).unsqueeze(1) + rows).sum(1)


@pytest.mark.parametrize(("topology", "fused"), [("1x1", [1, 1, 1]), ("2x2", [1, 2])])
def test_groups_are_fused_apart(topology: str, fused: list[int]) -> None:
    """One rank looks up each group and element type on its own, several ranks each group."""
    torch.manual_seed(0)
    items = torch.randint(0, 5, (3, 2))
    graph = capture(Sequences(), (*bags(), items)).on(topology)
    graph.advance("sync_dense_gradients")
    expected = graph.outputs() if topology == "1x1" else None
    assert graph.advance("batch_lookups").matched == 3
    lookups = [graph.node(ops.batched_lookup, i) for i in range(graph.count(ops.batched_lookup))]
    assert sorted(len(node.args[0]) for node in lookups) == fused
    if expected is None:
        assert {node.args[5] for node in lookups} == {graph.node(id_ops.route, i) for i in range(2)}
    else:
        assert torch.equal(graph.outputs(), expected)


def test_a_feature_keeps_its_users_line() -> None:
    graph = dlrm()
    graph.advance("batch_lookups")
    split = graph.node(ops.split_features)
    columns = [node for node in split.users if node.target is operator.getitem]
    assert len(columns) == 3
    assert all("looked_up = [table(i, o)" in node.meta["stack_trace"] for node in columns)


def test_without_lookups_nothing_changes() -> None:
    graph = dense()
    graph.advance("sync_dense_gradients")
    before = graph.code()
    report = graph.advance("batch_lookups")
    assert (report.changed, report.matched) == (False, 0)
    assert graph.code() == before
