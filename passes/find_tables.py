"""Turn every lookup of an embedding table into one ``dmt::lookup``.

Matched: ``torch.nn.functional.embedding_bag`` and ``embedding`` (``nn.EmbeddingBag`` and ``nn.Embedding`` call them) of
a parameter that is a graph input and is read by lookups alone. Ids become 1-D: a matrix of ids is B bags of L ids for
``embedding_bag``, and B x L bags of one id for ``embedding``. Everything else stays as it is, with the reason. The
lookups of a transformed model are canonical already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import source_line
from dmt_compile.ir.metadata import LOOKUP_RULES
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, ancestors, calls, erase_unused
from dmt_compile.ir.stages import Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling

_F = torch.nn.functional
_BAG_DEFAULTS: dict[str, Any] = {
    "input": None,
    "weight": None,
    "offsets": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "mode": "mean",
    "sparse": False,
    "per_sample_weights": None,
    "include_last_offset": False,
    "padding_idx": None,
}
_EMBEDDING_DEFAULTS: dict[str, Any] = {
    "input": None,
    "weight": None,
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "sparse": False,
}


@dataclass(frozen=True)
class FindTables(Pass):
    """Make lookups canonical."""

    name: ClassVar[str] = "find_tables"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        canonical = calls(gm, ops.lookup)
        for node in canonical:
            self._read_pooling(gm, node)
        lookups = {node: self._arguments(node) for node in calls(gm, *LOOKUP_RULES)}
        skipped: list[tuple[str, str]] = []
        matched = dict(lookups)
        reasons: dict[fx.Node, str] = {}
        while found := {n: r for n, a in matched.items() if (r := self._reason(n, a, matched.keys(), ctx)) is not None}:
            reasons |= found  # what stays may read the table of what was matched before
            matched = {node: arguments for node, arguments in matched.items() if node not in found}
        for node, arguments in lookups.items():
            if node in matched:
                self._rewrite(gm, ctx, node, arguments)
            else:
                skipped.append(self._leave(node, reasons[node], arguments, ctx))
        found_all = len(matched) + len(canonical)
        return PassReport(changed=bool(found_all), matched=found_all, skipped=tuple(skipped))

    def _read_pooling(self, gm: fx.GraphModule, lookup: fx.Node) -> None:
        """Read the last argument of a transformed model's lookup, which Dynamo builds in the graph."""
        built = lookup.args[4]
        if isinstance(built, fx.Node):
            lookup.update_arg(4, Pooling(*built.args, **built.kwargs))  # type: ignore[arg-type]
            erase_unused(gm, built)

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        defaults = _BAG_DEFAULTS if node.target is _F.embedding_bag else _EMBEDDING_DEFAULTS
        return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}

    def _reason(self, node: fx.Node, arguments: dict[str, Any], matched: Any, ctx: PassContext) -> str | None:
        """Say why a lookup cannot become a ``dmt::lookup``, or nothing."""
        weight, ids = arguments["weight"], arguments["input"]
        if weight.name not in ctx.parameters or not isinstance(ctx.parameters[weight.name], torch.nn.Parameter):
            return "its table is not a parameter of the model"
        if isinstance(arguments["max_norm"], fx.Node):
            return "its max_norm is not a constant"
        if any(user not in matched for user in weight.users):
            return "its table is used outside lookups too"
        before = ancestors([node for node in (ids, arguments.get("offsets")) if node is not None])
        if before & matched:
            return "its ids depend on another lookup"
        if not self._reads_batch(ids, ctx):
            return "its ids do not come from the batch"
        if arguments["scale_grad_by_freq"] and node.target is _F.embedding_bag and ctx.distributed:
            return "its bags' gradients are scaled by how often ids occur in each rank's own batch"
        weights = arguments.get("per_sample_weights")
        if weights is not None and ancestors([weights]) & matched:
            return "its per_sample_weights depend on another lookup"
        return None

    def _reads_batch(self, node: fx.Node, ctx: PassContext) -> bool:
        """Tell whether values of the batch are among what a node is made of; their sizes alone do not count."""
        if node.op == "placeholder":
            return node.name in ctx.inputs
        sources = [n for n in node.all_input_nodes if not isinstance(n.meta["val"], int | torch.SymInt | torch.Size)]
        return any(self._reads_batch(source, ctx) for source in sources)

    def _leave(self, node: fx.Node, reason: str, arguments: dict[str, Any], ctx: PassContext) -> tuple[str, str]:
        impossible = None
        if arguments["sparse"] and ctx.training:
            impossible = "its sparse gradient cannot be averaged over ranks", "use sparse=False there"
        elif arguments["max_norm"] is not None:
            impossible = "with max_norm every rank would scale other rows of its copy", "drop max_norm there"
        if impossible is not None and ctx.distributed:
            raise UnsupportedGraphError(
                f"{self.name}: expected a lookup that can be placed on one rank for {node.name}, found that {reason}, "
                f"and {impossible[0]} ({source_line(node)}); {impossible[1]}"
            )
        return ctx.leave(node, reason, self.name)

    def _rewrite(self, gm: fx.GraphModule, ctx: PassContext, node: fx.Node, arguments: dict[str, Any]) -> None:
        ids, offsets, weights = (arguments.get(key) for key in ("input", "offsets", "per_sample_weights"))
        bag = node.target is _F.embedding_bag
        assert isinstance(ids, fx.Node)
        shape = ids.meta["val"].shape
        how = Pooling(
            mode=arguments["mode"] if bag else "none",
            sparse=arguments["sparse"],
            padding_idx=self._row(arguments, "padding_idx"),
            padding_counts=not bag,
            max_norm=None if arguments["max_norm"] is None else float(arguments["max_norm"]),
            norm_type=2.0 if arguments["max_norm"] is None else float(arguments["norm_type"]),
            scale_grad_by_freq=arguments["scale_grad_by_freq"],
            last_offset=bool(arguments.get("include_last_offset")),
        )
        with gm.graph.inserting_before(node):
            if bag and len(shape) == 2:
                offsets = ctx.call(gm, ops.even_offsets, ids, like=node)
            if len(shape) != 1:
                ids = ctx.call(gm, torch.reshape, ids, (-1,), like=node)
                weights = None if weights is None else ctx.call(gm, torch.reshape, weights, (-1,), like=node)
            out = ctx.call(gm, ops.lookup, arguments["weight"], ids, offsets, weights, how, like=node)
            if not bag and len(shape) != 1:
                sizes = [self._size(gm, ctx, arguments["input"], dim) for dim in range(len(shape))]
                out = ctx.call(gm, torch.reshape, out, (*sizes, int(out.meta["val"].shape[1])), like=node)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)

    def _size(self, gm: fx.GraphModule, ctx: PassContext, ids: fx.Node, dim: int) -> int | fx.Node:
        size = ids.meta["val"].shape[dim]
        return size if isinstance(size, int) else ctx.call(gm, torch.ops.aten.sym_size.int, ids, dim, like=ids)

    def _row(self, arguments: dict[str, Any], key: str) -> int | None:
        """Return a row number counted from the front."""
        row = arguments[key]
        return None if row is None else int(row) % int(arguments["weight"].meta["val"].shape[0])
