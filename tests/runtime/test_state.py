"""Full state dicts and gradient clipping in one process: of flat models, and of one rank's part of a sharded one."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile.errors import CheckpointError
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.runtime.distributed_session import ModelState
from dmt_compile.runtime.sharding import guard_state_dict
from dmt_compile.runtime.tables import Block, ShardedTable
from dmt_compile.runtime.world import Pending
from dmt_compile.topology import Topology
from tests.models import DLRM, make_batch

PLAN = TowerPlan(
    topology=Topology(1, 2),
    tables=(TableSpec("emb.0", 6, 4), TableSpec("emb.1", 5, 4)),
    towers=(Tower("tower0", ("emb.0", "emb.1"), (0,), 8),),
    placements={
        "emb.0": (Shard(0, (0, 4), (0, 4)), Shard(1, (4, 6), (0, 4))),
        "emb.1": (Shard(1, (0, 5), (0, 1)), Shard(0, (0, 5), (1, 4))),
    },
)


class RankZeroOfTwo:
    """The world as rank 0 sees it; rank 1 answers from the flat tables that it is given."""

    rank = 0
    device = torch.device("cpu")

    def __init__(self, flat: dict[str, torch.Tensor], other_gradients: list[torch.Tensor]) -> None:
        self.flat = flat
        self.other_gradients = other_gradients
        self.norm_type = 2.0

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        assert (source, target) == (1, 0)
        name = label.removeprefix("gathering ")
        [shard] = [shard for shard in PLAN.placements[name] if shard.rank == 1]
        tensor.copy_(Block(name, (shard.rows,), shard.columns).cut(self.flat[name]))

    def start_all_reduce(self, tensor: torch.Tensor, label: str, maximum: bool = False) -> Pending:
        norms = torch.stack([torch.linalg.vector_norm(g, self.norm_type) for g in self.other_gradients])
        return Pending(torch.maximum(tensor, norms.max()) if maximum else tensor + norms.pow(self.norm_type).sum())


class Sharded(nn.Module):
    """Rank 0's part of a model of two split tables and a dense layer, with its flat twin beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = {name: torch.randn(rows, 4) for name, rows in (("emb.0", 6), ("emb.1", 5))}
        self.gradients = {name: torch.randn_like(value) for name, value in self.flat.items()}
        other = [self.cut(name, 1, self.gradients[name]) for name in self.flat]
        self.world = RankZeroOfTwo(self.flat, other)
        state = ModelState(PLAN, cast(Any, self.world))
        self.emb = nn.ModuleList(nn.EmbeddingBag(rows, 4) for rows in (6, 5))
        for (name, value), module in zip(self.flat.items(), self.emb, strict=True):
            [shard] = [shard for shard in PLAN.placements[name] if shard.rank == 0]
            block = Block(name, (shard.rows,), shard.columns, state)
            module.weight = nn.Parameter(ShardedTable(block.cut(value).clone(), value.shape, block))
            module.weight.grad = ShardedTable(block.cut(self.gradients[name]).clone(), value.shape, block)
        self.top = nn.Linear(4, 2)
        for parameter in self.top.parameters():
            parameter.grad = torch.randn_like(parameter)
        guard_state_dict(self)

    def cut(self, name: str, rank: int, value: torch.Tensor) -> torch.Tensor:
        [shard] = [shard for shard in PLAN.placements[name] if shard.rank == rank]
        return Block(name, (shard.rows,), shard.columns).cut(value)


# ---------------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("compiled", ["no", "whole", "submodule"])
def test_in_one_process_it_is_the_flat_state_dict(compiled: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"dlrm": DLRM()})
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    if compiled == "whole":
        model = torch.compile(model, backend="dmt")
    if compiled == "submodule":
        model["dlrm"] = torch.compile(model["dlrm"], backend="dmt")
    state = dmt_compile.full_state_dict(model)
    assert list(state) == list(expected)
    assert not any("_orig_mod" in name for name in state)
    for name, value in expected.items():
        assert torch.equal(state[name], value)
        assert not state[name].requires_grad
    torch.manual_seed(1)
    other = nn.ModuleDict({"dlrm": DLRM()})
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"


