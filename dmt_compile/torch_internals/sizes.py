"""Fake tensors, their symbolic sizes, and what is assumed of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, _constrain_range_for_size


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no numbers; also of a wrapper around one, but not of what AOTAutograd traces with."""
    return isinstance(getattr(tensor, "_local", tensor), FakeTensor)


def fake_mode() -> FakeTensorMode:
    """Return a mode to derive values of symbolic sizes in, without the cache, which costs more there than it saves."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode


def fresh_size(mode: FakeTensorMode) -> torch.SymInt:
    """Return a new symbolic size that nothing guards on.

    Who asks whether it is 0 or 1 hears no: batch norm does, and what it asks for makes no other code for 0 and 1.
    """
    env = mode.shape_env
    assert env is not None
    size = env.create_unbacked_symint()
    _constrain_range_for_size(size, min=2)
    env.pending_fresh_unbacked_symbols.clear()  # the symbol is an input of ours, no operator's output has to bind it
    return size


def sizes_are_settled(value: FakeTensor) -> bool:
    """Tell whether the sizes in Dynamo's graph hold without what else it assumed of them.

    An equality that it could write into the sizes is settled, and bounds of one size change nothing. After any other,
    such as that a batch has one sample, the size is still a symbol in one place and the number in another.
    """
    env = value.fake_mode.shape_env
    if env is None:
        return True
    for guard in env.guards:
        rest = env.simplify(guard.expr)
        if not rest.free_symbols:
            continue
        if getattr(rest, "rel_op", "==") == "==" or not rest.args[0].is_Symbol or rest.args[1].free_symbols:
            return False
    return True


def canonical_expression(size: int | torch.SymInt) -> Any:
    """Return a size as a number or a simplified symbolic expression, comparable and hashable."""
    if isinstance(size, int):
        return size
    return size.node.shape_env.simplify(size.node.expr)


def same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Tell whether two sizes are the same number, whatever their symbols are: tried with some numbers above 0."""
    expressions = [canonical_expression(size) for size in (one, other)]
    if expressions[0] == expressions[1]:
        return True
    symbols = sorted(set().union(*(getattr(e, "free_symbols", set()) for e in expressions)), key=str)
    for first in (1, 2, 5, 11):
        numbers = {symbol: first + 3 * place for place, symbol in enumerate(symbols)}
        values = {e.subs(numbers) if hasattr(e, "subs") else e for e in expressions}
        if len(values) > 1:
            return False
    return True


def size_from_expression(mode: FakeTensorMode, expression: Any) -> int | torch.SymInt:
    """Return the size for an expression over symbols of ``mode``."""
    if expression.is_number:
        return int(expression)
    assert mode.shape_env is not None
    return mode.shape_env.create_symintnode(expression, hint=None)


def drop_needless_guards(checked: Sequence[Sequence[torch.Tensor]]) -> None:
    """Drop guards of the present analysis that would only trace the same graph anew.

    That dimension 0 is the same for the fake inputs of a group of ``checked``: the program checks it at each call.
    Dynamo would trace anew for a batch that breaks it, and fail inside an operator on that rank alone. And that a size
    is not 0 or 1 where only an operator's own shape rule asked, not the model: at torch level the operator is one node.

    Call it once all metadata has been read.
    """
    groups = [{_symbol(tensor.shape[0]) for tensor in group} - {None} for group in checked]
    context = TracingContext.try_get()
    env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    if env is None:
        return
    for symbol in set().union(*groups):
        env.replacements.pop(symbol, None)
    env.guards = [guard for guard in env.guards if not _equates(guard.expr, groups) and not _asked_by_operator(guard)]
    env._update_version_counter()
    env._replacements_version_counter = getattr(env, "_replacements_version_counter", 0) + 1


def _symbol(size: int | torch.SymInt) -> Any:
    return size.node._expr if isinstance(size, torch.SymInt) else None


def _equates(expression: Any, groups: Sequence[set[Any]]) -> bool:
    return type(expression).__name__ == "Equality" and any(set(expression.args) <= symbols for symbols in groups)


_SHAPE_RULES = (
    "_decomp/decompositions.py",
    "_meta_registrations.py",
    "_refs/__init__.py",
    "torch/functional.py",
    "torch/nn/functional.py",
)


def _asked_by_operator(guard: Any) -> bool:
    location = getattr(guard.sloc, "framework_loc", None)
    file = str(getattr(location, "filename", location)).replace("\\", "/")
    is_not = type(guard.expr).__name__ == "Unequality" and any(number in guard.expr.args for number in (0, 1))
    refuses = str(getattr(location, "name", "")).startswith("_verify")  # batch norm of one value
    return is_not and not refuses and any(rules in file for rules in _SHAPE_RULES)
