"""What follows from a new size, operator by operator: sizes that go along, and dimensions that may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dmt_compile.ir.metadata import FakeEnvironment
from dmt_compile.ir.resizing import CannotResize, Resizing
from dmt_compile.ir.size_rules import follow_sizes, rewrite_sizes

B, V, D = 5, 4, 6


class Function(nn.Module):
    """A function of x (B, V, D), or of x (B, D), with parameters ``w``, ``u`` and ``b``."""

    def __init__(self, does: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.does = does
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.does(x, self)


def sizes_of(function: Function, shape: tuple[int, ...], dim: int, size: int) -> tuple[fx.GraphModule, Resizing]:
    """Give dimension ``dim`` of x another size, and follow it; the result does not count as the model's output."""
    gm = fx.symbolic_trace(function)
    environment = FakeEnvironment()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = environment.adopt(torch.zeros(shape))
        elif node.op != "output":
            node.meta["val"] = environment.derive(node, gm)
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    sizes = follow_sizes(nodes, {nodes[0]})
    sizes.set(nodes[0], dim, size)
    sizes.solve()
    return gm, sizes


CASES: dict[
    str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], int, tuple[int, ...], dict[str, tuple[int, ...]]]
] = {
    # function of x (B, V, D); parameters; dimension of x that becomes 3; shape of the result; new shapes of parameters
    "linear": (lambda x, m: F.linear(x, m.w, m.b), {"w": (7, D), "b": (7,)}, 2, (B, V, 7), {"w": (7, 3), "b": (7,)}),
    "linear, samples apart": (lambda x, m: F.linear(x, m.w), {"w": (7, D)}, 1, (B, 3, 7), {"w": (7, D)}),
    "residual": (
        lambda x, m: F.linear(x, m.w, m.b) + x,
        {"w": (D, D), "b": (D,)},
        2,
        (B, V, 3),
        {"w": (3, 3), "b": (3,)},
    ),
    "matmul": (lambda x, m: x @ m.w, {"w": (D, 7)}, 2, (B, V, 7), {"w": (3, 7)}),
    "bmm": (lambda x, m: torch.bmm(x, x.transpose(1, 2)), {}, 1, (B, 3, 3), {}),
    "einsum": (lambda x, m: torch.einsum("bvd,vk->bkd", x, m.w), {"w": (V, 2)}, 1, (B, 2, D), {"w": (3, 2)}),
    "tensordot": (lambda x, m: torch.tensordot(x, m.w, dims=([-1], [0])), {"w": (D, 7)}, 2, (B, V, 7), {"w": (3, 7)}),
    "flatten": (lambda x, m: F.linear(x.flatten(1), m.w), {"w": (7, V * D)}, 2, (B, 7), {"w": (7, 12)}),
    "view": (lambda x, m: F.linear(x.view(B, V * D), m.w), {"w": (7, V * D)}, 1, (B, 7), {"w": (7, 18)}),
    "unflatten": (lambda x, m: x.flatten(1).unflatten(1, (V, D)), {}, 2, (B, V, 3), {}),
    "cat": (lambda x, m: torch.cat([x, x], 2), {}, 2, (B, V, 6), {}),
    "stack": (lambda x, m: torch.stack([x, x], 1), {}, 2, (B, 2, V, 3), {}),
    "sum": (lambda x, m: x.sum(1) ** 2 - (x**2).sum(1), {}, 1, (B, D), {}),
    "mean kept": (lambda x, m: x.mean(dim=2, keepdim=True) * x, {}, 2, (B, V, 3), {}),
    "normalised": (
        lambda x, m: F.layer_norm(x, (D,), m.w, m.b),
        {"w": (D,), "b": (D,)},
        2,
        (B, V, 3),
        {"w": (3,), "b": (3,)},
    ),
    "batch norm": (
        lambda x, m: F.batch_norm(x, None, None, m.w, training=True),
        {"w": (V,)},
        1,
        (B, 3, D),
        {"w": (3,)},
    ),
    "convolution": (lambda x, m: F.conv1d(x, m.w, m.b), {"w": (2, V, 1), "b": (2,)}, 1, (B, 2, D), {"w": (2, 3, 1)}),
    "convolution, sliding apart": (
        lambda x, m: F.conv2d(x.unsqueeze(1), m.w),
        {"w": (2, 1, 3, 1)},
        2,
        (B, 2, 2, 3),
        {},
    ),
    "pool": (lambda x, m: F.max_pool2d(x.unsqueeze(1), (2, 1)).squeeze(1), {}, 2, (B, 2, 3), {}),
    "split": (lambda x, m: torch.split(x, 1, dim=1)[0], {}, 2, (B, 1, 3), {}),
    "unbind": (lambda x, m: x.unbind(1)[2], {}, 2, (B, 3), {}),
    "chunk": (lambda x, m: x.chunk(2, dim=1)[1], {}, 2, (B, 2, 3), {}),
    "permute": (lambda x, m: x.permute(0, 2, 1), {}, 1, (B, D, 3), {}),
    "squeeze": (lambda x, m: x.unsqueeze(3).squeeze(), {}, 1, (B, 3, D), {}),
    "attention": (lambda x, m: F.scaled_dot_product_attention(x, x, x), {}, 2, (B, V, 3), {}),
    "index": (lambda x, m: x[:, 1], {}, 2, (B, 3), {}),
    "gate": (lambda x, m: x * m.w, {"w": (D,)}, 2, (B, V, 3), {"w": (3,)}),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_follow(name: str) -> None:
    does, shapes, dim, result, parameters = CASES[name]
    gm, sizes = sizes_of(Function(does, **shapes), (B, V, D), dim, 3)
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    assert sizes.shape(nodes[-1]) == result
    for node in nodes:
        if node.op == "get_attr":
            assert sizes.shape(node) == parameters.get(str(node.target), shapes[str(node.target)]), node.target
    # what is written is right: the rewritten graph runs on the new sizes
    for node in nodes:
        if sizes.changed(node) and node.op.startswith("call"):
            rewrite_sizes(node, sizes)
        elif node.op == "get_attr":
            setattr(gm, str(node.target), nn.Parameter(torch.zeros(sizes.shape(node))))
    gm.recompile()
    changed = [B, V, D]
    changed[dim] = 3
    assert tuple(gm(torch.zeros(changed)).shape) == result


FIXED = {
    "an index": (lambda x, m: x[:, 1:3], 1, "a slice of fixed columns is read: 4 columns would become 3"),
    "unbind": (lambda x, m: x.unbind(1)[0], 1, "unbind takes fixed columns apart"),
    "split": (lambda x, m: torch.split(x, 2, dim=1)[0], 1, "split takes fixed columns apart"),
    "a window": (lambda x, m: F.conv1d(x, torch.zeros(2, V, 3)), 2, "conv1d slides over a fixed number"),
    "a pool": (lambda x, m: F.avg_pool1d(x, 2), 2, "avg_pool1d slides over a fixed number"),
    "heads": (lambda x, m: x.view(B, V, 2, 3), 2, "view lays out 2 x 3 columns, of which any could become fewer"),
    "unknown": (lambda x, m: x.cumsum(1), 1, "cumsum has a fixed size"),
    "dimensions anew": (lambda x, m: x.reshape(B, 2, 12), 1, "reshape"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_may_not_change_is_named(name: str) -> None:
    does, dim, reason = FIXED[name]
    with pytest.raises(CannotResize, match=reason):
        sizes_of(Function(does), (B, V, D), dim, 3)


def attended(x: torch.Tensor, m: Any) -> torch.Tensor:
    return F.multi_head_attention_forward(
        x, x, x, D, 2, m.w, m.b, None, None, False, 0.0, m.u, m.c, need_weights=False
    )[0]


def test_attention_takes_its_projections_with_it_and_keeps_its_heads() -> None:
    shapes = {"w": (3 * D, D), "b": (3 * D,), "u": (D, D), "c": (D,)}
    gm, sizes = sizes_of(Function(attended, **shapes), (B, V, D), 2, 4)
    found = {str(node.target): sizes.shape(node) for node in gm.graph.nodes if node.op == "get_attr"}
    assert found == {"w": (12, 4), "b": (12,), "u": (4, 4), "c": (4,)}
    with pytest.raises(CannotResize, match="multi_head_attention_forward needs a multiple of 2 columns, not 3"):
        sizes_of(Function(attended, **shapes), (B, V, D), 2, 3)


def test_one_class_has_one_size() -> None:
    gm, sizes = sizes_of(Function(lambda x, m: x + x), (B, V, D), 2, 3)
    with pytest.raises(CannotResize, match="would need 3 and 5 columns at once"):
        sizes.set(list(gm.graph.nodes)[1], 2, 5)
