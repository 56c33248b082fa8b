"""Tower Modules: what compresses the embeddings of one tower before they cross hosts.

Shape suffixes: B samples, F features of the tower, N width of a feature, W columns of all of them, O columns sent.

Source: section 3.2 and listings 1 and 2 of the DMT paper; section 4b of our notes on it for the widths that its tables
imply. ``dot`` and the initial values are not the paper's: a module has to start close to the model that it replaces, and
PyTorch's own initial values shrink the vectors that dot products need.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmt_compile.errors import ConfigError

INITS = ("shared", "orthogonal", "default")


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


class DLRMTower(nn.Module):
    """Two linear layers: ``p`` vectors of all features together, and ``c`` vectors of each feature.

    Sends O = dim * (c * F + p) columns.

    Args:
        spec: of the tower.
        c: vectors of each feature; every feature of one width goes through the same weights.
        p: vectors of all features together.
        dim: width of one vector; by default that of the features.
        init: ``"shared"``: scaled orthogonal projections, the same in every tower, so that products of vectors of two
            towers start as a sketch of those of the features; ``"orthogonal"``: one of its own for each tower;
            ``"default"``: PyTorch's.

    Cost: 2 * W * dim * (c + p) flops a sample.
    """

    def __init__(self, spec: TowerSpec, c: int = 1, p: int = 0, dim: int | None = None, init: str = "shared") -> None:
        super().__init__()
        _check_counts(c=c, p=p)
        if c + p == 0:
            raise ConfigError("tower modules: expected 'c' or 'p' above 0, found both 0; a tower must send something")
        self.widths, self.even = spec.widths, spec.even
        out = spec.dim
        self.each = nn.ModuleDict({str(w): nn.Linear(w, c * out) for w in dict.fromkeys(spec.widths) if c})
        self.together = nn.Linear(sum(spec.widths), p * out) if p else None
        for width in dict.fromkeys(spec.widths) if c else ():
            _initialise(self.each[str(width)], init, math.sqrt(width / out))
        if self.together is not None:
            _initialise(self.together, init, math.sqrt(max(spec.widths) / out))

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

    def __init__(self, spec: TowerSpec, c: int = 1, p: int = 0, dim: int | None = None, init: str = "shared") -> None:
        super().__init__(spec, c, p, dim, init)
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
        init: of the projection; ``"shared"`` and ``"orthogonal"`` keep the scale of its inputs. A projection to as many
            columns as there are is left out.

    Cost: 4 * W * rank (2 * W^2 without) flops a layer and 2 * W * O a sample.
    """

    def __init__(
        self,
        spec: TowerSpec,
        layers: int = 1,
        rank: int | None = None,
        output: str = "per_tower",
        dim: int | None = None,
        init: str = "shared",
    ) -> None:
        super().__init__()
        _check_counts(layers=layers, **({} if rank is None else {"rank": rank}))
        if output not in ("per_tower", "per_feature"):
            raise ConfigError(f"tower modules: expected 'per_tower' or 'per_feature' for 'output', found {output!r}")
        width, out = sum(spec.widths), spec.dim * (len(spec.widths) if output == "per_feature" else 1)
        self.cross = Cross(width, layers, rank)
        self.project = nn.Linear(width, out) if width != out else None
        if self.project is not None:
            _initialise(self.project, init, 1.0)

    def forward(self, embs: torch.Tensor) -> torch.Tensor:
        """Return (B, O) of embs (B, F, N), or (B, W) where widths differ."""
        crossed = self.cross(embs.flatten(1))
        return crossed if self.project is None else self.project(crossed)


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


def output_width(module: nn.Module, spec: TowerSpec) -> int:
    """Return how many columns a module sends.

    Raises:
        ConfigError: it does not map (B, F, N), or (B, W), to (B, O), or O fits no vectors of ``spec.dim``.
    """
    samples = 3
    parameter = next(module.parameters(), torch.empty(0))
    shape = (samples, len(spec.widths), spec.widths[0]) if spec.even else (samples, sum(spec.widths))
    modes = {child: child.training for child in module.modules()}
    try:
        with torch.no_grad():
            out = module.eval()(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tower modules: expected a module for {spec.name} that takes {shape[1:]} a sample, found "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != samples:
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ConfigError(
            f"tower modules: expected (B, O) from the module of {spec.name}, found {found} for B = {samples}"
        )
    columns = int(out.shape[1]) - int(getattr(module, "scalars", 0))
    if spec.vectors and (columns < 0 or columns % spec.dim):
        raise ConfigError(
            f"tower modules: expected outputs of {spec.name} in vectors of {spec.dim} columns, found {columns}; set the "
            "option 'dim' to the width of its vectors"
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


def _initialise(layer: nn.Module, init: str, scale: float) -> None:
    """Make a linear layer an orthogonal projection times ``scale``, without bias; ``"default"`` leaves it."""
    assert isinstance(layer, nn.Linear)
    if init not in INITS:
        raise ConfigError(f"tower modules: expected a known 'init', found {init!r}" + _nearest(init, INITS))
    if init == "default":
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if init == "shared":
            torch.manual_seed((_projection_seeds[-1] * 1_000_003 + layer.in_features) % 2**63)
        nn.init.orthogonal_(layer.weight)
        layer.weight.mul_(scale)
        layer.bias.zero_()


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"tower modules: expected a whole number for {name!r}, found {value!r}")


def _nearest(name: object, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(map(repr, valid))}"
