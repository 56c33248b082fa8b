"""Every rank of a topology in one process: training, evaluation, the ledger, misuse; equivalence/ has random models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile import SimulatedWorld
from dmt_compile.cost.gradients import gradient_traffic
from dmt_compile.cost.traffic import embedding_traffic
from dmt_compile.errors import BatchError, CollectiveError, ConfigError
from tests._tolerances import assert_reordered
from tests.models import DLRM, Batch, concatenate, dense_of, make_batch

LONGEST_SUM = 400  # ids of one row in a global batch of 16 ranks


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def assert_same_gradients(model: nn.Module, flat: nn.Module) -> None:
    """Compare all gradients with the flat model's; errors are relative to the largest of each."""
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        assert_reordered(dense_of(mine.grad, mine), dense_of(theirs.grad, theirs), LONGEST_SUM, gradient=True)


@pytest.mark.parametrize(
    ("topology", "arguments", "options"),
    [
        ("2x2", {"sparse": True}, {}),
        ("3x2", {"modes": "max"}, {"towers": 1}),
        ("1x3", {"modes": ("mean", "max", "sum", "mean", "max")}, {"partition": "strided"}),
        ("4x1", {"dims": (4, 8, 1, 3, 9)}, {"towers": 2}),
    ],
)
def test_a_dlrm_trains_and_evaluates_as_the_flat_model_does(
    topology: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = DLRM(**arguments)
    flat = copy.deepcopy(model)
    world = SimulatedWorld(topology)
    ranks = world.topology.world_size
    optimizers = [torch.optim.Adagrad(bare.parameters(), 0.1) for bare in (model, flat)]
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        local = [make_batch(model, (rank + step) % 4, generator) for rank in range(ranks)]
        outputs = world.run(model, local, dense_compiler="eager", **options)
        for output, batch in zip(outputs, local, strict=True):
            if len(batch[0]):  # the flat model's view cannot tell the sizes of an empty batch
                assert torch.equal(output, model(*batch))
        sum(output.sum() for output in outputs).backward()
        (flat(*concatenate(local)).sum() / ranks).backward()
        assert_same_gradients(model, flat)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        assert_reordered(mine.detach(), theirs.detach(), LONGEST_SUM, gradient=True)
    local = [make_batch(model, 2, generator) for _ in range(ranks)]
    world.ledger.clear()
    with torch.no_grad():
        for output, batch in zip(world.run(model, local, dense_compiler="eager", **options), local, strict=True):
            assert torch.equal(output, model(*batch))
            assert not output.requires_grad
    assert {direction for _, direction, _ in world.ledger.records} == {"forward"}


# --------------------------------------------------------------------------------------------------------------- ledger


def step(world: SimulatedWorld, model: DLRM, sizes: Sequence[int], **options: Any) -> list[Batch]:
    """Run one training step and return its batches."""
    generator = torch.Generator().manual_seed(2)
    local = [make_batch(model, size, generator) for size in sizes]
    outputs = world.run(model, local, dense_compiler="eager", **options)
    sum(output.sum() for output in outputs).backward()
    return local


@pytest.mark.parametrize(
    ("topology", "towers", "id_exchange"),
    [
        *((topology, towers, "global") for topology, towers in (("2x2", 2), ("4x2", 2), ("1x3", 1), ("3x1", 3))),
        *((topology, towers, "hierarchical") for topology, towers in (("2x2", 2), ("4x2", 2), ("2x3", 1), ("3x2", 6))),
        ("2x1", 1, "global"),
    ],
)
def test_the_ledger_holds_every_collective_of_a_ragged_step(topology: str, towers: int, id_exchange: str) -> None:
    torch.manual_seed(0)
    model = DLRM()
    world = SimulatedWorld(topology)
    shape = world.topology
    ranks = shape.world_size
    sizes = [(3 * rank) % 5 for rank in range(ranks)]
    local = step(world, model, sizes, towers=towers, id_exchange=id_exchange)
    plan = _plan_of_first_rank(model, local, topology, towers)
    counts = {f"emb.{i}": [len(batch[1][i]) for batch in local] for i in range(5)}
    expected: dict[tuple[str, str, str], int] = {}
    names = {"ids": "ids", "ids across hosts": "ids_across", "ids in hosts": "ids_host"}
    names |= {"in-host embeddings": "intra", "peer embeddings": "peer"}
    for hop in embedding_traffic(plan, sizes, counts, id_exchange).sptt:
        for link, sent in (("intra", hop.intra_bytes), ("cross", hop.cross_bytes)):
            if sent:
                expected[names[hop.name], hop.direction, link] = sent
    found = {key: sent for key, sent in world.ledger.records.items() if key[0] in names.values()}
    assert found == expected
    rest = {key: sent for key, sent in world.ledger.records.items() if key not in found}
    assert {collective for collective, _, _ in rest} == {"exchange_headers", "dense_gradients"}
    hierarchical = shape.hosts > 1 and shape.local_ranks > 1
    sizes_of = [sum(p.numel() for p in layers.parameters()) for layers in (model.bottom, model.top)]
    buckets = [sum(sizes_of)] if shape.hosts == 1 else sizes_of
    hops = [gradient_traffic(shape, elements, 4, hierarchical) for elements in buckets]
    for link, sent in (("intra", sum(h.intra_bytes for h in hops)), ("cross", sum(h.cross_bytes for h in hops))):
        assert rest.get(("dense_gradients", "backward", link), 0) == sent
    if shape.local_ranks == 1:
        assert world.ledger.bytes_per_link()["intra"] == 0
    if shape.hosts == 1:
        assert world.ledger.bytes_per_link()["cross"] == 0
    assert sum(world.ledger.bytes_per_link().values()) == sum(world.ledger.records.values()) > 0
    world.ledger.clear()
    assert world.ledger.bytes_per_link() == {"intra": 0, "cross": 0}


def _plan_of_first_rank(model: DLRM, local: Sequence[Batch], topology: str, towers: int) -> dmt_compile.TowerPlan:
    """Return the plan that the world made: it compiles, and measures pooling, at its first rank's batch."""
    return dmt_compile.plan(model, local[0], topology, towers=towers)


def test_one_rank_moves_nothing() -> None:
    world = SimulatedWorld("1x1")
    step(world, DLRM(), [3])
    assert dict(world.ledger.records) == {}


# --------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("number", [0, 3, 5])
def test_another_number_of_batches_than_ranks(number: int) -> None:
    model = DLRM()
    generator = torch.Generator().manual_seed(0)
    local = [make_batch(model, 2, generator) for _ in range(number)]
    with pytest.raises(ConfigError, match=f"expected one batch for each of 4 ranks, found {number}; pass an empty"):
        SimulatedWorld("2x2").run(model, local)


def test_a_bad_option_is_named() -> None:
    model = DLRM()
    local = [make_batch(model, 2, torch.Generator().manual_seed(0))] * 2
    with pytest.raises(ConfigError, match="found 'tower'; did you mean 'towers'"):
        SimulatedWorld("2x1").run(model, local, tower=2)
    with pytest.raises(ConfigError, match="expected '<hosts>x<local ranks>'"):
        SimulatedWorld("two")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_faulty_batch_names_its_rank(rank: int) -> None:
    torch.manual_seed(0)
    model = DLRM()
    world = SimulatedWorld("2x2")
    generator = torch.Generator().manual_seed(0)
    local = [make_batch(model, 3, generator) for _ in range(4)]
    local[rank][1][2] = torch.tensor([99])
    local[rank][2][2] = torch.tensor([0, 1, 1])
    text = (
        rf"expected ids of table emb.2 in \[0, 7\), found 99 at position 0 of rank {rank}'s batch; nothing was updated"
    )
    with pytest.raises(BatchError, match=text):
        world.run(model, local, dense_compiler="eager")
    local[rank][1][2] = torch.tensor([6])
    outputs = world.run(model, local, dense_compiler="eager")  # and goes on
    assert all(torch.equal(output, model(*batch)) for output, batch in zip(outputs, local, strict=True))


class Choosy(nn.Module):
    """A model whose program depends on what kind of batch it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(10, 4, mode="sum")

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, twice: bool = False) -> torch.Tensor:
        out = self.emb(ids, offsets)
        return out + out if twice else out


def test_ranks_in_different_programs_are_told() -> None:
    batch = (torch.tensor([1, 2]), torch.tensor([0, 1]))
    world = SimulatedWorld("1x2")
    with pytest.raises(CollectiveError, match="expected the same program on every rank, found several"):
        world.run(Choosy(), [batch, batch], kwargs=[{}, {"twice": True}], dense_compiler="eager")


class Stacked(nn.Module):
    """A model that takes its offsets as one (tables, samples) tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(10, 4, mode="sum") for _ in range(3))

    def forward(self, ids: list[torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        return torch.cat([table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)], dim=1)


def test_an_empty_batch_beside_others_with_offsets_in_one_tensor() -> None:
    torch.manual_seed(0)
    model = Stacked()
    world = SimulatedWorld("2x2")
    for sizes in ([3, 0, 1, 5], [0, 2, 2, 0]):
        local = [([torch.randint(10, (size,)) for _ in range(3)], torch.arange(size).repeat(3, 1)) for size in sizes]
        outputs = world.run(model, local, dense_compiler="eager")
        assert all(torch.equal(output, model(*batch)) for output, batch in zip(outputs, local, strict=True))
        sum(output.sum() for output in outputs).backward()


def test_keyword_arguments_come_one_mapping_a_rank() -> None:
    torch.manual_seed(0)
    model = Choosy()
    offsets = torch.tensor([0, 1])
    ids = [torch.tensor([rank, 9]) for rank in range(2)]
    keywords = [{"offsets": offsets, "twice": True}] * 2
    outputs = SimulatedWorld("2x1").run(model, ids, kwargs=keywords, dense_compiler="eager")
    for output, rank_ids in zip(outputs, ids, strict=True):
        assert torch.equal(output, 2 * model(rank_ids, offsets))
    with pytest.raises(ConfigError, match="expected one batch for each of 2 ranks"):
        SimulatedWorld("2x1").run(model, ids, kwargs=keywords[:1])


class Broken(nn.Module):
    """A model with graph breaks: two lookups in two graphs, and a dense head in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.EmbeddingBag(10, 4, mode="sum")
        self.second = nn.EmbeddingBag(7, 4, mode="mean", sparse=True)
        self.head = nn.Linear(8, 1)

    def forward(self, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        first = self.first(ids[0], offsets[0])
        torch._dynamo.graph_break()
        second = self.second(ids[1], offsets[1])
        torch._dynamo.graph_break()
        return self.head(torch.cat([first, second], dim=1))


# Dynamo itself looks at the gradient of what an earlier graph returned, with any backend.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning:torch\..*")
@pytest.mark.parametrize("topology", ["2x2", "1x3"])
def test_a_model_with_graph_breaks(topology: str) -> None:
    torch.manual_seed(0)
    model = Broken()
    flat = copy.deepcopy(model)
    world = SimulatedWorld(topology)
    ranks = world.topology.world_size
    generator = torch.Generator().manual_seed(0)
    for samples in (2, 5):
        ids = [[torch.randint(0, 7, (samples,), generator=generator) for _ in range(2)] for _ in range(ranks)]
        offsets = [torch.arange(samples)] * 2
        local = [(rank_ids, offsets) for rank_ids in ids]
        outputs = world.run(model, local, dense_compiler="eager")
        losses = []
        for output, batch in zip(outputs, local, strict=True):
            assert torch.equal(output, flat(*batch))
            losses.append(flat(*batch).square().sum() / ranks)
        sum(output.square().sum() for output in outputs).backward()
        sum(losses).backward()
        assert_same_gradients(model, flat)
        for parameter in (*model.parameters(), *flat.parameters()):
            parameter.grad = None
