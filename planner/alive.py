"""Objects that exist, by their class.

``gc.get_objects()`` holds every object for a moment, a tuple among them that another thread is about to fill:
there ``tuple(...)`` then raises ``SystemError``.  What refers to a class is found without that, and whatever
is an instance of a class written in Python refers to it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Collection
from typing import Any

__all__ = ["instances_of", "kinds_of", "numbers_of"]


def kinds_of(*classes: type) -> frozenset[type]:
    """The classes and all that derive from them."""
    return frozenset(classes).union(*(kinds_of(*c.__subclasses__()) for c in classes))


def instances_of(kinds: Collection[type]) -> list[Any]:
    """Every object of just these classes, none of which is built in, but for those behind ``gc.freeze``."""
    return [x for x in gc.get_referrers(*kinds) if type(x) in kinds] if kinds else []


def numbers_of(kinds: Collection[type]) -> dict[type, int]:
    """How many objects of each of these classes there are, built in or not."""
    # all of it runs in C: no other thread does before the list of all objects is gone
    of_all = list(map(type, itertools.chain.from_iterable(map(gc.get_objects, (None,)))))
    return {kind: of_all.count(kind) for kind in kinds}
