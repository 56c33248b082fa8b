"""Let a lookup write its rows in the type that they travel in, so that no cast has to read and write them again.

Where ``comm_dtype`` asks for a cast on the first hop, a lookup on Triton rounds its sums once, to that type, as it
writes them; gradients come back to it in the same type. The bits are those of the cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Stage
from dmt_compile.kernels.pack_rows.op import CASTS


@dataclass(frozen=True)
class FoldCasts(Pass):
    """Have a Triton lookup write what an exchange would cast."""

    name: ClassVar[str] = "fold_casts"
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        matched, skipped = 0, []
        for exchange in calls(gm, ex.start_all_to_all):
            lookup: Any = exchange.args[0]
            if lookup.target is not ops.batched_lookup or not (forms := _casts(exchange)):
                continue
            if (why := _against(lookup, forms)) is not None:
                skipped.append((exchange.name, why))
                continue
            exchange.kwargs = {**exchange.kwargs, "dtype": lookup.meta["val"].dtype}
            lookup.kwargs = {**lookup.kwargs, "out_dtype": CASTS[forms[0]]}
            ctx.environment.record(lookup, gm)
            matched += 1
        return PassReport(bool(matched), matched, tuple(skipped))


def _casts(exchange: fx.Node) -> list[str]:
    """Return the forms of an exchange, forward and backward, where one of them is a cast of its rows."""
    own = exchange.args[0].meta["val"].dtype  # type: ignore[union-attr]
    forms = [str(form) for form in exchange.args[4:6]]
    return forms if any(form in CASTS and CASTS[form] != own for form in forms) else []


def _against(lookup: fx.Node, forms: list[str]) -> str | None:
    """Return why a lookup cannot write rows as they travel; ``None`` where it can."""
    if lookup.kwargs.get("kernel") != "triton":
        return "its lookup writes rows in the tables' type"
    if len(lookup.users) > 1:
        return "others read its rows too"
    if lookup.meta["val"].dtype != torch.float32:
        return f"rows of {lookup.meta['val'].dtype} would be rounded once where the exchange rounds twice"
    if forms[0] != forms[1]:
        return f"rows travel as {forms[0]}, gradients as {forms[1]}; a tensor's gradient has its type"
    return None
