"""Writes in place: readers before and behind them see what they see in the flat model, or the model is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dmt_compile import SimulatedWorld
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.pass_base import mutates, written_by
from dmt_compile.ir.writes import write_copy
from tests._tolerances import assert_reordered
from tests.models import Batch, with_two_top_buckets
from tests.passes._harness import capture

Forward = Callable[["Written", torch.Tensor, list[torch.Tensor]], torch.Tensor]

LONGEST_SUM = 600  # the widest layer


class Written(nn.Module):
    """A model of one dense vector and three pooled ones; what it does with them is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(9, 4, mode="sum") for _ in range(3))
        self.bottom = nn.Linear(5, 4)
        self.top = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 1))
        self.register_buffer("mean", torch.zeros(4))
        self._forward = forward

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        return self._forward(self, dense, [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)])


def into_rows_of_zeros(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.zeros(len(dense), 4, 4)
    rows[:, 0] = model.bottom(dense)
    for place, vector in enumerate(pooled, 1):
        rows[:, place] = vector
    return model.top(rows.sum(1))


def read_before(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    bottom = model.bottom(dense)
    joined = pooled[0] + bottom
    bottom.mul_(2)
    return model.top(joined + bottom)


def read_behind(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    bottom = model.bottom(dense)
    bottom.add_(pooled[1])
    return model.top(bottom)


def written_twice(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    bottom = model.bottom(dense)
    bottom.add_(pooled[1]).sub_(1)
    early = bottom + 1
    bottom *= 2
    return model.top(early + bottom)


def a_lookup_read_before(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    early = pooled[0] + pooled[1]
    pooled[0].mul_(3)
    return model.top(early + pooled[0] + model.bottom(dense))


def part_of_a_join(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    bottom = model.bottom(dense)
    joined = torch.cat([bottom, *pooled], 1)
    joined[:, 2:6] += bottom
    return model.top(joined[:, 3:7])


def activation_read_before(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    bottom = model.bottom(dense)
    joined = pooled[0] + bottom
    hidden = F.leaky_relu(bottom, 0.1, True) + F.relu_(pooled[1])
    return model.top(joined + hidden + bottom)


def in_a_later_bucket(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    first, second, third = model.top[0], model.top[2], model.top[4]
    kept = pooled[0] + 1
    hidden = torch.relu(second(torch.relu(first(pooled[1] + model.bottom(dense)))))
    late = third(hidden) + kept.sum(1, keepdim=True)
    kept.mul_(3)
    return late + kept.sum(1, keepdim=True)


def part_of_the_output(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
    out = model.top(pooled[0] + model.bottom(dense))
    out[:, 0].mul_(2)
    return out


FORWARDS: list[Forward] = [
    into_rows_of_zeros, read_before, read_behind, written_twice, a_lookup_read_before, part_of_a_join,
    activation_read_before, in_a_later_bucket, part_of_the_output,
]  # fmt: skip


def made(forward: Forward, ranks: int) -> tuple[Written, list[Batch]]:
    torch.manual_seed(0)
    model = Written(forward)
    if forward is in_a_later_bucket:
        with_two_top_buckets(model)
    batches: list[Batch] = []
    for samples in range(2, 2 + ranks):
        ids = [torch.randint(0, 9, (2 * samples,)) for _ in model.emb]
        batches.append((torch.randn(samples, 5), ids, [torch.arange(0, 2 * samples, 2)] * 3))
    return model, batches


@pytest.mark.parametrize("dense_compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("topology", ["2x2", "1x1"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_everyone_reads_what_the_flat_model_reads(forward: Forward, topology: str, dense_compiler: str) -> None:
    world = SimulatedWorld(topology)
    model, batches = made(forward, world.topology.world_size)
    outputs = world.run(model, batches, dense_compiler=dense_compiler)
    expected = [model(*batch) for batch in batches]
    for mine, theirs in zip(outputs, expected, strict=True):
        assert_reordered(mine, theirs, LONGEST_SUM)
    parameters = list(model.parameters())
    found = torch.autograd.grad(sum(out.sum() for out in outputs), parameters, allow_unused=True)
    wanted = torch.autograd.grad(sum(out.sum() for out in expected) / len(batches), parameters, allow_unused=True)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_reordered(mine, theirs, LONGEST_SUM, gradient=True)


def test_what_nobody_else_reads_is_written_in_place() -> None:
    model, [batch] = made(into_rows_of_zeros, 1)
    graph = capture(model, batch).on("1x1")
    graph.advance("normalize_graph")
    assert [node.kwargs for node in graph.gm.graph.nodes if mutates(node)] == [{"inplace": True}]
    assert graph.count(write_copy) == 4


def test_a_buffer_stays_written_and_is_read_from_the_write() -> None:
    def running_mean(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            model.mean.mul_(0.5)
            model.mean.add_(pooled[0].mean(0))
        return model.top(model.bottom(dense) - model.mean)

    model, [batch] = made(running_mean, 1)
    graph = capture(model, batch).on("2x2")
    graph.advance("normalize_graph")
    written = [node for node in graph.gm.graph.nodes if node.target in ("mul_", "add_")]
    assert [node.target for node in written] == ["mul_", "add_"]
    assert written[0] in written[1].args
    reader = next(node for node in graph.gm.graph.nodes if node.target is operator.sub)
    assert reader.args[1] is written[1]
    capture(model, batch).on("2x2").advance("compile_dense_regions")


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "writes"),
    [
        (torch.relu_, (), {}, True),
        (torch.relu, (), {}, False),
        (F.dropout, (0.5, True, True), {}, True),
        (F.dropout, (0.5, True), {}, False),
        (F.elu, (), {"inplace": True}, True),
        (torch.ops.aten.add_.Tensor, (1,), {}, True),
        (torch.ops.aten.add.Tensor, (1,), {}, False),
        (torch.ops.aten.view.default, ([1],), {}, False),
        (operator.iadd, (1,), {}, True),
        (operator.add, (1,), {}, False),
    ],
)
def test_what_writes_in_place_is_known(
    target: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool
) -> None:
    graph = fx.Graph()
    given = graph.placeholder("given")
    assert mutates(graph.call_function(target, (given, *args), kwargs)) is writes
    for method, in_place in (("add_", True), ("add", False), ("__getitem__", False)):
        assert mutates(graph.call_method(method, (given, 0))) is in_place


@torch.library.custom_op("dmt_test::add_into", mutates_args={"into"})
def add_into(given: torch.Tensor, into: torch.Tensor) -> None:
    """Write to another argument than the first."""
    into += given


@add_into.register_fake
def _(given: torch.Tensor, into: torch.Tensor) -> None:
    return None


def test_writes_to_any_argument_are_known() -> None:
    graph = fx.Graph()
    given, into = graph.placeholder("given"), graph.placeholder("into")
    overload = torch.ops.dmt_test.add_into.default
    for args, kwargs in (((given, into), {}), ((given,), {"into": into})):
        assert written_by(graph.call_function(overload, args, kwargs)) == [into]
    assert written_by(graph.call_function(torch.add, (given, given), {"out": into})) == [into]
    assert written_by(graph.call_function(torch._foreach_add_, ([given, into], 1))) == [given, into]


def test_a_custom_operator_s_write_across_an_exchange_is_refused() -> None:
    def custom(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
        bottom = model.bottom(dense).detach()
        joined = pooled[0] + bottom
        add_into(torch.ones_like(bottom), bottom)
        return model.top(joined + bottom)

    model, batches = made(custom, 4)
    with pytest.raises(UnsupportedGraphError, match=r"in one region with .*add_into.*write that line out of place"):
        SimulatedWorld("2x2").run(model, batches, dense_compiler="eager")
    assert torch.equal(SimulatedWorld("1x1").run(model, batches[:1], dense_compiler="eager")[0], model(*batches[0]))


def test_a_part_that_is_read_on_the_other_side_of_an_exchange_is_refused() -> None:
    def one_column(model: Written, dense: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
        bottom = model.bottom(dense)
        joined = pooled[0] + bottom
        bottom[:, 0].mul_(2)
        return model.top(joined + bottom)

    model, batches = made(one_column, 4)
    text = (
        r"compile_dense_regions: expected joined \(.*joined = pooled\[0\] \+ bottom\) in one region with mul_, which "
        r"writes in place to what it reads \(.*bottom\[:, 0\]\.mul_\(2\)\), found them in parts of the program that "
        r"run in another order; write that line out of place"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        SimulatedWorld("2x2").run(model, batches, dense_compiler="eager")
    assert torch.equal(SimulatedWorld("1x1").run(model, batches[:1], dense_compiler="eager")[0], model(*batches[0]))
