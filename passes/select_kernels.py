"""Choose which implementation of each operator runs, from its types, sizes and device, and say why.

Operators with several implementations take a keyword ``kernel``, which this pass writes. Sizes of a batch are not known
here: one graph serves all. What dense regions hold is chosen where it is recognised, by ``fuse_interaction`` and
``fuse_cross``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.batched_lookup import fbgemm
from dmt_compile.kernels.batched_lookup import op as batched_lookup
from dmt_compile.kernels.choice import REFERENCE, Choice, choose, fails
from dmt_compile.kernels.pack_rows import op as pack_rows


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Write the chosen kernel into each lookup and each exchange that packs rows."""

    kernels: str = "auto"

    name: ClassVar[str] = "select_kernels"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        chosen: Counter[str] = Counter()
        reordered = False
        notes: list[str] = []
        for node in calls(gm, ops.batched_lookup, ex.start_all_to_all):
            choice = self._lookup(node, ctx) if node.target is ops.batched_lookup else self._exchange(node)
            if choice is None:
                continue
            chosen[choice.kernel] += 1
            reordered |= node.target is ops.batched_lookup and choice.kernel == "triton"  # others give the same bits
            notes.append(f"{node.name}: {choice}")
            if choice.kernel != REFERENCE:
                node.kwargs = {**node.kwargs, "kernel": choice.kernel}
        changed = bool(chosen.keys() - {REFERENCE})
        effect = Effect.REORDERED if reordered else Effect.EXACT
        return PassReport(changed, chosen.total(), effect=effect, notes=tuple(notes))

    def _lookup(self, node: fx.Node, ctx: PassContext) -> Choice:
        values: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
        tables, ids, offsets, weights, pooling, _ = values
        lookups = tables, ids, offsets, tuple(pooling), weights

        def offer(kernel: str, refuse: Any) -> Callable[[], str | None]:
            few = (
                kernel == "fbgemm" and self.kernels == "auto" and fbgemm.too_few(len(tables) // ctx.topology.world_size)
            )
            return lambda: few or refuse(*lookups) or fails(kernel, lambda: batched_lookup.try_out(kernel, *lookups))

        offered = {kernel: offer(kernel, refuse) for kernel, refuse in batched_lookup.KERNELS.items()}
        return choose(self.kernels, node.meta["val"].device, offered)

    def _exchange(self, node: fx.Node) -> Choice | None:
        """Choose what packs the rows of an exchange; ``None`` where they travel as they are."""
        tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
        own = str(tensor.dtype).removeprefix("torch.")
        forms = ({str(form) for form in node.args[4:6]} - {own}) & set(pack_rows.FORMATS)
        if not forms:
            return None

        def refuse() -> str | None:
            of = tensor.dtype, tensor.device
            tried = (fails("triton", partial(pack_rows.try_out, form, 64, *of)) for form in sorted(forms))
            return pack_rows.supports(*of) or next(filter(None, tried), None)

        return choose(self.kernels, tensor.device, {"triton": refuse})
