"""Loops in which a graph ends, in functions that hold all of a step: cut turn by turn, up to a bound."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import planner
from planner._compat import dynamo
from planner.errors import TraceError
from tests import tiny
from tests.hf import FAST


class Layers(nn.Module):
    """Two residual MLPs whose layers are called by the forward itself, as (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 64) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))
        self.drop = nn.Dropout(0.1)


class OverModules(Layers):
    """The loop is over two ModuleLists, left and gone on with."""

    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + self.drop(down(torch.tanh(up(x))))
            if x.abs().max().item() > 1e4:
                break
            turns += 1
            if turns > 1:
                continue
            x = x * 0.9
        return x.square().mean()


class Enumerated(Layers):
    """The loop is over modules and their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        for number, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            x = x + self.drop(down(torch.tanh(up(x))))
            if number == 0 and x.abs().max().item() > 1e4:
                break
        return x.square().mean()


# Dynamo of torch 2.11 takes enumerate for a generator: it cannot go on with it behind the end of a graph.
GOES_ON_IN_ENUMERATE = torch.__version__ >= (2, 12)


class AsDataSay(Layers):
    """As many turns as its data say, with a loop in each."""

    def forward(self, x: Tensor) -> Tensor:
        turns = 0
        while turns < 1 or (turns < 3 and x.abs().mean().item() < 0.1):
            for number in range(2):
                x = x + self.drop(self.downs[number](torch.tanh(self.ups[number](x))))
            turns += 1
        return x.square().mean()


class Long(Layers):
    """More turns than are followed."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(9):
            x = x + self.drop(self.downs[0](torch.tanh(self.ups[0](x))))
            if x.isnan().any():
                x = x * 0
        return x.square().mean()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    state = {}
    for k in range(5):
        optimizer.zero_grad()
        loss = model(torch.randn(32, 8) * (0.01 if k in (1, 3) else 1.0))
        loss.backward()
        optimizer.step()
        state[f"loss {k}"] = loss.detach()
    return state | {name: t.detach().clone() for name, t in model.state_dict().items()}


def test_a_loop_that_cannot_be_gone_on_with_is_refused_with_a_way_out() -> None:
    if GOES_ON_IN_ENUMERATE:
        plan = planner.plan(Enumerated(), 1.0, (torch.randn(32, 8),), **FAST)
        assert len(plan.regions) == 2 and plan.verify().ok
        return
    with pytest.raises(planner.TraceError, match=r"a loop is cut.*make the loop's body a function"):
        planner.plan(Enumerated(), 1.0, (torch.randn(32, 8),), **FAST)


@pytest.mark.parametrize("kind", [OverModules, AsDataSay])
def test_a_loop_that_holds_all_of_a_step_is_cut_turn_by_turn(
    kind: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
        twin = copy.deepcopy(model)
        how = {**FAST, "solver": "recompute_all"}
        planner.enable(model, 1.0, **how, capture="regions", now=True)
        with caplog.at_level(logging.INFO, "planner"):
            tiny.assert_same_bits(_trained(model), _trained(twin))
    plan = planner.plan_of(model)
    assert plan is not None and sum(region.memory_share for region in plan.regions) > 0.9
    assert "in its loops too" in caplog.text and "without a plan" not in caplog.text


def test_of_a_plan_that_is_asked_for_the_loops_are_followed_too() -> None:
    plan = planner.plan(OverModules(), 1.0, (torch.randn(32, 8),), **FAST)
    assert len(plan.regions) == 3 and plan.verify().ok


def test_a_loop_of_too_many_turns_is_left_to_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dynamo, "TURNS_HERE", 3)
    with torch.random.fork_rng():
        model = Long()
        twin = copy.deepcopy(model)
        planner.enable(model, 1.0, **FAST, capture="regions", now=True)
        tiny.assert_same_bits(_trained(model), _trained(twin))
    assert planner.plan_of(model) is None and "trains without a plan" in caplog.text
    with pytest.raises(TraceError, match="make the loop's body a function or a module of its own"):
        planner.plan(Long(), 1.0, (torch.randn(32, 8),), **FAST)


def test_a_loop_over_planned_blocks_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    class Block(Layers):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.downs[0](torch.tanh(self.ups[0](x)))
            return out

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                if x.isnan().any():
                    x = x * 0
            return x.square().mean()

    with caplog.at_level(logging.INFO, "planner"):
        plan = planner.plan(Blocks(), 1.0, (torch.randn(32, 8),), **FAST)
    assert len(plan.regions) == 3 and "in its loops too" not in caplog.text
