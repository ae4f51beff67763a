"""Plans that ranks leave for one another: the job's store does not grow, and nobody waits for what is gone.

The ranks are :class:`JobStore` objects on one store in memory, called one after the other.
"""

from __future__ import annotations

import math
import threading
from unittest import mock

import pytest
import torch.distributed as dist

import planner
from planner import _compat
from planner.plans.reading import from_text
from planner.plans.serialize import to_text
from planner.ranks import job_store, once
from planner.ranks.job_store import LEFT, JobStore
from tests import tiny

RANKS = 3


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


@pytest.fixture
def ranks(store: dist.HashStore) -> list[JobStore]:
    return [JobStore(store, RANKS) for _ in range(RANKS)]


def text_in(store: dist.HashStore, name: str) -> str:
    return str(store.get(f"{name}/plan").decode())


def test_a_text_goes_when_every_rank_has_it(store: dist.HashStore, ranks: list[JobStore]) -> None:
    first, second, third = ranks
    name = first.name_of("plans", "a step")
    assert first.is_first(name) and not second.is_first(name) and not third.is_first(name)
    first.offer(name, "a plan")
    assert second.wait(name, 1.0) == "a plan"
    assert text_in(store, name) == "a plan"
    assert third.wait(name, 1.0) == "a plan"
    assert text_in(store, name) == ""
    assert second.wait(name, 1.0) == ""  # asked for once more: make your own


def test_a_rank_that_takes_a_text_twice_counts_once(store: dist.HashStore, ranks: list[JobStore]) -> None:
    first, second, third = ranks
    name = first.name_of("plans", "a step")
    assert first.is_first(name)
    first.offer(name, "a plan")
    assert second.wait(name, 1.0) == second.wait(name, 1.0) == "a plan"
    assert third.wait(name, 1.0) == "a plan"


@pytest.mark.parametrize("takers", [0, 1, 2])
def test_a_long_job_does_not_grow(store: dist.HashStore, ranks: list[JobStore], takers: int) -> None:
    """Every plan has a name of its own, as where calls share a budget; ``takers`` other ranks need it."""
    counts = []
    for i in range(16 * LEFT):
        maker = ranks[i % RANKS]
        name = maker.name_of("plans", str(i))
        assert maker.is_first(name)
        maker.offer(name, "a plan")
        for other in [r for r in ranks if r is not maker][:takers]:
            assert not other.is_first(name)
            assert other.wait(name, 1.0) == "a plan"
        counts.append(store.num_keys())
    assert max(counts) <= 3 * 2 * LEFT * RANKS  # three keys, offered or emptied, of each rank


def test_texts_of_failures_go_too(store: dist.HashStore, ranks: list[JobStore]) -> None:
    for i in range(4 * LEFT):
        name = ranks[0].name_of("plans", str(i))
        assert ranks[0].is_first(name)
        ranks[0].offer(name, "")
    assert store.num_keys() <= 2 * LEFT


def test_who_waits_for_what_is_withdrawn_is_told(
    store: dist.HashStore, ranks: list[JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "LOOK_S", 0.05)
    name = ranks[0].name_of("plans", "a step")
    assert ranks[0].is_first(name) and not ranks[1].is_first(name)
    threading.Timer(0.2, lambda: store.delete_key(f"{name}/asked")).start()
    assert ranks[1].wait(name, math.inf) is None
    assert ranks[1].is_first(name)


def test_who_waits_in_vain_gives_up(ranks: list[JobStore]) -> None:
    name = ranks[0].name_of("plans", "a step")
    assert ranks[0].is_first(name) and not ranks[1].is_first(name)
    with pytest.raises(TimeoutError):
        ranks[1].wait(name, 0.2)


def test_a_store_that_cannot_delete_is_lived_with(ranks: list[JobStore], store: dist.HashStore) -> None:
    class Fixed:
        add, set, get, wait, check = store.add, store.set, store.get, store.wait, store.check

        def delete_key(self, key: str) -> bool:
            raise RuntimeError("not supported")

    rank = JobStore(Fixed(), RANKS)
    for i in range(2 * LEFT + 2):
        assert rank.is_first(str(i))
        rank.offer(str(i), "")


def test_plans_made_once_leave_few_keys(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the front door, with two ranks: what one makes the other adopts, and both texts go."""
    model = tiny.blocks(1)
    plan = planner.plan(model, 1.0, (tiny.batch(4)["x"].repeat(1, 4),), costs="roofline", solver="keep_all")
    text, made = to_text(plan), 0

    def make() -> planner.Plan:
        nonlocal made
        made += 1
        return from_text(text)

    ranks = [mock.Mock(**{"get_world_size.return_value": 2}) for _ in range(2)]
    monkeypatch.setattr(_compat, "job_store", lambda: store)
    monkeypatch.setattr(once, "is_shared", lambda: True)
    for i in range(3 * LEFT):
        for rank in ranks:
            monkeypatch.setattr(once, "dist", rank)
            got = once.made_once(str(i), make, lambda received: received, wait_s=5.0)
            assert got.sequence == plan.sequence
        assert store.num_keys() <= 3 * (LEFT + 1)
    assert made == 3 * LEFT
