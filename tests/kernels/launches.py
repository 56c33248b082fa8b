"""Compile, for a GPU that is not here, every kernel as the operators launch it: their arguments, types and ``None``s.

Run in a process of its own, ``python -m tests.kernels.launches``: a stand-in for the GPU's driver takes the launches,
which compile and do not run. Memory that nothing wrote is zero. Prints the kernels that each operator launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import dmt_compile
from dmt_compile.kernels import choice, triton_support
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup
from dmt_compile.kernels.cross_layer.op import cross_tail
from dmt_compile.kernels.dot_interaction.op import dot_interaction
from dmt_compile.kernels.pack_rows.op import FORMATS, pack_rows, unpack_rows
from dmt_compile.kernels.update_rows.op import update_rows
from dmt_compile.kernels.update_rows.reference import STEPS, Hyper
from tests.models import DLRM, make_batch

SHARED_BYTES = 227 * 1024  # of a block, at most, on sm_90
TYPES = (torch.float32, torch.bfloat16)


class Driver:
    """Answers as the driver of an sm_90 would."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def trained(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def look_up(
    modes: list[str], lengths: list[int], dtype: torch.dtype, id_dtype: torch.dtype, weighted: bool, *wire: Any
) -> None:
    """Look up features with these bags, forward and backward; gradients of narrow rows are sparse."""
    bags, ends = len(lengths), torch.tensor(lengths).cumsum(0)
    offsets, number = (ends - torch.tensor(lengths)).to(id_dtype), int(ends[-1])
    single = [mode == "none" for mode in modes]
    out = batched_lookup(
        [trained((10, 16), dtype) for _ in modes],
        [torch.randint(0, 10, (bags if one else number,), dtype=id_dtype) for one in single],
        [None if one else offsets for one in single],
        tuple(Pooling(mode, dtype is not torch.float32) for mode in modes),
        bags,
        [trained((number,), dtype) if weighted else None for _ in modes],
        "triton",
        *wire,
    )
    out.sum().backward()


def lookups() -> None:
    """Short bags and long ones, all poolings, plain, weighted, and in the type and order of an exchange."""
    for types in zip(TYPES, (torch.int64, torch.int32), strict=True):
        for lengths in ([1, 2, 3, 0], [3, 600, 0, 2, 700, 1]):
            look_up(["sum", "sum"], lengths, *types, False)
            look_up(["sum", "mean", "max", "none"], lengths, *types, False)
            look_up(["sum"], lengths, *types, True)
            look_up(["sum", "max", "none"], lengths, *types, False, torch.float16, torch.randperm(len(lengths)))


def interactions() -> None:
    for dtype in TYPES[:1]:
        for vectors, width in ((3, 5), (27, 128), (70, 40)):
            dot_interaction(trained((4, vectors, width), dtype), None, True, False, "triton", False).sum().backward()
            leading = trained((4, 7), dtype)
            dot_interaction(trained((4, vectors, width), dtype), leading, False, True, "triton", True).sum().backward()


def crosses() -> None:
    for dtype in TYPES:
        for width in (5, 1024):
            for bias in (None, trained((width,), dtype)):
                x0, wx, x = (trained((9, width), dtype) for _ in range(3))
                cross_tail(x0, wx, bias, x, bias is not None, "triton").sum().backward()


def packs() -> None:
    for dtype in TYPES[:1]:
        for form in FORMATS:
            for rows_NW in (torch.randn(6, 64), torch.randn(5, 6).t(), torch.randn(2, 10_000)):
                packed_NP = pack_rows(rows_NW.to(dtype), form, "triton")
                unpack_rows(packed_NP, form, rows_NW.shape[1], dtype, "triton")


def updates() -> None:
    for dtype in TYPES:
        for kind in STEPS:
            widths = {"sgd": [], "sparse_adam": [16, 16], "row_wise_adagrad": [1], "adagrad": [16]}[kind]
            states = [torch.zeros(10, width, dtype=torch.float32 if width == 1 else dtype) for width in widths]
            hyper = Hyper(0.1, 1, 1e-8, stochastic_rounding=dtype is torch.bfloat16)
            rows_U = torch.tensor([2, 5])
            update_rows(
                kind, torch.randn(10, 16).to(dtype), states, rows_U, torch.randn(2, 16).to(dtype), hyper, "triton"
            )


def programs() -> None:
    """What a compiled model launches, with the arguments that it has at a step."""
    world, model = dmt_compile.SimulatedWorld("2x2"), DLRM()
    batches = [make_batch(model, samples, torch.Generator().manual_seed(0)) for samples in (3, 0, 2, 5)]
    comm_dtype = {"intra": "bfloat16", "peer": ("int8", "float16")}
    outputs = world.run(model, batches, dense_compiler="eager", kernels="triton", comm_dtype=comm_dtype)
    torch.cat(outputs).sum().backward()


OPERATORS: dict[str, Callable[[], None]] = {
    "batched_lookup": lookups, "cross_layer": crosses, "dot_interaction": interactions, "pack_rows": packs,
    "programs": programs, "update_rows": updates,
}  # fmt: skip


def take_launches() -> set[str]:
    """Compile instead of launching; return the set that the names of launched kernels are put into."""
    launched: set[str] = set()
    run = jit.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        assert compiled.metadata.shared <= SHARED_BYTES, (kernel, compiled.metadata.shared)
        launched.add(kernel.__name__)

    def zeros_of_kernels(make: Callable[..., Any], zeros: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            caller = str(sys._getframe(1).f_globals["__name__"])
            return (zeros if caller.startswith("dmt_compile.kernels.") else make)(*args, **options)

        return call

    driver.set_active(Driver())
    jit.JITFunction.run = compile_only
    for module in (triton_support, choice):
        module.why_not = lambda device: None  # type: ignore[attr-defined]
    torch.empty = zeros_of_kernels(torch.empty, torch.zeros)
    torch.empty_like = zeros_of_kernels(torch.empty_like, torch.zeros_like)
    torch.Tensor.new_empty = zeros_of_kernels(torch.Tensor.new_empty, torch.Tensor.new_zeros)  # type: ignore[method-assign]
    return launched


if __name__ == "__main__":
    launched = take_launches()
    torch.manual_seed(0)
    found = {}
    for operator, launch in OPERATORS.items():
        launched.clear()
        launch()
        found[operator] = sorted(launched)
    print(json.dumps(found))
