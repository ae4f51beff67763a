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
from planner.options import Search
from planner.plan import Plan
from planner.solving import budgeted, kept
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
