"""A training graph cut into a chain of blocks, each with a few ways to be run.

The forward pass is cut at positions where few bytes cross, the backward pass where it stops
reading what lies behind the cut, so that block ``i`` has one range of forward ops and one range of
backward ops.  ``crossing[i]`` is what blocks ``i`` and later need of earlier ones: the forward
values that cross the cut, long skips included, and whatever the backward of these blocks reads from
further up.  Holding ``crossing[i]`` is all it takes to run blocks ``i..`` again.

Nothing is assumed of the graph.  What a chain cannot express is held: tiny values, those of pinned ops,
and final ones, from their op on; a value that the backward of an *earlier* block reads, from the
backward of its own block to that read.  A graph that is no chain is thus treated correctly, at a
price in memory; the simulator has the last word on both.

An *option* of a run of consecutive blocks is a set of inner values to save in its forward; the rest
is recomputed just in time in its backward, each op at most once.  Runs of several blocks matter
because a block alone must keep what crosses into the next; a run may recompute that as well.  The
sets are the breakpoints of the trade between bytes kept and seconds recomputed (see
``solvers.chain.saved_sets``).

Sources: the chain is that of Beaumont et al., "Optimal checkpointing for heterogeneous chains"
(https://arxiv.org/abs/1911.13214); options per block are those of Zhao et al., "Rockmate" (ICML 2023,
https://arxiv.org/abs/2307.01236); where to cut, and what a chain cannot express, are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from solvers.chain.saved_sets import BlockGraph, saved_sets
from solvers.core.facts import spanned
from solvers.core.just_in_time import runs_again
from solvers.core.problem import Problem, ProblemError

__all__ = ["Chain", "Option", "check_chain", "cut_into_blocks"]

# Values this many times smaller than the largest (statistics of a normalization) are always held:
# dropping them frees nothing, and to make them again may take all that went before.
TINY = 2000


@dataclass(frozen=True)
class Option:
    """One way to run some consecutive blocks; bytes are beyond what is held when they start.

    ``kept_bytes``    held from forward to backward: the saved set and what crosses into the next block.
    ``first_peak_bytes``, ``again_peak_bytes``  peak of its forward, in the first pass with everything
                      the simulator sees, and in a later pass without gradients and held values.
    ``again_steps``, ``again_s``        the forward of a later pass: ops and seconds.
    ``backward_peak_bytes``             peak of its backward, gradients and workspace included.
    ``backward_steps``, ``backward_s``  its backward with recomputations, and the seconds of these.
    """

    kept_bytes: int
    first_peak_bytes: int
    again_peak_bytes: int
    again_steps: tuple[int, ...]
    again_s: float
    backward_peak_bytes: int
    backward_steps: tuple[int, ...]
    backward_s: float


class Chain:
    """``problem`` cut at forward positions ``starts`` (0 first, ``turn`` last) into L blocks.

    ``backward_ends[i]`` is where the backward of block ``i`` ends and that of block ``i - 1``
    begins; entry 0 is the end of the problem and the last entry is the turn.

    ``block_of``    the block of each op, n of them.
    ``held``        forward values that are never dropped (see the module).
    ``crossing``    for i of 0 to L, the values that blocks ``i`` and later need of earlier ones.
    ``late``        per block, its values that the backward of an earlier block reads.
    ``fixed_live``, ``fixed_kept``  bytes that no decision changes while an op runs and after it, int64, (n,).
    """

    def __init__(self, problem: Problem, starts: Sequence[int], backward_ends: Sequence[int]) -> None:
        self.problem = problem
        self.starts = tuple(starts)
        self.backward_ends = tuple(backward_ends)
        self.block_of = self._blocks()
        self.held = _held_values(problem, self.starts[-1])
        self.crossing: list[set[int]] = [set() for _ in self.starts]
        self.late: list[set[int]] = [set() for _ in self.starts[1:]]
        self._sort_values()
        self._just_late = [self._bytes_just_late(b) for b in range(len(self))]
        self._fixed_bytes()
        self._note_ops()

    def _blocks(self) -> list[int]:
        """The block of each op."""
        block_of = np.empty(len(self.problem), dtype=np.int64)
        for i in range(len(self)):
            block_of[self.starts[i] : self.starts[i + 1]] = i
            block_of[self.backward_ends[i + 1] : self.backward_ends[i]] = i
        return block_of.tolist()

    def _sort_values(self) -> None:
        """Fill ``crossing`` and ``late`` with the forward values that are not held."""
        problem, turn = self.problem, self.starts[-1]
        for v, readers in enumerate(problem.consumers):
            producer = problem.values[v].producer
            if producer is None or producer >= turn or v in self.held:
                continue
            home = self.block_of[producer]
            for i in range(home + 1, max((self.block_of[r] for r in readers), default=home) + 1):
                self.crossing[i].add(v)
            if any(r >= turn and self.block_of[r] < home for r in readers):
                self.late[home].add(v)

    def _bytes_just_late(self, b: int) -> int:
        """Bytes of the late values of blocks after ``b`` whose backward ends where that of ``b`` begins."""
        ends, values = self.backward_ends, self.problem.values
        ending = (h for h in range(b + 1, len(self)) if ends[h] == ends[b + 1])
        return sum(values[v].bytes for h in ending for v in self.late[h])

    def _note_ops(self) -> None:
        """What the loops below ask of each op: the forward values it reads and makes that are not held, its
        scratch, and the held values that it makes anew when it runs again: a second copy of a final one, and
        of a tiny one whose readers may all be done."""
        problem, held, turn = self.problem, self.held, self.starts[-1]
        behind = len(problem) - turn
        self._bytes = sizes = [value.bytes for value in problem.values]
        self._reads = [
            tuple(v for v in reads if (problem.values[v].producer or 0) < turn and v not in held)
            for reads in problem.counted_inputs
        ]
        self._makes = [tuple(v for v in op.outputs if v not in held) for op in problem.ops[:turn]]
        self._makes += [()] * behind
        self._scratch = [op.workspace_bytes for op in problem.ops[:turn]] + [0] * behind
        self._second_copy = [sum(sizes[v] for v in op.outputs if v in held) for op in problem.ops[:turn]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __repr__(self) -> str:
        width = max((self.bytes_of(c) for c in self.crossing), default=0)
        return f"Chain({self.problem.name!r}: {len(self)} blocks, at most {width} bytes cross a cut)"

    def bytes_of(self, values: Iterable[int]) -> int:
        """Sum of the values' bytes."""
        return sum(self._bytes[v] for v in values)

    def forward(self, a: int, b: int) -> range:
        """Forward ops of blocks ``a..b``, both included as everywhere here."""
        return range(self.starts[a], self.starts[b + 1])

    def backward(self, a: int, b: int) -> range:
        """Backward ops of blocks ``a..b``."""
        return range(self.backward_ends[b + 1], self.backward_ends[a])

    def _fixed_bytes(self) -> None:
        """``fixed_live``, ``fixed_kept``: bytes no decision changes, during and after each op, shape (n,)."""
        problem, n, turn = self.problem, len(self.problem), self.starts[-1]
        live: list[tuple[int, int, int]] = []
        again_in = self._last_blocks_again()
        for v, value in enumerate(problem.values):
            if value.producer is None:
                continue
            readers = problem.consumers[v]
            begin, last = value.producer, readers[-1] if readers else value.producer
            if value.producer < turn:
                home = self.block_of[value.producer]
                if v in self.held:
                    # A forward op that reads it may run again until that block's backward is over.
                    again = [again_in[r] for r in readers if r < turn and problem.ops[r].recomputable]
                    last = max(last, self.backward_ends[min(again)] - 1) if again else last
                elif v in self.late[home]:
                    begin = self.backward_ends[home]
                else:
                    continue
            live.append((begin, n if value.final else last, value.bytes))
        scratch = np.array([op.workspace_bytes if t >= turn else 0 for t, op in enumerate(problem.ops)])
        self.fixed_live = spanned(n, ((a, min(n - 1, b), size) for a, b, size in live)) + scratch
        self.fixed_kept = spanned(n, ((a, b - 1, size) for a, b, size in live))

    def _last_blocks_again(self) -> list[int]:
        """For each op, the last block, so the earliest in the chain, in whose backward it may run again.

        It is the op's own, unless the backward of an earlier one reads what the op leads to.
        """
        last = list(self.block_of)
        for i in reversed(range(self.starts[-1])):
            made = (v for v in self.problem.ops[i].outputs if v not in self.held)
            last[i] = min([last[i], *(last[r] for v in made for r in self.problem.consumers[v])])
        return last

    def prelude(self, i: int) -> range:
        """The backward ops with which the backward of block ``i`` begins that read no forward value.

        They can run before anything is recomputed for the block, when least is alive.
        """
        backward = self.backward(i, i)
        end = next((t for t in backward if self._reads[t]), backward.stop)
        return range(backward.start, end)

    def prelude_peak(self, i: int) -> int:
        """Peak of ``prelude(i)``, of bytes that no decision changes."""
        return max((int(self.fixed_live[t]) for t in self.prelude(i)), default=0)

    def fixed_after_prelude(self, i: int) -> int:
        """Bytes no decision changes, alive when the backward of block ``i`` needs its first forward value."""
        return self._fixed_before(self.prelude(i).stop, i)

    def _fixed_before(self, t: int, b: int) -> int:
        """Bytes no decision changes, alive between ops ``t - 1`` and ``t`` while blocks up to ``b`` are due.

        Late values of the blocks after ``b`` are there, even those whose own backward has just ended.
        """
        return int(self.fixed_kept[t - 1]) + (self._just_late[b] if t == self.backward_ends[b + 1] else 0)

    @cached_property
    def common_bytes(self) -> np.ndarray:
        """``[a, i]`` with ``a <= i``: bytes in both ``crossing[a]`` and ``crossing[i]``, shape (L+1, L+1)."""
        size = len(self) + 1
        common = np.zeros((size + 1, size + 1), dtype=np.int64)
        for v in set().union(*self.crossing):
            cuts = [i for i, c in enumerate(self.crossing) if v in c]
            lo, hi, m = cuts[0], cuts[-1] + 1, self.problem.values[v].bytes
            common[lo, lo] += m
            common[hi, lo] -= m
            common[lo, hi] -= m
            common[hi, hi] += m
        return common.cumsum(0).cumsum(1)[:size, :size]

    def closure(self, targets: Iterable[int], at_hand: Collection[int]) -> list[int]:
        """Ops that make ``targets`` from what is at hand (held values always are), in order."""
        missing = (v for v in targets if v not in self.held)
        return sorted(runs_again(self.problem, missing, at_hand.__contains__, reads=self._reads))

    def again_seconds(self, steps: Iterable[int]) -> float:
        """Seconds of running ``steps`` once more."""
        return sum(self.problem.ops[i].again_s for i in steps)

    def inner_peak(
        self,
        steps: Sequence[int],
        fixed: Sequence[int],
        *,
        start: Collection[int] = (),
        keep: Collection[int] = (),
        outside: Collection[int] = (),
    ) -> int:
        """Peak of ``steps`` when ``fixed[t]`` bytes are alive anyway during step ``t``.

        ``start`` is alive at the beginning if it is used at all, ``keep`` at the end; ``outside``,
        held values and backward values are counted elsewhere.  Forward ops add their workspace.
        """
        reads, makes, sizes, scratch = self._reads, self._makes, self._bytes, self._scratch
        end = len(steps)
        last = dict.fromkeys(keep, end)
        dying: list[list[int]] = [[] for _ in range(end + 1)]
        for t in range(end - 1, -1, -1):
            for touched in (reads[steps[t]], makes[steps[t]]):
                for v in touched:
                    if v not in last:
                        last[v] = t
        alive = {v for v in start if v in last and v not in outside}
        for v in alive:
            dying[last[v]].append(v)
        now, peak = self.bytes_of(alive), 0
        for t, i in enumerate(steps):
            for v in makes[i]:
                if v not in alive and v not in outside:
                    alive.add(v)
                    dying[last[v]].append(v)
                    now += sizes[v]
            peak = max(peak, now + fixed[t] + scratch[i])
            for v in dying[t]:
                alive.discard(v)
                now -= sizes[v]
        return peak

    def backward_steps(
        self, a: int, b: int, at_hand: Collection[int], *, begin: int
    ) -> tuple[list[int], list[int]]:
        """Backward of blocks ``a..b`` from op ``begin``, what is missing recomputed just in time.

        Also each step's fixed bytes.
        """
        present, live = set(at_hand), self.fixed_live
        steps: list[int] = []
        fixed: list[int] = []

        def recompute(targets: Iterable[int], before: int) -> None:
            missing = [v for v in targets if v not in present and self._is_inner(v, a, b)]
            for op in self.closure(missing, present) if missing else ():
                steps.append(op)
                fixed.append(self._fixed_before(before, b) + self._second_copy[op])
                present.update(self._makes[op])

        for t in range(begin, self.backward_ends[a]):
            recompute(self._reads[t], t)
            steps.append(t)
            fixed.append(int(live[t]))
        recompute(self._late(a, b), self.backward_ends[a])
        return steps, fixed

    def _late(self, a: int, b: int) -> set[int]:
        """Values of blocks ``a..b`` that backward ops after those of block ``a`` read."""
        return {v for home in self.late[a : b + 1] for v in home}

    def _is_inner(self, v: int, a: int, b: int) -> bool:
        """Whether the forward of blocks ``a..b`` makes ``v``."""
        producer = self.problem.values[v].producer
        return producer is not None and self.starts[a] <= producer < self.starts[b + 1]

    def option(self, a: int, b: int, saved: Collection[int]) -> Option:
        """Blocks ``a..b`` with the inner values ``saved`` kept from their forward to their backward."""
        entering, leaving, late = self.crossing[a], self.crossing[b + 1], self._late(a, b)
        kept = (leaving | set(saved)) - entering
        first = self.forward(a, b)
        again = self.closure(kept, entering)
        backward, fixed = self.backward_steps(a, b, entering | kept, begin=self.backward_ends[b + 1])
        return Option(
            kept_bytes=self.bytes_of(kept),
            first_peak_bytes=self.inner_peak(
                first, self.fixed_live[first.start : first.stop].tolist(), keep=kept, outside=entering
            ),
            again_peak_bytes=self.inner_peak(again, self._second_copies(again), keep=kept, outside=entering),
            again_steps=tuple(again),
            again_s=self.again_seconds(again),
            backward_peak_bytes=self.inner_peak(backward, fixed, start=kept, keep=late, outside=entering),
            backward_steps=tuple(backward),
            backward_s=self.again_seconds(op for op in backward if op < self.starts[-1]),
        )

    def options(self, a: int, b: int, most: int) -> list[Option]:
        """Up to ``most`` options of blocks ``a..b``, from all that is needed saved to hardly any."""
        return [self.option(a, b, saved) for saved in saved_sets(self._block_graph(a, b), most)]

    def restart(self, a: int, b: int) -> Option:
        """Blocks ``a..b`` run backward from what crosses into them, with no forward of their own before.

        The prelude of block ``b`` is over by then.
        """
        backward, fixed = self.backward_steps(a, b, self.crossing[a], begin=self.prelude(b).stop)
        peak = self.inner_peak(backward, fixed, keep=self._late(a, b), outside=self.crossing[a])
        seconds = self.again_seconds(op for op in backward if op < self.starts[-1])
        return Option(0, 0, 0, (), 0.0, peak, tuple(backward), seconds)

    def sweep_peaks(self, i: int) -> tuple[int, int]:
        """Peak of running block ``i`` for what crosses into the next one only: first pass, later pass.

        What crosses into ``i`` is counted and dies after its last use.
        """
        entering, leaving = self.crossing[i], self.crossing[i + 1]
        first = self.forward(i, i)
        fixed = self.fixed_live[first.start : first.stop].tolist()
        again = self.closure(leaving, entering)
        return (
            self.inner_peak(first, fixed, start=entering, keep=leaving),
            self.inner_peak(again, self._second_copies(again), start=entering, keep=leaving),
        )

    def _second_copies(self, steps: Iterable[int]) -> list[int]:
        return [self._second_copy[op] for op in steps]

    def _block_graph(self, a: int, b: int) -> BlockGraph:
        """Blocks ``a..b`` as the saved-set program sees them."""
        forward = self.forward(a, b)
        inner = [v for op in forward for v in self.problem.ops[op].outputs if v not in self.held]
        needed = {v for t in self.backward(a, b) for v in self.problem.counted_inputs[t]} | self._late(a, b)
        return BlockGraph.of(self.problem, forward, inner, needed, self.crossing[b + 1])


