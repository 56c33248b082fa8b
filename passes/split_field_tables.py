"""Split one table of many fields into a table for each field.

Factorization-machine code often keeps all fields in one ``nn.Embedding``, and adds a constant offset to the ids of each
field: column ``f`` of ``ids + offsets`` reads rows ``offsets[f]`` to ``offsets[f + 1]`` alone. Each such range can live
on a rank of its own, so it becomes a table of its own, ``emb[100:150]``. The offsets may be a buffer or made from
numbers; they are read when the model is compiled, and every batch is checked to keep to its ranges. Of a model on the
meta device a buffer has no numbers yet: plan such a model with its buffers on a real device.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import fx

from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport, calls, erase_unused
from dmt_compile.ir.stages import Stage
from dmt_compile.kernels.batched_lookup.reference import Pooling


class _DependsOnBatch(Exception):
    """A value is not the same for every batch."""


@dataclass(frozen=True)
class SplitFieldTables(Pass):
    """Look fields up one by one, each in its own rows."""

    name: ClassVar[str] = "split_field_tables"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrite ``gm`` in place."""
        of_table: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for lookup in calls(gm, ops.lookup):
            of_table[lookup.args[0]].append(lookup)  # type: ignore[index]
        matched = 0
        skipped: list[tuple[str, str]] = []
        for table, lookups in of_table.items():
            starts = [self._starts(gm, ctx, lookup) for lookup in lookups]
            if starts[0] is None or any(other != starts[0] for other in starts):
                if any(found is not None for found in starts):
                    skipped.append((table.name, "its lookups do not all split it into the same fields"))
                continue
            for lookup in lookups:
                self._split(gm, ctx, lookup, starts[0])
            matched += len(lookups)
        return PassReport(bool(matched), matched, tuple(skipped))

    def _starts(self, gm: fx.GraphModule, ctx: PassContext, lookup: fx.Node) -> tuple[int, ...] | None:
        """Return the first row of each field, then the number of rows; ``None`` for another kind of lookup."""
        table, flat_ids, _, _, how = lookup.args
        assert isinstance(how, Pooling)
        assert isinstance(table, fx.Node)
        ids = flat_ids.args[0] if isinstance(flat_ids, fx.Node) and flat_ids.target is torch.reshape else None
        sequence = next(iter(lookup.users), None)
        if how.mode != "none" or how.max_norm is not None or how.scale_grad_by_freq or not isinstance(ids, fx.Node):
            return None
        if (
            len(lookup.users) != 1
            or sequence is None
            or sequence.target is not torch.reshape
            or ids.meta["val"].ndim != 2
        ):
            return None
        if ids.target not in (operator.add, operator.iadd, torch.add, "add", "add_") or len(ids.args) != 2:
            return None
        offsets = next((v for n in ids.args if (v := self._constant(gm, ctx, n)) is not None), None)
        fields = ids.meta["val"].shape[1]
        if offsets is None or not isinstance(fields, int) or offsets.numel() != fields or offsets.is_floating_point():
            return None
        starts = (*offsets.reshape(-1).tolist(), int(table.meta["val"].shape[0]))
        rising = all(first < end for first, end in pairwise(starts))
        return starts if starts[0] == 0 and rising else None

    def _constant(self, gm: fx.GraphModule, ctx: PassContext, node: Any) -> torch.Tensor | None:
        """Return the value of what depends on no batch: a buffer, an attribute, or what is made from numbers."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
            return None
        try:
            value = self._evaluate(gm, ctx, node)
        except _DependsOnBatch:
            return None
        return value.cpu() if isinstance(value, torch.Tensor) and not value.is_meta else None

    def _evaluate(self, gm: fx.GraphModule, ctx: PassContext, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(gm)
        if node.op == "placeholder":
            buffer = ctx.parameters.get(node.name)
            if buffer is None or isinstance(buffer, torch.nn.Parameter):
                raise _DependsOnBatch
            return buffer
        if node.target == "new_tensor":  # takes no values from its first argument
            return torch.tensor(fx.map_arg(node.args[1], lambda n: self._evaluate(gm, ctx, n)))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self._evaluate(gm, ctx, n))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        raise _DependsOnBatch

    def _split(self, gm: fx.GraphModule, ctx: PassContext, lookup: fx.Node, starts: tuple[int, ...]) -> None:
        table, flat_ids, _, _, how = lookup.args
        assert isinstance(how, Pooling)
        assert isinstance(flat_ids, fx.Node)
        ids = flat_ids.args[0]
        sequence = next(iter(lookup.users))
        with gm.graph.inserting_before(sequence):
            fields = []
            for field, rows in enumerate(pairwise(starts)):
                column = ctx.call(gm, torch.select, ids, 1, field, like=lookup)
                of_field = how._replace(field_rows=rows)
                fields.append(ctx.call(gm, ops.lookup, table, column, None, None, of_field, like=lookup))
            stacked = ctx.call(gm, torch.stack, fields, 1, like=lookup)
        sequence.replace_all_uses_with(stacked)
        erase_unused(gm, sequence)
