"""Certificates: what they claim, how they are drawn and kept, and that a planted fault is found and named."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile import Certificate, Topology
from dmt_compile.distinct_batches import Call, draw_calls, find_reads, same_call
from dmt_compile.errors import ConfigError
from dmt_compile.ir import gradient_ops
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.ir.stages import Effect
from dmt_compile.ir.tower_regions import TowerRegions
from dmt_compile.runtime import simulated_world
from dmt_compile.runtime.averaging import Reduction
from dmt_compile.runtime.route import Layout
from dmt_compile.tolerances import absolute_error, reordered_limit, ulp_error
from tests.models import DLRM, Batch, Projected, make_batch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def small(samples: int = 6) -> tuple[DLRM, Batch]:
    torch.manual_seed(0)
    model = DLRM(rows=(9, 6, 11), dims=4)
    return model, make_batch(model, samples, torch.Generator().manual_seed(0))


def eagerly(model: nn.Module, batch: Any, topology: str = "2x2", **options: Any) -> Certificate:
    return dmt_compile.certify(model, batch, topology, dense_compiler="eager", **options)


class Named(nn.Module):
    """Lookups side by side, and a head; the outputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.EmbeddingBag(8, 3, mode="sum")
        self.b = nn.EmbeddingBag(5, 2, mode="mean", sparse=True)
        self.head = nn.Linear(5, 1)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, *, extra: torch.Tensor) -> dict[str, Any]:
        pooled = torch.cat([self.a(ids, offsets), self.b(ids % 5, offsets)], dim=1)
        return {"pooled": pooled, "scores": (self.head(pooled) + extra, offsets.clone()), "name": "named"}


def named_call() -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    return (torch.tensor([1, 7, 3, 3, 0]), torch.tensor([0, 2, 2])), {"extra": torch.randn(3, 1)}


# --------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize("topology", ["1x1", "2x2", "1x3"])
def test_a_dlrm_holds_bitwise_forward_and_within_the_tolerance_backward(topology: str) -> None:
    model, batch = small()
    certificate = eagerly(model, batch, topology)
    assert certificate.holds
    output, *gradients = certificate.quantities
    assert (output.name, output.kind, output.effect, output.limit) == ("output", "output", Effect.EXACT, 0.0)
    assert output.max_abs_error == output.max_ulp_error == 0
    assert [(q.name, q.kind) for q in gradients] == [(name, "gradient") for name, _ in model.named_parameters()]
    ranks = Topology.parse(topology).world_size
    most_read = ranks * max(map(len, batch[1]))
    assert certificate.longest_sum == max(most_read, 16, ranks * 6)
    for q in gradients:
        assert q.effect is Effect.REORDERED
        assert q.max_relative_error <= q.limit == 1e-5 * math.sqrt(certificate.longest_sum)
    assert certificate.effect is (Effect.EXACT if topology == "1x1" else Effect.REORDERED)
    assert certificate.topology == topology
    assert certificate.plan_fingerprint == dmt_compile.plan(model, batch, topology).fingerprint


def test_another_dense_compiler_claims_less() -> None:
    model, batch = small()
    certificate = dmt_compile.certify(model, batch, "2x1", dense_compiler="aot_eager", towers=1)
    output = certificate.quantities[0]
    assert certificate.holds
    assert output.effect is Effect.REORDERED
    assert output.limit == 2e-6 * math.sqrt(certificate.longest_sum)
    assert certificate.options == {"dense_compiler": "aot_eager", "towers": 1}


def test_outputs_of_any_structure_are_named() -> None:
    torch.manual_seed(0)
    args, kwargs = named_call()
    certificate = eagerly(Named(), args, "2x1", kwargs=kwargs)
    assert certificate.holds
    assert [q.name for q in certificate.quantities] == [
        "output['pooled']", "output['scores'][0]", "output['scores'][1]", "a.weight", "b.weight", "head.weight",
        "head.bias",
    ]  # fmt: skip