def _held_values(problem: Problem, turn: int) -> set[int]:
    """Forward values that are never dropped: final ones, those of pinned ops, and tiny ones."""
    forward = [v for op in problem.ops[:turn] for v in op.outputs]
    tiny = max((problem.values[v].bytes for v in forward), default=0) / TINY
    return {
        v
        for op in problem.ops[:turn]
        for v in op.outputs
        if problem.values[v].final or not op.recomputable or problem.values[v].bytes < tiny
    }


def check_chain(problem: Problem) -> int:
    """The turn of ``problem``; ``ProblemError`` unless there is a forward to cut and a backward."""
    turn = problem.turn
    if turn is None or turn < 2 or turn == len(problem):
        raise ProblemError(
            f"{problem.name}: a chain of blocks needs problem.turn with at least two forward ops before it "
            f"and a backward op after it; turn is {turn} of {len(problem)} ops"
        )
    return turn


def cut_into_blocks(problem: Problem, blocks: int) -> Chain:
    """``problem`` as a chain of roughly ``blocks`` blocks.

    The cuts minimise the bytes that cross them plus a quadratic penalty on uneven blocks, by dynamic
    programming over positions; at a tie a cut where ``Op.group`` changes wins.  ``blocks`` at least
    ``problem.turn`` makes every forward op a block.  Raises ``ProblemError`` if there is no turn, no
    backward, or nothing to cut.
    """
    turn = check_chain(problem)
    cut_bytes, backward_position = _price_of_cuts(problem, turn)
    starts = [0, *_choose_cuts(problem, turn, blocks, cut_bytes), turn]
    # Backward ranges must not overlap: an earlier block's begins no sooner than a later block's.
    ends = [len(problem), *(backward_position[c] for c in starts[1:-1]), turn]
    for i in range(len(ends) - 2, -1, -1):
        ends[i] = max(ends[i], ends[i + 1])
    return Chain(problem, starts, ends)


