"""A sharded table in one process: whatever a user may do to a parameter is done to the block, or refused by name."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dmt_compile.errors import CheckpointError, DmtError, UnsupportedGraphError
from dmt_compile.ir.embedding_graph import Table
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.runtime.sharding import block_of, shard_tables
from dmt_compile.runtime.tables import Block, ShardedTable, flat_sparse, local_sparse
from dmt_compile.topology import Topology
from dmt_compile.torch_internals import swap_contents

ROWS, DIM = 12, 6
BLOCKS = {
    "whole": Block("emb.0", ((0, ROWS),), (0, DIM)),
    "rows": Block("emb.0", ((3, 9),), (0, DIM)),
    "columns": Block("emb.0", ((0, ROWS),), (2, 5)),
    "both": Block("emb.0", ((3, 9),), (2, 5)),
    "ranges": Block("emb.0", ((1, 3), (6, 7), (9, 10)), (0, DIM)),
    "empty": Block("emb.0", ((0, 0),), (0, DIM)),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


def shard(flat: torch.Tensor, block: Block) -> ShardedTable:
    """Return the block of a flat tensor as a table of its own memory."""
    return ShardedTable(block.cut(flat).clone(), flat.shape, block)


def parameters(block: Block, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a sharded parameter and its flat twin."""
    torch.manual_seed(seed)
    flat = torch.randn(ROWS, DIM)
    return nn.Parameter(shard(flat, block)), nn.Parameter(flat)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the block that a table holds, after making sure that it is one."""
    assert isinstance(tensor, ShardedTable)
    assert tensor.shape == (ROWS, DIM)
    return tensor.local


def assert_is_block_of(table: torch.Tensor, flat: torch.Tensor, block: Block) -> None:
    assert table.dtype == flat.dtype
    assert local(table).shape == block.cut(flat).shape
    assert torch.equal(local(table), block.cut(flat.detach()))


# ----------------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.01, initial_accumulator_value=0.5),
    "Adagrad foreach": lambda p: torch.optim.Adagrad(p, 0.1, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5, centered=True, weight_decay=0.01),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, 0.1, foreach=True),
}
SPARSE_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.1),
}


def assert_state_is_local(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer, block: Block) -> None:
    """Assert that every flat-shaped state is this block of the flat optimizer's, and that there is no other."""
    [own], [flat] = mine.state.values(), theirs.state.values()
    assert own.keys() == flat.keys()
    for key, value in flat.items():
        if isinstance(value, torch.Tensor) and value.shape == (ROWS, DIM):
            assert_is_block_of(own[key], value, block)
        else:
            assert own[key] == value


@every_block
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_optimizers_equal_the_flat_one_s_slice(name: str, block: Block) -> None:
    sharded, flat = parameters(block)
    mine, theirs = OPTIMIZERS[name]([sharded]), OPTIMIZERS[name]([flat])
    for _ in range(3):
        gradient = torch.randn(ROWS, DIM)
        sharded.grad, flat.grad = shard(gradient, block), gradient
        mine.step()
        theirs.step()
        assert_is_block_of(sharded, flat, block)
    if theirs.state:
        assert_state_is_local(mine, theirs, block)
    mine.zero_grad()
    assert sharded.grad is None
    sharded.grad = shard(torch.ones(ROWS, DIM), block)
    mine.zero_grad(set_to_none=False)
    assert not local(sharded.grad).any()


@pytest.mark.parametrize(
    "block",
    [BLOCKS[name] for name in ("whole", "rows", "columns", "ranges")],
    ids=["whole", "rows", "columns", "ranges"],
)
@pytest.mark.parametrize("name", SPARSE_OPTIMIZERS)
def test_sparse_optimizers_equal_the_flat_one_s_slice(name: str, block: Block) -> None:
    sharded, flat = parameters(block)
    mine, theirs = SPARSE_OPTIMIZERS[name]([sharded]), SPARSE_OPTIMIZERS[name]([flat])
    own_rows = torch.cat([torch.arange(first, end) for first, end in block.rows])
    for _ in range(3):
        ids = own_rows[torch.randint(0, len(own_rows), (5,))]  # rows of its own, as its lookups make them
        values = torch.randn(5, DIM)
        flat.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), values, (ROWS, DIM), check_invariants=False)
        own = values[:, block.columns[0] : block.columns[1]]
        sharded.grad = flat_sparse(block.to_local(ids), own, (ROWS, DIM), block)
        mine.step()
        theirs.step()
        assert_is_block_of(sharded, flat, block)
    if theirs.state:
        assert_state_is_local(mine, theirs, block)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Rprop(p, 0.1), torch.optim.Adafactor], ids=["Rprop", "Adafactor"]
)
@every_block
def test_an_optimizer_that_is_not_element_wise_is_refused(make: Any, block: Block) -> None:
    sharded, flat = parameters(block)
    optimizer = make([sharded])
    sharded.grad = shard(torch.ones(ROWS, DIM), block)
    with pytest.raises(UnsupportedGraphError, match=r"sharded table emb\.0: expected "):
        optimizer.step()
    assert_is_block_of(sharded, flat, block)


