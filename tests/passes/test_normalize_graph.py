"""normalize_graph: no assertions, one node per size, no inferred view sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import DLRM, make_batch
from tests.passes._harness import capture, dlrm

ASSERTION = torch.ops.aten._assert_scalar.default
SIZE = torch.ops.aten.sym_size.int


class Views(nn.Module):
    """A model whose ``view(-1)`` cannot be inferred for an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, dense: torch.Tensor) -> torch.Tensor:
        pairs = self.layer(dense).view(dense.shape[0], -1, 2)
        return pairs.reshape(dense.size(0), 3, -1).sum(1)


def test_sizes_come_from_one_node() -> None:
    graph = dlrm()
    report = graph.advance("normalize_graph")
    assert (report.changed, report.matched) == (True, 1)  # the one view
    assert graph.count(SIZE) == 1
    view = next(node for node in graph.gm.graph.nodes if node.target == "view")
    assert view.args[1:] == (graph.node(SIZE), 4, 8)
    sizes = [n for n in graph.gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.SymInt)]
    assert sizes
    assert not any(node.users for node in sizes)


def test_the_assertions_of_an_empty_batch_are_gone() -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4))
    graph = capture(model, make_batch(model, 0, torch.Generator())).on("1x1")
    assertions = graph.count(ASSERTION)
    assert assertions > 0
    report = graph.advance("normalize_graph")
    assert report.matched == assertions + 1  # the one view
    assert (graph.count(ASSERTION), graph.count(SIZE)) == (0, 1)
    assert graph.outputs().shape == (0,)


def test_every_inferred_size_that_is_known_is_written_out() -> None:
    torch.manual_seed(0)
    graph = capture(Views(), (torch.randn(4, 6),)).on("1x1")
    report = graph.advance("normalize_graph")
    views = [node for node in graph.gm.graph.nodes if node.target in ("view", "reshape")]
    assert [node.args[1:] for node in views] == [(graph.node(SIZE), 3, 2), (graph.node(SIZE), 3, 2)]
    assert graph.count(SIZE) == 1
    assert report.matched >= 2


def test_a_graph_in_this_form_keeps_it() -> None:
    graph = dlrm()
    graph.advance("normalize_graph")
    before = [(node.op, str(node.target)) for node in graph.gm.graph.nodes]
    del graph.reports["normalize_graph"]
    assert graph.advance("normalize_graph").matched == 0
    assert [(node.op, str(node.target)) for node in graph.gm.graph.nodes] == before


def test_a_batch_of_none_works_where_eager_cannot_infer_a_view() -> None:
    torch.manual_seed(0)
    model = Views()
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    dense = torch.randn(4, 6)
    assert torch.equal(compiled(dense), model(dense))
    with pytest.raises(RuntimeError, match="because the unspecified dimension size -1"):
        model(dense[:0])
    empty = compiled(dense[:0])
    assert empty.shape == (0, 2)
    empty.sum().backward()
    assert torch.equal(model.layer.weight.grad, torch.zeros(6, 6))
