"""Models of a user's history: sequences of ids of a length that changes from batch to batch."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.entry import Batch, Entry, columns, mlp, sequences

ITEMS = 25
DIM = 8


class DIN(nn.Module):
    """Attention of a target item over the history; both read one table, whose row 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(ITEMS, DIM, padding_idx=0)
        self.user_emb = nn.Embedding(12, DIM)
        self.attention = nn.Sequential(nn.Linear(4 * DIM, 8), nn.PReLU(), nn.Linear(8, 1))
        self.top = mlp(3 * DIM, 16, 1)

    def forward(self, user: torch.Tensor, target: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        query = self.item_emb(target)
        keys = self.item_emb(history)
        queries = query.unsqueeze(1).expand(-1, history.shape[1], -1)
        joined = torch.cat([queries, keys, queries - keys, queries * keys], dim=-1)
        scores = self.attention(joined).squeeze(-1)
        scores = scores.masked_fill(history == 0, -1e9)
        interest = torch.bmm(scores.softmax(dim=1).unsqueeze(1), keys).squeeze(1)
        return self.top(torch.cat([self.user_emb(user), query, interest], dim=1)).squeeze(1)


def din_batch(samples: int, generator: torch.Generator) -> Batch:
    user, target = columns((12, ITEMS), samples, generator).unbind(1)
    return user, target, sequences(ITEMS, samples, generator)


class MaskedMean(nn.Module):
    """The mean of what was clicked, over what is not padding; sums by bmm with a mask made from lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.clicked = nn.Embedding(ITEMS, DIM, padding_idx=0)
        self.searched = nn.Embedding(15, DIM)
        self.top = mlp(2 * DIM, 8, 1)

    def forward(self, clicks: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (clicks != 0).unsqueeze(-1).float()
        mean = (self.clicked(clicks) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        used = (torch.arange(words.shape[1], device=words.device)[None, :] < lengths[:, None]).float()
        total = torch.bmm(used.unsqueeze(1), self.searched(words)).squeeze(1)
        return self.top(torch.cat([mean, total / (lengths.float().unsqueeze(1) + 1e-8)], dim=1))


def masked_batch(samples: int, generator: torch.Generator) -> Batch:
    clicks, words = sequences(ITEMS, samples, generator), sequences(15, samples, generator)
    return clicks, words, torch.randint(0, words.shape[1] + 1, (samples,), generator=generator)


class PooledSequences(nn.Module):
    """Sequences of a set length, pooled by sum, mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.summed = nn.Embedding(ITEMS, DIM)
        self.averaged = nn.Embedding(15, DIM)
        self.largest = nn.Embedding(9, DIM)
        self.top = mlp(3 * DIM, 8, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        pooled = [self.summed(a).sum(1), self.averaged(b).mean(1), self.largest(c).max(1).values]
        return self.top(torch.cat(pooled, dim=-1))


def free_lengths(samples: int, generator: torch.Generator) -> Batch:
    return tuple(sequences(rows, samples, generator) for rows in (ITEMS, 15, 9))


class NextItem(nn.Module):
    """A transformer over a session with learned positions; scores of one item that came next, one that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, DIM, padding_idx=0)
        self.positions = nn.Embedding(10, DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, session: torch.Tensor, after: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        length = session.size(1)
        places = torch.arange(length, device=session.device)
        x = self.items(session) * DIM**0.5 + self.positions(places)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / DIM**0.5
        future = torch.ones(length, length, dtype=torch.bool, device=session.device).triu(1)
        x = self.norm(x + scores.masked_fill(future, float("-inf")).softmax(-1) @ self.v(x))
        x = x * (session != 0).unsqueeze(-1)
        return (x * self.items(after)).sum(-1) - (x * self.items(other)).sum(-1)


def next_item_batch(samples: int, generator: torch.Generator) -> Batch:
    # At least two positions: for a first batch of one, PyTorch's own rule for matmul asks whether that is a case apart.
    session = torch.cat([sequences(ITEMS, samples, generator), torch.ones(samples, 1, dtype=torch.long)], dim=1)
    after, other = (torch.randint(1, ITEMS, session.shape, generator=generator) for _ in range(2))
    return session, after, other


class TiedProjection(nn.Module):
    """A recurrent model that scores every item with the table it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, DIM, padding_idx=0)
        self.context = nn.Embedding(6, DIM)
        self.project = nn.Linear(DIM, DIM)

    def forward(self, session: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.project(self.items(session).mean(dim=1) + self.context(context)))
        return hidden @ self.items.weight.t()


def tied_batch(samples: int, generator: torch.Generator) -> Batch:
    return sequences(ITEMS, samples, generator), torch.randint(6, (samples,), generator=generator)


SEQUENCE = (
    Entry("din", DIN, din_batch, frozenset({"item_emb", "user_emb"})),
    Entry("masked_mean", MaskedMean, masked_batch, frozenset({"clicked", "searched"}), exact=False),
    Entry("pooled_sequences", PooledSequences, free_lengths, frozenset({"summed", "averaged", "largest"}), exact=False),
    Entry(
        "next_item",
        NextItem,
        next_item_batch,
        frozenset({"items"}),
        flat={"self.positions(places)": "do not come from the batch"},
    ),
    Entry(
        "tied_projection",
        TiedProjection,
        tied_batch,
        frozenset({"context"}),
        flat={"self.items(session)": "used outside lookups"},
    ),
)
