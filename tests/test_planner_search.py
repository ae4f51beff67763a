"""Arguments of a search are checked before a capture; what ends one search ends all that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.memory.execution import Execution
from planner.options import Search
from planner.progress import Event, Reporter
from planner.solving import budgeted, fit, priced
from planner.solving.calibrate import StepBytes, calibrated
from planner.solving.fit import Answer, fitted, fitted_each
from planner.solving.priced import PricedStep, prepare
from solvers import Problem, Schedule
from tests import tiny


@pytest.fixture(scope="module")
def step() -> PricedStep:
    made = prepare(tiny.seeded(tiny.gpt2), tiny.gpt2_batch(), costs="roofline")
    return dataclasses.replace(made, least_limit_s=2.0)


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Budgets in bytes that the solvers were asked for, one after another."""
    seen: list[int] = []
    original = fit.solve

    def counted(problem: Problem, budget: int, **options: Any) -> Any:
        seen.append(budget)
        return original(problem, budget, **options)

    monkeypatch.setattr(fit, "solve", counted)
    return seen


def slack(step: PricedStep, more_bytes: int) -> Callable[[Schedule], Execution]:
    """How an allocator would play a schedule that hands out ``more_bytes`` beyond what is asked for."""

    def play(schedule: Schedule) -> Execution:
        ran = step.execution_of(schedule)
        return dataclasses.replace(
            ran, slack_bytes=torch.full((len(ran.timeline.steps),), more_bytes).numpy()
        )

    return play


def budget_of(step: PricedStep) -> int:
    return (step.minimum_peak_bytes + step.baseline_peak_bytes) // 2


def stop(event: Event) -> bool:
    """A listener that has heard enough as soon as something fits."""
    return event.overhead is not None


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ({"solver": "nope"}, ValueError, "solver"),
        ({"time_limit_s": -1}, ValueError, "time_limit_s"),
        ({"time_limit_s": "1"}, TypeError, "time_limit_s"),
        ({"time_limit_s": math.nan}, ValueError, "time_limit_s"),
        ({"progress": 3}, TypeError, "progress"),
        ({"budget_gb": -1.0}, ValueError, "budget_gb"),
        ({"budget_gb": math.nan}, ValueError, "budget_gb"),
        ({"budget_gb": True}, TypeError, "budget_gb"),
    ],
)
def test_arguments_are_checked_before_the_capture(
    wrong: dict[str, Any], error: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*_: Any, **__: Any) -> None:
        raise AssertionError("captured before the arguments were checked")

    monkeypatch.setattr(priced, "capture", captured)
    model, batch = tiny.seeded(tiny.Mlp), (torch.zeros(4, 32),)
    with pytest.raises(error, match=named):
        planner.plan(model, **{"budget_gb": 1.0, "inputs": batch, **wrong})
    budget = wrong.get("budget_gb")
    rest = {name: value for name, value in wrong.items() if name != "budget_gb"}
    with pytest.raises(error, match=r"budgets_gb\[1\]" if budget else named):
        planner.frontier(model, batch, None if budget is None else [1.0, budget], **rest)


@pytest.mark.parametrize("points", [0, -2, 2.5, True])
def test_a_frontier_has_a_whole_number_of_points(points: Any) -> None:
    with pytest.raises(ValueError, match="points"):
        planner.frontier(tiny.seeded(tiny.Mlp), (torch.zeros(4, 32),), points=points)


# -- what ends a search ---------------------------------------------------------------------------


def test_without_a_stop_the_allocators_slack_is_searched_for_again(
    step: PricedStep, solves: list[int]
) -> None:
    found = fitted(step.problem, budget_of(step), slack(step, 4096), Search("greedy", 1.0))
    assert len(solves) > 1 and found.fits and found.peak_bytes <= budget_of(step)