@every_block
def test_optimizer_state_takes_the_memory_of_the_block_alone(block: Block) -> None:
    sharded, _ = parameters(block)
    optimizer = torch.optim.Adagrad([sharded])  # makes its state at once
    state = optimizer.state[sharded]["sum"]
    elements = block.shape[0] * block.shape[1]
    assert local(state).untyped_storage().nbytes() == 4 * elements
    assert local(sharded).untyped_storage().nbytes() == 4 * elements


# ------------------------------------------------------------------------------------------------------------- sharding


class OneOfTwo:
    """The world as one of two ranks sees it; what it would be sent are the rows that it has already."""

    device = torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.moved: list[tuple[int, int, tuple[int, ...]]] = []

    def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
        self.moved.append((source, target, tuple(tensor.shape)))


PLAN = TowerPlan(
    topology=Topology(1, 2),
    tables=(TableSpec("mine", ROWS, DIM), TableSpec("theirs", ROWS, DIM), TableSpec("ours", ROWS, DIM)),
    towers=(Tower("tower0", ("mine", "theirs", "ours"), (0,), 3 * DIM),),
    placements={
        "mine": (Shard(0, (0, ROWS), (0, DIM)),),
        "theirs": (Shard(1, (0, ROWS), (0, DIM)),),
        "ours": (Shard(0, (0, 8), (0, DIM)), Shard(1, (8, ROWS), (0, DIM))),
    },
)


FIELDS = TowerPlan(  # rows of one parameter: the outer two fields on rank 1, the middle one on rank 0
    topology=Topology(1, 2),
    tables=(TableSpec("emb[0:3]", 3, DIM), TableSpec("emb[3:10]", 7, DIM), TableSpec("emb[10:12]", 2, DIM)),
    towers=(Tower("tower0", ("emb[0:3]", "emb[3:10]", "emb[10:12]"), (0,), 3 * DIM),),
    placements={
        "emb[0:3]": (Shard(1, (0, 3), (0, DIM)),),
        "emb[3:10]": (Shard(0, (0, 7), (0, DIM)),),
        "emb[10:12]": (Shard(1, (0, 2), (0, DIM)),),
    },
)
FIELD_BLOCKS = Block("emb", ((3, 10),), (0, DIM)), Block("emb", ((0, 3), (10, 12)), (0, DIM))


def found(tables: Mapping[str, nn.Parameter]) -> list[Table]:
    """Return each parameter as one table, as ``check_lookups`` names it."""
    return [Table(name, name, ROWS, DIM, parameter.dtype, parameter) for name, parameter in tables.items()]


def found_fields(parameter: nn.Parameter) -> list[Table]:
    """Return the tables of one parameter's fields."""
    return [Table(spec.name, "emb", spec.rows, DIM, parameter.dtype, parameter) for spec in FIELDS.tables]


