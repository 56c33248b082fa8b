"""What the tests of kernels share: the devices they run on, and memory that shows what was not written."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return where a Triton kernel runs: on a GPU, or on a CPU in the interpreter."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels were imported for the GPU that is here: the same test runs there")
    return torch.device(request.param)


@pytest.fixture
def run_compiling() -> Callable[..., Any]:
    """Return a function that runs a module with arguments and returns the JSON that it prints.

    In another process, without Triton's interpreter: interpreted kernels cannot be compiled.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(module: str, *arguments: str) -> Any:
        command = [sys.executable, "-m", module, *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that what an operator does not write shows."""
    new_empty: Callable[..., torch.Tensor] = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *sizes: Any, **options: Any) -> torch.Tensor:
        made = new_empty(tensor, *sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    def from_nothing(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned_too(*args: Any, **options: Any) -> torch.Tensor:
            made = make(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned_too

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, from_nothing(getattr(torch, name)))


@pytest.fixture
def far_apart() -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that copies a matrix into rows so far apart that the last begins behind 2^31 elements.

    The distance itself fits 32 bits where there are several rows, so that its product with a row's number is what must
    not be computed in 32. The memory between rows is not touched: on a CPU it takes addresses, and no pages.
    """

    def spread(rows: torch.Tensor) -> torch.Tensor:
        stride = 16 * (2**31 // (16 * (len(rows) - 1)) + 1)
        elements = stride * (len(rows) - 1) + rows.shape[1]
        if rows.device.type == "cpu":
            memory = mmap.mmap(-1, elements * rows.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            flat = torch.frombuffer(memory, dtype=rows.dtype)
        else:
            flat = rows.new_empty(elements)
        out = flat.as_strided(rows.shape, (stride, 1))
        return out.copy_(rows)

    return spread
