"""pool_sequences: a sum, mean or maximum over positions becomes a lookup that pools; what does not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Effect
from dmt_compile.passes.pool_sequences import PoolSequences
from tests._tolerances import assert_reordered
from tests.passes._harness import Captured, assert_compiled_is_eager, capture, dense, dlrm, fields

LENGTH = 5
Pool = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]  # (model, rows (B, L, 4), mask (B, L)) -> (B, ..)


class Model(nn.Module):
    """A sequence of ids, a mask of its positions, and what ``pool`` makes of the rows."""

    def __init__(self, pool: Pool, rows: int = 9, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(rows, 4, **options)
        nn.init.normal_(self.item.weight)  # a padding row that is not zero
        self.user = nn.Embedding(rows, 4)
        self.score = nn.Linear(1, 1, bias=False)  # a softmax takes a bias away
        self.pool = pool
        self.top = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.top(self.pool(self, self.item(ids), mask).reshape(ids.shape[0], -1)[:, :4])


def batch(samples: int = 6, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, some of them twice in a row of them, and a mask that is 0 in some positions."""
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(0, 9, (samples, length), generator=generator)
    return ids, torch.rand(samples, length, generator=generator) * (ids > 2)


def before_pass(pool: Pool, **options: Any) -> Captured:
    graph = capture(Model(pool, **options), batch()).on("1x1")
    graph.advance("split_field_tables")
    return graph


MATCHED: dict[str, tuple[str, bool, Pool]] = {  # mode, whether there are weights
    "sum": ("sum", False, lambda m, e, mask: e.sum(1)),
    "sum by name": ("sum", False, lambda m, e, mask: torch.sum(e, dim=1)),
    "sum from the end": ("sum", False, lambda m, e, mask: e.sum(-2)),
    "sum over a list": ("sum", False, lambda m, e, mask: e.sum([1])),
    "sum that keeps": ("sum", False, lambda m, e, mask: e.sum(1, keepdim=True).squeeze(1)),
    "sum that keeps by place": ("sum", False, lambda m, e, mask: torch.sum(e, 1, True)[:, 0]),
    "mean": ("sum", False, lambda m, e, mask: e.mean(1)),
    "mean that keeps": ("sum", False, lambda m, e, mask: torch.mean(e, dim=1, keepdim=True)),
    "max": ("max", False, lambda m, e, mask: e.max(1)[0]),
    "max values": ("max", False, lambda m, e, mask: torch.max(e, dim=1).values),
    "max that keeps": ("max", False, lambda m, e, mask: e.max(dim=1, keepdim=True)[0]),
    "max used twice": ("max", False, lambda m, e, mask: (lambda top: top[0] + top.values * 2)(e.max(1))),
    "masked sum": ("sum", True, lambda m, e, mask: (e * mask.unsqueeze(-1)).sum(1)),
    "mask repeated as the rows": ("sum", True, lambda m, e, mask: (e * mask.unsqueeze(2).expand_as(e)).sum(1)),
    "mask in front": ("sum", True, lambda m, e, mask: (mask[:, :, None] * e).sum(dim=1)),
    "repeated mask": ("sum", True, lambda m, e, mask: torch.mul(e, mask.unsqueeze(2).expand(-1, -1, 4)).sum(1)),
    "mask of booleans": ("sum", True, lambda m, e, mask: (e * (mask > 0).unsqueeze(2)).sum(1)),
    "masked mean": (
        "sum",
        True,
        lambda m, e, mask: (e * mask.unsqueeze(2)).sum(1) / (mask.sum(1, keepdim=True) + 1e-8),
    ),
    "bmm": ("sum", True, lambda m, e, mask: torch.bmm(mask.unsqueeze(1), e)),
    "matmul": ("sum", True, lambda m, e, mask: (mask.unsqueeze(1) @ e).squeeze(1)),
    "trained scores": ("sum", True, lambda m, e, mask: (e * torch.sigmoid(m.score(mask.unsqueeze(2)))).sum(1)),
    "trained scores in a bmm": (
        "sum",
        True,
        lambda m, e, mask: torch.bmm(torch.softmax(m.score(mask.unsqueeze(2)), dim=1).transpose(1, 2), e),
    ),
}


