"""batch_lookups: the lookups of a rank become one operator."""

from __future__ import annotations

import operator

import torch
from torch import nn

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from tests.passes._harness import Lookups, bags, capture, dense, dlrm


def test_one_rank_has_one_lookup_with_the_same_numbers() -> None:
    graph = dlrm()
    graph.advance("sync_dense_gradients")
    expected = graph.outputs()
    report = graph.advance("batch_lookups")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert (graph.count(ops.lookup), graph.count(ops.batched_lookup), graph.count(ops.split_features)) == (0, 1, 1)
    tables, ids, offsets, pooling, route = graph.node(ops.batched_lookup).args
    assert list(tables) == [graph.input(f"emb.{i}.weight") for i in range(3)]
    assert len(ids) == len(offsets) == 3
    assert pooling == (("sum", False, None),) * 3
    assert route is None
    assert graph.node(ops.split_features).args[1:] == (None, (8, 8, 8))
    assert torch.equal(graph.outputs(), expected)


def test_ranks_read_what_they_own_in_one_lookup() -> None:
    graph = dlrm("2x2")
    graph.advance("sync_dense_gradients")
    assert (graph.count(ops.lookup), graph.count(ex.join_features)) == (3, 1)
    assert graph.advance("batch_lookups").matched == 3
    assert (graph.count(ops.lookup), graph.count(ex.join_features), graph.count(ops.batched_lookup)) == (0, 0, 1)
    assert graph.node(ops.batched_lookup).args[4] is graph.node(ex.route)
    assert list(graph.node(ops.batched_lookup).users) == [graph.node(ex.peer_permute)]
    assert graph.count(ops.split_features) == 1


def test_modes_and_padding_stay_with_their_feature() -> None:
    odd = nn.EmbeddingBag(6, 4, mode="max", padding_idx=2)
    graph = capture(Lookups(lambda m, ids, offsets: m.odd(ids, offsets), odd), bags()).on("1x1")
    graph.advance("sync_dense_gradients")
    expected = graph.outputs()
    graph.advance("batch_lookups")
    assert graph.node(ops.batched_lookup).args[3] == (("sum", False, None), ("max", False, 2))
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
