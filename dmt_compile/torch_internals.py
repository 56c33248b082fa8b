"""Every private API of PyTorch that dmt_compile touches, and nothing else.

PyTorch moves these between minor versions; the rest of the package calls the names defined here. Tried on 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._dynamo.utils
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import Store
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv, _constrain_range_for_size
from torch.utils._pytree import tree_leaves

__all__ = [  # what others may import from here
    "FakeTensor",
    "FakeTensorMode",
    "ShortenTraceback",
    "Store",
    "enable_python_dispatcher",
]

# ---------------------------------------------------------------------------------------------- Dynamo's graph inputs


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
    """Guard the graph that is being compiled on this very module, among those through which its inputs were reached."""
    output = InstructionTranslator.current_tx().output
    for node in output.graph.nodes:
        source = source_of(node) if node.op == "placeholder" else None
        while source is not None:
            if _evaluate(source, output) is module:
                output.guards.add(source.make_guard(GuardBuilder.ID_MATCH))
                return
            source = getattr(source, "base", None)


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


# ------------------------------------------------------------------------------------------------------ dynamic shapes


_marked: list[weakref.ref[torch.Tensor]] = []
_options: list[contextlib.AbstractContextManager[Any]] = []  # of PyTorch, while Dynamo analyses a frame of ours


def _set_tracing_options() -> None:
    if not _options:
        # Sizes 0 and 1 are no cases of their own; two sizes are not one symbol because they are equal in this batch.
        shapes = {"backed_size_oblivious": True, "use_duck_shape": False}
        _options.append(_config.patch(shapes))  # type: ignore[attr-defined]
        # Numbers read off tensors, such as the lengths in a jagged tensor, do not break the graph.
        _options.append(torch._dynamo.config.patch(capture_scalar_outputs=True))
        # In a KeyedJaggedTensor plain integers are sizes too: its samples, and its ids of each feature.
        sizes = r".*\._stride,.*\._length_per_key\[\d+\],.*\._offset_per_key\[\d+\]"
        _options.append(torch.compiler.config.patch(dynamic_sources=sizes))  # type: ignore[attr-defined]
        _options.append(
            mock.patch.object(torch._dynamo.utils, "run_node", _run_with_rules(torch._dynamo.utils.run_node))
        )
        for option in _options:
            option.__enter__()


_rules: dict[Any, tuple[Callable[..., Any], Callable[..., bool]]] = {}


def trace_by_rule(target: Callable[..., Any], rule: Callable[..., Any], applies: Callable[..., bool]) -> None:
    """Let Dynamo, while it traces for a backend of ours, take what calls of ``target`` give from a cheaper rule.

    The first call of each form (types, dimensions, options) still goes through PyTorch's own rule, with its errors;
    where the cheaper one says the same, it serves the calls of that form.

    Args:
        target: a function that a graph may call.
        rule: gives what ``target`` gives for fake arguments.
        applies: tells, of ``target``, its arguments and keyword arguments, whether the rule may stand for PyTorch's:
            whether that one asks nothing of sizes.
    """
    _rules[target] = rule, applies


def _run_with_rules(run_node: Callable[..., Any]) -> Callable[..., Any]:
    """Return Dynamo's function that runs a node on fake values, with the rules of :func:`trace_by_rule` before it."""
    trusted: dict[Any, bool] = {}  # by form, whether the rule says what PyTorch's own does

    def run(tracer: Any, node: torch.fx.Node, args: Any, kwargs: Any, module: Any) -> Any:
        rule, applies = _rules.get(node.target, (None, None)) if node.op == "call_function" else (None, None)
        form = None if rule is None else (node.target, _form(args), _form(kwargs), torch.is_grad_enabled())
        if rule is None or applies is None or not applies(node.target, args, kwargs):
            return run_node(tracer, node, args, kwargs, module)
        if trusted.get(form):
            return rule(*args, **kwargs)
        out = run_node(tracer, node, args, kwargs, module)
        if form not in trusted:
            mine = rule(*args, **kwargs)
            sizes = [[canonical_expression(size) for size in value.shape] for value in (out, mine)]
            trusted[form] = _form(out) == _form(mine) and sizes[0] == sizes[1]
        return out

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


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no numbers; also of a wrapper around one, but not of what AOTAutograd traces with."""
    return isinstance(getattr(tensor, "_local", tensor), FakeTensor)


def written(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to in place; ``None`` where nobody counts, as in inference mode."""
    return None if tensor.is_inference() else tensor._version


def attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path, as a graph's ``get_attr`` node names it."""
    value: Any = module
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


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


def size_from_expression(mode: FakeTensorMode, expression: Any) -> int | torch.SymInt:
    """Return the size for an expression over symbols of ``mode``."""
    if expression.is_number:
        return int(expression)
    assert mode.shape_env is not None
    return mode.shape_env.create_symintnode(expression, hint=None)