@pytest.mark.parametrize("case", MATCHED)
def test_what_is_pooled(case: str) -> None:
    mode, weighted, pool = MATCHED[case]
    graph = before_pass(pool)
    expected = graph.outputs()
    report = graph.advance("pool_sequences")
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    [lookup] = calls(graph.gm, ops.lookup)
    offsets, weights, how = lookup.args[2:]
    assert (how.mode, how.padding_counts) == (mode, True)
    assert offsets is graph.node(ops.even_offsets)
    assert len(lookup.meta["val"].shape) == 2
    assert (weights is not None) == weighted
    assert_reordered(graph.outputs(), expected, LENGTH)


@pytest.mark.parametrize(
    "case",
    ["mean", "max used twice", "masked mean", "mask of booleans", "bmm", "trained scores", "trained scores in a bmm"],
)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=["plain", "padded"])
def test_gradients_are_those_of_the_sequence(case: str, options: dict[str, Any]) -> None:
    """Of the table, of the scores behind the weights, for sequences of any length."""
    pool = MATCHED[case][2]
    batches = batch(), batch(3, 2), batch(4, 1)
    compiled = assert_compiled_is_eager(Model(pool, **options), *batches, longest_sum=6 * LENGTH)
    if "trained" in case:
        assert compiled.score.weight.grad.any()


@pytest.mark.parametrize("case", ["sum", "masked sum", "bmm"])
def test_sparse_gradients_stay_sparse(case: str) -> None:
    model = Model(MATCHED[case][2], sparse=True)
    compiled = assert_compiled_is_eager(model, batch(), longest_sum=6 * LENGTH)
    assert compiled.item.weight.grad.layout == torch.sparse_coo


@pytest.mark.parametrize("case", ["sum", "mean", "max", "masked sum"])
def test_a_padding_row_counts_and_gets_no_gradient(case: str) -> None:
    """``nn.Embedding`` reads its padding row like any other; ``nn.EmbeddingBag`` would leave it out."""
    model = Model(MATCHED[case][2], padding_idx=4)
    ids, mask = torch.tensor([[4, 4, 1], [4, 5, 4]]), torch.ones(2, 3)
    without = Model(MATCHED[case][2])
    compiled = assert_compiled_is_eager(model, (ids, mask), longest_sum=3)
    assert_reordered(compiled(ids, mask).detach(), without(ids, mask).detach(), 3)
    assert model.item.weight[4].any()
    assert compiled.item.weight.grad[[1, 5]].any()
    assert not compiled.item.weight.grad[4].any()


