"""Look up each column piece of a split table by itself: the plan may give pieces to different towers.

Before, a table ``emb.3`` of 64 columns that the plan has as ``emb.3[:, 0:32]`` and ``emb.3[:, 32:64]``; after, a
lookup for each piece, with the same ids, offsets and weights, and the cat of what they give in its place. Pieces are
tables and features of their own from here on. Pooling works on each column by itself, so nothing else changes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops
from dmt_compile.ir.embedding_graph import Feature, source_line
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, erase_unused
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.plan import whole_of


@dataclass(frozen=True)
class SplitColumns(Pass):
    """Replace lookups of split tables by lookups of their pieces."""

    name: ClassVar[str] = "split_columns"
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place.

        Raises:
            UnsupportedGraphError: Tower Modules are asked for as well, or a split table renormalises its rows.
        """
        pieces: dict[str, list[tuple[str, tuple[int, int]]]] = {}
        for table in ctx.plan.tables if ctx.plan is not None else ():
            whole, columns = whole_of(table.name)
            if columns is not None and any(found.name == whole for found in ctx.embedding_graph.tables):
                pieces.setdefault(whole, []).append((table.name, columns))
        if not pieces:
            return PassReport(changed=False)
        assert ctx.plan is not None
        if ctx.options.recipe(ctx.plan) is not None:
            raise UnsupportedGraphError(
                f"{self.name}: expected whole tables under Tower Modules, found {next(iter(pieces))} split by columns; "
                "drop split_columns, or tower_module"
            )
        features = {feature.node: feature for feature in ctx.embedding_graph.features}
        named: dict[str, list[Feature]] = {}
        weighted = False
        for check in calls(gm, ops.check_batch):
            lookups = [n for n in calls(gm, ops.lookup) if n.args[1] in check.users]
            split = [pieces.get(features[lookup.name].table) for lookup in lookups]
            if not any(split):
                continue
            for lookup in (n for n, of_table in zip(lookups, split, strict=True) if of_table):
                self._refuse_renormalised(lookup)
                weighted |= lookup.args[3] is not None
            named |= self._split(gm, ctx, check, lookups, split, features)
        tables = {table.name: table for table in ctx.embedding_graph.tables}
        ctx.embedding_graph.split(
            {
                whole: [replace(tables[whole], name=name, dim=end - first) for name, (first, end) in found]
                for whole, found in pieces.items()
            },
            named,
        )
        # The gradient of a weight is a sum over columns, now over pieces of them.
        return PassReport(changed=True, matched=len(named), effect=Effect.REORDERED if weighted else None)

    def _refuse_renormalised(self, lookup: fx.Node) -> None:
        how = lookup.args[4]
        assert isinstance(how, Pooling)
        if how.max_norm is not None:
            raise UnsupportedGraphError(
                f"{self.name}: expected a table without max_norm for {lookup.name}, found one, whose norm is that of "
                f"whole rows ({source_line(lookup)}); drop split_columns or max_norm"
            )

    def _split(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        check: fx.Node,
        lookups: list[fx.Node],
        split: list[list[tuple[str, tuple[int, int]]] | None],
        features: dict[str, Feature],
    ) -> dict[str, list[Feature]]:
        """Give each piece its entry in the group's check, and its lookup; return the new features by the old."""
        named: dict[str, list[Feature]] = {}
        ids, offsets, how, weights, others, rows, labels, check_ids = cast(tuple[Any, ...], check.args)
        times = [len(of_table) if of_table else 1 for of_table in split]

        def repeated(entries: Any) -> list[Any]:
            return list(chain.from_iterable([e] * n for e, n in zip(entries, times, strict=True)))

        columns_of = chain.from_iterable([c for _, c in of_table] if of_table else [None] for of_table in split)
        piecewise = tuple(h._replace(columns=c) for h, c in zip(repeated(how), columns_of, strict=True))
        own_labels, other_labels = labels[: len(lookups)], labels[len(lookups) :]
        with gm.graph.inserting_before(check):
            wider = ctx.call(
                gm, ops.check_batch, repeated(ids), repeated(offsets), piecewise, repeated(weights), others,
                tuple(repeated(rows)), (*repeated(own_labels), *other_labels), check_ids, like=check,
            )  # fmt: skip
        place, total = 0, sum(times)
        for lookup, of_table in zip(lookups, split, strict=True):
            table, _, starts, factors, pooling = lookup.args
            assert isinstance(pooling, Pooling)
            parts = []
            for columns in [piece for _, piece in of_table] if of_table else [None]:
                with gm.graph.inserting_before(lookup):
                    own_ids = ctx.call(gm, operator.getitem, wider, place, like=lookup)
                    own_starts = starts and ctx.call(gm, operator.getitem, wider, total + place, like=lookup)
                    if columns is None:
                        lookup.update_arg(1, own_ids)
                        lookup.update_arg(2, own_starts)
                    else:
                        piece = pooling._replace(columns=columns)
                        args = (table, own_ids, own_starts, factors, piece)
                        parts.append(ctx.call(gm, ops.lookup, *args, like=lookup))
                place += 1
            if of_table:
                with gm.graph.inserting_before(lookup):
                    joined = ctx.call(gm, torch.cat, parts, 1, like=lookup)
                lookup.replace_all_uses_with(joined)
                gm.graph.erase_node(lookup)
                feature = features[lookup.name]
                suffix = feature.name.removeprefix(feature.table)
                named[feature.name] = [
                    replace(feature, name=f"{name}{suffix}", table=name, node=part.name)
                    for (name, _), part in zip(of_table, parts, strict=True)
                ]
        for node in list(check.users):
            erase_unused(gm, node)
        if not check.users and check in gm.graph.nodes:
            gm.graph.erase_node(check)
        return named
