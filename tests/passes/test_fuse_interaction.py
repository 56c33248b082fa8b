"""fuse_interaction: products of all pairs, and the triangle that is read of them, become one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld, pipeline
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.constant_ops import check_constant, digest_of
from dmt_compile.ir.pass_base import Pass, PassReport, calls
from dmt_compile.ir.stages import Effect
from dmt_compile.ir.verifier import verify
from dmt_compile.kernels.dot_interaction import reference, triton_kernel
from dmt_compile.passes.fuse_interaction import FuseInteraction
from examples.dlrm import example
from tests._tolerances import assert_reordered
from tests.models import DLRM, dense_of, make_batch
from tests.passes._harness import Captured, capture, dense, dlrm
from tests.zoo.dot import DOT
from tests.zoo.entry import Entry

DOT_PRODUCT = torch.ops.dmt.dot_interaction.default
VECTORS, DIM = 5, 4  # of ``Interaction``
LONGEST = 64  # no sum behind a number of these models has more terms


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pass choose kernels on a CPU, and run the reference for them: tests/kernels compares the two."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_kernel, "dot_interaction", lambda *args: reference.dot_interaction(*args[:-1]))
    backward = reference.dot_interaction_backward
    monkeypatch.setattr(triton_kernel, "dot_interaction_backward", lambda *args: backward(*args[:-1]))


def numbers(graph: Captured) -> list[torch.Tensor]:
    """Return the outputs, and in training the gradients of all parameters."""
    out = graph.outputs()
    if not graph.ctx.training:
        return [out]
    trained = [p for p in graph.ctx.parameters.values() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), trained, allow_unused=True)
    return [out.detach(), *(dense_of(g, p).detach() for g, p in zip(gradients, trained, strict=True))]


def run(graph: Captured) -> PassReport:
    """Run the pass after ``fold_joins``, and hold its graph to the rules."""
    if "fold_joins" not in graph.reports:
        graph.advance("fold_joins")
    before = graph.code()
    step = FuseInteraction("triton")
    with torch.set_grad_enabled(graph.ctx.training):
        report = graph.reports[step.name] = step.run(graph.gm, graph.ctx)
    graph.gm.recompile()
    verify(graph.gm, graph.ctx, step.gives, step.name)
    assert report.changed == bool(report.matched) == (graph.code() != before)
    return report


def fuse(graph: Captured) -> PassReport:
    """Run the pass, and hold its graph to the numbers of the one before it."""
    graph.advance("fold_joins")
    expected = numbers(graph)
    report = run(graph)
    for index, (mine, theirs) in enumerate(zip(numbers(graph), expected, strict=True)):
        if report.changed:
            assert_reordered(mine, theirs, LONGEST, gradient=index > 0)
        else:
            assert torch.equal(mine, theirs)
    return report


def how(graph: Captured, index: int = 0) -> tuple[Any, ...]:
    """Return whether a vector leads, the diagonal is read, and the triangle is the upper one."""
    _, leading, diagonal, upper, kernel, tf32 = graph.node(DOT_PRODUCT, index).args
    assert (kernel, tf32) == ("triton", False)
    return leading is not None, diagonal, upper


# -------------------------------------------------------------------------------------------------- models as they come


MODELS: dict[str, tuple[bool, bool, bool]] = {  # what leads, diagonal, upper
    "dlrm_index_lists": (True, False, False),
    "dlrm_with_diagonal": (True, True, False),
    "dlrm_einsum_padded": (False, True, False),
    "dlrm_upper_triangle": (True, False, True),
}
ENTRIES = {entry.name: entry for entry in DOT}


def captured(entry: Entry) -> Captured:
    torch.manual_seed(0)
    return capture(entry.build(), entry.batch(6, torch.Generator().manual_seed(0))).on("1x1")


@pytest.mark.parametrize("name", MODELS)
def test_dot_models_of_the_zoo(name: str) -> None:
    graph = captured(ENTRIES[name])
    report = fuse(graph)
    assert (report.matched, report.skipped) == (1, ())
    assert how(graph) == MODELS[name]
    assert graph.count(torch.bmm, torch.einsum) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dlrm_matmul", "both its triangles are read"),
        ("dlrm_mask", "its products leave the graph"),
        ("dlrm_concatenated", "no bmm, matmul or einsum"),
    ],
)
def test_dot_models_of_the_zoo_that_stay(name: str, reason: str) -> None:
    graph = captured(ENTRIES[name])
    report = fuse(graph)
    assert report.matched == 0
    assert [reason in why for _, why in report.skipped] == [True]


def test_dlrm_of_torchrec() -> None:
    from tests.zoo.libraries import TORCHREC

    entry = next(entry for entry in TORCHREC if entry.name == "torchrec.DLRM")
    graph = captured(entry)
    assert run(graph).matched == 1
    assert how(graph) == (True, False, True)


def test_dlrm_of_the_example() -> None:
    model, batch = example()
    graph = capture(model, batch).on("1x1")
    assert fuse(graph).matched == 1
    assert how(graph) == (True, False, False)
    assert graph.count(check_constant) == 2


# ------------------------------------------------------------------------------------------------ ways to write it down


class Interaction(nn.Module):
    """Tables, a bottom layer, and what ``interact(model, dense, vectors)`` makes of them; a layer over it."""

    def __init__(self, interact: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.EmbeddingBag(6 + i, DIM, mode="sum") for i in range(VECTORS - 1))
        self.bottom = nn.Linear(3, DIM)
        self.register_buffer("tril", torch.tril_indices(VECTORS, VECTORS, -1))
        self.register_buffer("flat", self.tril[0] * VECTORS + self.tril[1])
        self.register_buffer("shuffled", self.tril[:, torch.randperm(self.tril.shape[1])])
        self.trained = nn.Parameter(torch.arange(10.0))
        self.interact = interact

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.bottom(x)
        vectors = torch.stack([x, *(table(ids[:, i : i + 1]) for i, table in enumerate(self.tables))], dim=1)
        return self.interact(self, x, vectors)


def batch(samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 3, generator=generator), torch.randint(0, 6, (samples, 4), generator=generator)


def written_as(interact: Callable[..., torch.Tensor]) -> Captured:
    return capture(Interaction(interact), batch()).on("1x1")


def z(v: torch.Tensor) -> torch.Tensor:
    return torch.bmm(v, v.transpose(1, 2))


def made(offset: int = -1) -> Any:
    return torch.tril_indices(VECTORS, VECTORS, offset)


MATCHED: dict[str, tuple[tuple[bool, bool, bool], Callable[..., torch.Tensor]]] = {
    "buffer": ((True, False, False), lambda m, x, v: torch.cat([x, z(v)[:, m.tril[0], m.tril[1]]], 1)),
    "made": ((True, True, False), lambda m, x, v: torch.cat([x, z(v)[:, made(0)[0], made(0)[1]]], dim=-1)),
    "other side": ((True, False, False), lambda m, x, v: torch.cat([x, z(v)[:, m.tril[1], m.tril[0]]], 1)),
    "flat index": ((True, False, False), lambda m, x, v: torch.cat([x, z(v).flatten(1)[:, m.flat]], 1)),
    "index_select": (
        (True, False, False),
        lambda m, x, v: torch.concat((x, z(v).view(x.shape[0], -1).index_select(1, m.flat)), 1),
    ),
    "gather": (
        (True, False, False),
        lambda m, x, v: torch.cat([x, z(v).flatten(1).gather(1, m.flat.expand(x.shape[0], -1))], 1),
    ),
    "einsum": (
        (True, False, False),
        lambda m, x, v: torch.cat([x, torch.einsum("bid, bjd -> bij", v, v)[:, m.tril[0], m.tril[1]]], 1),
    ),
    "matmul": ((True, False, False), lambda m, x, v: torch.cat([x, (v @ v.mT)[:, m.tril[0], m.tril[1]]], 1)),
    "permute": (
        (True, False, False),
        lambda m, x, v: torch.cat([x, torch.matmul(v, v.permute(0, 2, 1))[:, m.tril[0], m.tril[1]]], 1),
    ),
    "two views": (
        (True, False, False),
        lambda m, x, v: torch.cat(
            [
                x,
                torch.bmm(v.view(-1, VECTORS, DIM), v.view(-1, VECTORS, DIM).swapaxes(-1, -2))[:, m.tril[0], m.tril[1]],
            ],
            1,
        ),
    ),
    "alone": ((False, False, False), lambda m, x, v: torch.tanh(z(v)[:, m.tril[0], m.tril[1]])),
    "last": ((False, False, False), lambda m, x, v: torch.cat([z(v)[:, m.tril[0], m.tril[1]], x], 1)),
    "between": ((True, False, False), lambda m, x, v: torch.cat([x, x * 2, z(v)[:, m.tril[0], m.tril[1]], x], 1)),
    "read twice": (
        (False, False, False),
        lambda m, x, v: (lambda pairs: torch.cat([x, pairs], 1).sum(1) + pairs.sum(1))(z(v)[:, m.tril[0], m.tril[1]]),
    ),
    "another type in front": (
        (False, False, False),
        lambda m, x, v: torch.cat([x.double(), z(v)[:, m.tril[0], m.tril[1]]], 1),
    ),
}


@pytest.mark.parametrize("case", MATCHED)
def test_what_is_fused(case: str) -> None:
    expected, interact = MATCHED[case]
    graph = written_as(interact)
    report = fuse(graph)
    assert (report.matched, report.skipped) == (1, ())
    assert how(graph) == expected
    assert graph.count(torch.bmm, torch.matmul, torch.einsum) == 0


def test_columns_are_vectors_too() -> None:
    def interact(m: Any, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.triu_indices(DIM, DIM, 1)
        return torch.bmm(v.transpose(1, 2), v)[:, rows, columns]

    graph = written_as(interact)
    assert fuse(graph).matched == 1
    assert graph.node(DOT_PRODUCT).args[0].meta["val"].shape[1:] == (DIM, VECTORS)


def test_two_interactions_of_one_model() -> None:
    def interact(m: Any, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pairs = [z(vectors)[:, m.tril[0], m.tril[1]] for vectors in (v, torch.tanh(v))]
        return torch.cat([x, *pairs], dim=1)

    graph = written_as(interact)
    assert fuse(graph).matched == 2
    assert graph.count(check_constant) == 1


REASONS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "all": ("both its triangles are read", lambda m, x, v: torch.tanh(z(v).flatten(1))),
    "softmax": ("softmax selects no triangle", lambda m, x, v: torch.softmax(z(v), 2).flatten(1)),
    "read twice": (
        "its products are read 2 times",
        lambda m, x, v: (lambda p: p[:, m.tril[0], m.tril[1]] + p.sum())(z(v)),
    ),
    "another order": ("no triangle in the order", lambda m, x, v: z(v)[:, m.shuffled[0], m.shuffled[1]]),
    "some of it": ("add selects no triangle", lambda m, x, v: z(v)[:, 1:, 0] + z(v)[:, 0, 1:]),
    "one row": ("selects no triangle", lambda m, x, v: torch.tanh(z(v)[:, 0])),
    "by the batch": (
        "depend on the batch or are trained",
        lambda m, x, v: z(v)[:, m.tril[0] + (x.sum() > 1e9).long(), m.tril[1]],
    ),
    "trained": (
        "depend on the batch or are trained",
        lambda m, x, v: z(v).flatten(1)[:, m.flat + (m.trained > 1e9).long()],
    ),
    "indices written to": (
        "its indices are written to",
        lambda m, x, v: (lambda flat: z(v).flatten(1)[:, flat.add_(0)])(m.flat * 1),
    ),
    "indices written to before": (
        "its indices are written to",
        lambda m, x, v: (lambda flat: (flat[:2].zero_(), z(v).flatten(1)[:, flat])[1])(m.flat * 1),
    ),
    "across samples": (
        "no triangle in the order",
        lambda m, x, v: torch.take(z(v), m.flat.expand(x.shape[0], -1)),
    ),
    "double": ("no kernel for float64", lambda m, x, v: z(v.double())[:, m.tril[0], m.tril[1]]),
    "not its own": ("no bmm, matmul or einsum", lambda m, x, v: torch.bmm(v, (v * 2).mT)[:, m.tril[0], m.tril[1]]),
    "without a transpose": (
        "no bmm, matmul or einsum",
        lambda m, x, v: torch.bmm(v[:, :DIM], v[:, :DIM])[:, made()[0, :6], made()[1, :6]],
    ),
    "other sums": (
        "no bmm, matmul or einsum",
        lambda m, x, v: torch.einsum("bij,bkl->bik", v, v)[:, m.tril[0], m.tril[1]],
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_stays_and_why(case: str) -> None:
    reason, interact = REASONS[case]
    graph = written_as(interact)
    report = fuse(graph)
    assert report.matched == 0
    assert any(reason in why for _, why in report.skipped), report.skipped


def test_vectors_that_are_written_to_later_stay() -> None:
    def interact(m: Any, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        products, flat = z(v), v.flatten(1)
        v.mul_(2)
        return torch.cat([x, products[:, m.tril[0], m.tril[1]], flat], dim=1)

    graph = capture(Interaction(interact), batch(), training=False).on("1x1")
    assert [why for _, why in fuse(graph).skipped] == ["its vectors are written to in place"]


def test_a_leading_vector_that_is_written_to_later_stays_apart() -> None:
    def interact(m: Any, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.cat([x * 1, z(v)[:, m.tril[0], m.tril[1]]], 1)
        return out

    def then_written(m: Any, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        flat = doubled.view(-1)
        out = torch.cat([doubled, z(v)[:, m.tril[0], m.tril[1]]], 1)
        doubled.zero_()
        return out + flat.sum()

    for model, leads in ((interact, True), (then_written, False)):
        graph = written_as(model)
        assert fuse(graph).matched == 1
        assert how(graph)[0] is leads


def test_indices_without_numbers_stay() -> None:
    graph = written_as(MATCHED["buffer"][1])
    graph.advance("fold_joins")
    name = graph.input("tril").name
    graph.ctx.parameters[name] = graph.ctx.parameters[name].to("meta")
    report = FuseInteraction("triton").run(graph.gm, graph.ctx)
    assert [why for _, why in report.skipped] == ["its indices are in a buffer without numbers"]


# -------------------------------------------------------------------------------------------------- buffers that change


def test_a_buffer_is_held_to_its_values() -> None:
    graph = written_as(MATCHED["buffer"][1])
    assert fuse(graph).matched == 1
    buffer = graph.ctx.parameters[graph.input("tril").name]
    expected = graph.outputs()
    buffer.copy_(buffer.clone())  # as load_state_dict does
    assert torch.equal(graph.outputs(), expected)
    buffer[0, 0] = 0
    with pytest.raises(UnsupportedGraphError, match=r"expected the values in tril .* found others"):
        graph.outputs()


@pytest.mark.parametrize("change", ["in place", "data", "another tensor"])
def test_every_change_of_a_buffer_is_seen(change: str) -> None:
    buffer = torch.arange(4)
    digest = digest_of(buffer)
    check_constant(buffer, digest, "b")
    if change == "in place":
        buffer += 1
    elif change == "data":
        buffer.data = buffer + 1
    else:
        buffer = buffer + 1
    with pytest.raises(UnsupportedGraphError, match="expected the values in b"):
        check_constant(buffer, digest, "b")


def test_a_digest_tells_types_and_shapes_apart() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(0), torch.zeros(())]
    assert len({digest_of(tensor) for tensor in zeros}) == len(zeros)
    assert digest_of(torch.zeros(2, 4)[:, ::2]) == digest_of(torch.zeros(2, 2))
    with torch.inference_mode():
        buffer = torch.zeros(2)
        check_constant(buffer, digest_of(buffer), "b")


# ---------------------------------------------------------------------------------------------------- towers and others


@pytest.mark.parametrize(("kind", "options"), [("dlrm", {}), ("dlrm", {"dim": 4, "c": 1, "p": 1}), ("dot", {"dim": 4})])
def test_products_of_what_towers_send(kind: str, options: dict[str, Any]) -> None:
    graph = dlrm("2x2", tower_module=kind, tower_module_options=options)
    report = run(graph)
    assert (report.matched, report.skipped) == (1, ())
    assert how(graph)[1:] == (False, False)


@pytest.mark.parametrize("topology", ["1x1", "2x2"])
def test_it_is_part_of_a_dense_region(topology: str) -> None:
    graph = dlrm(topology)
    assert run(graph).matched == 1
    graph.advance("overlap_collectives")
    regions = [module.graph_module for module in graph.gm.children()]
    assert [len(calls(region, DOT_PRODUCT)) for region in regions if calls(region, DOT_PRODUCT)] == [1]
    assert graph.count(check_constant) == 2


@pytest.fixture
def in_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pass use its kernel, and no other."""
    order = pipeline.passes_in_order

    def with_it(options: Any) -> tuple[Pass, ...]:
        return tuple(FuseInteraction("triton") if step.name == "fuse_interaction" else step for step in order(options))

    monkeypatch.setattr(pipeline, "passes_in_order", with_it)


