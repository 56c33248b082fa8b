"""fuse_cross: the tails of cross layers in the ways people write them, with their numbers, and the nearest miss."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from dmt_compile import pipeline
from dmt_compile.config import Options
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport
from dmt_compile.ir.verifier import verify
from dmt_compile.passes.fuse_cross import FuseCross
from dmt_compile.tower_modules import Cross
from tests._tolerances import assert_reordered
from tests.passes._harness import Captured, capture, dlrm
from tests.zoo.comparison import compare_alone, compare_ranks
from tests.zoo.libraries import LIBRARIES
from tests.zoo.models import ZOO
from tests.zoo.test_zoo import assert_within_limits

WIDTH = 8
cross_tail = torch.ops.dmt.cross_tail.default


class Model(nn.Module):
    """Two tables, joined and crossed by ``net``, and a layer over it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, WIDTH // 2) for _ in range(2))
        self.net = net
        self.top = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.net(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)))


class Written(nn.Module):
    """Two cross layers, each ``layer(x0, x, linear, bias)``."""

    def __init__(self, layer: Callable[..., torch.Tensor], bias: bool = False, out: int = WIDTH) -> None:
        super().__init__()
        self.w = nn.ModuleList(nn.Linear(WIDTH, out, bias) for _ in range(2))
        self.b = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.layer = layer

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        x = x0
        for w, b in zip(self.w, self.b, strict=True):
            x = self.layer(x0, x, w, b)
        return x


def of_library(module: str, name: str, *args: int | str) -> nn.Module:
    """Return a cross network as a library has it, with values in its biases too, which start as zeros."""
    net: nn.Module = getattr(importlib.import_module(module), name)(WIDTH, 2, *args)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


# name -> the network, and whether the bias is an argument of the operator: None, first or last
NETS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "full rank": (lambda: Cross(WIDTH, 2, None), None),
    "low rank": (lambda: Cross(WIDTH, 2, 3), None),
    "W x first": (lambda: Written(lambda x0, x, w, b: w(x) * x0 + x, bias=True), None),
    "x first": (lambda: Written(lambda x0, x, w, b: x + x0 * w(x)), None),
    "methods": (lambda: Written(lambda x0, x, w, b: w(x).add(b).mul(x0).add(x)), "first"),
    "functions": (lambda: Written(lambda x0, x, w, b: torch.add(torch.multiply(x0, w(x) + b), x)), "first"),
    "bias on the left": (lambda: Written(lambda x0, x, w, b: x0 * (b + w(x)) + x), "first"),
    "bias last": (lambda: Written(lambda x0, x, w, b: x0 * w(x) + b + x), "last"),
    "matmul": (lambda: Written(lambda x0, x, w, b: x0 * (x @ w.weight) + x), None),
    "activation": (lambda: Written(lambda x0, x, w, b: x0 * w(x).tanh() + x), None),
    "torchrec low rank": (lambda: of_library("torchrec.modules.crossnet", "LowRankCrossNet", 3), "first"),
    "torchrec": (lambda: of_library("torchrec.modules.crossnet", "CrossNet"), "first"),
    "torch-rechub": (lambda: of_library("torch_rechub.basic.layers", "CrossNetV2"), "last"),
    "deepctr-torch": (lambda: of_library("deepctr_torch.layers.interaction", "CrossNet", "matrix"), "first"),
}


def captured(net: nn.Module, dtype: torch.dtype = torch.float32, **options: str) -> Captured:
    """Return the graph of a model that crosses by ``net``, ready for the pass."""
    torch.manual_seed(0)
    batch = (torch.tensor([[0, 8], [3, 1], [8, 8], [5, 0], [3, 4]]),)
    graph = capture(Model(net).to(dtype), batch).on("1x1", **options)
    graph.advance("fold_joins")
    return graph


def fused(graph: Captured, kernel: str = "triton") -> tuple[int, tuple[tuple[str, str], ...]]:
    """Run the pass as the driver does, and return what it matched and skipped."""
    step = FuseCross(kernel)
    before = graph.code()
    report = step.run(graph.gm, graph.ctx)
    graph.gm.recompile()
    verify(graph.gm, graph.ctx, step.gives, step.name)
    assert report.changed == (graph.code() != before) == bool(report.matched)
    assert graph.count(cross_tail) == report.matched
    return report.matched, report.skipped


