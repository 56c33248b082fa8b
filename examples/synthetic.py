"""Click data whose interactions are known: features fall into planted blocks, and only features of a block interact.

Shape suffixes: N rows, F features, D width of the hidden vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from data import TableData


def planted_blocks(
    features: int = 16,
    blocks: int = 4,
    rows: int = 60_000,
    ids: int = 30,
    exponent: float = 1.0,
    width: int = 2,
    strength: float = 3.0,
    seed: int = 0,
) -> tuple[TableData, list[int]]:
    """Draw a data set with planted blocks.

    Every id of every feature has a hidden vector. A row's score is the sum, over the pairs of features of a block, of
    the products of their ids' vectors: each pair of values has an interaction of its own, and no feature tells
    anything by itself. The label is drawn with the probability sigmoid(``strength`` x the normalised score).

    Args:
        features: number of categorical features; their blocks are shuffled, so that neighbours tell nothing.
        blocks: number of blocks, as equal in size as possible.
        rows: number of rows, split 8:1:1.
        ids: values of each feature; value k is drawn in proportion to (k + 1) ** -``exponent``.
        width: of the hidden vectors.
        seed: of everything drawn.

    Returns:
        The data, with two dense features that mean nothing, and the block of each feature.
    """
    rng = np.random.default_rng(seed)
    block_F = rng.permutation(np.arange(features) % blocks)
    popularity = (1.0 + np.arange(ids)) ** -exponent
    categorical_NF = rng.choice(ids, size=(rows, features), p=popularity / popularity.sum())
    score_N = np.zeros(rows)
    for block in range(blocks):
        members = np.flatnonzero(block_F == block)
        hidden = rng.normal(size=(len(members), ids, width))
        hidden -= np.average(hidden, axis=1, weights=popularity)[:, None]  # alone, a feature tells nothing
        vectors_FND = np.stack([hidden[k, categorical_NF[:, f]] for k, f in enumerate(members)])
        total_ND, squares_N = vectors_FND.sum(axis=0), (vectors_FND**2).sum(axis=(0, 2))
        score_N += ((total_ND**2).sum(axis=1) - squares_N) / 2
    score_N = strength * score_N / max(score_N.std(), 1e-9)
    labels_N = rng.random(rows) < 1 / (1 + np.exp(-score_N))
    train_end, valid_end = rows * 8 // 10, rows * 9 // 10
    order = torch.arange(rows)
    data = TableData(
        dense_NI=torch.from_numpy(rng.normal(size=(rows, 2)).astype(np.float32)),
        categorical_NF=torch.from_numpy(categorical_NF),
        labels_N=torch.from_numpy(labels_N.astype(np.float32)),
        table_rows=(ids,) * features,
        dense_names=("noise_0", "noise_1"),
        categorical_names=tuple(f"block{block}_{k}" for k, block in enumerate(block_F)),
        train=order[:train_end],
        valid=order[train_end:valid_end],
        test=order[valid_end:],
    )
    return data, block_F.tolist()
