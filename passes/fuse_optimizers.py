"""Tell which optimizers in the backward pass the lookups do themselves, on the rows that they read, and which not.

An optimizer may come after a program was compiled, and its options may change, so each step asks
``runtime.in_backward`` again; this pass records what holds now. Nothing is rewritten: a table's optimizer is found at
its parameter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime.in_backward import why_not


@dataclass(frozen=True)
class FuseOptimizers(Pass):
    """Name the tables whose optimizer's step is done by their lookup, and the reason where it is not."""

    name: ClassVar[str] = "fuse_optimizers"
    effect: ClassVar[Effect] = Effect.REORDERED  # gradients of a table may be added up in another order
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Look at ``gm``; changed stands for the steps that another code does."""
        if not ctx.training:
            return PassReport(changed=False, effect=Effect.EXACT)
        fused: dict[str, list[str]] = defaultdict(list)
        skipped: list[tuple[str, str]] = []
        exact = True
        for table, lookups in _lookups(gm).items():
            parameter = ctx.parameters[table.name]
            optimizers = torch_internals.in_backward_optimizers(parameter)
            if not optimizers or not parameter.requires_grad:
                continue
            name = ctx.flat_names[table.name].removesuffix(".weight")
            reason = why_not(parameter, lookups[0]) if len(lookups) == 1 else _SEVERAL
            if reason is not None:
                skipped.append((name, reason))
                continue
            fused[type(optimizers[0]).__name__].append(name)
            exact = exact and _as_pytorch(parameter, optimizers[0], lookups[0])
        notes = tuple(
            f"{optimizer} steps in the backward pass of the lookups, without gradients, for {len(names)} tables: "
            + ", ".join(names)
            for optimizer, names in fused.items()
        )
        matched = sum(map(len, fused.values()))
        return PassReport(bool(fused), matched, tuple(skipped), Effect.EXACT if exact else None, notes)


_SEVERAL = "lookups with other numbers of bags read it too, and only all together give its gradient"


def _lookups(gm: fx.GraphModule) -> dict[fx.Node, list[list[Pooling]]]:
    """Return for each table, of each operator that reads it, the lookups."""
    found: dict[fx.Node, list[list[Pooling]]] = defaultdict(list)
    for node in calls(gm, ops.batched_lookup):
        of_node: dict[fx.Node, list[Pooling]] = defaultdict(list)
        for table, how in zip(node.args[0], node.args[4], strict=True):  # type: ignore[arg-type]
            of_node[table].append(how)
        for table, lookups in of_node.items():
            found[table].append(lookups)
    return found


def _as_pytorch(parameter: torch.Tensor, optimizer: torch.optim.Optimizer, lookups: list[Pooling]) -> bool:
    """Tell whether a step is bitwise the optimizer's own.

    It adds up sparse gradients in PyTorch's order, but for SGD, which does not add them up before it takes them.
    """
    wide = parameter.dtype in (torch.float32, torch.float64)
    return wide and all(how.sparse for how in lookups) and not isinstance(optimizer, torch.optim.SGD)
