"""Compare a compiled model of the zoo with eager: in one process, and on every rank of a simulated topology."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import dmt_compile
from dmt_compile.tolerances import absolute_error, magnitude, reordered_limit
from tests.models import dense_of
from tests.zoo.entry import Entry

LONGEST_SUM = 64  # samples of all ranks times ids, and the widest layer


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from eager's, relative to eager's largest magnitude, and how far it may be."""

    what: str
    error: float
    limit: float


def fresh(entry: Entry) -> nn.Module:
    """Return the model, the same each time, with nothing compiled before."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    return entry.build()


def compiled(model: nn.Module, dense_compiler: str = "eager") -> Callable[..., Any]:
    """Compile for one process."""
    return torch.compile(model, backend="dmt", options={"dense_compiler": dense_compiler})


def loss_of(output: Any) -> torch.Tensor:
    """Return a loss of everything a model returned, for batches of any size."""
    return torch.stack([leaf.square().sum() for leaf in tree_leaves(output)]).sum()


def compare_outputs(entry: Entry, actual: Any, expected: Any, where: str, exact: bool = True) -> list[Difference]:
    """Return how far outputs are apart."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return [
        _difference(f"{where}, output {i}", mine, theirs, 0.0 if exact and entry.exact else None)
        for i, (mine, theirs) in enumerate(pairs)
    ]


def compare_gradients(model: nn.Module, flat: nn.Module, where: str) -> list[Difference]:
    """Return how far the gradients of all parameters are apart; no gradient counts as zeros.

    A gradient that is zero but for rounding, such as a bias's before a batch norm, is held to 1/100 of the largest one.
    """
    expected = {name: dense_of(p.grad, p) for name, p in flat.named_parameters()}
    floor = max(map(magnitude, expected.values()), default=0.0) / 100
    return [
        _difference(f"{where}, gradient of {name}", dense_of(p.grad, p), expected[name], None, True, floor)
        for name, p in model.named_parameters()
    ]


def compare_state(model: nn.Module, flat: nn.Module) -> list[Difference]:
    """Return how far parameters and buffers are apart."""
    theirs = flat.state_dict()
    return [_difference(f"afterwards, {name}", mine, theirs[name]) for name, mine in model.state_dict().items()]


def _difference(
    what: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    limit: float | None = None,
    gradient: bool = False,
    floor: float = 0.0,
) -> Difference:
    error = absolute_error(actual, expected) / max(magnitude(expected), floor, 1e-12)
    return Difference(what, error, reordered_limit(expected.dtype, LONGEST_SUM, gradient) if limit is None else limit)


@dataclass(frozen=True)
class Alone:
    """What one process did: differences from eager, and the graphs that Dynamo made for all batches together."""

    differences: list[Difference]
    training_graphs: int
    evaluation_graphs: int


def sizes_for(entry: Entry, count: int, largest: int = 24) -> list[int]:
    """Return random batch sizes, the same each time: the two smallest that eager takes and the largest among them."""
    draw = random.Random(entry.name)
    sizes = [entry.smallest, max(entry.smallest, 1), largest]
    sizes += [draw.randint(entry.smallest, largest) for _ in range(count - len(sizes) - 1)]
    draw.shuffle(sizes)
    # First an ordinary one: from a batch of one sample, rules of PyTorch's own such as multi-head attention's learn 1.
    return [largest // 2, *sizes]


def compare_alone(entry: Entry, shapes: int, evaluate: bool = True, dense_compiler: str = "eager") -> Alone:
    """Train on ``shapes`` batches of changing sizes in one process, then evaluate; compare everything with eager."""
    model = fresh(entry)
    flat = copy.deepcopy(model)
    step_model = compiled(model, dense_compiler)
    exact = dense_compiler == "eager"
    generator = torch.Generator().manual_seed(1)
    found: list[Difference] = []
    for size in sizes_for(entry, shapes):
        batch = entry.batch(size, generator)
        output, expected = step_model(*batch), flat(*batch)
        found += compare_outputs(entry, output, expected, f"training on {size}", exact)
        loss_of(output).backward()
        loss_of(expected).backward()
        found += compare_gradients(model, flat, f"training on {size}")
        model.zero_grad()
        flat.zero_grad()
    training_graphs = counters["stats"]["unique_graphs"]
    model.eval()
    flat.eval()
    with torch.no_grad():
        for size in sizes_for(entry, shapes) if evaluate else ():
            batch = entry.batch(size, generator)
            found += compare_outputs(entry, step_model(*batch), flat(*batch), f"evaluation of {size}", exact)
    found += compare_state(model, flat)
    return Alone(found, training_graphs, counters["stats"]["unique_graphs"] - training_graphs)


def compare_ranks(entry: Entry, topology: str = "2x2", dense_compiler: str = "eager") -> list[Difference]:
    """Run two training steps on every rank; compare outputs with eager on the local batches, and mean gradients.

    The second step has a rank without samples, where the eager model takes an empty batch.
    """
    model = fresh(entry)
    flat = copy.deepcopy(model)
    world = dmt_compile.SimulatedWorld(topology)
    ranks = world.topology.world_size
    exact = dense_compiler == "eager"
    generator = torch.Generator().manual_seed(2)
    found: list[Difference] = []
    for sizes in ([4, 3, 2, 5], [2, max(entry.smallest, 1), entry.smallest, 3]):
        local = [entry.batch(sizes[rank % 4], generator) for rank in range(ranks)]
        outputs = world.run(model, local, dense_compiler=dense_compiler)
        for rank, (output, batch) in enumerate(zip(outputs, local, strict=True)):
            expected = flat(*batch)
            found += compare_outputs(entry, output, expected, f"rank {rank} of {sizes}", exact)
            (loss_of(expected) / ranks).backward()
        torch.stack([loss_of(output) for output in outputs]).sum().backward()
        found += compare_gradients(model, flat, f"ranks of {sizes}")
        model.zero_grad()
        flat.zero_grad()
    return found + compare_state(model, flat)


def explained(entry: Entry, topology: str = "2x2") -> dmt_compile.Explanation:
    """Explain the model on a batch of four samples."""
    return dmt_compile.explain(fresh(entry), entry.batch(4, torch.Generator().manual_seed(4)), topology=topology)
