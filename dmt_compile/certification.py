"""Runs the compiled program and the flat model side by side and writes down how far they are apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from dmt_compile.api import explain
from dmt_compile.config import HOPS, Options
from dmt_compile.distinct_batches import Call, Reads, as_call, check_distinct, draw_calls, find_reads
from dmt_compile.errors import ConfigError
from dmt_compile.inspection.certificate import Certificate, Quantity
from dmt_compile.ir.stages import Effect
from dmt_compile.pipeline import PassRecord
from dmt_compile.plan import TowerPlan
from dmt_compile.runtime.session import world_size
from dmt_compile.runtime.simulated_world import SimulatedWorld
from dmt_compile.tolerances import absolute_error, lossy_limit, magnitude, reordered_limit, ulp_error
from dmt_compile.topology import Topology
from dmt_compile.towers import NAME
from dmt_compile.transformation import transform

# They act in the backward pass alone; every other pass counts towards what is claimed of outputs.
GRADIENT_PASSES = frozenset({"sync_dense_gradients"})


def certify(
    model: nn.Module,
    batch: Any,
    topology: str | Topology = "auto",
    *,
    kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    **options: Any,
) -> Certificate:
    """Compare the compiled program, on every rank of a topology in this process, with the flat model.

    Every rank has a batch of its own. The flat model, or with Tower Modules what :func:`dmt_compile.transform` makes of
    it for one process, runs eagerly on each; the loss is a fixed random sum of all outputs, and the program's gradients
    are compared with the mean over ranks of the flat model's. Claimed are:

    - of an output, the strongest effect of the passes that ran, those that only touch gradients left out. ``EXACT``
      holds where every number is equal, ``REORDERED`` and ``LOSSY`` within ``dmt_compile.tolerances``;
    - of a gradient, at least ``REORDERED``: samples, ranks and readers of a parameter add up in another order. A
      gradient that cancels out to rounding noise of the largest one (a bias before BatchNorm) may differ by that noise.

    Args:
        model: flat; it runs in its own mode (train or eval) and is left untouched, buffers and gradients included.
        batch: one local batch: a tuple is positional arguments, anything else the one argument. Rank 0 gets it, for the
            others different ones are drawn: ids rotated within their table's rows, lengths of bags exchanged, other
            columns of integers and samples of floats permuted. Or a list of one batch for each rank; a model whose one
            argument is a list gets it as ``(batch,)``.
        topology: ``"<hosts>x<local ranks>"``, a :class:`Topology`, or ``"auto"`` (the process group; else one rank).
        kwargs: keyword arguments of the model; a list of one mapping for each rank beside a list of batches.
        seed: of the drawn batches and of the loss.
        options: as for ``torch.compile(..., options=...)``.

    Raises:
        ConfigError: a bad option, equal batches, a model on the meta device, without a tensor as output, or one that
            draws random numbers (dropout in training mode).
        DmtError: what compiling or running the program raises.

    Cost: two copies of the model, one eager and one compiled step on every rank.
    """
    bare = getattr(model, "_orig_mod", model)
    if any(parameter.is_meta for parameter in bare.parameters()):
        raise ConfigError("certify: expected a model with values, found one on the meta device; build it on the CPU")
    parsed = Options.from_mapping({**options, "topology": topology})
    ranks = parsed.resolve_topology(world_size()) if parsed.topology == "auto" else Topology.parse(parsed.topology)
    mine, flat = copy.deepcopy(bare), copy.deepcopy(bare)
    with torch.enable_grad(), torch.random.fork_rng():
        calls, reads = _calls(bare, batch, kwargs, ranks.world_size, seed)
        explanation = explain(mine, calls[0][0], ranks, kwargs=calls[0][1], **options)
        if explanation.plan.tower_modules is not None:
            custom = parsed.tower_module if callable(parsed.tower_module) else None
            flat = transform(flat, calls[0][0], explanation.plan, kwargs=calls[0][1], tower_module=custom)
        expected = _run_flat(flat, calls)
        positional, keywords = [call[0] for call in calls], [call[1] for call in calls]
        actual = [_tensors(out) for out in SimulatedWorld(ranks).run(mine, positional, kwargs=keywords, **options)]
        _backward(expected, seed, 1 / ranks.world_size)
        _backward(actual, seed, 1.0)
    longest_sum = _longest_sum(bare, expected, reads, ranks.world_size)
    # The explanation is that of the first graph with tables; the dense compiler works on all of them.
    dense = Effect.EXACT if parsed.dense_compiler == "eager" else Effect.REORDERED
    claimed = max((_claimed(r) for r in explanation.passes if _touches_outputs(r)), default=dense)
    forms = [parsed.wire_forms(hop) for hop in HOPS]
    of_outputs = lossy_limit(forward for forward, _ in forms if forward)
    of_gradients = lossy_limit((form for pair in forms for form in pair if form), gradient=True)
    quantities = _outputs(actual, expected, max(claimed, dense), longest_sum, of_outputs)
    quantities += _gradients(mine, flat, max(explanation.effect, Effect.REORDERED), longest_sum, of_gradients)
    from dmt_compile import __version__

    return Certificate(
        effect=max(explanation.effect, dense),
        quantities=tuple(quantities),
        topology=str(ranks),
        seed=seed,
        longest_sum=longest_sum,
        options={name: _plain(value) for name, value in options.items()},
        versions={"torch": torch.__version__, "dmt_compile": __version__},
        plan_fingerprint=explanation.plan.fingerprint,
    )


def _claimed(record: PassRecord) -> Effect:
    """Return what a pass may do to an output: Tower Modules run for all peers' samples at once."""
    return Effect.REORDERED if record.effect is Effect.MODEL else record.effect


