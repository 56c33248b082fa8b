"""What tells that features interact: the signals that :func:`dmt_compile.interactions` measures.

Shape suffixes: F features, B samples, D width, H hidden units, V joined vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch

from dmt_compile.errors import ConfigError
from dmt_compile.partition.interaction import Matrix
from dmt_compile.partition.probe import Probe, Reader

MAX_ELEMENTS = 1 << 24  # of intermediate results; batches are taken in parts that need no more


class Mean:
    """A mean over samples that arrive batch by batch, summed in float64."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.samples = 0

    def add(self, mean: torch.Tensor, samples: int) -> None:
        """Count a batch's mean."""
        self.total = self.total + mean.detach().double().cpu().numpy() * samples
        self.samples += samples

    @property
    def value(self) -> Matrix:
        """The mean so far."""
        return np.asarray(self.total / max(self.samples, 1))


class Signal(ABC):
    """Looks at a model on one batch after the other, and says in the end how strongly features interact.

    ``gradients``: the model runs with gradients enabled.
    """

    gradients: ClassVar[bool] = False

    @abstractmethod
    def observe(self, probe: Probe, call: Callable[[], Any]) -> None:
        """Look at one batch; ``call`` runs the model on it."""

    @abstractmethod
    def matrix(self, features: tuple[str, ...]) -> Matrix:
        """Return the interaction of each pair (F, F), from 0 to 1."""


