"""Give every table a tower, by the plan: the user's, the one agreed on before, or a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmt_compile.ir.pass_base import Pass, PassContext, PassReport
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class PartitionTowers(Pass):
    """Choose the plan; the graph stays as it is."""

    name: ClassVar[str] = "partition_towers"
    needs: ClassVar[Stage] = Stage.FLAT
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Set ``ctx.plan``."""
        tables = ctx.embedding_graph.table_specs()
        if not tables:
            return PassReport(changed=False, skipped=(("graph", "no table was found"),))
        ctx.plan = ctx.choose_plan(tables)
        return PassReport(changed=False, matched=len(tables), notes=ctx.plan.notes)
