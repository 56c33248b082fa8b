"""The dot interaction's kernels against sums in double precision and against the reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.dot_interaction.op import allows_tf32, dot_interaction, supports
from dmt_compile.kernels.dot_interaction.reference import pair_count, pair_indices
from tests._tolerances import error

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# Samples, vectors, columns, leading columns: tiles of 16, 32 and 64 rows, and several of them; sizes that fill none.
SHAPES = [
    (1, 1, 1, 3),
    (5, 2, 7, 0),
    (9, 8, 16, 16),
    (3, 27, 100, 130),
    (2, 64, 64, 1),
    (1, 65, 40, 0),
    (2, 130, 33, 20),
]
ORDERS = list(product([False, True], repeat=2))


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return normal numbers, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return vectors, and a leading vector where there is one."""
    samples, vectors, columns, width = shape
    leading = draw((samples, width), dtype, device, 1).requires_grad_() if width else None
    return draw((samples, vectors, columns), dtype, device).requires_grad_(), leading


def results(
    vectors: torch.Tensor, leading: torch.Tensor | None, diagonal: bool, upper: bool, kernel: str
) -> list[torch.Tensor]:
    """Return the output, and the gradients of all inputs for a fixed gradient of it."""
    out = dot_interaction(vectors, leading, diagonal, upper, kernel)
    grad = draw(tuple(out.shape), torch.bfloat16, out.device, 2).to(out.dtype)
    given = [vectors] if leading is None else [vectors, leading]
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def assert_close_to_double(vectors: torch.Tensor, leading: torch.Tensor | None, diagonal: bool, upper: bool) -> None:
    """Assert errors of at most twice those of the reference, against the reference in double precision."""
    # Triton's interpreter cuts bits off where a GPU rounds to the nearest bfloat16.
    cut = vectors.dtype is torch.bfloat16 and vectors.device.type == "cpu"
    smallest = 2.0**-7 if cut else 1e-6
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (vectors, leading)]
    mine = results(vectors, leading, diagonal, upper, "triton")
    same = results(vectors, leading, diagonal, upper, "reference")
    exact = results(wide[0], wide[1], diagonal, upper, "reference")
    for found, theirs, oracle in zip(mine, same, exact, strict=True):
        assert found.dtype == theirs.dtype
        assert found.shape == oracle.shape
        assert error(found, oracle) <= max(2 * error(theirs, oracle), smallest)


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize(("diagonal", "upper"), ORDERS)
def test_the_reference_is_a_loop_over_pairs(diagonal: bool, upper: bool) -> None:
    vectors, leading = inputs((3, 5, 4, 2), torch.float64, torch.device("cpu"))
    assert leading is not None
    beyond = 0 if diagonal else 1
    pairs = [(i, j) for i in range(5) for j in (range(i + beyond, 5) if upper else range(i + 1 - beyond))]
    columns = [(vectors[:, i] * vectors[:, j]).sum(1) for i, j in pairs]
    found = dot_interaction(vectors, leading, diagonal, upper)
    torch.testing.assert_close(found, torch.cat([leading, torch.stack(columns, dim=1)], dim=1))
    assert len(pairs) == pair_count(5, diagonal)
    assert pair_indices(5, diagonal, upper).T.tolist() == [list(pair) for pair in pairs]


@pytest.mark.parametrize(("diagonal", "upper"), ORDERS)
@pytest.mark.parametrize("width", [0, 2])
def test_gradients_of_the_reference(diagonal: bool, upper: bool, width: int) -> None:
    vectors, leading = inputs((2, 4, 3, width), torch.float64, torch.device("cpu"))
    given = (vectors,) if leading is None else (vectors, leading)
    assert torch.autograd.gradcheck(lambda v, e=None: dot_interaction(v, e, diagonal, upper), given)


@pytest.mark.parametrize(("diagonal", "upper"), ORDERS)
def test_one_vector_has_no_pair_but_itself(diagonal: bool, upper: bool) -> None:
    vectors, leading = inputs((3, 1, 4, 2), torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda v, e: dot_interaction(v, e, diagonal, upper), (vectors, leading))


def test_gradients_that_are_not_finite_stay_in_their_sample() -> None:
    vectors, _ = inputs((3, 4, 5, 0), torch.float64, torch.device("cpu"))
    out = dot_interaction(vectors)
    grad = torch.ones_like(out)
    grad[1] = torch.inf
    (found,) = torch.autograd.grad(out, vectors, grad)
    assert [bool(sample.isfinite().all()) for sample in found] == [True, False, True]


