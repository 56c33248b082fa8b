"""One local batch in, a different valid one for every rank out.

What a tensor means is read off the model's lookups: ids of one table are rotated within its rows, lengths of bags
change places, columns of other integers and samples of floats are permuted. What the flat model then refuses stays as
it is.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dmt_compile import torch_internals
from dmt_compile.errors import ConfigError
from dmt_compile.ir.metadata import LOOKUP_RULES
from dmt_compile.ir.pass_base import ancestors, name_of

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

_F = torch.nn.functional
_SAME_VALUES = {"long", "int", "to", "view", "reshape", "flatten", "contiguous", "squeeze", "unsqueeze", "clone"}
_ATTEMPTS = 8


@dataclass
class Reads:
    """What a model's lookups say of the tensors of its batch, each by ``id``.

    Args:
        rows: tensors that are ids of a table -> the rows of the smallest table that they read.
        padding: the same tensors -> ids that mean no row.
        bounds: tensors that say where bags begin, or from which that is computed.
        ids_by_table: number of ids that each table is read with, by the parameter's name in the model.
    """

    rows: dict[int, int] = field(default_factory=dict)
    padding: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    bounds: set[int] = field(default_factory=set)
    ids_by_table: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def find_reads(model: nn.Module, call: Call) -> Reads:
    """Trace a model with Dynamo and look at its embedding calls."""
    reads, traced = Reads(), copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in traced.named_parameters()}

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target in LOOKUP_RULES:
                _read(node, reads, names)
        return gm.forward

    with torch_internals.unlimited_recompiles():
        torch.compile(traced, backend=look)(*call[0], **call[1])
    return reads


def _read(node: fx.Node, reads: Reads, names: dict[int, str]) -> None:
    bag = node.target is _F.embedding_bag
    keys = ("input", "weight", "offsets") if bag else ("input", "weight", "padding_idx")
    arguments: dict[str, Any] = {**dict(zip(keys, node.args, strict=False)), **node.kwargs}
    ids, table, offsets = arguments["input"], arguments["weight"], arguments.get("offsets")
    name = names.get(id(torch_internals.input_value(table)), "")
    reads.ids_by_table[name] += int(ids.meta["example_value"].numel())
    if isinstance(offsets, fx.Node):
        reads.bounds |= {id(torch_internals.input_value(n)) for n in ancestors([offsets]) if _is_input(n)}
    while not _is_input(ids) and _keeps_values(ids):
        ids = ids.all_input_nodes[0]
    if _is_input(ids):
        key = id(torch_internals.input_value(ids))
        rows = int(table.meta["example_value"].shape[0])
        reads.rows[key] = min(rows, reads.rows.get(key, rows))
        if arguments.get("padding_idx") is not None:
            reads.padding[key].add(arguments["padding_idx"] % rows)


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _keeps_values(node: fx.Node) -> bool:
    return name_of(node) in _SAME_VALUES and len(node.all_input_nodes) == 1


def draw_calls(model: nn.Module, call: Call, reads: Reads, ranks: int, seed: int) -> list[Call]:
    """Return one call for each rank, all different; rank 0 gets ``call`` as it is.

    Raises:
        ConfigError: no different batch could be drawn for a rank.
    """
    trial = copy.deepcopy(model).cpu()  # an id out of range is an error there, and the end of the process on a GPU
    drawn = [call]
    for rank in range(1, ranks):
        for attempt in range(_ATTEMPTS):
            candidate = _draw(trial, call, reads, seed + 7919 * (rank + ranks * attempt))
            if not any(same_call(candidate, other) for other in drawn):
                drawn.append(candidate)
                break
        else:
            raise ConfigError(
                f"certify: expected a batch from which {ranks} different ones can be drawn, found none for rank "
                f"{rank}; pass a list of one batch for each rank"
            )
    return drawn


def same_call(one: Call, other: Call) -> bool:
    """Tell whether two calls hold the same values, at least one of them."""
    leaves = [tree_leaves(call) for call in (one, other)]
    tensors = [[leaf for leaf in part if isinstance(leaf, torch.Tensor)] for part in leaves]
    if len(tensors[0]) != len(tensors[1]) or not any(tensor.numel() for tensor in tensors[0]):
        return False
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def _draw(trial: nn.Module, call: Call, reads: Reads, seed: int) -> Call:
    leaves, spec = tree_flatten(call)
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.numel()}
    generator = torch.Generator().manual_seed(seed)
    orders = {n: torch.randperm(n, generator=generator) for n in sorted({len(t) for t in tensors.values()})}
    choices = {
        key: [_laid_out_as(tensor, choice) for choice in _choices(tensor, reads, orders, generator)]
        for key, tensor in tensors.items()
    }

    def with_values(values: dict[int, torch.Tensor]) -> Call:
        changed: Call = tree_unflatten([values.get(id(leaf), leaf) for leaf in leaves], spec)
        return changed

    first = {key: options[0] for key, options in choices.items() if options}
    if _runs(trial, with_values(first)):
        return with_values(first)
    kept: dict[int, torch.Tensor] = {}
    for key, options in choices.items():
        for option in options:
            if _runs(trial, with_values({**kept, key: option})):
                kept[key] = option
                break
    return with_values(kept)


def _runs(trial: nn.Module, call: Call) -> bool:
    args, kwargs = tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, call)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            trial(*args, **kwargs)
    except Exception:  # whatever the user's model raises: the batch is not one of its own
        return False
    return True


def _choices(
    tensor: torch.Tensor, reads: Reads, orders: dict[int, torch.Tensor], generator: torch.Generator
) -> list[torch.Tensor]:
    """Return what a tensor may be replaced by, the best first."""
    order = orders[len(tensor)].to(tensor.device)
    key, is_id = id(tensor), not tensor.is_floating_point() and tensor.dtype is not torch.bool
    if key in reads.bounds or (is_id and key not in reads.rows and _looks_like_bounds(tensor)):
        return [_other_bounds(tensor, generator)] if _looks_like_bounds(tensor) else []
    if is_id and key in reads.rows:
        return [_rotated(tensor, reads.rows[key], reads.padding[key], generator)]
    if is_id:
        smaller = (torch.rand(tensor.shape, generator=generator).to(tensor.device) * (tensor + 1)).to(tensor.dtype)
        return [_columns_permuted(tensor, generator), smaller]
    if tensor.dtype is torch.bool:
        return [tensor[order]]
    return [_shrunk(tensor[order], generator), tensor[order]]


def _laid_out_as(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` laid out in memory as ``tensor``: Dynamo guards on that, and all ranks run one program."""
    strides, offset = tensor.stride(), tensor.storage_offset()
    if 0 in strides:  # an expanded tensor: its values share memory
        return values
    elements = 1 + offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    storage = torch.empty(elements, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, strides, offset).copy_(values)


