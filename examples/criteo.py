"""A streaming reader of click logs in Criteo's format; users bring the file. B: rows of one rank's batch."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from data import Batch, rank_share

CRITEO_INTEGERS = 13
CRITEO_HASHES = 26
CRITEO_FIELDS = 1 + CRITEO_INTEGERS + CRITEO_HASHES
CRITEO_TEST_EVERY = 10


class CriteoFormatError(ValueError):
    """A line of a Criteo file is not a label, 13 integers and 26 hexadecimal hashes."""


class CriteoTsv:
    """Stream a click log in Criteo's format: label, 13 integers, 26 hexadecimal hashes, separated by tabs.

    Empty fields are missing values. Integers become ``log(1 + max(x, 0))``, a missing one 0. A hash becomes
    ``int(hash, 16) % rows`` of its table, a missing one row 0. Never more than one global batch of lines is in memory.

    Args:
        path: the file; ``.gz`` is read as it is.
        batch_size: rows of a global batch.
        table_rows: number of embeddings of each of the 26 tables.
        part: ``"train"`` or ``"test"``: every tenth line of the file is a test row.
        rank: this rank.
        world: number of ranks; each yields the same number of batches.
        limit_rows: stop after so many lines of the file.

    In training the last, incomplete global batch is dropped. In the test part it is kept, so that no row is lost: its
    shares are uneven, and empty on some ranks where it has fewer rows than there are ranks.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        table_rows: Sequence[int],
        part: Literal["train", "test"] = "train",
        rank: int = 0,
        world: int = 1,
        limit_rows: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.batch_size = batch_size
        self.table_rows = tuple(table_rows)
        self.part = part
        self.rank = rank
        self.world = world
        self.limit_rows = limit_rows

    def __iter__(self) -> Iterator[Batch]:
        """Read the file from its start.

        Raises:
            CriteoFormatError: a line of this rank's share has another format; says which line.
        """
        with gzip.open(self.path) if self.path.suffix == ".gz" else open(self.path, "rb") as file:
            numbered = itertools.islice(enumerate(file, start=1), self.limit_rows)
            test = self.part == "test"
            wanted = (item for item in numbered if (item[0] % CRITEO_TEST_EVERY == 0) == test)
            while group := list(itertools.islice(wanted, self.batch_size)):
                if len(group) < self.batch_size and not test:
                    return
                mine = group[rank_share(len(group), self.rank, self.world)]
                yield self._batch([self._parse(number, line) for number, line in mine], len(group))

    def _parse(self, number: int, line: bytes) -> tuple[float, list[int], list[int]]:
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != CRITEO_FIELDS:
            raise CriteoFormatError(
                f"criteo: expected {CRITEO_FIELDS} tab-separated fields on line {number} of {self.path}, found "
                f"{len(fields)}; the file must have the label first, as Criteo's training files do"
            )
        integers, hashes = fields[1 : 1 + CRITEO_INTEGERS], fields[1 + CRITEO_INTEGERS :]
        try:
            return (
                {b"0": 0.0, b"1": 1.0}[fields[0]],
                [int(field) if field else 0 for field in integers],
                [int(field, 16) % rows if field else 0 for field, rows in zip(hashes, self.table_rows, strict=True)],
            )
        except (KeyError, ValueError) as error:
            raise CriteoFormatError(
                f"criteo: expected a label 0 or 1, 13 integers and 26 hexadecimal hashes on line {number} of "
                f"{self.path}, found {error}; repair or remove the line"
            ) from error

    def _batch(self, rows: list[tuple[float, list[int], list[int]]], global_rows: int) -> Batch:
        integers_BI = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, CRITEO_INTEGERS)
        hashed_BF = np.array([row[2] for row in rows], dtype=np.int64).reshape(-1, CRITEO_HASHES)
        return Batch(
            torch.from_numpy(np.log1p(np.maximum(integers_BI, 0)).astype(np.float32)),
            torch.from_numpy(hashed_BF),
            torch.tensor([row[0] for row in rows], dtype=torch.float32),
            global_rows,
        )
