from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dmt_compile
from dmt_compile import SimulatedWorld
from dmt_compile.cost.id_exchange import id_exchange_of
from dmt_compile.cost.traffic import Hop, bytes_per_link, embedding_traffic, message_counts
from dmt_compile.errors import PlanError
from dmt_compile.partition.assign import make_plan
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.table_names import parameter_of, rows_of
from dmt_compile.topology import Topology
from tests.models import DLRM, make_batch

MIB = 2**20


def random_plan(seed: int, number: int, hosts: int, local_ranks: int, towers: int) -> TowerPlan:
    rng = np.random.default_rng(seed)
    tables = [
        TableSpec(
            name=f"emb.{i}",
            rows=int(rng.integers(1, 500)),
            dim=int(rng.choice([2, 4, 8])),
            dtype=str(rng.choice(["float32", "bfloat16"])),
            features=int(rng.choice([1, 2])),
            pooling=float(rng.integers(0, 4)),
            bags=float(rng.integers(1, 4)),
            jagged=float(rng.integers(0, 2)),
            weighted=float(rng.integers(0, 2)),
        )
        for i in range(number)
    ]
    return make_plan(tables, Topology(hosts, local_ranks), towers=towers)


def enumerate_transfers(
    plan: TowerPlan, batch_sizes: list[int], id_exchange: str = "global"
) -> dict[str, dict[str, int]]:
    """Carry every sample's ids and pooled rows from rank to rank, one by one, and add up what crosses a link."""
    topology = plan.topology
    members = {host: sorted(t.hosts) for t in plan.towers for host in t.hosts}
    ranks_of_group = {
        host: [r for r in range(topology.world_size) if topology.host_of(r) in hosts] for host, hosts in members.items()
    }
    totals: dict[str, dict[str, int]] = {form: {"intra": 0, "cross": 0} for form in ("flat", "sptt")}

    def send(forms: tuple[str, ...], source: int, target: int, sent: int) -> None:
        if source != target:
            link = "intra" if topology.host_of(source) == topology.host_of(target) else "cross"
            for form in forms:
                totals[form][link] += sent

    def position(rank: int) -> int:
        return ranks_of_group[topology.host_of(rank)].index(rank)

    def send_id(rank: int, owner: int, sent: int) -> None:
        send(("flat",), rank, owner, sent)
        on_owners_host = topology.host_of(owner) * topology.local_ranks + rank % topology.local_ranks
        for path in pairwise((rank, on_owners_host, owner) if id_exchange == "hierarchical" else (rank, owner)):
            send(("sptt",), *path, sent)

    for table in plan.tables:
        owner = plan.owner(table.name)
        for rank, batch_size in enumerate(batch_sizes):
            for _ in range(batch_size):
                for _ in range(table.features * int(table.bags)):
                    send_id(rank, owner, 4 * int(table.jagged))  # how many ids
                    for _ in range(int(table.pooling)):
                        send_id(rank, owner, 4 + int(table.weighted) * table.element_bytes)
                row = table.features * int(table.bags) * table.dim * table.element_bytes
                send(("flat",), owner, rank, row)
                send(("flat",), rank, owner, row)
                # The owner's group gathers the row at the peer of the sample's rank, which then sends it there.
                peer = ranks_of_group[topology.host_of(owner)][position(rank)]
                for path in ((owner, peer), (peer, rank), (rank, peer), (peer, owner)):
                    send(("sptt",), *path, row)
    return totals


@given(
    seed=st.integers(0, 1000),
    number=st.integers(0, 8),
    shape=st.sampled_from([(1, 1, 1), (1, 3, 2), (2, 2, 2), (3, 2, 3), (2, 3, 4), (4, 2, 2), (4, 1, 2), (4, 2, 1)]),
    data=st.data(),
)
def test_bytes_equal_an_enumeration_of_all_transfers(
    seed: int, number: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    plan = random_plan(seed, number, *shape)
    ranks = plan.topology.world_size
    batch_sizes = data.draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks))
    assert embedding_traffic(plan, batch_sizes).bytes_per_link() == enumerate_transfers(plan, batch_sizes)
    assert bytes_per_link(plan, 3) == enumerate_transfers(plan, [3] * ranks)
    by_hosts = embedding_traffic(plan, batch_sizes, id_exchange="hierarchical").bytes_per_link()
    assert by_hosts == enumerate_transfers(plan, batch_sizes, "hierarchical")
    assert by_hosts["sptt"]["cross"] == enumerate_transfers(plan, batch_sizes)["sptt"]["cross"]  # each id crosses once


