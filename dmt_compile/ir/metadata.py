"""The metadata of every node: its value on fake tensors, derived in an environment of our own.

Dynamo's own metadata lives in another fake mode, whose symbols carry guards and pending assertions. Here each symbol of
Dynamo's becomes a fresh size without guards, so deriving, verifying and compiling regions cannot disturb Dynamo.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from dmt_compile import torch_internals
from dmt_compile.ir.ops import OPERATORS, FreshSizes, fake_rows, requires_grad
from dmt_compile.torch_internals import FakeTensor


class _Result(torch.autograd.Function):
    """Makes a tensor that is no leaf, since operations in place may follow, without the cost of a real operation."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


class FakeEnvironment:
    """Derives node values; ``node.meta["val"]`` holds each."""

    def __init__(self) -> None:
        self.mode = torch_internals.fake_mode()
        self._symbols: dict[Any, Any] = {}
        with self.mode:
            self._anchor = torch.empty(0, requires_grad=True)
        self._sizes = FreshSizes(lambda: torch_internals.fresh_size(self.mode))

    def fresh_size(self) -> torch.SymInt:
        """Return a new symbolic size."""
        return self._sizes.make()

    def adopt(self, value: Any) -> Any:
        """Return Dynamo's fake value as one of this environment; equal symbols stay equal."""
        if isinstance(value, torch.SymInt):
            return self._adopt_size(value)
        return self._empty(value, value.requires_grad) if isinstance(value, torch.Tensor) else value

    def _empty(self, value: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
        with self.mode:
            return torch.empty_strided(
                tuple(self._adopt_size(size) for size in value.shape),
                tuple(self._adopt_size(stride) for stride in value.stride()),
                dtype=value.dtype,
                device=value.device,
                requires_grad=requires_grad,
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

    def record(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Give a node the value derived from its arguments', which need not be derived again to be trusted."""
        node.meta["val"] = self.derive(node, gm)
        self.trust(node)

    def call(self, op: str, target: Any, args: Any, kwargs: Any, gm: fx.GraphModule) -> Any:
        """Return the value of calling a node's target on fake values."""
        operator = OPERATORS.get(target) if op == "call_function" else None
        rule = LOOKUP_RULES.get(target) if op == "call_function" else None
        with self.mode, torch_internals.enable_python_dispatcher():  # composite operators keep symbolic sizes then
            if rule is not None:
                return rule(*args, **kwargs)
            if operator is not None:
                return operator.fake(self._sizes, *args, **kwargs)
            if op == "call_function":
                return target(*args, **kwargs)
            if op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if op == "call_module":
                module = gm.get_submodule(target)
                return module.fake_call(self, *args) if hasattr(module, "fake_call") else module(*args, **kwargs)  # type: ignore[operator]
            return self.adopt(attrgetter(target)(gm))  # its sizes are what they are, not symbols

    def annotate(self, gm: fx.GraphModule) -> None:
        """Give every node a value: Dynamo's, else one derived from its arguments'; placeholders keep what they have.

        Adopting Dynamo's takes far less time than deriving them anew.
        """
        examples = (node.meta.get("example_value") for node in gm.graph.nodes)
        example = next((value for value in examples if isinstance(value, FakeTensor)), None)
        settled = example is not None and torch_internals.sizes_are_settled(example)
        adopted: dict[int, Any] = {}  # what an operation in place returns is its argument, here as there

        def adopt(value: Any, make: Callable[[Any], Any]) -> Any:
            return adopted[id(value)] if id(value) in adopted else adopted.setdefault(id(value), make(value))

        for node in gm.graph.nodes:
            if node.op == "output":
                node.meta["val"] = fx.map_arg(node.args[0], lambda n: n.meta["val"])
            elif node.op == "placeholder":
                if "val" not in node.meta:
                    node.meta["val"] = adopt(node.meta["example_value"], self.adopt)
            elif node.op == "get_attr" or not settled or "example_value" not in node.meta:
                self.record(node, gm)
            else:
                node.meta["val"] = tree_map(lambda leaf: adopt(leaf, self._adopt_result), node.meta["example_value"])
                self.trust(node)

    def _adopt_result(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return self.adopt(value)
        with torch.enable_grad():
            return _Result.apply(self._anchor, lambda: self._empty(value))  # type: ignore[no-untyped-call]

    def trust(self, node: fx.Node) -> None:
        """Take a node's value as what its target gives for its arguments, until one of these changes."""
        values = [source.meta["val"] for source in (node, *node.all_input_nodes)]
        node.meta["trusted"] = self._state(node), values  # held, so that nothing else gets their identity

    def trusted(self, node: fx.Node) -> bool:
        """Tell whether nothing changed since the node's value was last trusted."""
        return "trusted" in node.meta and bool(node.meta["trusted"][0] == self._state(node))

    @staticmethod
    def _state(node: fx.Node) -> tuple[Any, ...]:
        values = [id(source.meta["val"]) for source in node.all_input_nodes]
        return node.target, node.args, node.kwargs, values, id(node.meta["val"])


def _embedding(input: Any, weight: Any, *options: Any, **named: Any) -> Any:
    return requires_grad(fake_rows(weight, *input.shape), weight)


def _embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    mode: Any = "mean",
    sparse: Any = False,
    per_sample_weights: Any = None,
    include_last_offset: Any = False,
    padding_idx: Any = None,
) -> Any:
    bags = input.shape[0] if input.ndim == 2 else offsets.shape[0] - int(include_last_offset)
    return requires_grad(fake_rows(weight, bags), weight, per_sample_weights)


# What a lookup gives. PyTorch's own rules take milliseconds each, too many for a model of a thousand tables.
LOOKUP_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.nn.functional.embedding: _embedding,
    torch.nn.functional.embedding_bag: _embedding_bag,
}
# Arguments of which a lookup that Dynamo traces may have any: with the others its own rules check more, or write.
_PLAIN = {
    *("input", "weight", "offsets", "mode", "sparse", "scale_grad_by_freq", "norm_type", "include_last_offset"),
    "per_sample_weights",
}


def is_plain_lookup(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether ``LOOKUP_RULES`` may stand for PyTorch's own rule for a lookup.

    Where that one asks nothing of sizes but what ``equal_sizes`` states. Of a matrix of ids it says that there are as
    many bags as a range over all ids has steps of a row, and not, what is the same, as many as rows.
    """
    given = inspect.signature(target).bind(*args, **kwargs).arguments
    padding, rows = given.pop("padding_idx", None), given["weight"].shape[0]
    unusual = any(value is not None and name not in _PLAIN for name, value in given.items())
    if unusual or given["weight"].ndim != 2:
        return False
    if target is torch.nn.functional.embedding_bag and given["input"].ndim != 2 - (given.get("offsets") is not None):
        return False
    return padding is None or (isinstance(padding, int) and isinstance(rows, int) and -rows <= padding < rows)


def equal_sizes(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return the sizes that a lookup takes for equal: those of ids and of their weights."""
    given = inspect.signature(target).bind(*args, **kwargs).arguments
    weights = given.get("per_sample_weights")
    return [] if weights is None else list(zip(given["input"].shape, weights.shape, strict=False))


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
    for leaf in tree_leaves(value):
        sizes = tuple(leaf.shape) if isinstance(leaf, FakeTensor) else (leaf,) if isinstance(leaf, torch.SymInt) else ()
        for size in sizes:
            expression = torch_internals.canonical_expression(size)
            found.update(getattr(expression, "free_symbols", ()))
    return found