REASONS: dict[str, tuple[str, Pool, dict[str, Any]]] = {
    "used twice": ("its rows have 2 users, pooled rows would serve one", lambda m, e, mask: e.sum(1) + e[:, 0], {}),
    "not pooled": (
        "tanh is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: torch.tanh(e).sum(1),
        {},
    ),
    "over samples": (
        "sum is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: e.sum(0).expand(e.shape[0], -1, -1),
        {},
    ),
    "over all": (
        "sum is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: e.sum((1, 2))[:, None].expand(-1, 4),
        {},
    ),
    "in another type": (
        "sum is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: e.sum(1, dtype=torch.float64).float(),
        {},
    ),
    "where the maximum is": (
        "max is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: sum(e.max(1)),
        {},
    ),
    "weighted mean": (
        "mean is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: (e * mask.unsqueeze(2)).mean(1),
        {},
    ),
    "weighted maximum": (
        "max is no sum, mean or maximum over positions that a lookup can take over",
        lambda m, e, mask: (e * mask.unsqueeze(2)).max(1)[0],
        {},
    ),
    "weighted rows used twice": (
        "its weighted rows have several users",
        lambda m, e, mask: (lambda rows: rows.sum(1) + rows[:, 0])(e * mask.unsqueeze(2)),
        {},
    ),
    "factor of each column": (
        "it is not multiplied with one factor a position",
        lambda m, e, mask: (e * torch.rand(6, LENGTH, 4)).sum(1),
        {},
    ),
    "one factor": ("it is not multiplied with one factor a position", lambda m, e, mask: (e * 0.5).sum(1), {}),
    "a factor of a sample": (
        "it is not multiplied with one factor a position",
        lambda m, e, mask: (e * mask[:, :1, None]).sum(1),
        {},
    ),
    "its square": ("it is not multiplied with one factor a position", lambda m, e, mask: (e * e).sum(1), {}),
    "rows times a matrix": (
        "it is not multiplied with one factor a position",
        lambda m, e, mask: torch.matmul(e, torch.ones(4, 4)).sum(1),
        {},
    ),
    "rows in front of a bmm": (
        "it is not multiplied with one factor a position",
        lambda m, e, mask: torch.bmm(e, torch.ones(e.shape[0], 4, 4)).sum(1),
        {},
    ),
    "several weighted sums": (
        "it is not multiplied with one factor a position",
        lambda m, e, mask: torch.bmm(torch.stack([mask, mask * 2], 1), e).sum(1),
        {},
    ),
    "wider factors": (
        "its factors are of a wider type",
        lambda m, e, mask: (e * mask.double().unsqueeze(2)).sum(1).float(),
        {},
    ),
    "factors from a lookup": (
        "its factors depend on a lookup",
        lambda m, e, mask: (e * torch.sigmoid(m.user(mask.long()).sum(2, keepdim=True))).sum(1),
        {},
    ),
    "frequency": ("a pooled lookup has no such gradient", lambda m, e, mask: e.sum(1), {"scale_grad_by_freq": True}),
    "sparse maximum": ("a pooled lookup has no such gradient", lambda m, e, mask: e.max(1)[0], {"sparse": True}),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_stays_a_sequence_and_why(case: str) -> None:
    reason, pool, options = REASONS[case]
    graph = before_pass(pool, **options)
    torch.manual_seed(1)
    expected = graph.outputs()
    before = graph.code()
    report = graph.advance("pool_sequences")
    assert reason in [why for _, why in report.skipped]
    assert (report.changed, report.matched) == (False, 0)
    assert graph.code() == before
    assert all(node.args[4].mode == "none" for node in calls(graph.gm, ops.lookup))
    torch.manual_seed(1)
    assert torch.equal(graph.outputs(), expected)


@pytest.mark.parametrize("case", ["used twice", "its square", "factors from a lookup", "frequency", "sparse maximum"])
def test_what_stays_a_sequence_is_bitwise_eager(case: str) -> None:
    _, pool, options = REASONS[case]
    assert_compiled_is_eager(Model(pool, **options), batch(), batch(3, 2))


def test_a_history_that_is_attended_over_and_pooled_stays_a_sequence() -> None:
    """Its own scores are made of the same rows, as in DIN."""

    def attend(m: Any, e: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(e.sum(2) + mask, dim=1)
        return torch.bmm(scores.unsqueeze(1), e)

    graph = before_pass(attend)
    assert graph.advance("pool_sequences").matched == 0
    assert_compiled_is_eager(Model(attend), batch())


@pytest.mark.parametrize("graph", [dlrm, dense, fields])
def test_models_without_sequences_stay_as_they_are(graph: Callable[[], Captured]) -> None:
    captured = graph()
    captured.advance("split_field_tables")
    before = captured.code()
    report = captured.advance("pool_sequences")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert captured.code() == before


def test_the_order_of_a_sum_may_change() -> None:
    assert PoolSequences.effect is Effect.REORDERED


def test_one_id_a_sample_is_no_sequence() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(6, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.emb(ids).sum(1)

    graph = capture(One(), (torch.tensor([1, 5]),)).on("1x1")
    report = graph.advance("pool_sequences")
    assert (report.matched, report.skipped) == (0, ())