def bytes_of(tensor: torch.Tensor) -> int:
    return local(tensor).untyped_storage().nbytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_sharding_cuts_parameters_gradients_and_optimizer_state_down_to_what_a_rank_owns(rank: int) -> None:
    torch.manual_seed(0)
    tables = {name: nn.Parameter(torch.randn(ROWS, DIM)) for name in PLAN.placements}
    flat = {name: nn.Parameter(table.detach().clone()) for name, table in tables.items()}
    before = [torch.optim.Adagrad(group.values(), 0.1) for group in (tables, flat)]
    calls: list[str] = []
    handles: list[Any] = []
    for name in PLAN.placements:
        gradient = torch.randn(ROWS, DIM)
        tables[name].grad, flat[name].grad = gradient.clone(), gradient
        tables[name].register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
        handles.append(tables[name].register_hook(lambda gradient, name=name: calls.append(f"before {name}")))
    for optimizer in before:
        optimizer.step()
    world = OneOfTwo(rank)
    identities = {name: id(table) for name, table in tables.items()}
    shard_tables(found(tables), PLAN, cast(Any, world), model="the model")
    after = torch.optim.Adagrad(tables.values(), 0.1)
    assert world.moved == [(0, 1, (ROWS, DIM)), (0, 1, (4, DIM))]  # what rank 1 owns comes from rank 0
    elements = {"mine": (ROWS * DIM, 0), "theirs": (0, ROWS * DIM), "ours": (8 * DIM, 4 * DIM)}
    for piece in found(tables):
        name, table = piece.name, tables[piece.name]
        block = block_of(PLAN, piece, rank, None)
        assert id(table) == identities[name]
        assert table.block.model == "the model"
        assert_is_block_of(table, flat[name], block)
        assert_is_block_of(table.grad, flat[name].grad, block)
        assert_is_block_of(before[0].state[table]["sum"], before[1].state[flat[name]]["sum"], block)
        for tensor in (table, table.grad, before[0].state[table]["sum"], after.state[table]["sum"]):
            assert bytes_of(tensor) == 4 * elements[name][rank]
    for optimizer in before:
        optimizer.step()
    for name, table in tables.items():
        assert_is_block_of(table, flat[name], table.block)
        (table * 1.0).backward(torch.zeros_like(table))
        assert calls == [f"before {name}", name]  # once each
        calls.clear()
    handles[0].remove()
    (tables["mine"] * 1.0).backward(torch.zeros_like(tables["mine"]))
    assert calls == ["mine"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_fields_of_a_parameter_are_one_block_of_several_ranges(rank: int) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(ROWS, DIM))
    flat = nn.Parameter(parameter.detach().clone())
    gradient = torch.randn(ROWS, DIM)
    optimizers = [torch.optim.Adagrad([p], 0.1) for p in (parameter, flat)]
    for p in (parameter, flat):
        p.grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()
    world = OneOfTwo(rank)
    block = FIELD_BLOCKS[rank]
    assert block_of(FIELDS, found_fields(parameter)[0], rank, None) == block
    shard_tables(found_fields(parameter), FIELDS, cast(Any, world), model="the model")
    assert world.moved == [(0, 1, (3, DIM)), (0, 1, (2, DIM))]
    assert isinstance(parameter, ShardedTable)
    assert (parameter.block, parameter.block.model) == (block, "the model")
    state = optimizers[0].state[parameter]["sum"]
    for mine, theirs in (
        (parameter, flat),
        (parameter.grad, gradient),
        (state, optimizers[1].state[flat]["sum"]),
    ):
        assert_is_block_of(mine, theirs, block)
        assert bytes_of(mine) == 4 * block.shape[0] * DIM
    for optimizer in optimizers:
        optimizer.step()
    assert_is_block_of(parameter, flat, block)
    assert_is_block_of(state, optimizers[1].state[flat]["sum"], block)


