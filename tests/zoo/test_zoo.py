"""Every model of the zoo, compiled without a change to it: same numbers, all its tables, no graph too many."""

from __future__ import annotations

import pytest

from tests.zoo.comparison import Difference, compare_alone, compare_ranks, explained
from tests.zoo.entry import Entry
from tests.zoo.models import ZOO

# Dynamo itself looks at the gradient of what an earlier graph returned, with any backend.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning:torch\..*"
)
every_model = pytest.mark.parametrize("entry", ZOO, ids=str)


def assert_within_limits(differences: list[Difference]) -> None:
    """Assert that something was compared, and nothing differs by more than it may."""
    assert differences
    assert [d for d in differences if not d.error <= d.limit] == []


@every_model
def test_one_process_computes_what_eager_does_in_one_graph_for_all_shapes(entry: Entry) -> None:
    alone = compare_alone(entry, shapes=12)
    assert_within_limits(alone.differences)
    assert (alone.training_graphs, alone.evaluation_graphs) == (entry.graphs, entry.graphs)


@every_model
def test_simulated_ranks_compute_what_eager_does(entry: Entry) -> None:
    assert_within_limits(compare_ranks(entry))


@every_model
def test_all_tables_are_found_and_what_stays_flat_has_its_reason(entry: Entry) -> None:
    explanation = explained(entry)
    assert {table.name for table in explanation.tables} == entry.tables
    wanted = dict(entry.flat)
    for item in explanation.unmatched:
        keys = [key for key in wanted if key in item.source_line]
        assert len(keys) == 1, f"{item} was not expected, or not twice"
        assert wanted.pop(keys[0]) in item.reason
    assert wanted == {}
    assert {table for tower in explanation.plan.towers for table in tower.tables} == entry.tables


def test_the_zoo_has_each_model_once() -> None:
    assert len({entry.name for entry in ZOO}) == len(ZOO) > 40
