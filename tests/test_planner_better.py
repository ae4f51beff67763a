"""A batch waits seconds for its plan; a better one is sought beside the training and takes its place."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import planner
from planner.costs.cache import VARIABLE
from planner.options import Search
from planner.plan import Plan
from planner.solving import better
from planner.solving.better import Betterment
from planner.training import making
from solvers import Schedule, Solution
from tests import tiny

ONCE: dict[str, Any] = {"costs": "roofline", "now": True, "calls_per_step": 1, "outputs": "held"}


def _fed() -> tuple[torch.Tensor]:
    return (torch.randn(64, 32),)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plan is whatever needs no search."""
    monkeypatch.setattr(making, "FIRST_S", 0.0)


class _Found:
    """In place of a search: what it would have found."""

    def __init__(self, best: Solution | None = None, *, is_over: bool = True) -> None:
        self.best, self.is_over, self.begun, self.ended = best, is_over, 0, 0

    def __call__(self, problem: Any, budget_bytes: int, hint: Schedule, **_: Any) -> _Found:
        self.begun += 1
        return self

    def end(self) -> None:
        self.ended += 1


@pytest.mark.usefixtures("at_once")
def test_training_goes_on_with_the_better_plan_and_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.seeded(tiny.blocks)
    twin, inputs = copy.deepcopy(model), _fed()
    # of low priority: on a busy machine its search has little of its seconds
    planner.enable(model, tiny.planned(model, inputs).peak_bytes / 1e9, **ONCE, time_limit_s=180)
    with caplog.at_level(logging.INFO, logger="planner"):
        tiny.assert_same_bits(tiny.run(model, inputs, steps=1), tiny.run(twin, inputs, steps=1))
        first = planner.plan_of(model)
        assert first is not None
        limit = time.monotonic() + 180  # for what hangs
        while (now := planner.plan_of(model)) is first and time.monotonic() < limit:
            tiny.assert_same_bits(tiny.run(model, inputs, steps=1), tiny.run(twin, inputs, steps=1))
            time.sleep(0.1)  # it is the other process that is waited for
    assert now is not None and now.overhead < first.overhead
    assert now.peak_bytes <= now.budget_bytes == first.budget_bytes
    assert planner.measure.step_peak(model, inputs) <= now.budget_bytes
    told = [r.getMessage() for r in caplog.records if "has a better plan" in r.getMessage()]
    assert len(told) == 1 and f"{100 * first.overhead:.2f}% -> {100 * now.overhead:.2f}%" in told[0]


@pytest.mark.usefixtures("at_once")
def test_calls_that_share_the_budget_and_short_limits_are_not_bettered() -> None:
    inputs = _fed()
    peak_gb = tiny.planned(tiny.seeded(tiny.blocks), inputs).peak_bytes / 1e9
    alone, shared, named = (
        ONCE,
        {**ONCE, "calls_per_step": 2, "time_limit_s": 0.5},
        {"solver": "recompute_all"},
    )
    for options, times, begun in ((alone, 1, 1), (shared, 2, 0), ({**ONCE, **named}, 1, 0)):
        found = _Found(is_over=False)
        with mock.patch.object(better, "SearchBeside", found):
            model = planner.enable(tiny.seeded(tiny.blocks), times * peak_gb, **options)
            tiny.run(model, inputs, steps=1)
        assert found.begun == begun


def _best(plan: Plan, of: Plan) -> Solution:
    """``plan`` as an answer of the search for ``of``."""
    return Solution(
        Schedule(tuple(plan.sequence)),
        seconds=plan.step_s * (1 + plan.overhead),
        recompute_seconds=plan.step_s * plan.overhead,
        peak_bytes=plan.peak_bytes,
        bound_seconds=plan.step_s * (1 + plan.overhead_bound),
        budget_bytes=max(of.budget_bytes, plan.peak_bytes),
        status="feasible",
        solver="staged",
        solve_seconds=7.0,
    )


def test_what_is_taken_over_and_what_is_not() -> None:
    model = tiny.seeded(tiny.blocks)
    step = making.prepare(model, _fed(), costs="roofline")
    poor = step.plan_bytes(10**9, Search("recompute_all"))
    best = step.plan_bytes(poor.peak_bytes, Search(time_limit_s=5.0))
    whole = step.plan_bytes(10**9)
    first = step.plan_bytes(poor.peak_bytes, Search("recompute_all"))
    assert best.overhead < first.overhead and whole.peak_bytes > first.budget_bytes

    def bettered(found: _Found, plan: Plan = first, limit_s: float = 30.0) -> Plan | None:
        seeking = Betterment()
        with mock.patch.object(better, "SearchBeside", found):
            return seeking.of(plan) if seeking.ask(plan, Search(time_limit_s=limit_s)) else None

    taken = bettered(_Found(_best(best, first)))
    assert taken is not None and taken.sequence == best.sequence
    assert (taken.budget_bytes, taken.overhead_bound) == (first.budget_bytes, best.overhead_bound)
    assert taken.solve_s == pytest.approx(first.solve_s + 7.0)
    assert bettered(_Found()) is None  # a search that ended without an answer, killed say
    assert bettered(_Found(_best(whole, first))) is None  # faster, and over the budget
    assert bettered(_Found(_best(first, first))) is None  # neither faster nor anything new proved
    more = replace(_best(first, first), bound_seconds=first.step_s * (1 + best.overhead_bound))
    proved = bettered(_Found(more))
    assert proved is not None and proved.sequence == first.sequence
    assert proved.overhead_bound == pytest.approx(best.overhead_bound)
    assert proved.overhead_bound > first.overhead_bound
    assert bettered(_Found(_best(best, first)), limit_s=0.0) is None  # its time is spent
    kept = _Found()
    assert bettered(kept, whole) is None and kept.begun == 0  # nothing to better


def test_what_was_found_beside_is_the_next_process_s_first_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = making.prepare(tiny.seeded(tiny.blocks), _fed(), costs="roofline")
    poor = step.plan_bytes(10**9, Search("recompute_all"))
    best = step.plan_bytes(poor.peak_bytes, Search(time_limit_s=5.0))
    first = step.plan_bytes(poor.peak_bytes, Search("recompute_all"))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    seeking = Betterment()
    with mock.patch.object(better, "SearchBeside", _Found(_best(best, first))):
        assert seeking.ask(first, Search(time_limit_s=30.0)) and seeking.of(first) is not None
    again = step.plan_bytes(poor.peak_bytes, Search(time_limit_s=30.0))
    assert again.searched_on and again.sequence == best.sequence


def test_a_plan_that_nobody_holds_is_not_sought_for_any_more() -> None:
    step = making.prepare(tiny.seeded(tiny.blocks), _fed(), costs="roofline")
    peak_bytes = step.plan_bytes(10**9, Search("recompute_all")).peak_bytes
    seeking, going_on = Betterment(), _Found(is_over=False)
    with mock.patch.object(better, "SearchBeside", going_on):
        plans = [step.plan_bytes(peak_bytes, Search("recompute_all")) for _ in range(2)]
        assert all(seeking.ask(plan, Search()) for plan in plans)
        assert going_on.begun == 1  # one at a time
        del plans[0]
        assert seeking.of(plans[0]) is None
        assert (going_on.begun, going_on.ended) == (2, 1)
        seeking.end()
        assert going_on.ended == 2 and not seeking.is_busy
