"""Large-neighbourhood search: open a window of the best schedule and solve it exactly.

Whatever schedule is at hand, from the chain program, a rounded relaxation or a heuristic, everything in
it is kept but a window of consecutive first runs: there every op that may be worth it gets a slot to
run again (``template``), and what is kept across the window is free too.  The cheapest schedule in that
template is a mixed-integer program of a few hundred to a few thousand columns, with a row that asks for
less than the best so far: most windows are refuted by the relaxation in milliseconds, and those that
are not often bring whole points.  Windows overlap by half and go over the schedule in random order; when
a sweep brings nothing the windows, and how long before its use a value may be made again, grow.

While nothing fits the budget the same windows, around the place where the schedule peaks, minimise the
peak instead.

Papers: Shaw, "Using constraint programming and local search methods" (1998); the program inside is
Checkmate's (Jain et al., MLSys 2020) on the slots of the template.
Optimal: when a window spans the whole schedule and is solved to the end, within its template.
Weakness: what needs two distant places to change at once is found only when one window spans both.
"""

from __future__ import annotations

import logging
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from solvers.core.incumbent import Incumbent
from solvers.core.just_in_time import trim
from solvers.core.problem import Problem
from solvers.core.simulate import Timeline
from solvers.search.template import Template, template_around
from solvers.search.template_program import TemplateProgram

__all__ = ["Search", "Window", "improve"]

log = logging.getLogger(__name__)

# Where a constant's comment gives no figure it was chosen by trial on the graphs of tests/benchmarks.

# What an improvement must bring, as a share of the time without recomputation.
LEAST_GAIN = 2e-5
# One window is given up after this many seconds, or, without a time limit, this many nodes.
WINDOW_S = 2.0
WINDOW_NODES = 400
ROUNDS = 8
# A window that has to fit is worth more, since what is alike is mended with it.
FITTING_S = 5.0
# And is off the best by so much of a step at most: there are others.
FITTING_GAP = 2e-4
# What a window must take off the most bytes above the budget in it, as a share of the budget.
LEAST_FALL = 1e-4
# Windows with more optional slots than this are cut into fewer stages.
MOST_SLOTS = 2500
CLOSURES = 6
# Up to this many ops without a turn, whole chains may run again in a window; with more it opens too much.
CHAIN_OPS = 100
# How many recomputations of the schedule, in and around a window, it may leave out.
NEAR_SLOTS = 300
# Where windows of a layer are too hard they are halved down to this many first runs, and those that lower a
# peak begin no wider than that many.
NARROWEST, WIDEST_OVER = 4, 16
# So do those where the gap is a larger share of the step: near the floor wide ones are given up.
HARD_GAP = 0.02
# Once this share of a sweep's windows is given up, wider ones are not tried; a sweep that begins with so many
# and gains nothing is left.
GIVE_UP = 0.6
HOPELESS = 4


@dataclass(frozen=True)
class Window:
    """First runs ``begin`` up to ``end`` are opened; what is read up to ``ahead`` ops later may be made.

    What the schedule recomputes there and around, up to ``NEAR_SLOTS`` steps, may be left out.
    """

    begin: int
    end: int
    ahead: int


