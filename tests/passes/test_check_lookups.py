"""check_lookups: groups of lookups, a check before each, and the names of tables and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.errors import BatchError
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import EmbeddingGraph, Feature
from dmt_compile.ir.pass_base import calls
from dmt_compile.table_names import parameter_of
from tests.passes._harness import Captured, Lookups, assert_compiled_is_eager, bags, capture, dense, dlrm, fields


def advanced(model: nn.Module, *batch: torch.Tensor) -> Captured:
    graph = capture(model, batch).on("1x1")
    graph.advance("pool_sequences")
    return graph


def test_tables_and_features_are_named() -> None:
    graph = dlrm()
    graph.advance("pool_sequences")
    expected = graph.outputs()
    report = graph.advance("check_lookups")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    found = graph.ctx.embedding_graph
    assert [
        (t.name, t.parameter_name, parameter_of(t.name).first_row, t.rows, t.dim, t.dtype) for t in found.tables
    ] == [
        ("emb.0", "emb.0", 0, 6, 8, torch.float32),
        ("emb.1", "emb.1", 0, 5, 8, torch.float32),
        ("emb.2", "emb.2", 0, 4, 8, torch.float32),
    ]
    assert [(f.name, f.table, f.mode, f.sparse) for f in found.features] == [
        (f"emb.{i}", f"emb.{i}", "sum", False) for i in range(3)
    ]
    ids, offsets = (graph.ctx.inputs[name] for name in ("l_ids_1_", "l_offsets_1_"))
    feature = found.features[1]
    assert feature.pooling == len(ids) / len(offsets)
    assert (feature.bags, feature.jagged, feature.weighted, feature.group) == (1.0, True, False, 0)
    assert found.batch_size == 3
    assert torch.equal(graph.outputs(), expected)


def test_the_check_covers_all_inputs_of_the_batch() -> None:
    graph = dlrm(check_ids=False)
    graph.advance("check_lookups")
    ids, offsets, how, weights, others, rows, labels, check_ids = graph.node(ops.check_batch).args
    assert [n.name for n in ids] == ["l_ids_0_", "l_ids_1_", "l_ids_2_"]
    assert [n.name for n in offsets] == ["l_offsets_0_", "l_offsets_1_", "l_offsets_2_"]
    assert [pooling.mode for pooling in how] == ["sum"] * 3
    assert weights == [None] * 3
    assert [n.name for n in others] == ["l_dense_"]
    assert rows == ((0, 6), (0, 5), (0, 4))
    assert (labels, check_ids) == (("emb.0", "emb.1", "emb.2", "dense"), False)
    assert graph.ctx.embedding_graph.checked_inputs == [["l_dense_", "l_offsets_0_", "l_offsets_1_", "l_offsets_2_"]]


def test_lookups_read_what_was_checked() -> None:
    graph = dlrm()
    graph.advance("check_lookups")
    check = graph.node(ops.check_batch)
    for index, lookup in enumerate(calls(graph.gm, ops.lookup)):
        assert [source.args for source in lookup.args[1:3]] == [(check, index), (check, 3 + index)]  # type: ignore[union-attr]


def test_fields_are_named_by_their_rows() -> None:
    graph = fields()
    graph.advance("check_lookups")
    found = graph.ctx.embedding_graph
    assert [(t.name, t.parameter_name, parameter_of(t.name).first_row, t.rows) for t in found.tables] == [
        ("fields[0:7]", "fields", 0, 7),
        ("fields[7:12]", "fields", 7, 5),
        ("fields[12:21]", "fields", 12, 9),
    ]
    assert len({t.placeholder for t in found.tables}) == 1
    assert graph.node(ops.check_batch).args[5] == ((0, 7), (7, 12), (12, 21))
    assert all((f.pooling, f.bags, f.jagged) == (1.0, 1.0, False) for f in found.features)


def test_two_features_may_share_a_table() -> None:
    graph = advanced(Lookups(lambda m, ids, offsets: m.plain(ids, offsets)), *bags())
    assert graph.advance("check_lookups").matched == 2
    found = graph.ctx.embedding_graph
    assert [table.name for table in found.tables] == ["plain"]
    assert [feature.name for feature in found.features] == ["plain", "plain#2"]
    assert found.table_specs()[0].features == 2


class Sequences(nn.Module):
    """Two sequences of one length and one of another, none of them pooled, beside a pooled one and a weighted bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="sum")
        self.item = nn.Embedding(7, 4)
        self.shop = nn.Embedding(5, 4)
        self.other = nn.Embedding(9, 4)
        self.pooled = nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, *sequences: torch.Tensor) -> torch.Tensor:
        items, shops, others, pooled = sequences
        both = torch.tanh(self.item(items) + self.shop(shops)).sum(1)
        bags = self.bag(ids, offsets, per_sample_weights=ids.float())
        return bags + both + torch.tanh(self.other(others)).sum(1) + self.pooled(pooled).sum(1)


def sequences() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (*bags(), *(torch.randint(0, 5, (3, length), generator=generator) for length in (2, 2, 5, 4)))


