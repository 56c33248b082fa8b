"""find_tables: which lookups become canonical, and the reason for each that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from tests.passes._harness import Captured, Lookups, bags, capture, dense, dlrm


def bag(**options: Any) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(6, 4, **{"mode": "sum", **options})


def captured(look_up: Callable[..., torch.Tensor], odd: nn.Module | None = None) -> Captured:
    torch.manual_seed(0)
    return capture(Lookups(look_up, odd), bags())


def test_every_lookup_becomes_canonical_behind_one_check() -> None:
    graph = dlrm()
    graph.advance("normalize_graph")
    expected = graph.outputs()
    assert graph.count(F.embedding_bag) == 3
    report = graph.advance("find_tables")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert (graph.count(F.embedding_bag), graph.count(ops.lookup), graph.count(ops.check_batch)) == (0, 3, 1)
    found = graph.ctx.embedding_graph
    assert [(t.name, t.rows, t.dim, t.dtype) for t in found.tables] == [
        ("emb.0", 6, 8, torch.float32),
        ("emb.1", 5, 8, torch.float32),
        ("emb.2", 4, 8, torch.float32),
    ]
    assert [(f.name, f.table, f.mode, f.sparse) for f in found.features] == [
        (f"emb.{i}", f"emb.{i}", "sum", False) for i in range(3)
    ]
    ids, offsets = (graph.ctx.inputs[name] for name in ("l_ids_1_", "l_offsets_1_"))
    assert found.features[1].pooling == len(ids) / len(offsets)
    assert found.batch_size == 3
    assert torch.equal(graph.outputs(), expected)


def test_the_check_covers_all_inputs_of_the_batch() -> None:
    graph = dlrm(check_ids=False)
    graph.advance("find_tables")
    ids, offsets, others, rows, labels, check_ids = graph.node(ops.check_batch).args
    assert [n.name for n in ids] == ["l_ids_0_", "l_ids_1_", "l_ids_2_"]
    assert [n.name for n in offsets] == ["l_offsets_0_", "l_offsets_1_", "l_offsets_2_"]
    assert [n.name for n in others] == ["l_dense_"]
    assert (rows, labels, check_ids) == ((6, 5, 4), ("emb.0", "emb.1", "emb.2", "dense"), False)


def test_a_model_without_tables_stays_as_it_is() -> None:
    graph = dense()
    graph.advance("normalize_graph")
    before = graph.code()
    report = graph.advance("find_tables")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert graph.code() == before


class TooFew(Lookups):
    """A lookup of two bags beside one of three."""

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.plain(ids, offsets).sum(0) + self.odd(ids, offsets.view(3, 1)[:2, 0]).sum(0)


REASONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], nn.Module | None], str]] = {
    "embedding": (
        lambda m, ids, offsets: m.odd(offsets),
        lambda: nn.Embedding(6, 4),
        "it is an nn.Embedding, not an nn.EmbeddingBag",
    ),
    "2-D ids": (lambda m, ids, offsets: m.odd(offsets.unsqueeze(1)), bag, "its ids are not 1-D with offsets"),
    "max_norm": (lambda m, ids, offsets: m.odd(ids, offsets), lambda: bag(max_norm=1.0), "it uses max_norm"),
    "weights": (
        lambda m, ids, offsets: m.odd(ids, offsets, per_sample_weights=ids.float()),
        bag,
        "it uses per_sample_weights",
    ),
    "frequency": (
        lambda m, ids, offsets: m.odd(ids, offsets),
        lambda: bag(scale_grad_by_freq=True),
        "it uses scale_grad_by_freq",
    ),
    "last offset": (
        lambda m, ids, offsets: m.odd(ids, torch.cat([offsets, offsets.new_full((1,), 4)])),
        lambda: bag(include_last_offset=True),
        "it uses include_last_offset",
    ),
    "used elsewhere": (
        lambda m, ids, offsets: m.odd(ids, offsets) + m.odd.weight.sum(),
        bag,
        "its table is used outside lookups too",
    ),
    "computed table": (
        lambda m, ids, offsets: F.embedding_bag(ids, m.odd.weight * 2, offsets, mode="sum"),
        bag,
        "its table is not a parameter of the model",
    ),
    "ids from a lookup": (
        lambda m, ids, offsets: m.odd(m.plain(ids, offsets)[:, 0].long().clamp(0, 5), torch.arange(len(offsets))),
        bag,
        "its ids depend on another lookup",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_lookup_that_stays_is_reported_with_its_reason_and_line(case: str) -> None:
    look_up, make_odd, reason = REASONS[case]
    graph = captured(look_up, make_odd()).on("1x1")
    graph.advance("normalize_graph")
    expected = graph.outputs()
    report = graph.advance("find_tables")
    assert [why for _, why in report.skipped] == [reason]
    assert [table.name for table in graph.ctx.embedding_graph.tables] == ["plain"]
    assert graph.count(F.embedding_bag, F.embedding) == 1
    assert torch.equal(graph.outputs(), expected)
    left = graph.ctx.embedding_graph.unmatched[0]
    assert (left.node, left.reason) == report.skipped[0]
    assert "test_find_tables.py:" in left.source_line
    assert "m.odd" in left.source_line


def test_a_lookup_of_another_number_of_bags_stays() -> None:
    graph = capture(TooFew(lambda: None, bag()), bags()).on("1x1")
    report = graph.advance("find_tables")
    assert [why for _, why in report.skipped] == ["its number of bags is not that of the first lookup"]
    assert graph.ctx.embedding_graph.unmatched[0].source_line.endswith(
        "self.odd(ids, offsets.view(3, 1)[:2, 0]).sum(0)"
    )


def test_a_table_that_a_remaining_lookup_shares_stays_too() -> None:
    model = TooFew(lambda: None, bag())
    model.odd = model.plain
    report = capture(model, bags()).on("1x1").advance("find_tables")
    assert report.matched == 0
    assert sorted(why for _, why in report.skipped) == [
        "its number of bags is not that of the first lookup",
        "its table is used outside lookups too",
    ]


def test_padding_is_kept() -> None:
    graph = captured(lambda m, ids, offsets: m.odd(ids, offsets), bag(padding_idx=3)).on("1x1")
    graph.advance("normalize_graph")
    expected = graph.outputs()
    assert graph.advance("find_tables").matched == 2
    assert [node.args[6] for node in (graph.node(ops.lookup), graph.node(ops.lookup, 1))] == [None, 3]
    assert torch.equal(graph.outputs(), expected)


def test_two_features_may_share_a_table() -> None:
    graph = captured(lambda m, ids, offsets: m.plain(ids, offsets)).on("1x1")
    assert graph.advance("find_tables").matched == 2
    found = graph.ctx.embedding_graph
    assert [table.name for table in found.tables] == ["plain"]
    assert [feature.name for feature in found.features] == ["plain", "plain#2"]
    assert found.table_specs()[0].features == 2


def test_strict_makes_a_remaining_lookup_an_error() -> None:
    look_up, make_odd, _ = REASONS["embedding"]
    graph = captured(look_up, make_odd()).on("1x1", strict=True)
    text = (
        r"find_tables: expected a region that can be rewritten for embedding, found that it is an nn.Embedding, not an "
        r"nn.EmbeddingBag \(.*test_find_tables.py:\d+: .*m.odd\(offsets\).*\); change the line or drop strict=True"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        graph.advance("find_tables")


def test_a_sparse_lookup_cannot_stay_where_ranks_train_together() -> None:
    pristine = captured(lambda m, ids, offsets: m.odd(offsets), nn.Embedding(6, 4, sparse=True))
    assert pristine.on("1x1").advance("find_tables").matched == 1
    text = (
        r"find_tables: expected a lookup that can be placed on one rank for embedding, found that it is an "
        r"nn.Embedding, not an nn.EmbeddingBag, and its sparse gradient cannot be averaged over ranks "
        r"\(.*test_find_tables.py:\d+: .*\); use sparse=False there"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        pristine.on("2x2").advance("find_tables")
