"""What the zoo knows of one model, and what its models and batches have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A flat model as a user writes it, and what the compiler has to make of it.

    Args:
        name: of the model.
        build: returns it; seed before.
        batch: ``(samples, generator)`` to positional arguments; works for 0 and 1 samples.
        tables: names of all tables that must be distributed.
        flat: part of a lookup's source line -> part of the reason why it has to stay flat.
        smallest: fewest samples that the eager model takes.
        graphs: in training, and as many in evaluation; above 1 for branches and graph breaks of the model's own, and
            for convolutions, which PyTorch traces with a guard on 16 samples for any backend.
        exact: its outputs are bitwise those of eager, on one rank and on several.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    tables: frozenset[str]
    flat: Mapping[str, str] = field(default_factory=dict)
    smallest: int = 0
    graphs: int = 1
    exact: bool = True

    def __str__(self) -> str:
        return self.name


def names(prefix: str, count: int) -> frozenset[str]:
    """Return ``prefix.0``, ``prefix.1`` and so on."""
    return frozenset(f"{prefix}.{index}" for index in range(count))


def field_ranges(name: str, rows: Sequence[int]) -> frozenset[str]:
    """Return the names of the row ranges of a table that holds fields of ``rows`` rows each."""
    ends = torch.tensor(rows).cumsum(0).tolist()
    return frozenset(f"{name}[{end - count}:{end}]" for count, end in zip(rows, ends, strict=True))


def columns(rows: Sequence[int], samples: int, generator: torch.Generator) -> torch.Tensor:
    """Return ids (samples, fields), column ``f`` below ``rows[f]``."""
    return torch.stack([torch.randint(count, (samples,), generator=generator) for count in rows], dim=1)


def bags(
    rows: Sequence[int], samples: int, generator: torch.Generator, longest: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return, per feature, the ids of bags of 0 to ``longest``, and their offsets."""
    ids, offsets = [], []
    for count in rows:
        lengths = torch.randint(longest + 1, (samples,), generator=generator)
        ids.append(torch.randint(count, (int(lengths.sum()),), generator=generator))
        offsets.append(lengths.cumsum(0) - lengths)
    return ids, offsets


def sequences(rows: int, samples: int, generator: torch.Generator, longest: int = 6) -> torch.Tensor:
    """Return ids (samples, length), of a length of 1 to ``longest``, padded with 0 at the end but for the first."""
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    ids = torch.randint(1, rows, (samples, length), generator=generator)
    used = torch.randint(1, length + 1, (samples, 1), generator=generator)
    return ids * (torch.arange(length) < used)


def dense(samples: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return normal features (samples, width)."""
    return torch.randn(samples, width, generator=generator)


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
