"""Flat models as users write them, and batches for them; shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

Batch = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


class DLRM(nn.Module):
    """A DLRM with a dot interaction; without ``dense`` width equal to the tables' it concatenates instead."""

    def __init__(
        self,
        rows: Sequence[int] = (50, 20, 7, 33, 11),
        dims: Sequence[int] | int = 8,
        modes: Sequence[str] | str = "sum",
        sparse: bool = False,
        dense: int = 5,
    ) -> None:
        super().__init__()
        dims = [dims] * len(rows) if isinstance(dims, int) else list(dims)
        modes = [modes] * len(rows) if isinstance(modes, str) else list(modes)
        self.emb = nn.ModuleList(
            nn.EmbeddingBag(r, d, mode=m, sparse=sparse) for r, d, m in zip(rows, dims, modes, strict=True)
        )
        self.dot = len(set(dims)) == 1
        width = dims[0]
        self.bottom = nn.Sequential(nn.Linear(dense, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        vectors = len(rows) + 1
        pairs = [(i, j) for i in range(vectors) for j in range(i)]
        self.register_buffer("rows_of_pairs", torch.tensor([i for i, _ in pairs]))
        self.register_buffer("columns_of_pairs", torch.tensor([j for _, j in pairs]))
        joined = width + len(pairs) if self.dot else width + sum(dims)
        self.top = nn.Sequential(nn.Linear(joined, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        bottom = self.bottom(dense)
        looked_up = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        stacked = torch.cat([bottom, *looked_up], dim=1)
        if not self.dot:
            return self.top(stacked).squeeze(1)
        vectors = stacked.view(bottom.shape[0], -1, bottom.shape[1])
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        pairs = products[:, self.rows_of_pairs, self.columns_of_pairs]
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)


def with_two_top_buckets(model: DLRM) -> DLRM:
    """Give a model a top whose gradients leave in two buckets: those of the last layer, then those of the others."""
    model.top = nn.Sequential(
        nn.Linear(model.top[0].in_features, 600), nn.ReLU(), nn.Linear(600, 512), nn.ReLU(), nn.Linear(512, 1)
    )
    return model


def make_batch(model: DLRM, samples: int, generator: torch.Generator, longest: int = 3) -> Batch:
    """Return a ragged batch: bags of 0 to ``longest`` ids."""
    ids, offsets = [], []
    for table in model.emb:
        lengths = torch.randint(0, longest + 1, (samples,), generator=generator)
        ids.append(torch.randint(0, table.num_embeddings, (int(lengths.sum()),), generator=generator))
        offsets.append(lengths.cumsum(0) - lengths)
    return torch.randn(samples, model.bottom[0].in_features, generator=generator), ids, offsets


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return the global batch that a flat model on one process would see."""
    ids, offsets = [], []
    for feature in range(len(batches[0][1])):
        ids.append(torch.cat([batch[1][feature] for batch in batches]))
        starts, before = [], 0
        for batch in batches:
            starts.append(batch[2][feature] + before)
            before += len(batch[1][feature])
        offsets.append(torch.cat(starts))
    return torch.cat([batch[0] for batch in batches]), ids, offsets


def dense_of(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return a gradient as a plain dense tensor; zeros for none."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient


class Mixture(nn.Module):
    """Lookups of every kind: weighted bags, sequences pooled and attended over, fields of one table, a frozen table."""

    FIELDS = (7, 5, 9)

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4, mode="sum", sparse=True)
        self.importance = nn.Parameter(torch.rand(11))
        self.item = nn.Embedding(13, 4, padding_idx=0)
        self.pooled = nn.Embedding(8, 3, sparse=True)
        self.fields = nn.Embedding(sum(self.FIELDS), 4)
        self.first_order = nn.Embedding(sum(self.FIELDS), 1)
        self.register_buffer("starts", torch.tensor([0, 7, 12]))
        self.frozen = nn.EmbeddingBag(6, 2, mode="mean", include_last_offset=True, _weight=torch.randn(6, 2))
        self.frozen.weight.requires_grad_(False)
        self.attention = nn.Linear(8, 1)
        norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.top = nn.Sequential(nn.Linear(33, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 1))

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        fields: torch.Tensor,
        history: torch.Tensor,
        target: torch.Tensor,
    ) -> torch.Tensor:
        bags = self.bag(ids, offsets, per_sample_weights=self.importance[ids])
        ends = torch.cat([offsets, torch.full_like(offsets[:1], 1).mul(len(ids))])
        frozen = self.frozen(ids % 6, ends)
        rows, mask = self.item(history), (history > 0).float().unsqueeze(2)
        wanted = self.item(target)
        scores = self.attention(torch.cat([rows, wanted.unsqueeze(1).expand_as(rows)], dim=2))
        attended = (torch.sigmoid(scores) * mask * rows).sum(1)
        short = (self.pooled(history % 8) * mask).sum(1) / (mask.sum(1) + 1)
        index = fields + self.starts
        second = self.fields(index)
        joined = torch.cat([bags, frozen, attended, wanted, short, second.flatten(1), rows.mean(1)], dim=1)
        return (self.top(joined) + self.first_order(index).sum(1)).squeeze(1)

    def batch(self, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Return a batch whose sequences have a length of its own."""

        def draw(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(0, high, shape, generator=generator)

        lengths = draw(4, samples)
        fields = torch.stack([draw(rows, samples) for rows in self.FIELDS], dim=1)
        history = draw(13, samples, 2 + int(draw(4, 1)))
        return draw(11, int(lengths.sum())), lengths.cumsum(0) - lengths, fields, history, draw(13, samples)


class MatrixAndWeights(nn.Module):
    """Bags that are rows of a matrix of ids, and bags whose ids have a weight each, under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.weighted = (nn.EmbeddingBag(9, 4, mode="sum") for _ in range(2))
        self.top = nn.Linear(8, 1)

    def forward(
        self, matrix: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.top(torch.cat([self.rows(matrix), self.weighted(ids, offsets, weights)], dim=1)).squeeze(1)

    def batch(self, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Return a batch with two ids a bag."""
        matrix, ids = (torch.randint(9, (samples, 2), generator=generator) for _ in range(2))
        return matrix, ids.reshape(-1), torch.arange(samples) * 2, torch.rand(2 * samples, generator=generator)


class Projected(DLRM):
    """A DLRM whose features, and its dense vector, pass through one and the same projection before they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        bottom = self.project(self.bottom(dense))
        looked_up = [torch.tanh(self.project(t(i, o))) for t, i, o in zip(self.emb, ids, offsets, strict=True)]
        vectors = torch.stack([bottom, *looked_up], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        pairs = products[:, self.rows_of_pairs, self.columns_of_pairs]
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)
