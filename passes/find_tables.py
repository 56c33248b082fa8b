"""Find the model's embedding tables and turn every lookup into one ``dmt::lookup`` behind one ``dmt::check_batch``.

Matched: ``torch.nn.functional.embedding_bag`` (what ``nn.EmbeddingBag`` calls) on 1-D ids and offsets of a parameter
that is a graph input. Everything else stays as it is, with the reason.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import Feature, Table, source_line
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, ancestors, calls, placeholders, sort_graph
from dmt_compile.ir.stages import Stage

_F = torch.nn.functional
_BAG_DEFAULTS: dict[str, Any] = {
    "input": None,
    "weight": None,
    "offsets": None,
    "max_norm": None,
    "norm_type": 2,
    "scale_grad_by_freq": False,
    "mode": "mean",
    "sparse": False,
    "per_sample_weights": None,
    "include_last_offset": False,
    "padding_idx": None,
}
_EMBEDDING_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class FindTables(Pass):
    """Name tables and features; make lookups canonical."""

    name: ClassVar[str] = "find_tables"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.FLAT

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place and fill ``ctx.embedding_graph``."""
        skipped: list[tuple[str, str]] = []
        bags: list[tuple[fx.Node, dict[str, Any]]] = []
        for node in calls(gm, _F.embedding_bag):
            arguments = {**_BAG_DEFAULTS, **dict(zip(_BAG_DEFAULTS, node.args, strict=False)), **node.kwargs}
            reason = self._reason(arguments, ctx)
            if reason is None:
                bags.append((node, arguments))
            else:
                skipped.append(self._leave(node, reason, arguments, ctx))
        for node in calls(gm, _F.embedding):
            arguments = {**dict(zip(_EMBEDDING_ARGUMENTS, node.args, strict=False)), **node.kwargs}
            skipped.append(self._leave(node, "it is an nn.Embedding, not an nn.EmbeddingBag", arguments, ctx))
        bags = self._consistent(bags, ctx, skipped)
        if bags:
            self._rewrite(gm, ctx, bags)
        return PassReport(changed=bool(bags), matched=len(bags), skipped=tuple(skipped))

    def _reason(self, arguments: dict[str, Any], ctx: PassContext) -> str | None:
        """Say why a bag cannot become a ``dmt::lookup``, or nothing."""
        weight, ids, offsets = arguments["weight"], arguments["input"], arguments["offsets"]
        if weight.name not in ctx.parameters or not isinstance(ctx.parameters[weight.name], torch.nn.Parameter):
            return "its table is not a parameter of the model"
        if ids.meta["val"].ndim != 1 or offsets is None:
            return "its ids are not 1-D with offsets"
        for option in ("max_norm", "per_sample_weights"):
            if arguments[option] is not None:
                return f"it uses {option}"
        for option in ("scale_grad_by_freq", "include_last_offset"):
            if arguments[option]:
                return f"it uses {option}"
        return None

    def _leave(self, node: fx.Node, reason: str, arguments: dict[str, Any], ctx: PassContext) -> tuple[str, str]:
        if arguments.get("sparse") and ctx.distributed and ctx.training:
            raise UnsupportedGraphError(
                f"{self.name}: expected a lookup that can be placed on one rank for {node.name}, found that {reason}, "
                f"and its sparse gradient cannot be averaged over ranks ({source_line(node)}); use sparse=False there"
            )
        return ctx.leave(node, reason, self.name)

    def _consistent(
        self, bags: list[tuple[fx.Node, dict[str, Any]]], ctx: PassContext, skipped: list[tuple[str, str]]
    ) -> list[tuple[fx.Node, dict[str, Any]]]:
        """Keep bags that can be looked up together: same samples, ids known beforehand, tables not used elsewhere."""
        kept = []
        matched = {node for node, _ in bags}
        for node, arguments in bags:
            reason = None
            first_size, size = (a["offsets"].meta["val"].shape[0] for a in (bags[0][1], arguments))
            if torch_internals.canonical_expression(size) != torch_internals.canonical_expression(first_size):
                reason = "its number of bags is not that of the first lookup"
            elif ancestors([arguments["input"], arguments["offsets"]]) & matched:
                reason = "its ids depend on another lookup"
            elif any(user not in matched for user in arguments["weight"].users):
                reason = "its table is used outside lookups too"
            if reason is None:
                kept.append((node, arguments))
            else:
                skipped.append(self._leave(node, reason, arguments, ctx))
        if len(kept) < len(bags):  # what stays may read the table of what was kept
            return self._consistent(kept, ctx, skipped)
        return kept

    def _rewrite(self, gm: fx.GraphModule, ctx: PassContext, bags: list[tuple[fx.Node, dict[str, Any]]]) -> None:
        graph = ctx.embedding_graph
        uses: dict[str, int] = defaultdict(int)
        labels: list[str] = []
        samples = ctx.inputs.get(bags[0][1]["offsets"].name)
        graph.batch_size = len(samples) if isinstance(samples, torch.Tensor) else 0
        for _, arguments in bags:
            weight = arguments["weight"]
            name = ctx.flat_names[weight.name].removesuffix(".weight")
            rows, dim = (int(size) for size in weight.meta["val"].shape)
            dtype = weight.meta["val"].dtype
            graph.add_table(Table(name, weight.name, rows, dim, dtype, ctx.parameters[weight.name]))
            labels.append(name)
        first = bags[0][0]
        size = torch_internals.canonical_expression(bags[0][1]["offsets"].meta["val"].shape[0])
        offsets = [arguments["offsets"] for _, arguments in bags]
        others = [n for n in placeholders(gm) if n not in offsets and self._has_samples(n, size, ctx)]
        graph.checked_inputs = [n.name for n in (*offsets, *others) if n.op == "placeholder"]
        with gm.graph.inserting_before(first):
            checked = ctx.call(
                gm,
                ops.check_batch,
                [arguments["input"] for _, arguments in bags],
                offsets,
                others,
                tuple(int(arguments["weight"].meta["val"].shape[0]) for _, arguments in bags),
                (*labels, *(ctx.flat_names.get(n.name, n.name) for n in others)),
                ctx.options.check_ids,
                like=first,
            )
        for position, (node, arguments) in enumerate(bags):
            with gm.graph.inserting_before(node):
                ids = ctx.call(gm, operator.getitem, checked, position, like=node)
                starts = ctx.call(gm, operator.getitem, checked, len(bags) + position, like=node)
                lookup = ctx.call(
                    gm, ops.lookup, arguments["weight"], ids, starts, None, arguments["mode"], arguments["sparse"],
                    arguments["padding_idx"], like=node,
                )  # fmt: skip
            node.replace_all_uses_with(lookup)
            gm.graph.erase_node(node)
            name = labels[position]
            uses[name] += 1
            feature = name if uses[name] == 1 else f"{name}#{uses[name]}"
            pooling = self._pooling(arguments, ctx)
            graph.add_feature(Feature(feature, name, lookup.name, arguments["mode"], arguments["sparse"], pooling))
        sort_graph(gm)

    def _has_samples(self, node: fx.Node, size: Any, ctx: PassContext) -> bool:
        value = node.meta["val"]
        return (
            node.name not in ctx.parameters
            and isinstance(value, torch.Tensor)
            and value.ndim > 0
            and torch_internals.canonical_expression(value.shape[0]) == size
            and not isinstance(size, int)
        )

    def _pooling(self, arguments: dict[str, Any], ctx: PassContext) -> float:
        """Return the mean ids per bag of the batch that is being compiled for; 1 where it cannot be seen."""
        ids, offsets = (ctx.inputs.get(arguments[key].name) for key in ("input", "offsets"))
        if isinstance(ids, torch.Tensor) and isinstance(offsets, torch.Tensor) and len(offsets):
            return len(ids) / len(offsets)
        return 1.0
