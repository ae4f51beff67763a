"""What trains without the usual call: frozen networks, eval mode, parts of a model called by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner import _compat
from tests import tiny
from tests.hf import FAST


def frozen(n: int = 4) -> nn.Module:
    return tiny.seeded(lambda: tiny.blocks(n)).requires_grad_(False)


def given(*, wants: bool = True) -> Tensor:
    return torch.linspace(-1, 1, 64 * 32).reshape(64, 32).requires_grad_(wants)


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.autograd.grad(model(x).square().mean(), x)[0]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per capture of a step."""
    made, original = [], _compat.export_joint
    monkeypatch.setattr(_compat, "export_joint", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


# -- frozen networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_network_is_planned_for_the_gradient_of_its_input(trained: bool) -> None:
    """A discriminator, a perceptual loss, a reward model: in training mode or not, whoever made the input."""
    model, x = frozen().train(trained), given()
    made = x * 1  # by another network
    loose = planner.plan(model, 1, (made,), **FAST)
    plan = planner.plan(model, 0.85 * loose.peak_bytes / 1e9, (made,), **FAST)
    report = plan.verify()
    assert report.ok and report.comparison.gradients.count == 1 and report.recompute_flops > 0
    assert report.peak_bytes == report.predicted_peak_bytes
    twin = copy.deepcopy(model)
    plan.apply(model)
    assert planner.measure.step_peak(model, (made,)) == plan.peak_bytes <= plan.budget_bytes
    assert torch.equal(input_gradient(model, x), input_gradient(twin, x))


def test_a_layer_without_parameters_is_planned_too() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Softmax(-1), nn.GELU())
    assert planner.plan(model, 1, (given(),), **FAST).verify().ok
    planner.enable(model, 1, now=True, **FAST)
    assert torch.equal(input_gradient(model, given()), input_gradient(nn.Sequential(*model), given()))
    assert planner.plan_of(model) is not None


def test_nothing_at_all_to_differentiate_is_refused() -> None:
    with pytest.raises(planner.PlannerError, match=r"no trainable parameter .* no input that requires grad"):
        planner.plan(frozen(), 1, (given(wants=False),), **FAST)


def test_a_discriminator_frozen_at_every_other_step_is_captured_once_each_way(captures: list[Any]) -> None:
    maker, judge = tiny.seeded(lambda: tiny.blocks(1)), tiny.seeded(tiny.blocks)
    twins = copy.deepcopy((maker, judge))
    planner.enable(judge, 1, now=True, **FAST)
    seen = []
    for make, ask in ((maker, judge), twins):
        torch.manual_seed(0)
        for _ in range(3):
            ask.requires_grad_(True)
            ask(make(given(wants=False)).detach()).mean().backward()
            ask.requires_grad_(False)
            ask(make(given(wants=False))).mean().backward()
        seen.append([p.grad for p in (*make.parameters(), *ask.parameters())])
    assert all(torch.equal(p, q) for p, q in zip(*seen, strict=True))
    assert len(captures) == 2
    judge(given(wants=False)).mean()  # frozen, and nothing asks for a gradient: as it always ran
    assert len(captures) == 2
