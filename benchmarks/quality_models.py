"""The flat models of the quality benchmark, with the hyper-parameters that were chosen for them on validation rows.

Shape suffixes: B samples, I dense features, F features, D embedding width, P pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


@dataclass(frozen=True)
class Settings:
    """What one model and data set train with, all variants alike.

    Args:
        dim: embedding width.
        bottom, top: hidden widths of the MLPs.
        cross_layers, cross_rank: of the DCN.
        init: largest initial embedding; uniform.
        lr: of Adam, falling linearly to 0 over the epochs.
        weight_decay: of the tables, as L2 in Adam.
        batch_size: samples of a step.
        epochs: the one that is best on validation rows counts.
        dropout: after each hidden layer of the top MLP.
        batch_norm: before each of its activations.
    """

    dim: int = 16
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (128, 64)
    cross_layers: int = 2
    cross_rank: int = 32
    init: float = 0.0625
    lr: float = 2e-3
    weight_decay: float = 0.0
    batch_size: int = 2048
    epochs: int = 4
    dropout: float = 0.0
    batch_norm: bool = False


SETTINGS: dict[tuple[str, str], Settings] = {
    ("dlrm", "nycflights"): Settings(dim=32, lr=2e-2, weight_decay=5e-4, epochs=3),
    ("dcn", "nycflights"): Settings(lr=2e-2, weight_decay=5e-4, epochs=3),
    ("dlrm", "frappe"): Settings(dim=32, lr=1e-2, weight_decay=1e-3, epochs=8),
    ("dcn", "frappe"): Settings(dim=32, lr=1e-2, weight_decay=3e-4, epochs=8),
    ("dlrm", "ml1m"): Settings(dim=32, lr=1e-2, weight_decay=5e-4, epochs=4),
    ("dcn", "ml1m"): Settings(lr=1e-2, weight_decay=5e-4, epochs=4),
}


def mlp(widths: Sequence[int], settings: Settings, last: bool) -> nn.Sequential:
    """Stack linear layers with ReLU; ``last``: the last one is the output, without it."""
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(fan_in, fan_out))
        if last and index == len(widths) - 2:
            break
        layers += [nn.BatchNorm1d(fan_out)] if settings.batch_norm else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(settings.dropout)] if settings.dropout else []
    return nn.Sequential(*layers)


class Flat(nn.Module):
    """The tables, and the bottom MLP where there are dense features."""

    def __init__(self, table_rows: Sequence[int], dense_features: int, settings: Settings) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(n, settings.dim, mode="mean", padding_idx=0) for n in table_rows)
        for table in self.emb:
            nn.init.uniform_(table.weight, -settings.init, settings.init)
        widths = (dense_features, *settings.bottom, settings.dim)
        self.bottom = mlp(widths, Settings(), last=False) if dense_features else None

    def vectors(self, dense_BI: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> list[Tensor]:
        """Return (B, D) of each feature, after that of the dense features where there are any."""
        pooled = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        return pooled if self.bottom is None else [self.bottom(dense_BI), *pooled]


class DLRM(Flat):
    """Dot products of all pairs of vectors, and a top MLP."""

    def __init__(self, table_rows: Sequence[int], dense_features: int, settings: Settings) -> None:
        super().__init__(table_rows, dense_features, settings)
        vectors = len(table_rows) + (self.bottom is not None)
        self.register_buffer("pairs_2P", torch.tril_indices(vectors, vectors, -1))
        width = vectors * (vectors - 1) // 2 + (settings.dim if self.bottom is not None else 0)
        self.top = mlp((width, *settings.top, 1), settings, last=True)

    def forward(self, dense_BI: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """Return one logit per sample, (B,)."""
        vectors = self.vectors(dense_BI, ids, offsets)
        stacked_BFD = torch.stack(vectors, dim=1)
        products_BFF = torch.bmm(stacked_BFD, stacked_BFD.transpose(1, 2))
        pairs_BP = products_BFF[:, self.pairs_2P[0], self.pairs_2P[1]]
        joined = pairs_BP if self.bottom is None else torch.cat([vectors[0], pairs_BP], dim=1)
        return self.top(joined).squeeze(1)


class DCN(Flat):
    """A cross network of low rank over all vectors, and a top MLP."""

    def __init__(self, table_rows: Sequence[int], dense_features: int, settings: Settings) -> None:
        super().__init__(table_rows, dense_features, settings)
        width = settings.dim * (len(table_rows) + (self.bottom is not None))
        layers, rank = range(settings.cross_layers), settings.cross_rank
        self.cross_down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in layers)
        self.cross_up = nn.ModuleList(nn.Linear(rank, width) for _ in layers)
        self.top = mlp((width, *settings.top, 1), settings, last=True)

    def forward(self, dense_BI: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """Return one logit per sample, (B,)."""
        x = first = torch.cat(self.vectors(dense_BI, ids, offsets), dim=1)
        for down, up in zip(self.cross_down, self.cross_up, strict=True):
            x = first * up(down(x)) + x
        return self.top(x).squeeze(1)


MODELS: dict[str, type[DLRM | DCN]] = {"dlrm": DLRM, "dcn": DCN}
