"""The reader of click logs, on rows made in their format."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import pytest
import torch
from criteo import CriteoFormatError, CriteoTsv
from data import Batch

TABLE_ROWS = tuple(range(50, 76))


def make_line(number: int) -> str:
    """A row whose first integer is its line number; other fields are random and sometimes missing."""
    chance = random.Random(number)
    integers = [str(chance.randint(-2, 5000)) if chance.random() < 0.8 else "" for _ in range(12)]
    hashes = [f"{chance.getrandbits(32):08x}" if chance.random() < 0.9 else "" for _ in range(26)]
    return "\t".join([str(number % 2), str(number), *integers, *hashes])


def write(path: Path, lines: list[str]) -> Path:
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def line_numbers(batches: list[Batch]) -> list[int]:
    return [round(math.expm1(x)) for batch in batches for x in batch.dense_BI[:, 0].tolist()]


@pytest.mark.parametrize("name", ["log.txt", "log.txt.gz"])
def test_fields_become_numbers(tmp_path: Path, name: str) -> None:
    integers = ["3", "-2", "", "0", *["1"] * 9]
    hashes = ["0000002a", "ffffffff", "", *["00000001"] * 23]
    path = write(tmp_path / name, ["\t".join(["1", *integers, *hashes])])
    (batch,) = CriteoTsv(path, 1, TABLE_ROWS)
    assert batch.labels_B.tolist() == [1.0]
    assert batch.dense_BI[0, :5].tolist() == pytest.approx([math.log(4), 0, 0, 0, math.log(2)])
    assert batch.categorical_BF[0, :4].tolist() == [42, 0xFFFFFFFF % 51, 0, 1]
    assert (batch.dense_BI.shape, batch.categorical_BF.shape, batch.global_rows) == ((1, 13), (1, 26), 1)
    assert (batch.dense_BI.dtype, batch.categorical_BF.dtype) == (torch.float32, torch.int64)


def test_every_tenth_line_is_a_test_row(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", [make_line(n) for n in range(1, 46)])
    assert line_numbers(list(CriteoTsv(path, 3, TABLE_ROWS, "test"))) == [10, 20, 30, 40]
    assert line_numbers(list(CriteoTsv(path, 1, TABLE_ROWS))) == [n for n in range(1, 46) if n % 10]
    assert line_numbers(list(CriteoTsv(path, 1, TABLE_ROWS, limit_rows=12))) == [*range(1, 10), 11, 12]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_yield_equally_many_batches_and_together_every_row_in_order(tmp_path: Path, world: int) -> None:
    path = write(tmp_path / "log.txt.gz", [make_line(n) for n in range(1, 132)])
    for part, rows in (("train", [n for n in range(1, 132) if n % 10][:112]), ("test", list(range(10, 131, 10)))):
        by_rank = [list(CriteoTsv(path, 8, TABLE_ROWS, part, rank, world)) for rank in range(world)]  # type: ignore[arg-type]
        assert len({len(batches) for batches in by_rank}) == 1
        steps = list(zip(*by_rank, strict=True))
        assert line_numbers([batch for step in steps for batch in step]) == rows
        for step in steps:
            assert {batch.global_rows for batch in step} == {sum(len(batch.labels_B) for batch in step)}


def test_training_drops_the_incomplete_batch_and_evaluation_pads_with_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", [make_line(n) for n in range(1, 51)])  # 45 training rows, 5 test rows
    train = [list(CriteoTsv(path, 8, TABLE_ROWS, "train", rank, 4)) for rank in range(4)]
    assert [[len(b.labels_B) for b in batches] for batches in train] == [[2] * 5] * 4
    test = [list(CriteoTsv(path, 4, TABLE_ROWS, "test", rank, 4)) for rank in range(4)]
    assert [[len(b.labels_B) for b in batches] for batches in test] == [[1, 0]] * 3 + [[1, 1]]
    empty = test[0][1]
    assert (empty.dense_BI.shape, empty.categorical_BF.shape, empty.global_rows) == ((0, 13), (0, 26), 1)
    assert empty.categorical_BF.dtype == torch.int64


def test_hashes_are_the_same_in_every_run(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", [make_line(n) for n in range(1, 10)])
    (first,), (again,) = (list(CriteoTsv(path, 9, TABLE_ROWS)) for _ in range(2))
    assert torch.equal(first.categorical_BF, again.categorical_BF)
    assert bool((first.categorical_BF < torch.tensor(TABLE_ROWS)).all())


def test_a_line_with_other_fields_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", [make_line(1), make_line(2), make_line(3).rsplit("\t", 1)[0]])
    with pytest.raises(CriteoFormatError, match=r"expected 40 tab-separated fields on line 3 of .*log\.txt, found 39"):
        list(CriteoTsv(path, 3, TABLE_ROWS))


@pytest.mark.parametrize(
    ("column", "value"), [(0, "2"), (0, ""), (5, "1.5"), (30, "xyz")], ids=["label", "no-label", "integer", "hash"]
)
def test_a_line_with_a_bad_value_is_named(tmp_path: Path, column: int, value: str) -> None:
    fields = make_line(2).split("\t")
    fields[column] = value
    path = write(tmp_path / "log.txt", [make_line(1), "\t".join(fields)])
    with pytest.raises(CriteoFormatError, match=r"expected a label 0 or 1, 13 integers .* on line 2 of .*log\.txt"):
        list(CriteoTsv(path, 2, TABLE_ROWS))