def test_a_sharded_model_gives_full_tensors_under_the_flat_names() -> None:
    model = Sharded()
    state = dmt_compile.full_state_dict(model)
    assert list(state) == ["emb.0.weight", "emb.1.weight", "top.weight", "top.bias"]
    for name, value in model.flat.items():
        assert type(state[f"{name}.weight"]) is torch.Tensor
        assert torch.equal(state[f"{name}.weight"], value)
    assert torch.equal(state["top.weight"], model.top.weight)
    assert not state["top.weight"].requires_grad
    model.world.rank = 1
    for module, name in zip(model.emb, model.flat, strict=True):  # the same program as rank 1 runs it
        [shard] = [shard for shard in PLAN.placements[name] if shard.rank == 1]
        block = Block(name, (shard.rows,), shard.columns, module.weight.block.model)
        module.weight = nn.Parameter(ShardedTable(block.cut(model.flat[name]).clone(), model.flat[name].shape, block))
    sent: list[torch.Tensor] = []
    model.world.move = lambda tensor, source, target, label: sent.append(tensor)  # type: ignore[method-assign]
    assert dmt_compile.full_state_dict(model) == {}
    assert [
        torch.equal(wire, model.cut(name, 1, value))
        for wire, (name, value) in zip(sent, model.flat.items(), strict=True)
    ] == [True, True]


FIELDS = TowerPlan(  # of one parameter: the outer two fields on rank 1, the middle one on rank 0
    topology=Topology(1, 2),
    tables=(TableSpec("emb[0:3]", 3, 4), TableSpec("emb[3:10]", 7, 4), TableSpec("emb[10:12]", 2, 4)),
    towers=(Tower("tower0", ("emb[0:3]", "emb[3:10]", "emb[10:12]"), (0,), 12),),
    placements={
        "emb[0:3]": (Shard(1, (0, 3), (0, 4)),),
        "emb[3:10]": (Shard(0, (0, 7), (0, 4)),),
        "emb[10:12]": (Shard(1, (0, 2), (0, 4)),),
    },
)
FIELD_ROWS = ((3, 10),), ((0, 3), (10, 12))


class FieldWorld:
    """One of two ranks; rank 0 hears of each field what the flat table holds, rank 1 remembers what it sent."""

    device = torch.device("cpu")

    def __init__(self, rank: int, flat: torch.Tensor) -> None:
        self.rank, self.flat = rank, flat
        self.sent: dict[str, torch.Tensor] = {}

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        assert (source, target) == (1, 0)
        field = label.removeprefix("gathering ")
        first, end = (int(number) for number in field.removeprefix("emb[").removesuffix("]").split(":"))
        if self.rank == 0:
            tensor.copy_(self.flat[first:end])
        else:
            self.sent[field] = tensor.clone()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_fields_of_a_parameter_are_gathered_into_one_tensor(rank: int) -> None:
    torch.manual_seed(0)
    flat = torch.randn(12, 4)
    world = FieldWorld(rank, flat)
    block = Block("emb", FIELD_ROWS[rank], (0, 4), ModelState(FIELDS, cast(Any, world)))
    model = nn.ModuleDict({"emb": nn.Embedding(12, 4)})
    model["emb"].weight = nn.Parameter(ShardedTable(block.cut(flat).clone(), flat.shape, block))
    guard_state_dict(model)
    state = dmt_compile.full_state_dict(model)
    if rank == 0:
        assert list(state) == ["emb.weight"]
        assert type(state["emb.weight"]) is torch.Tensor
        assert torch.equal(state["emb.weight"], flat)
        assert str(nn.ModuleDict({"emb": nn.Embedding(12, 4)}).load_state_dict(state)).startswith("<All keys")
    else:
        assert state == {}
        assert torch.equal(torch.cat([*world.sent.values()]), flat[[0, 1, 2, 10, 11]])
        assert list(world.sent) == ["emb[0:3]", "emb[10:12]"]


