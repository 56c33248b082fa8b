"""Gradients that are still on their way between ranks: whatever reads one waits for it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map


class ComingGradient(torch.Tensor):
    """A dense gradient whose average over the ranks is awaited at its first use.

    Shape, type and device can be asked at any time; any operation waits, and then works on the average itself, also in
    place. What it returns are ordinary tensors.

    Args:
        like: the parameter that it is of; an optimizer's step on it that waits is done before anyone uses the gradient.
        arrive: waits for the average and returns it; called once.
    """

    _finish_step: Callable[[], None] | None
    _arrive: Callable[[], torch.Tensor]
    _arrived: torch.Tensor | None

    @staticmethod
    def __new__(cls, like: torch.Tensor, arrive: Callable[[], torch.Tensor]) -> Self:
        coming = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        coming._finish_step, coming._arrive, coming._arrived = step_can_wait(like), arrive, None
        return coming

    def __init__(self, like: torch.Tensor, arrive: Callable[[], torch.Tensor]) -> None:
        pass

    @property
    def under_way(self) -> bool:
        """Nobody has waited for it yet."""
        return self._arrived is None

    def wait(self) -> torch.Tensor:
        """Wait for the average and return it.

        Raises:
            CollectiveError: a rank did not arrive within the time limit, or broke off.
        """
        if self._arrived is None:
            # As autograd's gradients, no view: Dynamo looks at them, and could not name the sizes of a view's base.
            self._arrived = self._arrive().detach()
        return self._arrived

    def _value(self) -> torch.Tensor:
        if self._finish_step is not None:
            self._finish_step()
        return self.wait()

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._value())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._value().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Wait, and return the numbers."""
        return self._value().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Wait, and return an array."""
        return self._value().numpy(force=force)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self._value().clone()
        memo[id(self)] = copied
        return copied

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def value(argument: Any) -> Any:
            return argument._value() if isinstance(argument, ComingGradient) else argument

        out = func(*tree_map(value, args), **tree_map(value, kwargs or {}))
        return args[0] if func._schema.name.endswith("_") and isinstance(args[0], ComingGradient) else out


def let_step_wait(parameter: torch.Tensor, finish: Callable[[], None]) -> None:
    """Have the gradients of a parameter come later, since its optimizer's step can wait; ``finish`` ends the wait."""
    parameter._dmt_finish_step = finish  # type: ignore[attr-defined]


def step_can_wait(parameter: torch.Tensor) -> Callable[[], None] | None:
    """Return what does the step of a parameter that waits, if its step can."""
    return getattr(parameter, "_dmt_finish_step", None)


def coming_gradients(
    parameters: Sequence[torch.Tensor], arrive: Callable[[], Sequence[torch.Tensor]]
) -> list[ComingGradient]:
    """Return the gradients of parameters that arrive together.

    Args:
        parameters: whose they are.
        arrive: waits for the averages and returns them; called once.
    """
    together = cache(arrive)
    return [ComingGradient(p, lambda place=place: together()[place]) for place, p in enumerate(parameters)]  # type: ignore[misc]
