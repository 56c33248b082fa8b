"""Hand each dense region to the dense compiler as one piece.

A region holds the dense nodes with the same number of dmt operators before them: what needs no embedding (the bottom
MLP) is one, what needs the embeddings (interaction, over-arch) another, so that the first can run while embeddings
travel. In training a region is cut for each further bucket of gradients, so that those of the last layers leave while
the layers before them are still run back. With one rank nothing travels and all is one region. Nodes that feed ids into
lookups, and lookups with sparse gradients that stayed flat (a sparse gradient cannot cross a traced region), stay in
the outer program.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.embedding_graph import source_line
from dmt_compile.ir.exchange_ops import run_towers
from dmt_compile.ir.gradient_ops import start_gradients
from dmt_compile.ir.levels import is_operator, is_sparse, levels
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, ancestors, calls, sort_graph
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.writes import unordered_readers
from dmt_compile.runtime.regions import DenseRegion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileDenseRegions(Pass):
    """Cut the dense nodes into regions and compile each."""

    dense_compiler: str = "inductor"

    name: ClassVar[str] = "compile_dense_regions"
    effect: ClassVar[Effect] = Effect.REORDERED
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.LOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        skipped: list[tuple[str, str]] = []
        regions = self._regions(gm, ctx)
        self._check_writes(gm, regions)
        jobs: list[tuple[str, fx.Node, DenseRegion, list[Any]]] = []
        for index, nodes in enumerate(regions):
            region, inputs = self._extract(gm, ctx, nodes, f"dense_{index}")
            jobs.append((f"dense_{index}", nodes[-1], region, [node.meta["val"] for node in inputs]))
        jobs += self._towers(gm, ctx)
        for name, node, region, fakes in jobs:
            reason = region.compile_for(fakes, ctx.environment.mode)
            if reason is not None:
                line = ctx.leave(node, f"{self.dense_compiler} failed: {reason}", self.name)
                logger.warning("compile_dense_regions: %s runs in eager mode: %s", name, line[1])
                skipped.append(line)
        sort_graph(gm)
        effect = Effect.EXACT if self.dense_compiler == "eager" else Effect.REORDERED
        return PassReport(bool(jobs), len(jobs), tuple(skipped), effect)

    def _towers(self, gm: fx.GraphModule, ctx: PassContext) -> list[tuple[str, fx.Node, DenseRegion, list[Any]]]:
        """Return the Tower Modules that this rank runs, which are regions already."""
        found = []
        for node in calls(gm, run_towers):
            args: Any = node.args
            _, route, towers, regions, given = args
            mine = None if ctx.rank is None else route.meta["val"].layout.topology.host_of(ctx.rank)
            for tower in towers:
                if tower.region >= 0 and mine in (None, tower.group):
                    region = regions[tower.region].meta["val"]
                    start = next(iter(region.graph_module.graph.nodes)).meta["val"]
                    fakes = [start, *(n.meta["val"] for n in given[tower.region])]
                    found.append((str(regions[tower.region]), node, region, fakes))
        return found

    def _regions(self, gm: fx.GraphModule, ctx: PassContext) -> list[list[fx.Node]]:
        outer = {n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr", "output") or is_sparse(n)}
        special = {n for n in gm.graph.nodes if is_operator(n)}
        feeding = ancestors([source for node in special for source in node.all_input_nodes])
        level = levels(gm)
        by_level: dict[int, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node in outer or node in special or node in feeding or self._reads_operator(node):
                continue
            by_level[level[node] if ctx.distributed else 0].append(node)
        begun: set[fx.Node] = set()
        return [piece for number in sorted(by_level) for piece in self._at_buckets(by_level[number], begun)]

    def _check_writes(self, gm: fx.GraphModule, regions: list[list[fx.Node]]) -> None:
        """Refuse a write in place whose readers would not all stay before or behind it."""
        region_of = {node: number for number, nodes in enumerate(regions) for node in nodes}
        for write, reader in unordered_readers(gm, region_of):
            raise UnsupportedGraphError(
                f"{self.name}: expected {reader.name} ({source_line(reader)}) in one region with {write.name}, which "
                f"writes in place to what it reads ({source_line(write)}), found them in parts of the program that run "
                "in another order; write that line out of place"
            )

    def _at_buckets(self, nodes: list[fx.Node], begun: set[fx.Node]) -> list[list[fx.Node]]:
        """Cut a region where it begins to read a bucket of parameters, but for its first.

        The backward of a piece is all that the gradients of its bucket wait for; those of a whole region would leave
        together, when the last of them is there. Pieces depend on earlier ones alone.

        Args:
            nodes: of the region.
            begun: buckets that regions before it read, which cut nothing here; those of this one are added.
        """
        buckets = {node: [b for b in self._buckets_of(node) if b not in begun] for node in nodes}
        places = {bucket: place for place, bucket in enumerate(dict.fromkeys(chain.from_iterable(buckets.values())))}
        begun.update(places)
        pieces: dict[int, list[fx.Node]] = defaultdict(list)
        piece: dict[fx.Node, int] = {}
        for node in nodes:
            before = (piece[source] for source in node.all_input_nodes if source in piece)
            piece[node] = max(chain(before, (places[bucket] for bucket in buckets[node])), default=0)
            pieces[piece[node]].append(node)
        return [pieces[number] for number in sorted(pieces)]

    def _buckets_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the buckets of parameters that a node reads from."""
        sources: list[Any] = [item.args[0] for item in node.all_input_nodes if self._reads_operator(item)]
        return [source for source in sources if source.target is start_gradients]

    def _reads_operator(self, node: fx.Node) -> bool:
        """Tell whether a node takes one of the values of an operator that returns several."""
        return node.target is operator.getitem and getattr(node.args[0], "target", None) in OPERATORS

    def _extract(
        self, gm: fx.GraphModule, ctx: PassContext, nodes: list[fx.Node], name: str
    ) -> tuple[DenseRegion, list[fx.Node]]:
        """Move nodes into a submodule and call it in their place."""
        inside = set(nodes)
        inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for source in inputs:
            copies[source] = graph.placeholder(source.name)
            copies[source].meta["val"] = source.meta["val"]
        for node in nodes:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if ctx.environment.trusted(node):
                ctx.environment.trust(copies[node])
        graph.output(tuple(copies[node] for node in outputs))
        region = DenseRegion(fx.GraphModule(gm, graph, class_name=name), self.dense_compiler)
        gm.add_submodule(name, region)
        with gm.graph.inserting_after(nodes[-1]):
            call = gm.graph.call_module(name, tuple(inputs))
        call.meta["val"] = tuple(node.meta["val"] for node in outputs)
        for index, node in enumerate(outputs):
            with gm.graph.inserting_after(call):
                item = gm.graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            users: list[Any] = [user for user in node.users if user not in inside]
            for user in users:
                user.replace_input_with(node, item)
        for node in reversed(nodes):
            gm.graph.erase_node(node)
        return region, inputs
