"""The caching allocator on paper: sequences worked out by hand from its rules, invariants, plans with it."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import planner
from planner._compat import FakeTensorMode
from planner.devices.allocator import (
    MIB,
    AllocatorPeaks,
    Block,
    CachingAllocator,
    HeldBlocks,
    is_default,
    simulate_allocator,
)
from planner.devices.state import DeviceSegment
from planner.memory.execution import Execution
from planner.options import Search
from planner.solving.fit import fitted, fitted_each
from solvers import Problem, Schedule, simulate


def figures(allocator: CachingAllocator) -> tuple[float, float]:
    """Allocated and reserved MiB."""
    return allocator.allocated_bytes / MIB, allocator.reserved_bytes / MIB


# --- Rules, one by one ------------------------------------------------------------------------


def test_sizes_are_rounded_up_to_512_bytes() -> None:
    allocator = CachingAllocator()
    assert [allocator.allocate(n).bytes for n in (1, 512, 513)] == [512, 512, 1024]
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2048, 2 * MIB)


def test_small_blocks_share_segments_of_two_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(512)
    allocator.allocate(MIB)
    assert figures(allocator) == (1 + 512 / MIB, 2)
    allocator.allocate(MIB)  # 1 MiB - 512 are left of the first segment
    assert figures(allocator) == (2 + 512 / MIB, 4)
    allocator.allocate(MIB - 512)  # they serve this one
    assert figures(allocator) == (3, 4)


def test_a_small_rest_of_512_bytes_is_cut_off() -> None:
    allocator = CachingAllocator()
    a, b = allocator.allocate(MIB), allocator.allocate(MIB - 512)
    assert allocator.allocated_bytes == 2 * MIB - 512
    assert allocator.allocate(512).address == 2 * MIB - 512
    assert (a.address, b.address, allocator.reserved_bytes) == (0, MIB, 2 * MIB)


def test_large_blocks_share_segments_of_twenty_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(9 * MIB)
    allocator.allocate(9 * MIB)
    assert figures(allocator) == (18, 20)
    block = allocator.allocate(MIB + 512)  # less than 1 MiB would remain of the last two
    assert (block.bytes, figures(allocator)) == (2 * MIB, (20, 20))


@pytest.mark.parametrize(
    ("asked", "given_", "segment"),
    [
        (10 * MIB - 512, 10 * MIB - 512, 20),  # the last that shares
        (10 * MIB, 10 * MIB, 10),
        (10 * MIB + 512, 10 * MIB + 512, 12),
        (11 * MIB - 512, 11 * MIB - 512, 12),
        (11 * MIB, 12 * MIB, 12),  # a rest of 1 MiB is not cut off
        (11 * MIB + 512, 12 * MIB, 12),
    ],
)
def test_from_ten_mib_on_a_block_has_a_segment_of_its_size(asked: int, given_: int, segment: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(asked).bytes == given_
    assert allocator.reserved_bytes == segment * MIB


def test_the_smallest_free_block_that_is_large_enough_serves() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(n * MIB) for n in (6, 2, 4, 2, 6)]  # 20 MiB
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    assert allocator.allocate(int(3.5 * MIB)).address == blocks[2].address  # the 4 MiB, whole
    assert figures(allocator) == (2 + 4 + 2 + 6, 20)
    assert allocator.allocate(3 * MIB).address == blocks[0].address


def test_of_equal_free_blocks_the_lowest_address_serves() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    for k in (3, 1):
        allocator.release(blocks[k])
    assert allocator.allocate(4 * MIB).address == 4 * MIB


def test_free_neighbours_are_joined_on_both_sides() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for k in (0, 2, 1):
        allocator.release(blocks[k])
    assert allocator.allocate(9 * MIB).address == 0  # of the 15 that became one
    assert allocator.reserved_bytes == 20 * MIB


def test_the_driver_gets_back_whole_segments_only() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.allocate(MIB), allocator.allocate(30 * MIB)
    allocator.allocate(4 * MIB)
    allocator.release(gone)
    allocator.trim()
    assert figures(allocator) == (5, 2 + 20)
    allocator.release(kept)
    with pytest.raises(ValueError, match="released before"):
        allocator.release(kept)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.booleans()), max_size=60), st.randoms())
def test_blocks_never_overlap_and_all_that_is_freed_joins(
    moves: list[tuple[int, bool]], chance: random.Random
) -> None:
    allocator = CachingAllocator()
    live: list[tuple[int, Block]] = []
    for most, small in moves:
        count = most // 1000 + 1 if small else most
        live.append((count, allocator.allocate(count)))
        if chance.random() < 0.5:
            allocator.release(live.pop(chance.randrange(len(live)))[1])
        spans = sorted((b.address, b.address + b.bytes) for _, b in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        asked = sum(n for n, _ in live)
        assert asked <= sum(b.bytes for _, b in live) == allocator.allocated_bytes <= allocator.reserved_bytes
    for _, block in live:
        allocator.release(block)
    assert allocator.allocated_bytes == 0
    allocator.trim()
    assert allocator.reserved_bytes == 0


def test_settings_that_are_not_modelled_are_told() -> None:
    assert is_default({}) and is_default({"PYTORCH_ALLOC_CONF": "expandable_segments:False"})
    assert not is_default({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert not is_default({"PYTORCH_ALLOC_CONF": "backend:native,max_split_size_mb:64"})


# --- A schedule simulate_allocator through ----------------------------------------------------------------


def chain(sizes: list[int], *, seconds: float = 1.0) -> Problem:
    """``f0 -> f1 -> ...``, and a backward that reads them from the last to the first."""
    n = len(sizes)
    forward = [
        {"name": f"f{i}", "inputs": [f"v{i - 1}"] if i else [], "outputs": [f"v{i}"], "seconds": seconds}
        for i in range(n)
    ]
    backward = [
        {
            "name": f"b{i}",
            "inputs": [f"v{i}", *([f"g{i + 1}"] if i < n - 1 else [])],
            "outputs": [f"g{i}"],
            "seconds": seconds,
            "recomputable": False,
        }
        for i in reversed(range(n))
    ]
    sizes_of = {f"v{i}": b for i, b in enumerate(sizes)} | {f"g{i}": 512 for i in range(n)}
    return Problem.build([*forward, *backward], sizes_of, turn=n, final=["g0"])


def test_a_schedule_takes_what_its_blocks_take() -> None:
    problem = chain([int(11.5 * MIB), 3 * MIB])
    peaks = simulate_allocator(
        problem, simulate(problem, Schedule.keep_all(problem)), HeldBlocks((), (512, 1000))
    )
    # Resident: 512 + 1024.  v0 has 12 MiB to itself, v1 is cut from 20, gradients lie beside the residents.
    assert peaks.requested_peak_bytes == 1512 + int(14.5 * MIB) + 512
    assert peaks.allocated_peak_bytes == 1536 + 15 * MIB + 512
    assert peaks.reserved_peak_bytes == 34 * MIB
    assert peaks.allocated_bytes.tolist() == [
        1536 + m for m in (12 * MIB, 15 * MIB, 15 * MIB + 512, 12 * MIB + 1024)
    ]


def test_a_step_begins_in_the_segments_that_are_there() -> None:
    taken = {7 * MIB: 6 * MIB, 17 * MIB: 4 * MIB}  # 4 and 6 MiB are free
    seen = DeviceSegment(7 * MIB, 20 * MIB, False, taken)
    resident = HeldBlocks((seen,), (0, 1000))
    assert resident.handed_out_bytes == resident.asked_bytes + 24 == 10 * MIB + 1024
    allocator = resident.allocator()
    assert [allocator.allocate(n * MIB).address for n in (3, 5)] == [6 * MIB, 14 * MIB]
    assert figures(allocator) == (20 + 1024 / MIB, 22)  # both were given whole
    problem = chain([int(11.5 * MIB), 3 * MIB])
    peaks = simulate_allocator(problem, simulate(problem, Schedule.keep_all(problem)), resident)
    assert peaks.allocated_peak_bytes == 10 * MIB + 1024 + 16 * MIB + 512
    assert peaks.reserved_peak_bytes == (20 + 2 + 12) * MIB


def test_peaks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        AllocatorPeaks(3, 2, 4, np.zeros(0))


# --- Solving with it --------------------------------------------------------------------------


class Loose:
    """An allocator that hands out ``more`` bytes beyond what a schedule's peak is."""

    def __init__(self, problem: Problem, more: int) -> None:
        self.problem, self.more, self.asked = problem, more, 0

    def __call__(self, schedule: Schedule) -> Execution:
        self.asked += 1
        line = simulate(self.problem, schedule)
        return Execution(self.problem, line, np.full(len(line.steps), self.more), 0)


