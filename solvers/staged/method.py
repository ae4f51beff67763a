"""The staged retention program: whole joint graphs of thousands of ops in seconds.

The backward is cut into stages.  A linear program says which forward values are resident when each
stage starts and which ops run again inside it (:mod:`solvers.staged.program`); its rows of bytes are exact
for the order the stage is emitted in, and are made where a solution is over the budget.  One closure over the
whole backward is added to the program: without it, chains of half-recomputations make the relaxation so weak
that roundings are useless; with it, the rounded relaxation is often within 0.1 points of step time of the
optimum before any branching, and local search takes it from there.

No single way of cutting is best, so several cuts and windows are relaxed; every solution is rounded at
several thresholds, emitted in two orders, stripped of recomputations that nothing needs, and simulated.

Sources: the rows on retention and recomputation are those of Jain et al., "Checkmate" (MLSys 2020,
https://arxiv.org/abs/1910.02653), with stages in place of single ops, and rounding the relaxation at a
threshold is their approximation; the closure, the template and its orders are ours.

Where roundings leave much, few ops are asked for integers, and any may run again in any stage: SegNet at 20 %
above its floor is planned with 52 % of overhead so, with 70 % without (30 s, bound 32).

Optimal when the bound says so: typical for language models, where one instant, the loss, decides.
Weak close to the floor of convolutional networks with long skips, where a value must be recomputed
several times inside one stage.  Backward ops are never recomputed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from itertools import islice

from solvers.bounds.lower_bounds import time_bound
from solvers.core.facts import Facts
from solvers.core.incumbent import ENDS_AT, Incumbent
from solvers.core.just_in_time import trim
from solvers.core.problem import Problem, ProblemError
from solvers.core.solution import Solution
from solvers.search import local_search
from solvers.staged.orders import in_template_order, just_in_time
from solvers.staged.program import Choice, StagedProgram
from solvers.staged.stages import Stages, cut_after_pressure, cut_by_groups, cut_evenly

__all__ = ["Relaxations", "ops_per_layer", "solve"]

log = logging.getLogger(__name__)

RETARGETS = 4
# Up to so many backward ops the program is asked for integers too, to this gap; of so many stages, then more.
MOST_INTEGRAL, INTEGRAL_GAP, WHOLE_STAGES = 120, 0.02, (8, 24)
THRESHOLDS = (0.5, 0.3, 0.7, 0.9, 0.1)


def solve(problem: Problem, budget_bytes: int, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """Rounded relaxations of the staged program, bettered by local search.

    ``budget_bytes`` includes ``resident_bytes``.  Raises ``ProblemError`` without a turn.  When nothing
    that fits is found the solution's status is ``unsettled`` and its schedule the lowest peak found.
    """
    run = Incumbent(problem, budget_bytes, deadline=time.perf_counter() + ENDS_AT * time_limit_s)
    relaxations = Relaxations(problem)
    if not run.fits:
        relaxations.offer_plans(run, seed=seed)
        run.raise_bound(time_bound(problem, budget_bytes, time_limit_s=max(0.1, 0.15 * time_limit_s)))
        local_search.improve(run, seed=seed, layer=ops_per_layer(problem))
    return run.solution()


class Relaxations:
    """The staged programs of one problem, built once and retargeted for each budget.

    Raises ``ProblemError`` for a problem without a turn or without a backward.
    """

    def __init__(self, problem: Problem) -> None:
        layer = ops_per_layer(problem)
        if layer is None:
            raise ProblemError(f"{problem.name}: the staged program needs problem.turn and ops after it")
        self._cuts = _cuts(problem, layer)
        self._programs: list[StagedProgram] = []
        # What the slowest program took: another is not begun in less.
        self._took_s = 0.0

    def offer_plans(self, run: Incumbent, *, first: int = 0, last: int | None = None, seed: int = 0) -> None:
        """Offer ``run`` the roundings of the cuts ``first`` up to ``last``, until it is done."""
        for program in islice(self._for_budget(run.budget_bytes - run.problem.resident_bytes), first, last):
            begun = time.perf_counter()
            _relax(run, program, seed)
            self._took_s = max(self._took_s, time.perf_counter() - begun)
            if run.done or run.left_s < self._took_s:
                return

    def offer_integral(self, run: Incumbent, *, time_limit_s: float, seed: int = 0) -> None:
        """Offer ``run`` integral answers, of graphs of few ops, where any op may run again anywhere.

        Stages are cut until what each holds in any case fits the budget, and more finely where no answer is
        within it.  Takes ``time_limit_s`` seconds at most.  Nothing above ``MOST_INTEGRAL`` backward ops, or
        without a time limit: nobody knows how long an integer program takes.
        """
        deadline = time.perf_counter() + min(time_limit_s, run.left_s)
        facts = Facts.of_one_backward(run.problem)
        if not facts.decided or len(facts.backward) > MOST_INTEGRAL or math.isinf(deadline):
            return
        for count in WHOLE_STAGES:
            program = _cut_to_fit(facts, count, run.budget_bytes - run.problem.resident_bytes)
            if not _ask_for_integers(run, program, deadline, seed):
                return

    def _for_budget(self, budget_bytes: float) -> Iterator[StagedProgram]:
        for program in self._programs:
            program.retarget(budget_bytes)
            yield program
        for stages in self._cuts:
            self._programs.append(StagedProgram(stages, budget_bytes))
            yield self._programs[-1]


def _ask_for_integers(run: Incumbent, program: StagedProgram, deadline: float, seed: int) -> bool:
    """Offer integral answers, adding the rows that each exceeds; whether it is proved that none fits."""
    program.memory.add_first()
    while not run.done and (left_s := deadline - time.perf_counter()) > 0:
        # So are E and maxima where R are, and HiGHS would announce its polishing of anything else.
        program.lp.integer[:] = [True] * len(program.lp.integer)
        answer = program.lp.solve(time_limit_s=left_s, relative_gap=INTEGRAL_GAP, seed=seed)
        log.debug("%r: %r, %r", program, answer, run)
        if answer.x is None:
            return answer.infeasible
        _offer(run, program, program.choice(answer.x))
        if not program.memory.add_violated(answer.x):
            return False
    return False


def _cut_to_fit(facts: Facts, count: int, budget_bytes: float) -> StagedProgram:
    """The program of ``count`` stages, halved while what one holds whatever is chosen is too much."""
    cuts = set(cut_evenly(facts, count))
    while True:
        stages = Stages(facts, tuple(sorted(cuts)), len(facts.backward))
        program = StagedProgram(stages, budget_bytes)
        held, ends = program.memory.base, (*stages.first[1:], len(facts.problem))
        halves = {
            (start + end) // 2
            for g, (start, end) in enumerate(zip(stages.first, ends, strict=True))
            if end - start > 1 and held[program.offset[g + 1] : program.offset[g + 2]].max() > budget_bytes
        }
        if not halves:
            return program
        cuts |= halves


def ops_per_layer(problem: Problem) -> int | None:
    """Backward ops of a usual layer; ``None`` without a turn or a backward."""
    length = 0 if problem.turn is None else len(problem) - problem.turn
    if not length:
        return None
    labels = len({op.group for op in problem.ops[problem.turn :]})
    layers = min(labels, length // 10) if labels > 3 else min(24, length // 10)
    return math.ceil(length / max(2, layers))


def _cuts(problem: Problem, layer: int) -> Iterator[Stages]:
    """Ways to cut: by layers and evenly, from the narrowest window to the widest."""
    facts = Facts.of_one_backward(problem)
    if not facts.decided:
        return
    layers = round(len(facts.backward) / layer)
    grouped = cut_by_groups(facts, max(2, layer // 2))
    yield Stages(facts, grouped if len(grouped) > 3 else cut_evenly(facts, layers), 0)
    yield Stages(facts, cut_evenly(facts, layers), int(1.1 * layer))
    yield Stages(facts, cut_evenly(facts, 2 * layers), int(1.1 * layer))
    yield Stages(facts, cut_evenly(facts, layers), 3 * layer)
    cuts, wide = cut_after_pressure(facts, cut_evenly(facts, layers), layer)
    yield Stages(facts, cuts, int(1.1 * layer), (wide,))


def _relax(run: Incumbent, program: StagedProgram, seed: int) -> None:
    """Solve the relaxation and offer its roundings.

    Where the best rounding is a little over the budget, the relaxation is solved again for a budget
    lower by as much.
    """
    budget = program.budget_bytes
    for _ in range(RETARGETS):
        peak = _relax_once(run, program, seed)
        if peak is None:
            break
        over = peak - run.problem.resident_bytes - budget
        if over <= 0 or over > 0.1 * budget:
            break
        program.retarget(program.budget_bytes - over)
    log.debug("%r: %r", program, run)


def _relax_once(run: Incumbent, program: StagedProgram, seed: int) -> int | None:
    """Add rows until the relaxation needs none; the least peak of its roundings, ``None`` without any."""
    program.memory.add_first()
    x = None
    for _ in range(10):
        if run.left_s <= 0:
            return None
        answer = program.lp.solve(time_limit_s=min(run.left_s, 1e6), relax=True, seed=seed)
        if answer.x is None:
            return None
        x = answer.x
        if not program.memory.add_violated(x):
            break
    if x is None:
        return None
    choices = dict.fromkeys(program.choice(x, threshold) for threshold in THRESHOLDS)
    return min((_offer(run, program, choice) for choice in choices if run.left_s > 0), default=None)


def _offer(run: Incumbent, program: StagedProgram, choice: Choice) -> int:
    """Emit ``choice`` in both orders; returns the lower peak."""
    orders = (just_in_time, in_template_order)
    schedules = (trim(run.problem, emit(program.stages, choice)) for emit in orders)
    return min(run.offer(steps, "staged").peak_bytes for steps in schedules)
