"""Objects are found by their class, and no other thread notices."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from planner.alive import instances_of, kinds_of, numbers_of
from planner.capture.as_eager import generators
from planner.capture.as_eager.generators import _alive, _numpy_instances
from planner.memory.live_optimizers import optimizers_of


class Own(torch.optim.SGD):
    """A class that the planner has not seen."""


class Dice(random.Random):
    """Likewise."""


def test_instances_of_subclasses_are_found() -> None:
    model = nn.Linear(2, 2)
    optimizer, dice = Own(model.parameters(), lr=0.1), Dice(3)
    assert optimizers_of(model) == [optimizer]
    assert any(x is dice for x in instances_of(kinds_of(random.Random)))
    assert instances_of(frozenset()) == []


def test_numpys_generators_are_found_by_what_they_hold() -> None:
    kinds = kinds_of(numpy.random.Generator, numpy.random.RandomState)
    before = sum(numbers_of(kinds).values())
    made = [
        numpy.random.default_rng(1),
        numpy.random.Generator(numpy.random.MT19937(2)),
        numpy.random.RandomState(3),
    ]
    assert sum(numbers_of(kinds).values()) == before + len(made)
    found = {id(x) for x in _numpy_instances()}
    assert found >= {id(x) for x in made}


def test_all_objects_are_walked_for_what_a_program_hid_and_not_for_what_python_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python 3.12 begins with 375 objects behind ``gc.freeze``."""
    gc.unfreeze()  # as the tests hide what others left alive
    list(_alive())
    referrers = gc.get_referrers

    def walks(hidden: int) -> int:
        calls: list[Any] = []

        def counted(*things: Any) -> list[Any]:
            calls.append(things)
            return referrers(*things)

        with monkeypatch.context() as patch:
            patch.setattr(gc, "get_freeze_count", lambda: hidden)
            patch.setattr(generators, "_hides", False)  # as other tests left it
            patch.setattr(gc, "get_referrers", counted)
            list(_alive())
        return len(calls)

    found = [walks(hidden) for hidden in (0, 375, 4100)]
    gc.freeze()
    assert found[0] == found[1] < found[2]


def test_what_a_program_hid_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gc`` walks all of it to count it."""
    counts: list[int] = []

    def counted() -> int:
        counts.append(4100)
        return counts[-1]

    monkeypatch.setattr(generators, "_hides", False)  # as other tests left it
    monkeypatch.setattr(gc, "get_freeze_count", counted)
    for _ in range(3):
        list(_alive())
    assert len(counts) == 1


def _same(i: int) -> int:
    return i


@pytest.fixture
def busy() -> Iterator[list[str]]:
    """Another thread fills tuples; what it raised."""
    raised: list[str] = []
    stop = threading.Event()

    def fill() -> None:
        while not stop.is_set():
            try:
                tuple(map(_same, range(400)))
            except SystemError as error:
                raised.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=fill)
    thread.start()
    yield raised
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


def test_a_tuple_that_another_thread_fills_is_left_alone(busy: list[str]) -> None:
    """``gc.get_objects()`` holds it for a moment, which its ``tuple(...)`` does not take."""
    model = nn.Linear(2, 2)
    kept = numpy.random.default_rng(1)
    for _ in range(40):
        optimizers_of(model)
    assert any(x is kept for x in _numpy_instances())
    assert busy == []