class Normalised(nn.Module):
    """A bias before BatchNorm: its gradient is rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(8, 3, mode="sum")
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(self.emb(ids, offsets))) * self.frozen


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_untouched(training: bool) -> None:
    torch.manual_seed(0)
    model = Normalised().train(training)
    model.layer.bias.grad = torch.full((4,), 3.0)
    batch = (torch.tensor([1, 7, 3, 3, 0, 6]), torch.tensor([0, 2, 3, 4]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, random = {name: dict(m.__dict__) for name, m in model.named_modules()}, torch.get_rng_state()
    certificate = eagerly(model, batch)
    assert certificate.holds
    assert [q.name for q in certificate.quantities if q.kind == "gradient"] == [
        "emb.weight", "layer.weight", "layer.bias", "norm.weight", "norm.bias",
    ]  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == attributes
    assert torch.equal(model.layer.bias.grad, torch.full((4,), 3.0))
    assert model.emb.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(tensor.__dict__ == {} for tensor in batch)


def test_without_gradients_only_outputs_are_compared() -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(8, 3, mode="sum").requires_grad_(False)
    certificate = eagerly(model, (torch.tensor([1, 7, 3]), torch.tensor([0, 2])), "2x1")
    assert certificate.holds
    assert [q.name for q in certificate.quantities] == ["output"]


# --------------------------------------------------------------------------------------------------------------- faults


def wrong(certificate: Certificate) -> set[str]:
    assert not certificate.holds
    return {q.name for q in certificate.quantities if not q.holds}


def test_a_wrong_peer_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small()
    monkeypatch.setattr(Topology, "peer_order", lambda self: tuple(range(self.world_size)))
    found = eagerly(model, batch)
    assert "output" in wrong(found)
    assert "DOES NOT HOLD" in str(found)


def test_table_gradients_without_the_mean_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small()
    monkeypatch.setattr(gradient_ops._ScaleGradient, "backward", staticmethod(lambda ctx, *grads: (grads[0], None)))
    found = eagerly(model, batch, "2x1")
    assert wrong(found) == {"emb.0.weight", "emb.1.weight", "emb.2.weight"}
    assert found.quantities[1].max_relative_error == pytest.approx(1.0)


def test_dense_gradients_without_the_mean_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small()
    monkeypatch.setattr(Reduction, "divisor", lambda self, topology: 1)
    dense = {name for name, _ in model.named_parameters() if not name.startswith("emb")}
    assert wrong(eagerly(model, batch, "1x2")) == dense


def moving(change: Callable[[str, str, list[torch.Tensor]], list[torch.Tensor]]) -> Callable[..., Any]:
    """Return a ``_Transfer.move`` whose result ``change(hop, direction, received)`` has touched."""
    move = simulated_world._Transfer.move

    def changed(self: Any, tensors: Any, backward: bool = False) -> list[torch.Tensor]:
        return change(self.hop, "backward" if backward else "forward", move(self, tensors, backward))

    return changed


def test_one_value_off_by_one_ulp_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hop: str, direction: str, received: list[torch.Tensor]) -> list[torch.Tensor]:
        if (hop, direction) == ("peer", "forward"):
            received[3][-1:] = torch.nextafter(received[3][-1:], torch.tensor(math.inf))
        return received

    monkeypatch.setattr(simulated_world._Transfer, "move", moving(change))
    args, kwargs = named_call()
    found = eagerly(Named(), args, kwargs=kwargs)
    assert "output['pooled']" in wrong(found)
    pooled = next(q for q in found.quantities if q.name == "output['pooled']")
    assert pooled.max_ulp_error == 1
    assert 0 < pooled.max_relative_error < 1e-6


def test_ids_that_go_to_the_wrong_rank_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hop: str, direction: str, received: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part.flip(0) if hop == "peer" and direction == "backward" else part for part in received]

    monkeypatch.setattr(simulated_world._Transfer, "move", moving(change))
    found = wrong(eagerly(*small()))
    assert "output" not in found
    assert found >= {"emb.0.weight", "emb.2.weight"}


def test_a_lost_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = simulated_world._LockstepProgram.run

    def lossy(self: Any, args: Any) -> list[Any]:
        def lose(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.shape == (6, 4):
                return torch.cat([value[:5], value[:1]])
            return value

        return run(self, [tuple(map(lose, rank_args)) for rank_args in args])

    monkeypatch.setattr(simulated_world._LockstepProgram, "run", lossy)
    model, batch = small()
    batch[1][1][:1] = 5
    assert wrong(eagerly(model, batch, "1x2")) >= {"output", "emb.1.weight"}


def test_numbers_that_became_nan_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hop: str, direction: str, received: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part * math.nan if hop == "peer" and direction == "forward" else part for part in received]

    monkeypatch.setattr(simulated_world._Transfer, "move", moving(change))
    found = eagerly(*small())
    assert "output" in wrong(found)
    assert found.max_abs_error == found.max_ulp_error == math.inf
    assert Certificate.from_json(found.to_json()) == found


# -------------------------------------------------------------------------------------------------------------- batches


class Columns(nn.Module):
    """An embedding a column, as float and as integer columns, with a mask beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(50, 2)
        self.second = nn.Embedding(3, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x[:, 0].long()), self.second(ids[:, 1]), self.first(ids[:, 0]), x[:, 1:]], dim=1)


