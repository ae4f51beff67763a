"""Which methods to ask, in which order, and what they share.

No method is best everywhere, so plans flow from one to the next through the :class:`Incumbent`: first
the baselines that cost nothing, then the rounded relaxations of the staged program, which at generous
budgets are all but optimal, then the chain program where these leave a gap or find nothing, then mending
and shaving, which lower the schedules that are a little above the budget, and then local search, from
whichever plan is best, or from each method's where that is far from the bound.  The bound is proved on the
other core meanwhile, offers the schedules it meets, and ends the search when it is close, or when nothing
can fit.  Graphs of a few dozen ops go to the exact program first, graphs without a turn to ``retention``.

Weakness: greedy takes seconds on thousands of ops and there comes last, so that a time limit may leave an
answer worse than greedy's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

from solvers.bounds import lower_bounds as bounds
from solvers.bounds.pebbling import raised_floors
from solvers.bounds.refine import Refinement, pressure_instants, refine
from solvers.chain.method import Chains
from solvers.core.incumbent import OVER_POWER, Incumbent, Offer
from solvers.core.problem import Problem
from solvers.core.schedule import Schedule
from solvers.core.solution import InfeasibleError
from solvers.exact import method as checkmate
from solvers.methods import METHODS, Method, has_backward
from solvers.retention import method as retention
from solvers.search import local_search
from solvers.search.mend import mend
from solvers.search.repeats import Repeats
from solvers.search.shave import shave
from solvers.staged.method import Relaxations, ops_per_layer

__all__ = ["EXACT_OPS", "Methods"]

log = logging.getLogger(__name__)

# Where a constant's comment gives no figure it was chosen by trial on the graphs of tests/benchmarks.

# Up to this many ops the exact method is asked: on training chains of 37 ops it proves the optimum in 0.2 to
# 3 s for budgets away from the floor, and nearer to it still has the better bound.
EXACT_OPS = 40
# Up to this many ops no other is.
ALONE_OPS = 16
EXACT_SHARE = 0.5
# The baselines that take milliseconds on thousands of ops.
CHEAPEST = ("every_block", "sqrt", "recompute_all")
# The chain program is asked where the staged program leaves a gap of this share of the step, or no plan.
CHAIN_GAP = 0.003
# So many cuts of the staged program come before it.
FIRST_CUTS = 2
# Greedy, which takes seconds on thousands of ops, where they all do.
GREEDY_GAP = 1e-3
# Above this many ops it comes last, unless nothing that is worth bettering fits yet.
GREEDY_OPS = 2000
CHAIN_SHARE = 0.4
# Where they leave more than ``RESTART_GAP``, the staged program of few ops is asked for integers.
INTEGRAL_SHARE = 0.3
# Of what they leave, schedules a little above the budget are lowered to it for this share, the nearest
# two and so many of the others.
SHAVE_SHARE, MOST_SHAVED = 0.5, 4
# So many of them, from the nearest to the fastest, are mended: before that for the larger share, or behind it
# for the smaller one, where few layers are alike and every place takes a window of its own.
MEND_SHARE, MEND_SHARE_APART, MOST_MENDED = 0.5, 0.2, 4
# The nearest is shaved for so long before any is mended, while nothing fits.
FIRST_SHAVE_SHARE = 0.2
# Layers are alike where so large a share of the backward is met as often as this.
ALIKE_SHARE, ALIKE_TIMES = 0.5, 8
BOUND_SHARE = 0.8
RETENTION_SHARE = 0.8
# Budgets up to so many times the cheap floor may be below a proved one; the time to look for that.
MAY_REFUSE, REFUSE_S, REFUSE_SHARE = 1.4, 2.0, 0.2
# Share of the time for the least peak that goes to proving how low it can be.
FLOOR_SHARE = 0.5
# Where local search starts from several schedules: a gap above this share of the step; at most so many; none
# that exceeds the budget by more than this share of it, less if something fits, and then none that recomputes
# for so much longer.
RESTART_GAP = 0.05
MOST_STARTS = 4
FAR_OVER, NEAR_OVER = 0.5, 0.1
FAR_SLOWER = 1.5
# Share of the time left that each start gets.
START_SHARE = 0.5
# By how much each target of the search for the least peak is below what is known, at first and at last.
FIRST_STEP, LAST_STEP = 0.02, 5e-4
# A least peak this close to the proved floor, as a share of it, is not looked for any further: whoever asks
# for less than the floor hears of both, and waits for neither.
NEAR_FLOOR = 1e-3


class Programs:
    """What the methods of one problem build, each when it is first asked for; of one search at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @cached_property
    def relaxations(self) -> Relaxations:
        """The staged programs."""
        return Relaxations(self.problem)

    @cached_property
    def chains(self) -> Chains:
        """The chain's tables."""
        return Chains(self.problem)


