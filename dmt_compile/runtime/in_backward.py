"""Optimizers that the user put into the backward pass, run there by the lookup itself on the rows that it read.

PyTorch's ``_apply_optimizer_in_backward`` hooks an optimizer to each parameter, which steps once the parameter has its
gradient. A lookup that knows its rows' gradients can do the same step on these rows at once and give no gradient at
all; PyTorch's hook then finds nothing to do. Where this is not the same step, the gradient goes PyTorch's way.

Shape suffixes: U distinct rows of this rank, D width of its block.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dmt_compile import torch_internals
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.kernels.update_rows import op as rows_op
from dmt_compile.kernels.update_rows.op import Hyper
from dmt_compile.optim import RowWiseAdagrad, hyper_of
from dmt_compile.runtime.tables import ShardedTable, local_of

KINDS: Mapping[type[torch.optim.Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adagrad: "adagrad",
    torch.optim.SparseAdam: "sparse_adam",
    RowWiseAdagrad: "row_wise_adagrad",
}
# What these options do to a row does not wait for its gradient, or is done to whole gradients.
_MOVE_ALL = ("momentum", "weight_decay")
_NOT_DONE = ("maximize", "differentiable")


def why_not(parameter: torch.Tensor, lookups: Iterable[Pooling]) -> str | None:
    """Return why the lookups of a table cannot do its optimizer's step on the rows they read; ``None`` where they can.

    Args:
        parameter: with an optimizer in the backward pass.
        lookups: all that read it, in one operator.
    """
    lookups = list(lookups)
    optimizers = torch_internals.in_backward_optimizers(parameter)
    if len(optimizers) > 1:
        return f"it has {len(optimizers)} optimizers in the backward pass"
    if torch_internals.in_backward_node(parameter) is None:
        return "its optimizer has no hook in the backward pass"
    [optimizer] = optimizers
    name, kind = type(optimizer).__name__, KINDS.get(type(optimizer))
    if kind is None:
        return f"{name} is not known to leave rows without gradient as they are"
    group = _group(optimizer, parameter)
    for option in (*_MOVE_ALL, *_NOT_DONE):
        if group.get(option):
            moves = "moves rows without gradient" if option in _MOVE_ALL else "is not done on rows alone"
            return f"{name} with {option} {moves}"
    if torch_internals.has_step_hooks(optimizer):
        return f"{name} has hooks around its step"
    if torch_internals.has_gradient_hooks(parameter, _guards.get(optimizer)):
        return "hooks wait for its gradient"
    if any(how.mode == "max" or how.scale_grad_by_freq for how in lookups):
        return "a lookup takes maxima or divides by frequencies, whose gradient is dense"
    if kind == "sparse_adam" and not all(how.sparse for how in lookups):
        return "SparseAdam takes sparse gradients alone"
    if kind != "sgd" and not group["eps"] and not all(how.sparse for how in lookups):
        return f"{name} with eps=0 makes rows without gradient NaN"
    columns = parameter.block.columns if isinstance(parameter, ShardedTable) else (0, parameter.shape[1])
    if kind == "row_wise_adagrad" and columns != (0, parameter.shape[1]):
        return "a rank holds some columns of its rows only"
    return None


@dataclass
class _Readers:
    """What a table's optimizer has to know of the lookups of its table.

    Args:
        waiting: whose backward pass may still come.
        seen_in: the backward pass that the last of them was in.
        stepped_in: the backward pass in which the last of them did the step.
    """

    waiting: weakref.WeakSet[Reading] = field(default_factory=weakref.WeakSet)
    seen_in: int = -1
    stepped_in: int = -1


_readers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Readers] = weakref.WeakKeyDictionary()
_guards: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()


class Reading:
    """The lookups of one table in one operator of one forward pass."""

    def __init__(self, parameter: torch.Tensor, lookups: Sequence[Pooling]) -> None:
        [self.optimizer] = torch_internals.in_backward_optimizers(parameter)
        self.parameter = parameter
        self.lookups = tuple(lookups)
        _readers.setdefault(self.optimizer, _Readers()).waiting.add(self)

    def due(self) -> bool:
        """Tell, inside the backward pass, whether to do the optimizer's step now, and to give no gradient.

        Not where another lookup of the table may add to its gradient in this pass, where an earlier gradient waits for
        this one, where the pass asks for the gradient itself or for others, and where the step became another one.
        """
        readers, now = _readers[self.optimizer], torch_internals.backward_pass()
        readers.waiting.discard(self)
        alone = not readers.waiting and readers.seen_in != now
        readers.seen_in = now
        node = torch_internals.in_backward_node(self.parameter)
        return (
            alone
            and self.parameter.grad is None
            and node is not None
            and torch_internals.will_run(node)
            and torch_internals.in_backward_optimizers(self.parameter) == [self.optimizer]
            and why_not(self.parameter, self.lookups) is None
        )

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], kernel: str = "reference") -> None:
        """Do the step of a due reading.

        Args:
            gradients: sparse, of this rank's rows; of all lookups.
            kernel: of ``update_rows``; the reference where that does not take table or state.
        """
        parameter, optimizer = self.parameter, self.optimizer
        if optimizer not in _guards:
            _guards[optimizer] = _refuse_more_gradient(parameter, optimizer)
        _readers[optimizer].stepped_in = torch_internals.backward_pass()
        # In autograd's order, which puts each before the sum of the earlier ones, so that sums are bitwise the same.
        summed = functools.reduce(lambda total, gradient: gradient + total, gradients).coalesce()
        kind = KINDS[type(optimizer)]
        states, hyper = _STATES[kind](optimizer, _group(optimizer, parameter), parameter)
        locals_ = [local_of(tensor) for tensor in (parameter, *states)]
        kernel = kernel if kernel != "triton" or rows_op.supports(locals_[0], locals_[1:]) is None else "reference"
        rows_op.update_rows(kind, locals_[0], locals_[1:], summed.indices()[0], summed.values(), hyper, kernel)


def read(
    tables: Sequence[torch.Tensor], owned: Sequence[int], pooling: Sequence[Pooling], needed: Sequence[bool]
) -> dict[int, Reading]:
    """Return, inside a lookup's forward pass, for each lookup the reading of its table, where an optimizer waits.

    Args:
        tables: of all lookups.
        owned: the lookups that this rank does.
        pooling: of each lookup.
        needed: of each lookup, whether the table needs a gradient.
    """
    of_table: dict[int, list[int]] = {}
    for index in owned:
        if needed[index] and len(torch_internals.in_backward_optimizers(tables[index])) == 1:
            of_table.setdefault(id(tables[index]), []).append(index)
    found: dict[int, Reading] = {}
    for indices in of_table.values():
        found.update(dict.fromkeys(indices, Reading(tables[indices[0]], [pooling[index] for index in indices])))
    return found


def _refuse_more_gradient(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """Make a gradient that comes beside a step an error: together they would have been one step."""
    of_optimizer = weakref.ref(optimizer)

    def refuse(table: torch.Tensor) -> None:
        alive = of_optimizer()
        if (
            alive is not None
            and table.grad is not None
            and _readers[alive].stepped_in == torch_internals.backward_pass()
        ):
            raise UnsupportedGraphError(
                f"in-backward optimizer: expected the gradient of a table of shape {tuple(table.shape)} from lookups "
                "of the compiled model alone, found more of it from eager code in the same backward pass, after its "
                "step; read the table in the compiled model only, or give it to an ordinary optimizer"
            )

    return parameter.register_post_accumulate_grad_hook(refuse)


def _group(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _sgd(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor) -> tuple[list[torch.Tensor], Hyper]:
    return [], Hyper(float(group["lr"]), 1)


def _adagrad(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor) -> tuple[list[torch.Tensor], Hyper]:
    state = optimizer.state[parameter]
    state["step"] += 1
    return [state["sum"]], Hyper(float(group["lr"]), int(state["step"]), group["eps"], group["lr_decay"])


def _sparse_adam(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor) -> tuple[list[torch.Tensor], Hyper]:
    state = optimizer.state[parameter]
    if not state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    hyper = Hyper(float(group["lr"]), int(state["step"]), group["eps"], betas=group["betas"])
    return [state["exp_avg"], state["exp_avg_sq"]], hyper


def _row_wise_adagrad(
    optimizer: Any, group: dict[str, Any], parameter: torch.Tensor
) -> tuple[list[torch.Tensor], Hyper]:
    state = optimizer.state_of(group, parameter)
    state["step"] += 1
    return [state["sum"]], hyper_of(group, state)


_STATES = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "sparse_adam": _sparse_adam,
    "row_wise_adagrad": _row_wise_adagrad,
}
