"""A sharded step put together on paper: what FSDP2 holds, and the plans of it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from planner import InfeasibleBudgetError, PlannerError
from planner._compat import FakeTensorMode
from planner.options import Search
from planner.sharded import ShardedStep, Sharding, largest_micro_batch, sharded_step
from planner.sharded.sharding import Group, held_beside
from tests.test_planner_fsdp2 import Model


def _step(rows: int = 4, **how: object) -> ShardedStep:
    with FakeTensorMode():
        model = Model(width=64, count=4, tied=False)
    sharding = Sharding(8, "blocks", **how)  # type: ignore[arg-type]
    ids = torch.zeros(rows, 24, dtype=torch.long)
    return sharded_step(model, (ids,), sharding, optimizer=torch.optim.AdamW, costs="H100", time_limit_s=1.0)


@pytest.fixture(scope="module")
def step() -> ShardedStep:
    return _step()


def test_parameters_are_padded_to_equal_shares_of_their_rows() -> None:
    group = Group.of([torch.empty(10, 3), torch.empty(8, requires_grad=False)], Sharding(4, ""))
    assert (group.gathered_bytes, group.buffer_bytes) == (2 * 38, 2 * (3 * 4 * 3 + 8))
    assert (group.shard_bytes, group.cast_bytes) == (4 * (3 * 3 + 2), 2 * (3 * 3 + 2))
    assert group.reduced_bytes == group.sum_bytes == group.gradient_bytes == 0  # neither is trained
    trained = Group.of([nn.Parameter(torch.empty(10, 3))], Sharding(4, "", reduce_dtype=None))
    assert (trained.reduced_bytes, trained.sum_bytes, trained.gradient_bytes) == (72, 18, 36)


def test_what_is_held_at_each_glue() -> None:
    root, block = (Group(size, size, size // 2, 0, size, size // 2, size // 2) for size in (100, 10))
    there = Sharding(2, "blocks", param_dtype=None, reduce_dtype=None)
    held = [at.behind_bytes for at in held_beside(root, [block] * 3, there)]
    # gathered: the root's 100, 10 of the block that runs, and 10 in a buffer, of it or the next
    assert held[:6] == [200, 120, 120, 120, 110, 110]
    # and backwards a buffer of the last reduction, and what each has reduced
    assert held[6:] == [120, 120 + 10 + 5, 120 - 10 + 10 + 10, 100 + 10 + 15, 15 + 50]
    stays = Sharding(2, "blocks", reshard_after_forward=False, param_dtype=None, reduce_dtype=None)
    held = [at.behind_bytes for at in held_beside(root, [block] * 3, stays)]
    assert held[:6] == [200, 120, 130, 140, 140, 130]
    assert held[6:] == [130, 120 + 10 + 5, 110 + 10 + 10, 100 + 10 + 15, 15 + 50]


def test_a_plan_is_between_everything_kept_and_every_block_checkpointed(step: ShardedStep) -> None:
    checkpointed = step.checkpointed
    assert checkpointed.peak_bytes < step.baseline_peak_bytes
    plan = step.plan_bytes(checkpointed.peak_bytes, Search(time_limit_s=10.0))  # over when it is proved
    assert plan.overhead < step.overhead_of(checkpointed)
    assert plan.peak_bytes <= checkpointed.peak_bytes
    assert {r.path for r in plan.regions} == {"", *(f"blocks.{k}" for k in range(4))}
    assert any(p.module == "blocks.2.up" for p in plan.placements)
    assert "FSDP2 over 8 ranks" in plan.summary()
    assert plan.breakdown["outputs"] < plan.breakdown["between_regions"]  # what FSDP2 holds has a line
    with pytest.raises(PlannerError, match="for looking"):
        plan.apply()
    with pytest.raises(PlannerError, match=r"one rank of FSDP2 over 8 ranks.*planner\.enable\(model"):
        step.applied(plan, step.model)
    with pytest.raises(InfeasibleBudgetError):
        step.plan_bytes(step.floor_bytes - 1, Search(time_limit_s=1.0))


def test_a_plan_is_never_worse_than_greedy_under_the_same_accounting(step: ShardedStep) -> None:
    budget = (step.checkpointed.peak_bytes + step.baseline_peak_bytes) // 2
    greedy = step.plan_bytes(budget, Search("greedy", 1.0))
    hurried = step.plan_bytes(budget, Search("auto", 1e-3))
    assert hurried.peak_bytes <= budget and hurried.overhead <= greedy.overhead


def test_more_ranks_hold_less_and_what_is_not_resharded_more(step: ShardedStep) -> None:
    kept = _step(reshard_after_forward=False)
    assert kept.baseline_peak_bytes > step.baseline_peak_bytes
    assert kept.problem.total_seconds == step.problem.total_seconds


def test_the_largest_micro_batch_is_the_last_that_fits(step: ShardedStep) -> None:
    steps = functools.cache(_step)
    budget_gb = steps(1).checkpointed.peak_bytes / 1e9
    size, plan = largest_micro_batch(steps, budget_gb, solver="greedy", time_limit_s=1.0)
    assert size >= 1 and plan is not None and plan.peak_bytes <= budget_gb * 1e9
    assert largest_micro_batch(steps, 1e-6) == (0, None)


def test_what_is_no_stack_is_refused() -> None:
    with FakeTensorMode():
        model = Model(count=2)
    ids = torch.zeros(2, 24, dtype=torch.long)
    with pytest.raises(PlannerError, match=r"has no 'layers'; its lists of modules are \['blocks'\]"):
        sharded_step(model, (ids,), Sharding(2, "layers"))
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match="pass its class"):
        sharded_step(model, (ids,), Sharding(2, "blocks"), optimizer=optimizer)
    with pytest.raises(ValueError, match="ranks"):
        Sharding(1, "blocks")
