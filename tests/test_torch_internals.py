"""Lookups while Dynamo traces for us: a cheaper rule gives what PyTorch's own gives, and adds no guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._guards import TracingContext
from torch.nn import functional as F

from dmt_compile import torch_internals
from dmt_compile.ir.metadata import is_plain_lookup
from dmt_compile.torch_internals import dynamo
from tests.in_backward import attach

LookUp = Callable[..., torch.Tensor]


class Model(nn.Module):
    """Three tables of 7 to 9 rows, each read by ``look_up``, under a layer."""

    def __init__(self, look_up: LookUp) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.ModuleList(nn.Embedding(7 + i, 4) for i in range(3))
        self.look_up = look_up
        self.top = nn.Linear(4, 2)

    def forward(self, batch: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        rows = [self.look_up(table.weight, *inputs) for table, inputs in zip(self.emb, batch, strict=True)]
        return self.top(torch.stack(rows).sum(0))


def bags(last: bool = False, weights: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """Return ids, offsets and weights for each table."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 5, 6)
    return [
        (
            torch.randint(0, 7, (size,), generator=generator),
            torch.tensor([0, 2, 3, *([size] if last else [])]),
            *([torch.rand(size, generator=generator)] if weights else []),
        )
        for size in sizes
    ]


def ids(*shape: int) -> list[tuple[torch.Tensor, ...]]:
    """Return a matrix of ids for each table."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 7, shape, generator=generator),) for _ in range(3)]


PLAIN: dict[str, tuple[LookUp, list[tuple[torch.Tensor, ...]]]] = {
    "bags": (lambda w, i, o: F.embedding_bag(i, w, o), bags()),
    "bags, maximum": (lambda w, i, o: F.embedding_bag(i, w, offsets=o, mode="max"), bags()),
    "bags, sparse": (lambda w, i, o: F.embedding_bag(i, w, o, mode="sum", sparse=True), bags()),
    "bags, padding": (lambda w, i, o: F.embedding_bag(i, w, o, padding_idx=-1), bags()),
    "bags, last offset": (lambda w, i, o: F.embedding_bag(i, w, o, include_last_offset=True), bags(last=True)),
    "ids": (lambda w, i: F.embedding(i, w), ids(3)),
    "ids, padding": (lambda w, i: F.embedding(i, w, padding_idx=2), ids(3)),
    "sequences": (lambda w, i: F.embedding(i, w).sum(1), ids(3, 2)),
    "matrices of ids": (lambda w, i: F.embedding_bag(i, w), ids(3, 2)),
    "weights": (lambda w, i, o, f: F.embedding_bag(i, w, o, None, 2.0, False, "sum", False, f), bags(weights=True)),
}
OTHER: dict[str, tuple[LookUp, list[tuple[torch.Tensor, ...]]]] = {
    "largest norm": (lambda w, i: F.embedding(i, w, max_norm=1.0), ids(3)),
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the lookups that go through PyTorch's own rules."""
    torch._dynamo.reset()
    seen: list[Any] = []
    run_node = torch._dynamo.utils.run_node

    def run(tracer: Any, node: Any, *args: Any) -> Any:
        if node.target in (F.embedding, F.embedding_bag):
            seen.append(node.target)
        return run_node(tracer, node, *args)

    monkeypatch.setattr(torch._dynamo.utils, "run_node", run)
    return seen


def compiled(look_up: LookUp) -> Any:
    return torch.compile(Model(look_up), backend="dmt", options={"dense_compiler": "eager"})


@pytest.mark.parametrize("name", PLAIN)
def test_the_first_lookup_of_a_form_goes_through_pytorchs_rule(name: str, own: list[Any]) -> None:
    before = torch._dynamo.utils.run_node
    look_up, batch = PLAIN[name]
    assert torch.equal(compiled(look_up)(batch), Model(look_up)(batch))
    assert len(own) == 1
    assert torch._dynamo.utils.run_node is before


