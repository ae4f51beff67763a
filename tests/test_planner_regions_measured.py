"""What a planned step in regions is measured to take is what was predicted, whatever it was recorded by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.options import Search
from planner.solving.in_regions import JoinedStep

WIDTH = 64


class Crossed(nn.Module):
    """Three regions; what the first gives the last takes too, and of what is handed on much is not needed to
    differentiate its reader: a region keeps it or not, by its schedule.

    What goes twice into a region has two gradients, which are added up within its backward.

    ``keeps``  the caller gets all of it, and holds it.
    """

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.of = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.keeps = keeps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second, third, fourth, last = self.of
        a, b = torch.tanh(first(x)), torch.sigmoid(second(x))
        torch._dynamo.graph_break()
        y, z = third(a) * b, torch.relu(fourth(b))
        torch._dynamo.graph_break()
        w = (y + z).softmax(-1)
        torch._dynamo.graph_break()
        out = last(w * a)
        return (out, a, y, z, w) if self.keeps else (out,)


@pytest.mark.parametrize("keeps", [False, True])
def test_to_the_byte(keeps: bool) -> None:
    torch.manual_seed(0)
    model, x = Crossed(keeps=keeps), torch.randn(256, WIDTH)
    roomy = planner.plan(
        model, 1.0, (x,), loss_fn=lambda out: out[0].pow(2).mean(), costs="roofline", time_limit_s=0.5,
        capture="regions",
    )  # fmt: skip
    assert len(roomy.regions) == 4 and isinstance(roomy._origin, JoinedStep)
    between = (roomy.minimum_peak_bytes + roomy.baseline_peak_bytes) // 2
    for plan in (roomy, roomy._origin.plan_bytes(between, Search(time_limit_s=0.5))):
        report = plan.verify()
        assert report.equal, str(report)
        assert report.peak_bytes == report.predicted_peak_bytes <= plan.budget_bytes


@torch._dynamo.disable
def _aside(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    assert isinstance(out, Tensor)
    return out


class Aside(nn.Module):
    """All that trains runs where Dynamo may not look."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return _aside(self.of, x)


def test_where_no_region_is_left_the_error_says_so() -> None:
    with pytest.raises(
        planner.PlannerError, match="found no piece of its forward that gets gradients"
    ) as caught:
        planner.plan(Aside(), 1.0, (torch.randn(2, WIDTH),), costs="roofline", capture="regions")
    assert "planner.enable(model.of, budget_gb)" in str(caught.value)


class Freed(nn.Module):
    """What a region gives is let go of by the caller before its backward makes something as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.first(x)
        torch._dynamo.graph_break()
        loss = self.last(logits.tanh()).pow(2).mean()
        return loss, logits


def test_what_went_is_not_counted_beside_what_came_after_it() -> None:
    """A hook's scratch in the backward, as that of FSDP2, when logits are gone."""
    torch.manual_seed(0)
    model, x = Freed(), torch.randn(256, WIDTH)
    planner.enable(model, 1.0, costs="roofline", time_limit_s=0.3, capture="regions", now=True)

    def scratch(gradient: Tensor) -> None:
        (gradient.new_empty(256 * 8 * WIDTH) + 1).sum()

    def step() -> None:
        loss, logits = model(x)
        del logits
        loss.register_hook(scratch)
        loss.backward()

    for _ in range(2):
        step()
        model.zero_grad()
    measured = planner.measure.step_peak(step)
    plan = planner.plan_of(model)
    assert plan is not None
    assert plan.peak_bytes == measured
