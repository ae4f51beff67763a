"""What a training loop puts around the planned call: further calls before the backward, a loss, outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner._compat import watching_modes
from planner.measure import StorageMeter
from planner.training.ondemand import OnDemand
from tests import tiny
from tests.hf import FAST


def net() -> nn.Module:
    return tiny.seeded(lambda: tiny.blocks(6, 32))


def view(seed: int) -> Tensor:
    return torch.randn(300, 32, generator=torch.Generator().manual_seed(seed))


def peak_bytes(model: nn.Module, views: int) -> int:
    """Of a step that compares so many views of a batch, from empty gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    with StorageMeter("cpu") as meter:
        meter.register(*model.parameters())
        sum((model(view(i)).mean() for i in range(views)), torch.zeros(())).backward()
    return meter.peak_bytes


# -- calls of one step ----------------------------------------------------------------------------


def test_a_plain_loop_of_two_views_shows_its_count_in_the_first_step() -> None:
    model, twin = net(), net()
    budget = 0.7 * peak_bytes(twin, 2)
    planner.enable(model, budget / 1e9, **FAST, now=True)
    for _ in range(3):
        assert peak_bytes(model, 2) <= budget
        assert all(
            torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
    switch = vars(model)["_planner_switch"]
    assert switch.calls == 2 and switch.plan.recompute_flops > 0


def test_a_loop_of_one_call_has_its_plan_from_the_first_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    budget = 0.6 * peak_bytes(net(), 1)
    planner.enable(model, budget / 1e9, **FAST, now=True, outputs="held")
    first = peak_bytes(model, 1)
    plan = planner.plan_of(model)
    assert first <= plan.peak_bytes <= budget  # room was left for another call, as far as there was any
    monkeypatch.setattr(OnDemand, "make", lambda *_: pytest.fail("planned again"))
    assert first < peak_bytes(model, 1) <= budget
    assert planner.plan_of(model) is plan


# -- what lies beside the call --------------------------------------------------------------------


def heavy_loss(outputs: Tensor) -> Tensor:
    """Keeps four tensors as large as its argument."""
    return (outputs.exp().sin().exp().sin() * 1e-3).mean()


def metered(model: nn.Module, loss_fn: Any, x: Tensor) -> int:
    """Peak bytes of a step, counted from outside."""
    model.zero_grad()
    torch.manual_seed(0)
    with StorageMeter("cpu") as meter:
        meter.register(*model.parameters(), x)
        loss_fn(model(x)).backward()
    return meter.peak_bytes


def train(model: nn.Module, loss_fn: Any, x: Tensor, steps: int = 1) -> None:
    for _ in range(steps):
        model.zero_grad()
        torch.manual_seed(0)
        loss_fn(model(x)).backward()


def test_a_loss_outside_is_said_once_and_planned_for(caplog: pytest.LogCaptureFixture) -> None:
    model, twin, x = net(), net(), view(0)
    budget = 0.8 * metered(twin, heavy_loss, x)
    planner.enable(model, budget / 1e9, **FAST, now=True)
    train(model, heavy_loss, x, steps=4)
    assert watching_modes() == 0
    (told,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert "over its budget: the loop holds" in told and "loss_fn=" in told
    plan = planner.plan_of(model)
    assert plan.breakdown["margin"] > 0
    assert metered(model, heavy_loss, x) <= budget
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_loop_that_holds_nothing_beside_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), view(0)
    budget = 0.7 * metered(net(), Tensor.mean, x)
    planner.enable(model, budget / 1e9, **FAST, now=True)
    train(model, Tensor.mean, x, steps=2)
    plan = planner.plan_of(model)
    train(model, Tensor.mean, x, steps=4)
    assert planner.plan_of(model) is plan and plan.breakdown["margin"] == 0
    assert watching_modes() == 0 and not [r for r in caplog.records if r.levelname == "WARNING"]


def test_where_nothing_can_be_done_it_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), view(0)
    with pytest.raises(planner.InfeasibleBudgetError) as least:
        planner.plan(net(), 1e-6, (x,), **FAST)
    planner.enable(model, 1.01 * least.value.minimum_bytes / 1e9, **FAST, now=True)
    train(model, heavy_loss, x, steps=5)
    told = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 2 and "over its budget" in told[0] and "trains on without regard" in told[1]


def test_a_meter_of_ones_own_is_never_mixed_up_with_ours() -> None:
    model, x = net(), view(0)
    planner.enable(model, 1, **FAST, now=True)
    outputs = model(x)
    with StorageMeter("cpu") as meter:
        loss = outputs.mean()
        loss.backward()
        del outputs, loss
        assert watching_modes() == 2
    assert meter.peak_bytes and watching_modes() == 1
    with torch.no_grad():
        model(x)
    assert watching_modes() == 0


def test_an_evaluation_between_metered_steps_leaves_torch_as_it_was() -> None:
    """inference_mode puts the thread's dispatch keys back: a meter taken off inside would be among them."""
    model = planner.enable(tiny.blocks(1, 8).train(), 1, **FAST, now=True)
    x = torch.randn(2, 8)
    for _ in range(2):
        loss = model(x).sum()
        loss.backward()
        with torch.inference_mode():
            model(x)  # the next call
        assert torch.empty(2).shape == (2,)
        loss = model(x).sum()
        loss.backward()
        with torch.inference_mode():
            del loss  # what the call held is gone
        assert torch.empty(2).shape == (2,)
    model(x).sum().backward()
    model(x)
    assert watching_modes() == 0