def test_flops_are_counted() -> None:
    vectors, _ = inputs((3, 4, 5, 0), torch.float64, torch.device("cpu"))
    with FlopCounterMode(display=False) as counted:
        dot_interaction(vectors).sum().backward()
    assert counted.get_total_flops() == 2 * (2 * 3 * 4 * 4 * 5)


def test_there_is_no_second_derivative() -> None:
    vectors, _ = inputs((2, 4, 3, 0), torch.float64, torch.device("cpu"))
    (gradient,) = torch.autograd.grad(dot_interaction(vectors).square().sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="dot_interaction_backward"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------------------- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    for diagonal, upper in ORDERS:
        assert_close_to_double(*inputs(shape, dtype, device), diagonal, upper)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((127, 4, 16, 8), torch.bfloat16),
        ((1000, 3, 5, 0), torch.float32),
        ((2, 200, 16, 0), torch.float32),
        ((2, 200, 16, 0), torch.bfloat16),
        ((1, 512, 16, 0), torch.bfloat16),
        ((2, 3, 1000, 4), torch.float32),
        ((1, 66, 1000, 0), torch.float32),
    ],
)
def test_larger_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    assert_close_to_double(*inputs(shape, dtype, device), False, False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("vectors", "width"), [(0, 3), (1, 0), (1, 3), (70, 2)])
@pytest.mark.parametrize("samples", [0, 2])
def test_nothing_to_do(samples: int, vectors: int, width: int, device: torch.device) -> None:
    """No samples; one vector, which has no pairs."""
    found = results(*inputs((samples, max(vectors, 1), 8, width), torch.float32, device), False, False, "triton")
    expected = results(*inputs((samples, max(vectors, 1), 8, width), torch.float32, device), False, False, "reference")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def strided(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return the same numbers in another order of dimensions in memory, every second element used."""
    inverse = [order.index(dim) for dim in range(tensor.ndim)]
    wide = torch.stack([tensor.detach().permute(order)] * 2, dim=-1)[..., 0].permute(inverse)
    assert not wide.is_contiguous()
    return wide.requires_grad_()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("vectors", [5, 70])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_any_strides(vectors: int, order: tuple[int, ...], device: torch.device) -> None:
    given, leading = inputs((3, vectors, 20, 6), torch.float32, device)
    assert leading is not None
    expected = results(given, leading, False, False, "triton")
    found = results(strided(given, order), strided(leading, (1, 0)), False, False, "triton")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("vectors", [5, 70])
def test_a_gradient_without_memory_of_its_own(vectors: int, device: torch.device) -> None:
    """A sum gives an expanded one, a layer's a transposed one."""
    given, leading = inputs((3, vectors, 20, 6), torch.float32, device)
    assert leading is not None
    width = 6 + pair_count(vectors, False)
    for grad in (torch.ones((), device=device).expand(3, width), draw((width, 3), torch.float32, device).T):
        out = dot_interaction(given, leading, kernel="triton")
        found = torch.autograd.grad(out, [given, leading], grad, retain_graph=True)
        expected = torch.autograd.grad(out, [given, leading], grad.contiguous())
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("vectors", [5, 70])
def test_a_frozen_input_gets_no_gradient(vectors: int, device: torch.device) -> None:
    given, leading = inputs((3, vectors, 20, 6), torch.float32, device)
    assert leading is not None
    both = torch.autograd.grad(dot_interaction(given, leading, kernel="triton").sum(), [given, leading])
    out = dot_interaction(given.detach(), leading, kernel="triton")
    assert torch.equal(torch.autograd.grad(out.sum(), leading)[0], both[1])
    out = dot_interaction(given, leading.detach(), kernel="triton")
    assert torch.equal(torch.autograd.grad(out.sum(), given)[0], both[0])
    assert not dot_interaction(given.detach(), leading.detach(), kernel="triton").requires_grad


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("vectors", [5, 17, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(vectors: int, bad: float, device: torch.device) -> None:
    given, _ = inputs((6, vectors, 20, 0), torch.float32, device)
    expected = results(given, None, False, False, "triton")
    with torch.no_grad():
        given[3, 1, 2] = bad
    found = results(given, None, False, False, "triton")
    theirs = results(given, None, False, False, "reference")
    others = [0, 1, 2, 4, 5]
    for mine, before, same in zip(found, expected, theirs, strict=True):
        assert torch.equal(mine[others], before[others])
        assert torch.equal(mine[3].isfinite(), same[3].isfinite())
        assert not mine[3].isfinite().all()


@pytest.fixture
def huge(device: torch.device) -> torch.Tensor:
    """Return memory of which only the few pages that are touched exist on a CPU; 6 GiB on a GPU."""
    return torch.empty(3 * 2**30 + 2**12, dtype=torch.float16, device=device)


@pytest.mark.parametrize("vectors", [4, 68])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(huge: torch.Tensor, dim: int, vectors: int) -> None:
    """Strides fit 32 bits, and what they are multiplied to does not."""
    shape = [1, vectors, 3]
    shape[dim] = max(shape[dim], 4)
    strides = [512, 4, 1]
    strides[dim] = 3 * 2**30 // (shape[dim] - 1)
    given = huge.as_strided(shape, strides)
    given.copy_(draw(tuple(shape), torch.float16, huge.device))
    near = given.clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = results(near, None, False, False, "triton")
    found = results(given.detach().requires_grad_(), None, False, False, "triton")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("vectors", [4, 68])
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_of_gradients_beyond_32_bits(huge: torch.Tensor, dim: int, vectors: int) -> None:
    pairs = pair_count(vectors, False)
    near = draw((4, pairs), torch.float16, huge.device)
    strides = (2**30, 1) if dim == 0 else (1, 3 * 2**30 // pairs)
    grad = huge.as_strided((4, pairs), strides)
    grad.copy_(near)
    given = draw((4, vectors, 3), torch.float16, huge.device)
    how = (given, False, False, "triton", False)
    expected = torch.ops.dmt.dot_interaction_backward(near, *how)
    assert torch.equal(torch.ops.dmt.dot_interaction_backward(grad, *how), expected)


@pytest.mark.parametrize("vectors", [4, 68])
def test_offsets_of_outputs_beyond_32_bits(huge: torch.Tensor, vectors: int) -> None:
    """As many pairs as no interaction has, of which the kernel writes those that there are."""
    from dmt_compile.kernels.dot_interaction import triton_kernel

    given = draw((4, vectors, 3), torch.float16, huge.device)
    precision = "interpreted" if huge.device.type == "cpu" else "ieee"
    constants = {"F": vectors, "COLUMNS": 3, "LEADING": 0, "PAIRS": 2**30, "DIAGONAL": False, "UPPER": False}
    constants |= {"R": 16 if vectors == 4 else 64, "D": 16, "E": 16, "PRECISION": precision}
    strides = (*given.stride(), 0, 0)
    if vectors == 4:
        triton_kernel.forward_whole[(2,)](given, given, huge, 4, *strides, **constants, S=2)
    else:
        triton_kernel.forward_tiled[(4 * 3,)](given, given, huge, *strides, **constants)
    found = huge.as_strided((4, pair_count(vectors, False)), (2**30, 1))
    assert torch.equal(found, dot_interaction(given, kernel="triton"))


# --------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("vectors", [5, 70])
@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_opcheck(kernel: str, width: int, vectors: int, device: torch.device) -> None:
    given, leading = inputs((3, vectors, 8, width), torch.float32, device)
    torch.library.opcheck(torch.ops.dmt.dot_interaction.default, (given, leading, False, True, kernel, False))
    grad = draw((3, pair_count(vectors, False)), torch.float32, device)
    how = (grad, given.detach(), False, True, kernel, False)
    torch.library.opcheck(torch.ops.dmt.dot_interaction_backward.default, how)


def test_what_has_no_kernel_and_why(device: torch.device) -> None:
    given, leading = inputs((2, 3, 4, 5), torch.float32, device)
    assert supports(given, leading) is None
    assert supports(given, None) is None
    assert leading is not None
    for reason, vectors, in_front in (
        ("no kernel for float64", given.double(), None),
        ("513 vectors", given[:, :1].expand(2, 513, 4), None),
        ("1025 columns", given[:, :, :1].expand(2, 3, 1025), None),
        ("0 columns", given[:, :, :0], None),
        ("another element type", given, leading.half()),
    ):
        said = supports(vectors, in_front)
        assert said is not None
        assert reason in said


def test_no_kernel_without_triton_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given, leading = inputs((2, 3, 4, 5), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    assert "no kernels for cpu" in str(supports(given, leading))


@pytest.mark.parametrize(("precision", "allowed"), [("highest", False), ("high", True), ("medium", True)])
def test_tf32_where_pytorch_may_use_it(precision: str, allowed: bool) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert allows_tf32() is allowed
    finally:
        torch.set_float32_matmul_precision(before)
