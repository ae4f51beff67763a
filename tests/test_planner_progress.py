"""What planning tells while it runs: silent unless asked, true when asked, and ended by those it tells."""

from __future__ import annotations

import _thread
import gc
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch

import planner
from planner import PlannerError, progress
from planner.progress import Bar, Event, Reporter, reporting
from tests import tiny
from tests.signals import ctrl_c_heard

DATA = (torch.zeros(64, 32),)
BUDGET_GB = 90e-6  # between 80.6 kB, the least plan, and 117.2 kB, where nothing is recomputed


def model() -> torch.nn.Module:
    return tiny.seeded(tiny.blocks)


def test_phases_come_in_order_and_the_search_ends_where_the_plan_is() -> None:
    seen: list[Event] = []
    plan = planner.plan(model(), BUDGET_GB, DATA, costs="roofline", progress=seen.append)
    assert list(dict.fromkeys(e.phase for e in seen)) == ["capture", "profile", "solve"]
    assert [e.elapsed_s for e in seen] == sorted(e.elapsed_s for e in seen)
    assert seen[0].note == "Sequential" and seen[1].note == f"{plan.op_count} ops"
    searched = [e for e in seen if e.peak_bytes is not None]
    assert searched and all(e.budget_bytes == plan.budget_bytes for e in searched)
    last = searched[-1]
    assert last.peak_bytes == plan.peak_bytes
    assert last.overhead == pytest.approx(plan.overhead, rel=1e-12)
    assert last.overhead_bound == pytest.approx(plan.overhead_bound, abs=1e-12)
    assert last.gap == pytest.approx(plan.gap, abs=1e-12)
    bounds = [e.overhead_bound for e in searched if e.overhead_bound is not None]
    assert bounds == sorted(bounds)


def test_what_does_not_fit_is_said_in_bytes_and_the_least_budget_is_a_phase() -> None:
    seen: list[Event] = []
    with pytest.raises(planner.InfeasibleBudgetError):
        planner.plan(model(), 70e-6, DATA, costs="roofline", time_limit_s=1, progress=seen.append)
    assert seen[-1].phase == "least"
    assert Event("solve", 1.0, budget_bytes=1000, peak_bytes=3500).found == "2.5 kB over the budget"
    assert Event("solve", 1.0, budget_bytes=1000, peak_bytes=3500).gap is None


def test_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    planner.plan(model(), BUDGET_GB, DATA, costs="roofline")
    assert capfd.readouterr() == ("", "")


def test_true_draws_on_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    plan = planner.plan(model(), BUDGET_GB, DATA, costs="roofline", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "capture" in err and "profile" in err and f"overhead {plan.overhead:.2%}" in err and "3/3" in err


def test_a_frontier_tells_too() -> None:
    seen: list[Event] = []
    planner.frontier(
        model(), DATA, [BUDGET_GB, 105e-6], costs="roofline", time_limit_s=2, progress=seen.append
    )
    assert {e.phase for e in seen} >= {"capture", "profile", "solve"}
    assert {e.budget_bytes for e in seen if e.budget_bytes} == {90_000, 105_000}


def test_enable_keeps_nothing_of_a_bar_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[weakref.ref[Bar]] = []

    class Noted(Bar):
        def __init__(self) -> None:
            super().__init__()
            bars.append(weakref.ref(self))

    monkeypatch.setattr(progress, "Bar", Noted)
    net = model()
    planner.enable(net, 110e-6, costs="roofline", progress=True, now=True)
    net(DATA[0]).sum().backward()
    gc.collect()
    assert len(bars) == 1 and bars[0]() is None


def test_a_larger_batch_is_planned_for_in_silence() -> None:
    """It comes in the middle of training, when the call that was listened to is long over."""
    seen: list[Event] = []
    net: Any = model()
    plan = planner.plan(net, BUDGET_GB, DATA, costs="roofline", dynamic=True, progress=seen.append)
    plan.apply(net)
    told = len(seen)
    net(torch.zeros(68, 32)).sum().backward()
    variants = net.forward.step.variants
    assert variants is not None and variants.solves == 2
    assert told and len(seen) == told


def test_enable_tells_when_the_first_batch_is_planned() -> None:
    seen: list[Event] = []
    net = model()
    planner.enable(net, 110e-6, costs="roofline", outputs="held", progress=seen.append, now=True)
    assert not seen
    net(DATA[0]).sum().backward()
    assert list(dict.fromkeys(e.phase for e in seen)) == ["capture", "profile", "solve"]
    told = len(seen)
    net.zero_grad()
    net(DATA[0]).sum().backward()
    assert len(seen) == told


def test_ctrl_c_in_the_middle_of_a_search_answers_with_the_best_so_far(
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted: list[Event] = []

    def press(event: Event) -> None:
        searching = threading.current_thread() is not threading.main_thread()
        if event.overhead is not None and searching and not interrupted:
            interrupted.append(event)
            _thread.interrupt_main()
            began = time.monotonic()  # the search waits here until Ctrl-C has been heard
            while "interrupted" not in caplog.text and time.monotonic() < began + 60:
                time.sleep(0.02)

    with ctrl_c_heard():
        plan = planner.plan(model(), BUDGET_GB, DATA, costs="roofline", time_limit_s=60, progress=press)
    assert interrupted and "interrupted" in caplog.text
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.overhead == pytest.approx(interrupted[0].overhead, rel=1e-12)


def test_a_callback_that_fails_is_not_swallowed() -> None:
    def broken(event: Event) -> None:
        raise LookupError(event.phase)

    with pytest.raises(LookupError, match="capture"):
        planner.plan(model(), BUDGET_GB, DATA, progress=broken)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="progress must be"), reporting("yes"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="phase"):
        Event("dreaming", 0.0)  # type: ignore[arg-type]
    assert Reporter().searching(1.0) is None  # nobody listens
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(PlannerError, match="needs tqdm: pip install"), reporting(True):
        pass
