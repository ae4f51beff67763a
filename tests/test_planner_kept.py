"""Schedules that outlive their process: no second search for the same step and budget, and nothing stale."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.costs.cache import VARIABLE
from planner.errors import InfeasibleBudgetError
from planner.options import Search
from planner.plan import Plan, load
from planner.solving import budgeted, kept
from planner.solving.fit import Answer
from planner.solving.priced import PricedStep, prepare
from tests import tiny

SEARCH = Search(time_limit_s=2.0)


@pytest.fixture(scope="module")
def first() -> PricedStep:
    return prepare(tiny.seeded(lambda: tiny.blocks(4)), (torch.zeros(64, 32),), costs="roofline")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The hint of each search; however short, what it finds is kept in ``tmp_path``."""
    hints: list[Any] = []
    search = budgeted.fitted

    def fitted(problem: Any, budget: int, run: Any, options: Search, hint: Any = None) -> Any:
        hints.append(hint)
        return search(problem, budget, run, options, hint)

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(kept, "WORTH_S", 0.0)
    monkeypatch.setattr(budgeted, "fitted", fitted)
    return hints


def _again(step: PricedStep, seconds: Callable[[int, float], float] = lambda _, s: s) -> PricedStep:
    """As the next process has it, its ops timed otherwise."""
    timed = {name: seconds(i, s) for i, (name, s) in enumerate(step.costs.seconds.items())}
    return dataclasses.replace(step, costs=dataclasses.replace(step.costs, seconds=timed))


def _budget(step: PricedStep) -> int:
    return (step.floor_bytes + step.baseline_peak_bytes) // 2


def _planned(step: PricedStep, search: Search = SEARCH) -> Plan:
    return step.plan_bytes(_budget(step), search)


def test_the_next_process_has_the_plan_without_a_search(first: PricedStep, searched: list[Any]) -> None:
    plan = _planned(_again(first))
    again = _planned(_again(first))
    assert searched == [None]
    assert again.sequence == plan.sequence
    assert (again.overhead, again.overhead_bound, again.status) == (
        plan.overhead,
        plan.overhead_bound,
        plan.status,
    )
    assert plan.overhead > 0


def test_seconds_that_differ_a_little_take_the_bound_along(first: PricedStep, searched: list[Any]) -> None:
    plan = _planned(_again(first))
    slower = _planned(_again(first, lambda _, s: 1.25 * s))
    assert slower.sequence == plan.sequence
    assert math.isclose(slower.step_s, 1.25 * plan.step_s)
    assert math.isclose(slower.overhead_bound, plan.overhead_bound)
    wobbly = _planned(_again(first, lambda i, s: s * (1 + i % 2 / 1000)))
    assert plan.overhead_bound - 0.001 < wobbly.overhead_bound <= wobbly.overhead
    assert len(searched) == 1


def test_what_was_found_for_other_costs_is_where_the_search_starts(
    first: PricedStep, searched: list[Any]
) -> None:
    plan = _planned(_again(first))
    _planned(_again(first, lambda i, s: s * (1 + i % 3 * 10)))
    assert searched[1].sequence == plan.sequence