class Padded(nn.Module):
    """Sequences with a padding index and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 2, padding_idx=2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.emb(ids) * mask.unsqueeze(2)).sum(1)


class Joined(nn.Module):
    """Two features one after another in one tensor, with their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, 2, mode="sum") for rows in (40, 4))

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        bags = len(lengths) // 2
        offsets = lengths.cumsum(0) - lengths
        first = self.tables[0](values[:6], offsets[:bags])
        return torch.cat([first, self.tables[1](values[6:], offsets[bags:] - 6)], dim=1)


def drawn(model: nn.Module, *args: Any, ranks: int = 5) -> list[Any]:
    """Return the drawn positional arguments, after checking that all differ and that the model takes them."""
    call: Call = (args, {})
    calls = draw_calls(model, call, find_reads(model, call), ranks, seed=0)
    assert calls[0] is call
    for rank, mine in enumerate(calls):
        model(*mine[0])
        assert not any(same_call(mine, other) for other in calls[:rank])
    return [mine[0] for mine in calls]


def test_ids_offsets_and_samples_are_drawn_anew() -> None:
    model, batch = small()
    for dense, ids, offsets in drawn(model, *batch)[1:]:
        assert not torch.equal(dense, batch[0])
        for table, new, old in zip(model.emb, ids, batch[1], strict=True):
            step = (new - old) % table.num_embeddings
            assert len(set(step.tolist())) == 1
            assert step[0] != 0
        assert any(not torch.equal(new, old) for new, old in zip(offsets, batch[2], strict=True))
        for new, old in zip(offsets, batch[2], strict=True):
            assert torch.equal(new.diff().sort().values, old.diff().sort().values)


def test_columns_keep_to_their_tables() -> None:
    x = torch.tensor([[49.0, 0.5], [0.0, 0.25], [7.0, 1.5]])
    ids = torch.tensor([[48, 0], [3, 2], [9, 1]])
    for new_x, new_ids in drawn(Columns(), x, ids)[1:]:
        assert sorted(new_x[:, 0].tolist()) == [0.0, 7.0, 49.0]  # whole numbers may be ids
        assert not set(new_x[:, 1].tolist()) & {0.5, 0.25, 1.5}
        assert torch.equal(new_ids.sort(0).values, ids.sort(0).values)


def test_the_layout_in_memory_stays_as_it_is() -> None:
    ids = torch.tensor([[48, 0], [3, 2], [9, 1]])
    calls = drawn(nn.Embedding(3, 2), ids[:, 1], ranks=3)
    assert {(mine[0].stride(), mine[0].storage_offset()) for mine in calls} == {((2,), 1)}
    repeated = torch.tensor([[1.0], [2.5]]).expand(2, 3)
    assert len(drawn(nn.Linear(3, 1), repeated)) == 5


