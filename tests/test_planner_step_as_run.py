"""What a training loop puts around the planned call: further calls before the backward, a loss, outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planner
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
    budget = 0.6 * peak_bytes(twin, 2)
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
