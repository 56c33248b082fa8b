"""The two ways to Tower Modules: ``transform`` ahead of time, and the compiler's own, with the same numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile.errors import ConfigError, PlanError, UnsupportedGraphError
from dmt_compile.plan import TowerModules
from dmt_compile.tower_modules import TowerSpec
from tests._tolerances import assert_reordered
from tests.models import DLRM, Batch, Projected, make_batch

DLRM_TOWERS = {"tower_module": "dlrm", "tower_module_options": {"dim": 4}, "towers": 2}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def small(seed: int = 0, samples: int = 4) -> tuple[DLRM, Batch]:
    torch.manual_seed(seed)
    model = DLRM(rows=(9, 6, 11, 5))
    return model, make_batch(model, samples, torch.Generator().manual_seed(seed))


def towered(model: nn.Module, batch: Any, **options: Any) -> Any:
    plan = dmt_compile.plan(model, batch, "1x1", **(options or DLRM_TOWERS))
    return dmt_compile.transform(model, batch, plan)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="dmt", options={"dense_compiler": "eager", **(options or DLRM_TOWERS)})


# ------------------------------------------------------------------------------------------------------------ transform


def test_the_flat_model_is_left_as_it_is_and_shares_what_survives() -> None:
    model, batch = small()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    result = towered(model, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "dmt_towers")
    mine, flat = dict(result.named_parameters()), dict(model.named_parameters())
    replaced = {"bottom.2.weight", "bottom.2.bias", "top.0.weight"}
    for name, parameter in flat.items():
        assert (mine[name] is parameter) == (name not in replaced), name
    assert {name: tuple(mine[name].shape) for name in replaced} == {
        "bottom.2.weight": (4, 16),
        "bottom.2.bias": (4,),
        "top.0.weight": (16, 14),  # 4 dense columns, and the pairs of 4 features and the dense vector
    }
    assert {name for name in mine if name not in flat} == {
        f"dmt_towers.tower{tower}.each.8.{leaf}" for tower in range(2) for leaf in ("weight", "bias")
    }
    assert str(result.top[0]) == "Linear(in_features=14, out_features=16, bias=True)"
    result.bottom[0].weight.data.zero_()
    assert not model.bottom[0].weight.any()  # one tensor


def test_a_module_of_its_own_trains_saves_loads_copies_and_moves() -> None:
    model, batch = small()
    result = towered(model, batch)
    optimizer = torch.optim.SGD(result.parameters(), 0.1)
    first = result(*batch).detach()
    result(*batch).square().sum().backward()
    assert all(p.grad is not None for p in result.parameters())
    optimizer.step()
    trained = result(*batch)
    assert not torch.equal(first, trained)
    other = towered(DLRM(rows=(9, 6, 11, 5)), batch)
    assert not torch.equal(other(*batch), trained)
    assert other.load_state_dict(result.state_dict()) is not None
    assert torch.equal(other(*batch), trained)
    copied = copy.deepcopy(result)
    with torch.no_grad():
        result.top[0].weight.zero_()
    assert torch.equal(copied(*batch), trained)
    dense, ids, offsets = batch
    assert copied.double()(dense.double(), ids, offsets).dtype == torch.float64


def test_training_and_evaluation_are_two_graphs() -> None:
    class Dropping(DLRM):
        def forward(self, *batch: Any) -> torch.Tensor:
            return nn.functional.dropout(super().forward(*batch), 0.5, self.training)

    torch.manual_seed(0)
    model = Dropping(rows=(9, 6, 11))
    batch = make_batch(model, 64, torch.Generator().manual_seed(0))
    result = towered(model, batch)
    assert result.training
    assert (result(*batch) == 0).any()
    assert not (result.eval()(*batch) == 0).any()
    assert "# training" in result.code
    assert "# evaluation" in result.code


def test_any_size_of_batch() -> None:
    model, batch = small()
    result = towered(model, batch)
    for samples in (0, 1, 7):
        assert result(*make_batch(model, samples, torch.Generator().manual_seed(1))).shape == (samples,)


class Named(nn.Module):
    """Keyword arguments with a default, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(7, 4, mode="sum") for _ in range(3))
        self.top = nn.Linear(12, 2)

    def forward(self, ids: torch.Tensor, *, scale: float = 2.0, extra: torch.Tensor | None = None) -> dict[str, Any]:
        joined = torch.cat([table(ids[:, i : i + 1]) for i, table in enumerate(self.emb)], dim=1)
        scores = self.top(joined) * scale
        return {"scores": scores if extra is None else scores + extra, "pair": (scores.sum(), "text")}


