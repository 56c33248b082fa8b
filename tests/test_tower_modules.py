"""Tower Modules by themselves: shapes, options, errors, initial values, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.errors import ConfigError
from dmt_compile.tower_modules import INITS, KINDS, TowerSpec, build_tower_module, output_width


def spec_of(widths: tuple[int, ...] = (8, 8, 8), dim: int = 4, vectors: bool = True, index: int = 0) -> TowerSpec:
    """Return the spec of a tower."""
    names = tuple(f"emb.{i}" for i in range(len(widths)))
    return TowerSpec(f"tower{index}", names, widths, dim, vectors, index)


def build(kind: Any, spec: TowerSpec, seed: int = 0, **options: Any) -> nn.Module:
    """Return a module."""
    return build_tower_module(kind, spec, options, seed)


def inputs(spec: TowerSpec, samples: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return (B, F, N), or (B, W) where widths differ."""
    generator = torch.Generator().manual_seed(3)
    shape = (samples, len(spec.widths), spec.widths[0]) if spec.even else (samples, sum(spec.widths))
    return torch.randn(shape, generator=generator, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("samples", [0, 1, 5])
@pytest.mark.parametrize(
    ("kind", "options", "columns"),
    [
        ("dlrm", {}, 3 * 4),
        ("dlrm", {"c": 2, "p": 3}, 9 * 4),
        ("dlrm", {"c": 0, "p": 2}, 2 * 4),
        ("dot", {}, 3 * 4 + 3),
        ("dot", {"c": 0, "p": 1}, 4 + 3),
        ("dcn", {}, 4),
        ("dcn", {"output": "per_feature", "layers": 2, "rank": 3}, 3 * 4),
    ],
)
def test_a_module_sends_the_columns_that_its_docstring_says(
    kind: str, options: dict[str, Any], columns: int, samples: int
) -> None:
    spec = spec_of()
    module = build(kind, spec, **options)
    assert module(inputs(spec, samples)).shape == (samples, columns)
    assert output_width(module, spec) == columns


@pytest.mark.parametrize(("kind", "options", "columns"), [("dlrm", {"c": 1, "p": 1}, 4 * 4), ("dcn", {"layers": 2}, 4)])
def test_features_may_differ_in_width(kind: str, options: dict[str, Any], columns: int) -> None:
    spec = spec_of((8, 4, 8))
    module = build(kind, spec, **options)
    assert module(inputs(spec, 5)).shape == (5, columns)
    assert output_width(module, spec) == columns


@pytest.mark.parametrize("kind", ["dlrm", "dot"])
def test_one_feature_with_nothing_to_compress_passes_through(kind: str) -> None:
    spec = spec_of((4,), dim=4)
    module = build(kind, spec)
    embs = inputs(spec, 5)
    assert not list(module.parameters())
    assert torch.equal(module(embs), embs[:, 0])


def test_a_dcn_tower_has_no_projection_where_there_is_nothing_to_project() -> None:
    assert build("dcn", spec_of((4,), dim=4)).project is None
    assert build("dcn", spec_of((4, 4), dim=4), output="per_feature").project is None
    assert build("dcn", spec_of((4, 4), dim=4)).project is not None


def test_features_of_one_width_share_their_weights() -> None:
    spec = spec_of((8, 4, 8))
    module = build("dlrm", spec)
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 8), (4,), (4, 4), (4,)]
    embs = torch.cat([inputs(spec, 5)[:, :8], torch.zeros(5, 4), inputs(spec, 5)[:, :8]], dim=1)
    sent = module(embs)
    assert torch.equal(sent[:, :4], sent[:, 8:])


def test_dot_sends_the_products_of_uncompressed_features() -> None:
    spec = spec_of()
    embs = inputs(spec, 5)
    pairs = [(embs[:, i] * embs[:, j]).sum(1) for i, j in ((1, 0), (2, 0), (2, 1))]
    torch.testing.assert_close(build("dot", spec)(embs)[:, -3:], torch.stack(pairs, dim=1))


