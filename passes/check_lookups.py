"""Group the lookups that can be looked up and exchanged together, put one ``dmt::check_batch`` before each group, and
name tables and features.

A group is the lookups with the same number of bags: one for the samples, another for the positions of a sequence that
is used before it is pooled. Nothing else than its own ``check_batch`` gives ids and offsets to a lookup after this.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import Feature, Table
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, placeholders, sort_graph
from dmt_compile.ir.stages import Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling


@dataclass(frozen=True)
class CheckLookups(Pass):
    """Insert checks; name tables and features."""

    name: ClassVar[str] = "check_lookups"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.FLAT

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place and fill ``ctx.embedding_graph``."""
        lookups = calls(gm, ops.lookup)
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for lookup in lookups:
            groups[torch_internals.canonical_expression(lookup.meta["val"].shape[0])].append(lookup)
        real = self._real_sizes(gm, ctx)
        samples = self._samples(gm, ctx, groups)
        ctx.embedding_graph.batch_size = real.get(samples, 0)
        uses: Counter[str] = Counter()
        for number, (size, members) in enumerate(groups.items()):
            bags = self._value(size, real) / max(real.get(samples, 0), 1) or 1.0
            for lookup in members:
                self._name(lookup, ctx, uses, number, bags if size != samples else 1.0, real)
            self._check(gm, ctx, members, size)
        sort_graph(gm)
        return PassReport(changed=bool(lookups), matched=len(lookups))

    def _samples(self, gm: fx.GraphModule, ctx: PassContext, groups: dict[Any, list[fx.Node]]) -> Any:
        """Return the number of samples, as an expression: what most inputs and lookups have in common."""
        votes = Counter({size: len(members) for size, members in groups.items()})
        for node in placeholders(gm):
            value = node.meta["val"]
            if node.name in ctx.inputs and isinstance(value, torch.Tensor) and value.ndim:
                votes[torch_internals.canonical_expression(value.shape[0])] += 1
        return votes.most_common(1)[0][0] if votes else 0

    def _real_sizes(self, gm: fx.GraphModule, ctx: PassContext) -> dict[Any, int]:
        """Return the sizes of the batch that is being compiled for, by expression."""
        sizes: dict[Any, int] = {}
        for node in placeholders(gm):
            fake, value = node.meta["val"], ctx.inputs.get(node.name)
            if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
                for symbol, size in zip(fake.shape, value.shape, strict=True):
                    sizes[torch_internals.canonical_expression(symbol)] = size
        return sizes

    def _value(self, size: Any, real: dict[Any, int]) -> int:
        """Return a size of the batch as a number; 0 where only a step can tell."""
        value = (
            size if isinstance(size, int) else size.xreplace({k: v for k, v in real.items() if not isinstance(k, int)})
        )
        return int(value) if isinstance(value, int) or value.is_number else 0

    def _name(
        self, lookup: fx.Node, ctx: PassContext, uses: Counter[str], group: int, bags: float, real: dict[Any, int]
    ) -> None:
        weight, ids, offsets, weights, how = lookup.args
        assert isinstance(weight, fx.Node)
        assert isinstance(ids, fx.Node)
        assert isinstance(how, Pooling)
        rows, dim = (int(size) for size in weight.meta["val"].shape)
        name, first, end = ctx.flat_names[weight.name].removesuffix(".weight"), 0, rows
        if how.field_rows is not None:
            first, end = how.field_rows
            name = f"{name}[{first}:{end}]"
        dtype = weight.meta["val"].dtype
        graph = ctx.embedding_graph
        graph.add_table(Table(name, weight.name, end - first, dim, dtype, ctx.parameters[weight.name]))
        uses[name] += 1
        found = self._value(torch_internals.canonical_expression(ids.meta["val"].shape[0]), real)
        here = self._value(torch_internals.canonical_expression(lookup.meta["val"].shape[0]), real)
        graph.add_feature(
            Feature(
                name=name if uses[name] == 1 else f"{name}#{uses[name]}",
                table=name,
                node=lookup.name,
                mode=how.mode,
                sparse=how.sparse,
                pooling=found / here if found and here and offsets is not None else 1.0,
                bags=bags,
                jagged=isinstance(offsets, fx.Node) and offsets.target is not ops.even_offsets,
                weighted=weights is not None,
                group=group,
                splits=_splits(how, ctx.options.tower_module is not None),
            )
        )

    def _check(self, gm: fx.GraphModule, ctx: PassContext, lookups: list[fx.Node], size: Any) -> None:
        graph = ctx.embedding_graph
        tables = {feature.node: feature.table for feature in graph.features}
        weights, ids, offsets, factors, how = (list(column) for column in zip(*(n.args for n in lookups), strict=True))
        read = {n for n in (*ids, *offsets, *factors) if isinstance(n, fx.Node)}
        others = [n for n in placeholders(gm) if n not in read and self._has_samples(n, size, ctx)]
        same_size = [n.name for n in (*read, *others) if n.op == "placeholder" and self._has_samples(n, size, ctx)]
        graph.checked_inputs.append(sorted(same_size))
        for pair in zip(ids, factors, strict=True):
            if all(isinstance(n, fx.Node) and n.name in ctx.inputs for n in pair):
                graph.checked_inputs.append([n.name for n in pair])
        rows = [pooling.field_rows or (0, int(w.meta["val"].shape[0])) for w, pooling in zip(weights, how, strict=True)]
        with gm.graph.inserting_before(lookups[0]):
            check = ctx.call(
                gm, ops.check_batch, ids, offsets, tuple(how), factors, others, tuple(rows),
                (*(tables[n.name] for n in lookups), *(ctx.flat_names.get(n.name, n.name) for n in others)),
                ctx.options.check_ids, like=lookups[0],
            )  # fmt: skip
        for index, lookup in enumerate(lookups):
            with gm.graph.inserting_before(lookup):
                lookup.update_arg(1, ctx.call(gm, operator.getitem, check, index, like=lookup))
                if offsets[index] is not None:
                    lookup.update_arg(2, ctx.call(gm, operator.getitem, check, len(lookups) + index, like=lookup))
            lookup.update_arg(4, how[index]._replace(last_offset=False))
            ctx.environment.record(lookup, gm)

    def _has_samples(self, node: fx.Node, size: Any, ctx: PassContext) -> bool:
        value = node.meta["val"]
        return (
            node.name in ctx.inputs
            and isinstance(value, torch.Tensor)
            and value.ndim > 0
            and torch_internals.canonical_expression(value.shape[0]) == size
            and not isinstance(size, int)
        )


def _splits(how: Pooling, towers: bool) -> str:
    """Return how a lookup's table may be split.

    Renormalised rows may not, those of a maximum or counted ids by columns alone; and those of a mean that a Tower
    Module reads, whose ranks do not know the lengths of whole bags.
    """
    if how.max_norm is not None:
        return "none"
    of_columns = how.mode == "max" or how.scale_grad_by_freq or (towers and how.mode == "mean")
    return "columns" if of_columns else "rows and columns"