def _touches_outputs(record: PassRecord) -> bool:
    return bool(record.report.changed) and record.name not in GRADIENT_PASSES


def _plain(value: Any) -> Any:
    """Return an option as JSON can hold it; a plan by its fingerprint."""
    if isinstance(value, TowerPlan):
        return f"plan {value.fingerprint:016x}"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# -------------------------------------------------------------------------------------------------------------- batches


def _calls(
    model: nn.Module, batch: Any, kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, ranks: int, seed: int
) -> tuple[list[Call], Reads]:
    """Return every rank's arguments, all different, and what the model's lookups say of rank 0's."""
    if not isinstance(batch, list):
        if not isinstance(kwargs, Mapping | None):
            raise ConfigError("certify: expected one mapping for 'kwargs' beside one batch, found a list of them")
        call = as_call(batch, dict(kwargs or {}))
        reads = find_reads(model, call)
        return draw_calls(model, call, reads, ranks, seed), reads
    keywords = [kwargs or {}] * len(batch) if isinstance(kwargs, Mapping | None) else list(kwargs)
    if len(batch) != ranks or len(keywords) != ranks:
        raise ConfigError(
            f"certify: expected one batch for each of {ranks} ranks, found {len(batch)} and {len(keywords)} "
            "mappings of keywords; for a model whose one argument is a list pass (batch,)"
        )
    calls = [as_call(one, dict(words)) for one, words in zip(batch, keywords, strict=True)]
    check_distinct(calls)
    return calls, find_reads(model, calls[0])


# -------------------------------------------------------------------------------------------------------------- running


def _tensors(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's output by where they are in it."""
    leaves = tree_flatten_with_path(output)[0]
    return {f"output{keystr(path)}": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _run_flat(flat: nn.Module, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
    """Return the eager outputs of every rank's batch.

    Raises:
        ConfigError: nothing to compare, or numbers that no second run gives again.
    """
    before = _random_states()
    outputs = [_tensors(flat(*args, **kwargs)) for args, kwargs in calls]
    if not all(torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True)):
        raise ConfigError(
            "certify: expected a model without random numbers, found that it draws some; certify it after "
            "model.eval(), or with dropout set to 0"
        )
    if not outputs[0]:
        raise ConfigError("certify: expected tensors in the model's output (in tuples, lists or dicts), found none")
    return outputs


def _random_states() -> list[torch.Tensor]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _backward(outputs: Sequence[dict[str, torch.Tensor]], seed: int, factor: float) -> None:
    """Run the backward pass of a fixed random sum of all outputs."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for rank_outputs in outputs:
        for output in rank_outputs.values():
            weights = torch.randn(output.shape, generator=generator).to(output)
            if output.requires_grad:
                losses.append((output * weights).sum() * factor)
    if losses:
        torch.stack([loss.double() for loss in losses]).sum().backward()


def _longest_sum(model: nn.Module, outputs: Sequence[dict[str, torch.Tensor]], reads: Reads, ranks: int) -> int:
    """Return the terms of the longest sum: ids of the most-read table, samples, or the width of a layer."""
    widths = [max(p.shape) for n, p in model.named_parameters() if p.ndim and n not in reads.ids_by_table]
    samples = [len(tensor) for tensor in outputs[0].values() if tensor.ndim]
    return max(1, *widths, *(ranks * n for n in (*samples, *reads.ids_by_table.values())))


# ------------------------------------------------------------------------------------------------------------ comparing


def _outputs(
    actual: Sequence[dict[str, torch.Tensor]],
    expected: Sequence[dict[str, torch.Tensor]],
    effect: Effect,
    longest: int,
    lossy: float,
) -> list[Quantity]:
    missing = torch.empty(0)
    return [
        _quantity(
            name,
            "output",
            [(mine.get(name, missing), theirs[name]) for mine, theirs in zip(actual, expected, strict=True)],
            effect,
            longest,
            lossy,
            noise=0.0,
        )
        for name in expected[0]
    ]


def _gradients(mine: nn.Module, flat: nn.Module, effect: Effect, longest: int, lossy: float) -> list[Quantity]:
    # A layer that Tower Modules gave another size is where the flat one was, or beside it.
    of_mine = {name.removeprefix(f"{NAME}.replaced."): parameter for name, parameter in mine.named_parameters()}
    pairs = {
        name: (_gradient(of_mine[name]), _gradient(parameter))
        for name, parameter in flat.named_parameters()
        if parameter.requires_grad
    }
    largest = max((magnitude(expected) for _, expected in pairs.values()), default=0.0)
    return [
        _quantity(
            name,
            "gradient",
            [pair],
            effect,
            longest,
            lossy,
            noise=torch.finfo(pair[1].dtype).eps * math.sqrt(longest) * largest,
        )
        for name, pair in pairs.items()
    ]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient


def _quantity(
    name: str,
    kind: str,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    effect: Effect,
    longest: int,
    lossy: float,
    noise: float,
) -> Quantity:
    """Compare all ranks' values of one output or gradient; errors up to ``noise`` are forgiven."""
    scale = max(max(magnitude(expected) for _, expected in pairs), 1e-30)
    absolute = max(absolute_error(mine, theirs) for mine, theirs in pairs)
    dtype = pairs[0][1].dtype
    reordered = reordered_limit(dtype, longest, gradient=kind == "gradient")
    limit = 0.0 if effect is Effect.EXACT else max(reordered, lossy)
    return Quantity(
        name=name,
        kind=kind,
        effect=effect,
        max_abs_error=absolute,
        max_relative_error=absolute / scale,
        max_ulp_error=max(ulp_error(mine, theirs) for mine, theirs in pairs),
        limit=limit,
        holds=absolute <= max(limit * scale, noise) and all(a.dtype == b.dtype for a, b in pairs),
    )
