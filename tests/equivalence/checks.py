"""What must be equal: graphs before and after each pass, and the compiled model and the flat one through training."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from dmt_compile import SimulatedWorld
from dmt_compile.certification import GRADIENT_PASSES
from dmt_compile.ir import id_ops
from dmt_compile.ir.pass_base import PassReport, calls, placeholders
from dmt_compile.ir.stages import Effect
from dmt_compile.pipeline import passes_in_order
from dmt_compile.runtime.simulated_world import _LockstepProgram
from tests._tolerances import assert_reordered, error
from tests.equivalence.models import BAGS, Batch, Flat, Spec, concatenate
from tests.equivalence.strategies import STEPS, Case, World
from tests.models import dense_of
from tests.passes._harness import Captured, capture

LONGEST_SUM = 640  # ids of one row in a global batch: 16 ranks, 5 samples, 4 ids, 2 features

Outputs = Sequence[tuple[torch.Tensor, ...]]  # of every rank
Gradients = dict[str, torch.Tensor]
RunAll = Callable[[Sequence[Batch]], Outputs]


@dataclass
class Tally:
    """How many cases of each kind were compared, and the largest error of each class of claim."""

    cases: Counter[str] = field(default_factory=Counter)
    compared: Counter[Effect] = field(default_factory=Counter)
    largest: dict[Effect, float] = field(default_factory=lambda: {Effect.EXACT: 0.0, Effect.REORDERED: 0.0})

    def compare(
        self, effect: Effect, actual: torch.Tensor, expected: torch.Tensor, what: object, gradient: bool = False
    ) -> None:
        """Assert that a claim holds and remember how far the numbers were apart."""
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape, (
            f"{what}: expected shape {tuple(expected.shape)}, found {tuple(actual.shape)}"
        )
        self.compared[effect] += 1
        self.largest[effect] = max(self.largest[effect], error(actual, expected))
        if effect is Effect.EXACT:
            assert torch.equal(actual, expected), f"{what}: expected equal numbers, error {error(actual, expected):.2e}"
            return
        try:
            assert_reordered(actual, expected, LONGEST_SUM, gradient)
        except AssertionError as failure:
            raise AssertionError(f"{what}: {failure}") from failure


def check(case: Case, tally: Tally) -> None:
    """Compare everything of one case.

    Raises:
        AssertionError: a claim does not hold.
        DmtError: the compiler refuses what it must take.
    """
    model = case.spec.build()
    initial = copy.deepcopy(model.state_dict())
    first = case.worlds[0].batches(case.spec, 0)[0]
    captured = capture(model, (first,))
    names = {name: key for name, value in captured.ctx.inputs.items() for key in first if first[key] is value}
    for number, world in enumerate(case.worlds):
        lowered = captured.on(str(world.topology), **world.options)
        claim = check_passes(lowered, model, names, world, tally)
        layouts = [node.meta["val"] for node in calls(lowered.gm, id_ops.layout)]
        order = layouts[0].sample_order if layouts else range(world.topology.world_size)
        if number:  # the graph that the passes left; tracing takes longest, so one capture serves several worlds
            check_pipeline(case, model, world, partial(run, lowered, names, world), order, claim, tally)
            model.load_state_dict(initial)
        else:  # as a user would
            fresh, simulated = case.spec.build(), SimulatedWorld(world.topology)
            step = partial(simulated.run, fresh, dense_compiler="eager", **world.options)
            check_pipeline(case, fresh, world, step, order, claim, tally)


# --------------------------------------------------------------------------------------------------------- a pass alone


def check_passes(graph: Captured, model: Flat, names: dict[str, str], world: World, tally: Tally) -> Effect:
    """Compare the graph before each pass with the graph after it, on every rank; return the outputs' claim."""
    ranks = world.topology.world_size
    batches = world.batches(model.spec, 0)
    outputs: Outputs = [model(batch) for batch in batches]
    gradients = gradients_of(model, outputs, world.seed)
    flat_gradients, claim = gradients, Effect.EXACT
    for step in passes_in_order(graph.ctx.options):
        effect = effect_on_outputs(step.name, step.effect, graph.advance(step.name))
        claim = max(claim, effect)
        after = run(graph, names, world, batches)
        for mine, theirs in zip(after, outputs, strict=True):
            for position, (new, old) in enumerate(zip(mine, theirs, strict=True)):
                tally.compare(effect, new, old, (step.name, "output", position))
        new_gradients = gradients_of(model, after, world.seed)
        tables = {id(table.parameter) for table in graph.ctx.embedding_graph.tables}
        for name, parameter in trained(model).items():
            if name.startswith("gates."):  # their gradients cross the exchange: only the whole way gives the mean
                continue
            averaged = {"lower_to_sptt": id(parameter) in tables, "sync_dense_gradients": id(parameter) not in tables}
            factor = 1 / ranks if averaged.get(step.name) else 1.0
            tally.compare(
                Effect.REORDERED, new_gradients[name], gradients[name] * factor, (step.name, name), gradient=True
            )
        tally.cases["pass alone"] += 1
        outputs, gradients = after, new_gradients
    for name, gradient in gradients.items():
        tally.compare(Effect.REORDERED, gradient, flat_gradients[name] / ranks, ("all passes", name), gradient=True)
    return claim


def effect_on_outputs(name: str, effect: Effect, report: PassReport) -> Effect:
    """Return what a pass that ran claims of the outputs."""
    claimed = effect if report.effect is None else report.effect
    return claimed if report.changed and name not in GRADIENT_PASSES else Effect.EXACT


