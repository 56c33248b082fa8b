"""The flat DLRM that the benchmarks run, with batches for it: the example's model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from dlrm import DLRM

__all__ = ["DLRM", "Batch", "make_batch", "make_model"]

Batch = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]
DENSE_FEATURES = 13


def make_model(tables: int, dim: int = 16, rows: int = 1000, sparse: bool = False) -> DLRM:
    """Return a DLRM with ``tables`` tables, the same for the same arguments."""
    torch.manual_seed(0)
    table_rows = [rows + 7 * index % 50 for index in range(tables)]
    return DLRM(table_rows, dim, DENSE_FEATURES, sparse=sparse)


def make_batch(model: DLRM, samples: int, seed: int, longest: int = 2) -> Batch:
    """Return a ragged batch of bags of 1 to ``longest`` ids (0 ids in an empty batch)."""
    generator = torch.Generator().manual_seed(seed)
    ids, offsets = [], []
    for table in model.emb:
        lengths = torch.randint(1, longest + 1, (samples,), generator=generator)
        ids.append(torch.randint(0, table.num_embeddings, (int(lengths.sum()),), generator=generator))
        offsets.append(lengths.cumsum(0) - lengths)
    return torch.randn(samples, DENSE_FEATURES, generator=generator), ids, offsets
