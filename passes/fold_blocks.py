"""Let features be read where the last exchange put them, so that blocks are not first laid side by side.

What an exchange delivers is one block after another, and a feature is a range of columns of one of them. Where nothing
reads several features as one slice, joining the blocks copies every feature, and its backward pass copies and scales
every gradient, once more than the model asks for. This runs after ``fold_joins``, which looks for such slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, erase_unused, views_of
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class FoldBlocks(Pass):
    """Replace a split of joined blocks by views of the blocks."""

    name: ClassVar[str] = "fold_blocks"
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        matched, skipped = 0, []
        for split in calls(gm, ops.split_features):
            joined: Any = split.args[0]
            scaled = joined if joined.target is gradient_ops.scale_gradient else None
            if scaled is not None:
                joined = scaled.args[0]
            between = [joined] if scaled is None else [joined, scaled]
            if joined.target is not ex.join_blocks:
                skipped.append((split.name, f"its features come from {joined.name}, not from blocks"))
            elif any(len(node.users) > 1 for node in between):
                skipped.append((split.name, "several features are read as one slice"))
            else:
                with gm.graph.inserting_before(split):
                    factor = 1.0 if scaled is None else scaled.args[1]
                    new = ctx.call(gm, ex.split_blocks, *joined.args, factor, *split.args[2:], like=split)
                split.replace_all_uses_with(new)
                erase_unused(gm, split)
                self._restride(gm, ctx, new)
                matched += 1
        return PassReport(bool(matched), matched, tuple(skipped))

    @staticmethod
    def _restride(gm: fx.GraphModule, ctx: PassContext, split: fx.Node) -> None:
        """Record the columns and their views anew: rows lie as far apart as those of a block."""
        columns = {view for item in split.users for view in views_of(item)}
        for node in gm.graph.nodes:
            if node in columns:
                ctx.environment.record(node, gm)
