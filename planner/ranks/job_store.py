"""Texts of plans in the key-value store of a distributed job, left by who made them for who needs them.

Each text is under a name that says all it depends on.  Who asks for a name first makes the text, the others
wait for it.  The store lives in one rank's memory, for as long as the job, so what is in it goes again:

* a text that every rank has taken becomes empty at once;
* of the texts that not all of them have asked for, each rank leaves its last :data:`LEFT` there;
* the keys of what was emptied go when :data:`LEFT` more were.

So there are at most a few times :data:`LEFT` keys for each rank, however long the job.  A rank that asks for
what is gone makes it itself, as it would have without the others.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import time
from collections import OrderedDict, deque
from typing import Any

__all__ = ["LEFT", "JobStore"]

log = logging.getLogger(__name__)

# Ranks of a job are a step or two apart, and a step makes a plan for each of its calls.
LEFT = 32

# Seconds between two looks at whether the text that is waited for was withdrawn meanwhile.
LOOK_S = 5.0


class JobStore:
    """This rank's way to the texts in ``store``, which ``ranks`` processes share.

    Keys below a name: "asked" counts those who want it, "plan" is the text (empty: make your own), "taken"
    counts the ranks that have it.
    """

    def __init__(self, store: Any, ranks: int) -> None:
        self.store, self.ranks = store, ranks
        self._offered: deque[str] = deque()  # by this rank, not empty as far as it knows
        self._emptied: deque[str] = deque()  # by this rank
        self._counted: OrderedDict[str, None] = OrderedDict()  # names whose "taken" has this rank in it

    def name_of(self, prefix: str, key: str) -> str:
        """A name for everything that ``key`` says."""
        return f"{prefix}/{hashlib.sha256(key.encode()).hexdigest()}"

    def is_first(self, name: str) -> bool:
        """Ask for a text; whether nobody did before, so that it is this rank's to :meth:`offer`."""
        return bool(self.store.add(f"{name}/asked", 1) == 1)

    def offer(self, name: str, text: str) -> None:
        """Leave the text for the others; empty if there is none, so that nobody waits for it."""
        self.store.set(f"{name}/plan", text)
        if not text:
            self._gone(name)
            return
        self._offered.append(name)
        while len(self._offered) > LEFT:
            self._empty(self._offered.popleft())
        self._take(name)

    def wait(self, name: str, wait_s: float) -> str | None:
        """The text another rank offers within ``wait_s``, empty if it has none; ``None`` if it was withdrawn.

        Raises ``TimeoutError`` if nothing comes.
        """
        deadline = time.monotonic() + wait_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                self.store.wait([f"{name}/plan"], datetime.timedelta(seconds=max(0.001, min(LOOK_S, left_s))))
                break
            except RuntimeError as error:  # of which kind depends on the store
                if not self.store.check([f"{name}/asked"]):
                    return None
                if left_s <= LOOK_S:
                    raise TimeoutError(str(error)) from error
        text: str = self.store.get(f"{name}/plan").decode()
        if text:
            self._take(name)
        return text

    def _take(self, name: str) -> None:
        """This rank has the text; the last one to say so empties it."""
        if name in self._counted:  # asked for once more, after it was dropped here
            return
        self._counted[name] = None
        while len(self._counted) > 2 * LEFT:
            self._counted.popitem(last=False)
        if self.store.add(f"{name}/taken", 1) >= self.ranks:
            self._empty(name)

    def _empty(self, name: str) -> None:
        self.store.set(f"{name}/plan", "")
        self._gone(name)

    def _gone(self, name: str) -> None:
        """Nothing is to be had there any more.  The keys stay a while, for who is about to look."""
        self._emptied.append(name)
        while len(self._emptied) > LEFT:
            old = self._emptied.popleft()
            for key in ("plan", "taken", "asked"):
                try:
                    self.store.delete_key(f"{old}/{key}")
                except RuntimeError as error:  # a store that cannot
                    log.debug("%s stays in the job's store: %s", old, error)
