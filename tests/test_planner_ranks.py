"""Ranks of one sharded model that hear of one another's plans and failures, at the same call each.

The ranks are :class:`Company` objects on one store in memory, called one after the other in any order.
"""

from __future__ import annotations

import itertools
import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import planner
from planner import InfeasibleBudgetError, PlannerError
from planner.plan import Plan
from planner.ranks import company
from planner.ranks.company import OFTEN, SELDOM, Company

RANKS = 3


@pytest.fixture
def ranks() -> list[Company]:
    store = dist.HashStore()
    return [Company(store, rank, RANKS, "plans/1/Model", torch.device("cpu")) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planner.plan(
        nn.Linear(4, 4), 1.0, (torch.randn(2, 4),), costs="roofline", solver="keep_all",
        loss_fn=torch.sum,
    )  # fmt: skip


def heard(ranks: list[Company], order: tuple[int, ...]) -> dict[int, Exception]:
    """What each rank raises as its next call begins."""
    found: dict[int, Exception] = {}
    for rank in order:
        try:
            ranks[rank].begins()
        except PlannerError as error:
            found[rank] = error
    return found


ERROR = InfeasibleBudgetError(
    "too little", budget_bytes=1, minimum_bytes=2, floor_bytes=2, breakdown={"parameters": 2}
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(RANKS))))
@pytest.mark.parametrize(("fails", "raises"), [(1, 2), (OFTEN, SELDOM), (SELDOM, 2 * SELDOM)])
def test_all_raise_at_one_call_whoever_comes_first(
    ranks: list[Company], order: tuple[int, ...], fails: int, raises: int
) -> None:
    for _ in range(fails - 1):
        assert not heard(ranks, order)
    for rank in order:  # one fails as its call begins, while others are yet to begin it
        ranks[rank].begins()
        if rank == 1:
            ranks[rank].failed(ERROR)
            ranks[rank].failed(ERROR)  # as it does at every call until then
    for _ in range(raises - fails - 1):
        assert not heard(ranks, order)
    found = heard(ranks, order)
    assert found[1] is ERROR and set(found) == set(range(RANKS))
    for rank in (0, 2):
        assert str(found[rank]).startswith("1 of 3 ranks found no plan")
        assert "rank 1: InfeasibleBudgetError: too little" in str(found[rank])
    for _ in range(SELDOM):
        assert not heard(ranks, order)  # a loop that went on with another batch is not stopped again
    ranks[2].failed(ERROR)
    found = dict(itertools.chain(*(heard(ranks, order).items() for _ in range(SELDOM))))
    assert found[2] is ERROR and set(found) == set(range(RANKS))


def test_which_ranks_run_one_plan_is_told_once(
    ranks: list[Company], plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "planner")
    for rank, of in enumerate(ranks):
        of.begins()
        if rank < 2:
            of.runs(plan, rank == 1, {"batch": "4"})
    assert not heard(ranks, (0, 1, 2)) and not caplog.records  # one is yet to say
    ranks[2].runs(plan, False, {"batch": "4"})
    for _ in range(SELDOM):
        heard(ranks, (0, 1, 2))
    assert [r.getMessage() for r in caplog.records] == ["all 3 ranks of Model run one plan; made by rank 1"]


def test_what_differs_between_plans_is_told_with_ranks(
    ranks: list[Company], plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    other = mock.Mock(fingerprint=plan.fingerprint, sequence=(*plan.sequence, "again"))
    for of, has, batch in zip(ranks, (plan, other, plan), "464", strict=True):
        of.begins()
        of.runs(has, True, {"batch": batch, "torch": "2.13"})
    heard(ranks, (0, 1, 2))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "What differs is batch: ranks 0, 2: batch 4; rank 1: batch 6" in record.getMessage()


def test_no_company_outside_of_a_job_or_for_a_model_that_is_not_spread() -> None:
    device = torch.device("cpu")
    assert Company.of(nn.Linear(2, 2), device) is None
    with mock.patch.object(company, "is_shared", return_value=True):
        assert Company.of(nn.Linear(2, 2), device) is None
