"""Interaction matrices: what they hold, how they are saved, and their networkx form."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from dmt_compile import InteractionMatrix
from dmt_compile.errors import ConfigError, PlanError
from dmt_compile.partition.interaction import inside_share, read_interactions


def small() -> InteractionMatrix:
    matrix = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.0], [0.2, 0.0, 1.0]])
    return InteractionMatrix(("a", "a#2", "b"), ("a", "a", "b"), matrix, "cosine", 128)


def test_the_diagonal_counts_for_nothing() -> None:
    assert np.diag(small().matrix).tolist() == [0, 0, 0]


def test_a_table_of_several_features_has_the_mean_of_their_interactions() -> None:
    assert small().of_tables(["b", "a"]).tolist() == [[0, 0.1], [0.1, 0]]
    assert small().of_tables([]).shape == (0, 0)


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(PlanError, match=r"expected every table in the interactions, found none for c \(1 missing\)"):
        small().of_tables(["a", "c"])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((2, 2)), "interactions: expected a 3x3 matrix, found shape (2, 2)"),
        (np.full((3, 3), 2.0), "expected a symmetric number from 0 to 1 for a and a#2, found 2.0 and 2.0"),
        (np.triu(np.full((3, 3), 0.5)), "expected a symmetric number from 0 to 1 for a and a#2, found 0.5 and 0.0"),
        (np.full((3, 3), np.nan), "expected a symmetric number from 0 to 1 for a and a#2, found nan and nan"),
    ],
)
def test_numbers_that_are_no_interaction_are_refused(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        InteractionMatrix(("a", "a#2", "b"), ("a", "a", "b"), matrix)


def test_names_must_be_different_and_have_tables() -> None:
    with pytest.raises(ConfigError, match=re.escape("found 2 names (1 different) and 1 tables")):
        InteractionMatrix(("a", "a"), ("a",), np.zeros((2, 2)))


def test_save_and_load_agree(tmp_path: Path) -> None:
    small().save(tmp_path / "m.json")
    loaded = InteractionMatrix.load(tmp_path / "m.json")
    assert (loaded.features, loaded.tables, loaded.signal, loaded.samples) == (
        *(("a", "a#2", "b"), ("a", "a", "b")),
        *("cosine", 128),
    )
    assert np.array_equal(loaded.matrix, small().matrix)
    empty = InteractionMatrix((), (), np.zeros((0, 0)))
    empty.save(tmp_path / "empty.json")
    assert InteractionMatrix.load(tmp_path / "empty.json").features == ()


@pytest.mark.parametrize("text", ["no json", "{}", '{"version": 1, "features": [{}]}', "[]"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"expected a file that InteractionMatrix\.save\(\) wrote"):
        InteractionMatrix.load(path)


def test_another_version_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"version": 99, "features": []}')
    with pytest.raises(ConfigError, match="expected version 1, found 99"):
        InteractionMatrix.load(path)
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        InteractionMatrix.load(tmp_path / "none.json")


def test_a_graph_goes_out_and_comes_back() -> None:
    graph = small().graph()
    assert graph.nodes["a#2"]["table"] == "a"
    assert graph.edges["a", "a#2"]["weight"] == 0.5
    assert not graph.has_edge("a#2", "b")
    back = InteractionMatrix.from_graph(graph)
    assert (back.features, back.tables, back.signal, back.samples) == (
        *(small().features, small().tables),
        *("cosine", 128),
    )
    assert np.array_equal(back.matrix, small().matrix)


def test_a_graph_that_a_user_made_needs_edges_alone() -> None:
    made = read_interactions(nx.path_graph(["emb.0", "emb.1", "emb.2"]))
    assert made.tables == ("emb.0", "emb.1", "emb.2")
    assert made.matrix.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    with pytest.raises(ConfigError, match="expected an undirected graph, found a directed one"):
        InteractionMatrix.from_graph(nx.DiGraph())


def test_interactions_are_read_from_a_path(tmp_path: Path) -> None:
    small().save(tmp_path / "m.json")
    assert read_interactions(str(tmp_path / "m.json")).features == small().features
    assert read_interactions(small()).features == small().features


def test_the_share_inside_groups() -> None:
    matrix = small().of_tables(["a", "b"])
    assert inside_share(matrix, [0, 0]) == 1
    assert inside_share(matrix, [0, 1]) == 0
    assert inside_share(np.zeros((2, 2)), [0, 0]) == 0
