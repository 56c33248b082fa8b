"""Let embeddings and their gradients travel in a narrower form where the user asks for it with ``comm_dtype``.

Each all-to-all states its form on the wire, forward and backward; this pass writes them. Packing and unpacking belong
to the operator: a sum is never made in a narrow form, so an error is made once in each direction and hop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls
from dmt_compile.ir.stages import Effect, Stage


@dataclass(frozen=True)
class CompressCollectives(Pass):
    """Write the forms of ``comm_dtype`` into the all-to-alls of embeddings."""

    name: ClassVar[str] = "compress_collectives"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        notes: list[str] = []
        changed: set[object] = set()
        for node in calls(gm, ex.start_all_to_all):
            tensor, route, hop, group, *own = node.args
            asked = ctx.options.wire_forms(str(hop))
            forms = [wish or form for wish, form in zip(asked, own, strict=True)]
            if forms != own:
                node.args = (tensor, route, hop, group, *forms)
                changed.add(hop)
                notes.append(f"{hop}: {forms[0]} forward, {forms[1]} backward, in place of {own[0]}")
        asked_for = [hop for hop in ctx.options.comm_dtype if hop != "dense" and any(ctx.options.wire_forms(hop))]
        skipped = [(hop, "no exchange of embeddings on this hop") for hop in asked_for if hop not in changed]
        return PassReport(changed=bool(notes), matched=len(notes), skipped=tuple(skipped), notes=tuple(notes))
