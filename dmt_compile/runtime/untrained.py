"""Catches an optimizer that was built before a model got its Tower Modules, and so would leave them untrained."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dmt_compile.errors import ConfigError
from dmt_compile.towers import NAME

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[Any] = []


def watch_optimizers(root: nn.Module) -> None:
    """Check, at the next step of any optimizer, that some optimizer holds the Tower Modules of ``root``."""
    _watched.add(root)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise where towers have gradients that no optimizer uses; each model is checked until it has passed once.

    Raises:
        ConfigError: names the first parameter that no optimizer holds.
    """
    for root in list(_watched):
        towers = root.get_submodule(NAME)
        waiting = {name: p for name, p in towers.named_parameters() if p.grad is not None}
        if not waiting or not _held(optimizer) & {id(p) for p in root.parameters()}:
            continue
        optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
        held = set().union(*map(_held, optimizers))
        for name, parameter in waiting.items():
            if id(parameter) not in held:
                raise ConfigError(
                    f"optimizer: expected an optimizer for the Tower Modules' parameter {NAME}.{name}, found none; the "
                    "parameters exist since the model's first call: call dmt_compile.warmup(compiled, batch), then "
                    "build the optimizer"
                )
        _watched.discard(root)
    if not _watched:
        _hooks.pop().remove()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all parameters that an optimizer holds."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return set(map(id, parameters_of(optimizer)))