@pytest.mark.parametrize("name", OTHER)
def test_a_lookup_whose_rule_asks_more_keeps_it(name: str, own: list[Any]) -> None:
    look_up, batch = OTHER[name]
    assert torch.equal(compiled(look_up)(batch), Model(look_up)(batch))
    assert len(own) in (3, 6)  # once more where a size turns out to be dynamic


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("training", [True, False])
def test_graph_and_guards_are_those_of_pytorchs_rule(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def trace(gm: torch.fx.GraphModule) -> Callable[..., Any]:
        context = TracingContext.try_get()
        assert context is not None
        values = [node.meta.get("example_value") for node in gm.graph.nodes]
        tensors = [
            (str(v.shape), v.stride(), v.dtype, v.requires_grad, v.is_leaf)
            for v in values
            if isinstance(v, torch.Tensor)
        ]
        seen.append((gm.code, str(tensors), sorted(str(guard.expr) for guard in context.fake_mode.shape_env.guards)))
        raise NotImplementedError

    monkeypatch.setattr("dmt_compile.backend.read_capture", trace)
    look_up, batch = PLAIN[name]
    for rules in (dynamo._rules, {}):
        monkeypatch.setattr(dynamo, "_rules", rules)
        torch._dynamo.reset()
        with torch.set_grad_enabled(training), pytest.raises(Exception, match="NotImplementedError"):
            compiled(look_up)(batch)
    assert seen[0] == seen[1]


def test_a_rule_that_says_something_else_is_not_used(own: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rule, *others = dynamo._rules[F.embedding]
    monkeypatch.setitem(dynamo._rules, F.embedding, (lambda i, w: rule(i[1:], w), *others))
    look_up, batch = PLAIN["ids"]
    assert torch.equal(compiled(look_up)(batch), Model(look_up)(batch))
    assert len(own) == 3


def test_pytorchs_own_errors_stay(own: list[Any]) -> None:
    for padding in (8, -8):  # a row of the last table, and of none of the others
        assert not is_plain_lookup(F.embedding, (ids(3)[0][0], torch.ones(7, 4)), {"padding_idx": padding})
    with pytest.raises(Exception, match="Padding_idx must be within num_embeddings"):
        compiled(lambda w, i: F.embedding(i, w, padding_idx=8))(ids(3))


@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_in_the_backward_pass_follow_the_contents(fails: bool) -> None:
    parameter = nn.Parameter(torch.ones(2))
    attach(torch.optim.SGD, [parameter], {"lr": 0.5})

    def swap() -> None:
        if fails:
            raise RuntimeError("not now")
        torch_internals.swap_contents(parameter, nn.Parameter(torch.full((2,), 3.0)))

    with torch.no_grad():  # the first call of a model may be an evaluation
        try:
            torch_internals.swap_in_backward(parameter, swap)
        except RuntimeError:
            assert fails
    assert torch_internals.in_backward_node(parameter) is not None
    parameter.sum().backward()
    assert torch.equal(parameter, torch.full((2,), 0.5 if fails else 2.5))
    assert parameter.grad is None


def test_sizes_that_nothing_reads_are_not_passed() -> None:
    """Slices of vectors, whose places in memory are symbols too; the length of one is read, that of others not."""
    passed: list[tuple[Any, ...]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        torch_internals.drop_unused_sizes(gm)

        def run(*args: Any) -> Any:
            passed.append(args)
            return gm(*args)

        return run

    def function(vectors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([vector.sum() for vector in vectors]) * vectors[1].shape[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for lengths in ((3, 4, 5), (6, 2, 7)):
        vectors = [torch.arange(20.0)[place : place + length] for place, length in enumerate(lengths, start=1)]
        assert torch.equal(compiled(vectors), function(vectors))
        assert [value for value in passed[-1] if isinstance(value, int)] == [lengths[1]]
        assert len(passed[-1]) == 4
    assert len(passed) == 2