def test_keywords_defaults_and_structured_outputs() -> None:
    torch.manual_seed(0)
    model, ids = Named(), torch.randint(0, 7, (5, 3))
    plan = dmt_compile.plan(model, ids, "1x1", towers=3, tower_module="dlrm", kwargs={"extra": torch.ones(5, 2)})
    result = dmt_compile.transform(model, ids, plan, kwargs={"extra": torch.ones(5, 2)})
    out = result(ids, extra=torch.zeros(5, 2))
    assert out.keys() == {"scores", "pair"}
    assert out["pair"][1] == "text"
    assert torch.equal(result(ids, extra=torch.ones(5, 2))["scores"], out["scores"] + 1)
    # A tower of one feature of the right width has nothing to compress.
    assert torch.equal(out["scores"], model(ids, extra=torch.zeros(5, 2))["scores"])


class Changing(DLRM):
    """Does something that a written forward cannot."""

    def __init__(self, what: Callable[[Any, torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__(rows=(9, 6, 11))
        self.what = what

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> Any:
        return self.what(self, dense, super().forward(dense, ids, offsets))


def keep(model: Any, dense: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    model.last = out * 2
    return out


def break_graph(model: Any, dense: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return out + 1


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (break_graph, "expected a model that is one graph, found a graph break; TORCH_LOGS=graph_breaks shows where"),
        (
            keep,
            "expected a model whose forward changes nothing but its output and buffers in place, found that it keeps",
        ),
        (lambda m, dense, out: (out, dense), "expected outputs that the model computes, found an input or a parameter"),
        (lambda m, dense, out: {1, 2}, "expected tensors in tuples, lists and dicts as output, found set; return one"),
    ],
    ids=["graph break", "kept tensor", "input as output", "set"],
)
def test_what_cannot_be_written_is_refused(what: Any, text: str) -> None:
    torch.manual_seed(0)
    model = Changing(lambda m, dense, out: out)
    batch = make_batch(model, 3, torch.Generator().manual_seed(0))
    plan = dmt_compile.plan(model, batch, "1x1", **DLRM_TOWERS)
    with pytest.raises(UnsupportedGraphError, match=re.escape(text)):
        dmt_compile.transform(Changing(what), batch, plan)


def test_plans_that_do_not_fit_are_refused() -> None:
    model, batch = small()
    with pytest.raises(ConfigError, match="transform: expected a plan with Tower Modules, found one without; make it"):
        dmt_compile.transform(model, batch, dmt_compile.plan(model, batch, "1x1"))
    plan = dmt_compile.plan(model, batch, "1x1", **DLRM_TOWERS)
    other = DLRM(rows=(9, 6, 11, 8))
    with pytest.raises(PlanError, match=r"plan: expected table emb\.3 as"):
        dmt_compile.transform(other, make_batch(other, 3, torch.Generator().manual_seed(0)), plan)


def halve(tower: TowerSpec) -> nn.Module:
    """A user's own Tower Module: one linear layer over the whole tower."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(sum(tower.widths), tower.dim * len(tower.features) // 2))


def test_a_callable_is_passed_again() -> None:
    model, batch = small()
    options = {"tower_module": halve, "towers": 2}
    plan = dmt_compile.plan(model, batch, "1x1", **options)
    assert plan.tower_modules is not None
    assert plan.tower_modules.kind == f"{__name__}.halve"
    with pytest.raises(
        ConfigError, match=r"expected the callable .*halve of the plan's Tower Modules as 'tower_module'"
    ):
        dmt_compile.transform(model, batch, plan)
    result = dmt_compile.transform(model, batch, plan, tower_module=halve)
    assert torch.equal(compiled(model, **options)(*batch), result(*batch))
    with pytest.raises(ConfigError, match=r"expected the plan's Tower Modules .*halve', found 'tower_module' 'dlrm'"):
        compiled(DLRM(rows=(9, 6, 11, 5)), plan=plan, tower_module="dlrm")(*batch)


# ------------------------------------------------------------------------------------------ both routes


@pytest.mark.parametrize(
    "options",
    [
        DLRM_TOWERS,
        {"tower_module": "dcn", "tower_module_options": {"rank": 3}, "towers": 2, "seed": 7},
        {"tower_module": "dot", "tower_module_options": {"dim": 4, "p": 1}, "towers": 2},
    ],
    ids=["dlrm", "dcn", "dot"],
)
def test_both_routes_train_alike(options: dict[str, Any]) -> None:
    model, batch = small()
    other = copy.deepcopy(model)
    result, step_model = towered(model, batch, **options), compiled(other, **options)
    dmt_compile.warmup(step_model, batch)
    again = compiled(result, dense_compiler="eager")  # the transformed model, compiled, is the same program
    optimizers = [torch.optim.Adagrad(m.parameters(), 0.1) for m in (result, other)]
    for step in range(3):
        batch = make_batch(model, 3 + step, torch.Generator().manual_seed(step))
        outputs = result(*batch), step_model(*batch)
        assert torch.equal(again(*batch), outputs[0])
        if step == 0:
            assert torch.equal(*outputs)
        assert_reordered(outputs[1], outputs[0], 64, gradient=True)  # weights add up gradients in another order
        for out, optimizer in zip(outputs, optimizers, strict=True):
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    mine = dict(other.named_parameters())
    for name, parameter in result.named_parameters():
        own = mine.get(f"dmt_towers.replaced.{name}", mine[name])
        assert_reordered(own.detach(), parameter.detach(), 64, gradient=True)


def test_the_seed_gives_the_numbers() -> None:
    model, batch = small()
    torch.manual_seed(1)
    first = towered(model, batch)
    torch.manual_seed(2)
    same, other = towered(model, batch), towered(model, batch, **DLRM_TOWERS, seed=1)
    assert torch.equal(first(*batch), same(*batch))
    assert not torch.equal(first(*batch), other(*batch))


def test_recompiles_keep_the_towers() -> None:
    model, batch = small()
    step_model = compiled(model)
    assert not hasattr(model, "dmt_towers")
    step_model(*batch)
    held = dict(model.dmt_towers.named_parameters())
    assert "replaced.top.0.weight" in held
    with torch.no_grad():
        for parameter in held.values():
            parameter.fill_(0.25)
    expected = step_model(*batch)
    for samples in (0, 1, 5):
        step_model(*make_batch(model, samples, torch.Generator().manual_seed(1)))
    step_model.eval()
    with torch.no_grad():
        assert torch.equal(step_model(*batch), expected)
    assert all(parameter is held[name] for name, parameter in model.dmt_towers.named_parameters())
    assert all(bool((parameter == 0.25).all()) for parameter in held.values())
    dense, ids, offsets = batch
    assert step_model.double()(dense.double(), ids, offsets).dtype == torch.float64


def test_every_model_has_towers_of_its_own() -> None:
    model, batch = small()
    other = copy.deepcopy(model)
    step_model, step_other = compiled(model), compiled(other)
    assert torch.equal(step_model(*batch), step_other(*batch))
    with torch.no_grad():
        model.dmt_towers.tower0.get_submodule("each.8").weight.zero_()
    assert not torch.equal(step_model(*batch), step_other(*batch))


def test_dynamo_limits_the_graphs_of_each_model_of_a_class_by_themselves() -> None:
    """Not of all together: beyond the limit a model would run uncompiled, and without its towers."""
    model, batch = small()
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for each in models:
            step_model = compiled(each)
            step_model(*batch)
            with torch.no_grad():
                step_model(*batch)
    assert all(hasattr(each, "dmt_towers") for each in models)


def test_a_state_dict_goes_from_the_compiled_model_to_the_transformed_one() -> None:
    model, batch = small()
    step_model = compiled(model)
    step_model(*batch)
    with torch.no_grad():
        for parameter in model.dmt_towers.parameters():
            parameter.mul_(1.5)
    state = dmt_compile.full_state_dict(step_model)
    assert {"top.0.weight", "dmt_towers.replaced.top.0.weight", "dmt_towers.tower1.each.8.bias"} <= state.keys()
    fresh, _ = small(seed=3)
    result = towered(fresh, batch)
    result.load_state_dict(state)
    assert torch.equal(result(*batch), step_model(*batch))
    second, _ = small(seed=4)
    step_second = compiled(second)
    step_second(*batch)
    second.load_state_dict(state)
    assert torch.equal(step_second(*batch), step_model(*batch))
    flat, _ = small(seed=5)
    assert {name.split(".")[0] for name in flat.load_state_dict(state, strict=False).unexpected_keys} == {"dmt_towers"}


def test_a_transformed_model_keeps_its_towers_together() -> None:
    model, batch = small()
    result = towered(model, batch)
    apart = [["emb.0", "emb.2"], ["emb.1", "emb.3"]]
    assert apart != [list(tower.tables) for tower in result.dmt_plan.towers]
    text = "partition_towers: expected the tables of the transformed model's tower0 together, found emb"
    with pytest.raises(PlanError, match=text):
        compiled(result, partition=apart)(*batch)


def test_transforming_what_is_transformed_is_refused() -> None:
    model, batch = small()
    result = towered(model, batch)
    plan = dmt_compile.plan(model, batch, "1x1", **DLRM_TOWERS)
    with pytest.raises(ConfigError, match="transform: expected a flat model, found one that has its Tower Modules"):
        dmt_compile.transform(result, batch, plan)


# ------------------------------------------------------------------------------------------ optimizers


def test_an_optimizer_that_misses_the_towers_is_caught_at_its_first_step() -> None:
    model, batch = small()
    early = torch.optim.SGD(model.parameters(), 0.1)
    step_model = compiled(model)
    step_model(*batch).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    text = r"expected an optimizer for the Tower Modules' parameter dmt_towers\.replaced\..* found none; .*warmup"
    with pytest.raises(ConfigError, match=text):
        early.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1).step()  # another model's optimizer is none of its business
    late = torch.optim.SGD(model.dmt_towers.parameters(), 0.1)
    early.step()  # now all are held
    late.step()
    assert all(torch.equal(p, b) for p, b in zip(model.top[2].parameters(), before[-2:], strict=True)) is False


def test_warmup_compiles_and_changes_nothing_else() -> None:
    class Normed(DLRM):
        def __init__(self) -> None:
            super().__init__(rows=(9, 6, 11))
            self.norm = nn.BatchNorm1d(5)

        def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
            return super().forward(self.norm(dense), ids, offsets)

    torch.manual_seed(0)
    model = Normed()
    batch = make_batch(model, 6, torch.Generator().manual_seed(0))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    step_model = compiled(model)
    assert dmt_compile.warmup(step_model, batch) is None
    assert torch.equal(random, torch.get_rng_state())
    assert hasattr(model, "dmt_towers")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------- refusals


class Apart(DLRM):
    """One feature is used apart from the join."""

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        return super().forward(dense, ids, offsets) + self.emb[0](ids[0], offsets[0]).sum(1) * dense.sum()


def test_without_a_known_interaction_towers_are_refused_and_the_rest_still_compiles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.ModuleList(nn.EmbeddingBag(7, 4, mode="sum") for _ in range(3))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            a, b, c = (table(ids[:, i : i + 1]) for i, table in enumerate(self.emb))
            return (a * b + c).sum(1)

    model, ids = Summed(), torch.randint(0, 7, (5, 3))
    explanation = dmt_compile.explain(model, ids, "2x2", tower_module="dcn")
    [refusal] = [item for item in explanation.unmatched if "Tower Modules are refused" in item.reason]
    assert "no cat or stack joins the vectors of several features" in refusal.reason
    assert explanation.plan.tower_modules is None
    assert "test_transformation.py" in refusal.source_line
    assert torch.equal(compiled(model, tower_module="dcn")(ids), model(ids))
    assert not hasattr(model, "dmt_towers")
    torch._dynamo.reset()
    with pytest.raises(UnsupportedGraphError, match="no cat or stack joins the vectors"):
        compiled(model, tower_module="dcn", strict=True)(ids)
    plan = replace(dmt_compile.plan(model, ids, "1x1"), tower_modules=TowerModules("dcn"))
    text = (
        r"transform: expected features that meet in an interaction, found Tower Modules are refused: no cat .*\.py:\d+"
    )
    with pytest.raises(UnsupportedGraphError, match=text):
        dmt_compile.transform(model, ids, plan)
    with pytest.raises(UnsupportedGraphError, match="found that it has no embedding table"):
        dmt_compile.transform(nn.Linear(3, 2), torch.ones(2, 3), plan)


def test_a_layer_that_features_share_with_the_dense_part_keeps_its_size() -> None:
    torch.manual_seed(0)
    model = Projected()
    batch = make_batch(model, 4, torch.Generator().manual_seed(0))
    [refusal] = dmt_compile.explain(model, batch, "1x1", **{**DLRM_TOWERS, "tower_module": "dcn"}).unmatched
    assert "it is also what features pass through before they meet: 8 columns would become 4" in refusal.reason
    same = {"tower_module": "dlrm", "towers": 2}
    assert torch.equal(compiled(copy.deepcopy(model), **same)(*batch), towered(model, batch, **same)(*batch))


def test_towers_that_share_a_module_are_refused() -> None:
    model, batch = small()
    one = nn.Sequential(nn.Flatten(1), nn.Linear(16, 16))
    with pytest.raises(
        ConfigError, match=r"a module of its own for each tower, found that tower0 and tower1 share 1\.w"
    ):
        compiled(model, tower_module=lambda tower: one, towers=2, partition="strided")(*batch)


def test_towers_belong_to_the_first_graph_that_has_some() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = DLRM(rows=(9, 6, 11, 5)), DLRM(rows=(4, 7, 8, 3))

        def forward(self, *batch: Any) -> torch.Tensor:
            before = self.first(*batch).detach()  # Dynamo warns of an argument that is no leaf
            torch._dynamo.graph_break()
            dense, ids, offsets = batch
            return before + self.second(dense, [i % 3 for i in ids], offsets)

    torch.manual_seed(0)
    model = Twice()
    batch = make_batch(model.first, 4, torch.Generator().manual_seed(0))
    expected = model.second(batch[0], [i % 3 for i in batch[1]], batch[2])
    step_model = compiled(model)
    out = step_model(*batch)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"first", "second", "dmt_towers"}
    assert {name for names in model.dmt_towers.tables.values() for name in names} == {
        f"first.emb.{i}" for i in range(4)
    }
    with torch.no_grad():
        for parameter in model.second.top[2].parameters():
            parameter.zero_()
    torch.testing.assert_close(out, step_model(*batch) + expected)  # the second graph is the flat one


def test_a_function_has_no_place_for_towers() -> None:
    tables = [nn.Parameter(torch.randn(7, 4)) for _ in range(3)]
    top = torch.randn(12, 1)

    def score(ids: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        rows = [nn.functional.embedding(ids[:, i], weight) for i, weight in enumerate(weights)]
        return torch.cat(rows, dim=1) @ top

    with pytest.raises(ConfigError, match="towers: expected a module that can hold the Tower Modules' parameters"):
        compiled(score, tower_module="dlrm")(torch.randint(0, 7, (5, 3)), *tables)  # type: ignore[arg-type]