def results(graph: Captured) -> list[torch.Tensor]:
    """Return the output and the gradients of all parameters."""
    out = graph.outputs()
    weights = torch.linspace(1, 2, out.numel()).view(out.shape)
    used = list(graph.ctx.parameters.values())
    return [out, *torch.autograd.grad(out, used, weights, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("case", NETS)
def test_both_layers_become_one_operator_each_with_the_same_numbers(case: str) -> None:
    make, place = NETS[case]
    torch.manual_seed(1)
    graph = captured(make())
    expected = results(graph)
    assert fused(graph) == (2, ())
    for index in range(2):
        x0, _, bias, x, bias_last, kernel = graph.node(cross_tail, index).args
        assert (bias is not None, bias_last) == (place is not None, place == "last")
        assert kernel == "triton"
        assert (x is x0) == (index == 0)
    first, second = (graph.node(cross_tail, index) for index in range(2))
    assert second.args[0] is first.args[0]
    assert second.args[3] is first
    assert not {"mul", "multiply", "add"} & {str(getattr(n.target, "__name__", n.target)) for n in graph.gm.graph.nodes}
    assert_same(results(graph), expected)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert that outputs and gradients agree within what another rounding may change."""
    assert_reordered(found[0], expected[0], WIDTH)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert_reordered(mine, theirs, 5 * WIDTH, gradient=True)


@pytest.mark.parametrize("dense_compiler", ["eager", "aot_eager"])
def test_dense_regions_hold_the_operator(dense_compiler: str) -> None:
    graph = captured(Cross(WIDTH, 2, None), dense_compiler=dense_compiler)
    expected = results(graph)
    assert fused(graph) == (2, ())
    graph.advance("compile_dense_regions")
    assert graph.count(cross_tail) == 0
    assert_same(results(graph), expected)


def test_inductor_does_it_unless_the_kernel_is_asked_for() -> None:
    graph = captured(Cross(WIDTH, 2, None), dense_compiler="inductor")
    assert fused(graph, "auto")[1][0][1] == "Inductor fuses it with what surrounds it"
    assert fused(graph, "triton") == (2, ())


def test_without_a_kernel_or_a_cross_nothing_changes() -> None:
    assert fused(captured(Cross(WIDTH, 2, None)), "reference") == (0, ())
    graph = dlrm()
    graph.advance("fold_joins")
    assert fused(graph) == (0, ())


def in_place(x0: torch.Tensor, x: torch.Tensor, w: nn.Module, b: torch.Tensor) -> torch.Tensor:
    product = x0 * w(x)
    product += x
    return product


def read_twice(x0: torch.Tensor, x: torch.Tensor, w: nn.Module, b: torch.Tensor) -> torch.Tensor:
    product = x0 * w(x)
    return product + x + product.tanh()


MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one weight a column": (
        lambda: Written(lambda x0, x, w, b: x0 * w(x) + b + x, out=1),
        "x0, W x and x differ in shape: (",
    ),
    "in place": (lambda: Written(in_place), "writes in place"),
    "read twice": (lambda: Written(read_twice), "has other users"),
    "double precision": (lambda: Cross(WIDTH, 2, None), "elements of torch.float64"),
}


@pytest.mark.parametrize("case", MISSES)
def test_the_nearest_miss_is_told(case: str) -> None:
    make, reason = MISSES[case]
    matched, skipped = fused(captured(make(), dtype=torch.float64 if case == "double precision" else torch.float32))
    assert (matched, len(skipped)) == (0, 2)
    assert all(reason in why for _, why in skipped), skipped


@pytest.mark.parametrize(
    ("module", "name", "node", "reason"),
    [
        ("torchrec.modules.crossnet", "VectorCrossNet", "matmul", "a matmul that add reads"),
        ("deepctr_torch.layers.interaction", "CrossNet", "dot_", "a matmul that add reads"),
        ("deepctr_torch.layers.interaction", "CrossNetMix", "dot__1", "a mul that squeeze reads"),
    ],
)
def test_a_cross_that_is_written_otherwise_is_named(module: str, name: str, node: str, reason: str) -> None:
    expected = node, f"{reason}, not a product by elements that is added to x"
    assert fused(captured(of_library(module, name))) == (0, (expected,))


ENTRIES = {
    entry.name: replace(entry, exact=False)
    for entry in (*ZOO, *LIBRARIES)
    if entry.name in ("dcn_v2", "dcn_v2_low_rank", "torchrec.DLRM_DCN")
}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[PassReport]:
    """Let the pass use its kernel, and return what it reports."""
    found: list[PassReport] = []
    in_order, run = pipeline.passes_in_order, FuseCross.run

    def with_crosses(options: Options) -> tuple[Pass, ...]:
        return tuple(FuseCross("triton") if step.name == "fuse_cross" else step for step in in_order(options))

    def reported(step: FuseCross, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        found.append(run(step, gm, ctx))
        return found[-1]

    monkeypatch.setattr(pipeline, "passes_in_order", with_crosses)
    monkeypatch.setattr(FuseCross, "run", reported)
    return found


@pytest.mark.parametrize("name", ENTRIES)
def test_models_of_the_zoo_train_and_evaluate_as_in_eager_mode(name: str, reports: list[PassReport]) -> None:
    alone = compare_alone(ENTRIES[name], shapes=4)
    assert_within_limits(alone.differences)
    assert (alone.training_graphs, alone.evaluation_graphs) == (1, 1)
    assert [(report.matched, report.skipped) for report in reports] == [(2, ())] * 2


def test_ranks_train_as_in_eager_mode(reports: list[PassReport]) -> None:
    assert_within_limits(compare_ranks(ENTRIES["dcn_v2"]))
    assert {report.matched for report in reports} == {2}