def test_lookups_with_as_many_bags_are_one_group() -> None:
    torch.manual_seed(0)
    graph = advanced(Sequences(), *sequences())
    expected = graph.outputs()
    assert graph.advance("check_lookups").matched == 5
    assert graph.count(ops.check_batch) == 3
    found = graph.ctx.embedding_graph
    assert found.batch_size == 3
    seen = {f.name: (f.group, f.bags, f.pooling, f.jagged, f.weighted) for f in found.features}
    assert seen == {
        "bag": (seen["pooled"][0], 1.0, 4 / 3, True, True),
        "pooled": (seen["pooled"][0], 1.0, 4.0, False, False),
        "item": (seen["item"][0], 2.0, 1.0, False, False),
        "shop": (seen["item"][0], 2.0, 1.0, False, False),
        "other": (seen["other"][0], 5.0, 1.0, False, False),
    }
    assert len({group for group, *_ in seen.values()}) == 3
    specs = {spec.name: (spec.bags, spec.pooling, spec.jagged, spec.weighted) for spec in found.table_specs()}
    assert specs["bag"] == (1.0, 1.333, 1.0, 1.0)
    assert specs["other"] == (5.0, 1.0, 0.0, 0.0)
    assert specs["pooled"] == (1.0, 4.0, 0.0, 0.0)
    assert torch.equal(graph.outputs(), expected)
    assert_compiled_is_eager(Sequences(), sequences(), longest_sum=5)


def test_one_check_names_the_inputs_of_its_own_group() -> None:
    graph = advanced(Sequences(), *sequences())
    graph.advance("check_lookups")
    labels = [node.args[6] for node in calls(graph.gm, ops.check_batch)]
    inputs = tuple(f"sequences[{i}]" for i in range(4))
    assert sorted(labels) == sorted([("item", "shop"), ("other",), ("bag", "pooled", *inputs)])


def test_the_mean_over_a_table_s_features_counts_bags() -> None:
    graph = EmbeddingGraph()
    base = advanced(Lookups(lambda m, ids, offsets: m.plain(ids, offsets)), *bags())
    base.advance("check_lookups")
    graph.add_table(base.ctx.embedding_graph.tables[0])
    graph.add_feature(Feature("plain", "plain", "a", "sum", False, pooling=4.0))
    graph.add_feature(Feature("plain#2", "plain", "b", "none", False, pooling=1.0, bags=7.0, jagged=False))
    [spec] = graph.table_specs()
    assert (spec.features, spec.bags, spec.pooling, spec.jagged) == (2, 4.0, 11 / 8, 0.125)
    assert spec.output_bytes_per_sample == (1 + 7) * 4 * 4
    assert spec.id_bytes_per_sample == 4 * (4 + 1) + 4 * 7


def with_an_end(end: int) -> Lookups:
    """Return a model whose last bag ends at id ``end`` of 4."""

    def look_up(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return m.odd(ids, torch.cat([offsets, offsets.new_full((1,), end)]))

    torch.manual_seed(0)
    return Lookups(look_up, nn.EmbeddingBag(6, 4, mode="sum", include_last_offset=True))


def test_ids_behind_the_last_offset_are_not_read() -> None:
    model = with_an_end(3)
    graph = advanced(model, *bags())
    expected = graph.outputs()
    graph.advance("check_lookups")
    assert [node.args[4].last_offset for node in calls(graph.gm, ops.lookup)] == [False, False]
    assert torch.equal(graph.outputs(), expected)
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    ids, offsets = bags()
    compiled(ids, offsets).sum().backward()  # eager reads beyond the gradient here
    shorter, model.odd.weight.grad = model.odd.weight.grad, None
    bag = nn.functional.embedding_bag(ids[:3], model.odd.weight, offsets, mode="sum")
    bag.backward(model.top.weight[:, 4:].expand(3, -1))
    assert torch.equal(shorter, model.odd.weight.grad)


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (5, r"expected offsets of table odd that .* at most the number of ids, found a bag of 3 ids at position 2"),
        (1, r"expected offsets of table odd that .*, found a bag of -1 ids at position 2"),
    ],
)
def test_an_end_that_is_none(end: int, text: str) -> None:
    compiled = torch.compile(with_an_end(end), backend="dmt", options={"dense_compiler": "eager"})
    with pytest.raises(BatchError, match=text):
        compiled(*bags())


def test_a_mask_of_another_batch_is_named() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(6, 4)
            self.user = nn.Embedding(6, 4)

        def forward(self, ids: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
            return self.emb(ids).sum(1) * self.user(user)

    compiled = torch.compile(Masked(), backend="dmt", options={"dense_compiler": "eager"})
    compiled(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(BatchError, match=r"check_batch: expected 4 samples in every input, found 3 in user"):
        compiled(torch.zeros(4, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def test_without_lookups_there_is_nothing_to_check() -> None:
    graph = dense()
    graph.advance("pool_sequences")
    before = graph.code()
    report = graph.advance("check_lookups")
    assert (report.changed, report.matched) == (False, 0)
    assert graph.code() == before
    assert graph.ctx.embedding_graph.tables == []