def test_what_comes_from_rank_0_lands_in_its_own_rows() -> None:
    class FromRankZero(OneOfTwo):
        def move(self, tensor: torch.Tensor, source: int, target: int, label: str) -> None:
            super().move(tensor, source, target, label)
            tensor.copy_(torch.full_like(tensor, float(len(tensor))))

    parameter = nn.Parameter(torch.zeros(ROWS, DIM))
    shard_tables(found_fields(parameter), FIELDS, cast(Any, FromRankZero(1)), None)
    assert local(parameter)[:, 0].tolist() == [3.0, 3.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sparse_gradient_keeps_the_rows_that_its_rank_owns(rank: int) -> None:
    torch.manual_seed(0)
    parameter, flat = nn.Parameter(torch.ones(ROWS, DIM)), nn.Parameter(torch.ones(ROWS, DIM))
    for table in (parameter, flat):
        nn.functional.embedding(torch.tensor([1, 4, 11, 4]), table, sparse=True).sum().backward()
    shard_tables(found_fields(parameter), FIELDS, cast(Any, OneOfTwo(rank)), None)
    own = {row for first, end in FIELD_BLOCKS[rank].rows for row in range(first, end)}
    assert set(parameter.grad.coalesce().indices()[0].tolist()) <= own
    for table in (parameter, flat):
        torch.optim.SGD([table], 0.1).step()
    assert_is_block_of(parameter, flat, FIELD_BLOCKS[rank])


def test_fields_of_other_columns_on_one_rank_share_a_block_of_all_of_them() -> None:
    table = found_fields(nn.Parameter(torch.zeros(ROWS, DIM)))[0]
    halves = {
        "emb[0:3]": (Shard(0, (0, 3), (0, 2)), Shard(1, (0, 3), (2, DIM))),
        "emb[3:10]": (Shard(0, (0, 7), (0, DIM)),),
        "emb[10:12]": (Shard(1, (0, 2), (2, DIM)), Shard(0, (0, 2), (0, 2))),
    }
    plan = replace(FIELDS, placements=halves)
    assert block_of(plan, table, 0, None) == Block("emb", ((0, 3), (3, 10), (10, 12)), (0, DIM))
    assert block_of(plan, table, 1, None) == Block("emb", ((0, 3), (10, 12)), (2, DIM))


def test_a_rank_that_owns_no_field_holds_no_row() -> None:
    plan = replace(FIELDS, placements={t.name: (Shard(0, (0, t.rows), (0, DIM)),) for t in FIELDS.tables})
    parameter = nn.Parameter(torch.zeros(ROWS, DIM))
    assert block_of(plan, found_fields(parameter)[0], 1, None).shape == (0, DIM)
    whole = block_of(plan, found_fields(parameter)[0], 0, None)
    assert torch.equal(whole.to_local(torch.arange(ROWS)), torch.arange(ROWS))
    assert torch.equal(whole.to_flat(torch.arange(ROWS)), torch.arange(ROWS))


def test_sparse_gradients_survive_sharding_on_their_owner_alone() -> None:
    tables = {name: nn.Parameter(torch.zeros(ROWS, DIM)) for name in PLAN.placements}
    for table in tables.values():
        nn.functional.embedding_bag(
            torch.tensor([1, 1]), table, torch.tensor([0, 1]), mode="sum", sparse=True
        ).sum().backward()
    shard_tables(found(tables), PLAN, cast(Any, OneOfTwo(1)), None)
    assert tables["mine"].grad is None
    assert tables["theirs"].grad.to_dense()[1].tolist() == [2.0] * DIM


def test_a_table_in_a_living_autograd_graph_is_not_sharded() -> None:
    tables = {name: nn.Parameter(torch.ones(ROWS, DIM)) for name in PLAN.placements}
    held = tables["theirs"] * 2
    with pytest.raises(
        UnsupportedGraphError, match=r"expected table theirs free of earlier autograd graphs, found .*drop the outputs"
    ):
        shard_tables(found(tables), PLAN, cast(Any, OneOfTwo(0)), None)
    assert held.shape == (ROWS, DIM)


# --------------------------------------------------------------------------------------------- what users do to tensors


@every_block
@pytest.mark.parametrize(
    "make",
    [
        lambda t: torch.full_like(t, 2.5),
        lambda t: torch.full_like(t, 2.5, memory_format=torch.preserve_format),
        torch.zeros_like,
        torch.ones_like,
        torch.clone,
        lambda t: t.detach(),
        lambda t: t.to(torch.float64),
        lambda t: t.bfloat16(),
        lambda t: t * 2 + 1,
        lambda t: t.abs().sqrt(),
        lambda t: 1 / t,
        copy.deepcopy,
    ],
    ids=[
        "full",
        "full preserve",
        "zeros",
        "ones",
        "clone",
        "detach",
        "double",
        "bfloat16",
        "affine",
        "sqrt",
        "divide",
        "copy",
    ],
)
def test_new_tensors_hold_the_block(make: Any, block: Block) -> None:
    sharded, flat = parameters(block)
    made = make(sharded)
    assert_is_block_of(made, make(flat), block)
    assert made.block is block


@every_block
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.zero_(),
        lambda t: t.fill_(3.0),
        lambda t: t.fill_(torch.tensor(3.0)),
        lambda t: t.mul_(0.5),
        lambda t: t.normal_(0, 0.1),
        lambda t: t.uniform_(-1, 1),
        nn.init.xavier_uniform_,
        nn.init.constant_,
    ],
    ids=["zero", "fill", "fill tensor", "mul", "normal", "uniform", "xavier", "constant"],
)
def test_changes_in_place_are_those_of_the_flat_table(change: Any, block: Block) -> None:
    sharded, flat = parameters(block)
    change = change if change is not nn.init.constant_ else lambda t: nn.init.constant_(t, 7.0)
    with torch.no_grad():
        for tensor in (sharded, flat):
            torch.manual_seed(5)  # random ones draw the flat table's numbers
            change(tensor)
    assert_is_block_of(sharded, flat, block)


