"""Hypothesis strategies: models, topologies, plans and batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from dmt_compile import Topology
from tests.equivalence.models import Batch, Feature, Spec, Table, make_batch

UNPOOLED = ("single", "column", "number", "sequence", "masked sum", "masked mean")
STEPS = 3


@dataclass(frozen=True)
class World:
    """A topology, a way to partition, and the local batch sizes of some steps."""

    topology: Topology
    options: dict[str, Any]
    sizes: tuple[tuple[int, ...], ...]
    seed: int

    def batches(self, spec: Spec, step: int) -> list[Batch]:
        """Return every rank's batch of one step."""
        first = self.seed + 1000 * step
        return [make_batch(spec, size, first + rank) for rank, size in enumerate(self.sizes[step])]


@dataclass(frozen=True)
class Case:
    """A model, the worlds it runs in, and the optimizer that trains it."""

    spec: Spec
    worlds: tuple[World, ...]
    optimizer: str


@st.composite
def readers(draw: st.DrawFn, table: int, bag: bool) -> Feature:
    """A feature; of a bag's kinds or of the others."""
    length = draw(st.integers(1, 3))
    if not bag:
        return Feature(table, draw(st.sampled_from(UNPOOLED)), length=length)
    kind = draw(st.sampled_from(["bag", "bag", "fixed bag"]))
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    weights = draw(st.sampled_from(["none", "none", "batch", "learned"])) if mode == "sum" else "none"
    return Feature(table, kind, mode, weights, kind == "bag" and draw(st.booleans()), length)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A model of 1 to 12 tables, some of them read twice."""
    number = draw(st.integers(1, 12))
    odd = st.sampled_from([1, 3, 5, 7, 9, 11, 13])  # no power of two divides them
    width = draw(st.none() | st.integers(1, 20))
    tables: list[Table] = []
    features: list[Feature] = []
    for index in range(number):
        rows = draw(st.sampled_from([1, 2, 3]) if draw(st.integers(0, 4)) == 0 else st.integers(1, 60))
        dim = width or draw(odd | st.integers(1, 20))
        kind = draw(st.sampled_from(["bag", "bag", "unpooled", "both", "fields"]))
        if kind == "fields":
            fields = draw(st.integers(1, min(3, rows)))
            mine = [Feature(index, "fields", length=fields)]
        else:
            twice = kind == "both" or draw(st.integers(0, 5)) == 0
            mine = [draw(readers(index, bag=kind != "unpooled"))]
            mine += [draw(readers(index, bag=kind == "bag"))] if twice else []
        sparse = draw(st.booleans()) and all(feature.mode != "max" for feature in mine)  # PyTorch has no sparse max
        padding = draw(st.none() | st.integers(0, rows - 1))
        tables.append(Table(rows, dim, sparse, draw(st.integers(0, 7)) == 0, padding))
        features += mine
    return Spec(tuple(tables), tuple(draw(st.permutations(features))), draw(st.integers(0, 2**16)))


@st.composite
def pieces(draw: st.DrawFn, spec: Spec, index: int) -> list[list[str]]:
    """A whole table, or pieces of its columns, each of them whole or in rows, which one tower holds together."""
    table, name = spec.tables[index], f"emb.{index}"
    by_rows = all(feature.mode != "max" for feature in spec.features if feature.table == index)

    def ranges(size: int) -> list[str]:
        cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 and draw(st.booleans()) else []
        return [f"{first}:{end}" for first, end in pairwise([0, *cuts, size])]

    out = []
    for columns in ranges(table.dim):
        rows = ranges(table.rows) if by_rows else []
        whole = ":" if columns != f"0:{table.dim}" else ""
        names = [f"{name}[{part}, {columns}]" for part in (rows if len(rows) > 1 else [whole]) if part]
        out.append(names or [name])
    return out


@st.composite
def worlds(draw: st.DrawFn, spec: Spec) -> World:
    """A topology of 1x1 to 4x4, a plan for the model's tables, a way for ids, and batches that may be empty."""
    topology = Topology(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    towers = draw(st.sampled_from([n for n in range(1, 9) if n % topology.hosts == 0 or topology.hosts % n == 0]))
    partition = draw(st.sampled_from(["balanced", "strided", "explicit"]))
    options: dict[str, Any] = {"partition": partition, "towers": towers}
    if partition == "explicit" and all(feature.kind != "fields" for feature in spec.features):
        lists: list[list[str]] = [[] for _ in range(towers)]
        for index in range(len(spec.tables)):
            for together in draw(pieces(spec, index)):
                lists[draw(st.integers(0, towers - 1))] += together
        options = {"partition": lists}
    elif partition == "explicit":
        options["partition"] = "strided"  # the names of split field tables are the compiler's
    if partition != "explicit":
        options |= {"split_rows": draw(st.booleans()), "split_columns": draw(st.booleans())}
    options["id_exchange"] = draw(st.sampled_from(["auto", "global", "hierarchical"]))
    ranks = topology.world_size
    sizes = tuple(
        tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=ranks, max_size=ranks))) for _ in range(STEPS)
    )
    return World(topology, options, sizes, draw(st.integers(0, 2**16)))


@st.composite
def cases(draw: st.DrawFn, number: int = 2) -> Case:
    """A model in ``number`` worlds."""
    spec = draw(specs())
    chosen = tuple(draw(worlds(spec)) for _ in range(number))
    return Case(spec, chosen, draw(st.sampled_from(["SGD", "Adagrad", "Adam"])))
