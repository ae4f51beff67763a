"""Steps in regions whose sizes follow the data: planned for the largest, and told of where they go over."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.measure import StorageMeter
from planner.regions.forward import SPARSE, _Counts
from planner.regions.record import Sizes, beyond
from planner.regions.session import Session
from tests import tiny
from tests.hf import FAST

WIDTH = 32


class Chosen(nn.Module):
    """Layers on the rows that a mask lets through, as many as there are."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))[mask]
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h.square().mean()


def _batch(rows: int, of: int = 256) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows)
    mask = torch.zeros(of, dtype=torch.bool)
    mask[torch.randperm(of, generator=random)[:rows]] = True
    return torch.randn(of, WIDTH, generator=random), mask


def _trained(model: nn.Module, rows: Iterable[int], metered: bool = True) -> tuple[list[int], list[Tensor]]:
    """Peaks of the last two steps, and the losses and gradients of all."""
    sizes, peaks, seen = list(rows), [], []
    for k, n in enumerate(sizes):
        batch = _batch(n)
        if metered and k >= len(sizes) - 2:
            with StorageMeter() as meter:
                meter.register(*model.parameters(), *batch)
                loss = model(*batch)
                loss.backward()
            peaks.append(meter.peak_bytes)
        else:
            loss = model(*batch)
            loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
    return peaks, seen


def _peak(model: nn.Module, rows: int) -> int:
    return _trained(copy.deepcopy(model), [rows, rows])[0][0]


def _enable(model: nn.Module, budget_bytes: float) -> nn.Module:
    return planner.enable(model, budget_bytes / 1e9, **FAST, capture="regions", now=True)


def _session(model: nn.Module) -> Session:
    session = vars(model)["_planner_switch"]._regions.session
    assert isinstance(session, Session)
    return session


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_step_larger_than_those_recorded_runs_as_planned_within_the_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first larger ones stray from the plan, and are within the budget by running as it says."""
    model = Chosen()
    plain = copy.deepcopy(model)
    budget = 0.88 * _peak(model, 200)
    _enable(model, budget)
    with caplog.at_level(logging.WARNING, "planner"):
        steps = [180, 186, 190, 190, 190, 196, 200]
        peaks, seen = _trained(model, steps)
        _, want = _trained(plain, steps, metered=False)
    assert max(peaks) <= budget, (peaks, budget)
    assert "whatever its regions save" not in caplog.text
    tiny.assert_same_bits({str(k): t for k, t in enumerate(seen)}, {str(k): t for k, t in enumerate(want)})


def test_one_plan_is_for_all_sizes_seen_and_more(caplog: pytest.LogCaptureFixture) -> None:
    """It is made again where larger ones come, and not where smaller ones do."""
    model = Chosen()
    _enable(model, 0.95 * _peak(model, 256))
    plans = []
    with caplog.at_level(logging.WARNING, "planner"):
        for rows in (100, 120, 120, 140, 130, 160, 110, 170, 100, 150, 225, 110):
            _trained(model, [rows], metered=False)
            plans.append(planner.plan_of(model))
    assert not caplog.records
    # beyond 140, the largest of three that differ by 20, one may be larger by 23: 160 is, 170 is not
    assert plans[5] is not None and plans[5] is plans[6]
    # beyond 170, the largest of five that differ by 70, by 62
    assert plans[9] is not plans[5] and plans[9] is plans[10] is plans[11]
    (kept,) = (kept for of in _session(model).plans._of.values() for kept in of)
    assert kept.of.plan is plans[11]


def test_a_size_that_no_plan_fits_is_told_of_before_its_backward(caplog: pytest.LogCaptureFixture) -> None:
    model = Chosen()
    _enable(model, 0.8 * _peak(model, 128))
    _trained(model, [110, 110, 110, 110], metered=False)
    with caplog.at_level(logging.WARNING, "planner"):
        loss = model(*_batch(250))
        assert "over its budget, whatever its regions save" in caplog.text
        assert "The least budget with a plan is" in caplog.text
        loss.backward()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "planner"):  # the next such step shows what a plan would take
        _trained(model, [250, 250, 240, 250, 110], metered=False)
    assert sum("no plan for Chosen fits" in r.getMessage() for r in caplog.records) == 1
    assert planner.plan_of(model) is not None


def test_margins_are_of_what_differs() -> None:
    assert [beyond(120, 100, n) for n in (1, 2, 4, 16)] == [0, 29, 20, 10]
    sizes = Sizes.of("shape", [10, 20], [0], [5], [7])
    assert not sizes.differ and sizes.foreseen() == ([10, 20], [0], [5], [7])
    sizes = sizes.then(Sizes.of("shape", [10, 26], [0], [4], [7]))
    assert sizes.foreseen() == ([10, 35], [0], [7], [7])
    assert sizes.foreseen(margin=0.0) == ([10, 26], [0], [5], [7])


@pytest.mark.parametrize(("taken", "count"), [([5], 2), ([6], 4), ([5, 6, 5, 6], 4), ([5, 6, 7, 5], 6)])
def test_steps_are_counted_until_as_many_came_as_the_largest_took(taken: list[int], count: int) -> None:
    counts = _Counts()
    steps = [*taken, *[5] * 99]
    while counts.wants_next():
        counts.add(steps[len(counts.taken)])
    assert len(counts.taken) == count
    if len(set(counts.taken)) > 1:  # and one now and then
        assert [counts.wants_next() for _ in range(SPARSE)] == [False] * (SPARSE - 2) + [True] * 2
    else:
        assert not any(counts.wants_next() for _ in range(3 * SPARSE))
