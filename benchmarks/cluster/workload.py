"""What every program trains: one flat DLRM with one id a bag, from the same weights, on the same batches.

Shape suffixes: B samples of a rank, F tables, I dense features, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from models import DENSE_FEATURES, DLRM
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and its batches, and the learning rate of plain SGD."""

    tables: int = 26
    rows: int = 50_000
    dim: int = 64
    samples: int = 512
    bottom: tuple[int, ...] = (512, 256)
    top: tuple[int, ...] = (512, 512, 256)
    batches: int = 8
    lr: float = 0.1


@dataclass
class Batch:
    """One local batch: dense (B, I), ids (F, B), one a bag, labels (B,)."""

    dense_BI: Tensor
    ids_FB: Tensor
    labels_B: Tensor

    def inputs(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the flat model's arguments."""
        offsets_B = torch.arange(self.ids_FB.shape[1])
        return self.dense_BI, list(self.ids_FB), [offsets_B] * len(self.ids_FB)


def flat_model(workload: Workload) -> DLRM:
    """Return the flat model, the same on every rank and for every program."""
    torch.manual_seed(0)
    rows = [workload.rows] * workload.tables
    return DLRM(rows, workload.dim, DENSE_FEATURES, workload.bottom, workload.top, sparse=True)


def dense_bytes(workload: Workload) -> int:
    """Return the bytes of the dense parameters, whose gradients every step averages."""
    with torch.device("meta"):
        model = flat_model(workload)
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("emb."))


def make_batches(workload: Workload, rank: int) -> list[Batch]:
    """Return a rank's batches, the same for every program."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (workload.tables, workload.samples)
    return [
        Batch(
            torch.randn(workload.samples, DENSE_FEATURES, generator=generator),
            torch.randint(workload.rows, shape, generator=generator),
            torch.randint(2, (workload.samples,), generator=generator).float(),
        )
        for _ in range(workload.batches)
    ]


class _LookedUp(nn.Module):
    """Stands where a table was: hands through the vectors that were looked up elsewhere."""

    def forward(self, pooled_BD: Tensor, _: object) -> Tensor:
        return pooled_BD


def take_tables(flat: DLRM) -> list[Tensor]:
    """Take the tables' weights out of the flat model, which then takes pooled embeddings in the place of ids."""
    weights: list[Tensor] = list(flat.emb.parameters())
    flat.emb = nn.ModuleList([_LookedUp() for _ in weights])
    return weights


def loss_of(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean loss of a local batch."""
    return nn.functional.binary_cross_entropy_with_logits(logits_B, labels_B)