def _looks_like_bounds(tensor: torch.Tensor) -> bool:
    return bool((tensor[..., :1] == 0).all()) and bool((tensor.diff(dim=-1) >= 0).all())


def _other_bounds(offsets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Let bags change their lengths with each other; the last keeps its own, since it ends with the ids."""
    lengths = offsets.diff(dim=-1)
    order = torch.randperm(lengths.shape[-1], generator=generator).to(offsets.device)
    return torch.cat([offsets[..., :1], lengths[..., order].cumsum(-1).to(offsets.dtype)], dim=-1)


def _rotated(ids: torch.Tensor, rows: int, padding: set[int], generator: torch.Generator) -> torch.Tensor:
    """Move every id on by the same number of rows; padding stays padding."""
    step = int(torch.randint(1, max(rows, 2), (), generator=generator))
    moved = (ids + step) % rows
    for index in padding:
        moved = torch.where(ids == index, ids, moved)
    return moved


def _columns_permuted(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Permute each column by itself: a column's values stay within its table's rows."""
    columns = ids.reshape(len(ids), -1)
    order = torch.rand(columns.shape, generator=generator).argsort(dim=0).to(ids.device)
    return columns.gather(0, order).reshape(ids.shape)


def _shrunk(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Take up to a tenth off, where a column holds more than whole numbers, which may be ids or masks."""
    factors = 1 - 0.1 * torch.rand(values.shape, generator=generator).to(values)
    whole = (values == values.round()).all(dim=0, keepdim=True)
    return torch.where(whole, values, values * factors)


def as_call(batch: Any, kwargs: dict[str, Any]) -> Call:
    """Return a batch as arguments: a tuple is positional ones, anything else the one argument."""
    return (batch if isinstance(batch, tuple) else (batch,)), kwargs


def check_distinct(calls: Sequence[Call]) -> None:
    """Refuse equal batches.

    Raises:
        ConfigError: two ranks have the same batch.
    """
    for rank, call in enumerate(calls):
        for other in range(rank):
            if same_call(call, calls[other]):
                raise ConfigError(
                    f"certify: expected different batches, found the same one for ranks {other} and {rank}; equal "
                    "batches hide what goes to the wrong rank, pass one batch alone and others are drawn from it"
                )
