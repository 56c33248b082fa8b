"""Steps done by the lookup itself against the same optimizers hooked to gradients by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup
from dmt_compile.optim import RowWiseAdagrad
from dmt_compile.runtime import in_backward
from dmt_compile.runtime.tables import Block, ShardedTable
from dmt_compile.torch_internals import swap_contents, swap_in_backward
from tests._tolerances import assert_reordered
from tests.in_backward import attach
from tests.models import DLRM, make_batch

ROWS, DIM, SAMPLES, STEPS = 20, 4, 9, 4
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.1}),
    "sparse_adam": (torch.optim.SparseAdam, {"lr": 0.1}),
    "row_wise_adagrad": (RowWiseAdagrad, {"lr": 0.1}),
}
LONGEST_SUM = 30
Feature = tuple[int, Pooling]  # which table, and how it is read
SPARSE = Pooling("sum", True)


class Trainer:
    """Tables with optimizers in the backward pass, and lookups of them; counts the steps that lookups did."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]],
        features: Sequence[Feature],
        fused: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        count = 1 + max(table for table, _ in features)
        self.tables = [nn.Parameter(torch.randn(ROWS, DIM, generator=generator).to(dtype)) for _ in range(count)]
        self.features, self.fused, self.steps, self.patch = features, fused, 0, patch
        attach(optimizer[0], self.tables, optimizer[1])

    def look_up(self, seed: int, samples: int = SAMPLES, features: Sequence[Feature] | None = None) -> torch.Tensor:
        """Return the features of a random batch; some bags are empty, and ids repeat."""
        features = self.features if features is None else features
        generator = torch.Generator().manual_seed(seed)
        ids, offsets = [], []
        for _, how in features:
            lengths = torch.randint(0, 4, (samples,), generator=generator)
            lengths = torch.ones_like(lengths) if how.mode == "none" else lengths
            first, end = how.field_rows or (0, ROWS)
            ids.append(torch.randint(first, end, (int(lengths.sum()),), generator=generator))
            offsets.append(None if how.mode == "none" else lengths.cumsum(0) - lengths)
        tables = [self.tables[table] for table, _ in features]
        return batched_lookup(tables, ids, offsets, tuple(how for _, how in features), samples)

    def train(self, *losses: Callable[[], torch.Tensor]) -> None:
        """Run one backward pass through the sum of losses."""
        step = in_backward.Reading.step

        def counted(reading: in_backward.Reading, *args: Any) -> None:
            self.steps += 1
            step(reading, *args)

        with self.patch.context() as patch:
            patch.setattr(in_backward.Reading, "step", counted)
            if not self.fused:
                patch.setattr(in_backward, "why_not", lambda *_: "the test wants it so")
            cast(torch.Tensor, sum(loss() for loss in losses)).backward()
        assert [table.grad for table in self.tables] == [None] * len(self.tables)

    def states(self) -> list[Any]:
        """Return what the optimizers keep, as their state dicts hold it."""
        return [table._in_backward_optimizers[0].state_dict() for table in self.tables]  # type: ignore[attr-defined]


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def assert_same(mine: Trainer, theirs: Trainer, exact: bool = True) -> None:
    """Assert that tables and optimizers' state are equal, bitwise or up to another order of sums."""

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            a, b = a.to_dense(), b.to_dense()
            assert torch.equal(a, b) if exact else assert_reordered(a, b, LONGEST_SUM, gradient=True) is None
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            [compare(a[key], b[key]) for key in a]
        elif isinstance(a, list):
            assert len(a) == len(b)
            [compare(*pair) for pair in zip(a, b, strict=True)]
        else:
            assert a == b

    compare([table.detach() for table in mine.tables], [table.detach() for table in theirs.tables])
    compare(mine.states(), theirs.states())


def trained(
    patch: pytest.MonkeyPatch, kind: str, features: Sequence[Feature], **options: Any
) -> tuple[Trainer, Trainer]:
    """Return tables that lookups stepped, and those that PyTorch's hooks did."""
    both = [Trainer(patch, OPTIMIZERS[kind], features, fused=fused, **options) for fused in (True, False)]
    for trainer in both:
        for seed in range(STEPS):
            trainer.train(lambda: loss_of(trainer.look_up(seed, SAMPLES if seed else 0)))  # noqa: B023
    assert [trainer.steps for trainer in both] == [STEPS * len(both[0].tables), 0]
    return both[0], both[1]


