"""Measure on real samples how strongly a model's features interact."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dmt_compile import torch_internals
from dmt_compile.errors import ConfigError
from dmt_compile.partition.interaction import InteractionMatrix
from dmt_compile.partition.probe import Probe
from dmt_compile.partition.signals import SIGNALS, OfVectors, Signal


def interactions(
    model: nn.Module,
    batches: Iterable[Any],
    signal: str | Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = "cosine",
    *,
    kwargs: Mapping[str, Any] | None = None,
    output: Callable[[Any], torch.Tensor] | None = None,
    seed: int = 0,
) -> InteractionMatrix:
    """Measure how strongly the features of a flat, trained model interact, for coherent or diverse towers.

    Args:
        model: flat, with weights that mean something: a short training of the flat model does. It runs in evaluation
            mode and is left as it was.
        batches: a list or an iterator of real batches, read once, one at a time; a tuple is a model's positional
            arguments, anything else the one argument.
        signal: ``"cosine"`` (the paper's: absolute cosine of embeddings), ``"nid"`` (from the layer that reads the
            joined features), ``"archdetect"`` (second differences of the score), or a function from each feature's
            vectors (B, D) by name to the batch's mean interaction (F, F), from 0 to 1.
        kwargs: keyword arguments of the model.
        output: takes the scores (B,) from what the model returns, for ``"nid"`` and ``"archdetect"``; by default its
            first floating tensor. Scores before the sigmoid tell more than probabilities.
        seed: of ``"archdetect"``'s baselines.

    Returns:
        The matrix over all lookups that the compiler finds. A feature whose samples differ in their number of vectors
        (a ragged sequence that is used before it is pooled) interacts with nothing.

    Raises:
        ConfigError: unknown signal; no batch, no lookup; the signal cannot be read on this model.

    Cost: a trace of the model, then for each batch one forward pass (``"cosine"``), one with the over-arch's backward
        pass (``"nid"``), or 1 + F(F + 1)/2 of them (``"archdetect"``). Memory does not grow with the batches.
    Source: see :mod:`dmt_compile.partition.signals`.
    """
    measured = _signal(signal, seed)
    if isinstance(batches, tuple | torch.Tensor | Mapping):
        raise ConfigError(
            f"interactions: expected a list or an iterator of batches, found a {type(batches).__name__}, which is one "
            "batch; pass [batch]"
        )
    bare = getattr(model, "_orig_mod", model)
    if any(parameter.is_meta for parameter in bare.parameters()):
        raise ConfigError("interactions: expected a trained model, found parameters on the meta device; load weights")
    probe = Probe(output)
    modes = {module: module.training for module in bare.modules()}
    bare.eval()
    samples = 0
    try:
        compiled = torch.compile(bare, backend=probe.backend)
        with torch_internals.unlimited_recompiles(), torch.set_grad_enabled(measured.gradients):
            for batch in batches:
                positional = batch if isinstance(batch, tuple) else (batch,)

                def call(positional: tuple[Any, ...] = positional) -> Any:
                    return compiled(*positional, **(kwargs or {}))

                measured.observe(probe, call)
                samples += probe.samples
    finally:
        for module, training in modes.items():
            module.training = training
    if not samples:
        raise ConfigError(
            "interactions: expected lookups on at least one sample, found "
            + ("batches without any; pass real ones" if probe.features else "no lookup; see dmt_compile.explain")
        )
    features = tuple(probe.features)
    matrix = measured.matrix(features)
    if not np.isfinite(matrix).all():
        raise ConfigError("interactions: expected finite numbers, found nan or inf; the model's weights diverged")
    name = signal if isinstance(signal, str) else getattr(signal, "__name__", type(signal).__name__)
    tables = tuple(feature.table for feature in probe.features.values())
    return InteractionMatrix(features, tables, (matrix + matrix.T) / 2, name, samples)


def _signal(signal: str | Callable[..., torch.Tensor], seed: int) -> Signal:
    if not isinstance(signal, str):
        return OfVectors(signal)
    if signal not in SIGNALS:
        close = difflib.get_close_matches(signal, SIGNALS, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(map(repr, SIGNALS))}"
        raise ConfigError(f"interactions: expected a known signal, found {signal!r}; {advice}")
    return SIGNALS[signal](seed)