@pytest.mark.usefixtures("in_the_pipeline")
@pytest.mark.parametrize("dense_compiler", ["aot_eager", "inductor"])
def test_compiled_models_are_the_eager_ones(dense_compiler: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    flat = DLRM(rows=(6, 5, 4))
    model = copy.deepcopy(flat)
    compiled = torch.compile(model, backend="dmt", options={"dense_compiler": dense_compiler})
    for samples in (4, 1, 7):
        given = make_batch(flat, samples, torch.Generator().manual_seed(samples))
        out, expected = compiled(*given), flat(*given)
        assert_reordered(out.detach(), expected.detach(), LONGEST)
        out.square().sum().backward()
        expected.square().sum().backward()
    for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_reordered(mine.grad, theirs.grad, LONGEST, gradient=True)


@pytest.mark.usefixtures("in_the_pipeline")
def test_ranks_compute_what_one_process_does() -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4))
    batches = [make_batch(model, samples, torch.Generator().manual_seed(samples)) for samples in (3, 2, 1, 4)]
    outputs = SimulatedWorld("2x2").run(model, batches, dense_compiler="eager")
    for out, given in zip(outputs, batches, strict=True):
        assert_reordered(out.detach(), model(*given).detach(), LONGEST)


def test_the_reference_changes_nothing() -> None:
    graph = dlrm()
    graph.advance("fold_joins")
    before = graph.code()
    report = FuseInteraction("reference").run(graph.gm, graph.ctx)
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert graph.code() == before