def test_padding_stays_padding_and_masks_stay_masks() -> None:
    ids, mask = torch.tensor([[0, 1, 2], [6, 2, 2]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for new_ids, new_mask in drawn(Padded(), ids, mask)[1:]:
        assert torch.equal(new_ids[ids == 2], ids[ids == 2])
        assert set(new_mask.unique().tolist()) == {0.0, 1.0}


def test_what_the_flat_model_refuses_is_drawn_otherwise_or_left_alone() -> None:
    values, lengths = torch.tensor([39, 20, 30, 11, 12, 13, 3, 2, 1]), torch.tensor([2, 4, 0, 3])
    for new_values, new_lengths in drawn(Joined(), values, lengths)[1:]:
        assert torch.equal(new_lengths, lengths)
        assert not torch.equal(new_values, values)


def test_what_cannot_be_drawn_or_is_equal_is_refused() -> None:
    one_row = nn.EmbeddingBag(1, 3, mode="sum")
    batch = (torch.tensor([0, 0]), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="expected a batch from which 2 different ones can be drawn, found none for"):
        eagerly(one_row, batch, "2x1")
    model, batch = small()
    again = copy.deepcopy(batch)
    other = make_batch(model, 4, torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match="expected different batches, found the same one for ranks 0 and 2"):
        eagerly(model, [batch, other, again], "1x3")
    with pytest.raises(ConfigError, match="expected one batch for each of 3 ranks, found 2 and 2"):
        eagerly(model, [batch, other], "1x3")
    assert eagerly(model, [batch, other], "1x2").holds


def test_a_list_of_batches_may_hold_empty_ones_and_keywords() -> None:
    torch.manual_seed(0)
    (ids, offsets), kwargs = named_call()
    batches = [(ids, offsets), (ids[:0], offsets[:0]), (ids[:0], offsets[:0])]
    words = [kwargs, {"extra": torch.empty(0, 1)}, {"extra": torch.empty(0, 1)}]
    assert eagerly(Named(), batches, "3x1", kwargs=words).holds
    with pytest.raises(ConfigError, match="expected one mapping for 'kwargs' beside one batch, found a list"):
        eagerly(Named(), (ids, offsets), "3x1", kwargs=words)


# -------------------------------------------------------------------------------------------------------------- misuse


def test_a_model_with_random_numbers_is_refused_unless_they_are_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Dropout(0.5))
    ids = torch.tensor([1, 6, 2])
    with pytest.raises(ConfigError, match=r"expected a model without random numbers, found that it draws some.*eval"):
        eagerly(model, ids, "2x1")
    assert eagerly(model.eval(), ids, "2x1").holds


def test_models_that_cannot_be_compared_are_refused() -> None:
    with torch.device("meta"):
        unbuilt = DLRM()
    with pytest.raises(ConfigError, match="expected a model with values, found one on the meta device"):
        eagerly(unbuilt, small()[1])

    class Silent(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> str:
            super().forward(ids)
            return "nothing"

    with pytest.raises(ConfigError, match=r"expected tensors in the model's output .* found none"):
        eagerly(Silent(5, 2), torch.tensor([1, 2]), "1x1")
    with pytest.raises(ConfigError, match="found 'tower'; did you mean 'towers'"):
        eagerly(*small(), tower=1)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_certificate_saves_loads_and_prints(tmp_path: Path) -> None:
    model, batch = small()
    plan = dmt_compile.plan(model, batch, "2x1")
    certificate = eagerly(torch.compile(model, backend="dmt"), batch, "2x1", plan=plan, seed=5)
    path = tmp_path / "certificate.json"
    certificate.save(path)
    assert Certificate.load(path) == certificate
    assert certificate.seed == 5
    assert certificate.options["plan"] == f"plan {plan.fingerprint:016x}"
    assert certificate.versions["torch"] == torch.__version__
    text = str(certificate)
    assert text.startswith("Certificate: HOLDS. Compiled against flat on 2x1")
    for q in certificate.quantities:
        assert any(line.startswith(f"| {q.name} ") and q.effect.name in line for line in text.splitlines())
    for broken, message in [
        ("nothing", "expected a certificate in JSON"),
        ("{}", "expected a certificate in JSON"),
        (certificate.to_json().replace('"version": 1', '"version": 9'), "expected version 1, found 9"),
    ]:
        path.write_text(broken)
        with pytest.raises(ConfigError, match=message):
            Certificate.load(path)
    with pytest.raises(ConfigError, match="expected a readable file"):
        Certificate.load(tmp_path / "missing.json")


# ----------------------------------------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulps_are_steps_between_representable_values(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    ones = torch.tensor([1.0, -1.0, 0.0, math.nan], dtype=dtype)
    assert ulp_error(ones, ones) == absolute_error(ones, ones) == 0
    assert ulp_error(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)) == 0
    assert ulp_error(torch.tensor([1 + 3 * step], dtype=dtype), ones[:1]) == 3
    assert ulp_error(-torch.tensor([1 + 3 * step], dtype=dtype), ones[1:2]) == 3
    smallest = torch.tensor([torch.finfo(dtype).smallest_normal * step], dtype=dtype)
    assert ulp_error(smallest, -smallest) == 2
    assert ulp_error(ones[:1], ones[3:]) == absolute_error(ones[3:], ones[:1]) == math.inf
    assert ulp_error(ones[:1], ones[:1].to(torch.int32)) == absolute_error(ones, ones[:1]) == math.inf
    assert 0 < reordered_limit(dtype, 100) < reordered_limit(dtype, 100, gradient=True)


def test_integers_have_no_tolerance() -> None:
    assert reordered_limit(torch.int64, 100) == 0
    assert ulp_error(torch.tensor([4]), torch.tensor([1])) == 3


# ------------------------------------------------------------------------------------------ Tower Modules

TOWERS = {"tower_module": "dlrm", "tower_module_options": {"dim": 2}}


def test_towers_are_held_against_the_towered_model_of_one_process() -> None:
    model, batch = small()
    certificate = eagerly(model, batch, **TOWERS)
    assert certificate.holds
    assert certificate.effect is Effect.MODEL
    claims = {q.name: q.effect for q in certificate.quantities}
    assert claims["output"] is Effect.REORDERED
    assert {"dmt_towers.tower0.each.4.weight", "dmt_towers.tower1.each.4.bias", "top.0.weight"} <= claims.keys()
    assert not hasattr(model, "dmt_towers")


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiled_towers_pass_gradients_on_to_tables(compiler: str) -> None:
    model, batch = small()
    certificate = dmt_compile.certify(model, batch, "2x1", dense_compiler=compiler, **TOWERS)
    assert certificate.holds, certificate


def test_a_transformed_model_is_certified_like_any_other() -> None:
    model, batch = small()
    result = dmt_compile.transform(model, batch, dmt_compile.plan(model, batch, "2x2", **TOWERS))
    certificate = eagerly(result, batch)
    assert certificate.holds
    assert certificate.effect is Effect.REORDERED
    assert certificate.max_abs_error > 0 or certificate.quantities[0].effect is Effect.REORDERED


def features_reversed(patch: pytest.MonkeyPatch) -> None:
    found = Layout.group_features
    patch.setattr(Layout, "group_features", lambda self, group: found(self, group)[::-1])


def towers_change_places(patch: pytest.MonkeyPatch) -> None:
    place = TowerRegions.place_of
    patch.setattr(TowerRegions, "place_of", lambda self, m: len(self.runs) - 1 - place(self, m))


def averaged_over_the_tower(patch: pytest.MonkeyPatch) -> None:
    divisor = Reduction.divisor
    patch.setattr(Reduction, "divisor", lambda self, ranks: 2 if self.tower >= 0 else divisor(self, ranks))


def of_four_tables() -> tuple[DLRM, tuple[Any, ...]]:
    torch.manual_seed(0)
    model = DLRM(rows=(9, 6, 11, 5), dims=4)
    return model, make_batch(model, 6, torch.Generator().manual_seed(0))


def test_towers_without_a_fault_hold() -> None:
    assert eagerly(*of_four_tables(), **TOWERS).holds


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (features_reversed, "output"),
        (towers_change_places, "output"),
        (averaged_over_the_tower, r"dmt_towers\.tower0"),
    ],
)
def test_a_fault_in_towers_is_found(
    change: Callable[[pytest.MonkeyPatch], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    certificate = eagerly(*of_four_tables(), verify=False, **TOWERS)
    failed = [q.name for q in certificate.quantities if not q.holds]
    assert failed
    assert re.match(named, failed[0]), failed


def test_a_parameter_that_towers_share_gets_its_factor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Projected()
    batch = make_batch(model, 5, torch.Generator().manual_seed(0))
    assert eagerly(model, batch, tower_module="dlrm").holds
    torch._dynamo.reset()
    call = PassContext.call

    def without(self: PassContext, gm: Any, target: Any, *args: Any, like: Any = None) -> Any:
        if target is gradient_ops.scale_gradient and args[1] > 1:
            args = (args[0], 1.0)
        return call(self, gm, target, *args, like=like)

    monkeypatch.setattr(PassContext, "call", without)
    certificate = eagerly(model, batch, tower_module="dlrm", verify=False)
    assert [q.name for q in certificate.quantities if not q.holds] == ["project.weight", "project.bias"]
