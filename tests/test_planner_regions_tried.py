"""Training steps of further kinds that were tried against their plain twins."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import planner
from tests.hf import FAST


class Looked(nn.Module):
    """Two layers with a look at a value between them: no one graph."""

    def __init__(self, looks: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.looks = nn.Linear(16, 48), nn.Linear(48, 16), looks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.looks and h.sum().item() > 1e9:
            h = -h
        return torch.tanh(self.second(h))


def _trained(model: nn.Module, steps: int = 5) -> list[Tensor]:
    """Losses, and in the end parameters."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.05), []
    torch.manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(32, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def _assert_as_plain(plain: nn.Module, model: nn.Module) -> None:
    for a, b in zip(_trained(plain), _trained(model), strict=True):
        assert torch.equal(a, b)


def test_a_part_that_is_enabled_too_does_not_plan_while_its_whole_is_captured() -> None:
    model = nn.Sequential(Looked(), nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    for one in (model[0], model):
        planner.enable(one, 1, now=True, **FAST)
    _assert_as_plain(plain, model)
    plan = planner.plan_of(model)
    assert plan is not None and plan.regions
    # one graph: the whole's plan covers the part, which makes none
    model = nn.Sequential(Looked(looks=False), nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    for one in (model[0], model):
        planner.enable(one, 1, now=True, **FAST)
    _assert_as_plain(plain, model)
    plan = planner.plan_of(model)
    assert plan is not None and not plan.regions
    assert planner.plan_of(model[0]) is None
