"""The options of a search are checked where they are given, before anything expensive."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner.options import Search
from planner.progress import Event, Reporter
from planner.sizing.request import BatchRequest
from planner.solving.request import PlanRequest, StepRequest
from solvers import SOLVERS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "nope"}, ValueError, "solver is 'nope', want one of auto, exact, .*sqrt"),
        ({"solver": None}, ValueError, "solver is None, want one of auto"),
        ({"time_limit_s": -3}, ValueError, "time_limit_s is -3, want a number >= 0"),
        ({"time_limit_s": math.nan}, ValueError, "time_limit_s is nan, want a number >= 0"),
        ({"time_limit_s": True}, TypeError, "time_limit_s is True, want a number of seconds"),
        ({"time_limit_s": "30"}, TypeError, "time_limit_s is '30', want a number of seconds"),
        ({"progress": "yes"}, TypeError, "progress must be True, False, None or a callable, not 'yes'"),
        ({"progress": 1}, TypeError, "progress must be True, False, None or a callable, not 1"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Search(**options)
    with pytest.raises(error, match=message):
        dataclasses.replace(Search(), **options)


def test_what_makes_sense_is_kept_as_it_is() -> None:
    for solver in SOLVERS:
        assert Search(solver).solver == solver
    for limit_s in (0, 0.5, 30, math.inf):
        assert Search(time_limit_s=limit_s).time_limit_s == limit_s
    assert Search() == Search("auto", 30.0, None)


def test_progress_is_told_through_one_reporter_at_a_time() -> None:
    seen: list[Event] = []
    asked = Search(progress=seen.append)
    with asked.reporting() as search:
        assert isinstance(search.progress, Reporter)
        assert search.tell is search.progress
        with search.reporting() as inner:
            assert inner is search
        search.tell.phase("capture", "here")
    assert asked.progress == seen.append
    asked.tell.phase("solve", "there")
    assert [(e.phase, e.note) for e in seen] == [("capture", "here"), ("solve", "there")]
    for silent in (None, False):
        Search(progress=silent).tell.phase("solve")


def test_a_bar_is_opened_and_closed_by_reporting_only(capfd: pytest.CaptureFixture[str]) -> None:
    search = Search(progress=True)
    with pytest.raises(ValueError, match="reporting"):
        search.tell.phase("solve")
    assert capfd.readouterr().err == ""
    with search.reporting() as drawn:
        drawn.tell.phase("solve")
    assert "solve" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("outputs", "'held', 'released', 'unread' or 'auto'"),
        ("gradients", "'held', 'consumed' or 'auto'"),
        ("capture", "'one graph', 'regions' or 'auto'"),
        ("backend", "'eager' or 'inductor'"),
        ("recompute", "'fastest' or 'same bits'"),
        ("order", "'given' or 'free'"),
        ("on_larger", "'replan' or 'raise'"),
        ("chunk_loss", "'auto', True, False or a number of chunks from 2 up"),
    ],
)
def test_an_option_of_a_request_has_one_of_its_values(option: str, values: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be {values}, not 'perhaps'$"):
        PlanRequest(**{"model": nn.Identity(), "budget_bytes": 1, option: "perhaps"})


def test_a_request_prints_what_was_asked_of_it() -> None:
    model = nn.Linear(2, 2)
    assert repr(StepRequest(model=model)) == f"StepRequest(Linear, search={Search()!r})"
    asked = PlanRequest(model=model, budget_bytes=7, outputs="released", capture="one graph")
    assert repr(asked).endswith("outputs='released', capture='one graph', budget_bytes=7)")
    sized = BatchRequest(model=model, budget_bytes=7, make_batch=abs, high=4)
    assert repr(sized).endswith("budget_bytes=7, make_batch=<built-in function abs>, high=4)")


def test_a_request_reports_through_the_reporter_that_was_opened() -> None:
    with StepRequest(model=nn.Identity(), search=Search(progress=lambda _: None)).reporting() as asked:
        assert asked.search.progress is asked.search.tell


@pytest.mark.parametrize("function", [planner.plan, planner.frontier, planner.estimate])
def test_a_loss_that_is_no_function_is_refused_before_anything_runs(function: Any) -> None:
    given = (1.0,) if function is planner.plan else ()
    with pytest.raises(TypeError, match="loss_fn must be"):
        function(nn.Linear(2, 2), *given, inputs=(torch.ones(1, 2),), loss_fn="x")
