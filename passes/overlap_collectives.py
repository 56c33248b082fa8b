"""Order the graph so that exchanges start as early, and are waited for as late, as the data allows.

The chain that leads to the last exchange (ids, lookup, in-host exchange, Tower Modules) comes first; dense regions that
need no embedding run once the last exchange is on its way; only then is it waited for. The backward pass follows from
the order, since autograd takes, of what is ready, what was made last: gradients of the embeddings start to travel as
soon as the over-arch gives them, the bottom layers' backward runs in the meantime, and then they are waited for.

This pass comes last because a dense region is what it moves.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import fx

from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, ancestors, calls, mutates
from dmt_compile.ir.stages import Stage

_FIRST, _START, _CHAIN, _WAIT_IN_CHAIN, _OTHER, _LAST_WAIT = range(6)


@dataclass(frozen=True)
class OverlapCollectives(Pass):
    """Reorder nodes by what they do for exchanges."""

    name: ClassVar[str] = "overlap_collectives"
    needs: ClassVar[Stage] = Stage.LOWERED
    gives: ClassVar[Stage] = Stage.LOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Reorder ``gm``'s nodes in place."""
        starts, gradients = calls(gm, ex.start_all_to_all), calls(gm, gradient_ops.start_gradients)
        if not starts and not gradients:
            return PassReport(changed=False, skipped=(("graph", "no exchange"),))
        chain = ancestors(starts)
        nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
        before = self._order(nodes)
        urgency = {node: self._urgency(node, chain) for node in nodes}
        ordered: list[fx.Node] = []
        waiting = {node: len(before[node]) for node in nodes}
        after: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for node in nodes:
            for earlier in before[node]:
                after[earlier].append(node)
        place = {node: index for index, node in enumerate(nodes)}
        ready = [(urgency[node], place[node]) for node in nodes if not waiting[node]]
        heapq.heapify(ready)
        while ready:
            node = nodes[heapq.heappop(ready)[1]]
            ordered.append(node)
            for later in after[node]:
                waiting[later] -= 1
                if not waiting[later]:
                    heapq.heappush(ready, (urgency[later], place[later]))
        for earlier, later in pairwise(ordered):
            if earlier.next is not later:
                earlier.append(later)
        self._start_late(gm)
        notes = tuple(f"{start.args[2]}: {self._meanwhile(start)}" for start in starts)
        return PassReport(
            changed=ordered != nodes or bool(gradients), matched=len(starts) + len(gradients), notes=notes
        )

    def _urgency(self, node: fx.Node, chain: set[fx.Node]) -> int:
        if node.op == "get_attr" or node.target in (gradient_ops.averaging, gradient_ops.wait_gradients):
            return _FIRST  # what is made first is waited for last
        if node.target is ex.start_all_to_all:
            return _START
        if node in chain:
            return _WAIT_IN_CHAIN if node.target is ex.wait_all_to_all else _CHAIN
        return _LAST_WAIT if node.target is ex.wait_all_to_all else _OTHER

    def _order(self, nodes: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """Return what must stand before each node: its inputs, and, where nodes write in place, those before it."""
        inside = set(nodes)
        before = {node: {source for source in node.all_input_nodes if source in inside} for node in nodes}
        if any(mutates(node) for node in nodes):
            for earlier, later in pairwise(node for node in nodes if node.target not in OPERATORS):
                before[later].add(earlier)
        return before

    def _start_late(self, gm: fx.GraphModule) -> None:
        """Put ``start_gradients`` right before the region that reads it: its backward then follows the region's."""
        places = {node: place for place, node in enumerate(gm.graph.nodes)}
        for start in calls(gm, gradient_ops.start_gradients):
            items = sorted(start.users, key=places.__getitem__)
            readers = [user for item in items for user in item.users]
            if readers:
                first = min(readers, key=places.__getitem__)
                for node in (start, *items):
                    first.prepend(node)

    def _meanwhile(self, start: fx.Node) -> str:
        """Say which regions run while an exchange is under way."""
        found: list[str] = []
        node = start.next
        while node.op != "output" and not (node.target is ex.wait_all_to_all and node.args[0] is start):
            found += [str(node.target)] if node.op == "call_module" else []
            node = node.next
        return f"{', '.join(found)} meanwhile" if found else "waited for at once"
