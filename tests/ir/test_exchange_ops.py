"""The exchange operators: fake rules against what runs, headers, routes, and the order of the peers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from dmt_compile import pipeline, torch_internals
from dmt_compile.errors import BatchError, CollectiveError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, weight_ops
from dmt_compile.ir.metadata import describe
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.runtime import checks
from dmt_compile.runtime.averaging import Averaging
from dmt_compile.runtime.ledger import Ledger
from dmt_compile.runtime.route import AT_ONCE, HEADER_FIELDS, IdExchange, Layout, Route, make_layout
from dmt_compile.runtime.simulated_world import SimulatedWorld, _AllToAll, _LockstepProgram, _SimulatedRank, _Transfer
from dmt_compile.runtime.world import Execution, executing
from dmt_compile.topology import Topology
from tests._tolerances import assert_reordered
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
        elif isinstance(real, Averaging):
            assert recorded.reduction == real.reduction
        elif isinstance(real, int):
            self.size(recorded, real)
        elif isinstance(real, nn.Module):
            assert recorded is real
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


class Everything(DLRM):
    """A DLRM with a buffer, weighted bags, one id a bag, fixed bags and a sequence that stays unpooled."""

    def __init__(self) -> None:
        super().__init__(rows=(6, 5, 4))
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.importance = nn.Parameter(torch.rand(6))
        self.weighted = nn.EmbeddingBag(6, 8, mode="sum")
        self.one = nn.Embedding(3, 8, scale_grad_by_freq=True)
        self.even = nn.EmbeddingBag(3, 8)
        self.item = nn.Embedding(7, 8, padding_idx=0)
        self.ends = nn.EmbeddingBag(5, 8, include_last_offset=True)

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        one, pair = offsets[0] % 3, torch.stack([offsets[1] % 3, offsets[2] % 3], dim=1)
        looked_up = self.weighted(ids[0], offsets[0], per_sample_weights=self.importance[ids[0]])
        looked_up = looked_up + self.one(one) + self.even(pair) + torch.tanh(self.item(pair)).sum(1)
        ends = torch.cat([offsets[1], torch.ones_like(offsets[1][:1]) * len(ids[1])])
        looked_up = looked_up + self.ends(ids[1], ends)
        return super().forward(dense * self.scale, ids, offsets) + looked_up.sum(1)


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
                results = program._collective(node.target, [rank_args for rank_args, _ in given_], node.kwargs)
            else:
                results = [program._call(node, *g, e) for g, e in zip(given_, program._executions, strict=True)]
            if node.target in OPERATORS:
                seen.add(node.target)
            for rank, (agreement, result) in enumerate(zip(agreements, results, strict=True)):
                values[rank][node] = result
                if node.target is ops.lookup and given_[rank][0][1] is None:
                    assert result.shape == (0, 0)  # another rank owns the table
                    continue
                bucket = node.args[0] if node.target is operator.getitem else node
                travels = bucket.target in (gradient_ops.wait_gradients, gradient_ops.start_gradients)
                if travels and not values[rank][bucket.args[1]].member:
                    tensors = [result] if isinstance(result, torch.Tensor) else result
                    assert not any(tensor.requires_grad for tensor in tensors)  # another tower's ranks train them
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


IN_ROWS = [
    ["emb.0[0:2]", "emb.0[2:6]", "emb.1", "emb.2", "weighted[0:3]", "weighted[3:6]", "one"],
    ["even[0:1]", "even[1:3]", "item[0:3]", "item[3:7]", "ends[0:4]", "ends[4:5]"],
]


def test_every_fake_rule_agrees_with_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Everything()
    seen: set[Callable[..., Any]] = set()
    monkeypatch.setattr(_LockstepProgram, "run", comparing(seen))
    batches = batches_of(model, [3, 2, 1, 4])
    fused = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager")
    by_hosts = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager", id_exchange="hierarchical")
    alone = SimulatedWorld("1x1").run(model, batches[:1], dense_compiler="eager")
    towered = SimulatedWorld("2x2").run(
        DLRM(rows=(6, 5, 4)), batches, dense_compiler="eager", tower_module="dlrm", tower_module_options={"dim": 4}
    )
    assert [len(output) for output in towered] == [3, 2, 1, 4]
    pieces = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager", partition=IN_ROWS)
    pieces += SimulatedWorld("1x1").run(model, batches[:1], dense_compiler="eager", partition=IN_ROWS)
    monkeypatch.setattr(
        pipeline,
        "passes_in_order",
        lambda options, steps=pipeline.passes_in_order: tuple(s for s in steps(options) if s.name != "batch_lookups"),
    )
    unfused = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager", verify=False)
    resolved = {ops.tower_input, ops.tower_output}  # by lower_to_sptt
    assert seen == set(OPERATORS) - resolved
    expected = [model(*batch) for batch in batches]
    for outputs in (fused, by_hosts, unfused, [alone[0], *fused[1:]]):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for output, wanted in zip(pieces, [*expected, expected[0]], strict=True):
        assert_reordered(output, wanted, 8)


# ------------------------------------------------------------------------------------------------------------- headers

ROWS, LABELS = ((0, 6), (0, 5), (6, 9)), ("emb.0", "emb.1", "fields[6:9]", "dense")


def headers(**columns: Sequence[int]) -> torch.Tensor:
    """Return headers of three ranks without a fault, but for the columns given."""
    table = torch.zeros(3, len(HEADER_FIELDS) + 2, dtype=torch.int64)
    for name, values in columns.items():
        table[:, HEADER_FIELDS.index(name)] = torch.tensor(values)
    return table


def test_equal_headers_pass() -> None:
    id_ops.check_headers(headers(fingerprint=[7, 7, 7], batch_size=[1, 2, 0], checksum=[9, 9, 9]), ROWS, LABELS)


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
            {"fault": [checks.BATCH_SIZE, 0, 0], "feature": [3, 0, 0], "position": [4, 0, 0], "value": [3, 0, 0]},
            BatchError,
            "check_batch: expected 4 samples in every input, found 3 in dense of rank 0's batch",
        ),
        (
            {"fault": [0, checks.ID_RANGE, 0], "feature": [0, 2, 0], "position": [0, 1, 0], "value": [0, 5, 0]},
            BatchError,
            r"expected ids of table fields\[6:9\] in \[6, 9\), found 5 at position 1 of rank 1's batch",
        ),
        (
            {"fault": [0, 0, checks.WEIGHTS], "feature": [0, 0, 1], "position": [0, 0, 7], "value": [0, 0, 6]},
            BatchError,
            "expected one weight for each of 7 ids of table emb.1, found 6 of rank 2's batch; nothing was updated",
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
        id_ops.check_headers(headers(**columns), ROWS, LABELS)


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
    jagged, weighted = (tuple(draw(st.lists(st.booleans(), min_size=features, max_size=features))) for _ in range(2))
    spans = [k for k in (1, 2, 4) if topology.local_ranks % k == 0]  # hosts of a tower
    hosts = draw(st.sampled_from([0, *(topology.hosts * k for k in spans)]))  # 0: ids are exchanged at once
    exchange = IdExchange(hosts=hosts)
    layout = make_layout(topology.hosts, topology.local_ranks, owners, widths, jagged, weighted, (), exchange)
    batch_sizes = tuple(draw(st.lists(st.integers(0, 4), min_size=world, max_size=world)))
    counts = [
        [(draw(st.integers(0, 6)) if varies else 1) * (size > 0 if varies else size) for varies in jagged]
        for size in batch_sizes
    ]  # ids by source rank and feature
    return [
        Route(
            layout,
            rank,
            batch_sizes,
            tuple(tuple(counts[rank][f] for f in layout.features_by_rank[r]) for r in range(world)),
            tuple(tuple(counts[s][f] for f in layout.features_by_rank[rank]) for s in range(world)),
            forwarded_by(rank, layout, batch_sizes, counts) if hosts else {},
        )
        for rank in range(world)
    ]


def forwarded_by(
    rank: int, layout: Layout, batch_sizes: Sequence[int], counts: Sequence[Sequence[int]]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the elements that a rank forwards inside its host, by source and owner."""
    run = Topology(layout.exchange.hosts, layout.topology.world_size // layout.exchange.hosts)
    found: dict[str, list[tuple[int, ...]]] = {"ids": [], "weights": []}
    for source in (r for r in range(run.world_size) if r % run.local_ranks == rank % run.local_ranks):
        ids, weights = [], []
        for owner in (r for r in range(run.world_size) if r // run.local_ranks == rank // run.local_ranks):
            mine = [f for f, of in enumerate(layout.owners) if of == owner]
            ids.append(sum(counts[source][f] + layout.jagged[f] * batch_sizes[source] for f in mine))
            weights.append(sum(counts[source][f] for f in mine if layout.weighted[f]))
        found["ids"].append(tuple(ids))
        found["weights"].append(tuple(weights))
    return {what: tuple(rows) for what, rows in found.items()}


@settings(max_examples=60)
@given(routes())
def test_what_one_rank_sends_is_what_the_other_expects(of_ranks: list[Route]) -> None:
    topology, run = of_ranks[0].layout.topology, of_ranks[0].layout.run_topology
    members: dict[str, Callable[[int], tuple[int, ...]]] = {"intra": topology.intra_ranks, "peer": topology.peer_ranks}
    for what in ("ids", "weights"):
        members[what] = lambda r: tuple(range(topology.world_size))
        if of_ranks[0].layout.exchange.hosts:
            members |= {f"{what}_across": run.peer_ranks, f"{what}_host": run.intra_ranks}
    for hop, group in members.items():
        for source in of_ranks:
            for position, target in enumerate(group(source.rank)):
                sent = source.blocks(hop)[0][position]
                expected = of_ranks[target].blocks(hop)[1][group(target).index(source.rank)]
                assert sent == expected, (hop, source.rank, target)
    for route in of_ranks:
        assert {rows for rows, _ in route.blocks("peer")[1]} == {route.batch_size}
        assert sum(width for _, width in route.blocks("peer")[1]) == sum(route.layout.widths)
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
    if layout.exchange.hosts:  # what is looked up is in peer order already
        in_order = {route.rank: flat_rows(route) for route in of_ranks}
        everything_GW = torch.cat([in_order[rank] for rank in layout.sample_order])
        pooled = everything_GW.split(list(layout.widths), dim=1)
    values = [ex.join_features(pooled, route) for route in of_ranks]
    if not layout.exchange.hosts:
        values = [ex.peer_permute(joined, route) for joined, route in zip(values, of_ranks, strict=True)]
    for hop in ("intra", "peer"):
        transfer = _Transfer(topology, of_ranks, hop, hop, ("int64", "int64"), (torch.int64, torch.int64), Ledger())
        moved = transfer.move([value.reshape(-1) for value in values])
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
    layout = make_layout(hosts, local_ranks, tuple(range(world)), (1,) * world, (True,) * world, (False,) * world)
    of_ranks = [Route(layout, r, (2,) * world, ((0,),) * world, ((0,),) * world) for r in range(world)]

    def home() -> bool:
        return all(torch.equal(rows, flat_rows(route)) for route, rows in zip(of_ranks, sptt(of_ranks), strict=True))

    order = layout.topology.peer_order()
    assert order == tuple(h * local_ranks + local for local, h in itertools.product(range(local_ranks), range(hosts)))
    assert home()
    printed = tuple(sorted(range(world), key=lambda r: (r % hosts, r // local_ranks)))
    monkeypatch.setattr(Topology, "peer_order", lambda self: printed)
    assert home() == (hosts == local_ranks)


# -------------------------------------------------------------------------------------------- ids and weights to owners

HOW = (Pooling("sum", False), Pooling("none", False), Pooling("sum", False, last_offset=True), Pooling("mean", False))
OWNERS, JAGGED, WEIGHTED = (2, 0, 2, 0), (True, False, True, True), (True, False, True, False)
FIELDS = ((0, 9), (3, 7), (0, 5), (0, 4))


@dataclass
class RankBatch:
    """One rank's ids, offsets and weights, feature by feature; feature 2 has ids behind its last offset."""

    ids: list[torch.Tensor]
    offsets: list[torch.Tensor | None]
    weights: list[torch.Tensor | None]


def rank_batch(samples: int, generator: torch.Generator) -> RankBatch:
    batch = RankBatch([], [], [])
    for feature, ((first, end), jagged) in enumerate(zip(FIELDS, JAGGED, strict=True)):
        lengths = torch.randint(0, 3, (samples,), generator=generator) if jagged else torch.ones(samples).long()
        behind = 2 * (feature == 2)
        number = int(lengths.sum()) + behind
        batch.ids.append(torch.randint(first, end, (number,), generator=generator).int())
        starts = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).int()
        batch.offsets.append(None if not jagged else starts if HOW[feature].last_offset else starts[:-1])
        drawn = torch.rand(number, generator=generator)
        batch.weights.append(drawn.requires_grad_() if WEIGHTED[feature] else None)
    return batch


def executions(topology: Topology) -> list[Execution]:
    ranks = range(topology.world_size)
    return [Execution(cast(Any, _SimulatedRank(topology, rank, Ledger())), fingerprint=7) for rank in ranks]


def exchange_ids(
    layout: Layout, batches: list[RankBatch], ranks: list[Execution]
) -> tuple[list[Route], list[tuple[torch.Tensor | None, ...]]]:
    """Return each rank's route, and what it receives: ids and offsets of every feature.

    The layout's tower groups are its hosts.
    """
    packed, headers = [], []
    for batch, rank in zip(batches, ranks, strict=True):
        with executing(rank):
            payload, header = id_ops.pack_ids(layout, batch.ids, batch.offsets, HOW, batch.weights, [], FIELDS, True)
        packed.append(payload)
        headers.append(header)
    of_ranks = []
    for index, rank in enumerate(ranks):
        received = torch.stack([header[index] for header in headers])
        id_ops.check_headers(received, FIELDS, tuple("abcd"))
        with executing(rank):
            of_ranks.append(id_ops.route(layout, headers[index], received, 0))
    moved = to_owners(of_ranks, packed, "ids")
    return of_ranks, [id_ops.unpack_ids(received, route) for received, route in zip(moved, of_ranks, strict=True)]


def to_owners(of_ranks: list[Route], tensors: Sequence[torch.Tensor], what: str) -> list[torch.Tensor]:
    """Send every rank's ids or weights to the owners, at once or by way of hosts."""

    def move(hop: str, group: str, sent: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        form = str(sent[0].dtype).removeprefix("torch.")
        transfer = _Transfer(
            of_ranks[0].layout.topology, of_ranks, group, hop, (form, form), (sent[0].dtype, sent[0].dtype), Ledger()
        )
        return list(_AllToAll.apply(transfer, *sent))

    if not of_ranks[0].layout.exchange.hosts:
        return move(what, "world", tensors)
    moved = move(f"{what}_across", "across", tensors)
    regrouped = [id_ops.regroup_by_owner(part, route, what) for part, route in zip(moved, of_ranks, strict=True)]
    return move(f"{what}_host", "host", regrouped)


def test_bounds_are_shared_by_features_that_share_offsets_and_have_as_many_ids() -> None:
    offsets, other = torch.tensor([0, 2]), torch.tensor([0, 1])
    ids = [torch.zeros(3), torch.zeros(3), torch.zeros(4), torch.zeros(3)]
    plain, last = Pooling("sum", False), Pooling("sum", False, last_offset=True)
    how = [plain, plain, plain, last]
    bounds = checks.bag_bounds(ids, [offsets, offsets, offsets, other], how, range(4))
    assert [b.tolist() for b in bounds] == [[0, 2, 3], [0, 2, 3], [0, 2, 4], [0, 1]]
    assert bounds[0] is bounds[1]


@pytest.mark.parametrize("sizes", [(3, 0, 2, 4), (0, 0, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("exchange", [AT_ONCE, IdExchange("int32"), IdExchange("int64", 2), IdExchange("int32", 2)])
def test_owners_get_the_ids_and_offsets_of_the_global_batch(sizes: tuple[int, ...], exchange: IdExchange) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    layout = make_layout(2, 2, OWNERS, (4, 4, 2, 3), JAGGED, WEIGHTED, (), exchange)
    dtype = getattr(torch, exchange.dtype)
    batches = [rank_batch(size, generator) for size in sizes]
    of_ranks, unpacked = exchange_ids(layout, batches, executions(layout.topology))
    if exchange.hosts:
        batches = [batches[rank] for rank in (0, 2, 1, 3)]  # peer order
    for rank, (route, found) in enumerate(zip(of_ranks, unpacked, strict=True)):
        assert route.batch_sizes == sizes
        for feature, owner in enumerate(OWNERS):
            ids, offsets = found[2 * feature : 2 * feature + 2]
            if owner != rank:
                assert (ids, offsets) == (None, None)
                continue
            read = checks.trim(
                [b.ids[feature] for b in batches], [b.offsets[feature] for b in batches], [HOW[feature]] * 4
            )
            assert ids.dtype == dtype
            assert torch.equal(ids, torch.cat(read).to(dtype))
            assert (offsets is None) == (not JAGGED[feature])
            if offsets is not None:
                bounds = checks.bag_bounds(read, [b.offsets[feature] for b in batches], [HOW[feature]] * 4, range(4))
                lengths = torch.cat([part.diff() for part in bounds])
                assert torch.equal(offsets, (lengths.cumsum(0) - lengths).to(dtype))
                assert len(offsets) == sum(sizes)


def test_features_of_one_id_a_bag_send_their_ids_alone() -> None:
    layout = make_layout(1, 2, (0, 1, 1, 1), (4, 4, 2, 3), JAGGED, WEIGHTED)
    batches = [rank_batch(size, torch.Generator().manual_seed(size)) for size in (3, 2)]
    of_ranks, _ = exchange_ids(layout, batches, executions(layout.topology))
    jagged_ids = [len(batches[0].ids[2]) - 2, len(batches[0].ids[3])]
    sent = [rows * columns for rows, columns in of_ranks[0].blocks("ids")[0]]
    assert sent == [3 + len(batches[0].ids[0]), 3 + (3 + jagged_ids[0]) + (3 + jagged_ids[1])]
    assert of_ranks[0].blocks("weights")[0] == [(len(batches[0].ids[0]), 1), (jagged_ids[0], 1)]


@pytest.mark.parametrize("exchange", [AT_ONCE, IdExchange("int32", 2)])
def test_weights_go_with_their_ids_and_gradients_come_back(exchange: IdExchange) -> None:
    generator = torch.Generator().manual_seed(1)
    layout = make_layout(2, 2, OWNERS, (4, 4, 2, 3), JAGGED, WEIGHTED, (), exchange)
    batches = [rank_batch(size, generator) for size in (3, 0, 2, 4)]
    of_ranks, _ = exchange_ids(layout, batches, executions(layout.topology))
    packed = []
    for batch, route in zip(batches, of_ranks, strict=True):
        weighted = [feature for feature in range(4) if WEIGHTED[feature]]
        columns = ([getattr(batch, name)[f] for f in weighted] for name in ("weights", "offsets"))
        packed.append(weight_ops.pack_weights(*columns, tuple(HOW[f] for f in weighted), route))
    moved = to_owners(of_ranks, packed, "weights")
    found = [weight_ops.unpack_weights(received, route) for received, route in zip(moved, of_ranks, strict=True)]
    assert [[column is None for column in columns] for columns in found] == [[False, True, False, True]] * 4
    for columns in (found[0], found[1], found[3]):  # nothing to read here, but all ranks send gradients back
        assert all(len(column) == 0 and column.requires_grad for column in (columns[0], columns[2]))
    if exchange.hosts:
        batches = [batches[rank] for rank in (0, 2, 1, 3)]
    for feature in (0, 2):
        read = checks.trim(
            [b.weights[feature] for b in batches], [b.offsets[feature] for b in batches], [HOW[feature]] * 4
        )
        assert torch.equal(found[2][feature], torch.cat(read))
        scale = torch.arange(1.0, 1 + len(found[2][feature]))
        gradients = torch.autograd.grad(
            (found[2][feature] * scale).sum(), [b.weights[feature] for b in batches], retain_graph=True
        )
        parts = scale.split([len(part) for part in read])
        for gradient, part in zip(gradients, parts, strict=True):
            assert torch.equal(gradient[: len(part)], part)
            assert not gradient[len(part) :].any()  # behind the last offset


def test_a_fault_rides_in_the_header_with_no_payload() -> None:
    layout = make_layout(1, 2, (0, 1, 1, 1), (4, 4, 2, 3), JAGGED, WEIGHTED)
    batch = rank_batch(3, torch.Generator().manual_seed(0))
    batch.ids[1][2] = 7
    rank = executions(layout.topology)[0]
    with executing(rank):
        payload, header = id_ops.pack_ids(layout, batch.ids, batch.offsets, HOW, batch.weights, [], FIELDS, True)
    assert len(payload) == 0
    words = dict(zip(HEADER_FIELDS, header[1].tolist(), strict=False))
    assert (words.pop("fault"), words.pop("feature"), words.pop("position"), words.pop("value")) == (1, 1, 2, 7)
    assert words == {"fingerprint": 7, "batch_size": 3, "checksum": 0}
    with pytest.raises(
        BatchError, match=r"expected ids of table b in \[3, 7\), found 7 at position 2 of rank 0's batch"
    ):
        id_ops.check_headers(header, FIELDS, tuple("abcd"))


def packed_by(batch: RankBatch, check_ids: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    layout = make_layout(1, 2, (0, 1, 1, 1), (4, 4, 2, 3), JAGGED, WEIGHTED, (), IdExchange("int32"))
    with executing(executions(layout.topology)[0]):
        return id_ops.pack_ids(layout, batch.ids, batch.offsets, HOW, batch.weights, [], FIELDS, check_ids)


def test_more_ids_than_int32_counts_are_a_fault_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_ops, "MOST_INT32", 4)
    batch = rank_batch(3, torch.Generator().manual_seed(0))
    batch.ids[2] = torch.zeros(5, dtype=torch.int32)
    batch.weights[2] = torch.zeros(5)
    payload, header = packed_by(batch)
    assert (len(payload), payload.dtype) == (0, torch.int32)
    with pytest.raises(BatchError, match="at most 4 ids of table c in one batch, found 5 of rank 0's batch; nothing"):
        id_ops.check_headers(header, FIELDS, tuple("abcd"))


def test_what_nothing_checked_stays_out_of_range_as_int32() -> None:
    batch = rank_batch(3, torch.Generator().manual_seed(0))
    batch.ids[1] = torch.tensor([2**32 + 5, 4, -(2**40)])  # cut off, the first would be a row
    payload, _ = packed_by(batch, check_ids=False)
    first = 3 + len(batch.ids[0]) + 3 + 3  # behind feature 0, and the lengths of features 2 and 3
    assert payload[first : first + 3].tolist() == [2**31 - 1, 4, -1]


def test_ids_of_all_ranks_beyond_int32_are_looked_up_as_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_ops, "MOST_INT32", 6)
    monkeypatch.setattr(id_ops, "_too_many", lambda *args: None)  # each rank's own ids are few enough
    layout = make_layout(1, 2, (0, 1, 1, 1), (4, 4, 2, 3), JAGGED, WEIGHTED, (), IdExchange("int32"))
    batches = [rank_batch(4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    _, unpacked = exchange_ids(layout, batches, executions(layout.topology))
    ids, offsets = unpacked[1][4:6]
    assert ids is not None
    assert offsets is not None
    assert {ids.dtype, offsets.dtype} == {torch.int64 if len(ids) > 6 else torch.int32}
    assert unpacked[1][2].dtype == torch.int64  # type: ignore[union-attr]  # 8 ids


def test_even_bags_send_no_lengths_though_ranks_differ() -> None:
    layout = make_layout(1, 2, (1,), (4,), (False,), (False,), (), IdExchange("int32", 0, (True,)))
    ranks, packed, headers = executions(layout.topology), [], []
    shapes = [(2, 3), (4, 1)]  # samples, ids of each
    for rank, (samples, length) in zip(ranks, shapes, strict=True):
        ids_BL = torch.arange(samples * length).view(samples, length)
        offsets = ops.even_offsets(ids_BL)
        with executing(rank):
            payload, header = id_ops.pack_ids(
                layout, [ids_BL.view(-1)], [offsets], HOW[:1], [None], [], ((0, 9),), True
            )
        packed.append(payload)
        headers.append(header)
    assert [payload.tolist() for payload in packed] == [list(range(6)), list(range(4))]
    with executing(ranks[1]):
        route = id_ops.route(layout, headers[1], torch.stack([header[1] for header in headers]), 4)
    ids, offsets = id_ops.unpack_ids(torch.cat(packed), route)
    assert offsets is not None
    assert offsets.tolist() == [0, 3, 6, 7, 8, 9]
    assert ids is not None
    assert ids.tolist() == [*range(6), *range(4)]


# -------------------------------------------------------------------------------------------------- faults of one batch

Change = Callable[[RankBatch], list[torch.Tensor]]  # changes a batch and returns its other inputs


def of_samples(batch: RankBatch) -> list[torch.Tensor]:
    return [torch.ones(2)]


def shorter(batch: RankBatch) -> list[torch.Tensor]:
    batch.ids[1] = batch.ids[1][:2]
    return []


def fewer_weights(batch: RankBatch) -> list[torch.Tensor]:
    batch.weights[2] = batch.weights[2][:-1]
    return []


def below_its_field(batch: RankBatch) -> list[torch.Tensor]:
    batch.ids[1][1] = 2
    return []


def ends_beyond_the_ids(batch: RankBatch) -> list[torch.Tensor]:
    batch.offsets[2][-1] = 9
    return []


def ends_before_its_start(batch: RankBatch) -> list[torch.Tensor]:
    batch.offsets[2][-1] = -1
    return []


def starts_late(batch: RankBatch) -> list[torch.Tensor]:
    batch.offsets[0][0] = 1
    return []


@pytest.mark.parametrize(
    ("change", "fault", "text"),
    [
        (of_samples, (checks.BATCH_SIZE, 4, 3, 2), "expected 3 samples in every input, found 2 in dense"),
        (shorter, (checks.BATCH_SIZE, 1, 3, 2), "expected 3 samples in every input, found 2 in b"),
        (fewer_weights, (checks.WEIGHTS, 2, 5, 4), "expected one weight for each of 5 ids of table c, found 4"),
        (below_its_field, (checks.ID_RANGE, 1, 1, 2), r"expected ids of table b in \[3, 7\), found 2 at position 1"),
        (
            ends_beyond_the_ids,
            (checks.OFFSETS, 2, 2, 7),
            "at most the number of ids, found a bag of 7 ids at position 2",
        ),
        (
            ends_before_its_start,
            (checks.OFFSETS, 2, 2, -3),
            "offsets of table c .*, found a bag of -3 ids at position 2",
        ),
        (starts_late, (checks.OFFSETS, 0, 0, 0), "offsets of table a that start at 0"),
    ],
)
def test_each_fault_of_a_batch_is_found(change: Change, fault: tuple[int, ...], text: str) -> None:
    batch = RankBatch(
        [torch.tensor([8, 0, 1]), torch.tensor([3, 6, 4]), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([3])],
        [torch.tensor([0, 1, 1]), None, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1])],
        [torch.ones(3), None, torch.ones(5), None],
    )
    arguments = batch.ids, batch.offsets, HOW, batch.weights
    assert checks.find_fault(*arguments, [torch.ones(3)], FIELDS, True) is None
    others = change(batch)
    found = checks.find_fault(*arguments, others, FIELDS, True)
    assert found == checks.Fault(*fault)
    with pytest.raises(BatchError, match=text):
        ops.check_batch(batch.ids, batch.offsets, HOW, batch.weights, others, FIELDS, (*"abcd", "dense"), True)
    looked_at = found.kind in (checks.BATCH_SIZE, checks.WEIGHTS)  # sizes cost nothing, ids a pass
    assert (checks.find_fault(*arguments, others, FIELDS, False) is None) != looked_at


@pytest.mark.parametrize("end", [0, 2])
def test_an_empty_batch_has_no_ids(end: int) -> None:
    ids, offsets = [torch.arange(2)[:end], torch.arange(0)], [torch.arange(0), None]
    how = Pooling("sum", False), Pooling("none", False)
    found = checks.find_fault(ids, offsets, how, [None, None], [], FIELDS[:2], True)
    assert found == (checks.Fault(checks.OFFSETS, 0, 0, 2) if end else None)


def test_a_check_gives_ids_and_starts_without_what_lies_behind_the_last_bag() -> None:
    ids, offsets = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])], [torch.tensor([0, 1, 2]), None]
    how = Pooling("sum", False, last_offset=True), Pooling("none", False)
    out = ops.check_batch(ids, offsets, how, [None, None], [], ((0, 9), (0, 9)), ("a", "b"), True)
    assert [None if value is None else value.tolist() for value in out] == [[1, 2], [4, 5], [0, 1], None]
    table = torch.arange(18.0).view(9, 2)
    assert torch.equal(ops.lookup(table, ids[0], offsets[0], None, how[0]), table[[1, 2]])


def test_scaling_by_frequency_is_that_of_a_lookup() -> None:
    table = torch.randn(6, 3, requires_grad=True)
    ids, weights = torch.tensor([1, 4, 1, 1, 0]), torch.arange(15.0).view(5, 3)
    rows = gradient_ops.scale_by_frequency(nn.functional.embedding(ids, table), ids)
    assert torch.equal(rows, table[ids])
    (mine,) = torch.autograd.grad((rows * weights).sum(), [table])
    expected = nn.functional.embedding(ids, table, scale_grad_by_freq=True)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), [table])
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(mine[1], (weights[0] + weights[2] + weights[3]) / 3)


# ------------------------------------------------------------------------------------------------------ Tower Modules


def run_two_towers(rank: int, shared: torch.Tensor, own: torch.Tensor, joined_PW: torch.Tensor) -> torch.Tensor:
    """Run the towers of one rank of 2x1: both multiply by ``shared``, the second one by ``own`` too."""
    layout = make_layout(2, 1, (0, 0, 1), (2, 1, 3), (True,) * 3, (False,) * 3, (3, 3))
    route = Route(layout, rank, (2, 3), ((0, 0), (0,)), ((0,), (0,)))
    towers = (
        ex.TowerRun(0, (0,), 0, "float64", 2),
        ex.TowerRun(0, (1,), -1, "", 1),
        ex.TowerRun(1, (2,), 1, "float32", 3),
    )
    regions = [lambda embs, p: (embs * p,), lambda embs, p, q: (embs * p * q,)]
    return ex.run_towers(joined_PW, route, towers, regions, [(shared,), (shared, own)])


def test_towers_run_in_their_own_group_on_their_own_columns() -> None:
    shared, own = torch.tensor(2.0), torch.tensor(5.0)
    joined_PW = torch.arange(15.0).view(5, 3)
    first = run_two_towers(0, shared, own, joined_PW)
    assert first.dtype == torch.float32  # as on the wire, whatever the module computes in
    assert torch.equal(first, torch.cat([joined_PW[:, :2] * 2, joined_PW[:, 2:]], dim=1))
    assert torch.equal(run_two_towers(1, shared, own, joined_PW), joined_PW * 10)


def test_a_parameter_of_another_group_s_tower_takes_part_in_the_backward_pass() -> None:
    """All ranks average a parameter that several groups read: a rank that does not use it must not stay away."""
    shared, own = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    joined_PW = torch.arange(15.0).view(5, 3).requires_grad_()
    run_two_towers(0, shared, own, joined_PW).sum().backward()
    assert own.grad == 0
    assert shared.grad == joined_PW[:, :2].sum()
    assert joined_PW.grad is not None
    assert torch.equal(joined_PW.grad[0], torch.tensor([2.0, 2.0, 1.0]))
    without = run_two_towers(0, shared, own.detach(), joined_PW)
    without.sum().backward()
    assert own.grad == 0
