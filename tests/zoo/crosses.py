"""Interactions other than the dot product: crosses, attention, convolutions, towers."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, columns, dense, field_ranges, mlp, names

ROWS = (30, 12, 7, 21)
FIELDS = len(ROWS)
DIM = 4
WIDTH = FIELDS * DIM


class Fields(nn.Module):
    """What most of these models begin with: a vector for each field, (samples, fields, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)


class CrossV1(Fields):
    """DCN: crosses with a vector of weights, beside a deep part."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTH + 3
        self.w = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(3))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.deep = mlp(width, 8)
        self.out = nn.Linear(width + 8, 1)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        x0 = torch.cat([self.vectors(ids).flatten(1), numbers], dim=1)
        x = x0
        for w, b in zip(self.w, self.b, strict=True):
            x = x0 * w(x) + b + x
        return self.out(torch.cat([x, F.relu(self.deep(x0))], dim=1)).squeeze(-1)


class CrossV2(Fields):
    """DCN v2: crosses with a full matrix, or with one of low rank and a gate of experts."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.kernels = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        else:
            self.V = nn.ParameterList(nn.Parameter(torch.randn(2, rank, WIDTH) * 0.1) for _ in range(2))
            self.U = nn.ParameterList(nn.Parameter(torch.randn(2, WIDTH, rank) * 0.1) for _ in range(2))
            self.gate = nn.Linear(WIDTH, 2)
        self.deep = mlp(WIDTH, 8, 1)

    def cross(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            return self.kernels[layer](x)
        low = torch.tanh(torch.einsum("erw,bw->ber", self.V[layer], x))
        experts = torch.einsum("ewr,ber->bew", self.U[layer], low)
        return (experts * self.gate(x).softmax(-1).unsqueeze(-1)).sum(1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x0 = x = self.vectors(ids).flatten(1)
        for layer in range(2):
            x = x0 * self.cross(layer, x) + x
        return self.deep(x)


class AutoInt(Fields):
    """Self-attention over the fields, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(DIM, 2, batch_first=True) for _ in range(2))
        self.residual = nn.Linear(DIM, DIM)
        self.fc = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(ids)
        crossed = vectors
        for layer in self.attention:
            crossed, _ = layer(crossed, crossed, crossed)
        return self.fc(F.relu(crossed + self.residual(vectors)).flatten(1)).squeeze(1)


class CompressedInteraction(Fields):
    """xDeepFM: outer products of fields, compressed by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList((nn.Conv1d(FIELDS * FIELDS, 6, 1), nn.Conv1d(FIELDS * 6, 6, 1)))
        self.fc = nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.vectors(ids)
        x0, h = x.unsqueeze(2), x
        sums = []
        for conv in self.convs:
            product = x0 * h.unsqueeze(1)
            batch_size, f0, f1, width = product.shape
            h = F.relu(conv(product.view(batch_size, f0 * f1, width)))
            sums.append(h.sum(2))
        return self.fc(torch.cat(sums, dim=1))


class FieldConvolution(Fields):
    """FGCNN-like: a convolution along the fields, pooling, and new features from what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, (3, 1), padding=(1, 0))
        self.pool = nn.MaxPool2d((2, 1))
        self.recombine = nn.Linear(3 * FIELDS // 2 * DIM, 2 * DIM)
        self.top = mlp(WIDTH + 2 * DIM, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(ids)
        made = self.pool(torch.tanh(self.conv(vectors.unsqueeze(1))))
        new = torch.tanh(self.recombine(made.flatten(1)))
        return self.top(torch.cat([vectors.flatten(1), new], dim=1))


class BiInteraction(nn.Module):
    """NFM: the factorization machine's products kept as a vector, on one table with offsets as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(ROWS), DIM)
        self.offsets = torch.tensor((0, *ROWS[:-1])).cumsum(0)
        self.top = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.embedding(ids + self.offsets)
        pooled = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1))
        return self.top(pooled).squeeze(1)


class TwoTowers(nn.Module):
    """A user tower and an item tower, joined by the product of their elements; normalised vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(30, 8)
        self.item_embedding = nn.Embedding(12, 8)
        self.brand_embedding = nn.Embedding(7, 4)
        self.user = mlp(11, 16, 8)
        self.item = mlp(12, 16, 8)

    def forward(
        self, user: torch.Tensor, profile: torch.Tensor, item: torch.Tensor, brand: torch.Tensor
    ) -> torch.Tensor:
        u = F.normalize(self.user(torch.cat([self.user_embedding(user), profile], dim=-1)), dim=-1)
        v = torch.cat([self.item_embedding(item), self.brand_embedding(brand)], dim=-1)
        v = F.normalize(self.item(v), dim=-1)
        return (u * v).sum(-1) / 0.1


def two_tower_batch(samples: int, generator: torch.Generator) -> Batch:
    user, item, brand = columns((30, 12, 7), samples, generator).unbind(1)
    return user, dense(samples, 3, generator), item, brand


class WideAndDeep(Fields):
    """A linear part on ids and a crossed id, beside an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Embedding(rows, 1) for rows in (*ROWS, 50))
        self.deep = mlp(WIDTH, 16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        crossed = (ids[:, 0] * ROWS[1] + ids[:, 1]) % 50
        wide = sum(table(column) for table, column in zip(self.wide, (*ids.unbind(1), crossed), strict=True))
        return torch.sigmoid(wide + self.deep(self.vectors(ids).flatten(1)))


class Bilinear(Fields):
    """FiBiNET-like: fields weighed by squeeze and excitation, pairs joined by a matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.excite = nn.Sequential(nn.Linear(FIELDS, 2), nn.ReLU(), nn.Linear(2, FIELDS), nn.Sigmoid())
        self.pairs = list(combinations(range(FIELDS), 2))
        self.bilinear = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in self.pairs)
        self.top = mlp(2 * len(self.pairs) * DIM, 16, 1)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        fields = torch.split(vectors, 1, dim=1)
        parts = [m(fields[i]) * fields[j] for m, (i, j) in zip(self.bilinear, self.pairs, strict=True)]
        return torch.cat(parts, dim=1).flatten(1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(ids)
        weighed = vectors * self.excite(vectors.mean(-1)).unsqueeze(-1)
        return self.top(torch.cat([self.products(vectors), self.products(weighed)], dim=1))


def id_batch(samples: int, generator: torch.Generator) -> Batch:
    return (columns(ROWS, samples, generator),)


def ids_and_numbers(samples: int, generator: torch.Generator) -> Batch:
    return columns(ROWS, samples, generator), dense(samples, 3, generator)


TABLES = names("tables", FIELDS)

CROSSES = (
    Entry("dcn", CrossV1, ids_and_numbers, TABLES),
    Entry("dcn_v2", lambda: CrossV2(None), id_batch, TABLES),
    Entry("dcn_v2_low_rank", lambda: CrossV2(2), id_batch, TABLES),
    Entry("autoint", AutoInt, id_batch, TABLES),
    Entry("xdeepfm", CompressedInteraction, id_batch, TABLES, graphs=2),
    Entry("fgcnn", FieldConvolution, id_batch, TABLES, graphs=2),
    Entry("nfm", BiInteraction, id_batch, field_ranges("embedding", ROWS)),
    Entry("two_towers", TwoTowers, two_tower_batch, frozenset(f"{n}_embedding" for n in ("user", "item", "brand"))),
    Entry("wide_and_deep", WideAndDeep, id_batch, TABLES | names("wide", FIELDS + 1)),
    Entry("fibinet", Bilinear, id_batch, TABLES),
)
