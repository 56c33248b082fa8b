"""Reads a graph that Dynamo captured: which inputs are parameters, under which flat names, and which are the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from dmt_compile import torch_internals
from dmt_compile.errors import ConfigError
from dmt_compile.ir.pass_base import dependents, name_of, placeholders
from dmt_compile.plan import TableSpec
from dmt_compile.table_names import parameter_of


@dataclass
class Capture:
    """A captured graph and the model around it.

    Args:
        gm: Dynamo's graph.
        root: the compiled module, whose parameter names are the flat names; ``None`` where no module is involved.
        outer: the outermost module that is running; it may hold ``root`` and dense parameters beside it.
        parameters: graph input -> the real parameter or buffer.
        flat_names: graph input -> its name in ``root``, or the variable that the user passed.
        inputs: graph input -> the real tensor of the batch.
        sources: graph input of the batch, or a size of it -> where Dynamo found it, as an expression.
        checked: graph inputs whose number of samples the program compares at each step.
    """

    gm: fx.GraphModule
    root: nn.Module | None
    outer: nn.Module | None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    flat_names: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    checked: list[list[str]] = field(default_factory=list)

    def other_tables(self, tables: Sequence[TableSpec]) -> list[TableSpec]:
        """Return the model's matrices that are not among ``tables``, as tables a plan may name."""
        found = {parameter_of(table.name)[0] for table in tables}
        named = [] if self.root is None else self.root.named_parameters()
        return [
            TableSpec(short, p.shape[0], p.shape[1], str(p.dtype).removeprefix("torch."))
            for name, p in named
            if p.ndim == 2 and (short := name.replace("_orig_mod.", "").removesuffix(".weight")) not in found
        ]


def read_capture(gm: fx.GraphModule) -> Capture:
    """Sort the inputs of a graph that Dynamo has just handed to the backend.

    Raises:
        ConfigError: the model is wrapped in ``DistributedDataParallel``.
    """
    running = torch_internals.calling_modules()
    if any(isinstance(module, DistributedDataParallel) for module in running):
        raise ConfigError(
            "capture: expected a model without a data-parallel wrapper, found DistributedDataParallel; backend='dmt' "
            "averages dense gradients and shards tables itself, compile the bare model"
        )
    sources = {node: torch_internals.source_of(node) for node in placeholders(gm)}
    chains = {n: torch_internals.source_modules(s) for n, s in sources.items() if s is not None}
    roots = [chain[0] for chain in chains.values() if chain]
    root = _root(list(dict.fromkeys(roots)), running)
    holders = [module for module in running if root is not None and _holds(module, root)]
    capture = Capture(gm, root, holders[-1] if holders else root)
    names = {} if root is None else _names(root)
    for node, source in sources.items():
        value = torch_internals.input_value(node)
        of_parameter = bool(chains.get(node)) or isinstance(value, nn.Parameter)
        if source is not None and not of_parameter and torch_internals.is_frame_input(source):
            capture.sources[node.name] = torch_internals.source_text(source)
        if not isinstance(value, torch.Tensor):
            continue
        if of_parameter:
            capture.parameters[node.name] = value
            capture.flat_names[node.name] = names.get(id(value), node.name)
        elif source is not None and torch_internals.is_frame_input(source):
            capture.inputs[node.name] = value
            capture.flat_names[node.name] = torch_internals.variable_name(source)
    return capture


def _root(roots: list[nn.Module], running: list[nn.Module]) -> nn.Module | None:
    """Return the innermost running module that holds everything captured, else the module most inputs came through."""
    if not roots:
        return None
    for module in running:
        if all(_holds(module, root) for root in roots):
            return module
    return max(roots, key=lambda module: sum(1 for _ in module.parameters()))


def _holds(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())


def _names(root: nn.Module) -> dict[int, str]:
    """Return the flat name of every parameter and buffer, by identity; the first name of a tied one."""
    names: dict[int, str] = {}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        names.setdefault(id(tensor), name.replace("_orig_mod.", ""))
    return names