LOOKUPS: dict[str, list[Feature]] = {
    "one": [(0, SPARSE)],
    "several tables": [(0, SPARSE), (1, Pooling("mean", True)), (2, Pooling("none", True))],
    "a shared table": [(0, SPARSE), (1, SPARSE), (0, Pooling("mean", True)), (0, Pooling("none", True))],
    "padding": [(0, Pooling("sum", True, padding_idx=3)), (1, Pooling("none", True, padding_idx=5))],
    "counted padding": [(0, Pooling("mean", True, padding_idx=3, padding_counts=True))],
    "fields": [(0, Pooling("none", True, field_rows=rows)) for rows in ((0, 6), (6, 7), (7, ROWS))],
    "columns": [(0, Pooling("sum", True, columns=columns)) for columns in ((0, 1), (1, DIM))],
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", LOOKUPS)
def test_sparse_gradients_bit_for_bit(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = trained(monkeypatch, kind, LOOKUPS[name])
    assert_same(mine, theirs, exact=kind != "sgd")  # which takes gradients of a row one after the other


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_dense_gradients(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = [(table, how._replace(sparse=False)) for table, how in LOOKUPS[name]]
    mine, theirs = trained(monkeypatch, kind, dense)
    assert_same(mine, theirs, exact=False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(*trained(monkeypatch, kind, LOOKUPS["one"], dtype=dtype), exact=False)


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, "triton"), (torch.float64, "reference")])
def test_the_kernel_where_it_takes_the_table(dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE)], dtype=dtype)
    kernels: list[str] = []
    monkeypatch.setattr(in_backward.rows_op, "update_rows", lambda *arguments: kernels.append(arguments[-1]))
    monkeypatch.setattr(in_backward.rows_op.triton_support, "why_not", lambda device: None)
    gradient = torch.sparse_coo_tensor([[1]], torch.ones(1, DIM, dtype=dtype), (ROWS, DIM), check_invariants=False)
    in_backward.Reading(trainer.tables[0], [SPARSE]).step([gradient], "triton")
    in_backward.Reading(trainer.tables[0], [SPARSE]).step([gradient])
    assert kernels == [chosen, "reference"]


def test_weights_of_ids_get_the_gradient_of_the_rows_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["sgd"], [(0, SPARSE), (0, SPARSE)])
    before = trainer.tables[0].detach().clone()
    ids, offsets = torch.tensor([1, 2, 2]), torch.tensor([0, 1])
    weights = torch.ones(3, requires_grad=True)
    arguments = [trainer.tables * 2, [ids, ids], [offsets, offsets], (SPARSE, SPARSE), 2, [None, weights]]
    trainer.train(lambda: batched_lookup(*arguments).sum())
    assert trainer.steps == 1
    assert_reordered(cast(torch.Tensor, weights.grad), before[ids].sum(1), DIM)
    assert torch.equal(trainer.tables[0][1:3], before[1:3] - 0.1 * torch.tensor([[2.0], [4.0]]))


def test_options_that_change_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Trainer(monkeypatch, OPTIMIZERS["sgd"], [(0, SPARSE)], fused=fused) for fused in (True, False)]
    for trainer in both:
        [group] = trainer.tables[0]._in_backward_optimizers[0].param_groups  # type: ignore[attr-defined]
        for seed, options in enumerate([{"lr": 0.5}, {"lr": torch.tensor(0.2)}, {"momentum": 0.9}, {"momentum": 0}]):
            group.update(options)
            trainer.train(lambda: loss_of(trainer.look_up(seed)))  # noqa: B023
    assert [trainer.steps for trainer in both] == [3, 0]
    assert_same(*both, exact=False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_operators_in_one_backward_pass_give_one_step_of_their_sum(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [Trainer(monkeypatch, OPTIMIZERS[kind], [(0, SPARSE)], fused=fused) for fused in (True, False)]
    for trainer in both:
        for seed in range(STEPS):
            trainer.train(lambda: loss_of(trainer.look_up(seed)), lambda: loss_of(trainer.look_up(seed + 50, 3)))  # noqa: B023
        trainer.train(lambda: loss_of(trainer.look_up(99)))  # noqa: B023
    assert_same(*both, exact=kind != "sgd")
    assert [trainer.steps for trainer in both] == [1, 0]


def test_two_backward_passes_are_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE)], fused=fused) for fused in (True, False)]
    for trainer in both:
        first, second = loss_of(trainer.look_up(1)), loss_of(trainer.look_up(2))
        trainer.train(lambda: first)  # noqa: B023
        trainer.train(lambda: second)  # noqa: B023
        out = trainer.look_up(3)  # never trained
        del out
        trainer.train(lambda: loss_of(trainer.look_up(4)))  # noqa: B023
        trainer.train(lambda: loss_of(trainer.look_up(5)))  # noqa: B023
    assert_same(*both)
    assert both[0].steps == 3  # while the second waited, the first could not know whether they belong together