def test_a_schedule_over_the_budget_by_slack_is_solved_for_again() -> None:
    problem = chain([1000] * 8)
    budget = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    plain = fitted(problem, budget, Loose(problem, 0), Search("auto", 2.0))
    loose = fitted(problem, budget, Loose(problem, 900), Search("auto", 2.0))
    assert plain.is_optimal and plain.seconds == pytest.approx(problem.total_seconds, rel=1e-12)
    assert loose.execution is not None and loose.peak_bytes <= budget
    assert loose.peak_bytes == loose.execution.timeline.peak_bytes + 900
    assert loose.execution.timeline.recompute_seconds > 0 and not loose.is_optimal
    assert loose.bound_seconds == plain.bound_seconds  # what holds without slack: the budget's own bound
    hopeless = Loose(problem, 10**6)
    unsettled = fitted(problem, budget, hopeless, Search("auto", 1.0))
    assert not unsettled.fits and not unsettled.is_infeasible and hopeless.asked >= 1
    assert fitted(problem, 100, hopeless, Search("auto", 1.0)).is_infeasible


def test_every_point_of_a_frontier_fits_with_slack() -> None:
    problem = chain([1000] * 8)
    full = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    budgets = [full - 3000, full - 1000, full, full + 2000]
    found = fitted_each(problem, budgets, Loose(problem, 900), Search("auto", 2.0))
    for budget, answer in found.items():
        assert answer.execution is not None
        assert answer.execution.timeline.peak_bytes + 900 == answer.peak_bytes <= budget
    seconds = [found[b].seconds for b in budgets]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(problem.total_seconds, rel=1e-12)


