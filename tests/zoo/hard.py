"""What is hard for a compiler: batch statistics, branches, graph breaks, frozen and half-precision tables, odd ids."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.entry import Batch, Entry, bags, columns, dense, mlp, names

ROWS = (30, 12, 7)
DIM = 4
WIDTH = len(ROWS) * DIM


class Normalised(nn.Module):
    """Batch norm on the numbers and in the over-arch; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        self.emb_drop = nn.Dropout(0.0)
        self.bn_cont = nn.BatchNorm1d(3)
        self.top = nn.Sequential(
            nn.Linear(WIDTH + 3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 1)
        )

    def forward(self, x_cat: torch.Tensor, x_cont: torch.Tensor) -> torch.Tensor:
        x = self.emb_drop(torch.cat([e(x_cat[:, i]) for i, e in enumerate(self.embeds)], 1))
        return self.top(torch.cat([x, self.bn_cont(x_cont)], 1))


class Branches(nn.Module):
    """Another scale for large batches, decided in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        self.top = mlp(WIDTH, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.cat([table(ids[:, i]) for i, table in enumerate(self.embeds)], dim=1)
        if x.shape[0] > 8:
            x = x / x.shape[0] ** 0.5
        return self.top(x)


class GraphBreak(nn.Module):
    """What Dynamo cannot trace in the middle, with tables on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.EmbeddingBag(ROWS[0], DIM, mode="sum")
        self.after = nn.Embedding(ROWS[1], DIM)
        self.top = mlp(2 * DIM, 8, 1)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.before(ids, offsets))
        torch._dynamo.graph_break()
        return self.top(torch.cat([first, self.after(item)], dim=1))


def graph_break_batch(samples: int, generator: torch.Generator) -> Batch:
    ids, offsets = bags(ROWS[:1], samples, generator)
    return ids[0], offsets[0], torch.randint(ROWS[1], (samples,), generator=generator)


class Frozen(nn.Module):
    """A pretrained table that is not trained, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = nn.Embedding.from_pretrained(torch.randn(ROWS[0], DIM), freeze=True)
        self.bag = nn.EmbeddingBag.from_pretrained(torch.randn(ROWS[1], DIM), freeze=True, mode="mean")
        self.trained = nn.Embedding(ROWS[2], DIM)
        self.top = mlp(WIDTH, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = [self.pretrained(ids[:, 0]), self.bag(ids[:, 1:2]), self.trained(ids[:, 2])]
        return self.top(torch.cat(vectors, dim=1))


class HalfPrecision(nn.Module):
    """Tables in bfloat16, one in float32; everything else computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum", dtype=torch.bfloat16) for rows in ROWS[:2])
        self.single = nn.EmbeddingBag(ROWS[2], DIM, mode="sum")
        self.top = mlp(WIDTH, 8, 1)

    def forward(self, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        pooled = [table(i, o).float() for table, i, o in zip((*self.halves, self.single), ids, offsets, strict=True)]
        return self.top(torch.cat(pooled, dim=1))


class Codebook(nn.Module):
    """A table chooses a row of another; ids remapped through a buffer, and weights from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.assignment = nn.Embedding(ROWS[0], 5)
        self.codebook = nn.Embedding(5, DIM)
        self.register_buffer("category_of", torch.arange(ROWS[1]) % 4)
        self.category = nn.Embedding(4, DIM)
        self.importance = nn.Embedding(ROWS[2], 1)
        self.weighted = nn.EmbeddingBag(ROWS[2], DIM, mode="sum")
        self.top = mlp(WIDTH + 5, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores = self.assignment(ids[:, 0])
        code = self.codebook(scores.argmax(dim=1))
        category = self.category(self.category_of[ids[:, 1]])
        importance = self.importance(ids[:, 2:]).squeeze(-1)
        weighted = self.weighted(ids[:, 2:], per_sample_weights=importance)
        return self.top(torch.cat([scores, code, category, weighted], dim=1))


def id_batch(samples: int, generator: torch.Generator) -> Batch:
    return (columns(ROWS, samples, generator),)


HARD = (
    Entry(
        "batch_norm",
        Normalised,
        lambda samples, generator: (columns(ROWS, samples, generator), dense(samples, 3, generator)),
        names("embeds", 3),
        smallest=2,
    ),
    Entry("branches", Branches, id_batch, names("embeds", 3), smallest=1, graphs=2),
    Entry("graph_break", GraphBreak, graph_break_batch, frozenset({"before", "after"}), graphs=2),
    Entry("frozen", Frozen, id_batch, frozenset({"pretrained", "bag", "trained"})),
    Entry(
        "half_precision",
        HalfPrecision,
        lambda samples, generator: bags(ROWS, samples, generator),
        frozenset({"halves.0", "halves.1", "single"}),
    ),
    Entry(
        "codebook",
        Codebook,
        id_batch,
        frozenset({"assignment", "category", "importance"}),
        flat={
            "self.codebook(": "ids depend on another lookup",
            "self.weighted(": "per_sample_weights depend on another lookup",
        },
    ),
)