class OfVectors(Signal):
    """The mean over samples of what a function of the features' vectors says.

    Args:
        function: ``(vectors) -> (F, F)``: from each feature's vectors (B, D), by name, to the mean over the batch.
    """

    def __init__(self, function: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> None:
        self.function = function
        self.names: tuple[str, ...] = ()
        self.mean = Mean()

    def observe(self, probe: Probe, call: Callable[[], Any]) -> None:
        """Look at one batch: one forward pass."""
        call()
        vectors = probe.vectors()
        self.names = tuple(vectors)
        if vectors and probe.samples:
            self.mean.add(self.function(vectors), probe.samples)

    def matrix(self, features: tuple[str, ...]) -> Matrix:
        """Return the mean."""
        return _placed(self.mean.value, self.names, features)


def cosine(vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean over samples of the absolute cosine between each two features' vectors, (F, F), float32.

    A vector of zeros (an empty bag) has the cosine 0 with everything. So have features of different width, which share
    no space: a model that projects them to one is measured after its projection.

    Cost: one forward pass, and B F^2 D multiply-adds.
    Source: section 3.3 of the DMT paper. Averaging over samples what it leaves open: |cos|, not the vectors.
    """
    names = list(vectors)
    out_FF = torch.zeros(len(names), len(names))
    for width in dict.fromkeys(vector.shape[1] for vector in vectors.values()):
        members = [index for index, name in enumerate(names) if vectors[name].shape[1] == width]
        stacked_BFD = torch.stack([vectors[names[index]].float() for index in members], dim=1)
        unit_BFD = torch.nn.functional.normalize(stacked_BFD, dim=2)
        total_FF = torch.zeros(len(members), len(members))
        for part_BFD in unit_BFD.split(max(1, MAX_ELEMENTS // len(members) ** 2)):
            total_FF += torch.bmm(part_BFD, part_BFD.transpose(1, 2)).abs().sum(dim=0).cpu()
        places = torch.tensor(members)
        out_FF[places[:, None], places] = (total_FF / max(len(unit_BFD), 1)).clamp(0, 1)
    return out_FF


class ArchDetect(Signal):
    """Mixed second differences of the model's score when two features are switched to those of another sample.

    For features i and j of a sample x, and another sample y of the batch as the baseline, the difference
    f(x) - f(x with i of y) - f(x with j of y) + f(x with both) is 0 where i and j do not interact. The signal is the
    root of its mean square over samples, so over contexts, divided by that of the strongest pair.

    Args:
        seed: of the choice of baselines.

    Cost: 1 + F + F(F - 1)/2 forward passes a batch: 352 for 26 features, 20,101 for 200.
    Source: Tsang, Rambhatla and Liu, Archipelago (2020). Switched are the looked-up vectors, not ids, so that bags of
        any length can be; both ends are real samples, where Archipelago takes one baseline for all.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.names: tuple[str, ...] = ()
        self.mean = Mean()

    def observe(self, probe: Probe, call: Callable[[], Any]) -> None:
        """Look at one batch; of a single sample nothing can be told."""
        score_B = probe.run(call)
        samples, own = probe.samples, probe.lookups()
        if samples < 2:
            return
        shift = int(torch.randint(1, samples, (), generator=self.generator))
        other = {name: value.roll(shift, dims=0) for name, value in own.items()}
        self.names = tuple(own)
        single = [probe.run(call, {name: other[name]}) for name in own]
        square_FF = torch.zeros(len(own), len(own), dtype=torch.float64)
        for (i, a), (j, b) in combinations(enumerate(own), 2):
            both_B = probe.run(call, {a: other[a], b: other[b]})
            mixed_B = score_B.double() - single[i].double() - single[j].double() + both_B.double()
            square_FF[i, j] = square_FF[j, i] = (mixed_B**2).mean()
        self.mean.add(square_FF, samples)

    def matrix(self, features: tuple[str, ...]) -> Matrix:
        """Return the differences relative to the largest."""
        return _placed(_relative(np.sqrt(self.mean.value)), self.names, features)


class Nid(Signal):
    """Neural Interaction Detection: features interact through the hidden units that read both of them.

    Read is what takes the joined features first. A unit i of a linear layer gives the pair (f, g) the smaller of what f
    and g bring to it, times the unit's influence; summed over units. What f brings is the deviation over samples of its
    columns' weighted sum, the influence the mean absolute gradient of the score by the unit. (The original takes
    absolute weights for both, along all layers above: the bound of this, and blind to how large embeddings are.) Where
    units are multiplied with the columns they read, as in DCN, unit i is an interaction of its own column's feature
    with each that it reads; where dot products of pairs are formed, as in DLRM, each product is itself such a unit.

    Cost: a forward pass and the over-arch's backward pass a batch, B W H multiply-adds; F^2 H in the end.
    Source: Tsang, Cheng and Liu, Detecting Statistical Interactions from Neural Network Weights (2018).
    """

    gradients = True

    def __init__(self) -> None:
        self.moments: dict[int, tuple[Reader, Mean, Mean, Mean]] = {}

    def observe(self, probe: Probe, call: Callable[[], Any]) -> None:
        """Look at one batch.

        Raises:
            ConfigError: no layer that reads the joined features was found.
        """
        score_B = probe.run(call)
        if not probe.samples:
            return
        readers = [reader for reader in probe.readers if reader.units is not None]
        if not readers:
            reason = "; ".join(dict.fromkeys(probe.unread)) or "no features are joined"
            raise ConfigError(
                f"interactions: expected a layer that reads the joined features for signal 'nid', found that {reason}; "
                "use 'archdetect' or 'cosine', which need none"
            )
        units = [reader.units for reader in readers if reader.units is not None]
        gradients = torch.autograd.grad(score_B.sum(), units, allow_unused=True)
        for index, (reader, gradient) in enumerate(zip(readers, gradients, strict=True)):
            _, mean, square, influence = self.moments.setdefault(index, (reader, Mean(), Mean(), Mean()))
            assert reader.units is not None
            samples = len(reader.units)
            for moment, value in zip((mean, square), _moments(reader), strict=True):
                moment.add(value, samples)
            influence.add((torch.zeros_like(reader.units) if gradient is None else gradient).abs().mean(dim=0), samples)

    def matrix(self, features: tuple[str, ...]) -> Matrix:
        """Return the strengths relative to the largest."""
        places = {name: index for index, name in enumerate(features)}
        out_FF = np.zeros((len(features), len(features)))
        for reader, mean, square, influence in self.moments.values():
            deviation = np.sqrt(np.maximum(square.value - mean.value**2, 0))
            known = [(k, places[name]) for k, (name, _) in enumerate(reader.parts) if name in places]
            parts, rows = np.array([k for k, _ in known]), np.array([row for _, row in known])
            strength_PP = _strength(reader, deviation, influence.value)
            np.add.at(out_FF, (rows[:, None], rows), strength_PP[parts[:, None], parts])
        return _relative(out_FF)


def _moments(reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and mean square over samples of what each part of a join brings to each unit, (H, parts) each.

    Of pairs it is the products themselves, (V, V).
    """
    if reader.inputs is None or reader.weight is None:
        assert reader.units is not None
        products_BVV = reader.units.detach().double()
        return products_BVV.mean(dim=0), (products_BVV**2).mean(dim=0)
    widths = [width for _, width in reader.parts]
    columns = zip(reader.inputs.split(widths, dim=1), reader.weight.split(widths, dim=1), strict=True)
    brought = [(inputs @ weight.T).double() for inputs, weight in columns]
    return torch.stack([b.mean(dim=0) for b in brought], 1), torch.stack([(b**2).mean(dim=0) for b in brought], 1)


def _strength(reader: Reader, deviation: Matrix, influence: Matrix) -> Matrix:
    """Return the interaction of each pair of a join's parts, symmetric."""
    if reader.kind == "pairs":
        strength_VV = deviation * influence
        return np.asarray(strength_VV + strength_VV.T)
    scaled_HP = deviation * influence[:, None]
    if reader.kind == "cross":
        owner_H = np.repeat(np.arange(len(reader.parts)), [width for _, width in reader.parts])
        strength_PP = np.zeros((len(reader.parts), len(reader.parts)))
        np.add.at(strength_PP, owner_H, scaled_HP)
        return strength_PP + strength_PP.T
    return np.asarray(sum(np.minimum(row_P[:, None], row_P) for row_P in scaled_HP))


def _placed(matrix: Matrix, names: tuple[str, ...], features: tuple[str, ...]) -> Matrix:
    """Return a matrix over ``names`` as one over ``features``; what is missing does not interact."""
    out_FF = np.zeros((len(features), len(features)))
    rows = [features.index(name) for name in names]
    if rows:
        out_FF[np.ix_(rows, rows)] = (matrix + matrix.T) / 2
    return out_FF


def _relative(matrix: Matrix) -> Matrix:
    matrix = matrix - np.diag(np.diag(matrix)) if matrix.ndim == 2 else matrix
    largest = float(np.max(matrix, initial=0.0))
    return matrix / largest if largest > 0 else matrix


SIGNALS: dict[str, Callable[[int], Signal]] = {
    "cosine": lambda seed: OfVectors(cosine),
    "nid": lambda seed: Nid(),
    "archdetect": ArchDetect,
}