@pytest.mark.parametrize(("hosts", "local_ranks"), [(2, 2), (4, 8), (8, 2), (3, 4)])
def test_even_tables_give_the_formulas_of_the_paper(hosts: int, local_ranks: int) -> None:
    ranks, batch_size, dim = hosts * local_ranks, 64, 16
    tables = [TableSpec(f"emb.{i}", 100, dim) for i in range(2 * ranks)]
    plan = make_plan(tables, Topology(hosts, local_ranks))
    traffic = embedding_traffic(plan, [batch_size] * ranks)
    per_rank = batch_size * len(tables) * dim * 4  # M of the paper
    flat = {hop.direction: hop for hop in traffic.flat if hop.name == "flat embeddings"}
    in_host = {hop.direction: hop for hop in traffic.sptt if hop.name == "in-host embeddings"}
    peer = {hop.direction: hop for hop in traffic.sptt if hop.name == "peer embeddings"}
    for direction in ("forward", "backward"):
        assert flat[direction].cross_bytes == ranks * per_rank * (hosts - 1) / hosts
        assert flat[direction].intra_bytes == ranks * per_rank * (local_ranks - 1) / ranks
        assert flat[direction].largest_rank_bytes == per_rank * (ranks - 1) / ranks
        assert in_host[direction].intra_bytes == ranks * per_rank * (local_ranks - 1) / local_ranks
        assert in_host[direction].cross_bytes == 0
        assert peer[direction].cross_bytes == ranks * per_rank * (hosts - 1) / hosts
        assert peer[direction].intra_bytes == 0
    assert traffic.flat[0] == traffic.sptt[0]
    assert message_counts(plan) == {
        "flat": {"intra": local_ranks - 1, "cross": ranks - local_ranks},
        "sptt": {"intra": local_ranks - 1, "cross": hosts - 1},
    }


def test_the_paper_s_worked_example() -> None:
    plan = make_plan([TableSpec(f"emb.{i}", 100, 128) for i in range(26)], Topology(8, 8))
    traffic = embedding_traffic(plan, [16384] * 64)
    assert traffic.flat[1].cross_bytes / 64 == 182 * MIB
    assert (traffic.sptt[1].cross_bytes, traffic.sptt[3].cross_bytes / 64) == (0, 182 * MIB)


def test_towers_over_several_hosts_cross_hosts_twice_in_fewer_messages() -> None:
    plan = make_plan([TableSpec(f"emb.{i}", 100, 8) for i in range(8)], Topology(4, 2), towers=2)
    assert message_counts(plan)["sptt"] == {"intra": 1, "cross": 2 + 1}
    in_host = embedding_traffic(plan, [10] * 8).sptt[1]
    assert in_host.name == "in-host embeddings"
    # 8 tables of 32 bytes, 2 groups x 10 samples for each of 3 other ranks, 2 of them on the tower's other host
    assert (in_host.intra_bytes, in_host.cross_bytes) == (8 * 32 * 20, 8 * 32 * 20 * 2)


def test_gradients_mirror_embeddings() -> None:
    plan = random_plan(3, 7, 2, 3, 2)
    hops: dict[str, dict[str, Hop]] = defaultdict(dict)
    traffic = embedding_traffic(plan, [1, 2, 3, 4, 5, 6])
    for hop in (*traffic.flat, *traffic.sptt):
        hops[hop.name][hop.direction] = hop
    assert hops.keys() == {"ids", "flat embeddings", "in-host embeddings", "peer embeddings"}
    assert hops.pop("ids").keys() == {"forward"}
    for both in hops.values():
        assert both["forward"].intra_bytes == both["backward"].intra_bytes
        assert both["forward"].cross_bytes == both["backward"].cross_bytes


