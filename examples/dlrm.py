"""A flat DLRM, written as one writes it for a single device: nothing here knows of towers, ranks or compilers.

Shape suffixes: B samples, I dense features, F categorical features, D embedding width, P interaction pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(widths: Sequence[int], last_activation: bool) -> nn.Sequential:
    """Stack linear layers with ReLU between them.

    Args:
        widths: number of units, from the input to the output.
        last_activation: whether the last layer is followed by a ReLU too.

    Returns:
        The layers as one module.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]))


class DLRM(nn.Module):
    """Predict a click (or any yes/no label) from dense features and one bag of ids per categorical feature.

    Args:
        table_rows: number of embeddings of each table, one table per categorical feature.
        dim: embedding width D, also the output width of the bottom MLP.
        dense_features: number of dense features I.
        bottom: hidden widths of the bottom MLP.
        top: hidden widths of the top MLP (the over-arch).
        sparse: whether the tables have sparse gradients.
    """

    row_index_P: Tensor
    column_index_P: Tensor

    def __init__(
        self,
        table_rows: Sequence[int],
        dim: int,
        dense_features: int,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (128, 64),
        sparse: bool = False,
    ) -> None:
        super().__init__()
        tables = [nn.EmbeddingBag(rows, dim, mode="sum", sparse=sparse) for rows in table_rows]
        for table in tables:
            # Dot products of vectors from the default N(0, 1) would swamp the bottom MLP's output at the start.
            nn.init.uniform_(table.weight, -(dim**-0.5) / 4, dim**-0.5 / 4)
        self.emb = nn.ModuleList(tables)
        self.bottom = mlp((dense_features, *bottom, dim), last_activation=True)
        vectors = len(table_rows) + 1
        rows_P, columns_P = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("row_index_P", rows_P)
        self.register_buffer("column_index_P", columns_P)
        self.top = mlp((dim + rows_P.numel(), *top, 1), last_activation=False)

    def forward(self, dense_BI: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """Compute one logit per sample.

        Args:
            dense_BI: dense features, float, (B, I).
            ids: for each table the ids of all bags one after another, int64, 1-D.
            offsets: for each table the position in its ids where each sample's bag starts, int64, (B,).

        Returns:
            Logits, (B,).
        """
        bottom_BD = self.bottom(dense_BI)
        pooled = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        vectors_BFD = torch.stack([bottom_BD, *pooled], dim=1)
        dots_BFF = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2))
        pairs_BP = dots_BFF[:, self.row_index_P, self.column_index_P]
        logits_B1: Tensor = self.top(torch.cat([bottom_BD, pairs_BP], dim=1))
        return logits_B1.squeeze(1)


def example() -> tuple[DLRM, tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Return a small model and a batch for it: ``dmt explain --model examples/dlrm.py:example --topology 2x4``."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    rows, samples = (1000, 200, 50, 7, 3000, 12), 32
    lengths_FB = torch.randint(0, 4, (len(rows), samples), generator=generator)
    ids = [torch.randint(0, n, (int(k.sum()),), generator=generator) for n, k in zip(rows, lengths_FB, strict=True)]
    offsets = [lengths_B.cumsum(0) - lengths_B for lengths_B in lengths_FB]
    return DLRM(rows, dim=8, dense_features=4), (torch.randn(samples, 4, generator=generator), ids, offsets)
