"""Tower Modules: what compresses the embeddings of one tower before they cross hosts.

Shape suffixes: B samples, F features of the tower, N width of a feature, W columns of all of them, O columns sent.

Source: section 3.2 and listings 1 and 2 of the DMT paper; section 4b of our notes on it for the widths that its tables
imply. ``dot``, the initial values and ``step`` are not the paper's: a module has to start close to the model that it
replaces, and to move no faster than its tables; benchmarks/RESULTS.md has what each is worth.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmt_compile.errors import ConfigError

INITS = ("identity", "shared", "orthogonal", "default")
STEP = 0.1


@dataclass(frozen=True)
class TowerSpec:
    """What a Tower Module is made for.

    Args:
        name: of the tower, such as ``tower0``.
        features: its features, in the order of their columns.
        widths: columns of each feature.
        dim: width of the vectors that the interaction takes.
        vectors: the interaction takes vectors of ``dim``: outputs, without scalars, must be a multiple of it. Otherwise
            it takes any number of columns.
        index: number of the tower.
    """

    name: str
    features: tuple[str, ...]
    widths: tuple[int, ...]
    dim: int
    vectors: bool
    index: int

    @property
    def even(self) -> bool:
        """All features have one width."""
        return len(set(self.widths)) == 1


class PassThrough(nn.Module):
    """A tower with nothing to compress: sends its columns as they are."""

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        """Return (B, O) of embs (B, F, N) or (B, W)."""
        return embs.flatten(1)


class SteadyLinear(nn.Linear):
    """A linear layer whose weights count ``step`` times, so that an optimizer moves it ``step`` times as far.

    Adam and Adagrad move a weight by about the learning rate, however small its gradient is. One weight of a projection
    that all features of a tower share moves the vectors of all rows at once, on top of what moves the rows themselves:
    at a rate that suits tables the vectors would not come to rest. ``step=1`` is the plain layer.
    """

    def __init__(self, in_features: int, out_features: int, step: float) -> None:
        super().__init__(in_features, out_features)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., O) of (..., W)."""
        if self.step == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight * self.step, self.bias * self.step)

    def extra_repr(self) -> str:
        """Say what it is, and its step."""
        return f"{super().extra_repr()}, step={self.step}"


class DLRMTower(nn.Module):
    """Two linear layers: ``p`` vectors of all features together, and ``c`` vectors of each feature.

    Sends O = dim * (c * F + p) columns.

    Args:
        spec: of the tower.
        c: vectors of each feature; every feature of one width goes through the same weights.
        p: vectors of all features together.
        dim: width of one vector; by default that of the features.
        init: ``"identity"``: each feature's first columns, so that the model starts as the flat one of narrower tables;
            ``"shared"``: scaled orthogonal projections, the same in every tower, so that products of vectors of two
            towers start as a sketch of those of the features; ``"orthogonal"``: one of its own for each tower;
            ``"default"``: PyTorch's. What mixes all features (``p``) starts as ``"shared"`` under ``"identity"``.
        step: how far an optimizer moves the weights, relative to a plain layer; see :class:`SteadyLinear`.

    Cost: 2 * W * dim * (c + p) flops a sample.
    """

    def __init__(
        self,
        spec: TowerSpec,
        c: int = 1,
        p: int = 0,
        dim: int | None = None,
        init: str = "identity",
        step: float = STEP,
    ) -> None:
        super().__init__()
        _check_counts(c=c, p=p)
        if c + p == 0:
            raise ConfigError("tower modules: expected 'c' or 'p' above 0, found both 0; a tower must send something")
        self.widths, self.even = spec.widths, spec.even
        out = spec.dim
        different = dict.fromkeys(spec.widths) if c else ()
        self.each = nn.ModuleDict(
            {str(w): _projection((w,), c * out, init, math.sqrt(w / out), step) for w in different}
        )
        mixed = "shared" if init == "identity" else init
        self.together = _projection(spec.widths, p * out, mixed, math.sqrt(max(spec.widths) / out), step) if p else None

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        """Return (B, O) of embs (B, F, N), or (B, W) where widths differ."""
        sent = [] if self.together is None else [self.together(embs.flatten(1))]
        if self.even:
            sent += [layer(embs).flatten(1) for layer in self.each.values()]
        elif self.each:
            columns = embs.split(list(self.widths), dim=1)  # indexed: torch.fx cannot iterate over what it traces
            sent += [self.each[str(width)](columns[index]) for index, width in enumerate(self.widths)]
        return torch.cat(sent, dim=1)


