"""Tables and ids of the lookup cells, and what lookups of them give, in float64.

Shape suffixes: B bags, N ids, R rows, U distinct rows, D width of a table, W sum of the widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from kernel_cells import TYPES, normal
from torch.nn import functional as F

ZIPF = 1.05  # exponent of the power law: the most frequent of 1e6 rows has 7% of the ids
ID_BYTES = 8


@dataclass(frozen=True)
class Lookups:
    """How large the tables are and what is read of them; all tables are alike.

    Args:
        tables, rows, width: of them.
        pooling: mean length of a bag; lengths are uniform from 1 to twice that, less 1.
        bags: of each table.
        dtype: a key of ``TYPES``.
        law: of the ids: ``"uniform"`` or ``"power"``.
    """

    tables: int = 26
    rows: int = 1_000_000
    width: int = 128
    pooling: int = 10
    bags: int = 16_384
    dtype: str = "fp32"
    law: str = "uniform"

    @property
    def name(self) -> str:
        """As tables x rows x width, pooling, bags, type and law."""
        return f"{self.tables}x{self.rows}x{self.width}-p{self.pooling}-b{self.bags}-{self.dtype}-{self.law}"

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a row."""
        return TYPES[self.dtype].itemsize

    def tiny(self) -> Self:
        """Return the same for Triton's interpreter."""
        small = {"tables": 3, "rows": 40, "width": 24, "pooling": 3, "bags": 9}
        return replace(self, **{name: min(size, getattr(self, name)) for name, size in small.items()})


@dataclass(frozen=True)
class Data:
    """Tables, and per table ids and where bags begin."""

    tables: list[torch.Tensor]
    ids: list[torch.Tensor]
    offsets: list[torch.Tensor]

    @property
    def id_count(self) -> int:
        """Ids of all tables."""
        return sum(len(ids) for ids in self.ids)

    def distinct_count(self) -> int:
        """Rows that ids name, of all tables."""
        return sum(len(ids.unique()) for ids in self.ids)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids of all tables in a row, and where the bags of each begin there, ending in the end."""
        starts, before = [], 0
        for ids, offsets in zip(self.ids, self.offsets, strict=True):
            starts.append(offsets + before)
            before += len(ids)
        starts.append(self.offsets[0].new_tensor([before]))
        return torch.cat(self.ids), torch.cat(starts)


def draw(size: Lookups, device: torch.device, scale: float = 1.0) -> Data:
    """Draw tables from N(0, ``scale``^2), ids and bags."""
    generator = torch.Generator(device).manual_seed(1)
    tables, ids, offsets = [], [], []
    for index in range(size.tables):
        tables.append(normal(device, size.rows, size.width, seed=2 + index).mul_(scale).to(TYPES[size.dtype]))
        lengths = torch.randint(1, 2 * size.pooling, (size.bags,), device=device, generator=generator)
        offsets.append(lengths.cumsum(0) - lengths)
        ids.append(_ids(size, int(lengths.sum()), device, generator))
    return Data(tables, ids, offsets)


def _ids(size: Lookups, count: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(count, device=device, generator=generator, dtype=torch.float64)
    if size.law == "uniform":
        return (uniform * size.rows).long().clamp_(max=size.rows - 1)
    last = size.rows ** (1 - ZIPF)
    ranks = ((uniform * (last - 1) + 1) ** (1 / (1 - ZIPF))).long().sub_(1).clamp_(0, size.rows - 1)
    # Frequent rows lie anywhere, not side by side.
    return torch.randperm(size.rows, device=device, generator=generator)[ranks]


def pooled(table: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the sums of a table's bags, (B, D) float64; only rows that are read are widened."""
    positions = torch.arange(len(ids), device=ids.device)
    return F.embedding_bag(positions, table[ids].double(), offsets, mode="sum")


def summed_gradient(
    grad_BD: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct rows (U,) and the gradients of each, summed, (U, D) float64."""
    rows_U, row_of_N = ids.unique(return_inverse=True)
    positions = torch.arange(len(ids), device=ids.device)
    bag_of_N = torch.bucketize(positions, offsets, right=True) - 1
    summed_UD = grad_BD.new_zeros(len(rows_U), grad_BD.shape[1], dtype=torch.float64)
    return rows_U, summed_UD.index_add_(0, row_of_N, grad_BD.double()[bag_of_N])


def most_frequent(ids: Sequence[torch.Tensor]) -> int:
    """Return how often the most frequent id of any table occurs."""
    return max(int(of_table.unique(return_counts=True)[1].max()) for of_table in ids)
