"""Give every table a tower, by the plan: the user's, the one agreed on before, or a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmt_compile.errors import PlanError
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, nodes_in
from dmt_compile.ir.stages import Stage
from dmt_compile.plan import TowerPlan


@dataclass(frozen=True)
class PartitionTowers(Pass):
    """Choose the plan; the graph stays as it is."""

    name: ClassVar[str] = "partition_towers"
    needs: ClassVar[Stage] = Stage.FLAT
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Set ``ctx.plan``.

        Raises:
            PlanError: the plan puts the tables of one of a transformed model's towers elsewhere.
        """
        tables = ctx.embedding_graph.table_specs()
        if not tables:
            return PassReport(changed=False, skipped=(("graph", "no table was found"),))
        ctx.plan = ctx.choose_plan(tables)
        self._check_towers(gm, ctx, ctx.plan)
        return PassReport(changed=False, matched=len(tables), notes=ctx.plan.notes)

    def _check_towers(self, gm: fx.GraphModule, ctx: PassContext, plan: TowerPlan) -> None:
        tables = {feature.node: feature.table for feature in ctx.embedding_graph.features}
        for node in calls(gm, ops.tower_input):
            name = str(node.args[1])
            read = [tables[feature.name] for feature in nodes_in(node.args[0])]
            away = [table for table in read if (home := plan.home(table)) is None or home.name != name]
            if away:
                raise PlanError(
                    f"{self.name}: expected the tables of the transformed model's {name} together, found {away[0]} in "
                    "another tower of the plan; compile it with the plan that it was transformed with"
                )
