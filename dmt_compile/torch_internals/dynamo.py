"""How Dynamo analyses a frame: where graph inputs came from, which sizes are symbols, which rules give fake values."""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._dynamo.utils
from torch import nn
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from dmt_compile.torch_internals.sizes import same_size


def source_of(placeholder: torch.fx.Node) -> Any | None:
    """Return where Dynamo took a graph input from, or ``None`` for a graph that Dynamo did not make."""
    graph_arg = placeholder.meta.get("grapharg")
    return None if graph_arg is None else graph_arg.source


def input_value(placeholder: torch.fx.Node) -> Any:
    """Return the real value behind a graph input, or ``None`` for a graph that Dynamo did not make."""
    graph_arg = placeholder.meta.get("grapharg")
    return None if graph_arg is None else graph_arg.example


def source_text(source: Any) -> str:
    """Return a source as an expression of the frame's variables ``L`` and globals ``G``."""
    return str(source.name() if callable(source.name) else source.name)  # a method until torch 2.11


def _evaluate(source: Any, output: Any) -> Any:
    try:
        return eval(source_text(source), output.global_scope, {"L": output.local_scope, "G": output.global_scope})
    except Exception:
        return None  # a source that only exists inside Dynamo, such as a cell


def source_modules(source: Any) -> list[nn.Module]:
    """Return the ``nn.Module`` objects that a graph input was reached through, outermost first.

    Must run inside the backend call, while Dynamo still holds the frame's variables.
    """
    output = InstructionTranslator.current_tx().output
    found: list[nn.Module] = []
    while source is not None:
        value = _evaluate(source, output)
        if isinstance(value, nn.Module):
            found.append(value)
        source = getattr(source, "base", None)
    return found[::-1]


def guard_identity(module: nn.Module) -> None:
    """Guard the graph that is being compiled on this very module, among those through which its inputs were reached.

    Where the frame holds the module in a variable, its graphs count against Dynamo's limit of recompilations by
    themselves: a process may compile many models of one class.
    """
    output = InstructionTranslator.current_tx().output
    for node in output.graph.nodes:
        source = source_of(node) if node.op == "placeholder" else None
        reached = None  # the variable that holds the module comes last, within what Dynamo notes of modules
        while source is not None:
            reached = source if _evaluate(source, output) is module else reached
            source = getattr(source, "base", None)
        if reached is not None:
            output.guards.add(reached.make_guard(GuardBuilder.ID_MATCH))
            return


def variable_name(source: Any) -> str:
    """Return a graph input as the user would write it, such as ``offsets[0]``."""
    return re.sub(r"^L\['(\w+)'\]", r"\1", source_text(source))


def is_frame_input(source: Any) -> bool:
    """Tell whether a graph input came in through the compiled frame's own variables."""
    while getattr(source, "base", None) is not None:
        source = source.base
    return source_text(source).startswith("L[")


def calling_modules() -> list[nn.Module]:
    """Return the modules whose forward is running, innermost first, with ``torch.compile``'s wrappers unwrapped."""
    found: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name in ("_call_impl", "__call__", "forward") else None
        if isinstance(caller, nn.Module):
            module: nn.Module = getattr(caller, "_orig_mod", caller)
            if module not in found:
                found.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    return found


_marked: list[weakref.ref[torch.Tensor]] = []
_options: list[contextlib.AbstractContextManager[Any]] = []  # of PyTorch, while Dynamo analyses a frame of ours


def _set_tracing_options() -> None:
    if not _options:
        # Sizes 0 and 1 are no cases of their own; two sizes are not one symbol because they are equal in this batch.
        shapes = {"backed_size_oblivious": True, "use_duck_shape": False}
        _options.append(_config.patch(shapes))  # type: ignore[attr-defined]
        # Numbers read off tensors, such as the lengths in a jagged tensor, do not break the graph. What an operator
        # gives for symbolic sizes is sooner derived than kept in PyTorch's cache, where it is seldom asked for again.
        _options.append(torch._dynamo.config.patch(capture_scalar_outputs=True, fake_tensor_cache_enabled=False))
        # In a KeyedJaggedTensor plain integers are sizes too: its samples, and its ids of each feature.
        sizes = r".*\._stride,.*\._length_per_key\[\d+\],.*\._offset_per_key\[\d+\]"
        _options.append(torch.compiler.config.patch(dynamic_sources=sizes))  # type: ignore[attr-defined]
        _options.append(
            mock.patch.object(torch._dynamo.utils, "run_node", _run_with_rules(torch._dynamo.utils.run_node))
        )
        for option in _options:
            option.__enter__()