_LOOKUPS = ("embedding", "embedding_bag")
# What a mask ends in, whatever its number of columns.
_END_COLUMNS = {"any", "all", "max", "mean", "size", "softmax", "sum", "sym_size"}
_LAY_OUT = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "getitem", "select", "split", "chunk", "unbind"),
    *("cat", "concat", "stack", "hstack"),
}


def dynamic_dims(gm: fx.GraphModule, capture: Capture) -> dict[str, tuple[int, ...]]:
    """Return which dimensions of the batch's tensors change from call to call.

    Dimension 0 (samples, or ids of all bags), except for a tensor that the model takes apart along dimension 0, such as
    offsets of shape (tables, samples): there it is dimension 1. Of a (samples, length) tensor both, where the model
    treats all positions alike; a matrix of one column a field is taken apart, or meets something of a fixed length.
    """
    dims: dict[str, tuple[int, ...]] = {}
    # Lookups and all that follows from them: its length is the model's own business.
    mixed = dependents(node for node in gm.graph.nodes if name_of(node) in _LOOKUPS)
    for node in placeholders(gm):
        tensor = capture.inputs.get(node.name)
        if isinstance(tensor, torch.Tensor) and tensor.ndim:
            taken_apart = tensor.ndim > 1 and bool(node.users) and all(_takes_apart(user) for user in node.users)
            sequence = tensor.ndim == 2 and _any_length(node, mixed)
            if sequence and tensor.shape[1] == 1:  # it may as well be a column that the model squeezes
                sequence = not any(_asks_for_one(n) for n in dependents([node]) if name_of(n) == "embedding")
            dims[node.name] = (1,) if taken_apart else (0, 1) if sequence else (0,)
    return dims


def _any_length(node: fx.Node, mixed: set[fx.Node]) -> bool:
    """Tell whether what becomes of a matrix, up to a lookup or a sum, goes for any number of columns.

    A wrong yes costs a second trace: what needs a fixed length then puts a guard on it. A wrong no costs a graph for
    each of the first two lengths.
    """
    onward = [user for user in node.users if user not in mixed and name_of(user) not in _END_COLUMNS]
    return all(_keeps_columns(user, node) and _any_length(user, mixed) for user in onward)


def _asks_for_one(lookup: fx.Node) -> bool:
    """Tell whether rows of one position a sample are laid out anew before something sums over positions."""
    stack, seen = [lookup], {lookup}
    while stack:
        for user in stack.pop().users:
            given = [arg for arg in (*user.args[1:], *user.kwargs.values()) if isinstance(arg, int)]
            dims = [dim % 3 for dim in given] or [1]
            of_width = name_of(user) in ("squeeze", "cat", "concat") and 1 not in dims
            if name_of(user) in _LAY_OUT and not of_width:
                return True
            if name_of(user) not in {*_END_COLUMNS, "bmm", "matmul"} and user not in seen and user.op != "output":
                seen.add(user)
                stack.append(user)
    return False


def _keeps_columns(user: fx.Node, node: fx.Node) -> bool:
    """Tell whether a node has a value for each element of a matrix, and no operand with a value for each column."""
    shape, given = _shape(user), _shape(node)
    others = [
        n
        for n in user.all_input_nodes
        if n is not node and (n.op == "get_attr" or _shape(n)[-1:] == given[-1:] != (1,))
    ]
    return (shape == given or name_of(user) == "unsqueeze") and all(len(_shape(n)) == len(given) for n in others)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    # expressions: comparing sizes themselves would put guards on them
    return tuple(map(torch_internals.canonical_expression, value.shape)) if isinstance(value, torch.Tensor) else ()


def _takes_apart(user: fx.Node) -> bool:
    if name_of(user) == "getitem":
        return isinstance(user.args[1], int)
    return name_of(user) == "unbind" or (name_of(user) == "select" and user.args[1:2] == (0,))