def test_a_flat_state_dict_goes_into_the_fields_that_a_rank_owns() -> None:
    block = Block("emb", FIELD_ROWS[1], (0, 4))
    module, flat = nn.Embedding(12, 4), torch.randn(12, 4)
    module.weight = nn.Parameter(ShardedTable(torch.zeros(5, 4), (12, 4), block))
    assert str(module.load_state_dict({"weight": flat})) == "<All keys matched successfully>"
    assert torch.equal(module.weight.local, flat[[0, 1, 2, 10, 11]])


def test_a_plain_state_dict_of_a_sharded_model_is_refused() -> None:
    model = Sharded()
    with pytest.raises(
        CheckpointError, match=r"found state_dict\(\) at 'emb.0.'; full_state_dict is a collective call"
    ):
        model.state_dict()
    assert set(model.top.state_dict()) == {"weight", "bias"}
    dmt_compile.full_state_dict(model)
    with pytest.raises(
        CheckpointError, match=r"expected dmt_compile\.full_state_dict"
    ):  # still, after it was allowed once
        model.state_dict()


def test_a_table_without_its_program_is_refused() -> None:
    model = Sharded()
    table = model.emb[1].weight
    lost = Block("emb.1", table.block.rows, table.block.columns)
    model.emb[1].weight = nn.Parameter(ShardedTable(table.local, table.shape, lost))
    with pytest.raises(
        CheckpointError, match=r"expected table emb\.1 as the program that sharded it left it, found a copy"
    ):
        dmt_compile.full_state_dict(model)


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_in_one_process_is_pytorch_s(norm_type: float, max_norm: float) -> None:
    torch.manual_seed(0)
    model = DLRM()
    model(*make_batch(model, 6, torch.Generator().manual_seed(0))).sum().backward()
    model.top[0].bias.grad = None  # a parameter without a gradient takes no part
    flat = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = dmt_compile.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(flat.parameters(), max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_sparse_gradients_are_coalesced_before_they_are_measured() -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    ids, values = torch.tensor([[1, 1, 3]]), torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 12.0]])
    table.grad = torch.sparse_coo_tensor(ids, values, (5, 2), check_invariants=False)
    assert dmt_compile.clip_grad_norm_(table, 1.3) == 13.0  # row 1 is (3, 4), row 3 is (0, 12)
    assert table.grad.is_coalesced()
    expected = torch.zeros(5, 2)
    expected[1], expected[3] = torch.tensor([0.3, 0.4]), torch.tensor([0.0, 1.2])
    torch.testing.assert_close(table.grad.to_dense(), expected)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_dense_gradients_count_once_and_shards_of_all_ranks_together(norm_type: float) -> None:
    model = Sharded()
    model.world.norm_type = norm_type
    everything = [*model.gradients.values(), *(p.grad.clone() for p in model.top.parameters())]
    expected = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in everything]), norm_type)
    norm = dmt_compile.clip_grad_norm_(model.parameters(), 0.25, norm_type)
    torch.testing.assert_close(norm, expected)
    factor = 0.25 / (expected + 1e-6)
    for (name, gradient), module in zip(model.gradients.items(), model.emb, strict=True):
        torch.testing.assert_close(module.weight.grad.local, model.cut(name, 0, gradient) * factor)
    torch.testing.assert_close(model.top.weight.grad, everything[2] * factor)


def test_no_gradient_has_norm_zero() -> None:
    assert dmt_compile.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0.0
    assert dmt_compile.clip_grad_norm_([], 1.0) == 0.0


def test_a_norm_that_is_not_finite_is_an_error_where_asked_for() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert dmt_compile.clip_grad_norm_([parameter], 1.0).isinf()
    parameter.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: expected a finite norm of order 2\.0, found inf"):
        dmt_compile.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
    assert torch.equal(parameter.grad, torch.tensor([1.0, float("inf")]))  # left as it was
