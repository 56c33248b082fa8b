"""Metadata of captured graphs: Dynamo's, taken over into an environment of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from dmt_compile.ir.metadata import describe, same
from tests.models import DLRM, Mixture, make_batch
from tests.passes._harness import Captured, capture


class InPlace(nn.Module):
    """Writes to results that need gradients, and takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.emb(ids)).relu_()
        first, second = hidden.mul(2).split(3, dim=1)
        with torch.no_grad():
            scale = hidden.abs().max()
        return (first + second).div_(scale).add_(ids.shape[0])


class Assuming(nn.Module):
    """Asks for the number of samples, which stays a symbol in some of Dynamo's sizes and is a number in others."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.emb(ids)
        return rows * 2 if ids.shape[0] == 1 else rows


class Bags(nn.Module):
    """Pools a matrix of ids, of which PyTorch's own rule makes a quotient for the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids).relu()


def captured(name: str) -> Captured:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "in place":
        return capture(InPlace(), (torch.randint(9, (5,), generator=generator),))
    if name == "one sample":
        return capture(Assuming(), (torch.randint(9, (1,), generator=generator),))
    if name == "matrix of ids":
        return capture(Bags(), (torch.randint(9, (5, 3), generator=generator),))
    model: Any = {"dlrm": DLRM, "mixture": Mixture}[name]()
    return capture(model, make_batch(model, 5, generator) if name == "dlrm" else model.batch(5, generator))


def results(graph: Captured) -> list[fx.Node]:
    return [node for node in graph.gm.graph.nodes if node.op.startswith("call_")]


@pytest.mark.parametrize("name", ["dlrm", "mixture", "in place", "one sample", "matrix of ids"])
def test_what_is_taken_over_is_what_would_be_derived(name: str) -> None:
    graph = captured(name)
    environment = graph.ctx.environment
    assert results(graph)
    for node in results(graph):
        adopted = node.meta["val"]
        with torch.no_grad():
            derived = environment.derive(node, graph.gm)
        assert same(adopted, derived, lambda symbol: True), (node.format_node(), describe(adopted), describe(derived))
        if isinstance(adopted, torch.Tensor):
            assert adopted.stride() == derived.stride()


def test_an_operation_in_place_gives_its_argument_and_may_run_again() -> None:
    graph = captured("in place")
    in_place = [node for node in results(graph) if str(node.target) in ("relu_", "div_", "add_")]
    assert len(in_place) == 3
    for node in in_place:
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        assert node.meta["val"] is argument.meta["val"]
        assert node.meta["val"].requires_grad
        assert not node.meta["val"].is_leaf
        graph.ctx.environment.derive(node, graph.gm)  # autograd refuses to write to leaves


def test_trust_ends_where_a_value_an_argument_or_the_target_changes() -> None:
    graph = captured("dlrm")
    environment = graph.ctx.environment
    relu = next(node for node in results(graph) if "relu" in str(node.target))
    source = relu.all_input_nodes[0]
    assert environment.trusted(relu)
    kept = source.meta["val"]
    source.meta["val"] = environment.derive(source, graph.gm)
    assert not environment.trusted(relu)
    source.meta["val"] = kept
    assert environment.trusted(relu)
    kept, relu.meta["val"] = relu.meta["val"], environment.derive(relu, graph.gm)
    assert not environment.trusted(relu)
    relu.meta["val"] = kept
    target, relu.target = relu.target, torch.sigmoid
    assert not environment.trusted(relu)
    relu.target, relu.args = target, (source.all_input_nodes[0],)
    assert not environment.trusted(relu)
