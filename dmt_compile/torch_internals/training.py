"""Parameters, their autograd nodes and their optimizers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def written(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to in place; ``None`` where nobody counts, as in inference mode."""
    return None if tensor.is_inference() else tensor._version


def swap_contents(parameter: torch.Tensor, replacement: torch.Tensor) -> None:
    """Give ``parameter`` the class, data and autograd state of ``replacement``, keeping its Python identity and hooks.

    As ``torch.utils.swap_tensors``, but allowed while weak references exist: Dynamo's tracer holds some when a backend
    runs, and they go with its analysis.

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


def backward_pass() -> int:
    """Return a number of the backward pass that is running."""
    return torch._C._current_graph_task_id()


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
