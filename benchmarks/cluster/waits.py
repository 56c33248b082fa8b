"""Seconds that a rank waits in collectives, by the collective's name, measured around ``torch.distributed``.

What PyTorch starts in C++, DistributedDataParallel's all-reduce, is not seen here.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

NAMES = (
    "all_to_all_single",
    "all_to_all",
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
)


class _TimedWork:
    """A collective under way whose ``wait`` is timed; anything else is the collective's own."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._add(time.perf_counter() - start)

    @property
    def __class__(self) -> Any:  # TorchRec waits for nothing but a dist.Work
        return dist.Work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Waits:
    """The seconds so far; ``install`` puts it in the way of this process's collectives."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def install(self) -> None:
        """Wrap the collectives of ``torch.distributed``; they are looked up there at each call."""
        for name in NAMES:
            setattr(dist, name, self.timed(name, getattr(dist, name)))

    def timed(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective that adds what its caller waits."""

        def add(seconds: float) -> None:
            self.seconds[name] += seconds

        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            work = collective(*args, **kwargs)
            add(time.perf_counter() - start)
            return work if work is None else _TimedWork(work, add)

        return call