def test_a_stop_ends_the_rounds_for_the_allocators_slack(step: PricedStep, solves: list[int]) -> None:
    tell = Reporter(stop)
    more = budget_of(step) - step.minimum_peak_bytes + 1  # of which no schedule leaves room
    found = fitted(step.problem, budget_of(step), slack(step, more), Search("auto", 20.0, tell))
    assert len(solves) == 1 and tell.stopped
    assert not found.fits and found.bound_seconds < math.inf


def test_a_stop_ends_a_frontier(step: PricedStep) -> None:
    heard: list[Event] = []

    def once(event: Event) -> bool:
        heard.append(event)
        return event.overhead is not None

    low, high = step.minimum_peak_bytes, step.baseline_peak_bytes
    budgets = [round(low + (high - low) * k / 8) for k in range(1, 9)]
    tell = Reporter(once)
    answers = fitted_each(step.problem, budgets, step.execution_of, Search("auto", 20.0, tell))
    assert tell.stopped and set(answers) == set(budgets)
    after = [e for e in heard if e.budget_bytes is not None and e.overhead is not None]
    assert len({e.budget_bytes for e in after}) == 1  # no other budget was searched for
    assert answers[budgets[-1]].fits


def test_a_stop_ends_calibration(step: PricedStep) -> None:
    """Measured above its budget, a plan is made again with a margin; not after a stop."""
    rounds: list[int] = []

    def meter(*_: Any) -> StepBytes:
        rounds.append(1)
        return StepBytes(2 * step.baseline_peak_bytes, None)

    with pytest.raises(planner.PlannerError, match="stopped"):
        calibrated(step, budget_of(step), Search("auto", 20.0, Reporter(stop)), meter=meter)
    assert len(rounds) == 1


def test_a_stop_before_anything_fits_says_so_and_looks_no_further(
    step: PricedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = dataclasses.replace(step)  # knows no least plan yet
    tell = Reporter()
    budget = budget_of(step)

    def ended(problem: Problem, budget_bytes: int, *_: Any, **__: Any) -> Answer:
        tell.heed(True)
        return Answer(budget_bytes, None, problem.total_seconds, 0, interrupted=True)

    monkeypatch.setattr(budgeted, "fitted", ended)
    monkeypatch.setattr(budgeted, "minimum_peak", None)  # a call would raise TypeError
    with pytest.raises(planner.PlannerError, match=r"was stopped before a plan for .* was found"):
        fresh.plan_bytes(budget, Search("auto", 20.0, tell))


# -- answers --------------------------------------------------------------------------------------


def test_an_answer_has_no_figures_of_its_own(step: PricedStep) -> None:
    ran = step.baseline
    with pytest.raises(ValueError, match="no answer"):
        Answer(ran.peak_bytes - 1, ran, 0.0, 0, step.problem.total_seconds)
    with pytest.raises(ValueError, match="beats the proved bound"):
        Answer(ran.peak_bytes, ran, 2 * step.problem.total_seconds, 0, step.problem.total_seconds)
    nothing = Answer(10, None, math.inf, 20)
    assert nothing.is_infeasible and not nothing.fits
    with pytest.raises(ValueError, match="nothing was found"):
        _ = nothing.peak_bytes
    with pytest.raises(ValueError, match="no schedule"):
        step.plan_of(nothing)


def test_where_slack_lets_nothing_fit_no_peak_is_invented(step: PricedStep) -> None:
    found = fitted(step.problem, budget_of(step), slack(step, budget_of(step)), Search("greedy", 0.2))
    assert found.execution is None and not found.is_infeasible


class Both(nn.Module):
    """Takes arguments both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return (self.layer(x) * scale).square().mean()


def test_positional_and_keyword_arguments_are_both_measured() -> None:
    from planner.capture.inputs import Inputs

    batch = Inputs((torch.randn(4, 8),), {"scale": torch.randn(8)})
    plan = planner.plan(Both().train(), 1.0, batch, costs="roofline", solver="keep_all")
    assert plan.verify().ok
    made = planner.plan(Both().train(), 1.0, batch, costs="roofline", calibrate=True)
    assert made.calibration is not None and made.calibration.last.taken_bytes <= made.budget_bytes