def test_a_loss_that_is_kept_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE)])
    history = []
    for seed in range(3):
        history.append(loss_of(trainer.look_up(seed)))
        trainer.train(lambda: history[-1])
    assert trainer.steps == 3


def test_gradient_from_elsewhere_is_refused_where_it_would_be_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE)])
    ids = torch.tensor([1, 2])
    with pytest.raises(
        UnsupportedGraphError, match=r"table of shape \(20, 4\) from lookups of the compiled model alone"
    ):
        trainer.train(
            lambda: torch.nn.functional.embedding(ids, trainer.tables[0], sparse=True).sum(),
            lambda: loss_of(trainer.look_up(1)),
        )


def test_an_earlier_gradient_is_part_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE)], fused=fused) for fused in (True, False)]
    for trainer in both:
        trainer.tables[0].grad = torch.sparse_coo_tensor([[2]], [[1.0] * DIM], (ROWS, DIM), check_invariants=False)
        trainer.train(lambda: loss_of(trainer.look_up(1)))  # noqa: B023
    assert_same(*both)
    assert both[0].steps == 0


def test_gradients_that_are_asked_for_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["sgd"], [(0, SPARSE), (1, SPARSE)])
    before = [table.detach().clone() for table in trainer.tables]
    gradients = torch.autograd.grad(trainer.look_up(1).sum(), trainer.tables)
    assert all(gradient.to_dense().any() for gradient in gradients)
    assert all(map(torch.equal, trainer.tables, before))
    trainer.look_up(1).sum().backward(inputs=[trainer.tables[1]])
    assert torch.equal(trainer.tables[0], before[0])
    assert not torch.equal(trainer.tables[1], before[1])


def test_frozen_tables_and_forward_passes_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, OPTIMIZERS["adagrad"], [(0, SPARSE), (1, SPARSE)])
    trainer.tables[1].requires_grad_(False)
    before = trainer.tables[1].detach().clone()
    with torch.no_grad():
        kept = trainer.look_up(0)
    trainer.train(lambda: loss_of(trainer.look_up(1)))
    assert kept is not None
    assert trainer.steps == 1
    assert torch.equal(trainer.tables[1], before)


class Another(torch.optim.SGD):
    """Steps in a way of its own."""


