"""Lets an optimizer's step wait for gradients that are still on their way, until the next step reads what it changes.

Averages of dense gradients are the last thing that a step waits for, and the first that the next one reads of them is
the bottom MLP: ids, lookups, the exchange inside the hosts and Tower Modules come before it, and need none. So the
backward pass gives out gradients that are awaited at their first use (``coming_gradients.py``), and the optimizer's
``step`` leaves those parameters alone whose gradients nobody has waited for. Their step is done, with the options of
the moment when it was asked for, as soon as anything would tell the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn, optim

from dmt_compile import torch_internals
from dmt_compile.errors import ConfigError
from dmt_compile.optim import RowWiseAdagrad
from dmt_compile.runtime.coming_gradients import ComingGradient, let_step_wait, step_can_wait
from dmt_compile.runtime.distributed_session import state_of
from dmt_compile.runtime.session import compiled_model
from dmt_compile.runtime.untrained import parameters_of

# Each parameter's step is its own: some parameters now and the rest later is one step of all.
_PARAMETER_BY_PARAMETER = frozenset(
    {
        optim.ASGD, optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam,
        optim.RMSprop, optim.Rprop, optim.SGD, RowWiseAdagrad,
    }
)  # fmt: skip


@dataclass
class _Due:
    """A step that was asked for and is not done.

    Args:
        gradients: of the parameters that wait for it.
        options: of each group of parameters, as they were then.
    """

    gradients: dict[torch.Tensor, ComingGradient]
    options: list[tuple[dict[str, Any], dict[str, Any]]]


class DeferredStep:
    """An optimizer whose steps on dense parameters may wait; made by :func:`defer_step`."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._whole_step: Callable[..., Any] = optimizer.step
        self._due: _Due | None = None

    def finish(self) -> None:
        """Do the step that waits, if one does.

        Raises:
            CollectiveError: a rank did not arrive within the time limit, or broke off.
        """
        due, self._due = self._due, None
        if due is None:
            return
        now = [(group, {name: group[name] for name in then}) for group, then in due.options]
        given = {parameter: coming.wait() for parameter, coming in due.gradients.items()}
        try:
            for group, then in due.options:
                group.update(then)
            with _gradients(self._optimizer, given):
                self._whole_step()
        finally:
            for group, options in now:
                group.update(options)
        for parameter, coming in due.gradients.items():
            if parameter.grad is coming:
                parameter.grad = given[parameter]

    def _settle(self, trains: bool) -> None:
        """Finish unless a program is about to run that settles the parameters it trains, and trains all that wait."""
        if not trains or (self._due is not None and not all(p.requires_grad for p in self._due.gradients)):
            self.finish()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do what can be done of a step without waiting; the rest waits for :meth:`finish`."""
        self.finish()
        of_all = {p: p.grad for p in parameters_of(self._optimizer)}
        coming = {p: g for p, g in of_all.items() if isinstance(g, ComingGradient) and g.under_way}
        if closure is not None or not coming or torch_internals.has_step_hooks(self._optimizer):
            return self._whole_step() if closure is None else self._whole_step(closure)
        with _gradients(self._optimizer, {p: g for p, g in of_all.items() if p not in coming and g is not None}):
            self._whole_step()
        self._due = _Due(coming, [(group, _options(group)) for group in self._optimizer.param_groups])
        for state in {id(s): s for s in map(state_of, coming) if s is not None}.values():
            state.world.deferred.add(self._settle)
        return None


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a group's options: a schedule changes them between the step and its end."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


@contextmanager
def _gradients(optimizer: optim.Optimizer, given: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Let an optimizer see these gradients, and none of its other parameters."""
    held = {p: p.grad for p in parameters_of(optimizer)}
    try:
        for parameter in held:
            parameter.grad = given.get(parameter)
        yield
    finally:
        for parameter, gradient in held.items():
            parameter.grad = gradient


def defer_step(optimizer: optim.Optimizer, compiled: nn.Module) -> DeferredStep:
    """Let an optimizer's step on dense parameters wait until the compiled model next reads them.

    ``backward`` then ends without waiting for the averages of dense gradients, and ``optimizer.step()`` does the step
    of tables and Tower Modules alone; the averages travel while the next batch's embeddings are looked up and
    exchanged. The numbers are those without it: the rest of the step is done before the compiled model reads a dense
    parameter, before ``state_dict`` and ``load_state_dict`` of model and optimizer, and before anyone reads a gradient
    that the step uses. A gradient that is read before ``step()``, to clip it for instance, is waited for, and nothing
    is deferred in that step; so it is where the optimizer has step hooks or a closure.

    Only code of your own that reads or writes the values of dense parameters between ``step()`` and the next call of
    the model has to call :meth:`DeferredStep.finish` before: an average of weights over steps, for instance.

    Args:
        optimizer: holds all dense parameters of the model, and tables or not; on every rank.
        compiled: what ``torch.compile(model, backend="dmt")`` returned.

    Returns:
        What waits; ``finish()`` ends it.

    Raises:
        ConfigError: ``compiled`` is no compiled module, the optimizer holds none of its parameters, its step is not
            known to be one of each parameter by itself, or it defers already.

    Cost: no bytes more; the gradients of the dense parameters stay in memory until their step is done.
    """
    model = compiled_model(compiled, "defer_step")
    if type(optimizer) not in _PARAMETER_BY_PARAMETER:
        known = ", ".join(sorted(kind.__name__ for kind in _PARAMETER_BY_PARAMETER))
        raise ConfigError(f"defer_step: expected an optimizer of {known}, found {type(optimizer).__name__}")
    held = set(map(id, parameters_of(optimizer)))
    own = [parameter for parameter in model.parameters() if id(parameter) in held]
    if not own:
        raise ConfigError("defer_step: expected an optimizer of the model's parameters, found none of them in it")
    if any(map(step_can_wait, own)):
        raise ConfigError("defer_step: expected an optimizer whose steps are not deferred yet, found one that are")
    deferred = DeferredStep(optimizer)
    for parameter in own:
        let_step_wait(parameter, deferred.finish)
    optimizer.step = MethodType(lambda _, closure=None: deferred.step(closure), optimizer)  # type: ignore[method-assign]
    optimizer.register_state_dict_pre_hook(lambda _: deferred.finish())
    optimizer.register_load_state_dict_pre_hook(lambda *_: deferred.finish())
    for module in model.modules():
        module.register_state_dict_pre_hook(lambda *_: deferred.finish())
        module.register_load_state_dict_pre_hook(lambda *_: deferred.finish())
    return deferred
