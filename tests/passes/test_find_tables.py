"""find_tables: which lookups become canonical, and the reason for each that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.kernels.batched_lookup.reference import Pooling
from tests.passes._harness import Captured, Lookups, assert_compiled_is_eager, bags, capture, dense, dlrm


def bag(**options: Any) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(6, 4, **{"mode": "sum", **options})


def model_of(look_up: Callable[..., torch.Tensor], odd: nn.Module | None) -> Any:
    torch.manual_seed(0)
    return Lookups(look_up, odd)


def captured(look_up: Callable[..., torch.Tensor], odd: nn.Module | None = None) -> Captured:
    return capture(model_of(look_up, odd), bags())


def test_every_lookup_becomes_canonical() -> None:
    graph = dlrm()
    graph.advance("normalize_graph")
    expected = graph.outputs()
    assert graph.count(F.embedding_bag) == 3
    report = graph.advance("find_tables")
    assert (report.changed, report.matched, report.skipped) == (True, 3, ())
    assert (graph.count(F.embedding_bag), graph.count(ops.lookup)) == (0, 3)
    for index in range(3):
        table, ids, offsets, weights, how = graph.node(ops.lookup, index).args
        assert (table, weights, how) == (graph.input(f"emb.{index}.weight"), None, Pooling("sum", False))
        assert (ids.name, offsets.name) == (f"l_ids_{index}_", f"l_offsets_{index}_")
    assert torch.equal(graph.outputs(), expected)


def test_a_model_without_tables_stays_as_it_is() -> None:
    graph = dense()
    graph.advance("normalize_graph")
    before = graph.code()
    report = graph.advance("find_tables")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert graph.code() == before


# what is looked up, in which table, and how it must come out
MATCHED: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], nn.Module], Pooling]] = {
    "mean by default": (
        lambda m, ids, offsets: m.odd(ids, offsets),
        lambda: nn.EmbeddingBag(6, 4),
        Pooling("mean", False),
    ),
    "arguments by place": (
        lambda m, ids, offsets: F.embedding_bag(ids, m.odd.weight, offsets, None, 2.0, False, "max"),
        bag,
        Pooling("max", False),
    ),
    "sparse": (lambda m, ids, offsets: m.odd(ids, offsets), lambda: bag(sparse=True), Pooling("sum", True)),
    "padding": (lambda m, ids, offsets: m.odd(ids, offsets), lambda: bag(padding_idx=3), Pooling("sum", False, 3)),
    "padding from the end": (
        lambda m, ids, offsets: F.embedding_bag(ids, m.odd.weight, offsets, mode="sum", padding_idx=-3),
        bag,
        Pooling("sum", False, 3),
    ),
    "frequency": (
        lambda m, ids, offsets: m.odd(ids, offsets),
        lambda: bag(scale_grad_by_freq=True),
        Pooling("sum", False, scale_grad_by_freq=True),
    ),
    "weights": (
        lambda m, ids, offsets: m.odd(ids, offsets, per_sample_weights=ids.float()),
        bag,
        Pooling("sum", False),
    ),
    "last offset": (
        lambda m, ids, offsets: m.odd(ids, torch.cat([offsets, offsets.new_full((1,), 4)])),
        lambda: bag(include_last_offset=True),
        Pooling("sum", False, last_offset=True),
    ),
    "matrix of bags": (
        lambda m, ids, offsets: m.odd(torch.stack([offsets, offsets + 3], 1)),
        bag,
        Pooling("sum", False),
    ),
    "weighted matrix of bags": (
        lambda m, ids, offsets: m.odd(torch.stack([offsets, offsets + 3], 1), None, torch.ones(3, 2) / 3),
        bag,
        Pooling("sum", False),
    ),
    "embedding": (
        lambda m, ids, offsets: m.odd(offsets),
        lambda: nn.Embedding(6, 4),
        Pooling("none", False, padding_counts=True),
    ),
    "padded sparse embedding": (
        lambda m, ids, offsets: m.odd(offsets),
        lambda: nn.Embedding(6, 4, padding_idx=2, sparse=True),
        Pooling("none", True, 2, padding_counts=True),
    ),
    "matrix of ids": (
        lambda m, ids, offsets: m.odd(torch.stack([offsets, offsets + 3], 1)).flatten(1)[:, 2:6],
        lambda: nn.Embedding(6, 4),
        Pooling("none", False, padding_counts=True),
    ),
    "block of ids": (
        lambda m, ids, offsets: m.odd(torch.stack([offsets, offsets + 3], 1).view(-1, 2, 1)).sum((1, 2)),
        lambda: nn.Embedding(6, 4),
        Pooling("none", False, padding_counts=True),
    ),
}


@pytest.mark.parametrize("case", MATCHED)
def test_a_lookup_is_taken_as_it_was_meant(case: str) -> None:
    look_up, make_odd, how = MATCHED[case]
    pristine = captured(look_up, make_odd())
    graph = pristine.on("1x1", strict=True)
    graph.advance("normalize_graph")
    expected = graph.outputs()
    report = graph.advance("find_tables")
    assert (report.matched, report.skipped) == (2, ())
    assert graph.count(F.embedding_bag, F.embedding) == 0
    [odd] = [n for n in calls(graph.gm, ops.lookup) if n.args[0] is graph.input("odd.weight")]
    assert odd.args[4] == how
    assert (odd.args[2] is None) == (how.mode == "none")
    assert (odd.args[3] is None) == ("weight" not in case)
    assert all(len(node.meta["val"].shape) == 1 for node in odd.args[1:4] if isinstance(node, fx.Node))
    assert torch.equal(graph.outputs(), expected)
    assert_compiled_is_eager(model_of(look_up, make_odd()), bags())


@pytest.mark.parametrize(
    ("look_up", "make_odd"),
    [
        (lambda m, ids, offsets: m.odd(offsets, offsets), lambda: bag(max_norm=0.5)),
        (lambda m, ids, offsets: m.odd(offsets), lambda: nn.Embedding(6, 4, max_norm=0.5, norm_type=1.0)),
    ],
)
def test_max_norm_changes_the_table(look_up: Callable[..., torch.Tensor], make_odd: Callable[[], Any]) -> None:
    model = model_of(look_up, make_odd())
    before = model.odd.weight.detach().clone()
    step_model = assert_compiled_is_eager(model, (torch.tensor([0, 3, 1, 2]), torch.tensor([0, 1, 2])))
    after = step_model.odd.weight.detach()
    norm_type = model.odd.norm_type
    assert (torch.linalg.vector_norm(after[:3], norm_type, dim=1) <= 0.5 + 1e-6).all()
    assert torch.equal(after[3:], before[3:])
    graph = capture(model, bags()).on("1x1")
    graph.advance("find_tables")
    [how] = [n.args[4] for n in calls(graph.gm, ops.lookup) if n.args[0] is graph.input("odd.weight")]
    assert (how.max_norm, how.norm_type) == (0.5, norm_type)


REASONS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "used elsewhere": (
        lambda m, ids, offsets: m.odd(ids, offsets) + m.odd.weight.sum(),
        "its table is used outside lookups too",
    ),
    "computed table": (
        lambda m, ids, offsets: F.embedding_bag(ids, m.odd.weight * 2, offsets, mode="sum"),
        "its table is not a parameter of the model",
    ),
    "ids from a lookup": (
        lambda m, ids, offsets: m.odd(m.plain(ids, offsets)[:, 0].long().clamp(0, 5), torch.arange(len(offsets))),
        "its ids depend on another lookup",
    ),
    "offsets from a lookup": (
        lambda m, ids, offsets: m.odd(ids, m.plain(ids, offsets)[:, 0].long() * 0),
        "its ids depend on another lookup",
    ),
    "weights from a lookup": (
        lambda m, ids, offsets: m.odd(ids, offsets, per_sample_weights=m.plain(ids, offsets).sum() * ids.float()),
        "its per_sample_weights depend on another lookup",
    ),
    "ids from no batch": (
        lambda m, ids, offsets: m.odd(torch.arange(3), torch.arange(3)),
        "its ids do not come from the batch",
    ),
    "ids from the size of a batch": (
        lambda m, ids, offsets: m.odd(torch.arange(offsets.size(0)), torch.arange(3)),
        "its ids do not come from the batch",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_lookup_that_stays_is_reported_with_its_reason_and_line(case: str) -> None:
    look_up, reason = REASONS[case]
    graph = captured(look_up, bag()).on("1x1")
    graph.advance("normalize_graph")
    expected = graph.outputs()
    report = graph.advance("find_tables")
    assert [why for _, why in report.skipped] == [reason]
    assert [node.args[0] for node in calls(graph.gm, ops.lookup)] == [graph.input("plain.weight")] * report.matched
    assert report.matched >= 1
    assert graph.count(F.embedding_bag, F.embedding) == 1
    assert torch.equal(graph.outputs(), expected)
    left = graph.ctx.embedding_graph.unmatched[0]
    assert (left.node, left.reason) == report.skipped[0]
    assert "test_find_tables.py:" in left.source_line
    assert "m.odd" in left.source_line


def test_a_buffer_is_no_table() -> None:
    model = model_of(lambda m, ids, offsets: F.embedding_bag(ids, m.constant, offsets, mode="sum"), None)
    model.register_buffer("constant", torch.randn(6, 4))
    report = capture(model, bags()).on("1x1").advance("find_tables")
    assert [why for _, why in report.skipped] == ["its table is not a parameter of the model"]


def test_what_stays_leaves_its_table_and_what_depends_on_it() -> None:
    """The second lookup of a table stays, so the first one must; a third one never read another match."""

    def look_up(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        first = m.odd(ids, offsets)
        return first + m.odd(m.plain(ids, offsets)[:, 0].long().clamp(0, 5), torch.arange(3))

    report = captured(look_up, bag()).on("1x1").advance("find_tables")
    assert report.matched == 2  # the plain table's lookups
    assert sorted(why for _, why in report.skipped) == [
        "its ids depend on another lookup",
        "its table is used outside lookups too",
    ]


def test_bags_that_are_scaled_by_each_batch_s_frequency_stay_where_there_are_ranks() -> None:
    pristine = captured(MATCHED["frequency"][0], bag(scale_grad_by_freq=True))
    assert pristine.on("1x1").advance("find_tables").matched == 2
    report = pristine.on("2x2").advance("find_tables")
    reason = "its bags' gradients are scaled by how often ids occur in each rank's own batch"
    assert [why for _, why in report.skipped] == [reason]
    single = captured(MATCHED["embedding"][0], nn.Embedding(6, 4, scale_grad_by_freq=True))
    assert single.on("2x2").advance("find_tables").matched == 2


def test_strict_makes_a_remaining_lookup_an_error() -> None:
    graph = captured(REASONS["computed table"][0], bag()).on("1x1", strict=True)
    text = (
        r"find_tables: expected a region that can be rewritten for \w+, found that its table is not a parameter of "
        r"the model \(.*test_find_tables.py:\d+: .*m.odd.weight \* 2.*\); change the line or drop strict=True"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        graph.advance("find_tables")


@pytest.mark.parametrize(
    ("options", "training", "text"),
    [
        ({"sparse": True}, True, r"its sparse gradient cannot be averaged over ranks \(.*\); use sparse=False there"),
        ({"max_norm": 1.0}, False, r"with max_norm every rank would scale other rows of its copy \(.*\); drop"),
    ],
)
def test_what_cannot_stay_where_there_are_ranks(options: dict[str, Any], training: bool, text: str) -> None:
    def from_a_lookup(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return m.odd(m.plain(ids, offsets)[:, 0].long().clamp(0, 5))

    torch.manual_seed(0)
    pristine = capture(Lookups(from_a_lookup, nn.Embedding(6, 4, **options)), bags(), training)
    assert pristine.on("1x1").advance("find_tables").matched == 2
    start = "find_tables: expected a lookup that can be placed on one rank for embedding, found that its ids depend on"
    with pytest.raises(UnsupportedGraphError, match=f"{start} another lookup, and {text}"):
        pristine.on("2x2").advance("find_tables")


def test_a_sparse_lookup_may_stay_where_ranks_only_evaluate() -> None:
    look_up, _ = REASONS["ids from a lookup"]
    torch.manual_seed(0)
    pristine = capture(Lookups(look_up, bag(sparse=True)), bags(), training=False)
    assert len(pristine.on("2x2").advance("find_tables").skipped) == 1
