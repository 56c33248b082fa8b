"""Steps on some rows: the reference against PyTorch's optimizers, the kernel against it and double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.kernels.update_rows import reference
from dmt_compile.kernels.update_rows.op import Hyper, supports, update_rows
from dmt_compile.optim import RowWiseAdagrad
from tests._tolerances import error

KINDS = tuple(reference.STEPS)
ROWS = 300
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD([p], 0.1),
    "adagrad": lambda p: torch.optim.Adagrad([p], 0.1, lr_decay=0.3, eps=1e-3),
    "sparse_adam": lambda p: torch.optim.SparseAdam([p], 0.1, (0.8, 0.9), 1e-3),
    "row_wise_adagrad": lambda p: RowWiseAdagrad([p], 0.1, 1e-3),
}
UNIT = {
    torch.float32: 6e-8,
    torch.bfloat16: 8e-3,
    torch.float16: 5e-4,
}  # bfloat16: the interpreter cuts off, GPUs round
HYPER = Hyper(0.1, 1, 1e-3, 0.3, (0.8, 0.9))
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def states_of(kind: str, table: torch.Tensor) -> list[torch.Tensor]:
    """Return the states of some earlier steps."""
    generator = torch.Generator().manual_seed(7)
    width = 1 if kind == "row_wise_adagrad" else table.shape[1]
    count = {"sgd": 0, "sparse_adam": 2}.get(kind, 1)
    wide = reference.wide_type(table)
    return [torch.rand(len(table), width, dtype=wide, generator=generator).to(table.device) for _ in range(count)]


def draw(
    count: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu", rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a table, distinct rows of it and their gradients."""
    generator = torch.Generator().manual_seed(count + width)
    table = torch.randn(rows, width, generator=generator).to(dtype)
    rows_U = torch.randperm(rows, generator=generator)[:count]
    return table.to(device), rows_U.to(device), torch.randn(count, width, generator=generator).to(device, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 13, 64])
def test_the_optimizer_on_the_coalesced_gradient_bit_for_bit(kind: str, dtype: torch.dtype, width: int) -> None:
    table, _, _ = draw(0, width, dtype)
    parameter = nn.Parameter(table.clone())
    optimizer = OPTIMIZERS[kind](parameter)
    start = 0.0
    state_width = 1 if kind == "row_wise_adagrad" else width
    states = [torch.full((ROWS, state_width), start, dtype=dtype) for _ in states_of(kind, table)]
    for step in range(1, 5):
        _, rows_U, grads_UD = draw(100 + step, width, dtype)
        order = rows_U.argsort()
        parameter.grad = torch.sparse_coo_tensor(
            rows_U[order].unsqueeze(0), grads_UD[order], table.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()
        update_rows(kind, table, states, rows_U, grads_UD, HYPER._replace(step=step))
    assert torch.equal(table, parameter)
    kept = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.ndim == 2]
    assert len(kept) == len(states)
    assert all(map(torch.equal, states, kept))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (127, 13), (300, 64), (3, 1000), (2, 2500)])
def test_the_kernel_is_as_exact_as_the_reference(
    kind: str, dtype: torch.dtype, count: int, width: int, device: torch.device
) -> None:
    table, rows_U, grads_UD = draw(count, width, dtype, device)
    states = states_of(kind, table)
    hyper = HYPER._replace(step=3)

    def after(kernel: str, wide: bool = False) -> list[torch.Tensor]:
        tensors = [tensor.double() if wide else tensor.clone() for tensor in (table, *states)]
        update_rows(kind, tensors[0], tensors[1:], rows_U, grads_UD.double() if wide else grads_UD, hyper, kernel)
        return tensors

    assert supports(table, states) is None
    oracle, expected = after("reference", wide=True), after("reference")
    for mine, theirs, exact in zip(after("triton"), expected, oracle, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, exact) <= 2 * max(error(theirs, exact), UNIT[mine.dtype] / 2)
        others = [row for row in range(ROWS) if row not in rows_U.tolist()]
        assert torch.equal(mine[others], theirs[others])
    assert not torch.equal(after("triton")[0], table)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str, kernel: str, device: torch.device) -> None:
    table, rows_U, grads_UD = draw(0, 8, torch.float32, device)
    states = states_of(kind, table)
    before = [tensor.clone() for tensor in (table, *states)]
    update_rows(kind, table, states, rows_U, grads_UD, HYPER, kernel)
    assert all(map(torch.equal, (table, *states), before))


@pytest.mark.parametrize("kind", KINDS)
def test_operands_that_are_not_contiguous(kind: str, device: torch.device) -> None:
    table, rows_U, grads_UD = draw(40, 12, torch.float32, device)
    states = states_of(kind, table)
    wide = torch.stack([table, table], dim=1).view(ROWS, 24)
    of_others = wide[:, 12:].clone()
    strided = [rows_U.repeat_interleave(2)[::2], grads_UD.t().contiguous().t()]
    assert not any(tensor.is_contiguous() for tensor in (wide[:, :12], *strided))
    mine = [state.clone() for state in states]
    update_rows(kind, wide[:, :12], mine, *strided, HYPER, "triton")
    update_rows(kind, table, states, rows_U, grads_UD, HYPER, "triton")
    assert torch.equal(wide[:, :12], table)
    assert torch.equal(wide[:, 12:], of_others)
    assert all(map(torch.equal, mine, states))