def _price_of_cuts(problem: Problem, turn: int) -> tuple[np.ndarray, list[int]]:
    """Bytes that a cut before each forward op costs, and where it cuts the backward; shapes (turn,).

    The price is what crosses in the forward plus what the backward reads across the cut in the wrong
    direction; the backward is cut where the latter is least.  At a tie: where the fewest bytes are
    alive or, of what crosses, yet to be read; then as late as possible.
    """
    n, held = len(problem), _held_values(problem, turn)
    crossing = np.zeros(turn + 1, dtype=np.int64)
    open_bytes = np.zeros(n + 1, dtype=np.int64)
    arrives: list[list[tuple[int, int, int]]] = [[] for _ in range(turn + 1)]
    passes: list[list[tuple[int, int, int]]] = [[] for _ in range(turn + 1)]
    late = np.zeros(n + 1, dtype=np.int64)
    for v, value in enumerate(problem.values):
        readers, producer = problem.consumers[v], value.producer
        if producer is None:
            continue
        if producer >= turn:
            open_bytes[producer] += value.bytes
            open_bytes[n if value.final or not readers else readers[-1]] -= value.bytes
        if producer >= turn or v in held:
            continue
        last_forward = max((r for r in readers if r < turn), default=producer)
        crossing[producer + 1] += value.bytes
        crossing[last_forward + 1] -= value.bytes
        if readers and readers[-1] >= turn:
            first_backward = next(r for r in readers if r >= turn)
            arrives[producer].append((first_backward, readers[-1], value.bytes))
            passes[last_forward].append((first_backward, readers[-1], value.bytes))
            late[readers[-1]] += value.bytes
    kept = np.concatenate(([0], np.cumsum(open_bytes)[:n]))  # kept[s]: alive just before step s
    stray, across = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    prices, positions = np.zeros(turn, dtype=np.float64), [n] * turn
    for c in range(1, turn):
        for _, last_read, m in arrives[c - 1]:
            late[last_read] -= m
            across[last_read] += m
        for first_read, last_read, m in passes[c - 1]:
            stray[first_read] += m
            across[last_read] -= m
        early = np.concatenate(([0], np.cumsum(stray)[:n]))[turn:]
        wrong = early + _from_here_on(late)[turn:]
        tie = kept[turn:] + _from_here_on(across)[turn:]
        price = wrong + tie / (1.0 + tie.max())
        s = len(price) - 1 - int(np.argmin(price[::-1]))
        positions[c] = turn + s
        prices[c] = wrong[s]
    return prices + np.cumsum(crossing)[:turn], positions


