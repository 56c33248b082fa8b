"""Models of other people's libraries, unmodified: same numbers as in eager mode, and all their tables found."""

from __future__ import annotations

import pytest

from tests.zoo.comparison import compare_alone, explained
from tests.zoo.entry import Entry
from tests.zoo.libraries import DEEPCTR, LIBRARIES, RECHUB, TORCHREC
from tests.zoo.test_zoo import assert_within_limits

every_model = pytest.mark.parametrize("entry", LIBRARIES, ids=str)


@every_model
def test_one_process_computes_what_eager_does(entry: Entry) -> None:
    alone = compare_alone(entry, shapes=4, evaluate=False)
    assert_within_limits(alone.differences)
    assert alone.training_graphs == entry.graphs


@every_model
def test_all_tables_are_found(entry: Entry) -> None:
    explanation = explained(entry)
    assert {table.name for table in explanation.tables} == entry.tables
    assert explanation.unmatched == ()


def test_each_library_is_there() -> None:
    assert len(DEEPCTR) >= 8
    assert len(RECHUB) >= 6
    assert len(TORCHREC) == 2
