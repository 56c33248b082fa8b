"""Write the tables' placements onto their graph inputs: the shard that the plan gives to a rank of the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, placeholders
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class PlaceTables(Pass):
    """Annotate table inputs with ``meta["shards"]``: table name -> shards."""

    name: ClassVar[str] = "place_tables"
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Annotate ``gm``'s inputs.

        Raises:
            UnsupportedGraphError: a table has several shards; what is split is written as pieces, tables of their own.
        """
        inputs = {node.name: node for node in placeholders(gm)}
        tables = ctx.embedding_graph.tables
        for table in tables:
            assert ctx.plan is not None
            shards = ctx.plan.placements[table.name]
            if len(shards) != 1:
                raise UnsupportedGraphError(
                    f"{self.name}: expected one shard for table {table.name}, found {len(shards)}; "
                    "write its parts as tables of their own, such as emb[0:500] or emb[:, 0:32]"
                )
            inputs[table.placeholder].meta.setdefault("shards", {})[table.name] = shards
        return PassReport(changed=bool(tables), matched=len(tables))
