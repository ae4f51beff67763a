"""Calls of one step that share a budget: what each may hold, and a plan that holds no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import planner
from planner.errors import InfeasibleBudgetError
from planner.measure import StorageMeter
from planner.training.sharing import most_held, plan_that_holds
from planner.training.step_calls import REMEMBERED
from tests import tiny
from tests.hf import FAST

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stub:
    """A plan of a step that needs 40 bytes, and holds a third of what it is given beyond 30."""

    budget_bytes: int

    @property
    def held_bytes(self) -> int:
        return (self.budget_bytes - 30) // 3


def make(budget_bytes: int) -> Stub:
    if budget_bytes < 40:
        raise InfeasibleBudgetError(
            "", budget_bytes=budget_bytes, minimum_bytes=40, floor_bytes=40, breakdown={}
        )
    return Stub(budget_bytes)


@pytest.mark.parametrize(
    ("calls", "place", "most"), [(1, 1, None), (2, 1, 60), (4, 1, 20), (4, 3, 60), (4, 4, None)]
)
def test_what_is_left_is_dealt_out_evenly(calls: int, place: int, most: int | None) -> None:
    assert most_held(100, 40, calls, place) == most
    assert most is None or most_held(30, 40, calls, place) == 0


def test_all_of_the_budget_where_that_holds_little_enough() -> None:
    assert plan_that_holds(30, 20, 100, make).budget_bytes == 100


@pytest.mark.parametrize("low", [10, 40, 50])
def test_the_largest_budget_that_holds_little_enough(low: int) -> None:
    plan = plan_that_holds(12, low, 100, make)
    assert plan.held_bytes <= 12 and plan.budget_bytes >= 55  # 68 at most; four probes after the first


def test_the_least_held_where_all_hold_too_much() -> None:
    assert plan_that_holds(1, 10, 100, make).budget_bytes < 60


def test_a_budget_too_low_for_one_call() -> None:
    with pytest.raises(InfeasibleBudgetError):
        plan_that_holds(10, 10, 39, make)


class Pair(nn.Module):
    """Two texts by one encoder, as a bi-encoder's loss calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny.seeded(lambda: tiny.blocks(6, 32))

    def step(self, rows: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        outputs = [self.encoder(torch.ones(n, 32) * n) for n in rows]
        sum((x.square().mean() for x in outputs), torch.zeros(())).backward()


def peak_bytes(model: Pair, rows: tuple[int, ...]) -> int:
    """Of a step from empty gradients."""
    model.zero_grad()
    with StorageMeter("cpu") as meter:
        meter.register(*model.parameters())
        model.step(rows)
    return meter.peak_bytes


@pytest.mark.parametrize("rows", [(300, 300, 300), (50, 400, 200)])
def test_three_calls_in_one_budget(rows: tuple[int, ...]) -> None:
    model, twin = Pair(), Pair()
    budget = 0.8 * peak_bytes(twin, rows)
    planner.enable(model.encoder, budget / 1e9, **FAST, calls_per_step=3, now=True)
    assert peak_bytes(model, rows) <= budget
    assert peak_bytes(model, rows) <= budget
    both = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in both)


def test_calls_that_fit_in_no_way_are_refused_and_how_to_announce_them_is_said() -> None:
    model, rows = Pair(), (300, 300, 300)
    budget = 0.2 * peak_bytes(Pair(), rows)
    planner.enable(model.encoder, budget / 1e9, **FAST, now=True)
    with pytest.raises(
        InfeasibleBudgetError, match=r"call \d in the first step, .* held by.*calls_per_step=\d"
    ):
        model.step(rows)
    planner.enable(model.encoder, budget / 1e9, **FAST, calls_per_step=3)
    with pytest.raises(InfeasibleBudgetError, match=r"call \d of 3 .* or make the batch smaller\. .*Within"):
        model.step(rows)


def test_a_step_without_its_backward_is_forgotten_in_time() -> None:
    model = tiny.seeded(lambda: tiny.blocks(2, 8))
    planner.enable(model, 1.0, **FAST, now=True)
    x = torch.ones(4, 8)
    outputs = model(x)  # its backward never comes, and it is held while the next one runs
    counts = []
    for _ in range(REMEMBERED + 2):
        outputs = model(x)
        outputs.sum().backward()
        counts.append(vars(model)["_planner_switch"].calls)
    assert counts[0] == 2 and counts[-1] == 1


def test_the_pages_table_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "tests/benchmarks/results/switch.json").read_text(encoding="utf-8"))
    page = (ROOT / "planner/README.md").read_text(encoding="utf-8")
    for row in rows:
        end = f"| {row['peak_bytes'] / 1e6:.1f} | {row['extra_flops']:+.1%} |"
        assert any(
            line.startswith(f"| {row['model']} | {row['way']} |") and line.endswith(end)
            for line in page.splitlines()
        )
    for name in ("cross_encoder", "internvl"):
        ways = {row["way"]: row for row in rows if row["model"] == name}
        stock, ours = ways["switch on"], ways["planned, at the switch's peak"]
        assert ours["peak_bytes"] < stock["peak_bytes"] and ours["extra_flops"] < stock["extra_flops"]
