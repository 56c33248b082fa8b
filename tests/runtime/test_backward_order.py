"""What hiding the dense gradients' way rests on: the order in which autograd runs what is ready."""

from __future__ import annotations

from typing import Any

import torch


class Marked(torch.autograd.Function):
    """An identity that writes down when its backward runs."""

    @staticmethod
    def forward(ctx: Any, name: str, seen: list[str], *tensors: torch.Tensor) -> Any:
        ctx.name, ctx.seen = name, seen
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.seen.append(ctx.name)
        return None, None, *grads


def test_among_what_is_ready_the_node_made_last_runs_first() -> None:
    seen: list[str] = []
    bottom, top, table = (torch.ones(3, requires_grad=True) for _ in range(3))

    def mark(name: str, *tensors: torch.Tensor) -> Any:
        return Marked.apply(name, seen, *tensors)

    waited_bottom, waited_top = mark("wait", bottom, top)
    (rows,) = mark("lookup", table)
    (sent,) = mark("exchange starts", rows)
    (first,) = mark("start bottom", waited_bottom)
    (dense,) = mark("bottom", first * 2)
    (received,) = mark("exchange waits", sent)
    (last,) = mark("start top", waited_top)
    (output,) = mark("top", last * dense * received)
    for _ in range(2):  # and so again over a retained graph
        output.sum().backward(retain_graph=True)
    expected = ["top", "start top", "exchange waits", "bottom", "start bottom", "exchange starts", "lookup", "wait"]
    assert seen == expected * 2


def test_what_waits_hears_which_gradients_there_are_none_of() -> None:
    """A gradient that no loss depends on does not run what was to start it, nor does it reach the parameter."""
    seen: list[str] = []
    used, unused = (torch.ones(3, requires_grad=True) for _ in range(2))
    waited = Marked.apply("wait", seen, used, unused)
    (first,) = Marked.apply("start used", seen, waited[0])
    Marked.apply("start unused", seen, waited[1])
    first.sum().backward()
    assert seen == ["start used", "wait"]