def test_what_was_found_in_less_time_is_where_the_search_starts(
    first: PricedStep, searched: list[Any]
) -> None:
    budget = _budget(first)
    found = first._found(budget, SEARCH, None)
    place = kept.KeptSchedule.of(first.problem, budget, SEARCH)
    assert place is not None and found.execution is not None
    open_still = dataclasses.replace(found, bound_seconds=first.problem.total_seconds)
    assert not open_still.is_optimal
    place.keep(open_still, SEARCH)
    longer = place.recall(Search(time_limit_s=60.0), first.execution_of)
    assert longer.answer is None and longer.hint is not None
    shorter = place.recall(Search(time_limit_s=1.0), first.execution_of)
    assert shorter.answer is not None and shorter.answer.seconds == found.seconds


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "whole but changed"])
def test_a_file_that_is_not_as_it_was_written_is_ignored(
    first: PricedStep, searched: list[Any], content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = _planned(_again(first))
    (path,) = tmp_path.glob("plan-*.json")
    whole = path.read_text()
    path.write_text(whole.replace('"solver": "', '"solver": "x', 1) if " " in content else content)
    with caplog.at_level(logging.WARNING):
        again = _planned(_again(first))
    assert searched == [None, None]
    assert again.sequence == plan.sequence
    assert [r.getMessage().startswith(f"{path} is ignored") for r in caplog.records] == [True]
    assert path.read_text() != content  # the search left a whole one


def test_another_budget_method_or_size_is_another_file(first: PricedStep) -> None:
    problem, budget = first.problem, _budget(first)
    values = list(problem.values)
    values[-1] = dataclasses.replace(values[-1], bytes=values[-1].bytes + 1)
    told = [
        kept._told(problem, budget, SEARCH),
        kept._told(problem, budget + 1, SEARCH),
        kept._told(problem, budget, Search("greedy")),
        kept._told(dataclasses.replace(problem, values=tuple(values)), budget, SEARCH),
        kept._told(dataclasses.replace(problem, resident_bytes=1), budget, SEARCH),
    ]
    assert len(set(told)) == len(told)
    assert kept._told(_again(first, lambda _, s: 2 * s).problem, budget, Search(time_limit_s=9)) == told[0]


def test_one_variable_switches_it_off(
    first: PricedStep, searched: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    assert _planned(_again(first)).sequence == _planned(_again(first)).sequence
    assert searched == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_the_files_that_were_used_last_stay(
    first: PricedStep, searched: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kept, "MOST", 2)
    for k in range(4):
        first.plan_bytes(_budget(first) + k, SEARCH)
    assert len(list(tmp_path.glob("plan-*.json"))) == 2


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch, searched: list[Any]) -> list[str]:
    """Searches for the least peak and for many budgets, one name each."""
    made: list[str] = []

    def heard(name: str) -> None:
        search = getattr(budgeted, name)

        def hearing(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return search(*args, **kwargs)

        monkeypatch.setattr(budgeted, name, hearing)

    heard("minimum_peak")
    heard("fitted_each")
    return made


def test_a_plan_says_that_it_was_kept_and_since_when(
    first: PricedStep, searched: list[Any], tmp_path: Path
) -> None:
    plan = _planned(_again(first))
    again = _planned(_again(first))
    assert plan.searched_on == "" and "from the cache" not in plan.summary()
    assert again.solve_s == plan.solve_s
    assert f"to solve on {again.searched_on}, from the cache" in again.summary()
    again.save(tmp_path / "again.json")
    assert load(tmp_path / "again.json").searched_on == again.searched_on
    assert '"searched_on"' in (tmp_path / "again.json").read_text()
    plan.save(tmp_path / "first.json")
    assert '"searched_on"' not in (tmp_path / "first.json").read_text()


def test_the_least_peak_is_not_searched_for_again(first: PricedStep, others: list[str]) -> None:
    plan, again = (dataclasses.replace(_again(first), least_limit_s=1.0).least_plan() for _ in range(2))
    assert others == ["minimum_peak"]
    assert again.sequence == plan.sequence
    assert (again.budget_bytes, again.floor_bytes) == (plan.budget_bytes, plan.floor_bytes)
    assert again.searched_on


def test_a_least_peak_found_in_less_time_is_searched_for_again_and_never_lost(
    first: PricedStep, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _again(first)
    found = step._least_within(2.0)
    assert found.execution is not None
    place = kept.KeptSchedule.of(step.problem, None, SEARCH, "least, fast")
    assert place is not None
    open_still = dataclasses.replace(found, floor_bytes=0)  # so that a longer search may find a lower one
    place.keep(open_still, SEARCH)
    worse = step.baseline
    monkeypatch.setattr(
        type(step),
        "_lowest",
        lambda *_, **__: Answer(worse.peak_bytes, worse, 0.0, 0, step.problem.total_seconds, "", 5.0),
    )
    assert step._least_within(60.0).budget_bytes == found.budget_bytes < worse.peak_bytes


def test_that_nothing_fits_is_proved_once(first: PricedStep, searched: list[Any], others: list[str]) -> None:
    told, made = [], []
    for _ in range(2):
        step = dataclasses.replace(_again(first), least_limit_s=1.0)
        with pytest.raises(InfeasibleBudgetError) as error:
            step.plan_bytes(step.floor_bytes - 1, SEARCH)
        told.append((error.value.minimum_bytes, error.value.floor_bytes, str(error.value)))
        made.append(len(others))
    assert told[0] == told[1]
    assert len(searched) == 1 and 0 < made[0] == made[1]  # the least, and that with outputs let go of


def test_a_file_that_only_says_that_nothing_fits_is_no_proof(
    first: PricedStep, searched: list[Any], tmp_path: Path
) -> None:
    budget = _budget(first)
    place = kept.KeptSchedule.of(first.problem, budget, SEARCH)
    assert place is not None
    place.keep(Answer(budget, None, math.inf, first.floor_bytes, solve_seconds=9.0), SEARCH)
    assert list(tmp_path.glob("plan-*.json"))
    assert _planned(_again(first)).peak_bytes <= budget
    assert len(searched) == 1


def test_each_budget_of_a_frontier_is_kept_and_shared_with_plans(
    first: PricedStep, searched: list[Any], others: list[str]
) -> None:
    top, low = first.baseline_peak_bytes, _budget(first)
    budgets = [low, (low + top) // 2, top]
    plan = first.plan_bytes(budgets[1], SEARCH)
    curve = _again(first).frontier(budgets, SEARCH)
    assert curve.points[1].overhead == plan.overhead
    again = _again(first).frontier(budgets, SEARCH)
    assert others == ["fitted_each"]
    assert [(p.budget_bytes, p.overhead) for p in again.points] == [
        (p.budget_bytes, p.overhead) for p in curve.points
    ]
    _again(first).plan_bytes(budgets[0], SEARCH)
    assert len(searched) == 1


def test_answers_found_apart_become_one_curve(first: PricedStep) -> None:
    total, kept_all = first.problem.total_seconds, first.baseline
    low = kept_all.peak_bytes
    slower = Answer(low + 1, kept_all, 0.5 * total, 0, 2 * total)
    proved = Answer(low + 2, None, 0.75 * total, 0)
    none = Answer(low - 1, None, math.inf, low)
    curve = kept.never_rising([none, Answer(low, kept_all, 0.5 * total, 0, 1.5 * total), slower, proved])
    assert list(curve) == [low - 1, low, low + 1, low + 2]
    assert curve[low - 1] is none
    assert [curve[low + k].seconds for k in range(3)] == [1.5 * total] * 3
    assert [curve[low + k].bound_seconds for k in range(3)] == [0.75 * total] * 3
