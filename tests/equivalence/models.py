"""Random flat models and their batches: every form of lookup, each as users write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

Batch = dict[str, torch.Tensor]
DENSE = 3  # dense features
BAGS = ("bag", "fixed bag")


@dataclass(frozen=True)
class Table:
    """One embedding table; ``padding`` is a row that means nothing."""

    rows: int
    dim: int
    sparse: bool = False
    frozen: bool = False
    padding: int | None = None


@dataclass(frozen=True)
class Feature:
    """One reader of a table.

    Args:
        table: index of the table.
        kind: ``bag`` (ids and offsets), ``fixed bag`` (a matrix of ids), ``single`` (one id a sample), ``column`` (of a
            matrix of ids), ``number`` (a float column cast to ids), ``sequence`` (unpooled), ``masked sum``, ``masked
            mean`` (pooled by hand), ``fields`` (one table for several fields at constant offsets).
        mode: pooling of a bag.
        weights: of a bag's ids: ``none``, ``batch`` (an input) or ``learned`` (a parameter).
        last_offset: offsets end with the number of ids.
        length: ids of a fixed bag or sequence; number of fields.
    """

    table: int
    kind: str = "bag"
    mode: str = "sum"
    weights: str = "none"
    last_offset: bool = False
    length: int = 2


@dataclass(frozen=True)
class Spec:
    """A model: tables, their readers in order, and the seed of its values."""

    tables: tuple[Table, ...]
    features: tuple[Feature, ...]
    seed: int = 0

    def build(self) -> Flat:
        """Return the model."""
        torch.manual_seed(self.seed)
        return Flat(self)

    def field_rows(self, feature: Feature) -> list[int]:
        """Return how many rows each field has of its joint table."""
        rows = self.tables[feature.table].rows
        starts = [rows * field // feature.length for field in range(feature.length + 1)]
        return [end - start for start, end in pairwise(starts)]


class Flat(nn.Module):
    """Tables of any kind under an MLP; gives its lookups too, side by side."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.emb = nn.ModuleList(nn.Embedding(t.rows, t.dim, sparse=t.sparse) for t in spec.tables)
        for table, module in zip(spec.tables, self.emb, strict=True):
            module.weight.requires_grad_(not table.frozen)
        self.gates = nn.ParameterDict()
        width = 0
        for index, feature in enumerate(spec.features):
            table = spec.tables[feature.table]
            if feature.weights == "learned":
                self.gates[str(index)] = nn.Parameter(torch.rand(table.rows))
            if feature.kind == "fields":
                starts = torch.tensor([0, *spec.field_rows(feature)[:-1]]).cumsum(0)
                self.register_buffer(f"starts{index}", starts)
            width += table.dim * (feature.length if feature.kind in ("sequence", "fields") else 1)
        self.bottom = nn.Sequential(nn.Linear(DENSE, 4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(width + 4, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.cat([self.look_up(i, feature, batch) for i, feature in enumerate(self.spec.features)], dim=1)
        return pooled, self.head(torch.cat([self.bottom(batch["dense"]), pooled], dim=1)).squeeze(1)

    def look_up(self, index: int, feature: Feature, batch: Batch) -> torch.Tensor:
        table, weight = self.spec.tables[feature.table], self.emb[feature.table].weight
        ids = self.ids(index, feature, batch)
        if feature.kind in BAGS:
            weights = batch[f"weights{index}"] if feature.weights == "batch" else None
            if feature.weights == "learned":
                weights = self.gates[str(index)][ids]
            return F.embedding_bag(
                ids, weight, batch[f"offsets{index}"] if feature.kind == "bag" else None, mode=feature.mode,
                sparse=table.sparse, per_sample_weights=weights, include_last_offset=feature.last_offset,
                padding_idx=table.padding,
            )  # fmt: skip
        rows = F.embedding(ids, weight, table.padding, sparse=table.sparse)
        if feature.kind in ("sequence", "fields"):
            return rows.flatten(1)
        if feature.kind.startswith("masked"):
            mask = batch[f"mask{index}"]
            total = (rows * mask.unsqueeze(2)).sum(1)
            return total if feature.kind == "masked sum" else total / mask.sum(1, keepdim=True).clamp(min=1)
        return rows

    def ids(self, index: int, feature: Feature, batch: Batch) -> torch.Tensor:
        if feature.kind in ("column", "number"):
            before = sum(other.kind == feature.kind for other in self.spec.features[:index])
            return batch["columns"][:, before] if feature.kind == "column" else batch["numbers"][:, before].long()
        if feature.kind == "fields":
            return batch[f"ids{index}"] + getattr(self, f"starts{index}")
        return batch[f"ids{index}"]


def make_batch(spec: Spec, samples: int, seed: int, longest: int = 4) -> Batch:
    """Return a local batch: bags of 0 to ``longest`` ids, many of them duplicates where tables are small."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"dense": torch.randn(samples, DENSE, generator=generator)}
    columns: dict[str, list[torch.Tensor]] = {"column": [], "number": []}

    def draw(rows: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, rows, shape, generator=generator)

    for index, feature in enumerate(spec.features):
        rows = spec.tables[feature.table].rows
        if feature.kind in columns:
            columns[feature.kind].append(draw(rows, samples))
        elif feature.kind == "fields":
            fields = [draw(field_rows, samples) for field_rows in spec.field_rows(feature)]
            batch[f"ids{index}"] = torch.stack(fields, dim=1)
        elif feature.kind == "bag":
            lengths = draw(longest + 1, samples)
            ends = lengths.cumsum(0)
            batch[f"ids{index}"] = draw(rows, int(lengths.sum()))
            starts = ends - lengths
            last = lengths.sum().reshape(1)
            batch[f"offsets{index}"] = torch.cat([starts, last]) if feature.last_offset else starts
        elif feature.kind == "single":
            batch[f"ids{index}"] = draw(rows, samples)
        else:
            batch[f"ids{index}"] = draw(rows, samples, feature.length)
        if feature.weights == "batch":
            batch[f"weights{index}"] = torch.randn(batch[f"ids{index}"].shape, generator=generator)
        if feature.kind.startswith("masked"):
            batch[f"mask{index}"] = draw(2, samples, feature.length).float()
    for kind, parts in columns.items():
        if parts:
            stacked = torch.stack(parts, dim=1)
            batch[f"{kind}s"] = stacked.float() if kind == "number" else stacked
    return batch


def concatenate(spec: Spec, batches: Sequence[Batch]) -> Batch:
    """Return the global batch that a flat model on one process would see."""
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for index, feature in enumerate(spec.features):
        if feature.kind == "bag":
            parts, before = [], 0
            for batch in batches:
                offsets = batch[f"offsets{index}"]
                parts.append((offsets[:-1] if feature.last_offset else offsets) + before)
                before += len(batch[f"ids{index}"])
            end = [torch.tensor([before])] if feature.last_offset else []
            joined[f"offsets{index}"] = torch.cat([*parts, *end])
    return joined