def _from_here_on(amount: np.ndarray) -> np.ndarray:
    """Suffix sums."""
    return np.cumsum(amount[::-1])[::-1]


def _choose_cuts(problem: Problem, turn: int, blocks: int, cut_bytes: np.ndarray) -> list[int]:
    """Forward positions of the cuts, ascending, without 0 and ``turn``."""
    if blocks >= turn:
        return list(range(1, turn))
    made = np.array([sum(problem.values[v].bytes for v in op.outputs) for op in problem.ops[:turn]], float)
    spent = np.array([op.again_s for op in problem.ops[:turn]], float)
    weight = np.concatenate(([0.0], np.cumsum(made / max(made.sum(), 1.0) + spent / max(spent.sum(), 1e-30))))
    price = cut_bytes.copy()
    for c in range(1, turn):
        if problem.ops[c].group == problem.ops[c - 1].group:
            price[c] *= 1.001
    # For even blocks and cuts of the usual price, the sum is least at the number of blocks asked for.
    usual = max(1.0, float(np.quantile(price[1:], 0.25)))
    penalty = usual * (blocks / weight[-1]) ** 2
    best = np.full(turn + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(turn + 1, dtype=np.int64)
    for c in range(1, turn + 1):
        total = best[:c] + penalty * (weight[c] - weight[:c]) ** 2
        previous[c] = int(np.argmin(total))
        best[c] = total[previous[c]] + (price[c] if c < turn else 0.0)
    cuts: list[int] = []
    c = int(previous[turn])
    while c > 0:
        cuts.append(c)
        c = int(previous[c])
    return cuts[::-1]