class Methods:
    """The methods for one problem; what they build and prove of every budget is kept for the next one.

    ``floor``  the highest floor of the peak that any search has proved.

    A search takes the programs and gives them back when it ends.  One that is left behind when its time is
    up still works on them, so the next search has programs of its own.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layer = ops_per_layer(problem)
        self.floor = bounds.peak_floor(problem)
        self._lock = threading.Lock()
        self._kept: Programs | None = None

    @contextmanager
    def _programs(self) -> Iterator[Programs]:
        """Programs that no other search works on; not given back by a search that fails."""
        with self._lock:
            taken, self._kept = self._kept or Programs(self.problem), None
        yield taken
        with self._lock:
            self._kept = taken

    def raise_floor(self, floor_bytes: int, op_name: str | None = None) -> None:
        """``floor_bytes``: proved of every schedule's peak, because of an op (``None``: as before)."""
        with self._lock:
            if floor_bytes > self.floor.bytes:
                self.floor = bounds.PeakFloor(floor_bytes, op_name or self.floor.op_name)

    @property
    def splits(self) -> bool:
        """Whether the problem has a forward of two ops at least and a backward."""
        return has_backward(self.problem)

    def search(self, run: Incumbent, seed: int = 0) -> None:
        """Better ``run`` by every method that suits but the cheapest, until it is done."""
        self._search(run, seed)
        for method in METHODS.values():
            if method.share and method.suits(self.problem) and not run.done:
                self._ask(method, run, method.share, seed)

    def _ask(self, method: Method, run: Incumbent, share: float, seed: int) -> None:
        """Offer ``run`` what a method finds by itself in a share of the time left, and what it proves."""
        try:
            found = method.run(self.problem, run.budget_bytes, _limit_s(run, share), seed)
        except InfeasibleError as error:
            self.raise_floor(error.floor_bytes, error.op_name)
            run.refuse()
            return
        self.raise_floor(found.floor_bytes)
        run.offer(found.schedule.steps(self.problem), method.name)
        run.raise_bound(found.bound_seconds)

    def _search(self, run: Incumbent, seed: int) -> None:
        if len(self.problem) <= EXACT_OPS:
            run.enough_s = 0.0
            self._ask(METHODS["exact"], run, EXACT_SHARE, seed)
            if run.done or len(self.problem) <= ALONE_OPS:
                return
        if self.problem.turn is None:
            self._retention(run, seed)
        if run.done:
            return
        with ThreadPoolExecutor(1) as pool:
            bound = pool.submit(self._bound, run)
            if run.deadline == math.inf:
                bound.result()
            with self._programs() as programs:
                self.offer_plans(run, programs, seed)
            self._search_locally(run, bound, seed)
            self._offer_greedy(run)
            bound.result()

    def _search_locally(self, run: Incumbent, bound: Future[None], seed: int) -> None:
        """Local search from the best schedule; where that is far from the bound, from each method's first.

        A schedule that barely fits by recomputing everything is a poor start, however near the budget.
        """

        def improve(one: Incumbent) -> None:
            local_search.improve(one, seed=seed, workers=lambda: _free_cores(bound), layer=self.layer)

        if not run.fits or run.gap_s > RESTART_GAP * run.total_s:
            starts = _worth_starting_from(run)
            for start in starts:
                child = run.fork(start.steps, START_SHARE)
                improve(child)
                log.debug("from %s: %r", start.solver, child)
                run.offer(child.best.steps, "local search")
                run.offer(child.lowest.steps, "local search")
        improve(run)

    def offer_cheapest(self, run: Incumbent) -> None:
        """Offer what takes milliseconds on thousands of ops, whether there is time left or not."""
        self.offer_baselines(run, *CHEAPEST)

    def offer_baselines(self, run: Incumbent, *names: str) -> None:
        """What the methods called ``names`` answer at once, where they suit the problem."""
        for method in map(METHODS.__getitem__, names):
            if method.plan is not None and not (run.stopped or run.settled) and method.suits(self.problem):
                schedule = method.plan(self.problem, run.budget_bytes)
                run.offer(schedule.steps(self.problem), method.name)

    def offer_plans(self, run: Incumbent, programs: Programs, seed: int) -> None:
        """Plans to start from, the cheapest to make first."""
        if self.splits:
            programs.relaxations.offer_plans(run, last=1, seed=seed)
            if run.fits and run.recompute_s <= run.total_s:
                programs.relaxations.offer_plans(run, first=1, last=FIRST_CUTS, seed=seed)
            if not run.done and (not run.fits or run.gap_s > CHAIN_GAP * run.total_s):
                programs.chains.offer_plans(run, time_limit_s=CHAIN_SHARE * run.left_s, seed=seed)
            if not run.done and (not run.fits or run.gap_s > RESTART_GAP * run.total_s):
                programs.relaxations.offer_integral(run, time_limit_s=INTEGRAL_SHARE * run.left_s, seed=seed)
            self._lower(run, seed)
            # Relaxations that are far from a plan are the slowest to solve.
            if not run.done and run.fits and run.gap_s <= RESTART_GAP * run.total_s:
                programs.relaxations.offer_plans(run, first=FIRST_CUTS, seed=seed)
        if len(self.problem) <= GREEDY_OPS or not run.fits or run.recompute_s > run.total_s:
            self._offer_greedy(run)

    def _lower(self, run: Incumbent, seed: int) -> None:
        """Mend and shave what is above the budget; where layers are alike mending is for all of them."""
        near = [one for one in run.near if one.recompute_s <= run.total_s]
        if Repeats(self.problem).share(ALIKE_TIMES) >= ALIKE_SHARE:
            if not run.fits:  # some plan is worth most
                self._shave(run, FIRST_SHAVE_SHARE, most=1)
            self._mend(run, near, MEND_SHARE, seed)
            self._shave(run, SHAVE_SHARE)
        else:
            self._shave(run, SHAVE_SHARE)
            self._mend(run, near, MEND_SHARE_APART, seed)

    def _mend(self, run: Incumbent, near: Sequence[Offer], share: float, seed: int) -> None:
        """Make plans of ``near``, schedules above the budget, that would be faster than the best plan."""
        deadline = time.perf_counter() + share * run.left_s
        for k in _spread_out(len(near), MOST_MENDED):
            hard = not run.fits or run.gap_s > CHAIN_GAP * run.total_s
            if run.done or time.perf_counter() >= deadline or not hard:
                return
            if not run.fits or near[k].recompute_s < run.recompute_s:
                mended = mend(run, near[k].steps, deadline=deadline, seed=seed, layer=self.layer)
                # A place or two may be left, for which a few drops do.
                shave(run, mended, deadline=time.perf_counter() + FIRST_SHAVE_SHARE * run.left_s)

    def _shave(self, run: Incumbent, share: float, *, most: int | None = None) -> None:
        """Make plans of the schedules that are a little above the budget, and faster than the best plan.

        In a ``share`` of the time left; from ``most`` of them (``None``: the nearest two and some others).
        """
        deadline = time.perf_counter() + share * run.left_s
        # Moves on what recomputes everything, which may be near too, take seconds each.
        known = run.near
        near = [one for one in known if one.recompute_s <= run.total_s] or known
        first, rest = near[:2], near[2:]
        starts = [*first, *rest[:: max(1, -(-len(rest) // MOST_SHAVED))]]
        if not starts and not run.fits:
            starts = [run.best.offer]
        starts = starts[:most]
        for k, start in enumerate(starts):
            left_s = deadline - time.perf_counter()
            if run.done or left_s <= 0 or (run.fits and run.gap_s <= GREEDY_GAP * run.total_s):
                return
            if not run.fits or start.recompute_s < run.recompute_s:
                each_s = left_s / (len(starts) - k)
                shave(run, start.steps, deadline=time.perf_counter() + max(each_s, left_s / 2))

    def _offer_greedy(self, run: Incumbent) -> None:
        if run.left_s > 0 and (not run.fits or run.gap_s > GREEDY_GAP * run.total_s):
            self.offer_baselines(run, "greedy")

    def _retention(self, run: Incumbent, seed: int) -> None:
        """The method for graphs without a turn, from greedy's schedule; it uses both cores itself."""
        self.offer_baselines(run, "greedy")
        if run.done:
            return
        found = retention.solve(
            self.problem,
            run.budget_bytes,
            time_limit_s=_limit_s(run, RETENTION_SHARE),
            seed=seed,
            hint=Schedule.of(self.problem, run.best.steps),
        )
        run.offer(found.schedule.steps(self.problem), "retention")
        run.raise_bound(found.bound_seconds)

    def _bound(self, run: Incumbent) -> None:
        """Prove what can be proved; the schedules that are met on the way are offered too."""
        problem, total_s = self.problem, run.total_s
        self._refuse(run)
        if run.done:
            return

        def tell(found: Refinement) -> bool:
            if math.isinf(found.bound):
                self.raise_floor(run.budget_bytes + 1, problem.ops[found.tightest].name)
            run.raise_bound(total_s + found.bound)
            for steps in (found.steps, found.lowest[0]):
                if steps is not None:
                    run.offer(steps, "instants")
            return run.done

        refine(
            problem,
            run.budget_bytes,
            pressure_instants(problem, 1),
            time_limit_s=_limit_s(run, BOUND_SHARE),
            close=run.enough_s,
            on_round=tell,
        )

    def _refuse(self, run: Incumbent) -> None:
        """Prove quickly that nothing fits, where that may be."""
        resident, budget = self.problem.resident_bytes, run.budget_bytes
        floor = self.floor.bytes
        if run.fits or budget - resident > MAY_REFUSE * (floor - resident):
            return
        now = time.perf_counter()
        deadline = math.inf if run.deadline == math.inf else now + min(REFUSE_S, REFUSE_SHARE * run.left_s)
        for found in raised_floors(self.problem, deadline=deadline):
            self.raise_floor(found.bytes, self.problem.ops[found.op].name)
            if found.bytes > budget:
                run.refuse()
            if run.done or run.fits:
                return

    def lower(self, run: Incumbent, seed: int = 0) -> None:
        """Lower the least peak that ``run`` knows, whatever its budget, and raise ``floor`` towards it.

        The floor is proved on one core while the other searches; the schedules that either meets serve both.
        """
        problem = self.problem
        for method in METHODS.values():
            quick = method.name != "greedy" or len(problem) <= GREEDY_OPS
            if quick and method.plan is not None and method.suits(problem) and self._open(run):
                run.offer(method.plan(problem, self.floor.bytes).steps(problem), method.name)
        if len(problem) <= EXACT_OPS and self._open(run):
            hint = Schedule.of(problem, run.lowest.steps)
            limit_s = _limit_s(run, EXACT_SHARE)
            found, proved = checkmate.minimum_peak(problem, time_limit_s=limit_s, seed=seed, hint=hint)
            run.offer(found.steps(problem), "exact")
            self.raise_floor(proved)
        with ThreadPoolExecutor(1) as pool:
            proof = pool.submit(self._prove_floor, run)
            if run.deadline == math.inf:
                proof.result()
            near = Incumbent(problem, self.floor.bytes, deadline=run.deadline)
            if self.splits and self._far(run):
                with self._programs() as programs:
                    programs.chains.offer_plans(near, time_limit_s=CHAIN_SHARE * run.left_s, seed=seed)
                self._shave(near, SHAVE_SHARE)
                run.offer(near.lowest.steps, near.lowest.solver)
            # The schedule of lowest peak may be one that recomputes everything, from which nothing leads on.
            start, share = near.best.offer, FIRST_STEP
            while share > LAST_STEP and self._far(run):
                least = run.lowest.peak_bytes
                step = max(1, math.floor(share * (least - problem.resident_bytes)))
                lower = Incumbent(problem, max(self.floor.bytes, least - step), deadline=run.deadline)
                for known in (start, run.lowest):
                    lower.offer(known.steps, known.solver)
                shave(lower, lower.best.steps, deadline=time.perf_counter() + SHAVE_SHARE * run.left_s)
                local_search.improve(
                    lower, seed=seed, workers=lambda: _free_cores(proof), layer=self.layer, until_fits=True
                )
                run.offer(lower.lowest.steps, lower.lowest.solver)
                start = lower.best.offer
                if not lower.fits:
                    share /= 2
                log.debug("%s: least peak %d, %s", problem.name, run.lowest.peak_bytes, self.floor)
            proof.result()

    def _open(self, run: Incumbent) -> bool:
        """Whether the least peak that ``run`` knows may be lowered, and there is time."""
        return run.left_s > 0 and run.lowest.peak_bytes > self.floor.bytes

    def _far(self, run: Incumbent) -> bool:
        """Whether that is worth its time."""
        return self._open(run) and run.lowest.peak_bytes > (1 + NEAR_FLOOR) * self.floor.bytes

    def _prove_floor(self, run: Incumbent) -> None:
        """Raise the floor for a share of the time, and offer the schedules met on the way."""

        def tell(floor: bounds.PeakFloor, steps: list[int] | None) -> bool:
            self.raise_floor(floor.bytes, floor.op_name)
            if steps is not None:
                run.offer(steps, "instants")
            return not self._far(run)

        if self._far(run):
            bounds.proved_floor(
                run.problem,
                time_limit_s=_limit_s(run, FLOOR_SHARE),
                least_bytes=run.lowest.peak_bytes,
                on_round=tell,
            )


def _worth_starting_from(run: Incumbent) -> list[Offer]:
    """Each method's best, the fastest first: a fast one a little over the budget is a good start."""
    fits, known_s = run.fits, run.recompute_s
    chosen = []
    for start in run.starts.values():
        if not start.over:
            worth = start.recompute_s <= FAR_SLOWER * known_s
        else:
            near = start.over <= (NEAR_OVER if fits else FAR_OVER) ** OVER_POWER
            worth = near and (not fits or start.recompute_s < known_s)
        if worth:
            chosen.append(start)
    return sorted(chosen, key=lambda start: (start.recompute_s, start.solver))[:MOST_STARTS]


def _spread_out(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places: the first, then others evenly apart."""
    return sorted({k * count // most for k in range(most)} & set(range(count)))


def _limit_s(run: Incumbent, share: float) -> float:
    return max(0.1, min(share * run.left_s, 1e6))


def _free_cores(bound: Future[None]) -> int:
    return 2 if bound.done() else 1
