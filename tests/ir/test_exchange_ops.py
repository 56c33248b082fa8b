"""The exchange operators: fake rules against what runs, headers, routes, and the order of the peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import fx

from dmt_compile import pipeline, torch_internals
from dmt_compile.errors import BatchError, CollectiveError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.metadata import describe
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.runtime import checks
from dmt_compile.runtime.route import HEADER_FIELDS, Layout, Route, make_layout
from dmt_compile.runtime.simulated_world import SimulatedWorld, _LockstepProgram, _Transfer
from dmt_compile.runtime.world import Ledger
from dmt_compile.topology import Topology
from tests.models import DLRM, Batch, make_batch

# ------------------------------------------------------------------------------------------- fake rules tell the truth


class Agreement:
    """Compares recorded metadata with real values; a symbol has one value on a rank."""

    def __init__(self) -> None:
        self.symbols: dict[Any, int] = {}

    def check(self, recorded: Any, real: Any) -> None:
        if isinstance(real, tuple | list):
            assert len(recorded) == len(real)
            for one, other in zip(recorded, real, strict=True):
                self.check(one, other)
        elif isinstance(real, torch.Tensor):
            assert (recorded.dtype, recorded.ndim, recorded.device) == (real.dtype, real.ndim, real.device)
            assert recorded.requires_grad == real.requires_grad
            for size, actual in zip(recorded.shape, real.shape, strict=True):
                self.size(size, actual)
        elif isinstance(real, Route):
            assert recorded.layout == real.layout
            self.size(recorded.batch_size, real.batch_size)
            self.size(recorded.global_batch_size, real.global_batch_size)
        elif isinstance(real, Layout):
            assert recorded == real
        elif isinstance(real, int):
            self.size(recorded, real)
        else:
            assert real is None, "only ids and offsets of another rank's tables have no value"

    def size(self, recorded: Any, real: int) -> None:
        expression = torch_internals.canonical_expression(recorded)
        if not isinstance(expression, int) and expression.is_Symbol:
            assert self.symbols.setdefault(expression, real) == real
        elif isinstance(expression, int) or expression.is_number:
            assert int(expression) == real
        else:
            assert int(expression.subs(self.symbols)) == real


class Scaled(DLRM):
    """A DLRM with a floating-point buffer."""

    def __init__(self) -> None:
        super().__init__(rows=(6, 5, 4))
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        return super().forward(dense * self.scale, ids, offsets)


def comparing(seen: set[Callable[..., Any]]) -> Callable[[_LockstepProgram, Sequence[tuple[Any, ...]]], list[Any]]:
    """Return an interpreter that compares every node of every rank with its metadata."""

    def run(program: _LockstepProgram, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        values: list[dict[fx.Node, Any]] = [{} for _ in args]
        agreements = [Agreement() for _ in args]
        for position, node in enumerate(program.gm.graph.nodes):
            given_ = [fx.map_arg((node.args, node.kwargs), lambda n, v=v: v[n]) for v in values]
            if node.op == "output":
                return [rank_args[0] for rank_args, _ in given_]
            if node.op == "placeholder":
                results = [rank_args[position] for rank_args in args]
            elif node.target in OPERATORS and OPERATORS[node.target].collective:
                results = program._collective(node.target, [rank_args for rank_args, _ in given_])
            else:
                results = [program._call(node, *g, e) for g, e in zip(given_, program._executions, strict=True)]
            if node.target in OPERATORS:
                seen.add(node.target)
            for rank, (agreement, result) in enumerate(zip(agreements, results, strict=True)):
                values[rank][node] = result
                if node.target is ops.lookup and given_[rank][0][1] is None:
                    assert result.shape == (0, 0)  # another rank owns the table
                    continue
                try:
                    agreement.check(node.meta["val"], result)
                except AssertionError as error:
                    raise AssertionError(f"{node.name} is recorded as {describe(node.meta['val'])}") from error
        raise AssertionError("a graph ends in its output")

    return run


def batches_of(model: DLRM, sizes: Sequence[int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [make_batch(model, size, generator) for size in sizes]


def test_every_fake_rule_agrees_with_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Scaled()
    seen: set[Callable[..., Any]] = set()
    monkeypatch.setattr(_LockstepProgram, "run", comparing(seen))
    batches = batches_of(model, [3, 2, 1, 4])
    fused = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager")
    alone = SimulatedWorld("1x1").run(model, batches[:1], dense_compiler="eager")
    monkeypatch.setattr(
        pipeline,
        "passes_in_order",
        lambda options, steps=pipeline.passes_in_order: tuple(s for s in steps(options) if s.name != "batch_lookups"),
    )
    unfused = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager", verify=False)
    assert seen == set(OPERATORS)
    expected = [model(*batch) for batch in batches]
    for outputs in (fused, unfused, [alone[0], *fused[1:]]):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------- headers

ROWS, LABELS = (6, 5), ("emb.0", "emb.1", "dense")


def headers(**columns: Sequence[int]) -> torch.Tensor:
    """Return headers of three ranks without a fault, but for the columns given."""
    table = torch.zeros(3, len(HEADER_FIELDS) + 2, dtype=torch.int64)
    for name, values in columns.items():
        table[:, HEADER_FIELDS.index(name)] = torch.tensor(values)
    return table


def test_equal_headers_pass() -> None:
    ex.check_headers(headers(fingerprint=[7, 7, 7], batch_size=[1, 2, 0], checksum=[9, 9, 9]), ROWS, LABELS)


@pytest.mark.parametrize(
    ("columns", "error", "text"),
    [
        (
            {"fingerprint": [7, 8, 7]},
            CollectiveError,
            r"exchange_headers: expected the same program on every rank, found another one than rank 0's on "
            r"ranks \[1\]; give every rank the same model, options, mode",
        ),
        (
            {"checksum": [9, 9, 8]},
            CollectiveError,
            "exchange_headers: expected equal dense parameters on every rank, found that they differ; .*clip_grad",
        ),
        (
            {"fault": [0, 0, checks.ID_RANGE], "feature": [0, 0, 1], "position": [0, 0, 4], "value": [0, 0, 5]},
            BatchError,
            r"check_batch: expected ids of table emb.1 in \[0, 5\), found 5 at position 4 of rank 2's batch; nothing",
        ),
        (
            {"fault": [0, checks.OFFSETS, 0], "position": [0, 2, 0], "value": [0, -3, 0]},
            BatchError,
            "expected offsets of table emb.0 that start at 0 and grow .*, found a bag of -3 ids at position 2",
        ),
        (
            {"fault": [checks.BATCH_SIZE, 0, 0], "feature": [2, 0, 0], "position": [4, 0, 0], "value": [3, 0, 0]},
            BatchError,
            "check_batch: expected 4 samples in every input, found 3 in dense of rank 0's batch",
        ),
        (
            {"fault": [0, checks.RAISED, 0]},
            BatchError,
            "expected every rank to reach its lookups, found an exception of rank 1's batch",
        ),
        (  # another program's numbers mean nothing: it is reported first
            {"fingerprint": [7, 8, 8], "fault": [0, 1, 0], "checksum": [0, 1, 0]},
            CollectiveError,
            r"on ranks \[1, 2\]",
        ),
        ({"fault": [0, 1, 0], "checksum": [0, 1, 0]}, BatchError, "of rank 1's batch"),
    ],
)
def test_what_a_header_reports_is_raised(columns: dict[str, list[int]], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ex.check_headers(headers(**columns), ROWS, LABELS)


# -------------------------------------------------------------------------------------------------------------- routes

TOPOLOGIES = ["1x1", "2x2", "4x2", "2x4", "3x2", "8x1", "1x4"]


@st.composite
def routes(draw: st.DrawFn) -> list[Route]:
    """Return the routes of all ranks for a random layout and random batches, zero samples and zero ids included."""
    topology = Topology.parse(draw(st.sampled_from(TOPOLOGIES)))
    world = topology.world_size
    features = draw(st.integers(1, 6))
    owners = tuple(draw(st.lists(st.integers(0, world - 1), min_size=features, max_size=features)))
    widths = tuple(draw(st.lists(st.integers(1, 5), min_size=features, max_size=features)))
    layout = make_layout(topology.hosts, topology.local_ranks, owners, widths)
    batch_sizes = tuple(draw(st.lists(st.integers(0, 4), min_size=world, max_size=world)))
    counts = [
        [draw(st.integers(0, 6)) if size else 0 for _ in range(features)] for size in batch_sizes
    ]  # ids by source rank and feature
    return [
        Route(
            layout,
            rank,
            batch_sizes,
            tuple(sum(counts[rank][f] for f in layout.features_by_rank[r]) for r in range(world)),
            tuple(tuple(counts[s][f] for f in layout.features_by_rank[rank]) for s in range(world)),
        )
        for rank in range(world)
    ]


@settings(max_examples=60)
@given(routes())
def test_what_one_rank_sends_is_what_the_other_expects(of_ranks: list[Route]) -> None:
    topology = of_ranks[0].layout.topology
    members = {
        "ids": lambda r: tuple(range(topology.world_size)),
        "intra": topology.intra_ranks,
        "peer": topology.peer_ranks,
    }
    for hop, group in members.items():
        for source in of_ranks:
            for position, target in enumerate(group(source.rank)):
                sent = source.sizes(hop)[0][position]
                expected = of_ranks[target].sizes(hop)[1][group(target).index(source.rank)]
                assert sent == expected, (hop, source.rank, target)
    for route in of_ranks:
        for hop in ("intra", "peer"):
            blocks = [route.block_rows(hop) * width for width in route.block_widths(hop)]
            assert blocks == route.sizes(hop)[1]
        assert sum(route.sizes("peer")[1]) == route.batch_size * sum(route.layout.widths)
    assert sorted(of_ranks[0].layout.column_order) == list(range(len(of_ranks[0].layout.owners)))


def flat_rows(route: Route) -> torch.Tensor:
    """Return what the flat model looks up for a rank: row = sample of all ranks, column = feature."""
    first = sum(route.batch_sizes[: route.rank])
    samples_B = torch.arange(first, first + route.batch_size)
    columns_W = torch.repeat_interleave(torch.arange(len(route.layout.owners)), torch.tensor(route.layout.widths))
    return samples_B[:, None] * 100 + columns_W[None, :]


def sptt(of_ranks: list[Route]) -> list[torch.Tensor]:
    """Return each rank's rows after steps (b) to (f), features in order."""
    layout, topology = of_ranks[0].layout, of_ranks[0].layout.topology
    everything_GW = torch.cat([flat_rows(route) for route in of_ranks])
    pooled = everything_GW.split(list(layout.widths), dim=1)
    values = [ex.peer_permute(ex.join_features(pooled, route), route) for route in of_ranks]
    for hop in ("intra", "peer"):
        sizes = [route.sizes(hop)[0] for route in of_ranks]
        transfer = _Transfer(topology, topology, hop, hop, sizes, Ledger())
        moved = transfer.move([value.reshape(-1) for value in values], sizes, "forward")
        values = [ex.join_blocks(received, route, hop) for received, route in zip(moved, of_ranks, strict=True)]
    return [torch.cat(ops.split_features(joined_BW, layout), dim=1) for joined_BW in values]


