"""What the compiler found in a model: tables, the features that read them, and what joins the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from dmt_compile.plan import SPLITS, TableSpec
from dmt_compile.table_names import parameter_of


@dataclass(frozen=True)
class Table:
    """An embedding table: its flat name, graph input and parameter.

    A field of a table of many fields is a table of its own, ``emb[100:150]``. So is a piece of a table, where the plan
    splits it: ``emb[:, 8:16]``, ``emb[0:500]``.
    """

    name: str
    placeholder: str
    rows: int
    dim: int
    dtype: torch.dtype
    parameter: torch.Tensor | None = field(compare=False, repr=False)

    @property
    def parameter_name(self) -> str:
        """The flat name of the parameter that holds this table's rows, without ``.weight``."""
        return parameter_of(self.name).parameter


@dataclass(frozen=True)
class Feature:
    """One lookup of a table: the node that gives its pooled rows, and how.

    Args:
        bags: bags of one sample; more than one where a sequence is used before it is pooled.
        pooling: ids of one bag, on average.
        jagged: bags of one batch differ in length.
        weighted: each id has a weight.
        group: which lookups it is exchanged with: those with as many bags.
        splits: how its table may be split, as :class:`TableSpec` says.
    """

    name: str
    table: str
    node: str
    mode: str
    sparse: bool
    pooling: float
    bags: float = 1.0
    jagged: bool = True
    weighted: bool = False
    group: int = 0
    splits: str = "rows and columns"


@dataclass(frozen=True)
class Unmatched:
    """Something that looked like a lookup and stayed as it was: the node, why, and the user's line."""

    node: str
    reason: str
    source_line: str


@dataclass(frozen=True)
class Interaction:
    """How the features meet: ``kind``, the node that joins them, the features in order and the dense vector's node."""

    kind: str
    node: str
    features: tuple[str, ...]
    dense: str | None


class EmbeddingGraph:
    """Tables, features, interaction and over-arch, and who feeds whom.

    ``graph`` is a networkx graph over ``("table", name)``, ``("feature", name)``, ``("interaction", node)`` and
    ``("over_arch", "output")``, with the dataclasses of this module under the key ``item``.
    """

    def __init__(self) -> None:
        self.graph: nx.DiGraph[Any] = nx.DiGraph()
        self.unmatched: list[Unmatched] = []
        self.interactions: list[Interaction] = []
        self.checked_inputs: list[list[str]] = []  # graph inputs whose dimension 0 check_batch compares, by group
        self.batch_size = 0  # samples of the batch that was captured; 0 where it cannot be seen

    def add_table(self, table: Table) -> None:
        """Add a table, once."""
        self.graph.add_node(("table", table.name), item=table)

    def add_feature(self, feature: Feature) -> None:
        """Add a lookup of a table that was added before."""
        self.graph.add_edge(("table", feature.table), ("feature", feature.name))
        self.graph.nodes["feature", feature.name]["item"] = feature

    def split(self, tables: Mapping[str, Sequence[Table]], features: Mapping[str, Sequence[Feature]]) -> None:
        """Put pieces of tables and their features in the place of what they are pieces of, by its name."""
        pieces: dict[Any, list[tuple[str, str, Any]]]
        pieces = {("table", name): [("table", t.name, t) for t in found] for name, found in tables.items()}
        pieces |= {("feature", name): [("feature", f.name, f) for f in found] for name, found in features.items()}
        old, self.graph = self.graph, nx.DiGraph()
        for key, data in old.nodes(data=True):
            for kind, name, item in pieces.get(key, [(*key, data.get("item"))]):
                self.graph.add_node((kind, name), **({} if item is None else {"item": item}))
        for feature in self.features:
            self.graph.add_edge(("table", feature.table), ("feature", feature.name))
        for source, target in old.edges:
            for kind, name, _ in pieces.get(source, [(*source, None)]) if target[0] != "feature" else ():
                self.graph.add_edge((kind, name), target)
        self.interactions = [
            replace(
                found,
                features=tuple(
                    n for f in found.features for n in ([p.name for p in features[f]] if f in features else [f])
                ),
            )
            for found in self.interactions
        ]

    def add_interaction(self, interaction: Interaction) -> None:
        """Say what is computed of joined features; the first is the model's main interaction."""
        self.interactions.append(interaction)
        key = ("interaction", interaction.node)
        self.graph.add_node(key, item=interaction)
        for name in interaction.features:
            self.graph.add_edge(("feature", name), key)
        self.graph.add_edge(key, ("over_arch", "output"))

    @property
    def interaction(self) -> Interaction | None:
        """The model's main interaction."""
        return self.interactions[0] if self.interactions else None

    @property
    def tables(self) -> list[Table]:
        """All tables, in the order they were found."""
        return [data["item"] for (kind, _), data in self.graph.nodes(data=True) if kind == "table"]

    @property
    def features(self) -> list[Feature]:
        """All lookups, in graph order."""
        return [data["item"] for (kind, _), data in self.graph.nodes(data=True) if kind == "feature"]

    def table_specs(self) -> tuple[TableSpec, ...]:
        """What the planner needs of each table."""
        specs = []
        for table in self.tables:
            features = [f for f in self.features if f.table == table.name]
            bags = sum(f.bags for f in features)
            specs.append(
                TableSpec(
                    name=table.name,
                    rows=table.rows,
                    dim=table.dim,
                    dtype=str(table.dtype).removeprefix("torch."),
                    features=len(features),
                    pooling=round(sum(f.pooling * f.bags for f in features) / max(bags, 1e-9), 3),
                    bags=round(bags / max(len(features), 1), 3),
                    jagged=round(sum(f.bags for f in features if f.jagged) / max(bags, 1e-9), 3),
                    weighted=round(sum(f.bags for f in features if f.weighted) / max(bags, 1e-9), 3),
                    splits=min((f.splits for f in features), key=SPLITS.index, default=SPLITS[-1]),
                )
            )
        return tuple(specs)


def source_line(node: fx.Node) -> str:
    """Return the user's own line that a node came from: ``file:line: code``."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("File ") and "/torch/nn/" not in lines[index]:
            where = lines[index].removeprefix("File ").split(", in ")[0].replace('"', "").replace(", line ", ":")
            return f"{where}: {lines[index + 1]}" if index + 1 < len(lines) else where
    return "unknown line"
