"""Time on a GPU: alternating contestants on an empty cache, and what the card itself reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 3
CLOCK_HZ = 2e9  # above the clocks of the GPUs here: so many cycles take at least as long as meant
LONGEST_WAIT_S = 0.02
COPY_BYTES = 4 << 30
MATRIX = 8192
MATRIX_TYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Timing:
    """How long a run took.

    Args:
        median_s: on the GPU, from the first kernel's start to the last one's end.
        spread: distance of the quartiles relative to the median; a smaller difference between contestants says nothing.
        host_s: until the call returned, on an idle GPU: what launches cost.
        count: repetitions.
    """

    median_s: float
    spread: float
    host_s: float
    count: int


def set_precision(unit: str) -> None:
    """Let float32 matrix products round their factors to TF32 for ``"tf32"``, and for nothing else."""
    torch.set_float32_matmul_precision("high" if unit == "tf32" else "highest")


def measure(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, least: int = 10, most: int = 100
) -> dict[str, Timing]:
    """Time runs in alternation, by events, each after the cache was overwritten.

    The GPU is made to wait before each run for as long as the host needs to launch it, so that the time holds no gaps
    between launches. A run that waits for the GPU in its middle has its gaps all the same.

    Args:
        runs: name -> function that launches one run; warm, or they are warmed up here.
        device: a CUDA device.
        seconds: about how long all of it may take.
        least: repetitions, at least.
        most: repetitions, at most.
    """
    cache_bytes = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
    other, top = torch.zeros(cache_bytes // 4, device=device), torch.empty((), device=device)
    hosts, began = {}, time.perf_counter()
    for name, run in runs.items():
        hosts[name] = min(_host_s(run) for _ in range(WARM_UPS))
    turn_s = (time.perf_counter() - began) / WARM_UPS
    count = max(least, min(most, int(seconds / (2 * turn_s))))
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.amax(other, 0, out=top)  # read, not written: a run would have to write back what is in the cache
            torch.cuda._sleep(int(min(1.5 * hosts[name], LONGEST_WAIT_S) * CLOCK_HZ))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: timing([start.elapsed_time(end) / 1e3 for start, end in pairs], hosts[name])
        for name, pairs in events.items()
    }


def timing(seconds: list[float], host_s: float) -> Timing:
    """Return the median and the spread of repetitions."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timing(median, (high - low) / median, host_s, len(seconds))


def _host_s(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return took


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches.

    Args:
        bytes_per_s: of a copy inside its memory, read and written bytes counted.
        flops_per_s: of a square matrix product, by unit: ``"bf16"``, ``"tf32"``, ``"fp32"``.
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def floor_s(self, moved_bytes: int, flops: int, unit: str | None) -> tuple[float, str]:
        """Return the least time for bytes and operations, and which of them binds: ``"memory"`` or a unit."""
        times = {"memory": moved_bytes / self.bytes_per_s}
        if unit is not None:
            times[unit] = flops / self.flops_per_s[unit]
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound

    def __str__(self) -> str:
        rates = ", ".join(f"{unit} {rate / 1e12:.0f} TFLOP/s" for unit, rate in self.flops_per_s.items())
        return (
            f"Ceilings, medians of this run: {COPY_BYTES >> 30} GiB copied at {self.bytes_per_s / 1e12:.2f} TB/s, read "
            f"and written bytes counted; products of {MATRIX} x {MATRIX} random matrices: {rates}."
        )


def ceilings(device: torch.device) -> Ceilings:
    """Measure the card."""
    copied = _copy(torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_())
    rates = {}
    for unit, dtype in MATRIX_TYPES.items():
        set_precision(unit)
        factors = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
        rates[unit] = 2 * MATRIX**3 / _product(*factors)
    torch.cuda.empty_cache()
    return Ceilings(2 * COPY_BYTES / copied, rates)


def _copy(source: torch.Tensor) -> float:
    target = torch.empty_like(source)
    return measure({"copy": lambda: target.copy_(source)}, source.device, 0.5)["copy"].median_s


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    out = torch.empty_like(a)
    return measure({"product": lambda: torch.mm(a, b, out=out)}, a.device, 0.5)["product"].median_s


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors take, so that what a run does not write shows."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    large = torch.full((min(free // 2, 8 << 30) // 4,), torch.nan, device=device)
    small = [torch.full((1 << 16,), torch.nan, device=device) for _ in range(64)]
    del large, small


def device_line(device: torch.device) -> str:
    """Return what a result has to be read with: the card and the versions."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, kernels interpreted: no speeds"
    return f"{card}; torch {torch.__version__}, Triton {version}"