@pytest.mark.parametrize("kind", ["sgd", "row_wise_adagrad"])
def test_rows_that_begin_beyond_32_bits(kind: str, device: torch.device) -> None:
    width, rows = 64, 2**25 + 40  # 2^31 elements and some; memory that nobody touches costs nothing on a CPU
    table = torch.Tensor.set_(
        torch.empty(0, dtype=torch.bfloat16, device=device),
        torch.UntypedStorage(2 * rows * width, device=device), 0, (rows, width), (width, 1),
    )  # fmt: skip
    sums = [] if kind == "sgd" else [torch.zeros(rows, 1, device=device)]
    rows_U = torch.tensor([rows - 1, 3, 2**25 + 1], device=device)
    values, _, grads_UD = draw(3, width, torch.bfloat16, device, rows=3)
    table[rows_U] = values
    expected = values.clone()
    start = [torch.zeros(3, 1, device=device) for _ in sums]
    reference.update_rows(kind, expected, start, torch.arange(3, device=device), grads_UD, HYPER)
    update_rows(kind, table, sums, rows_U, grads_UD, HYPER, "triton")
    assert error(table[rows_U], expected) <= UNIT[torch.bfloat16]
    assert not torch.equal(table[rows_U], values)
    for found, exact in zip(sums, start, strict=True):
        assert error(found[rows_U], exact) <= 1e-6


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6])  # the smaller one among float16's evenly spaced numbers
def test_random_rounding_gives_neighbours_with_the_right_mean(
    kernel: str, dtype: torch.dtype, scale: float, device: torch.device
) -> None:
    width = 64
    table, rows_U, _ = draw(ROWS, width, dtype, device)
    table = table * scale
    start = table.clone()
    grads_UD = torch.full((ROWS, width), 0.37 * scale, dtype=dtype, device=device)
    exact = start[rows_U].float() - 0.1 * grads_UD.float()
    update_rows("sgd", table, [], rows_U, grads_UD, HYPER._replace(stochastic_rounding=True, seed=5), kernel)
    found = table[rows_U].float()
    nearest = exact.to(dtype)
    away = torch.where(nearest.float() < exact, math.inf, -math.inf).to(dtype)
    other = torch.nextafter(nearest, away)
    other = torch.where(nearest.float() == exact, nearest, other)
    assert bool(((found == nearest.float()) | (found == other.float())).all())
    gap = (other.float() - nearest.float()).abs()
    assert bool((found == other.float())[gap > 0].any())
    # A sum of independent errors, each with a deviation of at most half its gap.
    deviation = float((gap.double() / 2).square().sum().sqrt())
    assert abs(float((found.double() - exact.double()).sum())) <= 5 * deviation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_numbers_are_a_function_of_seed_step_row_and_column(dtype: torch.dtype, device: torch.device) -> None:
    table, rows_U, grads_UD = draw(100, 9, dtype, device)
    grads_UD *= 1e-2

    def after(kernel: str, order: torch.Tensor, **numbers: Any) -> torch.Tensor:
        mine = table.clone()
        hyper = HYPER._replace(stochastic_rounding=True, **numbers)
        update_rows("sgd", mine, [], rows_U[order], grads_UD[order], hyper, kernel)
        return mine

    forth = torch.arange(100, device=device)
    expected = after("reference", forth)
    for kernel in ("reference", "triton"):
        assert torch.equal(after(kernel, forth.flip(0)), expected)
        assert not torch.equal(after(kernel, forth, seed=1), expected)
        assert not torch.equal(after(kernel, forth, step=2), expected)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_not_rounded_at_random(kernel: str, dtype: torch.dtype, device: torch.device) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([math.inf, -math.inf, math.nan, most, -most], device=device).to(dtype)
    table = values.repeat(64, 1)
    grads_UD = torch.zeros_like(table)
    grads_UD[:, 3] = -most * 2.0**-13  # a thousandth of a step beyond the largest number
    hyper = HYPER._replace(stochastic_rounding=True)
    update_rows("sgd", table, [], torch.arange(64, device=device), grads_UD, hyper, kernel)
    assert torch.equal(table.nan_to_num(nan=7.0), values.repeat(64, 1).nan_to_num(nan=7.0))


def test_random_words_are_spread_evenly() -> None:
    rows_U = torch.tensor([0, 1, 2, 2**31, 2**32, 2**33 + 1])
    words = reference.random_words(HYPER.key, rows_U, 4000)
    assert words.unique().numel() > 0.9999 * words.numel()
    for bit in range(32):
        share = (words >> bit & 1).double().mean(1)
        assert bool(((share - 0.5).abs() < 5 * 0.5 / 4000**0.5).all()), bit


def test_what_the_kernel_does_not_take(device: torch.device) -> None:
    table = torch.zeros(4, 4, device=device)
    assert supports(table.double(), []) == "the kernel computes in float32, which torch.float64 does not fit"
    assert supports(table.t(), []) == "the elements of a row do not lie side by side"
    assert supports(table, [table.t()]) == "the optimizer's state is not contiguous"


def test_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "in its interpreter" in str(supports(torch.zeros(4, 4), []))