# ---------------------------------------------------------------------------------------------------------- parameters


def swap_contents(parameter: torch.Tensor, replacement: torch.Tensor) -> None:
    """Give ``parameter`` the class, data and autograd state of ``replacement``, keeping its Python identity and hooks.

    As ``torch.utils.swap_tensors``, but allowed while weak references exist: Dynamo's tracer holds some when a backend
    runs, and they go with the analysis that :func:`restart_analysis` ends.

    Raises:
        RuntimeError: something else, such as a live autograd graph, holds the parameter.
    """
    uses = parameter._use_count()  # type: ignore[attr-defined]
    if uses > 1:
        raise RuntimeError(f"the parameter is used {uses} times, by an autograd graph that is still alive")
    attributes = dict(replacement.__dict__)
    torch._C._swap_tensor_impl(parameter, replacement)
    parameter.__class__ = replacement.__class__
    parameter.__dict__.update(attributes)
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(parameter, name)  # Python's side stayed, autograd's went with the contents: set it anew
        setattr(parameter, name, None)
        setattr(parameter, name, hooks)


# ------------------------------------------------------------------------------------------------------ dense compilers


@contextlib.contextmanager
def _own_tracing_context(mode: FakeTensorMode) -> Iterator[None]:
    # Dynamo's context holds another fake mode; a region compiled in it fails with "Mixing fake modes".
    with tracing(TracingContext(mode)):
        yield


def compile_with_inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """Compile a graph for training or inference with Inductor; ``inputs`` are fakes of ``mode``."""
    from torch._inductor.compile_fx import compile_fx

    with _own_tracing_context(mode):
        compiled: Callable[..., Any] = compile_fx(gm, list(inputs))  # type: ignore[assignment]
        return compiled


def aot_module(gm: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """Trace forward and backward of a graph ahead of time and run them unfused; ``inputs`` are fakes of ``mode``."""
    from torch._dynamo.backends.debugging import aot_eager

    with _own_tracing_context(mode):
        compiled: Callable[..., Any] = aot_eager(gm, list(inputs))
        return compiled


# --------------------------------------------------------------------------------------------------------- distributed


def default_store() -> Store:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def backward_pass() -> int:
    """Return a number of the backward pass that is running."""
    return torch._C._current_graph_task_id()


def all_gather_single(gathered: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Start to gather equal parts into one tensor."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the old name until torch 2.12
    return gather(gathered, part, group=group, async_op=True)


# -------------------------------------------------------------------------------------- optimizers in the backward pass


def _in_backward() -> Any | None:
    """Return the module of ``_apply_optimizer_in_backward``; ``None`` where nobody has imported it yet."""
    return sys.modules.get("torch.distributed.optim.apply_optimizer_in_backward")


def in_backward_optimizers(parameter: torch.Tensor) -> list[torch.optim.Optimizer]:
    """Return the optimizers that ``_apply_optimizer_in_backward`` gave a parameter."""
    return list(getattr(parameter, "_in_backward_optimizers", ()))


def in_backward_node(parameter: torch.Tensor) -> Any | None:
    """Return the autograd node that takes a parameter's gradient and runs its optimizers; ``None`` where none does."""
    module = _in_backward()
    if module is None or not module.param_to_optim_hook_handle_map.get(parameter):
        return None
    return module.param_to_acc_grad_map.get(parameter)


def will_run(node: Any) -> bool:
    """Tell whether the backward pass that is running gives a parameter's node its gradient."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the pass gives gradients to its caller
        return False


def swap_in_backward(parameter: torch.Tensor, swap: Callable[[], None]) -> None:
    """Run ``swap``, which gives a parameter other contents, and hook its optimizers to these.

    The autograd node that has the hook belongs to the contents before, and holds them.
    """
    module = _in_backward()
    if module is None or in_backward_node(parameter) is None:
        swap()
        return
    for handle in module.param_to_optim_hook_handle_map.pop(parameter):
        handle.remove()
    del module.param_to_acc_grad_map[parameter]

    def step(*_: Any) -> None:
        for optimizer in in_backward_optimizers(parameter):
            optimizer.step()
        parameter.grad = None

    try:
        swap()
    finally:
        with torch.enable_grad():
            node: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        module.param_to_acc_grad_map[parameter] = node
        module.param_to_optim_hook_handle_map[parameter] = [node.register_hook(step)]


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether something waits for an optimizer's steps."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def has_gradient_hooks(parameter: torch.Tensor, ours: Any) -> bool:
    """Tell whether something but ``ours``, a handle or ``None``, waits for a parameter's gradient."""
    after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return bool(parameter._backward_hooks) or any(ours is None or key != ours.id for key in after)