def test_the_busiest_rank_is_the_owner_forward_and_the_largest_batch_backward() -> None:
    plan = make_plan([TableSpec("emb.0", 10, 4)], Topology(1, 3))
    forward, backward = embedding_traffic(plan, [1, 2, 5]).flat[1:]
    assert plan.owner("emb.0") == 0
    assert (forward.largest_rank_bytes, backward.largest_rank_bytes) == (16 * 7, 16 * 5)


def test_counted_ids_replace_the_mean_pooling() -> None:
    plan = make_plan([TableSpec("emb.0", 10, 4, features=2, pooling=100.0)], Topology(1, 2))
    ids = embedding_traffic(plan, [3, 5], id_counts={"emb.0": [7, 11]}).flat[0]
    assert (ids.intra_bytes, ids.cross_bytes) == (4 * 11 + 4 * 2 * 5, 0)


def test_counted_ids_come_with_the_lengths_of_jagged_bags_alone_and_with_weights() -> None:
    one = TableSpec("emb.0", 10, 4, features=2, bags=3.0, jagged=0.0)
    plan = make_plan([one], Topology(1, 2))
    assert embedding_traffic(plan, [3, 5], id_counts={"emb.0": [18, 30]}).flat[0].intra_bytes == 4 * 30
    weighted = TableSpec("emb.0", 10, 4, pooling=2.0, weighted=1.0)
    plan = make_plan([weighted], Topology(1, 2))
    assert embedding_traffic(plan, [3, 5], id_counts={"emb.0": [7, 11]}).flat[0].intra_bytes == 4 * (11 + 5) + 4 * 11


def test_a_table_s_bags_lengths_and_weights() -> None:
    spec = TableSpec("emb.0", 10, 4, "bfloat16", features=2, pooling=3.0, bags=5.0, jagged=0.5, weighted=1.0)
    assert spec.output_bytes_per_sample == 2 * 5 * 4 * 2
    assert spec.id_bytes_per_sample == 2 * 5 * (4 * 3 + 4 * 0.5 + 2 * 3)
    plain = TableSpec("emb.0", 10, 4)
    assert (plain.output_bytes_per_sample, plain.id_bytes_per_sample) == (16, 8)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("emb", 2**31 - 1, 4),
        ("emb", 2**31, 8),
        ("emb[2147483640:2147483648]", 8, 8),
        ("emb[7:2147483647]", 2**31 - 8, 4),
    ],
)
def test_ids_are_as_wide_as_the_rows_of_their_table_s_parameter_ask(name: str, rows: int, expected: int) -> None:
    table = TableSpec(name, rows, 4)
    assert table.id_bytes == expected
    assert table.id_bytes_per_sample == 2 * expected
    plan = make_plan([table, TableSpec("small", 5, 4)], Topology(1, 2))
    assert plan.id_bytes == expected  # one type for all
    [ids] = [hop for hop in embedding_traffic(plan, [1, 1]).sptt if hop.name == "ids"]
    assert ids.intra_bytes == 2 * 2 * expected


class Lookups(nn.Module):
    """Weighted bags, plain bags, one id a sample, a sequence that is pooled and one that stays unpooled."""

    def __init__(self) -> None:
        super().__init__()
        self.weighted = nn.EmbeddingBag(11, 4, mode="sum")
        self.plain = nn.EmbeddingBag(7, 2, mode="sum")
        self.one = nn.Embedding(5, 3)
        self.pooled = nn.Embedding(9, 6)
        self.unpooled = nn.Embedding(8, 5)

    def forward(
        self, bags: torch.Tensor, weights: torch.Tensor, one: torch.Tensor, pooled: torch.Tensor, unpooled: torch.Tensor
    ) -> torch.Tensor:
        pooled_rows = self.weighted(bags, per_sample_weights=weights), self.plain(bags % 7), self.pooled(pooled).sum(1)
        rows = torch.tanh(self.unpooled(unpooled)).sum(1)
        return sum(part.sum(1) for part in (*pooled_rows, self.one(one), rows))