# ------------------------------------------------------------------------------------------------------ initial values


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_seed_gives_the_values_and_the_global_generator_stays(kind: str) -> None:
    spec, other = spec_of(), spec_of(index=1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, another = (build(kind, spec, seed, init="shared") for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    embs = inputs(spec, 5)
    assert torch.equal(first(embs), again(embs))
    assert not torch.equal(first(embs), another(embs))
    own = build(kind, spec, init="orthogonal"), build(kind, other, init="orthogonal")
    assert not torch.equal(own[0](embs), own[1](embs))


def test_shared_projections_are_one_for_all_towers() -> None:
    first, second, another = (
        build("dlrm", spec_of(widths, index=index), seed, init="shared").each["8"].weight
        for widths, index, seed in (((8, 8, 8), 0, 0), ((8, 8), 1, 0), ((8, 8), 1, 1))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, another)


def test_shared_projections_sketch_the_products_of_features_of_different_towers() -> None:
    towers = [build("dlrm", spec_of((16, 16), dim=8, index=i), seed=5, init="shared") for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 4000, 2, 16, generator=generator)
    right = left + 0.5 * right  # products far from 0
    sent = [module(embs).unflatten(1, (2, 8)) for module, embs in zip(towers, (left, right), strict=True)]
    sketched, exact = (sent[0] * sent[1]).sum(2).detach(), (left * right).sum(2)
    assert float(sketched.mean() / exact.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("init", ["shared", "orthogonal"])
def test_scaled_projections_keep_the_squared_length_of_vectors(init: str) -> None:
    spec = spec_of((16,) * 4, dim=4)
    embs = torch.randn(4000, 4, 16, generator=torch.Generator().manual_seed(0))
    sent = build("dlrm", spec, init=init)(embs).detach().unflatten(1, (4, 4))
    assert float(sent.square().sum(2).mean() / embs.square().sum(2).mean()) == pytest.approx(1.0, abs=0.02)
    layer = build("dlrm", spec, init=init).each["16"]
    weight = layer.weight.detach() * layer.step
    torch.testing.assert_close(weight @ weight.T, 16 / 4 * torch.eye(4))
    assert not build("dlrm", spec, init=init).each["16"].bias.any()


def test_default_leaves_the_values_of_pytorch_which_shrink_vectors() -> None:
    spec = spec_of((16,) * 4, dim=4)
    layer = build("dlrm", spec, init="default").each["16"]
    assert float(layer.weight.detach().abs().max()) * layer.step <= 1 / math.sqrt(16)
    assert bool(layer.bias.any())


@pytest.mark.parametrize(
    ("kind", "options"), [("dlrm", {}), ("dot", {}), ("dcn", {"layers": 0, "output": "per_feature"})]
)
def test_identity_starts_as_the_flat_model_of_narrower_tables(kind: str, options: dict[str, Any]) -> None:
    spec = spec_of()
    embs = inputs(spec, 5)
    torch.testing.assert_close(build(kind, spec, **options)(embs)[:, :12], embs[:, :, :4].flatten(1))


def test_identity_gives_several_vectors_of_a_feature_different_columns() -> None:
    spec = spec_of(dim=4)
    embs = inputs(spec, 5)
    torch.testing.assert_close(build("dlrm", spec, c=2)(embs), embs.flatten(1))
    narrow = spec_of((3, 3), dim=4)
    embs = inputs(narrow, 5)
    torch.testing.assert_close(build("dlrm", narrow)(embs), embs[:, :, [0, 1, 2, 0]].flatten(1))


def test_vectors_of_all_features_mix_them_under_every_init() -> None:
    spec = spec_of()
    for init in INITS:
        layer = build("dlrm", spec, c=0, p=3, init=init).together
        assert bool((layer.weight.unflatten(1, (3, 8)).abs().sum(2) > 0).all())


@pytest.mark.parametrize("step", [1, 0.1])
def test_step_scales_how_far_an_optimizer_goes_and_not_the_start(step: float) -> None:
    spec = spec_of()
    embs = inputs(spec, 5)
    plain, module = build("dlrm", spec, step=1), build("dlrm", spec, step=step)
    torch.testing.assert_close(module(embs), plain(embs))
    layer = module.each["8"]
    before = layer.weight.detach() * layer.step
    module(embs).square().sum().backward()
    torch.optim.Adam(module.parameters(), lr=0.01).step()
    moved = (layer.weight.detach() * layer.step - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * step), rtol=1e-3, atol=1e-7)


def test_modules_are_made_for_the_device_they_are_moved_to() -> None:
    module = build("dcn", spec_of()).to("meta")
    assert output_width(module, spec_of()) == 4


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("kind", "options", "widths"),
    [
        ("dlrm", {"p": 1}, (5, 5, 5)),
        ("dlrm", {"p": 1}, (5, 3, 5)),
        ("dot", {}, (5, 5, 5)),
        ("dcn", {"layers": 2, "rank": 3}, (5, 5, 5)),
        ("dcn", {"output": "per_feature"}, (5, 3, 5)),
    ],
)
def test_gradients(kind: str, options: dict[str, Any], widths: tuple[int, ...]) -> None:
    spec = spec_of(widths, dim=2)
    module = build(kind, spec, **options).double()
    embs = inputs(spec, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, embs)
    module(embs).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# -------------------------------------------------------------------------------------------------------------- errors


class Given(nn.Module):
    """Returns what it is told to."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, embs: torch.Tensor) -> Any:
        """Return it."""
        return self.result(embs)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("dlmr", {}, r"expected a known kind, found 'dlmr'; did you mean 'dlrm'\?"),
        ("xyz", {}, "expected a known kind, found 'xyz'; valid are 'dlrm', 'dcn', 'dot'"),
        (
            "dlrm",
            {"layers": 1},
            "expected an option of 'dlrm', found 'layers'; valid are 'c', 'p', 'dim', 'init', 'step'",
        ),
        ("dcn", {"layer": 1}, r"expected an option of 'dcn', found 'layer'; did you mean 'layers'\?"),
        ("dlrm", {"c": 0, "p": 0}, "expected 'c' or 'p' above 0, found both 0"),
        ("dlrm", {"c": -1}, "expected a whole number for 'c', found -1"),
        ("dlrm", {"p": True}, "expected a whole number for 'p', found True"),
        ("dcn", {"rank": 1.5}, "expected a whole number for 'rank', found 1.5"),
        ("dcn", {"output": "all"}, "expected 'per_tower' or 'per_feature' for 'output', found 'all'"),
        ("dlrm", {"init": "sharde"}, r"expected a known 'init', found 'sharde'; did you mean 'shared'\?"),
        ("dlrm", {"step": 0}, "expected a number above 0 for 'step', found 0"),
        ("dcn", {"step": True}, "expected a number above 0 for 'step', found True"),
        (lambda spec: None, {}, "expected a module from the callable for tower0, found NoneType"),
    ],
)
def test_bad_options_are_named(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(kind, spec_of(), **options)


def test_dot_wants_one_width() -> None:
    with pytest.raises(ConfigError, match=r"expected features of one width for 'dot' in tower0, found \(8, 4\); use"):
        build("dot", spec_of((8, 4)))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda embs: embs, r"expected \(B, O\) from the module of tower0, found \(3, 3, 8\) for B = 3"),
        (lambda embs: (embs,), r"expected \(B, O\) from the module of tower0, found tuple"),
        (lambda embs: embs[:1, 0], r"expected \(B, O\) from the module of tower0, found \(1, 8\) for B = 3"),
        (lambda embs: embs[:, 0, :6], "outputs of tower0 in vectors of 4 columns, found 6; set the option 'dim'"),
        (lambda embs: embs @ embs, r"expected a module for tower0 that takes \(3, 8\) a sample, found RuntimeError: "),
    ],
)
def test_output_width_names_what_does_not_fit(result: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        output_width(Given(result), spec_of())


def test_output_width_leaves_modes_and_batch_statistics_alone() -> None:
    norm = nn.BatchNorm1d(8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), norm)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert output_width(module, spec_of()) == 8
    assert module.training
    assert norm.training
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_concatenation_takes_any_number_of_columns() -> None:
    assert output_width(Given(lambda embs: embs[:, 0, :6]), spec_of(vectors=False)) == 6
