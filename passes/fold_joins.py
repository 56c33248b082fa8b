"""Let a ``cat`` or ``stack`` of features read their joined tensor as one piece.

``batched_lookup`` and the last exchange leave all features of a group side by side in one tensor. Where a join of the
model reads columns of it in their order, it copies one slice instead of a column at a time: for a thousand features the
dense compiler sees one input, not a thousand, and the backward pass has one gradient to join.

On one rank the order of the lookups is free: it becomes that of the first join that reads each. Lookups of one table
keep their order, in which its gradients are summed. On several ranks the owners set the order: there a join is folded
where it reads all its features as one slice. Each further slice would cost a backward pass as much as all features do;
such joins are left to ``fold_blocks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, erase_unused, name_of, nodes_in
from dmt_compile.ir.stages import Stage

_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack)
# These keep the order of a tensor's elements.
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
_MOST_READS = 2  # a sum of two gradients is the same in either order, one of three is not
_MOST_DIMS = 3  # of more, ``cat`` may choose another memory format for a slice than for columns


@dataclass(frozen=True)
class _Column:
    """A feature among those side by side in ``joined``; ``reads`` counts what reads it."""

    joined: fx.Node
    index: int
    start: int
    width: int
    reads: int


@dataclass(frozen=True)
class _Join:
    """A join of the model: the column that each of its parts is or is a view of, and its dimension in the result."""

    node: fx.Node
    columns: tuple[_Column | None, ...]
    dim: int
    stacks: bool

    @property
    def exchanged(self) -> bool:
        """Whether features come through an exchange."""
        return any(column is not None and column.joined.target is not ops.batched_lookup for column in self.columns)

    @property
    def fewest_runs(self) -> int:
        """Its inputs where all features of one group are one slice."""
        return len({column.joined for column in self.columns if column is not None}) + self.columns.count(None)

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        """What it joins, by now: a part may be a join that was replaced, as that of a table's pieces."""
        return tuple(cast(Any, _arguments(self.node)["tensors"]))

    def shape(self, part: fx.Node) -> tuple[Any, ...]:
        """Return the shape of a part as an input of ``cat``."""
        shape = [torch_internals.canonical_expression(size) for size in part.meta["val"].shape]
        return tuple([*shape[: self.dim], 1, *shape[self.dim :]] if self.stacks else shape)