@every_block
def test_a_flat_tensor_is_copied_in_block_by_block(block: Block) -> None:
    sharded, _ = parameters(block)
    value = torch.randn(ROWS, DIM)
    with torch.no_grad():
        sharded.copy_(value)
    assert_is_block_of(sharded, value, block)
    module = nn.EmbeddingBag(ROWS, DIM)
    module.weight = sharded
    other = torch.randn(ROWS, DIM, dtype=torch.float64)
    assert str(module.load_state_dict({"weight": other})) == "<All keys matched successfully>"
    assert_is_block_of(sharded, other.float(), block)
    assert module.weight is sharded
    assert_is_block_of(module.double().weight, other.float().double(), block)


def test_a_square_table_is_cut_by_rows_and_columns() -> None:
    block = Block("emb.0", ((1, 3),), (0, 2))
    flat = torch.arange(16.0).view(4, 4)
    table = shard(torch.zeros(4, 4), block)
    table.copy_(flat)
    assert torch.equal(table.local, flat[1:3, 0:2])
    table.add_(flat[:, :1])  # one column for all
    assert torch.equal(table.local, (flat + flat[:, :1])[1:3, 0:2])
    table.mul_(flat[0])  # one row for all
    assert torch.equal(table.local, ((flat + flat[:, :1]) * flat[0])[1:3, 0:2])


@every_block
def test_copies_are_independent(block: Block) -> None:
    sharded, flat = parameters(block)
    sharded.requires_grad_(False)
    copied = copy.deepcopy(sharded)
    assert isinstance(copied, nn.Parameter)
    assert not copied.requires_grad
    copied.zero_()
    assert_is_block_of(sharded, flat, block)
    both = copy.deepcopy([sharded, sharded])
    assert both[0] is both[1]  # ties survive


def test_a_table_describes_itself() -> None:
    table = shard(torch.zeros(ROWS, DIM), BLOCKS["rows"])
    assert repr(table) == "ShardedTable(emb.0, shape=(12, 6), rows=((3, 9),), columns=(0, 6))"
    assert f"{table}" == repr(table)


# --------------------------------------------------------------------------------------------------------------- errors

_IDS, _OFFSETS = torch.tensor([1, 2]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("misuse", "error", "text"),
    [
        (
            lambda t: nn.functional.embedding_bag(_IDS, t, _OFFSETS),
            UnsupportedGraphError,
            "expected use inside the compiled model",
        ),
        (lambda t: nn.functional.embedding(_IDS, t), UnsupportedGraphError, "expected use inside the compiled model"),
        (
            lambda t: t.sum(),
            UnsupportedGraphError,
            "call the compiled model on every rank, or take the flat weights with ",
        ),
        (lambda t: t.mean(0), UnsupportedGraphError, "dmt_compile.full_state_dict"),
        (lambda t: t @ torch.ones(DIM), UnsupportedGraphError, "TORCH_LOGS=recompiles shows why"),
        (lambda t: t[0], UnsupportedGraphError, "expected use inside the compiled model"),
        (lambda t: torch.ones(ROWS, DIM).add_(t), UnsupportedGraphError, "expected use inside the compiled model"),
        (lambda t: t.norm(), UnsupportedGraphError, "call dmt_compile.clip_grad_norm_"),
        (
            pickle.dumps,
            CheckpointError,
            "expected a flat tensor for table emb.0, found one sharded over the ranks; save ",
        ),
        (lambda t: torch.save(t, io.BytesIO()), CheckpointError, "dmt_compile.full_state_dict(model) instead"),
        (lambda t: torch.save({"emb.0.weight": nn.Parameter(t)}, io.BytesIO()), CheckpointError, "a collective call"),
    ],
    ids=["bag", "embedding", "sum", "mean", "matmul", "row", "into flat", "norm", "pickle", "save", "save dict"],
)
@every_block
def test_what_needs_the_flat_table_is_refused(misuse: Any, error: type[DmtError], text: str, block: Block) -> None:
    table = shard(torch.ones(ROWS, DIM), block)
    with pytest.raises(error, match=re.escape(text)) as raised:
        misuse(table)
    assert "emb.0" in str(raised.value)
    assert torch.equal(table.local, torch.ones_like(table.local))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "clip",
    [
        lambda p, foreach: nn.utils.clip_grad_norm_([p], 1.0, foreach=foreach),
        lambda p, foreach: nn.utils.get_total_norm([p.grad], foreach=foreach),
    ],
    ids=["clip", "norm"],
)
def test_the_clipping_of_pytorch_is_refused(clip: Any, foreach: bool) -> None:
    sharded, _ = parameters(BLOCKS["rows"])
    sharded.grad = shard(torch.ones(ROWS, DIM), BLOCKS["rows"])
    with pytest.raises(UnsupportedGraphError, match="would compute another norm on every rank, call dmt_compile"):
        clip(sharded, foreach)