_rules: dict[Any, tuple[Callable[..., Any], Callable[..., bool], Callable[..., Sequence[tuple[Any, Any]]]]] = {}


def trace_by_rule(
    target: Callable[..., Any],
    rule: Callable[..., Any],
    applies: Callable[..., bool],
    equal: Callable[..., Sequence[tuple[Any, Any]]],
) -> None:
    """Let Dynamo, while it traces for a backend of ours, take what calls of ``target`` give from a cheaper rule.

    The first call of each form (types, dimensions, options) still goes through PyTorch's own rule, with its errors;
    where the cheaper one says the same, it serves the calls of that form.

    Args:
        target: a function that a graph may call.
        rule: gives what ``target`` gives for fake arguments.
        applies: tells, of ``target``, its arguments and keyword arguments, whether the rule may stand for PyTorch's:
            whether that one asks nothing of sizes.
        equal: returns, of the same, the sizes that must be equal for ``target`` to be called at all. PyTorch's own rule
            asks whether they are, which ends the graph where an empty first batch left them without values.
    """
    _rules[target] = rule, applies, equal


def _run_with_rules(run_node: Callable[..., Any]) -> Callable[..., Any]:
    """Return Dynamo's function that runs a node on fake values, with the rules of :func:`trace_by_rule` before it."""
    trusted: dict[Any, bool] = {}  # by form, whether the rule says what PyTorch's own does

    def run(tracer: Any, node: torch.fx.Node, args: Any, kwargs: Any, module: Any) -> Any:
        if node.op != "call_function" or node.target not in _rules:
            return run_node(tracer, node, args, kwargs, module)
        rule, applies, equal = _rules[node.target]
        form = node.target, _form(args), _form(kwargs), torch.is_grad_enabled()
        for one, other in equal(node.target, args, kwargs):
            if free_unbacked_symbols((one, other)):
                torch._check(one == other)
            elif one != other:  # guards on it, as PyTorch's own rule does, which says what is wrong
                return run_node(tracer, node, args, kwargs, module)
        if not applies(node.target, args, kwargs):
            return run_node(tracer, node, args, kwargs, module)
        if trusted.get(form):
            return rule(*args, **kwargs)
        out = run_node(tracer, node, args, kwargs, module)
        if form in trusted:
            return out
        mine = rule(*args, **kwargs)
        trusted[form] = _form(out) == _form(mine) and all(map(same_size, out.shape, mine.shape))
        return mine if trusted[form] else out

    return run


def _form(value: Any) -> Any:
    """Return what can be said of an argument without its sizes, and without numbers that are symbols."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.device, value.layout, value.ndim, value.requires_grad
    if isinstance(value, dict | tuple | list):
        return tuple(map(_form, value.items() if isinstance(value, dict) else value))
    return type(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def mark_dynamic_dims(tensor: torch.Tensor, dims: Sequence[int], empty_batch: bool = False) -> None:
    """Ask Dynamo's next analysis to give each of ``dims`` a symbolic size, 0 and 1 included.

    A size that the model's own code branches on, or that an operator needs fixed, gets a guard; nothing else guards on
    it, since size-oblivious reasoning keeps 0 and 1 from being cases of their own. Of an ``empty_batch`` the sizes that
    are 0 get no guard and no value at all: what Dynamo would infer from it would hold for no other batch. Marks and
    reasoning go with the compilation, however it ends.
    """
    _set_tracing_options()
    before = set(tensor.__dict__)
    for dim in dims:
        (mark_unbacked if empty_batch and not tensor.shape[dim] else maybe_mark_dynamic)(tensor, dim)
    marks, marked_dims = getattr(tensor, "_dmt_marks", ((), ()))
    tensor._dmt_marks = (*marks, *(set(tensor.__dict__) - before)), (*marked_dims, *dims)  # type: ignore[attr-defined]
    _marked.append(weakref.ref(tensor))


def take_back_marks() -> None:
    """Undo :func:`mark_dynamic_dims` on all tensors, so that other compilers see them as they were."""
    while _options:
        _options.pop().__exit__(None, None, None)
    while _marked:
        tensor = _marked.pop()()
        if tensor is not None:
            for name in tensor.__dict__.pop("_dmt_marks", ((), ()))[0]:
                tensor.__dict__.pop(name, None)


def marked_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions that :func:`mark_dynamic_dims` marked."""
    dims: tuple[int, ...] = getattr(tensor, "_dmt_marks", ((), ()))[1]
    return dims


