"""PyTorch's compilers, called from inside a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def _own_tracing_context(mode: FakeTensorMode) -> Iterator[None]:
    # Dynamo's context holds another fake mode; a region compiled in it fails with "Mixing fake modes".
    with tracing(TracingContext(mode)):
        yield


def compile_with_inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """Compile a graph for training or inference with Inductor; ``inputs`` are fakes of ``mode``."""
    from torch._inductor.compile_fx import compile_fx

    with _own_tracing_context(mode):
        compiled: Callable[..., Any] = compile_fx(gm, list(inputs))  # type: ignore[assignment]
        return compiled


def aot_module(gm: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """Trace forward and backward of a graph ahead of time and run them unfused; ``inputs`` are fakes of ``mode``."""
    from torch._dynamo.backends.debugging import aot_eager

    with _own_tracing_context(mode):
        compiled: Callable[..., Any] = aot_eager(gm, list(inputs))
        return compiled
