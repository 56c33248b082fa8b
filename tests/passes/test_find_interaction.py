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
    graph.advance("find_tables")
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


@pytest.mark.parametrize(
    ("interact", "node", "reason"),
    [
        (other_operand, "bmm", "its operands are not one tensor and its transpose"),
        (computed, "bmm", "its operand is not a view of one concatenation"),
        (two_dense, "bmm", "it joins 2 lookups and 2 other tensors"),
        (no_product, "graph", "no product of stacked feature vectors with their transpose"),
    ],
)
def test_the_nearest_miss_is_told(interact: Callable[..., torch.Tensor], node: str, reason: str) -> None:
    graph = captured(interact)
    report = graph.advance("find_interaction")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ((node, reason),))
    assert graph.ctx.embedding_graph.interaction is None


def test_strict_does_not_ask_for_an_interaction() -> None:
    graph = dlrm(strict=True)
    assert graph.advance("find_interaction").matched == 1
    assert graph.count(ops.lookup) == 3


def test_without_lookups_there_is_nothing_to_miss() -> None:
    report = dense().advance("find_interaction")
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