def mark_before_tracing(is_ours: Callable[[Any], bool], dims_of: Callable[[torch.Tensor], Sequence[int]]) -> None:
    """Mark the tensors among a frame's variables before Dynamo traces it for a backend of ours.

    Dynamo offers no such hook to a backend; its compile callbacks do not name the frame, so it is read off the stack.
    Where that fails (another version) the backend marks and restarts the analysis instead: one trace more, the same
    graph.

    Args:
        is_ours: tells whether a backend is one that wants this.
        dims_of: the dimensions to mark of a tensor.
    """

    def start(_: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not (frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals):
            frame = frame.f_back
        if frame is None or not is_ours(_innermost_backend(frame.f_locals["compiler_fn"])):
            return
        _set_tracing_options()
        leaves = [leaf for leaf in tree_leaves(dict(frame.f_locals["locals"])) if isinstance(leaf, torch.Tensor)]
        batch = [leaf for leaf in leaves if not isinstance(leaf, nn.Parameter) and not marked_dims(leaf)]
        empty = not any(leaf.numel() for leaf in batch)
        for leaf in batch:
            if dims := dims_of(leaf):
                mark_dynamic_dims(leaf, dims, empty)

    def end(_: Any) -> None:
        take_back_marks()

    handler = torch._dynamo.callback.callback_handler
    handler.start_callbacks = _LastingCallbacks(handler.start_callbacks, start)
    handler.end_callbacks = _LastingCallbacks(handler.end_callbacks, end)


class _LastingCallbacks(list[Callable[[Any], None]]):
    """Callbacks of which one outlives ``torch._dynamo.reset``: the backend stays registered, and so must its hook."""

    def __init__(self, others: Sequence[Callable[[Any], None]], lasting: Callable[[Any], None]) -> None:
        super().__init__([*others, lasting])
        self._lasting = lasting

    def clear(self) -> None:
        self[:] = [self._lasting]


def _innermost_backend(backend: Any) -> Any:
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        while hasattr(backend, name):
            backend = getattr(backend, name)
    return backend


def drop_unused_sizes(gm: torch.fx.GraphModule) -> None:
    """Take sizes that nothing reads out of a graph's inputs, before a backend returns.

    Each tensor brings the symbols of its sizes and of its place in memory as inputs of their own; how many depends on
    the batch. Dynamo's code computes all of them in every call, through Python, and asks the graph what to pass once
    the backend has returned.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    unused = [n for n in inputs if not n.users and isinstance(n.meta.get("example_value"), torch.SymInt)]
    for node in unused:
        gm.graph.erase_node(node)
    if unused:
        gm.recompile()


def ends_in_graph_break() -> bool:
    """Tell, inside a backend call, whether the model goes on after this graph."""
    reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    return reason is not None and bool(reason.graph_break)


def restart_analysis(reason: str) -> None:
    """Make Dynamo trace the current frame again.

    Dynamo restarts the analysis on this exception of a backend and on no other.
    """
    InstructionTranslator.current_tx().speculation_log.clear()  # with other dynamic sizes it may take another way
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def unlimited_recompiles() -> contextlib.AbstractContextManager[Any]:
    """Lift Dynamo's recompile limits while a simulated world runs: one class may have many models there."""
    lifted: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=10**6, accumulated_recompile_limit=10**6
    )
    return lifted
