"""Which outputs of a model's regions get gradients, as far as its steps have shown."""

from __future__ import annotations

from planner.regions.steps.seen import Seen

__all__ = ["Came"]


class Came:
    """The outputs that ever got a gradient, by region and by how often that had been called in its step."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], frozenset[int]] = {}
        self._full: set[tuple[int, int]] = set()  # where these are all that can
        self._regions: set[int] = set()

    def is_known(self, region: int) -> bool:
        """Whether a call of the region with this number was seen to its end."""
        return region in self._regions

    @property
    def is_one_turn(self) -> bool:
        """Whether each region that was seen ran once in a step."""
        return {turn_of for _, turn_of in self._of} == {0}

    def outputs(self, region: int, turn_of: int) -> frozenset[int] | None:
        """The outputs of such a call that are to be differentiated; ``None``: all that can be, which is also
        said of a call that never was seen.
        """
        at = region, turn_of
        return None if at in self._full else self._of.get(at)

    def learn(self, seen: Seen) -> bool:
        """After a call's backward.  Whether outputs got gradients that the call was not run for."""
        at = seen.region.number, seen.turn_of
        self._regions.add(seen.region.number)
        known = self._of.get(at, frozenset())
        came = known | (seen.present or frozenset())
        if at in self._of and came == known:
            return False
        self._of[at] = came
        if came == seen.able:
            self._full.add(at)
        return seen.used is not None and not came <= seen.used