# --- Plans ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def awkward() -> tuple[nn.Module, torch.Tensor]:
    """Layers whose activations take 11.44 MiB, which the allocator gives 12."""
    with FakeTensorMode():
        model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(1000, 1000), nn.Sigmoid())))
        return model, torch.empty(3000, 1000)


def test_a_plan_for_a_gpu_counts_what_its_allocator_hands_out(
    awkward: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = awkward
    loose = planner.plan(model, 1.0, (x,), costs="H100", time_limit_s=2)
    slack = loose.breakdown["allocator_slack"]
    assert slack > 3 * 0.5 * MIB and loose.peak_bytes == sum(loose.breakdown.values()) == loose.timeline.max()
    assert loose.reserved_bytes is not None and loose.reserved_bytes >= loose.peak_bytes
    assert sum(loose.timeline_by_kind.values()).tolist() == loose.timeline.tolist()  # type: ignore[union-attr]
    assert "predicted reserved" in loose.summary() and "the allocator's slack" in loose.summary()

    budget_gb = (loose.peak_bytes - 1) / 1e9  # what is asked for would fit without recomputation
    plan = planner.plan(model, budget_gb, (x,), costs="H100", time_limit_s=2)
    assert plan.peak_bytes <= plan.budget_bytes and plan.recompute_flops + plan.overhead > 0
    assert plan.overhead_bound <= plan.overhead
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert (read.reserved_bytes, read.breakdown) == (plan.reserved_bytes, plan.breakdown)
    assert read.timeline.tolist() == plan.timeline.tolist()

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    exact = planner.plan(model, 1.0, (x,), costs="H100", time_limit_s=2)
    assert (exact.peak_bytes, exact.reserved_bytes) == (loose.peak_bytes - slack, None)
    assert "allocator_slack" not in exact.breakdown


def test_on_a_cpu_there_is_no_allocator_to_count() -> None:
    plan = planner.plan(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), 1.0, (torch.ones(2, 4),))
    assert plan.reserved_bytes is None and "allocator_slack" not in plan.breakdown
    assert "reserved" not in plan.summary()
