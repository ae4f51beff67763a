"""Training steps of further kinds that were tried against their plain twins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
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


def _trained(model: nn.Module, steps: int = 4) -> list[Tensor]:
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


class Gated(torch.autograd.Function):
    """Told of gradients that do not come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.sin(), y * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None if g is None else g * 3), (None if h is None else h * 2)


class Zeros(Gated):
    """The same, given zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), y * 2


@pytest.mark.parametrize("function", [Gated, Zeros])
def test_no_gradient_stays_none_behind_a_function_that_asks_for_none(function: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.a, self.b = Looked(), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            y: Tensor = function.apply(self.a(x), self.b(x))[0]
            return y

    model = Two()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, capture="regions", **FAST)
    _assert_as_plain(plain, model)
    for one in (plain, model):
        one(torch.ones(4, 16)).sum().backward()
    nones = [[p.grad is None for p in one.b.parameters()] for one in (plain, model)]
    assert nones[0] == nones[1] == [function is Gated] * 2
    plan = planner.plan_of(model)
    assert plan is not None and any("set_materialize_grads" in why for why in plan.cuts) == (
        function is Gated
    )


def test_gradients_taken_by_a_transform_within_the_forward() -> None:
    """Such a forward cannot be looked at under a checkpoint, nor be cut within the transform."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.layers = Looked(), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def energy(self, v: Tensor) -> Tensor:
            for layer in self.layers:
                v = torch.tanh(layer(v))
            return v.sum()

        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            return x - torch.func.vmap(torch.func.grad(self.energy))(x)

    class Mapped(Energy):
        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            return x - torch.func.vmap(self.energy)(x)[:, None]

    for kind in (Energy, Mapped):
        model = kind()
        plain = copy.deepcopy(model)
        planner.enable(model, 1, now=True, **FAST)
        _assert_as_plain(plain, model)
        plan = planner.plan_of(model)
        assert plan is not None and len(plan.regions) > 1


@pytest.mark.parametrize("looks", [True, False])
def test_what_was_made_under_inference_mode_may_come_in(looks: bool) -> None:
    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.teacher = Looked(looks), nn.Linear(16, 16).requires_grad_(False)

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            with torch.inference_mode():
                y = self.teacher(x)
            return self.looked(x + given) + y

    model = Taught()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, **FAST)
    seen = []
    for one in (plain, model):
        torch.manual_seed(1)
        for _ in range(4):
            with torch.inference_mode():
                given = torch.randn(32, 16)
            one(torch.randn(32, 16), given).square().mean().backward()
        seen.append([p.grad for p in one.looked.parameters()])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    assert planner.plan_of(model) is not None
