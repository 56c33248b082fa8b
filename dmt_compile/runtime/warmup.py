"""Compiles a model before its training loop, so that its Tower Modules are there for the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.runtime.program import Program, observing
from dmt_compile.runtime.session import world_size


def warmup(compiled: nn.Module, batch: Any, *, kwargs: Mapping[str, Any] | None = None) -> None:
    """Run one forward pass of a compiled model, and leave its buffers and the random numbers as they were.

    After it, parameters that the compiler adds (``dmt_towers``) exist, and tables are sharded: build the optimizer now.

    Args:
        compiled: what ``torch.compile(model, backend="dmt")`` returned; it is compiled for its present mode.
        batch: one local batch: a tuple is positional arguments, anything else the one argument.
        kwargs: keyword arguments of the model.

    Raises:
        UnsupportedGraphError: there are several ranks, and Dynamo ran the model as it is: each rank would train alone.
        DmtError: what compiling or running the program raises.

    Cost: compilation and one forward pass; a collective call where there are several ranks.
    """
    programs: list[Program] = []
    positional = batch if isinstance(batch, tuple) else (batch,)
    before = [(buffer, buffer.clone()) for buffer in compiled.buffers()]
    try:
        with torch.enable_grad(), torch.random.fork_rng(), observing(lambda program, _: programs.append(program)):
            compiled(*positional, **(kwargs or {}))
    finally:
        for buffer, values in before:
            buffer.data.copy_(values)
    if world_size() > 1 and not programs:
        raise UnsupportedGraphError(
            "warmup: expected Dynamo to compile the model, found that it ran it as it is, on each rank alone; "
            "TORCH_LOGS=recompiles,graph_breaks shows why"
        )
