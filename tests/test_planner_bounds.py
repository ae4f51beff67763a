"""What a plan calls proved holds of everything that runs: random ops keep no state unless they run again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import planner
from planner.measure import step_peak
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import PricedStep, prepare
from tests.models import CASES

QUICK = Search(time_limit_s=0.25)


class Noisy(nn.Module):
    """Layers, and a loss whose random op makes the peak."""

    def __init__(self, noise: int = 1000) -> None:
        super().__init__()
        self.noise = noise
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x)).mean() + torch.rand(self.noise, self.noise).mean()


class Mixed(nn.Module):
    """A stack of ``kinds``, some of which draw random numbers."""

    def __init__(self, kinds: list[str], width: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            if kind == "dropout":
                y = nn.functional.dropout(y, 0.3)
            elif kind == "noise":
                y = torch.tanh(y + torch.rand(y.shape))
            elif kind == "scaled":
                y = y * (1 + torch.randn(1000).sum() / 1000)
            x = x + torch.relu(y)
        return x.square().mean()


def planned_at(step: PricedStep, budgets: set[int]) -> list[Plan]:
    """Plans from the tightest budget up."""
    return [step.plan_bytes(b, QUICK) for b in sorted(budgets)]


def hold(step: PricedStep, plans: list[Plan]) -> None:
    """Nothing that was found is better than what was proved for as much memory or more."""
    for i, tighter in enumerate(plans):
        assert step.floor_bytes <= tighter.peak_bytes <= tighter.budget_bytes
        for looser in plans[i:]:
            assert looser.overhead_bound <= tighter.overhead
    top = plans[-1]
    assert top.budget_bytes == top.baseline_peak_bytes
    assert (top.overhead, top.overhead_bound, top.status) == (0.0, 0.0, "optimal")


def test_a_random_op_at_the_peak_runs_unplanned_within_its_own_peak() -> None:
    model, batch = Noisy().train(), (torch.randn(32, 64),)
    measured = step_peak(model, batch)
    plan = planner.plan(model, measured / 1e9, batch, costs="roofline", time_limit_s=2)
    assert plan.baseline_peak_bytes == measured == plan.budget_bytes
    assert (plan.overhead, plan.overhead_bound, plan.status) == (0.0, 0.0, "optimal")
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes


@settings(max_examples=8, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["plain", "dropout", "noise", "scaled"]), min_size=1, max_size=5),
    width=st.sampled_from([3, 16]),
    rows=st.sampled_from([1, 40]),
    share=st.floats(0, 1),
)
def test_no_plan_beats_a_bound(kinds: list[str], width: int, rows: int, share: float) -> None:
    torch.manual_seed(0)
    step = prepare(Mixed(kinds, width).train(), (torch.randn(rows, width),), costs="roofline")
    step = dataclasses.replace(step, least_limit_s=0.25)
    low, high = step.minimum_peak_bytes, step.baseline_peak_bytes
    hold(step, planned_at(step, {low, round(low + share * (high - low)), high}))


def test_the_floor_is_the_strongest_that_was_proved() -> None:
    """A cheap floor is proved at once; the search for the least peak proves a higher one, which is shown."""
    case = CASES["resnet"]
    step = prepare(case.build(), case.make_inputs(0), loss_fn=case.loss_fn, costs="roofline")
    step = dataclasses.replace(step, least_limit_s=3.0)
    cheap = step.floor_bytes
    assert cheap < step.least.floor_bytes == step.floor_bytes <= step.minimum_peak_bytes
    with pytest.raises(planner.InfeasibleBudgetError) as refused:
        step.plan_bytes(
            (cheap + step.floor_bytes) // 2, QUICK
        )  # between the two: it was just proved impossible
    assert refused.value.floor_bytes == step.floor_bytes
    assert "it is proved" in str(refused.value) and "none was found between" not in str(refused.value)
    plan = step.least_plan()
    assert plan.floor_bytes == step.floor_bytes <= plan.peak_bytes
