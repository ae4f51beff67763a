"""Planned models beside other code: what runs after their last step, other threads, models around them."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import planner
from planner._compat import FakeTensorMode
from planner.regions.session import Session
from planner.runtime.tracing import is_traced
from tests.hf import FAST


class Cut(nn.Module):
    """A layer, a look at a value, and what ``inner`` makes of it."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if h.abs().max().item() > 2:
            h = -h
        h = self.inner(h)
        return torch.tanh(self.last(h))


def _enable(model: nn.Module, capture: Any = "regions") -> nn.Module:
    return planner.enable(model, 1.0, **FAST, capture=capture, now=True)


def test_no_mode_is_left_on_where_a_loss_outlives_training() -> None:
    model = Cut()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _enable(model)
    kept = []
    for _ in range(5):
        kept.append(model(torch.randn(4, 8)).square().mean())
        kept[-1].backward()
        optimizer.step()
        assert not _get_current_dispatch_mode_stack()
        optimizer.zero_grad()
    assert planner.plan_of(model) is not None


def test_a_step_of_another_optimizer_ends_no_record() -> None:
    model, other = Cut(), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    _enable(model)
    for _ in range(4):
        out = model(torch.randn(4, 8))
        other(out.detach()).square().mean().backward()
        optimizer.step()
        out.square().mean().backward()
        model.zero_grad()
    assert planner.plan_of(model) is not None


def test_a_step_waits_for_what_another_thread_compiles_and_runs_as_planned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Cut(), torch.randn(4, 8)
    _enable(model)
    for _ in range(4):
        model(x).square().mean().backward()
    seen: dict[str, bool] = {}
    begun, done, through = threading.Event(), threading.Event(), threading.Event()

    def slow(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        seen["asked"], seen["here"] = torch.compiler.is_compiling(), is_traced("Other")
        with FakeTensorMode():
            begun.set()
            done.wait(0.5)

        def run(*args: Any) -> Any:
            through.wait(60)  # where the other call ends while ours runs, Dynamo at times compiles ours anew
            return graph.forward(*args)

        return run

    def compiles() -> None:
        torch.compile(lambda x: x.sin() + 1, backend=slow)(torch.ones(3))

    thread = threading.Thread(target=compiles)
    session: Session = vars(model)["_planner_switch"]._regions.session
    with caplog.at_level(logging.WARNING, "planner"):
        thread.start()
        try:
            assert begun.wait(60)
            seen["there"] = is_traced("Cut")
            loss = model(x).square().mean()
            calls, plan = list(session.calls), session.runs
            loss.backward()
        finally:
            done.set()
            through.set()
            thread.join()
    assert seen["here"] == seen["asked"]  # a backend is told that it compiles since torch 2.12
    assert not seen["there"]
    assert calls and plan is not None and all(call.variant is not None for call in calls)
    assert "Cut" not in caplog.text


@pytest.mark.parametrize("capture", ["regions", "one graph"])
def test_a_planned_part_of_a_planned_model_is_left_alone(
    capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[str] = []
    cut = Session._cut

    def noted(self: Session, graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return cut(self, graph, given)

    monkeypatch.setattr(Session, "_cut", noted)
    torch.manual_seed(0)
    inner = Cut() if capture == "regions" else nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = Cut(inner)
    twin = copy.deepcopy(model)
    _enable(model.inner, capture)
    _enable(model)
    for _ in range(6):
        x = torch.randn(4, 8)
        losses = [each(x).square().mean() for each in (model, twin)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        model.zero_grad()
        twin.zero_grad()
    assert planner.plan_of(model) is not None and planner.plan_of(model.inner) is not None
    assert graphs and not any("planner/" in graph for graph in graphs)