def lookups_batch(samples: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    def draw(rows: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, rows, (samples, *shape), generator=generator)

    return draw(11, 3), torch.rand(samples, 3, generator=generator), draw(5), draw(9, 4), draw(8, 2)


@pytest.mark.parametrize("id_exchange", ["global", "hierarchical"])
@pytest.mark.parametrize(("topology", "towers"), [("2x2", 2), ("1x3", 1), ("2x2", 1)])
def test_the_model_of_traffic_is_what_the_program_sends(topology: str, towers: int, id_exchange: str) -> None:
    torch.manual_seed(0)
    model, world = Lookups(), SimulatedWorld(topology)
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 1, 4, 2][: world.topology.world_size]
    batches = [lookups_batch(size, generator) for size in sizes]
    plan = dmt_compile.plan(model, batches[0], topology, towers=towers)
    specs = {table.name: (table.pooling, table.bags, table.jagged, table.weighted) for table in plan.tables}
    assert specs == {
        "weighted": (3.0, 1.0, 0.0, 1.0),
        "plain": (3.0, 1.0, 0.0, 0.0),
        "one": (1.0, 1.0, 0.0, 0.0),
        "pooled": (4.0, 1.0, 0.0, 0.0),
        "unpooled": (1.0, 2.0, 0.0, 0.0),
    }
    outputs = world.run(model, batches, dense_compiler="eager", plan=plan, id_exchange=id_exchange)
    sum(output.sum() for output in outputs).backward()
    sent: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"intra": 0, "cross": 0})
    hops = {"ids": "ids", "weights": "ids", "intra": "in-host embeddings", "peer": "peer embeddings"}
    hops |= {f"{what}_across": "ids across hosts" for what in ("ids", "weights")}
    hops |= {f"{what}_host": "ids in hosts" for what in ("ids", "weights")}
    for (collective, direction, link), sent_bytes in world.ledger.records.items():
        if collective in hops:
            sent[hops[collective], direction][link] += sent_bytes
    way = id_exchange_of(id_exchange, plan)
    expected = {(hop.name, hop.direction): hop for hop in embedding_traffic(plan, sizes, id_exchange=way).sptt}
    assert sent.keys() <= expected.keys()
    assert any(name == "ids across hosts" for name, _ in sent) == (way == "hierarchical")
    for key, hop in expected.items():
        assert sent[key] == {"intra": hop.intra_bytes, "cross": hop.cross_bytes}, key
    assert sum(sum(links.values()) for (name, _), links in sent.items() if name.startswith("ids")) > 0


@pytest.mark.parametrize("forms", [("bfloat16", None), ("float8", "float16"), ("int8", "int8")])
def test_narrower_forms_are_counted_as_they_are_sent(forms: tuple[str, str | None]) -> None:
    torch.manual_seed(0)
    model, world, generator = DLRM(), SimulatedWorld("2x2"), torch.Generator().manual_seed(0)
    sizes = [3, 0, 4, 2]
    batches = [make_batch(model, size, generator) for size in sizes]
    plan = dmt_compile.plan(model, batches[0], "2x2")
    comm_dtype = {"peer": tuple(form or "float32" for form in forms), "intra": "float16"}
    torch.cat(world.run(model, batches, dense_compiler="eager", plan=plan, comm_dtype=comm_dtype)).sum().backward()
    traffic = embedding_traffic(plan, sizes, forms={"peer": forms, "intra": ("float16", "float16")})
    found = {"intra": "in-host embeddings", "peer": "peer embeddings"}
    for hop in traffic.sptt:
        for name in (name for name, long in found.items() if long == hop.name):
            sent = [world.ledger.records.get((name, hop.direction, link), 0) for link in ("intra", "cross")]
            assert sent == [hop.intra_bytes, hop.cross_bytes], hop
            assert sum(sent) > 0


PIECES = [
    ["weighted[0:2]", "weighted[2:11]", "one[0:3, 0:1]", "one[3:5, 0:1]", "one[:, 1:3]"],
    ["plain", "unpooled[0:5]", "unpooled[5:8]", "pooled[:, 0:2]", "pooled[0:2, 2:6]", "pooled[2:9, 2:6]"],
]


