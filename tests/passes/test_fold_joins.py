"""fold_joins: a join of features reads one slice of what is joined already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import PassReport
from tests.passes._harness import Captured, assert_compiled_is_eager, capture, dense, dlrm

Vectors = list[torch.Tensor]


class Joins(nn.Module):
    """Tables of the given widths and a layer of the first width, and what ``join(x, vectors)`` makes of their vectors.

    Tables are looked up in the order ``read``, each as often as it is named there.
    """

    def __init__(self, join: Callable[..., Any], widths: Sequence[int] = (4, 4, 4), read: Sequence[int] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.ModuleList(nn.Embedding(6 + i, width) for i, width in enumerate(widths))
        self.bottom = nn.Linear(2, widths[0])
        self.join = join
        self.read = read or range(len(widths))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.join(self.bottom(x), [self.emb[i](ids[:, i]) for i in self.read])).flatten(1)


def batch(samples: int = 5, fields: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense features and ids."""
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 2, generator=generator), torch.randint(0, 6, (samples, fields), generator=generator)


def fold(model: Joins, topology: str = "1x1", training: bool = True, **options: Any) -> tuple[Captured, PassReport]:
    """Run the passes up to ``fold_joins``; on one rank its numbers are those of the graph before it."""
    graph = capture(model, batch(fields=len(model.emb)), training).on(topology, **options)
    graph.advance("batch_lookups")
    expected = graph.outputs() if topology == "1x1" else None
    report = graph.advance("fold_joins")
    if expected is not None:
        assert torch.equal(graph.outputs(), expected)
    return graph, report


def check(model: Joins) -> None:
    """Compare compiled and eager numbers and gradients, bitwise, an empty batch and one sample among them."""
    assert_compiled_is_eager(model, *(batch(samples, len(model.emb)) for samples in (5, 1, 0, 3)))


