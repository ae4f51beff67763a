"""What a planned step in regions is measured to take is what was predicted, whatever it was recorded by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planner
from planner import Plan

WIDTH = 64


class Crossed(nn.Module):
    """Three regions; what the first gives the last takes too, and of what is handed on much is not needed to
    differentiate its reader: a region keeps it or not, by its schedule.

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


def planned(keeps: bool, share: float | None) -> Plan:
    """Within ``share`` of what can be saved; ``None``: room for everything."""
    torch.manual_seed(0)
    model, x = Crossed(keeps=keeps), torch.randn(256, WIDTH)

    def made(budget_bytes: float) -> Plan:
        return planner.plan(
            model, budget_bytes / 1e9, (x,), loss_fn=lambda out: out[0].pow(2).mean(), costs="roofline",
            time_limit_s=2.0, capture="regions",
        )  # fmt: skip

    roomy = made(1e9)
    if share is None:
        return roomy
    low, high = roomy.minimum_peak_bytes, roomy.baseline_peak_bytes
    return made(low + share * (high - low))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("share", [None, 0.4])
def test_to_the_byte(keeps: bool, share: float | None) -> None:
    plan = planned(keeps, share)
    assert len(plan.regions) == 4
    report = plan.verify()
    assert report.equal, str(report)
    assert report.peak_bytes == report.predicted_peak_bytes <= plan.budget_bytes
