"""How strongly features interact, as a matrix: saved, loaded, and exchanged with networkx.

Shape suffixes: F features, T tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from dmt_compile.errors import ConfigError, PlanError

Matrix = NDArray[np.float64]
VERSION = 1


@dataclass(frozen=True, eq=False)
class InteractionMatrix:
    """Interaction of every pair of features, from 0 (none) to 1.

    Args:
        features: names of the lookups; ``emb.3#2`` is the second feature that reads table ``emb.3``.
        tables: the table of each feature.
        matrix: float64 (F, F), symmetric, between 0 and 1; the diagonal is 0.
        signal: what was measured, such as ``"cosine"``.
        samples: how many samples it was measured on; 0 where the matrix came from elsewhere.

    Raises:
        ConfigError: the matrix is none of so many features, or a value is not in [0, 1].
    """

    features: tuple[str, ...]
    tables: tuple[str, ...]
    matrix: Matrix
    signal: str = "given"
    samples: int = 0

    def __post_init__(self) -> None:
        number = len(self.features)
        if len(set(self.features)) < number or len(self.tables) != number:
            raise ConfigError(
                f"interactions: expected one name and one table for each feature, found {number} names "
                f"({len(set(self.features))} different) and {len(self.tables)} tables"
            )
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (number, number):
            raise ConfigError(f"interactions: expected a {number}x{number} matrix, found shape {matrix.shape}")
        bad = ~((matrix >= 0) & (matrix <= 1)) | (matrix != matrix.T)
        np.fill_diagonal(bad, False)
        if bad.any():
            first, second = (int(index) for index in np.argwhere(bad)[0])
            raise ConfigError(
                f"interactions: expected a symmetric number from 0 to 1 for {self.features[first]} and "
                f"{self.features[second]}, found {matrix[first, second]} and {matrix[second, first]}; scale the matrix"
            )
        np.fill_diagonal(matrix, 0.0)
        object.__setattr__(self, "matrix", matrix)

    def of_tables(self, names: Sequence[str]) -> Matrix:
        """Return the interaction of tables, (T, T): the mean over the pairs of features that read the two.

        A table is in one tower whatever its own features do, so the diagonal stays 0. A table that is named several
        times, once for each of its pieces, interacts with others as it does, and with itself in full.

        Raises:
            PlanError: no feature reads one of the tables.
        """
        missing = [name for name in names if name not in self.tables]
        if missing:
            raise PlanError(
                f"partition: expected every table in the interactions, found none for {missing[0]} ({len(missing)} "
                "missing); measure them on this model with dmt_compile.interactions(model, batches)"
            )
        reads_TF = np.array([[table == name for table in self.tables] for name in names], dtype=np.float64)
        reads_TF = reads_TF.reshape(len(names), len(self.features))
        reads_TF /= np.maximum(reads_TF.sum(axis=1, keepdims=True), 1)
        matrix_TT = reads_TF @ self.matrix @ reads_TF.T
        matrix_TT[np.array([[a == b for a in names] for b in names], dtype=bool).reshape(matrix_TT.shape)] = 1.0
        np.fill_diagonal(matrix_TT, 0.0)
        return np.asarray((matrix_TT + matrix_TT.T) / 2)

    def graph(self) -> nx.Graph[str]:
        """Return a networkx graph: a node for each feature, with its ``table``, and edges with a ``weight``.

        ``signal`` and ``samples`` are attributes of the graph. Edit it and hand it in, or use :meth:`from_graph`.
        """
        graph: nx.Graph[str] = nx.Graph(signal=self.signal, samples=self.samples)
        for name, table in zip(self.features, self.tables, strict=True):
            graph.add_node(name, table=table)
        for i, j in zip(*np.nonzero(np.triu(self.matrix, 1)), strict=True):
            graph.add_edge(self.features[i], self.features[j], weight=float(self.matrix[i, j]))
        return graph

    @classmethod
    def from_graph(cls, graph: nx.Graph[Any]) -> InteractionMatrix:
        """Read a networkx graph.

        Args:
            graph: nodes are features; a node's ``table`` is its own name by default. An edge's ``weight`` is 1 by
                default, a pair without an edge does not interact.

        Raises:
            ConfigError: directed, or a weight outside [0, 1].
        """
        if graph.is_directed():
            raise ConfigError(
                "interactions: expected an undirected graph, found a directed one; use to_undirected() of it"
            )
        tables = tuple(str(data.get("table", node)) for node, data in graph.nodes(data=True))
        matrix = nx.to_numpy_array(graph, weight="weight")
        named = {"signal": graph.graph.get("signal", "given"), "samples": graph.graph.get("samples", 0)}
        return cls(tuple(map(str, graph.nodes)), tables, matrix, **named)

    def save(self, path: str | Path) -> None:
        """Write the matrix as JSON, one feature a line."""
        rows = [
            json.dumps({"feature": name, "table": table, "interaction": [round(float(x), 6) for x in row]})
            for name, table, row in zip(self.features, self.tables, self.matrix, strict=True)
        ]
        head = f'{{"version": {VERSION}, "signal": {json.dumps(self.signal)}, "samples": {self.samples}, "features": ['
        Path(path).write_text(head + "\n" + ",\n".join(rows) + "\n]}\n")

    @classmethod
    def load(cls, path: str | Path) -> InteractionMatrix:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data["version"] != VERSION:
                raise ConfigError(
                    f"interactions: expected version {VERSION}, found {data['version']} in {path}; measure again"
                )
            rows = data["features"]
            matrix = np.array([row["interaction"] for row in rows] or np.zeros((0, 0)), dtype=np.float64)
            names, tables = tuple(row["feature"] for row in rows), tuple(row["table"] for row in rows)
            return cls(names, tables, matrix, data["signal"], data["samples"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"interactions: expected a file that InteractionMatrix.save() wrote, found {error!r} for {path}"
            ) from error


def read_interactions(given: InteractionMatrix | nx.Graph[Any] | str | Path) -> InteractionMatrix:
    """Return interactions that a user gave as a matrix, a networkx graph, or the path of a saved matrix."""
    if isinstance(given, InteractionMatrix):
        return given
    return InteractionMatrix.from_graph(given) if isinstance(given, nx.Graph) else InteractionMatrix.load(given)


def inside_share(matrix_TT: Matrix, assignment: Sequence[int]) -> float:
    """Return the part of all interaction that is between tables of one group; 0 where there is none at all."""
    groups = np.asarray(assignment)
    same_TT = groups[:, None] == groups
    total = matrix_TT.sum()
    return float(matrix_TT[same_TT].sum() / total) if total > 0 else 0.0