class DotTower(DLRMTower):
    """A ``dlrm`` tower that also sends the products of all pairs of its features, before compression.

    They are the interactions that compression would blur, and cost one column a pair: O = dim * (c * F + p) +
    F * (F - 1) / 2. Features must have one width.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(
        self,
        spec: TowerSpec,
        c: int = 1,
        p: int = 0,
        dim: int | None = None,
        init: str = "identity",
        step: float = STEP,
    ) -> None:
        super().__init__(spec, c, p, dim, init, step)
        if not spec.even:
            raise ConfigError(
                f"tower modules: expected features of one width for 'dot' in {spec.name}, found {spec.widths}; use "
                "'dlrm', which takes several"
            )
        features = len(spec.widths)
        self.scalars = features * (features - 1) // 2
        rows, columns = torch.tril_indices(features, features, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        """Return (B, O) of embs (B, F, N)."""
        products = torch.bmm(embs, embs.transpose(1, 2))
        return torch.cat([super().forward(embs), products[:, self.rows, self.columns]], dim=1)


class Cross(nn.Module):
    """Cross layers, x0 * (W x + b) + x, of full or of low rank."""

    def __init__(self, width: int, layers: int, rank: int | None) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers) if rank)
        self.up = nn.ModuleList(nn.Linear(rank or width, width) for _ in range(layers))

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        """Return (B, W) of (B, W)."""
        x = x0
        for index, up in enumerate(self.up):
            x = x0 * up(self.down[index](x) if self.down else x) + x
        return x


class DCNTower(nn.Module):
    """A cross network over the tower's columns, and a projection.

    Args:
        spec: of the tower.
        layers: cross layers.
        rank: of each; ``None`` for full matrices.
        output: ``"per_tower"`` sends O = dim columns; ``"per_feature"`` O = F * dim.
        dim: by default the largest width of a feature.
        init: of the projection, as in :class:`DLRMTower`. A projection to as many columns as there are is left out.
        step: of the projection, as in :class:`DLRMTower`.

    Cost: 4 * W * rank (2 * W^2 without) flops a layer and 2 * W * O a sample.
    """

    def __init__(
        self,
        spec: TowerSpec,
        layers: int = 1,
        rank: int | None = None,
        output: str = "per_tower",
        dim: int | None = None,
        init: str = "identity",
        step: float = STEP,
    ) -> None:
        super().__init__()
        _check_counts(layers=layers, **({} if rank is None else {"rank": rank}))
        if output not in ("per_tower", "per_feature"):
            raise ConfigError(f"tower modules: expected 'per_tower' or 'per_feature' for 'output', found {output!r}")
        width, out = sum(spec.widths), spec.dim * (len(spec.widths) if output == "per_feature" else 1)
        self.cross = Cross(width, layers, rank)
        mixed = "shared" if init == "identity" and output == "per_tower" else init
        self.project = _projection(spec.widths, out, mixed, 1.0, step) if width != out else None

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        """Return (B, O) of embs (B, F, N), or (B, W) where widths differ."""
        crossed: torch.Tensor = self.cross(embs.flatten(1))
        sent: torch.Tensor = crossed if self.project is None else self.project(crossed)
        return sent


KINDS: dict[str, Callable[..., nn.Module]] = {"dlrm": DLRMTower, "dcn": DCNTower, "dot": DotTower}


def build_tower_module(
    kind: str | Callable[[TowerSpec], nn.Module], spec: TowerSpec, options: Mapping[str, Any], seed: int
) -> nn.Module:
    """Return a tower's module on the CPU in float32; the same for the same arguments.

    Args:
        kind: a name of ``KINDS``, or a callable; for one feature of width ``dim``, ``"dlrm"`` and ``"dot"`` pass it
            through.
        spec: of the tower.
        options: keyword arguments of the kind; a callable takes none.
        seed: of the initial values; the global generator stays as it is.

    Raises:
        ConfigError: an unknown kind, or an option that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + spec.index) % 2**63)
        if not isinstance(kind, str):
            module = kind(spec)
            if not isinstance(module, nn.Module):
                raise ConfigError(
                    f"tower modules: expected a module from the callable for {spec.name}, found {type(module).__name__}"
                )
            return module
        if kind not in KINDS:
            raise ConfigError(f"tower modules: expected a known kind, found {kind!r}" + _nearest(kind, KINDS))
        known = list(inspect.signature(KINDS[kind]).parameters)[1:]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"tower modules: expected an option of {kind!r}, found {name!r}" + _nearest(name, known)
                )
        if KINDS[kind] is not DCNTower and spec.widths == (spec.dim,):
            return PassThrough()
        with _seeded_projections(seed):
            return KINDS[kind](spec, **options)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Put every part of a module back into the mode, training or evaluation, that it was in."""
    modes = {child: child.training for child in module.modules()}
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


def output_width(module: nn.Module, spec: TowerSpec) -> int:
    """Return how many columns a module sends.

    Raises:
        ConfigError: it does not map (B, F, N), or (B, W), to (B, O), or O fits no vectors of ``spec.dim``.
    """
    samples = 3
    parameter = next(module.parameters(), torch.empty(0))
    shape = (samples, len(spec.widths), spec.widths[0]) if spec.even else (samples, sum(spec.widths))
    try:
        with torch.no_grad(), modes_kept(module):
            out = module.eval()(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tower modules: expected a module for {spec.name} that takes {shape[1:]} a sample, found "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != samples:
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ConfigError(
            f"tower modules: expected (B, O) from the module of {spec.name}, found {found} for B = {samples}"
        )
    columns = int(out.shape[1]) - int(getattr(module, "scalars", 0))
    if spec.vectors and (columns < 0 or columns % spec.dim):
        raise ConfigError(
            f"tower modules: expected outputs of {spec.name} in vectors of {spec.dim} columns, found {columns}; set "
            "the option 'dim' to the width of its vectors"
        )
    return int(out.shape[1])


# ------------------------------------------------------------------------------------------------------ initial values


_projection_seeds: list[int] = []


class _seeded_projections:
    """Gives shared projections their seed while a module is built."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        _projection_seeds.append(self.seed)

    def __exit__(self, *_: object) -> None:
        _projection_seeds.pop()


