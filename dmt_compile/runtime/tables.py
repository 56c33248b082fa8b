"""A table of which this rank holds one block: the flat shape outside, the local block inside.

The compiler swaps a model's table parameters for :class:`ShardedTable` at the first call, keeping their Python
identity, so that optimizers, hooks and the module tree built before go on working. What it means for

- optimizers, built before or after: every element-wise operator works on the local block, so state made from the
  parameter (``zeros_like``) is local; state made before the swap is cut down by ``runtime.sharding``;
- gradients: dense ones are ``ShardedTable`` of the same block; sparse ones are ordinary sparse tensors in the flat
  table's coordinates that hold this rank's rows only (of a column shard: zeros outside its columns);
- ``.to()``, ``deepcopy``, ``zero_`` and other constant initialisation: work on the local block;
- random initialisation (``normal_``): draws the flat table's numbers and keeps the block, so that it equals the flat
  model's under the same seed; needs the flat table's memory for a moment;
- ``copy_`` and ``load_state_dict`` of a flat tensor: each rank takes its block;
- reductions, ``state_dict``, pickling and an eager forward: a named error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch.utils._pytree import tree_map

from dmt_compile.errors import CheckpointError, UnsupportedGraphError
from dmt_compile.torch_internals import FakeTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """The part of table ``name`` that this rank holds: some row ranges of a column range, all of them half-open.

    ``rows`` has one range for a whole or split table, and one for each field that this rank owns of a table of many
    fields. ``model`` is what the session knows of the model; it stays with the table through copies and conversions.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    model: Any = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that this rank holds."""
        return sum(end - first for first, end in self.rows), self.columns[1] - self.columns[0]

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the block's part of a flat-shaped (..., rows, dim) tensor; a view where it is one row range."""
        parts = [flat[..., first:end, self.columns[0] : self.columns[1]] for first, end in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def local_row(self, flat_row: int) -> int:
        """Return where a row of the flat table, or the end of one of this block's ranges, stands in the block."""
        before = 0
        for first, end in self.rows:
            if first <= flat_row <= end:
                return before + flat_row - first
            before += end - first
        raise IndexError(f"row {flat_row} of table {self.name} is not among {self.rows}")

    def to_local(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Return the block's numbers of flat rows, all of them in this block."""
        return rows_N + self._shifts(rows_N, [first for first, _ in self.rows], -1)

    def to_flat(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Return the flat numbers of this block's rows."""
        return rows_N + self._shifts(rows_N, [self.local_row(first) for first, _ in self.rows], 1)

    def _shifts(self, rows_N: torch.Tensor, starts: list[int], sign: int) -> torch.Tensor | int:
        shifts = [sign * (first - self.local_row(first)) for first, _ in self.rows]
        if len(shifts) == 1:
            return shifts[0]
        ranges_N = torch.bucketize(rows_N, torch.tensor(starts, device=rows_N.device), right=True) - 1
        return torch.tensor(shifts, device=rows_N.device)[ranges_N]


class ShardedTable(torch.Tensor):
    """A (rows, dim) table of which ``local`` holds ``block``; see the module's text for what works."""

    _local: torch.Tensor
    _block: Block

    @staticmethod
    def __new__(cls, local: torch.Tensor, shape: torch.Size | tuple[int, ...], block: Block) -> Self:
        table = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        table._local = local
        table._block = block
        return table

    def __init__(self, local: torch.Tensor, shape: torch.Size | tuple[int, ...], block: Block) -> None:
        pass

    @property
    def local(self) -> torch.Tensor:
        """This rank's block, detached."""
        return self._local.detach()

    @property
    def block(self) -> Block:
        """Which rows and columns of the flat table this rank holds."""
        return self._block

    def __repr__(self) -> str:  # type: ignore[override]
        rows, columns = self._block.rows, self._block.columns
        return f"ShardedTable({self._block.name}, shape={tuple(self.shape)}, rows={rows}, columns={columns})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTable:
        copied = ShardedTable(self._local.detach().clone(), self.shape, self._block)
        result = cast(ShardedTable, torch.nn.Parameter(copied, self.requires_grad)) if _is_parameter(self) else copied
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(
            f"checkpoint: expected a flat tensor for table {self._block.name}, found one sharded over the ranks; save "
            "dmt_compile.full_state_dict(model) instead (a collective call, on every rank)"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_local"], (tuple(self.shape), self._block)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> ShardedTable:
        return ShardedTable(inner["_local"], meta[0], meta[1])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("aten::_foreach_") and not name.startswith(("aten::_foreach_norm", "aten::_foreach_max")):
            return _foreach(func, args, kwargs)
        table = args[0] if args and isinstance(args[0], ShardedTable) else _first_table(args, kwargs)
        if func in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
            return _elementwise(func, table, args, kwargs)
        if func is aten.view.default and list(args[1]) == list(table.shape):
            return ShardedTable(
                table._local.detach(), table.shape, table._block
            )  # how PyTorch finds a parameter's node
        if func is aten.sparse_mask.default:
            return _sparse_mask(args[0], args[1])
        if name.endswith("_") and torch.Tag.nondeterministic_seeded in func.tags:
            flat = torch.empty(table.shape, dtype=table.dtype, device=table.device)
            func(flat, *args[1:], **kwargs)
            table._local.copy_(table._block.cut(flat))
            return table
        if func is aten._is_any_true.default:  # autograd's anomaly mode looks for NaN
            return func(table._local)
        if isinstance(table._local, FakeTensor):  # a tracer asks for shapes only
            return func(*tree_map(_flat_fake, args), **tree_map(_flat_fake, kwargs))
        raise UnsupportedGraphError(_refusal(func, table))


_ELEMENTWISE: set[Callable[..., Any]] = {
    aten.alias.default,
    aten.clone.default,
    aten.copy_.default,
    aten.detach.default,
    aten.detach_.default,
    aten._to_copy.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.zero_.default,
    aten.lerp_.Scalar,
    aten.lerp_.Tensor,
    aten.addcmul_.default,
    aten.addcdiv_.default,
}


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _first_table(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardedTable:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, ShardedTable))


def _flat_fake(value: Any) -> Any:
    return value._local.new_empty(value.shape) if isinstance(value, ShardedTable) else value


def _refusal(func: Any, table: ShardedTable) -> str:
    start = f"sharded table {table._block.name}: "
    if "norm" in func._schema.name:
        return start + (
            f"expected an operation on this rank's rows, found {func}; PyTorch's own gradient clipping would compute "
            "another norm on every rank, call dmt_compile.clip_grad_norm_"
        )
    return start + (
        f"expected use inside the compiled model, found {func} in eager code; call the compiled model on every rank, "
        "or take the flat weights with dmt_compile.full_state_dict. If the call did go through the compiled model, "
        "Dynamo stopped compiling it: TORCH_LOGS=recompiles shows why"
    )


def _localise(value: Any, table: ShardedTable) -> Any:
    """Turn an operand into what the operation on the local block takes."""
    if isinstance(value, ShardedTable):
        return value._local
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.layout == torch.sparse_coo:
        return local_sparse(value, table._block)
    rows = table._block.rows if value.dim() > 1 and value.shape[-2] == table.shape[0] else ((0, value.shape[-2:][0]),)
    columns = table._block.columns if value.shape[-1] == table.shape[1] else (0, value.shape[-1])
    return Block(table._block.name, rows, columns).cut(value) if value.dim() > 1 else value[slice(*columns)]


def _elementwise(func: Any, table: ShardedTable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0] if args else None
    in_place = func._schema.name.endswith("_") or "out" in kwargs
    if in_place and not isinstance(target, ShardedTable):
        raise UnsupportedGraphError(_refusal(func, table))
    # No element-wise operator takes tensors in lists, so nothing has to be looked through: optimizers come here often.
    out = func(*(_localise(a, table) for a in args), **{name: _localise(v, table) for name, v in kwargs.items()})
    if in_place:
        return target
    return ShardedTable(out, table.shape, table._block)


def _foreach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    firsts = args[0]

    def localise(argument: Any) -> Any:
        if isinstance(argument, list | tuple) and len(argument) == len(firsts):
            pairs = zip(argument, firsts, strict=True)
            return [_localise(a, f) if isinstance(f, ShardedTable) else a for a, f in pairs]
        return argument

    out = func(*[localise(a) for a in args], **{name: localise(value) for name, value in kwargs.items()})
    if func._schema.name.endswith("_") or out is None:
        return None
    pairs = zip(out, firsts, strict=True)
    return [ShardedTable(o, f.shape, f._block) if isinstance(f, ShardedTable) else o for o, f in pairs]


def local_sparse(flat: torch.Tensor, block: Block) -> torch.Tensor:
    """Cut a flat (rows, dim) sparse tensor down to a block; rows outside it must not occur."""
    if block.shape == tuple(flat.shape):
        return flat
    values_NW = flat._values()[:, block.columns[0] : block.columns[1]].contiguous()
    indices = block.to_local(flat._indices())
    return torch.sparse_coo_tensor(
        indices, values_NW, block.shape, is_coalesced=flat.is_coalesced(), check_invariants=False
    )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers that this rank has of a tensor, all of them where it is not sharded, outside autograd."""
    return tensor.local if isinstance(tensor, ShardedTable) else tensor.detach()


def flat_sparse(
    ids_N: torch.Tensor, values_NW: torch.Tensor, shape: torch.Size | tuple[int, ...], block: Block
) -> torch.Tensor:
    """Build the flat (rows, dim) sparse tensor with ``values_NW`` at the block's local row numbers ``ids_N``."""
    if values_NW.shape[1] != shape[1]:
        padded = values_NW.new_zeros(values_NW.shape[0], shape[1])
        padded[:, block.columns[0] : block.columns[1]] = values_NW
        values_NW = padded
    return torch.sparse_coo_tensor(block.to_flat(ids_N).unsqueeze(0), values_NW, tuple(shape), check_invariants=False)


def _sparse_mask(table: ShardedTable, mask: torch.Tensor) -> torch.Tensor:
    """Return the table's values at a coalesced sparse tensor's indices, as SparseAdam and Adagrad ask for them."""
    local_ids_N = table._block.to_local(mask._indices()[0])
    sparse = flat_sparse(local_ids_N, table._local[local_ids_N], table.shape, table._block)
    return sparse._coalesced_(True)