@dataclass(frozen=True)
class FoldJoins(Pass):
    """Replace columns that a join reads side by side by one slice."""

    name: ClassVar[str] = "fold_joins"
    needs: ClassVar[Stage] = Stage.DISTRIBUTED
    gives: ClassVar[Stage] = Stage.DISTRIBUTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        splits = calls(gm, ops.split_features)
        joins = self._joins(gm, splits)
        reordered = [self._reorder(split, gm, ctx, joins) for split in splits if _free(split)]
        if any(reordered):
            joins = self._joins(gm, splits)
        skipped: list[tuple[str, str]] = []
        folded = 0
        for join in joins:
            runs = self._runs(join, ctx)
            if len(runs) == len(join.parts):
                skipped.append((join.node.name, self._nearest(join, ctx)))
            elif join.exchanged and len(runs) > join.fewest_runs:
                skipped.append((join.node.name, "its features are no one slice of what the last exchange gave"))
            else:
                self._fold(gm, ctx, join, runs)
                folded += 1
        return PassReport(bool(folded or any(reordered)), folded, tuple(skipped))

    def _joins(self, gm: fx.GraphModule, splits: list[fx.Node]) -> list[_Join]:
        """Return the joins that read at least two columns."""
        columns = {node: column for split in splits for node, column in _columns_of(split).items()}
        found: list[_Join] = []
        for node in calls(gm, *_JOINS):
            arguments = _arguments(node)
            if not arguments.keys() <= {"tensors", "dim"}:
                continue
            parts: tuple[fx.Node, ...] = tuple(cast(Any, arguments["tensors"]))
            read = tuple(columns.get(part) for part in parts)
            dim = int(name_of(node) == "hstack" and node.meta["val"].ndim > 1) or arguments.get("dim", 0)
            if sum(column is not None for column in read) > 1:
                stacks = name_of(node) == "stack"
                found.append(_Join(node, read, dim % node.meta["val"].ndim, stacks))
        return found

    def _reorder(self, split: fx.Node, gm: fx.GraphModule, ctx: PassContext, joins: list[_Join]) -> bool:
        """Give one rank's lookups the order of the joins, and tell whether it is another one."""
        fused, _, widths = cast(Any, split.args)
        read = [column.index for join in joins for column in join.columns if column and column.joined is fused]
        order = list(dict.fromkeys((*read, *range(len(widths)))))
        places = {index: place for place, index in enumerate(order)}
        tables, ids, offsets, weights, pooling, route = cast(Any, fused.args)
        for owners in (tables, weights):
            last: dict[Any, int] = {}
            for index, owner in enumerate(owners):
                if owner is not None and places[index] < last.setdefault(owner, 0):
                    return False
                last[owner] = places[index]
        if order == sorted(order):
            return False
        lists = [[values[index] for index in order] for values in (tables, ids, offsets, weights, pooling, widths)]
        fused.args = (*lists[:4], tuple(lists[4]), route)
        split.args = (fused, None, tuple(lists[5]))
        ctx.environment.record(split, gm)
        for item in list(split.users):
            item.update_arg(1, places[cast(int, item.args[1])])
        return True

    def _runs(self, join: _Join, ctx: PassContext) -> list[list[int]]:
        """Return the positions of the join's parts, those that one slice can replace together."""
        runs: list[list[int]] = []
        for position, (part, column) in enumerate(zip(join.parts, join.columns, strict=True)):
            before = join.columns[runs[-1][-1]] if runs else None
            if (
                before is not None
                and column is not None
                and before.joined is column.joined
                and before.start + before.width == column.start
                and (axes := _axes(join, part, column)) is not None
                and axes == _axes(join, join.parts[position - 1], before)
                and (before.width == column.width or axes[join.dim] == "width")
                and not (ctx.training and max(before.reads, column.reads) > _MOST_READS)
            ):
                runs[-1].append(position)
            else:
                runs.append([position])
        return runs

    def _fold(self, gm: fx.GraphModule, ctx: PassContext, join: _Join, runs: list[list[int]]) -> None:
        def call(target: Any, *args: Any) -> fx.Node:
            return ctx.call(gm, target, *args, like=join.node)

        parts, pieces = join.parts, list[fx.Node]()
        with gm.graph.inserting_before(join.node):
            for run in runs:
                part, column = parts[run[0]], join.columns[run[0]]
                if len(run) == 1:
                    pieces.append(call(torch.unsqueeze, part, join.dim) if join.stacks else part)
                    continue
                assert column is not None
                axes = _axes(join, part, column)
                assert axes is not None
                width = sum(c.width for position in run if (c := join.columns[position]) is not None)
                piece = call(torch.narrow, column.joined, 1, column.start, width)
                have = ["samples", "width"]
                if axes[join.dim] == "features":
                    piece = call(torch.unflatten, piece, 1, (len(run), column.width))
                    have = ["samples", "features", "width"]
                wanted = [axis for axis in axes if axis != "one"]
                if wanted != have:
                    piece = call(torch.permute, piece, tuple(have.index(axis) for axis in wanted))
                for dim, axis in enumerate(axes):
                    piece = call(torch.unsqueeze, piece, dim) if axis == "one" else piece
                pieces.append(piece)
            joined = call(torch.cat, pieces, join.dim)
        join.node.replace_all_uses_with(joined)
        gm.graph.erase_node(join.node)
        for part in sorted(set(parts)):  # what a part is a view of comes before it
            erase_unused(gm, part)

    def _nearest(self, join: _Join, ctx: PassContext) -> str:
        columns = [(part, column) for part, column in zip(join.parts, join.columns, strict=True) if column is not None]
        if all(_axes(join, part, column) is None for part, column in columns):
            return "it joins features along samples, parts of them, or in more than three dimensions"
        if ctx.training and any(column.reads > _MOST_READS for _, column in columns):
            return "features are read more than twice: their gradients would be summed in another order"
        return "no two of its features lie side by side in the same order"


def _arguments(join: fx.Node) -> dict[str, Any]:
    return {**dict(zip(("tensors", "dim"), join.args, strict=False)), **join.kwargs}


def _free(split: fx.Node) -> bool:
    """Tell whether features come straight from the lookups, without an exchange."""
    return getattr(split.args[0], "target", None) is ops.batched_lookup


def _columns_of(split: fx.Node) -> dict[fx.Node, _Column]:
    """Return the columns of joined features, and the views of them that have the same order of elements."""
    joined, laid_out, *rest = cast(Any, split.args)
    layout = None if laid_out is None else laid_out.meta["val"]
    widths = rest[0] if layout is None else layout.widths
    order = range(len(widths)) if layout is None else layout.column_order
    ends = dict(zip(order, accumulate(widths[index] for index in order), strict=True))
    found: dict[fx.Node, _Column] = {}
    for item in split.users:
        index = cast(int, item.args[1])
        views = [item]
        for node in views:
            views += [user for user in node.users if name_of(user) in _VIEWS]
        readers = {user for node in views for user in node.users} - set(views)
        reads = sum(node in views for user in readers for node in nodes_in((user.args, user.kwargs)))
        column = _Column(joined, index, ends[index] - widths[index], widths[index], reads)
        found |= dict.fromkeys(views, column)
    return found


def _axes(join: _Join, part: fx.Node, column: _Column) -> tuple[str, ...] | None:
    """Return what each dimension of a part of a join is; ``None`` where no slice can replace several such parts.

    One of ``samples``, ``width``, ``features`` (of size 1, along which the join puts feature after feature), ``one``.
    """
    shape = join.shape(part)
    samples = torch_internals.canonical_expression(column.joined.meta["val"].shape[0])
    whole = [size for size in (samples, column.width) if size != 1]
    if samples == 1 or [size for size in shape if size != 1] != whole or len(shape) > _MOST_DIMS:
        return None
    names = iter(("samples", "width"))
    axes = ["one" if size == 1 else next(names) for size in shape]
    if axes[join.dim] == "one":
        axes[join.dim] = "width" if column.width == 1 else "features"
    return None if axes[join.dim] == "samples" else tuple(axes)