@pytest.mark.parametrize(
    ("topology", "partition"), [("2x2", PIECES), ("1x3", [[n for names in PIECES for n in names]])]
)
def test_pieces_send_what_the_model_of_traffic_says(topology: str, partition: list[list[str]]) -> None:
    torch.manual_seed(0)
    model, world = Lookups(), SimulatedWorld(topology)
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 1, 4, 2][: world.topology.world_size]
    batches = [lookups_batch(size, generator) for size in sizes]
    plan = dmt_compile.plan(model, batches[0], topology, partition=partition)
    read = {"weighted": 0, "plain": 0, "one": 2, "pooled": 3, "unpooled": 4}
    counts = {}
    for table in plan.tables:
        ids = [batch[read[parameter_of(table.name).parameter]] for batch in batches]
        first, end = rows_of(table.name) or (0, 100)
        counts[table.name] = [int(((i >= first) & (i < end)).sum()) for i in ids]
    sum(output.sum() for output in world.run(model, batches, dense_compiler="eager", plan=plan)).backward()
    hops = {"ids": "ids", "weights": "ids", "intra": "in-host embeddings", "peer": "peer embeddings"}
    sent: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"intra": 0, "cross": 0})
    for (collective, direction, link), sent_bytes in world.ledger.records.items():
        if collective in hops:
            sent[hops[collective], direction][link] += sent_bytes
    for hop in embedding_traffic(plan, sizes, counts).sptt:
        assert sent[hop.name, hop.direction] == {"intra": hop.intra_bytes, "cross": hop.cross_bytes}, hop


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("2x2", {"tower_module": "dlrm", "tower_module_options": {"dim": 4}}),
        ("4x1", {"tower_module": "dcn", "towers": 2}),
        ("2x2", {"tower_module": "dot", "tower_module_options": {"dim": 4}, "towers": 4}),
    ],
)
def test_tower_modules_send_what_the_plan_says(topology: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, world = DLRM(), SimulatedWorld(topology)
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 1, 4, 2]
    batches = [make_batch(model, size, generator) for size in sizes]
    plan = dmt_compile.plan(model, batches[0], topology, **options)
    outputs = world.run(model, batches, dense_compiler="eager", **options)
    sum(output.sum() for output in outputs).backward()
    traffic = embedding_traffic(plan, sizes)
    peer = [hop for hop in traffic.sptt_tm if hop.name == "peer tower outputs"]
    sent = [world.ledger.records["peer", hop.direction, "cross"] for hop in peer]
    assert sent == [hop.cross_bytes for hop in peer]
    flat = next(hop for hop in traffic.sptt if hop.name == "peer embeddings")
    assert 0 < sent[0] < flat.cross_bytes
    assert traffic.bytes_per_link().keys() == {"flat", "sptt", "sptt+tm"}
    explained = dmt_compile.explain(model, batches[0], topology, **options)
    assert explained.bytes_per_link["sptt+tm"] == bytes_per_link(explained.plan, sizes[0])["sptt+tm"]
    # Tower Modules' gradients stay among their tower's ranks: with one tower a host, inside it.
    across = world.ledger.records["tower_gradients", "backward", "cross"]
    assert (across > 0) == (topology == "4x1")


def test_fractional_pooling_rounds_to_whole_bytes() -> None:
    plan = make_plan([TableSpec("emb.0", 10, 4, pooling=1.3)], Topology(1, 2))
    assert embedding_traffic(plan, [1, 1]).flat[0].intra_bytes == 9


def test_split_tables_are_refused() -> None:
    plan = TowerPlan(
        topology=Topology(1, 2),
        tables=(TableSpec("emb.0", 4, 4),),
        towers=(Tower("tower0", ("emb.0",), (0,), 4),),
        placements={"emb.0": (Shard(0, (0, 4), (0, 2)), Shard(1, (0, 4), (2, 4)))},
    )
    with pytest.raises(PlanError, match=r"expected one shard for table emb\.0, found 2"):
        bytes_per_link(plan, 1)
