"""What people do with ``nn.EmbeddingBag`` beside pooling ids: weights, compressed, shared, padded and capped tables."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, bags, columns, dense, mlp, names

ROWS = (30, 12, 21)
DIM = 4
Ragged = list[torch.Tensor]


class WeightedBags(nn.Module):
    """Each id comes with a weight, such as a watch time."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in ROWS)
        self.head = mlp(len(ROWS) * DIM, 8, 1)

    def forward(self, ids: Ragged, offsets: Ragged, weights: Ragged) -> torch.Tensor:
        parts = zip(self.tables, ids, offsets, weights, strict=True)
        return self.head(torch.cat([t(i, o, per_sample_weights=w) for t, i, o, w in parts], dim=1))


def weighted_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags(ROWS, samples, generator)
    return ids, offsets, [torch.rand(i.shape, generator=generator) for i in ids]


class LearnedWeights(nn.Module):
    """A learned weight for each row, gathered by id."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in ROWS)
        self.v_W = nn.ParameterList(nn.Parameter(torch.rand(rows)) for rows in ROWS)
        self.head = mlp(len(ROWS) * DIM, 8, 1)

    def forward(self, ids: Ragged, offsets: Ragged) -> torch.Tensor:
        pooled = []
        for k, (index, offset) in enumerate(zip(ids, offsets, strict=True)):
            weights = self.v_W[k].gather(0, index)
            pooled.append(self.emb[k](index, offset, per_sample_weights=weights))
        return self.head(torch.cat(pooled, dim=1))


class QuotientRemainderBag(nn.Module):
    """Two small tables in place of a large one, multiplied."""

    def __init__(self, rows: int, collisions: int) -> None:
        super().__init__()
        self.collisions = collisions
        self.q = nn.Parameter(torch.randn(-(-rows // collisions), DIM))
        self.r = nn.Parameter(torch.randn(collisions, DIM))

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        quotient = torch.div(ids, self.collisions, rounding_mode="floor")
        remainder = torch.remainder(ids, self.collisions)
        q = F.embedding_bag(quotient, self.q, offsets, mode="sum")
        r = F.embedding_bag(remainder, self.r, offsets, mode="sum")
        return q * r


class QuotientRemainder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(QuotientRemainderBag(rows, 4) for rows in ROWS)
        self.head = mlp(len(ROWS) * DIM, 8, 1)

    def forward(self, ids: Ragged, offsets: Ragged) -> torch.Tensor:
        return self.head(torch.cat([b(i, o) for b, i, o in zip(self.bags, ids, offsets, strict=True)], dim=1))


class MixedDimension(nn.Module):
    """Rare features have narrow tables, brought to one width by projections."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 2, 4)
        self.tables = nn.ModuleList(nn.EmbeddingBag(r, w, mode="sum") for r, w in zip(ROWS, widths, strict=True))
        self.proj = nn.ModuleList(nn.Identity() if w == 8 else nn.Linear(w, 8, bias=False) for w in widths)
        self.head = mlp(8, 8, 1)

    def forward(self, ids: Ragged, offsets: Ragged) -> torch.Tensor:
        parts = zip(self.tables, self.proj, ids, offsets, strict=True)
        vectors = torch.stack([project(table(i, o)) for table, project, i, o in parts])
        return self.head(vectors.prod(dim=0))


class LastOffset(nn.Module):
    """Offsets that end with the number of ids; means."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, DIM, mode=mode, include_last_offset=True)
            for rows, mode in zip(ROWS, ("mean", "sum", "max"), strict=True)
        )
        self.head = mlp(len(ROWS) * DIM + 3, 8, 1)

    def forward(self, x: torch.Tensor, ids: Ragged, offsets: Ragged) -> torch.Tensor:
        pooled = [table(i, o) for table, i, o in zip(self.tables, ids, offsets, strict=True)]
        return self.head(torch.cat([x, *pooled], dim=1))


def last_offset_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags(ROWS, samples, generator)
    ended = [torch.cat([o, torch.tensor([len(i)])]) for i, o in zip(ids, offsets, strict=True)]
    return dense(samples, 3, generator), ids, ended


class PaddedBags(nn.Module):
    """Matrices of ids, one a feature, padded with id 0 that counts for nothing; three ways to pool."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("sum", "mean", "max")
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, DIM, mode=mode, padding_idx=0) for rows, mode in zip(ROWS, modes, strict=True)
        )
        self.head = mlp(len(ROWS) * DIM, 8, 1)

    def forward(self, *ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([table(i) for table, i in zip(self.tables, ids, strict=True)], dim=1))


