"""Where neither one graph nor regions can be had, the refusal names a part of the model that is one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planner
from planner._compat import FakeTensorMode
from planner.errors import TraceError
from tests.hf import FAST


class Looks(nn.Module):
    """A layer behind which a value is looked at."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if out.abs().max().item() > 1e6:
            out = out * 0
        return out


class Parted(nn.Module):
    """A backbone that is one graph, with a norm that counts and dropout, and a head that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Tanh(), nn.Linear(64, 8)
        )
        self.head, self.calls = Looks(2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.head(self.backbone(x))
        return out


def _refusal(model: nn.Module) -> str:
    """Of a plan for a GPU that is elsewhere, for which no regions can be had."""
    with pytest.raises(TraceError) as refused:
        planner.plan(model, 1.0, (torch.randn(16, 8),), **{**FAST, "costs": "H100"})
    return str(refused.value)


def test_the_largest_part_that_is_one_graph_is_proposed_and_nothing_is_left_behind() -> None:
    model = Parted()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        said = _refusal(model)
    assert "What works instead: model.backbone (Sequential, where 99% of what the model's" in said
    assert "planner.enable(model.backbone, budget_gb)" in said
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_no_part_is_one_graph_the_refusal_names_what_was_tried() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if self.weight.isnan().any() else x * 2 * self.weight

    assert "Of the parts of Whole none was tried: none with parameters" in _refusal(Whole())
    assert "Of the parts of Sequential, 0 was tried, and none is one graph" in _refusal(
        nn.Sequential(Whole())
    )


def test_a_model_without_memory_is_looked_at_as_far_as_it_runs() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Parted()
        given = torch.randn(16, 8)
    with pytest.raises(TraceError, match=r"has no memory(.|\n)*What works instead: model.backbone "):
        planner.plan(model, 1.0, (given,), **FAST)
