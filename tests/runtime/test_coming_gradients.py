"""Gradients that come later: nothing waits until it must, and what reads one reads its value."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import dmt_compile
from dmt_compile.errors import ConfigError
from dmt_compile.runtime.coming_gradients import ComingGradient, coming_gradients, let_step_wait, step_can_wait
from dmt_compile.runtime.deferred_step import DeferredStep


class Arrival:
    """Stands for a collective: counts how often it is waited for."""

    def __init__(self, *values: torch.Tensor) -> None:
        self.values, self.waits = list(values), 0

    def __call__(self) -> list[torch.Tensor]:
        self.waits += 1
        return self.values


def one(value: torch.Tensor) -> tuple[torch.Tensor, ComingGradient, Arrival]:
    parameter, arrival = torch.zeros_like(value, requires_grad=True), Arrival(value)
    [coming] = coming_gradients([parameter], arrival)
    return parameter, coming, arrival


def test_its_shape_is_known_before_it_is_there() -> None:
    parameter, coming, arrival = one(torch.arange(6.0).view(2, 3))
    parameter.grad = coming
    assert (coming.shape, coming.dtype, coming.device) == (parameter.shape, parameter.dtype, parameter.device)
    assert parameter.grad is coming
    assert coming.under_way
    assert arrival.waits == 0


def test_any_operation_waits_once_and_gives_ordinary_tensors() -> None:
    value = torch.arange(6.0).view(2, 3)
    _, coming, arrival = one(value)
    assert torch.equal(coming + 1, value + 1)
    assert type(coming + 1) is torch.Tensor
    assert torch.equal(torch.cat([coming, coming]), torch.cat([value, value]))
    [first] = torch._foreach_mul([coming], 2.0)
    assert torch.equal(first, 2 * value)
    assert float(coming.norm()) == float(value.norm())
    assert "0." in repr(coming)
    assert coming.tolist() == coming.numpy().tolist() == value.tolist()
    assert arrival.waits == 1
    assert not coming.under_way


def test_writes_reach_what_arrived() -> None:
    value = torch.ones(3)
    parameter, coming, _ = one(value)
    assert coming.mul_(2.0) is coming
    torch._foreach_add_([coming], 1.0)
    parameter.grad = coming
    parameter.sum().backward()  # autograd adds to it
    assert torch.equal(value, torch.full((3,), 4.0))


def test_copies_are_ordinary_tensors() -> None:
    value = torch.arange(3.0)
    _, coming, _ = one(value)
    copied, file = copy.deepcopy(coming), io.BytesIO()
    torch.save(coming, file)
    file.seek(0)
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, value)
    assert torch.equal(torch.load(file), value)


def deferring(*parameters: torch.Tensor, lr: float | torch.Tensor = 1.0) -> tuple[torch.optim.Optimizer, DeferredStep]:
    optimizer = torch.optim.SGD(parameters, lr)
    deferred = DeferredStep(optimizer)
    for parameter in parameters:
        let_step_wait(parameter, deferred.finish)
    return optimizer, deferred


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_a_step_is_done_with_the_options_of_when_it_was_asked_for(lr: float | torch.Tensor) -> None:
    now, later = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer, deferred = deferring(now, later, lr=lr)
    arrival = Arrival(torch.ones(2))
    now.grad, [later.grad] = torch.ones(2), coming_gradients([later], arrival)
    deferred.step()
    group = optimizer.param_groups[0]
    if isinstance(lr, torch.Tensor):
        group["lr"].fill_(8.0)
    else:
        group["lr"] = 8.0
    assert (now.tolist(), later.tolist()) == ([-0.5] * 2, [0.0] * 2)
    assert arrival.waits == 0
    optimizer.zero_grad()
    deferred.finish()
    deferred.finish()
    assert (now.tolist(), later.tolist()) == ([-0.5] * 2, [-0.5] * 2)
    assert float(group["lr"]) == 8.0
    if isinstance(lr, torch.Tensor):
        assert group["lr"] is lr
    assert now.grad is None
    assert later.grad is None


def test_a_step_comes_before_what_writes_to_its_gradient() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer, deferred = deferring(parameter)
    [coming] = coming_gradients([parameter], Arrival(torch.ones(2)))
    parameter.grad = coming
    deferred.step()
    optimizer.zero_grad(set_to_none=False)
    assert parameter.tolist() == [-1.0] * 2
    assert type(parameter.grad) is torch.Tensor
    assert parameter.grad.tolist() == [0.0] * 2


@pytest.mark.parametrize("what", ["closure", "hook", "gradient was read"])
def test_a_step_that_others_watch_is_done_at_once(what: str) -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer, deferred = deferring(parameter)
    [coming] = coming_gradients([parameter], Arrival(torch.ones(2)))
    parameter.grad = coming
    steps: list[int] = []
    if what == "hook":
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
    if what == "gradient was read":
        coming.sum()
    deferred.step((lambda: steps.append(1) or 0.0) if what == "closure" else None)
    assert parameter.tolist() == [-1.0] * 2
    assert len(steps) == (what != "gradient was read")


def test_an_error_on_the_way_leaves_the_optimizer_as_it_was() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer, deferred = deferring(parameter)

    def breaks() -> list[torch.Tensor]:
        raise RuntimeError("on the way")

    [parameter.grad] = coming_gradients([parameter], breaks)
    deferred.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="on the way"):
        deferred.finish()
    assert parameter.tolist() == [0.0] * 2
    assert parameter.grad is None
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_one_process_steps_as_ever() -> None:
    model = nn.Linear(2, 1)
    compiled = torch.compile(model, backend="dmt")
    optimizer = torch.optim.Adam(model.parameters())
    dmt_compile.defer_step(optimizer, compiled)
    assert all(map(step_can_wait, model.parameters()))
    before = model.weight.detach().clone()
    compiled(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_what_cannot_be_deferred_is_refused() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    compiled = torch.compile(model, backend="dmt")
    with pytest.raises(ConfigError, match=r"defer_step: expected what torch\.compile"):
        dmt_compile.defer_step(torch.optim.SGD(model.parameters()), model)
    with pytest.raises(ConfigError, match=r"expected an optimizer of ASGD, Adadelta, .*found LBFGS"):
        dmt_compile.defer_step(torch.optim.LBFGS(model.parameters()), compiled)
    with pytest.raises(ConfigError, match="found none of them in it"):
        dmt_compile.defer_step(torch.optim.SGD(other.parameters()), compiled)
    optimizer = torch.optim.SGD(model.parameters())
    dmt_compile.defer_step(optimizer, compiled)
    with pytest.raises(ConfigError, match="not deferred yet"):
        dmt_compile.defer_step(optimizer, compiled)


def test_a_parameter_remembers_what_finishes_its_step() -> None:
    parameter = torch.zeros(1)
    assert step_can_wait(parameter) is None
    let_step_wait(parameter, print)
    assert step_can_wait(parameter) is print
