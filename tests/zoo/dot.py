"""DLRMs: tables, a bottom MLP, pairwise dot products, and the many ways to write these down."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, bags, columns, dense, mlp, names

ROWS = (30, 12, 7, 21)
DIM = 8


class IndexListDLRM(nn.Module):
    """Offsets in one (tables, samples) tensor, a list of ids, the lower triangle through lists of indices."""

    def __init__(self, itself: bool) -> None:
        super().__init__()
        self.itself = itself
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum", sparse=False) for rows in ROWS)
        self.bot_l = mlp(5, 16, DIM)
        vectors = len(ROWS) + 1
        self.top_l = mlp(DIM + vectors * (vectors + (1 if itself else -1)) // 2, 16, 1)

    def interact_features(self, x: torch.Tensor, ly: list[torch.Tensor]) -> torch.Tensor:
        batch_size, d = x.shape
        t = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        z = torch.bmm(t, torch.transpose(t, 1, 2))
        _, ni, nj = z.shape
        diagonal = 1 if self.itself else 0
        li = torch.tensor([i for i in range(ni) for j in range(i + diagonal)])
        lj = torch.tensor([j for i in range(nj) for j in range(i + diagonal)])
        return torch.cat([x, z[:, li, lj]], dim=1)

    def forward(self, dense_x: torch.Tensor, lS_o: torch.Tensor, lS_i: list[torch.Tensor]) -> torch.Tensor:
        x = self.bot_l(dense_x)
        ly = []
        for k, sparse_index_group_batch in enumerate(lS_i):
            ly.append(self.emb_l[k](sparse_index_group_batch, lS_o[k]))
        return torch.sigmoid(self.top_l(self.interact_features(x, ly)))


def stacked_offsets_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags(ROWS, samples, generator)
    return dense(samples, 5, generator), torch.stack(offsets), ids


class MaskDLRM(nn.Module):
    """The lower triangle through a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in ROWS)
        self.bottom = mlp(5, DIM)
        vectors = len(ROWS) + 1
        self.top = mlp(DIM + vectors * (vectors - 1) // 2, 1)

    def forward(self, x: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        x = self.bottom(x)
        vectors = torch.stack([x, *(t(i, o) for t, i, o in zip(self.tables, ids, offsets, strict=True))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        count = vectors.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool).tril(-1)
        pairs = torch.masked_select(products, mask).view(-1, count * (count - 1) // 2)
        return self.top(torch.cat([x, pairs], dim=1)).squeeze(-1)


def bags_batch(samples: int, generator: torch.Generator) -> Batch:
    return dense(samples, 5, generator), *bags(ROWS, samples, generator)


class PaddedDLRM(nn.Module):
    """One id per feature; the dense vector last, the diagonal kept, zeros up to a multiple of 8 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        self.bottom = mlp(5, 16, DIM)
        vectors = len(ROWS) + 1
        width = vectors * (vectors + 1) // 2 + DIM
        self.padding = -width % 8
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors), persistent=False)
        self.top = mlp(width + self.padding, 16, 1)

    def forward(self, numerical: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(numerical)
        vectors = [table(categorical[:, i]).unsqueeze(1) for i, table in enumerate(self.embeddings)]
        stacked = torch.cat([*vectors, bottom.unsqueeze(1)], dim=1)
        products = torch.einsum("bfd,bgd->bfg", stacked, stacked)
        flat = products[:, self.pairs[0], self.pairs[1]]
        zeros = torch.zeros(flat.shape[0], self.padding, dtype=flat.dtype, device=flat.device)
        return self.top(torch.cat([flat, bottom, zeros], dim=1))


class TriangleDLRM(nn.Module):
    """The upper triangle through a buffer of indices, over embeddings laid out as (samples, features, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({f"t{i}": nn.EmbeddingBag(rows, DIM, mode="mean") for i, rows in enumerate(ROWS)})
        self.bottom = mlp(5, DIM)
        features = len(ROWS)
        self.register_buffer("triu", torch.triu_indices(features + 1, features + 1, offset=1))
        self.top = mlp(DIM + features * (features + 1) // 2, 16, 1)

    def forward(self, x: torch.Tensor, ids: dict[str, torch.Tensor], offsets: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.bottom(x)
        pooled = torch.cat([table(ids[name], offsets[name]) for name, table in self.tables.items()], dim=1)
        vectors = torch.cat([x.unsqueeze(1), pooled.reshape(-1, len(self.tables), DIM)], dim=1)
        products = torch.bmm(vectors, torch.transpose(vectors, 1, 2))
        return self.top(torch.cat((x, products[:, self.triu[0], self.triu[1]]), dim=1))


def named_bags_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags(ROWS, samples, generator)
    keys = [f"t{i}" for i in range(len(ROWS))]
    return dense(samples, 5, generator), dict(zip(keys, ids, strict=True)), dict(zip(keys, offsets, strict=True))


class MatmulDLRM(nn.Module):
    """Every product, both triangles, with the dense vector projected first; a constant number of ids per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="mean") for rows in ROWS)
        self.project = nn.Linear(5, 2 * DIM)
        self.top = mlp((len(ROWS) + 2) ** 2, 16, 1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        projected = F.relu(self.project(x)).unflatten(1, (2, DIM))
        pooled = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)
        vectors = torch.cat([pooled, projected], dim=1)
        return self.top((vectors @ vectors.mT).flatten(1))


def fixed_bags_batch(samples: int, generator: torch.Generator) -> Batch:
    ids = torch.stack([columns(ROWS, samples, generator) for _ in range(3)], dim=2)
    return dense(samples, 5, generator), ids


class ConcatenatedDLRM(nn.Module):
    """Tables of several widths, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 2, 16)
        modes = ("sum", "mean", "max", "sum")
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, width, mode=mode) for rows, width, mode in zip(ROWS, widths, modes, strict=True)
        )
        self.bottom = mlp(5, 8)
        self.top = mlp(8 + sum(widths), 16, 1)

    def forward(self, x: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        pooled = [table(i, o) for table, i, o in zip(self.tables, ids, offsets, strict=True)]
        return self.top(torch.cat([self.bottom(x), *pooled], dim=-1)).view(-1)


DOT = (
    Entry("dlrm_index_lists", lambda: IndexListDLRM(False), stacked_offsets_batch, names("emb_l", 4), smallest=1),
    Entry("dlrm_with_diagonal", lambda: IndexListDLRM(True), stacked_offsets_batch, names("emb_l", 4), smallest=1),
    Entry("dlrm_mask", MaskDLRM, bags_batch, names("tables", 4), graphs=2),
    Entry(
        "dlrm_einsum_padded",
        PaddedDLRM,
        lambda samples, generator: (dense(samples, 5, generator), columns(ROWS, samples, generator)),
        names("embeddings", 4),
    ),
    Entry("dlrm_upper_triangle", TriangleDLRM, named_bags_batch, frozenset(f"tables.t{i}" for i in range(4))),
    Entry("dlrm_matmul", MatmulDLRM, fixed_bags_batch, names("tables", 4)),
    Entry("dlrm_concatenated", ConcatenatedDLRM, bags_batch, names("tables", 4)),
)