def padded_batch(samples: int, generator: torch.Generator) -> Batch:
    lengths = torch.randint(1, 5, (len(ROWS),), generator=generator).tolist()
    return tuple(torch.randint(r, (samples, n), generator=generator) for r, n in zip(ROWS, lengths, strict=True))


class HashedUnified(nn.Module):
    """One table for all features, each id at the places that two hash functions give."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(50, DIM, mode="sum")
        self.register_buffer("factors", torch.tensor([[7919, 104729], [15485863, 32452843], [49979687, 67867967]]))
        self.head = mlp(3 * DIM, 8, 1)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        vectors = []
        for feature in range(3):
            hashed = (raw[:, feature : feature + 1] * self.factors[feature] + feature) % 2147483647
            vectors.append(self.table(hashed % self.table.num_embeddings))
        return self.head(torch.cat(vectors, dim=1))


class SharedTables(nn.Module):
    """Five features on two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.EmbeddingBag(ROWS[0], DIM, mode="mean")
        self.tag = nn.EmbeddingBag(ROWS[1], DIM, mode="sum")
        self.owner = {"clicked": "item", "liked": "item", "bought": "item", "tags": "tag", "own_tags": "tag"}
        self.head = mlp(len(self.owner) * DIM, 8, 1)

    def forward(self, features: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return self.head(torch.cat([getattr(self, t)(*features[name]) for name, t in self.owner.items()], dim=1))


def shared_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags((ROWS[0], ROWS[0], ROWS[0], ROWS[1], ROWS[1]), samples, generator)
    keys = ("clicked", "liked", "bought", "tags", "own_tags")
    return (dict(zip(keys, zip(ids, offsets, strict=True), strict=True)),)


class Capped(nn.Module):
    """Rows scaled down to a norm when they are read; sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.capped = nn.EmbeddingBag(ROWS[0], DIM, mode="sum", max_norm=1.0)
        self.also = nn.Embedding(ROWS[1], DIM, max_norm=1.5, norm_type=1.0)
        self.sparse = nn.EmbeddingBag(ROWS[2], DIM, mode="mean", sparse=True)
        self.head = mlp(3 * DIM, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = [self.capped(ids[:, :1]), self.also(ids[:, 1]), self.sparse(ids[:, 2:])]
        return self.head(torch.cat(vectors, dim=1))


def ragged_batch(samples: int, generator: torch.Generator) -> Batch:
    return bags(ROWS, samples, generator)


BAGGED = (
    Entry("weighted_bags", WeightedBags, weighted_batch, names("tables", 3)),
    Entry("learned_weights", LearnedWeights, ragged_batch, names("emb", 3)),
    Entry(
        "quotient_remainder",
        QuotientRemainder,
        ragged_batch,
        frozenset(f"bags.{i}.{part}" for i in range(3) for part in "qr"),
    ),
    # A matrix product rounds otherwise where its input is a slice of several features' columns.
    Entry("mixed_dimension", MixedDimension, ragged_batch, names("tables", 3), exact=False),
    Entry("last_offset", LastOffset, last_offset_batch, names("tables", 3)),
    Entry("padded_bags", PaddedBags, padded_batch, names("tables", 3)),
    Entry(
        "hashed_unified",
        HashedUnified,
        lambda samples, generator: (torch.randint(10**6, (samples, 3), generator=generator),),
        frozenset({"table"}),
    ),
    Entry("shared_tables", SharedTables, shared_batch, frozenset({"item", "tag"})),
    Entry(
        "capped_rows",
        Capped,
        lambda samples, generator: (columns(ROWS, samples, generator),),
        frozenset({"capped", "also", "sparse"}),
    ),
)
