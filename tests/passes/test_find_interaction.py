"""find_interaction: the dot interaction in the ways people write it, and the nearest miss otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dmt_compile.ir import ops
from tests.passes._harness import Captured, capture, dense, dlrm


class Model(nn.Module):
    """Two tables and a dense vector, joined by ``interact(features, dense)``."""

    def __init__(self, interact: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a = nn.EmbeddingBag(6, 4, mode="sum")
        self.b = nn.EmbeddingBag(6, 4, mode="sum")
        self.bottom = nn.Linear(3, 4)
        self.interact = interact

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.interact([self.a(ids, offsets), self.b(ids, offsets)], self.bottom(dense))


def captured(interact: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]) -> Captured:
    batch = (torch.ones(3, 3), torch.tensor([0, 3, 1, 2]), torch.tensor([0, 2, 2]))
    graph = capture(Model(interact), batch).on("1x1")
    graph.advance("check_lookups")
    return graph


def stacked(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(vectors, dim=1).view(vectors[0].shape[0], -1, 4)


def dense_first(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = stacked([dense, *features])
    return torch.bmm(vectors, vectors.transpose(1, 2))


def dense_last(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = stacked([*features, dense])
    return torch.matmul(vectors, torch.transpose(vectors, 2, 1))


def at_sign_and_permute(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.stack([dense, *features], dim=1)
    return vectors @ vectors.permute(0, 2, 1)


def method(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.cat([feature.unsqueeze(1) for feature in [dense, *features]], dim=1)
    return vectors.bmm(vectors.transpose(-1, -2))


def negative_dims(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = stacked([dense, *features]).contiguous()
    return torch.bmm(vectors, torch.permute(vectors, (0, 2, 1)))


@pytest.mark.parametrize("interact", [dense_first, dense_last, at_sign_and_permute, method, negative_dims])
def test_the_dot_interaction_is_found(interact: Callable[..., torch.Tensor]) -> None:
    graph = captured(interact)
    before = graph.code()
    report = graph.advance("find_interaction")
    assert (report.changed, report.matched, report.skipped) == (False, 1, ())
    assert graph.code() == before
    found = graph.ctx.embedding_graph.interaction
    assert found is not None
    assert (found.kind, found.features) == ("dot", ("a", "b"))
    dense_node = next(node for node in graph.gm.graph.nodes if node.name == found.dense)
    assert dense_node.target is torch._C._nn.linear
    edges = set(graph.ctx.embedding_graph.graph.edges)
    product = ("interaction", found.node)
    assert {(("feature", "a"), product), (("feature", "b"), product), (product, ("over_arch", "output"))} <= edges


def test_an_interaction_of_features_alone_has_no_dense_vector() -> None:
    def features_alone(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
        vectors = stacked(features)
        return torch.bmm(vectors, vectors.transpose(1, 2)).sum((1, 2)) + dense.sum(1)

    graph = captured(features_alone)
    graph.advance("find_interaction")
    assert graph.ctx.embedding_graph.interaction is not None
    assert graph.ctx.embedding_graph.interaction.dense is None


def other_operand(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    return torch.bmm(stacked([dense, *features]), stacked([*features, dense]).transpose(1, 2))


def computed(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = stacked([dense, *features]) * 2
    return torch.bmm(vectors, vectors.transpose(1, 2))


def two_dense(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = stacked([dense, dense * 2, *features])
    return torch.bmm(vectors, vectors.transpose(1, 2))


def no_product(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    return torch.cat([dense, *features], dim=1)


def no_join(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    return features[0] + features[1] * dense


@pytest.mark.parametrize(
    ("interact", "node", "reason"),
    [
        (other_operand, "cat", "it joins 2 features, but bmm is no known kind"),
        (computed, "cat", "it joins 2 features, but mul is no known kind"),
        (two_dense, "cat", "it joins 2 features, but bmm is no known kind"),
        (no_product, "cat", "it joins 2 features, but output is no known kind"),
        (no_join, "graph", "no cat or stack of the vectors of several features"),
    ],
)
def test_the_nearest_miss_is_told(interact: Callable[..., torch.Tensor], node: str, reason: str) -> None:
    graph = captured(interact)
    report = graph.advance("find_interaction")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ((node, reason),))
    assert graph.ctx.embedding_graph.interaction is None


def fm(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.stack(features, dim=1)
    return 0.5 * (vectors.sum(1).pow(2) - (vectors * vectors).sum(1)).sum(1)


def cross(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    start = joined = torch.cat([dense, *features], dim=1)
    for _ in range(2):
        joined = start * torch.nn.functional.linear(joined, torch.ones(12, 12)) + joined
    return joined


def cross_of_one_vector(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    start = torch.cat([dense, *features], dim=1)
    return start * (start @ torch.ones(12, 1)) + torch.ones(12) + start


def attention(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.stack(features, dim=1)
    keys = torch.nn.functional.linear(vectors, torch.ones(4, 4))
    return torch.softmax(keys @ keys.transpose(1, 2), dim=-1) @ vectors


def convolution(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv1d(torch.stack(features, dim=1), torch.ones(3, 2, 1))


def compressed(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.stack(features, dim=1)
    outer = torch.einsum("bfd,bgd->bfgd", vectors, vectors).flatten(1, 2)
    return torch.nn.functional.conv1d(outer, torch.ones(3, 4, 1))


def concatenation(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(torch.cat([dense, *features], dim=1), torch.ones(5, 12))


def dot_by_einsum(features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
    vectors = torch.stack([*features, dense], dim=1)
    return torch.einsum("bfd,bgd->bfg", vectors, vectors)


KINDS = {
    "fm": fm,
    "cross": cross,
    "cross of one vector": cross_of_one_vector,
    "attention": attention,
    "convolution": convolution,
    "compressed": compressed,
    "concatenation": concatenation,
    "dot by einsum": dot_by_einsum,
}


@pytest.mark.parametrize("case", KINDS)
def test_each_kind_of_interaction_is_named(case: str) -> None:
    graph = captured(KINDS[case])
    graph.advance("find_interaction")
    found = graph.ctx.embedding_graph.interaction
    assert found is not None
    assert found.kind == case.split(" of ")[0].split(" by ")[0]
    assert found.features == ("a", "b")


class TwoTowers(nn.Module):
    """A user and an item, of two tables each, that meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 3) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        user, item = (self.layers[i](torch.cat(rows[2 * i : 2 * i + 2], dim=1)).relu() for i in range(2))
        return (user * item).sum(1)


def test_two_towers_meet_in_a_product() -> None:
    graph = capture(TwoTowers(), (torch.zeros(3, 4, dtype=torch.long),)).on("1x1")
    graph.advance("find_interaction")
    assert [(i.kind, i.features) for i in graph.ctx.embedding_graph.interactions[:2]] == [
        ("product", ("tables.0", "tables.1")),
        ("product", ("tables.2", "tables.3")),
    ]


def test_strict_does_not_ask_for_an_interaction() -> None:
    graph = dlrm(strict=True)
    assert graph.advance("find_interaction").matched == 1
    assert graph.count(ops.lookup) == 3


def test_without_lookups_there_is_nothing_to_miss() -> None:
    report = dense().advance("find_interaction")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