# ------------------------------------------------------------------------------------------------------------- autograd


@every_block
def test_gradients_accumulate(block: Block) -> None:
    sharded, _ = parameters(block)
    gradient = torch.randn(ROWS, DIM)
    scaled = sharded * 3.0
    scaled.backward(shard(gradient, block))
    assert_is_block_of(sharded.grad, gradient * 3.0, block)
    (sharded * 2.0).backward(shard(gradient, block))
    assert_is_block_of(sharded.grad, gradient * 3.0 + gradient * 2.0, block)


def test_rows_of_several_ranges_are_numbered_through() -> None:
    block = BLOCKS["ranges"]
    assert block.shape == (4, DIM)
    flat_rows = torch.tensor([1, 2, 6, 9])
    assert block.to_flat(torch.arange(4)).tolist() == flat_rows.tolist()
    assert block.to_local(flat_rows).tolist() == [0, 1, 2, 3]
    assert [block.local_row(row) for row in flat_rows.tolist()] == [0, 1, 2, 3]
    with pytest.raises(IndexError, match=r"row 8 of table emb\.0 is not among"):
        block.local_row(8)
    assert torch.equal(shard(torch.arange(72.0).view(ROWS, DIM), block).local[:, 0], 6.0 * flat_rows)


def test_sparse_gradients_are_cut_and_widened() -> None:
    values = torch.arange(9.0).view(3, 3)
    for block in (BLOCKS["columns"], BLOCKS["both"]):
        ids = torch.tensor([0, 5, 2])
        flat = flat_sparse(ids, values, (ROWS, DIM), block)
        expected = torch.zeros(ROWS, DIM)
        expected[ids + block.rows[0][0], 2:5] = values
        assert torch.equal(flat.to_dense(), expected)
        assert torch.equal(local_sparse(flat.coalesce(), block).to_dense(), block.cut(expected))


# ------------------------------------------------------------------------------------------------------------- swapping


def test_swapping_keeps_the_identity_of_a_parameter() -> None:
    parameter = nn.Parameter(torch.randn(ROWS, DIM))
    flat = parameter.detach().clone()
    optimizer = torch.optim.SGD([parameter], 0.1)
    module = nn.EmbeddingBag(ROWS, DIM)
    module.weight = parameter
    before = id(parameter)
    swap_contents(parameter, nn.Parameter(shard(flat, BLOCKS["rows"])))
    assert id(module.weight) == id(optimizer.param_groups[0]["params"][0]) == before
    assert isinstance(module.weight, ShardedTable)
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.requires_grad
    assert_is_block_of(module.weight, flat, BLOCKS["rows"])
    assert module.weight.block == BLOCKS["rows"]
    parameter.grad = shard(torch.ones(ROWS, DIM), BLOCKS["rows"])
    optimizer.step()
    assert torch.equal(parameter.local, flat[3:9] - 0.1)


def test_a_parameter_that_an_autograd_graph_holds_is_not_swapped() -> None:
    parameter = nn.Parameter(torch.randn(ROWS, DIM))
    flat = parameter.detach().clone()
    held = parameter * 2
    with pytest.raises(RuntimeError, match="by an autograd graph that is still alive"):
        swap_contents(parameter, nn.Parameter(shard(flat, BLOCKS["rows"])))
    assert type(parameter) is nn.Parameter
    assert torch.equal(held, flat * 2)
    del held
    swap_contents(parameter, nn.Parameter(shard(flat, BLOCKS["rows"])))
    assert isinstance(parameter, ShardedTable)


def test_every_element_of_a_table_is_in_one_block_of_a_grid() -> None:
    flat = torch.randn(ROWS, DIM)
    covered = torch.zeros(ROWS, DIM)
    for rows, columns in itertools.product([(0, 5), (5, 12)], [(0, 1), (1, 6)]):
        block = Block("emb.0", (rows,), columns)
        block.cut(covered).add_(1)
        assert torch.equal(shard(flat, block).local, flat[rows[0] : rows[1], columns[0] : columns[1]])
    assert torch.equal(covered, torch.ones(ROWS, DIM))
