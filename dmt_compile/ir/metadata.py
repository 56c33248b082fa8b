"""The metadata of every node: its value on fake tensors, derived in an environment of our own.

Dynamo's own metadata lives in another fake mode, whose symbols carry guards and pending assertions. Here each symbol of
Dynamo's becomes a fresh size without guards, so deriving, verifying and compiling regions cannot disturb Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from dmt_compile import torch_internals
from dmt_compile.ir.ops import OPERATORS, FreshSizes, requires_grad
from dmt_compile.torch_internals import FakeTensor, FakeTensorMode, ShapeEnv


class FakeEnvironment:
    """Derives node values; ``node.meta["val"]`` holds each."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._symbols: dict[Any, Any] = {}
        self._sizes = FreshSizes(lambda: torch_internals.fresh_size(self.mode))

    def fresh_size(self) -> torch.SymInt:
        """Return a new symbolic size."""
        return self._sizes.make()

    def adopt(self, value: Any) -> Any:
        """Return Dynamo's fake value as one of this environment; equal symbols stay equal."""
        if isinstance(value, torch.SymInt):
            return self._adopt_size(value)
        if not isinstance(value, torch.Tensor):
            return value
        with self.mode:
            return torch.empty_strided(
                tuple(self._adopt_size(size) for size in value.shape),
                tuple(self._adopt_size(stride) for stride in value.stride()),
                dtype=value.dtype,
                device=value.device,
                requires_grad=value.requires_grad,
            )

    def _adopt_size(self, size: int | torch.SymInt) -> Any:
        expression = torch_internals.canonical_expression(size)
        if isinstance(expression, int) or expression.is_number:
            return int(expression)
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = self.fresh_size().node.expr
        return torch_internals.size_from_expression(self.mode, expression.xreplace(self._symbols))

    def derive(self, node: fx.Node, gm: fx.GraphModule) -> Any:
        """Return the value of a node from its arguments' values.

        Raises:
            Exception: whatever the operator says of arguments that do not fit.
        """
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
        return self.call(node.op, node.target, args, kwargs, gm)

    def call(self, op: str, target: Any, args: Any, kwargs: Any, gm: fx.GraphModule) -> Any:
        """Return the value of calling a node's target on fake values."""
        operator = OPERATORS.get(target) if op == "call_function" else None
        if target in _LOOKUPS and op == "call_function":
            return _fake_lookup(target, *args, **kwargs)
        with self.mode, torch_internals.enable_python_dispatcher():  # composite operators keep symbolic sizes then
            if operator is not None:
                return operator.fake(self._sizes, *args, **kwargs)
            if op == "call_function":
                return target(*args, **kwargs)
            if op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if op == "call_module":
                module = gm.get_submodule(target)
                return module.fake_call(self, *args) if hasattr(module, "fake_call") else module(*args, **kwargs)  # type: ignore[operator]
            return self.adopt(torch_internals.attribute(gm, target))  # its sizes are what they are, not symbols

    def annotate(self, gm: fx.GraphModule) -> None:
        """Give every node a value; placeholders keep theirs, or adopt Dynamo's."""
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                if "val" not in node.meta:
                    node.meta["val"] = self.adopt(node.meta["example_value"])
            elif node.op == "output":
                node.meta["val"] = fx.map_arg(node.args[0], lambda n: n.meta["val"])
            else:
                node.meta["val"] = self.derive(node, gm)


_F = torch.nn.functional
_LOOKUPS = (_F.embedding_bag, _F.embedding)


def _fake_lookup(target: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a lookup gives; PyTorch's own rule takes milliseconds, too many for a model of a thousand tables."""
    shape = (*input.shape, weight.shape[1])
    if target is _F.embedding_bag:
        offsets: Any = args[0] if args else kwargs.get("offsets")
        last = args[7] if len(args) > 7 else kwargs.get("include_last_offset", False)
        bags = input.shape[0] if input.ndim == 2 else offsets.shape[0] - int(last)
        shape = (bags, weight.shape[1])
    weights = args[6] if len(args) > 6 else kwargs.get("per_sample_weights")
    return requires_grad(weight.new_empty(shape), weight, weights)


def describe(value: Any) -> str:
    """Write a value's metadata as one line."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(str(torch_internals.canonical_expression(s)) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return str(torch_internals.canonical_expression(value)) if isinstance(value, torch.SymInt) else type(value).__name__


def same(recorded: Any, derived: Any, known: Callable[[Any], bool]) -> bool:
    """Tell whether recorded metadata agrees with metadata derived anew.

    Sizes must be equal, except where one is a symbol that only that derivation knows: ``known`` tells the symbols that
    stem from the graph's inputs.
    """
    if isinstance(recorded, torch.Tensor):
        return (
            isinstance(derived, torch.Tensor)
            and recorded.dtype == derived.dtype
            and recorded.device == derived.device
            and recorded.ndim == derived.ndim
            and all(_same_size(a, b, known) for a, b in zip(recorded.shape, derived.shape, strict=True))
        )
    if isinstance(recorded, tuple | list):
        return (
            isinstance(derived, tuple | list)
            and len(recorded) == len(derived)
            and all(same(a, b, known) for a, b in zip(recorded, derived, strict=True))
        )
    if isinstance(recorded, int | torch.SymInt):
        return isinstance(derived, int | torch.SymInt) and _same_size(recorded, derived, known)
    return type(recorded) is type(derived)


def _same_size(a: Any, b: Any, known: Callable[[Any], bool]) -> bool:
    left, right = torch_internals.canonical_expression(a), torch_internals.canonical_expression(b)
    if isinstance(left, int) or isinstance(right, int):
        return bool(left == right)
    symbols = left.free_symbols | right.free_symbols
    return bool(left == right) or not all(known(symbol) for symbol in symbols)


def symbols_of(value: Any) -> set[Any]:
    """Return the symbols in the sizes of a value."""
    found: set[Any] = set()

    def visit(leaf: Any) -> Any:
        sizes = tuple(leaf.shape) if isinstance(leaf, FakeTensor) else (leaf,) if isinstance(leaf, torch.SymInt) else ()
        for size in sizes:
            expression = torch_internals.canonical_expression(size)
            found.update(getattr(expression, "free_symbols", ()))
        return leaf

    tree_map(visit, value)
    return found