@pytest.mark.parametrize("dense_compiler", ["eager", "inductor"])
@pytest.mark.parametrize("topology", ["1x1", "2x2"])
def test_on_a_cpu_the_operators_stay_pytorchs(topology: str, dense_compiler: str) -> None:
    graph = dlrm(topology, dense_compiler=dense_compiler)
    graph.advance("fold_joins")
    expected = numbers(graph) if topology == "1x1" else []
    report = FuseInteraction().run(graph.gm, graph.ctx)
    graph.gm.recompile()
    verify(graph.gm, graph.ctx, FuseInteraction.gives, FuseInteraction.name)
    if (topology, dense_compiler) == ("1x1", "eager"):
        assert (report.changed, report.matched) == (False, 0)
        assert [why for _, why in report.skipped] == [
            "gradients stay the eager model's, bit for bit; Triton's interpreter is for tests; ask for it with "
            "kernels='triton'"
        ]
        return
    assert report.matched == 1
    assert report.notes == (
        "1 by reference; not triton: Triton's interpreter is for tests; ask for it with kernels='triton'",
    )
    assert report.effect is (Effect.EXACT if topology == "2x2" else None)
    for index, (mine, theirs) in enumerate(zip(numbers(graph) if expected else [], expected, strict=True)):
        if index:
            assert_reordered(mine, theirs, LONGEST, gradient=True)
        else:
            assert torch.equal(mine, theirs)


def test_a_model_without_products_says_so() -> None:
    report = fuse(dense())
    assert [why for _, why in report.skipped] == ["no bmm, matmul or einsum of vectors with their own transpose"]


def test_a_kernel_that_cannot_run_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = run(dlrm())
    assert [why for _, why in report.skipped] == [
        "Triton has no kernels for cpu, but in its interpreter (TRITON_INTERPRET=1)"
    ]


def test_another_order_of_sums() -> None:
    assert FuseInteraction.effect is Effect.REORDERED
