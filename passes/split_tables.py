"""Look up each piece of a split table by itself: the plan gives pieces to ranks of their own.

Before, a table ``emb.3`` of 64 columns that the plan has as ``emb.3[:, 0:32]``, ``emb.3[0:500, 32:64]`` and
``emb.3[500:900, 32:64]``; after, in place of its lookup:

    select_rows                              each bag's ids that lie in a piece of rows, before they are checked
    lookup of each piece                     of its columns; of a piece of rows the sum, whatever the pooling
    add_pieces                               the row pieces of the same columns added up
    divide_by_lengths                        where bags are averaged: by the whole bag
    cat                                      of the columns

Pieces are tables and features of their own from here on, but for the features that row pieces add up to. A Tower Module
reads the columns side by side, as it reads features.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, ClassVar, cast

import torch
from torch import fx

from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir import ops, piece_ops
from dmt_compile.ir.embedding_graph import Feature, Table, source_line
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, erase_unused, sort_graph
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.plan import TableSpec
from dmt_compile.table_names import Range, columns_of, rows_of


@dataclass(frozen=True)
class _Piece:
    """A piece of a table, with its share of the rows; ``rows`` and ``columns`` are ``None`` for all of the table's."""

    spec: TableSpec
    rows: Range | None
    columns: Range | None
    share: float

    def of(self, whole: Table) -> Table:
        """Return the piece as a table of the embedding graph."""
        return replace(whole, name=self.spec.name, rows=self.spec.rows, dim=self.spec.dim)


def _pieces(ctx: PassContext, table: Table) -> list[_Piece]:
    """Return the pieces that the plan has of a table; none of a whole one."""
    return [
        _Piece(
            spec, rows_of(spec.name) if spec.rows < table.rows else None, columns_of(spec.name), spec.rows / table.rows
        )
        for spec in (ctx.plan.pieces_of(table.name) if ctx.plan is not None else ())
    ]


@dataclass(frozen=True)
class _Entry:
    """What one lookup of a piece reads, in the terms of ``check_batch``."""

    piece: _Piece | None
    ids: fx.Node
    offsets: fx.Node | None
    weights: fx.Node | None
    how: Pooling


@dataclass(frozen=True)
class SplitTables(Pass):
    """Replace lookups of split tables by lookups of their pieces."""

    name: ClassVar[str] = "split_tables"
    needs: ClassVar[Stage] = Stage.TOWERED
    gives: ClassVar[Stage] = Stage.TOWERED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place.

        Raises:
            UnsupportedGraphError: a lookup cannot be split as the plan says: it renormalises rows, takes a maximum over
                pieces of rows or counts ids in them, or a Tower Module reads an average of them.
        """
        tables = {table.name: table for table in ctx.embedding_graph.tables}
        pieces = {name: _pieces(ctx, table) for name, table in tables.items()}
        if not any(pieces.values()):
            return PassReport(changed=False)
        features = {feature.node: feature for feature in ctx.embedding_graph.features}
        named: dict[str, list[Feature]] = {}
        reordered = False
        for check in calls(gm, ops.check_batch):
            lookups = [n for n in calls(gm, ops.lookup) if n.args[1] in check.users]
            of_lookup = [pieces[features[lookup.name].table] for lookup in lookups]
            for lookup, own in zip(lookups, of_lookup, strict=True):
                self._refuse(lookup, own)
                # The gradient of a weight is a sum over columns, now over pieces of them.
                reordered |= any(piece.rows for piece in own) or (bool(own) and lookup.args[3] is not None)
            if any(of_lookup):
                named |= self._split(gm, ctx, check, lookups, of_lookup, features)
        sort_graph(gm)
        replaced = {whole: [piece.of(tables[whole]) for piece in found] for whole, found in pieces.items() if found}
        ctx.embedding_graph.split(replaced, named)
        return PassReport(changed=True, matched=len(named), effect=Effect.REORDERED if reordered else None)

    def _refuse(self, lookup: fx.Node, pieces: Sequence[_Piece]) -> None:
        how = lookup.args[4]
        assert isinstance(how, Pooling)
        in_rows = any(piece.rows for piece in pieces)
        if pieces and how.max_norm is not None:
            expected, found = "without max_norm", "one, whose norm is that of whole rows"
        elif in_rows and how.mode == "max":
            expected, found = "of sums or means where pieces have rows of their own", "a maximum"
        elif in_rows and how.scale_grad_by_freq:
            expected, found = "without scale_grad_by_freq where pieces have rows of their own", "one, which counts ids"
        elif in_rows and how.mode == "mean" and any(user.target is ops.tower_input for user in lookup.users):
            expected, found = "of sums under a Tower Module", "a mean, of bags whose length its ranks do not know"
        else:
            return
        raise UnsupportedGraphError(
            f"{self.name}: expected a lookup {expected} for {lookup.name}, found {found} ({source_line(lookup)}); "
            "leave the table whole in the plan" + ("" if how.max_norm is not None else ", or split it by columns")
        )

    def _split(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        check: fx.Node,
        lookups: list[fx.Node],
        of_lookup: list[list[_Piece]],
        features: dict[str, Feature],
    ) -> dict[str, list[Feature]]:
        """Give each piece its entry in the group's check, and its lookup; return the new features by the old."""

        def call(target: Callable[..., Any], *args: Any) -> fx.Node:
            return ctx.call(gm, target, *args, like=check)

        ids, offsets, how, weights, others, rows, labels, check_ids = cast(tuple[Any, ...], check.args)
        columns = list(zip(ids, offsets, weights, how, strict=True))
        with gm.graph.inserting_before(check):
            entries = [
                _entries(call, _Entry(None, *whole), pieces, of_rows, check_ids)
                for whole, pieces, of_rows in zip(columns, of_lookup, rows, strict=True)
            ]
            times = [len(found) for found in entries]
            flat = list(chain.from_iterable(entries))
            wider = call(
                ops.check_batch, [e.ids for e in flat], [e.offsets for e in flat], tuple(e.how for e in flat),
                [e.weights for e in flat], others, _repeated(rows, times),
                (*_repeated(labels, times), *labels[len(lookups) :]), check_ids,
            )  # fmt: skip
        named: dict[str, list[Feature]] = {}
        place = 0
        for lookup, found, whole in zip(lookups, entries, columns, strict=True):
            parts = []
            with gm.graph.inserting_before(lookup):
                for entry in found:
                    own_ids = call(operator.getitem, wider, place)
                    starts = entry.offsets and call(operator.getitem, wider, len(flat) + place)
                    if entry.piece is None:
                        lookup.update_arg(1, own_ids)
                        lookup.update_arg(2, starts)
                        place += 1
                        continue
                    own_how = entry.how._replace(last_offset=False)
                    parts.append(call(ops.lookup, lookup.args[0], own_ids, starts, entry.weights, own_how))
                    place += 1
            if not parts:
                continue
            feature = features[lookup.name]
            named[feature.name] = _features(feature, found, parts)
            _put_together(gm, call, lookup, found, parts, whole)
            gm.graph.erase_node(lookup)
        for node in list(check.users):
            erase_unused(gm, node)
        if check in gm.graph.nodes:
            gm.graph.erase_node(check)
        return named


