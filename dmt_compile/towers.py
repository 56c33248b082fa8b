"""The parameters that Tower Modules bring to a model: the modules themselves, and layers that got another size."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence

import torch
from torch import nn

from dmt_compile.plan import TowerModules

NAME = "dmt_towers"  # of the child under which they are attached to a model


class Towers(nn.Module):
    """One Tower Module for each tower, by the tower's name, and ``replaced``: new parameters under their flat paths.

    Args:
        recipe: what they were made by.
        features: the features of each tower that has a module.
        tables: the tables of every tower of the plan that they were made for.
    """

    def __init__(
        self, recipe: TowerModules, features: dict[str, tuple[str, ...]], tables: dict[str, tuple[str, ...]]
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.features = features
        self.tables = tables
        self.replaced = nn.Module()

    def extra_repr(self) -> str:
        """Say what made the modules."""
        return f"recipe={self.recipe}"

    def replace(self, flat_name: str, tensor: torch.Tensor) -> None:
        """Add a new parameter, or buffer, for the one of that flat name."""
        *path, leaf = flat_name.split(".")
        module = self.replaced
        for atom in path:
            if atom not in module._modules:
                module.add_module(atom, nn.Module())
            module = module.get_submodule(atom)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)

    def replacements(self) -> dict[str, torch.Tensor]:
        """Return the new parameters and buffers by flat name."""
        return {**dict(self.replaced.named_parameters()), **dict(self.replaced.named_buffers())}


def resized(root: nn.Module | None, flat_name: str, old: torch.Tensor, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Return a new parameter of another shape, initialised as its module initialises it.

    A module of PyTorch's, or one with ``reset_parameters``, does it itself. Otherwise a constant parameter stays
    constant, and another one gets normal numbers of the old mean, and of the old deviation times
    sqrt(old columns / new columns).

    Args:
        root: holds the parameter.
        flat_name: such as ``over.0.weight``.
        old: the parameter, or buffer, as it is.
        shape: the new shape.
        seed: of this run's numbers; the global generator stays as it is.
    """
    path, _, leaf = flat_name.rpartition(".")
    owner = root.get_submodule(path) if root is not None and path else root
    device = "meta" if old.is_meta else "cpu"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed((seed + zlib.crc32(flat_name.encode())) % 2**63)
        if owner is not None and hasattr(owner, "reset_parameters") and getattr(owner, leaf, None) is old:
            fresh = copy.copy(owner)
            fresh._parameters = {
                name: None if p is None else nn.Parameter(torch.empty(_like(p, old, shape), device=device))
                for name, p in owner._parameters.items()
            }
            fresh._buffers = {
                name: None if b is None else torch.empty(_like(b, old, shape), device=device, dtype=b.dtype)
                for name, b in owner._buffers.items()
            }
            fresh.reset_parameters()  # type: ignore[operator]
            new: torch.Tensor = getattr(fresh, leaf).detach()
        else:
            new = torch.empty(tuple(shape), device=device)
            first = old.detach().flatten()[:1].float()
            if not old.is_meta and bool((old.detach().float() == first).all()):
                new.copy_(first.expand(1).reshape(()) if first.numel() else torch.zeros(()))
            elif not old.is_meta:
                scale = math.sqrt(old.shape[-1] / max(shape[-1], 1))
                new.normal_(float(old.float().mean()), float(old.float().std()) * scale)
        new = new.to(old.device, old.dtype)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _like(tensor: torch.Tensor, old: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a neighbour has beside the resized tensor: the same where it has the same dimensions."""
    if tensor.shape == old.shape:
        return tuple(shape)
    return (shape[0],) if tensor.ndim == 1 and tensor.shape[0] == old.shape[0] else tuple(tensor.shape)