@settings(max_examples=40)
@given(routes())
def test_sptt_brings_every_row_home(of_ranks: list[Route]) -> None:
    for route, rows_BW in zip(of_ranks, sptt(of_ranks), strict=True):
        assert torch.equal(rows_BW, flat_rows(route))


@pytest.mark.parametrize(("hosts", "local_ranks"), [(2, 2), (4, 2), (2, 4), (3, 2)])
def test_the_printed_peer_order_holds_only_where_towers_equal_local_ranks(
    hosts: int, local_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 3.1's example: one feature a rank, two samples a rank, towers as hosts."""
    world = hosts * local_ranks
    layout = make_layout(hosts, local_ranks, tuple(range(world)), (1,) * world)
    of_ranks = [Route(layout, r, (2,) * world, (0,) * world, ((0,),) * world) for r in range(world)]

    def home() -> bool:
        return all(torch.equal(rows, flat_rows(route)) for route, rows in zip(of_ranks, sptt(of_ranks), strict=True))

    order = layout.topology.peer_order()
    assert order == tuple(h * local_ranks + local for local, h in itertools.product(range(local_ranks), range(hosts)))
    assert home()
    printed = tuple(sorted(range(world), key=lambda r: (r % hosts, r // local_ranks)))
    monkeypatch.setattr(Topology, "peer_order", lambda self: printed)
    assert home() == (hosts == local_ranks)
