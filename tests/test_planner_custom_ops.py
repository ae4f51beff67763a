"""Custom ops that write into an argument, and hooks on what autograd saves: planned and measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planner.capture.joint_graph import capture
from planner.measure.bits import compare, run_step
from planner.measure.flops import step_flops
from planner.measure.peaks import step_peak
from planner.solving.priced import prepare
from tests import tiny


@torch.library.custom_op("planner_tests::note", mutates_args=("history",))
def note(x: Tensor, history: Tensor) -> None:
    history.copy_(0.5 * history + x.t() @ x)


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("history", torch.zeros(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        note(h.detach(), self.history)
        out: Tensor = self.last(h * self.history.mean())
        return out.sum()


def test_an_op_that_writes_into_a_buffer_is_verified_metered_and_profiled() -> None:
    model, batch = tiny.seeded(Noted), tiny.batch()
    eager_flops = step_flops(model, batch)
    plan = tiny.planned(model, batch)
    report = plan.verify()
    assert report.equal and report.comparison.buffers.count == 1
    plan.apply()
    assert step_flops(model, batch) - eager_flops == report.predicted_recompute_flops
    assert step_peak(model, batch) == report.peak_bytes
    plan.restore()
    assert prepare(model, batch, costs="profile").plan_bytes(10**9).peak_bytes > 0


def test_hooks_on_saved_tensors_are_set_aside_for_a_capture_and_see_what_a_planned_step_saves() -> None:
    model, batch = tiny.seeded(tiny.Mlp), tiny.batch(labels=True)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        capture(model, batch)
        assert not packed
        eager = run_step(model, batch)
        assert packed  # they were back
        plan = tiny.planned(model, batch)
        plan.apply()
        packed.clear()
        planned = run_step(model, batch)
    assert packed and compare(eager, planned).equal


def test_hooks_that_a_capture_set_aside_are_back_after_it_failed() -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t), lambda _: packed[-1]):
        with pytest.raises(TypeError):
            capture(tiny.seeded(tiny.Mlp), {"nothing": 1})
        torch.ones(2, requires_grad=True).square().sum().backward()
    assert packed
