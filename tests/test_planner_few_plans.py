"""However few plans are kept, batches of any shapes in any order train bit for bit as without a plan."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.training import making
from tests import tiny

# Each first and each last; a larger one after a smaller, and the other way about.
ROWS = ((32, 8, 16), (8, 16, 32), (16, 32, 8))
OPTIONS: dict[str, Any] = {"costs": "roofline", "solver": "recompute_all", "time_limit_s": 1.0, "now": True}


class Small(nn.Module):
    """Logits (batch, 4), or a loss if given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.last(self.drop(torch.tanh(self.first(x))))
        return out if labels is None else F.cross_entropy(out, labels)


@pytest.mark.parametrize(("rows", "max_plans"), [*((rows, 2) for rows in ROWS), (ROWS[0], 1), (ROWS[0], 3)])
def test_three_shapes_in_any_order(rows: tuple[int, ...], max_plans: int) -> None:
    model = tiny.seeded(Small)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, max_plans=max_plans, **OPTIONS)
    for n in (*rows, rows[0]):
        inputs = tiny.batch(n, seed=n, labels=True)
        tiny.assert_same_bits(tiny.run(model, inputs), tiny.run(twin, inputs))
        plan = planner.plan_of(model)
        assert plan is not None and plan.recompute_flops > 0


@pytest.mark.parametrize("max_plans", [1, 2, 64])
def test_from_the_third_shape_on_nothing_is_captured(max_plans: int) -> None:
    model = tiny.seeded(Small)
    planner.enable(model, 1.0, max_plans=max_plans, **OPTIONS)
    with mock.patch.object(making, "prepare", side_effect=making.prepare) as prepare:
        for n in (32, 8, 16, 24, 12, 20, 28):
            tiny.run(model, tiny.batch(n, labels=True), steps=1)
    assert [call.kwargs["dynamic"] for call in prepare.call_args_list] == [False, False, True]


def test_kinds_that_take_turns_are_captured_again_and_stay_equal() -> None:
    """A loss inside and none are two kinds of call; one plan is kept of them all."""
    model = tiny.seeded(Small)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, max_plans=1, **OPTIONS)
    for n in (32, 8, 16, 24):
        for labels in (True, False):
            inputs = tiny.batch(n, seed=n, labels=labels)
            tiny.assert_same_bits(tiny.run(model, inputs, steps=1), tiny.run(twin, inputs, steps=1))


def test_fewer_plans_from_the_next_batch_on() -> None:
    model = tiny.seeded(Small)
    twin = copy.deepcopy(model)
    planner.enable(model, 1.0, **OPTIONS)
    for n, max_plans in zip((32, 8, 16, 24), (64, 64, 1, 2), strict=True):
        planner.enable(model, 1.0, max_plans=max_plans, **OPTIONS)
        inputs = tiny.batch(n, seed=n, labels=True)
        tiny.assert_same_bits(tiny.run(model, inputs), tiny.run(twin, inputs))