WHOLE: dict[str, Callable[..., torch.Tensor]] = {
    "cat": lambda x, v: torch.cat(v, dim=1),
    "cat, dense first": lambda x, v: torch.cat([x, *v], 1),
    "cat, dense last": lambda x, v: torch.concat((*v, x), dim=-1),
    "cat, dense between": lambda x, v: torch.concatenate([v[0], v[1], x, v[2], v[3]], -1),
    "cat, keywords": lambda x, v: torch.cat(tensors=v, dim=1),
    "hstack": lambda x, v: torch.hstack([*v, x]),
    "stack": lambda x, v: torch.stack([x, *v], dim=1),
    "stack, dense last": lambda x, v: torch.stack([*v, x], dim=-2),
    "stack by width": lambda x, v: torch.stack([x, *v], dim=2),
    "stack by feature": lambda x, v: torch.stack([*v, x]),
    "stack and cat": lambda x, v: torch.cat([x.unsqueeze(1), torch.stack(v, dim=1)], dim=1),
    "cat of matrices": lambda x, v: torch.cat([x.unsqueeze(1), *(w.unsqueeze(1) for w in v)], dim=1),
    "cat of matrices by width": lambda x, v: torch.cat([w.view(-1, 1, 4) for w in v], dim=2),
    "cat of matrices by feature": lambda x, v: torch.cat([w.unsqueeze(0) for w in v]),
    "cat and view": lambda x, v: torch.cat([x, *v], dim=1).view(x.shape[0], 5, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_features_side_by_side_are_read_at_once(name: str) -> None:
    model = Joins(WHOLE[name], (4, 4, 4, 4))
    graph, report = fold(model)
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    assert graph.count(ops.split_features) == 0
    assert graph.count(torch.narrow) == (2 if "between" in name else 1)
    check(model)


def test_a_cat_takes_features_of_any_width() -> None:
    model = Joins(lambda x, v: torch.cat([x, *v], dim=1), (3, 1, 5))
    graph, report = fold(model)
    assert report.matched == 1
    assert graph.node(torch.narrow).args[1:] == (1, 0, 9)
    check(model)


@pytest.mark.parametrize(
    "join", [lambda x, v: torch.stack([x, *v], 1), lambda x, v: torch.stack([w.squeeze(1) for w in v], dim=1)]
)
def test_features_of_one_column(join: Callable[..., torch.Tensor]) -> None:
    model = Joins(join, (1, 1, 1))
    assert fold(model)[1].matched == 1
    check(model)


def test_every_join_of_a_group_is_folded() -> None:
    """First-order columns and vectors, looked up in turn, as factorization machines have them."""

    def join(x: torch.Tensor, v: Vectors) -> torch.Tensor:
        return torch.cat([torch.cat(v[::2], dim=1).sum(1, keepdim=True) + x, torch.cat(v[1::2], dim=1)], dim=1)

    model = Joins(join, (1, 4, 1, 4))
    graph, report = fold(model)
    assert (report.matched, report.skipped) == (2, ())
    assert [graph.node(torch.narrow, i).args[1:] for i in range(2)] == [(1, 0, 2), (1, 2, 8)]
    check(model)


def test_lookups_take_the_order_of_the_join() -> None:
    model = Joins(lambda x, v: torch.cat([v[2], x, v[0], v[1]], dim=1), (4, 3, 5))
    graph, report = fold(model)
    assert report.matched == 1
    tables = graph.node(ops.batched_lookup).args[0]
    assert list(tables) == [graph.input(f"emb.{i}.weight") for i in (2, 0, 1)]  # type: ignore[arg-type]
    assert graph.node(torch.narrow).args[1:] == (1, 5, 7)
    check(model)


def test_columns_that_stay_follow_their_feature() -> None:
    """Some features are joined in another order first, one is read by itself."""
    model = Joins(lambda x, v: torch.cat([v[3], v[1], torch.sin(v[0]), torch.sin(v[2])], dim=1), (3, 4, 5, 4))
    graph, report = fold(model)
    assert (report.matched, graph.count(ops.split_features), graph.count(torch.clone)) == (1, 1, 2)
    assert graph.node(ops.split_features).args[2] == (4, 4, 3, 5)
    check(model)


def test_lookups_of_one_table_keep_their_order() -> None:
    """Its gradients are added up in that order."""
    read = (0, 1, 0, 0)
    graph, report = fold(Joins(lambda x, v: torch.cat([v[3], v[2], v[0], v[1]], dim=1), (4, 4), read))
    assert report.matched == 1  # two of the four are side by side even so
    tables = graph.node(ops.batched_lookup).args[0]
    assert list(tables) == [graph.input(f"emb.{i}.weight") for i in read]  # type: ignore[arg-type]


def test_a_second_join_in_another_order_stays() -> None:
    def join(x: torch.Tensor, v: Vectors) -> torch.Tensor:
        return torch.cat([torch.cat(v, dim=1), torch.cat(v[::-1], dim=1) * 2], dim=1)

    model = Joins(join)
    graph, report = fold(model)
    assert report.matched == 1
    assert [reason for _, reason in report.skipped] == ["no two of its features lie side by side in the same order"]
    assert graph.count(ops.split_features) == 1
    check(model)


def thrice(x: torch.Tensor, v: Vectors) -> torch.Tensor:
    joins = [torch.cat(v, dim=1), torch.cat([x, *v], dim=1)[:, 4:] * 3, torch.cat([*v, x], dim=1)[:, :-4] / 7]
    return torch.cat(joins, dim=1)


def test_features_read_more_than_twice_keep_the_sum_of_their_gradients() -> None:
    report = fold(Joins(thrice))[1]
    assert (report.changed, report.matched) == (False, 0)
    assert {reason for _, reason in report.skipped} == {
        "features are read more than twice: their gradients would be summed in another order"
    }
    check(Joins(thrice))


def test_without_gradients_features_may_be_read_any_number_of_times() -> None:
    assert fold(Joins(thrice), training=False)[1].matched == 3


def test_views_count_as_reads_of_their_feature() -> None:
    def join(x: torch.Tensor, v: Vectors) -> torch.Tensor:
        views = [w.unsqueeze(1) for w in v]
        pair = torch.cat(views, dim=1).flatten(1), torch.cat([w.flatten(1) for w in views], dim=1)
        return torch.cat([*pair, torch.cat([*v, x], dim=1)], dim=1)

    assert fold(Joins(join))[1].matched == 0
    check(Joins(join))


def test_one_feature_twice_in_a_join() -> None:
    model = Joins(lambda x, v: torch.cat([v[0], v[1], v[1], v[2]], dim=1))
    graph, report = fold(model)
    assert (report.matched, graph.count(torch.narrow)) == (1, 2)
    check(model)


@pytest.mark.parametrize(
    "join",
    [
        lambda x, v: torch.cat(v, dim=0).view(3, -1),
        lambda x, v: torch.cat([w.view(-1, 2, 2) for w in v], dim=1),
        lambda x, v: torch.cat([w.view(-1, 1, 1, 4) for w in v], dim=1),
        lambda x, v: torch.stack([w.unsqueeze(1).unsqueeze(1) for w in v], dim=1),
    ],
    ids=["by samples", "halves", "four dimensions", "five dimensions"],
)
def test_other_joins_stay(join: Callable[..., torch.Tensor]) -> None:
    report = fold(Joins(join))[1]
    assert not report.changed
    reason = "it joins features along samples, parts of them, or in more than three dimensions"
    assert [found for _, found in report.skipped] == [reason]


def test_owners_give_the_order_on_several_ranks() -> None:
    """Features of one owner are read at once where the model joins them one after another."""
    model = Joins(lambda x, v: torch.stack([x, *v], dim=1), (4, 4, 4, 4))
    together, apart = [["emb.0", "emb.1"], ["emb.2", "emb.3"]], [["emb.0", "emb.2"], ["emb.1", "emb.3"]]
    graph, report = fold(model, "2x1", partition=together)
    assert (report.matched, graph.count(torch.narrow), graph.count(ops.split_features)) == (1, 1, 0)
    assert fold(model, "2x1", partition=apart)[1].skipped[0][1].startswith("no two of its features lie side by side")
    for partition in (together, apart):
        torch._dynamo.reset()
        batches = [batch(samples, 4) for samples in (3, 2)]
        outputs = SimulatedWorld("2x1").run(model, batches, dense_compiler="eager", partition=partition)
        for output, (x, ids) in zip(outputs, batches, strict=True):
            assert torch.equal(output, model(x, ids))


def test_a_slice_keeps_the_line_of_its_join() -> None:
    graph = dlrm()
    graph.advance("fold_joins")
    assert "torch.cat" in graph.node(torch.narrow).meta["stack_trace"]


def test_without_lookups_nothing_changes() -> None:
    graph = dense()
    graph.advance("batch_lookups")
    before = graph.code()
    report = graph.advance("fold_joins")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert graph.code() == before
