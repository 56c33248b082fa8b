"""Let a lookup write its rows in the order of the next exchange, so that no permute has to read and write them again.

With ids exchanged among all ranks at once, rows come in the order of ranks and leave in the order of peers
(``peer_permute``, step c). A lookup on Triton writes each bag's row wherever it is told to, at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class FoldPermutes(Pass):
    """Replace a permute of rows that a Triton lookup wrote by another order of its rows."""

    name: ClassVar[str] = "fold_permutes"
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        matched, skipped = 0, []
        for permute in calls(gm, ex.peer_permute):
            lookup: Any = permute.args[0]
            if lookup.target is not ops.batched_lookup or len(lookup.users) > 1:
                skipped.append((permute.name, f"its rows come from {lookup.name}, or others read them too"))
            elif lookup.kwargs.get("kernel") != "triton":
                skipped.append((permute.name, "its lookup writes rows in their own order"))
            else:
                lookup.kwargs = {**lookup.kwargs, "peer_order": True}
                permute.replace_all_uses_with(lookup)
                gm.graph.erase_node(permute)
                matched += 1
        return PassReport(bool(matched), matched, tuple(skipped))