def run(graph: Captured, names: dict[str, str], world: World, batches: Sequence[Batch]) -> Outputs:
    """Run a graph at any stage on every rank; sizes, which ``normalize_graph`` reads off tensors, are left out."""
    inputs = [{**graph.ctx.parameters, **{name: batch[key] for name, key in names.items()}} for batch in batches]
    arguments = [tuple(values.get(node.name) for node in placeholders(graph.gm)) for values in inputs]
    with torch.set_grad_enabled(graph.ctx.training):
        return _LockstepProgram(graph.gm, SimulatedWorld(world.topology)).run(arguments)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model: Flat, outputs: Outputs, seed: int) -> Gradients:
    """Return dense gradients of a fixed random sum of every rank's outputs."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    losses = [
        (tensor * torch.randn(tensor.shape, generator=generator)).sum() for rank_out in outputs for tensor in rank_out
    ]
    torch.stack(losses).sum().backward()
    return {name: dense_of(p.grad, p) for name, p in trained(model).items()}


# --------------------------------------------------------------------------------------------------- the whole pipeline


def check_pipeline(
    case: Case, model: Flat, world: World, run_all: RunAll, order: Sequence[int], claim: Effect, tally: Tally
) -> None:
    """Compare the compiled model with the flat one: outputs, gradients, and weights after some steps.

    ``run_all`` runs ``model`` on a batch of every rank; ``order`` is that of the ranks' samples in a lookup.
    """
    model.zero_grad()
    flat, ranks = copy.deepcopy(model), world.topology.world_size
    if claim is Effect.EXACT:
        check_table_gradients(case.spec, model, flat, world, run_all, order, tally)
    optimizers = [optimizers_of(case.optimizer, bare) for bare in (model, flat)]
    for step in range(STEPS):
        batches = world.batches(case.spec, step)
        outputs = run_all(batches)
        expected = [flat(batch) for batch in batches]
        for rank, (mine, theirs) in enumerate(zip(outputs, expected, strict=True)):
            for position, (new, old) in enumerate(zip(mine, theirs, strict=True)):
                # From the first step on, weights differ by what gradients do.
                tally.compare(Effect.REORDERED if step else claim, new, old, (f"step {step}", rank, position))
        loss(outputs, world.seed + step).backward()
        (loss(expected, world.seed + step) / ranks).backward()
        for (name, mine), theirs in zip(trained(model).items(), trained(flat).values(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), (step, name)
            assert mine.grad is None or mine.grad.layout == theirs.grad.layout, (step, name)
            gradients = dense_of(mine.grad, mine), dense_of(theirs.grad, theirs)
            tally.compare(Effect.REORDERED, *gradients, (f"step {step}", name), gradient=True)
        for optimizer in (*optimizers[0], *optimizers[1]):
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
        tally.compare(Effect.REORDERED, mine, theirs, (f"weights after {case.optimizer}", name), gradient=True)
    tally.cases["pipeline"] += 1


def loss(outputs: Outputs, seed: int) -> torch.Tensor:
    """Return the sum of every rank's loss, too small for a step to overshoot: divergence multiplies rounding."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for pooled, scores in outputs:
        weights = torch.randn(pooled.shape, generator=generator)
        losses.append(((pooled * weights).sum() / 8 + scores.square().sum()) / 64)
    return torch.stack(losses).sum()


def optimizers_of(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return optimizers for all parameters.

    ``eps`` is far above rounding noise: below it they would make steps of equal length out of a gradient that is zero
    and one that is almost so.
    """
    parameters = list(trained(model).values())
    if name == "SGD":
        return [torch.optim.SGD(parameters, 0.05)]
    if name == "Adagrad":
        return [torch.optim.Adagrad(parameters, 0.05, eps=1e-2)]
    sparse = [module.weight for module in model.emb if module.sparse and module.weight.requires_grad]
    dense = [p for p in parameters if all(p is not other for other in sparse)]
    lazy = [torch.optim.SparseAdam(sparse, 0.01, eps=1e-2)] if sparse else []
    return [torch.optim.Adam(dense, 0.01, eps=1e-2), *lazy]


def check_table_gradients(
    spec: Spec, model: Flat, flat: Flat, world: World, run_all: RunAll, order: Sequence[int], tally: Tally
) -> None:
    """Compare bitwise what an owner's table gets for the same incoming gradient.

    The flat model sees the samples in the order in which owners do: that of the ranks, or peer order.
    """
    ranks, generator = world.topology.world_size, torch.Generator().manual_seed(world.seed)
    batches = world.batches(spec, 0)
    outputs = run_all(batches)
    pooled = [outputs[rank][0] for rank in order]
    expected = flat(concatenate(spec, [batches[rank] for rank in order]))[0]
    weights = torch.randint(-8, 9, expected.shape, generator=generator).float()
    if expected.requires_grad:
        parts = weights.split([world.sizes[0][rank] for rank in order])
        torch.stack([(p * w).sum() for p, w in zip(pooled, parts, strict=True)]).sum().backward()
        (expected * (weights * (1 / ranks))).sum().backward()
    for index, (mine, theirs) in enumerate(zip(model.emb, flat.emb, strict=True)):
        kinds = [f.kind for f in spec.features if f.table == index]
        once = len(kinds) == 1 and kinds[0] in BAGS
        gradients = [dense_of(table.weight.grad, table.weight) for table in (mine, theirs)]
        effect = Effect.EXACT if once else Effect.REORDERED
        tally.compare(effect, *gradients, ("table gradient", index), gradient=True)
    for bare in (model, flat):
        bare.zero_grad()