def _projection(widths: Sequence[int], out: int, init: str, scale: float, step: float) -> SteadyLinear:
    """Return a linear layer of features of these widths, with initial values times ``scale`` where it keeps a scale."""
    if init not in INITS:
        raise ConfigError(f"tower modules: expected a known 'init', found {init!r}" + _nearest(init, INITS))
    if isinstance(step, bool) or not isinstance(step, int | float) or not step > 0:
        raise ConfigError(f"tower modules: expected a number above 0 for 'step', found {step!r}")
    layer = SteadyLinear(sum(widths), out, step)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if init != "default":
            layer.bias.zero_()
            if init == "identity":
                _first_columns(layer.weight, widths)
            else:
                if init != "orthogonal":
                    torch.manual_seed((_projection_seeds[-1] * 1_000_003 + layer.in_features) % 2**63)
                nn.init.orthogonal_(layer.weight)
                layer.weight.mul_(scale)
        layer.weight.div_(step)
        layer.bias.div_(step)
    return layer


def _first_columns(weight: torch.Tensor, widths: Sequence[int]) -> None:
    """Let row k of a feature's rows take its column k; from the front again where it has fewer."""
    weight.zero_()
    rows, start = weight.shape[0] // len(widths), 0
    for feature, width in enumerate(widths):
        for row in range(rows):
            weight[feature * rows + row, start + row % width] = 1.0
        start += width


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"tower modules: expected a whole number for {name!r}, found {value!r}")


def _nearest(name: object, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(map(repr, valid))}"