class Reach:
    """For each op, the ops that a recomputation of it can serve: ``targets``, ascending.

    With a turn, those are backward ops: its readers, or those of its readers if it has none there.
    Without one, those are its readers, and in graphs of up to ``CHAIN_OPS`` ops those of its readers too.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, turn = len(problem), problem.turn or 0
        self.first = turn
        chains = problem.turn is None and n <= CHAIN_OPS
        self.targets: list[list[int]] = [[] for _ in range(n)]
        for i in range(n - 1, -1, -1):
            op = problem.ops[i]
            if not op.recomputable:
                continue
            direct: set[int] = set()
            later: set[int] = set()
            for v in op.outputs:
                if problem.values[v].final:
                    continue
                for c in problem.consumers[v]:
                    if c >= turn:
                        direct.add(c)
                    if c < turn or chains:
                        later.update(self.targets[c])
            self.targets[i] = sorted(direct | later if chains else direct or later)

    def allowed(self, begin: int, end: int, ahead: int) -> set[int]:
        """Ops that may run again among first runs ``begin`` up to ``end``."""
        out = set()
        for i in range(end):
            targets = self.targets[i]
            k = bisect_left(targets, max(begin, i + 1))
            if k < len(targets) and targets[k] < end + ahead:
                out.add(i)
        return out


def window_template(problem: Problem, reach: Reach, steps: list[int], window: Window) -> Template:
    """The template that opens ``window`` of ``steps``, in stages as fine as ``MOST_SLOTS`` allows."""
    begin, end = max(window.begin, reach.first), min(window.end, len(problem))
    cuts = [
        t for t in range(begin, end) if t == begin or any(reach.targets[p] for p in _producers(problem, t))
    ]
    low, high = _around(steps, begin, end)
    while True:
        first = sorted({0, low, *cuts, end, high} - {len(problem)})
        ends = [*first[1:], len(problem)]
        allowed = [
            reach.allowed(a, b, window.ahead) if begin <= a < end else frozenset[int]()
            for a, b in zip(first, ends, strict=True)
        ]
        opened = {g for g, a in enumerate(first) if low <= a < high}
        template = template_around(problem, steps, first, allowed, opened)
        if len(template) - len(steps) <= MOST_SLOTS or len(cuts) <= 4:
            return template
        cuts = cuts[::2]


def _around(steps: list[int], begin: int, end: int) -> tuple[int, int]:
    """First runs from before ``begin`` to after ``end`` with about ``NEAR_SLOTS`` recomputations between."""
    pending = 0
    where: list[int] = []
    for i in steps:
        if i == pending:
            pending += 1
        else:
            where.append(pending)
    distance = sorted(max(begin - t, t - end + 1, 0) for t in where)
    radius = distance[NEAR_SLOTS] if len(distance) > NEAR_SLOTS else pending
    return max(0, begin - radius), min(pending, end + radius)


def _producers(problem: Problem, t: int) -> Iterator[int]:
    for v in problem.counted_inputs[t]:
        p = problem.values[v].producer
        if p is not None and p < t:
            yield p


@dataclass(frozen=True)
class Outcome:
    """``found``: schedules, each better than the one before; ``settled``: the window holds no more."""

    found: tuple[tuple[int, ...], ...]
    settled: bool


class Search:
    """What the windows of one search share."""

    def __init__(self, run: Incumbent, seed: int) -> None:
        self.run = run
        self.problem = run.problem
        self.reach = Reach(run.problem)
        self.rng = random.Random(seed)
        # Without a time limit windows are given up by nodes, so that the same seed gives the same answer.
        self.window_s = WINDOW_S if run.deadline < math.inf else math.inf
        self.fitting_s = FITTING_S if run.deadline < math.inf else math.inf
        self.nodes = WINDOW_NODES if run.deadline == math.inf else None

    def sweep(self, width: int, ahead: int, workers: Callable[[], int]) -> tuple[bool, float]:
        """Solve all windows of a width; whether that brought something, and the share given up.

        Windows are solved in batches, each from the same schedule; one that found something which another
        of its batch outdid is solved again.
        """
        run, fits = self.run, self.run.fits
        windows = self.windows(width, ahead)[::-1]
        gained, solved, given_up = False, 0, 0
        with ThreadPoolExecutor(2) as pool:
            while windows and not run.done and run.fits == fits:
                if given_up >= HOPELESS and not gained and given_up > GIVE_UP * solved:
                    break
                batch = [windows.pop() for _ in range(min(len(windows), workers()))]
                start = run.best
                tasks = [
                    pool.submit(self.solve_window, window, start.steps, start.line, self.rng.randrange(2**30))
                    for window in batch
                ]
                for window, outcome in zip(batch, [task.result() for task in tasks], strict=True):
                    taken = [run.offer(steps, "local search").taken for steps in outcome.found]
                    gained |= any(taken)
                    if outcome.found and not taken[-1] and run.best is not start:
                        windows.append(window)
                    solved += 1
                    given_up += not (outcome.settled or outcome.found)
        log.debug("width %d, %d ahead: %d solved, %d given up; %r", width, ahead, solved, given_up, run)
        return gained, given_up / max(1, solved)

    def windows(self, width: int, ahead: int) -> list[Window]:
        """Windows of ``width`` first runs, overlapping by half, in random order."""
        first, n = self.reach.first, len(self.problem)
        if self.run.fits:
            begins = list(range(first - width // 2, n, max(1, width // 2)))
            self.rng.shuffle(begins)
        else:
            over = first_runs_over(self.run)
            shares = (0.5, 0.9, 0.1, 0.7, 0.3)
            begins = [self.rng.choice(over) - round(width * share) for share in shares]
        spans = ((max(first, b), min(n, b + width)) for b in begins)
        return [Window(a, b, ahead) for a, b in dict.fromkeys(spans) if b > a]

    def solve_window(self, window: Window, steps: list[int], line: Timeline, seed: int) -> Outcome:
        """The cheapest schedules found that differ from ``steps`` in ``window``; ``line`` is its timeline."""
        run, resident = self.run, self.problem.resident_bytes
        template = window_template(self.problem, self.reach, steps, window)
        closures = _closures(template)
        if line.peak_bytes <= run.budget_bytes:
            program = TemplateProgram(template, run.budget_bytes - resident, closures=closures)
            program.below(line.recompute_seconds - LEAST_GAIN * run.total_s)
        else:
            # Nothing may get worse outside the window; inside, the most bytes above the budget count.
            limit = np.full(len(template), run.budget_bytes - resident)
            np.maximum.at(limit, np.asarray(template.of_step), line.live_bytes - resident)
            inside = _slots_of(template, window)
            over = int(limit[inside.start : inside.stop].max()) + resident - run.budget_bytes
            limit[inside.start : inside.stop] = run.budget_bytes - resident
            program = TemplateProgram(template, limit, closures=closures, over=inside)
            program.over_below(over - min(over, max(1, LEAST_FALL * run.budget_bytes)))
        return self._solve(program, seed)

    def fitting(
        self,
        window: Window,
        steps: list[int],
        line: Timeline,
        waiting: Sequence[tuple[int, float]],
        deadline: float,
    ) -> tuple[list[int], list[int]] | None:
        """The cheapest schedule found that is within the budget in ``window``, above it outside at most where
        and as far as ``steps`` are, and which of ``waiting`` it does without there; ``None`` without any.

        ``line``     the timeline of ``steps``.
        ``waiting``  values that are there all through the window, untouched, and the seconds that it takes to
                     make each again behind it.
        ``deadline`` of ``time.perf_counter()``.
        """
        resident, budget = self.problem.resident_bytes, self.run.budget_bytes
        template = window_template(self.problem, self.reach, steps, window)
        limit = np.full(len(template), budget - resident)
        np.maximum.at(limit, np.asarray(template.of_step), line.live_bytes - resident)
        inside = _slots_of(template, window)
        limit[inside.start : inside.stop] = budget - resident
        program = TemplateProgram(template, limit, closures=_closures(template))
        gone = {v: program.without(v, inside, seconds) for v, seconds in waiting}
        lp, end = program.lp, min(deadline, time.perf_counter() + min(self.fitting_s, self.run.left_s))
        gap = FITTING_GAP * self.run.total_s / program.seconds_scale
        program.memory.add_first()
        relax = True
        while (left_s := end - time.perf_counter()) > 0.02:
            answer = lp.solve(
                time_limit_s=left_s,
                relax=relax,
                absolute_gap=None if relax else gap,
                node_limit=None if relax else self.nodes,
            )
            if answer.x is None:
                return None
            if not program.memory.add_violated(answer.x):
                if not relax:
                    dropped = [v for v, column in gone.items() if answer.x[column] > 0.5]
                    return trim(self.problem, program.steps(answer.x)), dropped
                relax = False
        return None

    def _solve(self, program: TemplateProgram, seed: int) -> Outcome:
        run, lp = self.run, program.lp
        end = time.perf_counter() + min(self.window_s, run.left_s)
        gap = LEAST_GAIN * run.total_s / program.seconds_scale if program.over is None else 1e-4
        program.memory.add_first()
        relax = True
        found: list[tuple[int, ...]] = []
        for _ in range(ROUNDS):
            left_s = end - time.perf_counter()
            if left_s <= 0.02:
                break
            answer = lp.solve(
                time_limit_s=left_s,
                relax=relax,
                absolute_gap=None if relax else gap,
                node_limit=None if relax else self.nodes,
                seed=seed,
            )
            if answer.x is None:
                return Outcome(tuple(found), answer.infeasible)
            if not relax:
                found.append(tuple(trim(self.problem, program.steps(answer.x))))
            if not program.memory.add_violated(answer.x):
                if not relax:
                    return Outcome(tuple(found), answer.optimal)
                relax = False
        return Outcome(tuple(found), False)


def _closures(template: Template) -> list[int]:
    """The stages at whose start closure rows are worth their columns."""
    stages = [g for g, (a, b) in enumerate(zip(template.starts, template.ends, strict=True)) if b > a]
    return stages[1 :: max(1, len(stages) // CLOSURES)]


def _slots_of(template: Template, window: Window) -> range:
    """The slots from the first stage that ``window`` opens to its last first run."""
    begin = template.slots.index(window.begin - 1) + 1 if window.begin else 0
    return range(begin, template.slots.index(window.end - 1) + 1)


def first_runs_over(run: Incumbent) -> list[int]:
    """The first runs during which, or on the way to which, the best schedule is over the budget."""
    seen = np.zeros(len(run.problem), dtype=bool)
    pending = 0
    out: dict[int, None] = {}
    best = run.best
    for i, live in zip(best.steps, best.line.live_bytes.tolist(), strict=True):
        if live > run.budget_bytes:
            out[min(pending, len(seen) - 1)] = None
        if not seen[i]:
            seen[i] = True
            pending += 1
    return list(out)


def improve(
    run: Incumbent,
    *,
    seed: int = 0,
    workers: Callable[[], int] = lambda: 2,
    layer: int | None = None,
    until_fits: bool = False,
) -> None:
    """Better the best schedule of ``run`` until no window brings anything, or ``run`` is done.

    ``workers``     how many windows to solve at a time, asked before each batch.
    ``layer``       ops that make up a layer of the backward: the scale that windows start from.
    ``until_fits``  stop once the best schedule is within the budget.
    """
    search = Search(run, seed)
    n = len(run.problem) - search.reach.first
    if n <= 0:
        return
    scale = max(4, min(n, layer or max(8, n // 24)))
    while not run.done and not (until_fits and run.fits):
        fits = run.fits
        hard = not fits or run.gap_s > HARD_GAP * run.total_s
        scale = min(scale, WIDEST_OVER) if hard else scale
        outcome = _all_sizes(search, scale, workers)
        if outcome == "given up" and scale > NARROWEST:
            scale = max(NARROWEST, scale // 2)
        elif outcome != "gained" and run.fits == fits:
            return


def _all_sizes(
    search: Search, scale: int, workers: Callable[[], int]
) -> Literal["gained", "nothing", "given up"]:
    """Sweep with windows from ``scale`` up, as long as each size brings something, then the next larger.

    ``given up`` says that already the smallest windows were too hard to settle.
    """
    run, n = search.run, len(search.problem) - search.reach.first
    sizes = [(w, a) for w in _doubled(scale, n) for a in sorted({min(n, w), min(n, 3 * scale), n})]
    sizes.sort(key=lambda size: (size[0] * math.sqrt(size[1]), size))
    too_hard: list[tuple[int, int]] = []
    any_gained, fits = False, run.fits
    for width, ahead in sizes:
        if any(width >= w and ahead >= a for w, a in too_hard):
            continue
        gained, given_up = True, 0.0
        while gained and not run.done and run.fits == fits:
            gained, given_up = search.sweep(width, ahead, workers)
            any_gained |= gained
        if run.done or run.fits != fits:
            return "gained"
        if given_up > GIVE_UP:
            too_hard.append((width, ahead))
            if (width, ahead) == sizes[0]:
                return "gained" if any_gained else "given up"
    return "gained" if any_gained else "nothing"


def _doubled(least: int, most: int) -> list[int]:
    out = [min(least, most)]
    while out[-1] < most:
        out.append(min(most, 2 * out[-1]))
    return out