def _repeated(values: Sequence[Any], times: Sequence[int]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable([value] * n for value, n in zip(values, times, strict=False)))


def _entries(
    call: Callable[..., fx.Node], whole: _Entry, pieces: Sequence[_Piece], rows: Range, check_ids: bool
) -> list[_Entry]:
    """Return what the lookups of the pieces read; of the whole table itself where it has none."""
    ranges = tuple(sorted({piece.rows for piece in pieces if piece.rows is not None}))
    if ranges:
        given = (whole.ids, whole.offsets, whole.weights, whole.how, ranges, rows, check_ids)
        selected = call(piece_ops.select_rows, *given)
    out: list[_Entry] = []
    for piece in pieces:
        how = whole.how._replace(columns=piece.columns)
        if piece.rows is None:
            out.append(replace(whole, piece=piece, how=how))
            continue
        place = ranges.index(piece.rows)
        ids, starts = (call(operator.getitem, selected, place + k * len(ranges)) for k in range(2))
        factors = whole.weights and call(operator.getitem, selected, place + 2 * len(ranges))
        if how.mode == "none":  # embedding reads the row at padding_idx like any other
            how = how._replace(padding_counts=True)
        out.append(_Entry(piece, ids, starts, factors, how._replace(mode="sum", field_rows=piece.rows)))
    return out or [whole]


def _features(feature: Feature, entries: Sequence[_Entry], parts: Sequence[fx.Node]) -> list[Feature]:
    suffix = feature.name.removeprefix(feature.table)
    out = []
    for entry, part in zip(entries, parts, strict=True):
        assert entry.piece is not None
        name, jagged = entry.piece.spec.name, entry.offsets is not None
        pooling = feature.pooling * entry.piece.share
        out.append(replace(feature, name=f"{name}{suffix}", table=name, node=part.name, pooling=pooling, jagged=jagged))
    return out


def _put_together(
    gm: fx.GraphModule,
    call: Callable[..., fx.Node],
    lookup: fx.Node,
    entries: Sequence[_Entry],
    parts: Sequence[fx.Node],
    whole: tuple[fx.Node, fx.Node | None, fx.Node | None, Pooling],
) -> None:
    """Let what read a lookup read what its pieces give."""
    ids, offsets, _, how = whole
    columns: list[fx.Node] = []
    pairs = zip(entries, parts, strict=True)
    with gm.graph.inserting_before(lookup):
        for _, found in groupby(pairs, key=lambda pair: pair[0].piece and pair[0].piece.columns):
            of_columns = list(found)
            column = of_columns[0][1]
            if of_columns[0][0].piece.rows is not None:  # type: ignore[union-attr]
                column = call(piece_ops.add_pieces, [part for _, part in of_columns])
                if how.mode == "mean":
                    column = call(piece_ops.divide_by_lengths, column, ids, offsets, how)
            columns.append(column)
        if any(user.target is not ops.tower_input for user in lookup.users):
            joined = columns[0] if len(columns) == 1 else call(torch.cat, columns, 1)
            lookup.replace_all_uses_with(joined, lambda user: user.target is not ops.tower_input)
    for user in list(lookup.users):
        beside = cast(list[fx.Node], user.args[0])
        user.update_arg(0, [n for feature in beside for n in (columns if feature is lookup else [feature])])
