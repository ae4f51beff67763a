"""The calls of one step: how many there are, which of them wait for their backward, what room is left.

A loss may call its model more than once before the backward; the calls share the budget
(:mod:`planner.training.sharing`).  How many there are is told by the options or by the first step, which is
therefore run so that others find room.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from planner.training.sharing import Room, most_held

__all__ = ["REMEMBERED", "StepCalls"]

# Steps after which a number of calls that was not seen again is forgotten.
REMEMBERED = 32


class StepCalls:
    """Counts the calls of each step as they come.

    ``told``      how many the options say there are, ``None`` if they do not.
    ``usual``     how many there usually are where nothing is told, ``None`` if nobody knows.
    ``per_step``  how many a step is taken to have; ``None`` until its first one has told.
    """

    def __init__(self, told: int | None, usual: int | None) -> None:
        self.told, self.usual, self.per_step = told, usual, told
        self._waiting: list[tuple[weakref.ref[Any], int]] = []  # those without their backward, bytes held
        self.restart()

    def restart(self) -> None:
        """For a model that was edited, whose calls need other memory; those that wait still do."""
        self._seen = 0  # calls of this step so far
        self._recent: deque[int] = deque(maxlen=REMEMBERED)  # calls of each of the last steps
        self._need_bytes = self._need_size = 0  # the least peak of the largest call, and its elements

    @property
    def seen(self) -> int | None:
        """How many a step has, as far as is known: of a first step, how many have come."""
        return self.per_step or (self._seen if self.usual else None)

    @contextlib.contextmanager
    def supposed(self, calls: int) -> Iterator[None]:
        """Plan as if a step had so many."""
        known, self.per_step = self.per_step, calls
        try:
            yield
        finally:
            self.per_step = known

    def tell(self, told: int | None) -> None:
        """The options say something else from here on."""
        self.told = told
        self.per_step = told or self.per_step

    def arrive(self) -> int:
        """The place in its step, from 1, of a call that is about to run."""
        alive = [(ref, held, ref()) for ref, held in self._waiting]
        self._waiting = [(ref, held) for ref, held, waiting in alive if waiting is not None and waiting.waits]
        if not self._waiting and self._seen:
            self._recent.append(self._seen)
            self._seen = 0
            if self.told is None:  # a step whose backward was left out may have misled
                self.per_step = max(self._recent)
        place = len(self._waiting) + 1
        self._seen = max(self._seen, place)
        if self.per_step is not None:
            self.per_step = max(self.per_step, place)
        return place

    def started(self, call: weakref.ref[Any], held_bytes: int) -> None:
        """The forward of ``call`` has run; it holds so much while its ``waits`` is true."""
        self._waiting.append((call, held_bytes))

    @property
    def held_bytes(self) -> int:
        """What the calls hold that wait for their backward."""
        return sum(held for _, held in self._waiting)

    def room(self, budget_bytes: int, place: int) -> Room:
        """What the call at ``place`` may take now."""
        left = budget_bytes - self.held_bytes
        return Room(left, most_held(left, self._need_bytes, self.per_step or 1, place))

    def is_largest(self, elements: int) -> bool:
        """Whether the least peak of a call of so many elements is worth knowing: none larger has come."""
        return self.per_step != 1 and elements > self._need_size

    def learn_need(self, elements: int, need_bytes: int) -> None:
        """The least peak of a call of so many elements: what the last call of a step must be left."""
        self._need_bytes, self._need_size = need_bytes, elements
