"""Flat DLRM and DCN whose tables and dense part are apart, and batches for them.

Shape suffixes: B samples, I dense features, F categorical features, D embedding width, W columns of all vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Self

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from dlrm import mlp

MODELS = ("dlrm", "dcn", "dcn-low-rank")
DENSE_FEATURES = 13
CROSS_LAYERS = 3


@dataclass(frozen=True)
class Size:
    """Of a model and its batches; the defaults are the paper's DLRM on tables that fit one GPU.

    Args:
        tables, rows, dim: of the tables.
        samples: B.
        pooling: mean length of a bag; lengths are uniform from 1 to twice that, less 1.
        bottom, top: hidden widths of the bottom MLP and of the over-arch.
        rank: of the cross layers of ``"dcn-low-rank"``.
        towers: of the contestant with Tower Modules.
        tower_dim: width that a tower's vectors are compressed to.
    """

    tables: int = 26
    rows: int = 1_000_000
    dim: int = 128
    samples: int = 16_384
    pooling: int = 10
    bottom: tuple[int, ...] = (512, 256)
    top: tuple[int, ...] = (1024, 1024, 512, 256)
    rank: int = 512
    towers: int = 8
    tower_dim: int = 64

    def tiny(self) -> Self:
        """Return the same for a test on a CPU."""
        small = {"tables": 4, "rows": 50, "dim": 8, "samples": 16, "pooling": 2, "rank": 4, "towers": 2, "tower_dim": 4}
        return replace(self, **small, bottom=(16,), top=(16, 8))

    @property
    def longest_sum(self) -> int:
        """Terms of the longest sum in a step."""
        return max(self.samples, (self.tables + 1) * self.dim, *self.top)

    def __str__(self) -> str:
        bottom, top = ("-".join(map(str, widths)) for widths in ((*self.bottom, self.dim), (*self.top, 1)))
        return (
            f"{self.tables} tables of {self.rows:,} rows x {self.dim}, {self.samples:,} samples, bags of "
            f"{self.pooling} on average, bottom MLP {bottom}, over-arch {top}"
        )


class DotRest(nn.Module):
    """A DLRM without its tables."""

    rows_P: Tensor
    columns_P: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bottom = mlp((DENSE_FEATURES, *size.bottom, size.dim), last_activation=True)
        rows_P, columns_P = torch.tril_indices(size.tables + 1, size.tables + 1, offset=-1)
        self.register_buffer("rows_P", rows_P)
        self.register_buffer("columns_P", columns_P)
        self.top = mlp((size.dim + rows_P.numel(), *size.top, 1), last_activation=False)

    def forward(self, dense_BI: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return logits, (B,)."""
        bottom_BD = self.bottom(dense_BI)
        vectors_BFD = torch.stack([bottom_BD, *pooled], dim=1)
        dots_BFF = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))
        pairs_BP = dots_BFF[:, self.rows_P, self.columns_P]
        logits_B1: Tensor = self.top(torch.cat([bottom_BD, pairs_BP], dim=1))
        return logits_B1.squeeze(1)


class CrossRest(nn.Module):
    """A DCN without its tables; ``rank`` ``None`` is for cross layers of full rank."""

    def __init__(self, size: Size, rank: int | None) -> None:
        super().__init__()
        width = (size.tables + 1) * size.dim
        self.bottom = mlp((DENSE_FEATURES, *size.bottom, size.dim), last_activation=True)
        self.cross = nn.ModuleList(
            nn.Linear(width, width)
            if rank is None
            else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            for _ in range(CROSS_LAYERS)
        )
        self.top = mlp((width, *size.top, 1), last_activation=False)

    def forward(self, dense_BI: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return logits, (B,)."""
        first_BW = torch.cat([self.bottom(dense_BI), *pooled], dim=1)
        crossed_BW = first_BW
        for layer in self.cross:
            crossed_BW = first_BW * layer(crossed_BW) + crossed_BW
        logits_B1: Tensor = self.top(crossed_BW)
        return logits_B1.squeeze(1)


class Flat(nn.Module):
    """Tables and the rest; the tables are the given ones, not copies of them."""

    def __init__(self, tables: Sequence[Tensor], rest: nn.Module, sparse: bool) -> None:
        super().__init__()
        self.emb = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", sparse=sparse) for table in tables
        )
        self.rest = rest

    def forward(self, dense_BI: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """Return logits, (B,)."""
        pooled = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        logits_B: Tensor = self.rest(dense_BI, pooled)
        return logits_B


def flat_of(contestant: str, tables: Sequence[Tensor], rest: nn.Module, sparse: bool) -> Flat:
    """Return a flat model whose ``forward`` Dynamo takes for the contestant's own.

    Else each call would try the guards of all contestants that were compiled before, and they would count as
    recompilations of one function.
    """
    forward = FunctionType(Flat.forward.__code__.replace(co_name=f"forward_{contestant}"), Flat.forward.__globals__)
    return type("Flat", (Flat,), {"forward": forward})(tables, rest, sparse)


def make_rest(model: str, size: Size) -> nn.Module:
    """Return the dense part of a model of ``MODELS``, the same every time."""
    torch.manual_seed(0)
    return DotRest(size) if model == "dlrm" else CrossRest(size, None if model == "dcn" else size.rank)


def fill(tables: Sequence[Tensor]) -> None:
    """Give tables their first values, the same every time."""
    for seed, table in enumerate(tables):
        bound = table.shape[1] ** -0.5 / 4
        table.uniform_(-bound, bound, generator=torch.Generator(table.device).manual_seed(seed))


@dataclass(frozen=True)
class StepBatch:
    """What a step reads."""

    dense_BI: Tensor
    ids: list[Tensor]
    offsets: list[Tensor]
    labels_B: Tensor

    @property
    def inputs(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The arguments of the model."""
        return self.dense_BI, self.ids, self.offsets


def make_batch(size: Size, device: torch.device, seed: int) -> StepBatch:
    """Draw a ragged batch."""
    generator = torch.Generator(device).manual_seed(seed)
    ids, offsets = [], []
    for _ in range(size.tables):
        lengths = torch.randint(1, 2 * size.pooling, (size.samples,), device=device, generator=generator)
        offsets.append(lengths.cumsum(0) - lengths)
        ids.append(torch.randint(0, size.rows, (int(lengths.sum()),), device=device, generator=generator))
    dense_BI = torch.randn(size.samples, DENSE_FEATURES, device=device, generator=generator)
    labels_B = torch.rand(size.samples, device=device, generator=generator).round()
    return StepBatch(dense_BI, ids, offsets, labels_B)