REASONS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Pooling]] = {
    "Adam is not known to leave rows without gradient as they are": (torch.optim.Adam, {}, SPARSE),
    "Another is not known to leave rows without gradient as they are": (Another, {}, SPARSE),
    "SGD with momentum moves rows without gradient": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, SPARSE),
    "SGD with weight_decay moves rows without gradient": (torch.optim.SGD, {"weight_decay": 0.1}, SPARSE),
    "Adagrad with weight_decay moves rows without gradient": (torch.optim.Adagrad, {"weight_decay": 0.1}, SPARSE),
    "Adagrad with maximize is not done on rows alone": (torch.optim.Adagrad, {"maximize": True}, SPARSE),
    "SparseAdam with maximize is not done on rows alone": (torch.optim.SparseAdam, {"maximize": True}, SPARSE),
    "SGD with differentiable is not done on rows alone": (torch.optim.SGD, {"differentiable": True}, SPARSE),
    "a lookup takes maxima or divides by frequencies, whose gradient is dense": (
        torch.optim.SGD,
        {},
        Pooling("max", False),
    ),
    "SparseAdam takes sparse gradients alone": (torch.optim.SparseAdam, {}, Pooling("sum", False)),
    "Adagrad with eps=0 makes rows without gradient NaN": (torch.optim.Adagrad, {"eps": 0.0}, Pooling("sum", False)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_not(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, options, how = REASONS[reason]
    trainer = Trainer(monkeypatch, (optimizer, options), [(0, how)])
    assert in_backward.why_not(trainer.tables[0], [SPARSE, how]) == reason


def test_why_not_for_what_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> nn.Parameter:
        [made] = Trainer(monkeypatch, OPTIMIZERS["sgd"], [(0, SPARSE)]).tables
        assert in_backward.why_not(made, [SPARSE]) is None
        return made

    hooked, stepped, twice = table(), table(), table()
    hooked.register_hook(lambda gradient: gradient)
    assert in_backward.why_not(hooked, [SPARSE]) == "hooks wait for its gradient"
    hooked = table()
    hooked.register_post_accumulate_grad_hook(lambda parameter: None)
    assert in_backward.why_not(hooked, [SPARSE]) == "hooks wait for its gradient"
    stepped._in_backward_optimizers[0].register_step_post_hook(lambda *_: None)  # type: ignore[attr-defined]
    assert in_backward.why_not(stepped, [SPARSE]) == "SGD has hooks around its step"
    attach(torch.optim.SGD, [twice], {"lr": 0.1})
    assert in_backward.why_not(twice, [SPARSE]) == "it has 2 optimizers in the backward pass"
    bare = nn.Parameter(torch.zeros(ROWS, DIM))
    attach(torch.optim.SGD, [bare], {"lr": 0.1}, register_hook=False)
    assert in_backward.why_not(bare, [SPARSE]) == "its optimizer has no hook in the backward pass"


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_done_here_is_done_by_pytorch(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, options, how = REASONS[reason]
    if optimizer in (torch.optim.Adam, torch.optim.SparseAdam) or "weight_decay" in options:
        how = how._replace(sparse=optimizer is torch.optim.SparseAdam)  # which other gradients these refuse
    if reason == "SparseAdam takes sparse gradients alone" or "differentiable" in options:
        return  # PyTorch refuses both
    both = [Trainer(monkeypatch, (optimizer, options), [(0, how)], fused=fused) for fused in (True, False)]
    for trainer in both:
        before = trainer.tables[0].detach().clone()
        trainer.train(lambda: loss_of(trainer.look_up(1)))  # noqa: B023
        assert not torch.equal(before, trainer.tables[0])
        assert trainer.steps == 0
    states = [[table.detach().nan_to_num(7.0) for table in trainer.tables] for trainer in both]
    assert all(map(torch.equal, *states))


BLOCKS = {
    "rows": Block("emb", ((3, 9),), (0, DIM)),
    "columns": Block("emb", ((0, ROWS),), (1, 3)),
    "ranges": Block("emb", ((1, 3), (6, 7), (9, 20)), (0, DIM)),
}


@pytest.mark.parametrize("after", [False, True], ids=["attached before sharding", "attached after"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_shard_steps_as_its_part_of_the_whole(kind: str, block: Block, sparse: bool, after: bool) -> None:
    torch.manual_seed(0)
    flat = nn.Parameter(torch.randn(ROWS, DIM))
    mine = nn.Parameter(flat.detach().clone())
    for table in [flat] if after else [flat, mine]:
        attach(OPTIMIZERS[kind][0], [table], OPTIMIZERS[kind][1])
    sharded = nn.Parameter(ShardedTable(block.cut(flat.detach()).clone(), flat.shape, block))
    swap_in_backward(mine, lambda: swap_contents(mine, sharded))
    if kind == "adagrad" and not after:  # as runtime.sharding does
        state = mine._in_backward_optimizers[0].state[mine]  # type: ignore[attr-defined]
        state["sum"] = ShardedTable(block.cut(state["sum"]).clone(), flat.shape, block)
    if after:
        attach(OPTIMIZERS[kind][0], [mine], OPTIMIZERS[kind][1])
    columns = None if block.columns == (0, DIM) else block.columns
    how = Pooling("sum", sparse, columns=columns)
    if kind == "sparse_adam" and not sparse:
        assert in_backward.why_not(mine, [how]) == "SparseAdam takes sparse gradients alone"
        return
    if kind == "row_wise_adagrad" and columns:
        assert in_backward.why_not(mine, [how]) == "a rank holds some columns of its rows only"
        return
    assert in_backward.why_not(mine, [how]) is None
    for step in range(STEPS):
        # the lookup of a shard counts rows from its first range on
        first, end = block.rows[-1]
        ids = torch.randint(first, end, (6,), generator=torch.Generator().manual_seed(step))
        of_field = how._replace(field_rows=(first, end))
        for table in (mine, flat):
            batched_lookup([table], [ids], [torch.tensor([0, 2, 2])], (of_field,), 3).square().sum().backward()
            assert table.grad is None
    local = cast(ShardedTable, mine)
    assert_reordered(local.local, block.cut(flat.detach()), LONGEST_SUM, gradient=True)
    assert not torch.equal(flat.detach()[ids], torch.zeros(6, DIM))
    own, theirs = (table._in_backward_optimizers[0].state[table] for table in (mine, flat))  # type: ignore[attr-defined]
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            part = block if value.shape[1] == DIM else Block("emb", block.rows, (0, 1))
            assert_reordered(own[key].local, part.cut(value), LONGEST_SUM, gradient=True)
        else:
            assert own[key] == value


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[in_backward.Reading]:
    """Return the readings that did a step."""
    torch._dynamo.reset()
    done: list[in_backward.Reading] = []
    step = in_backward.Reading.step
    monkeypatch.setattr(in_backward.Reading, "step", lambda r, *args: (done.append(r), step(r, *args))[1])
    return done


def models(kind: str, sparse: bool) -> list[DLRM]:
    """Return a model and its twin, their tables stepped in the backward pass."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DLRM(sparse=sparse)
        attach(OPTIMIZERS[kind][0], model.emb.parameters(), OPTIMIZERS[kind][1])
        made.append(model)
    return made


@pytest.mark.parametrize(("kind", "sparse"), [("adagrad", True), ("row_wise_adagrad", False)])
def test_a_program_of_one_process(kind: str, sparse: bool, steps: list[in_backward.Reading]) -> None:
    model, flat = models(kind, sparse)
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    generator = torch.Generator().manual_seed(1)
    for samples in (4, 1, 7):
        batch = make_batch(model, samples, generator)
        compiled(*batch).sum().backward()
        flat(*batch).sum().backward()
    compiled(*make_batch(model, 0, generator)).sum().backward()
    assert len(steps) == 4 * len(model.emb)
    for mine, theirs in zip(model.emb.parameters(), flat.emb.parameters(), strict=True):
        assert mine.grad is None
        assert_reordered(mine.detach(), theirs.detach(), LONGEST_SUM, gradient=True)


def test_an_optimizer_attached_after_the_first_call(steps: list[in_backward.Reading]) -> None:
    model = DLRM(sparse=True)
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": "eager"})
    generator = torch.Generator().manual_seed(1)
    compiled(*make_batch(model, 4, generator)).sum().backward()
    assert not steps
    model.zero_grad()
    attach(torch.optim.Adagrad, model.emb.parameters(), {"lr": 0.1})
    compiled(*make_batch(model, 4, generator)).sum().backward()
    assert len(steps) == len(model.emb)


@pytest.mark.parametrize(("kind", "sparse"), [("row_wise_adagrad", True), ("sparse_adam", True), ("sgd", False)])
def test_a_simulated_world(kind: str, sparse: bool, steps: list[in_backward.Reading]) -> None:
    model, flat = models(kind, sparse)
    world, generator = SimulatedWorld("2x2"), torch.Generator().manual_seed(1)
    for step in range(3):
        batches = [make_batch(model, (rank + step) % 4 + 1, generator) for rank in range(4)]
        sum(out.sum() for out in world.run(model, batches, dense_compiler="eager")).backward()  # type: ignore[union-attr]
        (sum(flat(*batch).sum() for batch in batches) / 4).backward()  # type: ignore[union-attr]
    assert len(steps) == 3 * len(model.emb)
    for mine, theirs in zip(model.emb.parameters(), flat.emb.parameters(), strict=True):
        assert_reordered(mine.detach(), theirs.detach(), LONGEST_SUM, gradient=True)


def test_pieces_of_several_ranks_give_one_step(steps: list[in_backward.Reading]) -> None:
    model, flat = models("adagrad", True)
    world, generator = SimulatedWorld("4x1"), torch.Generator().manual_seed(1)
    pieces = [["emb.0[:, 0:4]"], ["emb.0[:, 4:8]", "emb.2"], ["emb.3[0:20]", "emb.3[20:33]"], ["emb.1", "emb.4"]]
    for step in range(3):
        batches = [make_batch(model, (rank + step) % 4 + 1, generator) for rank in range(4)]
        outputs = world.run(model, batches, dense_compiler="eager", partition=pieces)
        sum(out.sum() for out in outputs).backward()  # type: ignore[union-attr]
        (sum(flat(*batch).sum() for batch in batches) / 4).backward()  # type: ignore[union-attr]
    whole_here = [reading.parameter for reading in steps]
    assert not any(parameter is model.emb[0].weight for parameter in whole_here)  # two ranks read it
    assert sum(parameter is model.emb[3].weight for parameter in whole_here) == 3  # one reads both pieces
    for mine, theirs in zip(model.emb.parameters(), flat.emb.parameters(), strict=True):
        assert_reordered(mine.detach(), theirs.detach(), LONGEST_SUM, gradient=True)
