"""A backward that hands out the gradients of what is read several times one by one.

The engine adds each gradient of a tensor to what came before it.  A planned step makes one sum of its own,
which is the same as long as nothing came before.  Where something did (another planned call's, a penalty's),
the gradients have to go out one by one, each in the segment that makes it; and those of a weight that
autocast casts once for several calls before they are cast back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from planner._compat import modes_set_aside
from planner.capture import meta
from planner.graph import kernels
from planner.rewrite.program import Argument, Backward, Key, Low, Term
from planner.rewrite.prune import MOST_KEPT, Handed, Pruned, pruned
from planner.rewrite.segments import bytes_of

__all__ = ["Apart", "argument_of", "summands_of"]


@dataclass(frozen=True)
class _Read:
    """A gradient that the engine would be given by itself.

    ``slot``  whose it is; ``part`` the segment that hands it out.
    ``low``   the gradients of autocast's copy that it is made of, and the segments that hand these out.
    """

    node: fx.Node
    slot: str | int | Term
    part: int
    low: tuple[tuple[fx.Node, int], ...] = ()


class Apart:
    """The gradients of a backward, one by one.

    ``slots``  whose gradients, or parts of them, each segment may hand out beside its own.
    ``sums``   of each segment, whose gradients it adds up.
    ``casts``  of each segment, whose gradients are cast back from autocast's type.
    """

    def __init__(self, backward: Backward) -> None:
        self.backward = backward
        home = {n: k for k, part in enumerate(backward.parts) for n in part}
        self._reads = {node: _reads(node, key, home) for node, key in backward.gradients.items()}
        own = set(backward.gradients.values())
        slots: dict[int, list[str | int | Term]] = defaultdict(list)
        casts: dict[int, list[str | int | Term]] = defaultdict(list)
        sums: dict[int, list[str | int | Term]] = defaultdict(list)
        for node, reads in self._reads.items():
            if len(reads) > 1:
                sums[home[node]].append(backward.gradients[node])
            for read in reads:
                if read.slot not in own:
                    slots[read.part].append(read.slot)
                if read.low:
                    casts[read.part].append(read.slot)
        parts = range(len(backward.parts))
        self.slots = tuple(tuple(slots[k]) for k in parts)
        self.sums = tuple(tuple(sums[k]) for k in parts)
        self.casts = tuple(tuple(casts[k]) for k in parts)
        self._known: dict[tuple[frozenset[int], bool], Pruned | None] = {}

    @property
    def reads_several(self) -> bool:
        """Whether the step reads something more than once."""
        return any(self.slots)

    @property
    def names(self) -> dict[str | int | Term, int]:
        """What is read more than once, with its gradients added up in the backward, and how often."""
        of = self.backward.gradients.items()
        counts = {key: len(summands_of(node)) for node, key in of}
        return {key: count for key, count in counts.items() if count > 1}

    @cached_property
    def beside_bytes(self) -> int:
        """What one segment may hold of gradients that the backward adds up at once, beside their sums."""
        beside = [0] * len(self.slots)
        for reads in self._reads.values():
            for part, of in Counter(read.part for read in reads).items():
                beside[part] += (of - 1) * bytes_of(reads[0].node)
            for read in reads:
                for part, of in Counter(part for _, part in read.low).items():
                    beside[part] += (of - 1) * bytes_of(read.low[0][0])
        return max(beside)

    def of(self, present: frozenset[int], *, low: bool) -> Pruned | None:
        """The backward for the gradients of the outputs ``present``; as :func:`planner.rewrite.prune.pruned`.

        ``low``  with what is cast back as it is before that.
        """
        key = present, low
        if key not in self._known:
            if len(self._known) >= MOST_KEPT:
                self._known.clear()
            with modes_set_aside():  # a meter is not to count what a binding is tried on
                self._known[key] = pruned(self.backward, present, self._handed(low=low))
        return self._known[key]

    def _handed(self, *, low: bool) -> list[Handed]:
        out: list[Handed] = []
        for reads in self._reads.values():
            for read in reads:
                if low and read.low:
                    lows = enumerate(read.low)
                    out += [Handed(node, Low(read.slot, number), part) for number, (node, part) in lows]
                else:
                    out.append(Handed(read.node, read.slot, read.part))
        return sorted(out, key=lambda of: of.part)


def _reads(gradient: fx.Node, key: str | int | Term, home: dict[fx.Node, int]) -> list[_Read]:
    of, number = key[:2] if isinstance(key, Term) else (key, 0)
    out: list[_Read] = []
    terms = _terms_of(gradient)
    part = home[gradient] if len(terms) == 1 else 0
    for place, term in enumerate(terms, start=1):
        slot = Term(of, number, place) if len(terms) > 1 else key
        low: list[tuple[fx.Node, int]] = []
        if meta.casts_back(term):
            for each in _low(term):
                part = max(part, home.get(each, 0))
                low.append((each, part))
        # After the last of those before it, where it may have been made earlier.
        part = max(part, home.get(term, 0))
        out.append(_Read(term, slot, part, tuple(low)))
    return out


def _terms_of(gradient: fx.Node) -> list[fx.Node]:
    """The gradients that autograd would be given for what this is the gradient of, in its order."""
    node = gradient
    while node.target in (kernels.gradient_like, kernels.gradient_apart):  # as the engine lays it out
        node = node.all_input_nodes[0]
    found = _terms(node)
    return found if len(found) > 1 or meta.casts_back(node) else [gradient]


def _low(term: fx.Node) -> list[fx.Node]:
    """What is added up before ``term`` casts it back."""
    return _terms(term.all_input_nodes[0])


def summands_of(gradient: fx.Node) -> list[fx.Node]:
    """All that may be handed out by itself of a gradient."""
    return [n for term in _terms_of(gradient) for n in (_low(term) if meta.casts_back(term) else (term,))]


def _terms(total: fx.Node) -> list[fx.Node]:
    """The gradients that the engine would add up to ``total``, in its order."""
    behind: list[fx.Node] = []
    node = total
    while (first := meta.adds_reads(node)) is not None:
        operands = node.args[:2]
        behind.append(operands[1 - first])  # type: ignore[arg-type]
        node = operands[first]  # type: ignore[assignment]
    return [node, *reversed(behind)]


def argument_of(slot: Key) -> Argument:
    """The parameter or input whose gradient, or part of one, this is."""
    while isinstance(slot, Low | Term):
        slot = slot.slot if isinstance(slot, Low) else slot.of
    return Argument("parameter" if isinstance(slot, str) else "input", slot)
