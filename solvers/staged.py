"""The staged retention program: whole joint graphs of thousands of ops in seconds.

The backward is cut into stages.  A mixed-integer program decides which forward values are resident
when each stage starts and which ops run again inside it (``staged_program``); its memory rows are
exact for the order the stage is emitted in, and are made where a solution is over the budget.  One
closure over the whole backward is added to the program: without it, chains of half-recomputations
make the relaxation so weak that roundings are useless; with it, the rounded relaxation is often
within 0.1 points of step time of the optimum before any branching.

No single way of cutting is best, and an incumbent stopped by the clock may be far off, so a portfolio
of cuts and windows is run, every candidate is emitted in two orders, stripped of recomputations that
nothing needs, simulated, and the best that fits is returned.  The relaxations of ``bounds`` prove how
far from the best it can be, and end the search when it is close enough.

Paper: the rows on retention and recomputation are Checkmate's (Jain et al., MLSys 2020), with stages
in place of single ops; the closure row is this project's.

Optimal when the bound says so: typical for language models, where one instant, the loss, decides.
Weak close to the floor of convolutional networks with long skips, where a value must be recomputed
several times inside one stage, and on DAGs without a turn, which are split at a few points as if
what comes after were a backward.  Backward ops are never recomputed.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from solvers.bounds import peak_floor, time_bound
from solvers.problem import Problem
from solvers.schedule import Schedule
from solvers.simulate import simulate_steps
from solvers.solution import InfeasibleError, Solution, solution_of
from solvers.staged_emit import in_template_order, just_in_time, trim
from solvers.staged_program import Choice, StagedProgram
from solvers.staged_search import encode, pinned_outside
from solvers.staged_stages import Facts, Stages, cut_by_groups, cut_evenly, cut_finely

__all__ = ["minimum_peak", "solve"]

log = logging.getLogger(__name__)

# A plan this close to the bound, in units of step time, is not worth more search.
CLOSE_ENOUGH = 1e-3
MIP_GAP = 2e-4
# Seconds for one stretch of the large-neighbourhood search.
STRETCH_S = 2.0
# How many of the ways to cut are tried first; the finer ones come when those have nothing left to give.
USUAL_CUTS = 4
# The rest of the time is for large-neighbourhood search.
BRANCHING_SHARE = 0.35
# Above this many ops a stage per backward op makes programs too large to gain from.
FINE_OPS = 2000
RETARGETS = 4
THRESHOLDS = (0.5, 0.3, 0.7, 0.9, 0.1)


@dataclass
class _Search:
    """The best plan so far; every candidate goes through the simulator here."""

    problem: Problem
    budget_bytes: int
    deadline: float
    steps: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    recompute_s: float = 0.0
    bound_s: float = 0.0
    # What the last program took to build and relax: another is not begun in less.
    program_s: float = 0.0

    def __post_init__(self) -> None:
        self.offer(list(range(len(self.problem))))

    @property
    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @property
    def done(self) -> bool:
        """Close enough to the bound, or out of time."""
        slack_s = self.recompute_s + self.problem.total_seconds - self.bound_s
        return self.left_s <= 0 or (self.fits and slack_s <= CLOSE_ENOUGH * self.problem.total_seconds)

    def offer(self, steps: list[int]) -> int:
        """Take ``steps`` if they are better than what is there; returns their peak."""
        timeline = simulate_steps(self.problem, steps)
        peak, again_s = timeline.peak_bytes, timeline.recompute_seconds
        over, now_over = max(0, peak - self.budget_bytes), max(0, self.peak_bytes - self.budget_bytes)
        if not self.steps or (over, again_s, peak) < (now_over, self.recompute_s, self.peak_bytes):
            self.steps, self.peak_bytes, self.recompute_s = steps, peak, again_s
        return peak

    def offer_choice(self, stages: Stages, choice: Choice) -> int:
        """Emit ``choice`` in both orders; returns the lower peak."""
        orders = (just_in_time, in_template_order)
        return min(self.offer(trim(self.problem, emit(stages, choice))) for emit in orders)


def solve(problem: Problem, budget_bytes: int, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The fastest schedule found whose peak is within ``budget_bytes`` (``resident_bytes`` included).

    Raises ``InfeasibleError`` when :func:`solvers.bounds.peak_floor` rules the budget out.  When nothing
    that fits is found the solution's status is ``unsettled`` and its schedule the lowest peak found.
    """
    started = time.perf_counter()
    floor = peak_floor(problem)
    if floor.bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, floor.bytes, floor.op_name)
    search = _Search(problem, budget_bytes, started + 0.97 * time_limit_s)
    if not search.fits:
        portfolio = _portfolio(problem)
        _run_portfolio(search, islice(portfolio, 1), seed)
        search.bound_s = time_bound(
            problem, budget_bytes, time_limit_s=max(0.1, min(0.15 * time_limit_s, search.left_s))
        )
        for finely in (False, True)[: 2 if len(problem) <= FINE_OPS else 1]:
            _run_portfolio(search, portfolio if finely else islice(portfolio, USUAL_CUTS - 1), seed)
            if search.fits and search.left_s > search.program_s:
                _improve(search, finely, seed)
    return solution_of(
        problem,
        Schedule.of(problem, search.steps),
        budget_bytes,
        bound_seconds=min(search.bound_s, problem.total_seconds + search.recompute_s)
        if search.fits
        else None,
        solver="staged",
        solve_seconds=time.perf_counter() - started,
    )


def minimum_peak(problem: Problem, *, time_limit_s: float = 30.0, seed: int = 0) -> Solution:
    """The schedule of lowest peak found; its ``budget_bytes`` is that peak."""
    started = time.perf_counter()
    floor = peak_floor(problem).bytes
    search = _Search(problem, floor, started + 0.97 * time_limit_s)
    programs = []
    for stages in _portfolio(problem):
        if search.fits or search.left_s <= 0:
            break
        program = StagedProgram(stages, search.peak_bytes - problem.resident_bytes, minimise_peak=True)
        if _relax(search, program, seed):
            programs.append(program)
    for n, program in enumerate(programs):
        if search.fits or search.left_s <= 0.05:
            break
        _branch(search, program, search.left_s / (len(programs) - n), seed)
    return solution_of(
        problem,
        Schedule.of(problem, search.steps),
        search.peak_bytes,
        solver="staged",
        solve_seconds=time.perf_counter() - started,
    )


def _portfolio(problem: Problem) -> Iterator[Stages]:
    """Ways to cut: by layers and evenly, from the narrowest window to the widest."""
    for facts, layer in _as_training(problem):
        layers = round(len(facts.backward) / layer)
        grouped = cut_by_groups(facts, max(2, int(layer / 2)))
        for first, window in (
            (grouped if len(grouped) > 3 else cut_evenly(facts, layers), 0),
            (cut_evenly(facts, layers), int(1.1 * layer)),
            (cut_evenly(facts, 2 * layers), int(1.1 * layer)),
            (cut_evenly(facts, layers), int(3 * layer)),
            (cut_finely(facts), int(1.1 * layer)),
            (cut_finely(facts), int(3 * layer)),
            (cut_finely(facts), len(facts.backward)),
        ):
            yield Stages(facts, first, window)


def _as_training(problem: Problem) -> Iterator[tuple[Facts, float]]:
    """The facts of the problem and the backward ops per layer; without a turn, for a few turns tried."""
    n = len(problem)
    for turn in [problem.turn] if problem.turn is not None else [n // 2, n // 4, 3 * n // 4]:
        facts = Facts.of(replace(problem, turn=turn))
        length = n - turn
        if length and facts.decided:
            labels = len({problem.ops[t].group for t in facts.backward})
            layers = min(labels, length // 4) if labels > 3 else min(24, length // 8)
            yield facts, length / max(2, layers)


def _run_portfolio(search: _Search, cuts: Iterator[Stages], seed: int) -> None:
    """Every program's relaxation first, rounded; then branching, the most promising programs first."""
    ranked: list[tuple[float, StagedProgram]] = []
    while not search.done and search.left_s > search.program_s:
        begun = time.perf_counter()
        stages = next(iter(cuts), None)
        if stages is None:
            break
        program = StagedProgram(stages, search.budget_bytes - search.problem.resident_bytes)
        relaxed_s = _relax(search, program, seed)
        search.program_s = time.perf_counter() - begun
        if relaxed_s is not None:
            ranked.append((relaxed_s, program))
    # The wider a program's choice the lower its relaxation, but the harder its search: narrow ones go
    # first with a short slice, and each later one is skipped if even its relaxation cannot win.
    end = time.perf_counter() + BRANCHING_SHARE * search.left_s
    for k, (relaxed_s, program) in enumerate(ranked):
        left_s = (search.deadline if not search.fits else end) - time.perf_counter()
        if search.done or left_s <= 0:
            return
        worthwhile = relaxed_s < search.recompute_s - CLOSE_ENOUGH * search.problem.total_seconds
        if worthwhile or not search.fits:
            _branch(search, program, left_s / min(2, len(ranked) - k), seed)


def _improve(search: _Search, finely: bool, seed: int) -> None:
    """Re-optimise stretches of the best plan in finer cuts, until a round of stretches gains nothing.

    Stretches overlap by half, come in random order, and widen when a round brings nothing.
    """
    rng = random.Random(seed)
    for facts, layer in _as_training(search.problem):
        length = len(facts.backward)
        first = cut_finely(facts) if finely else cut_evenly(facts, round(2 * length / layer))
        stages = Stages(facts, first, int(3 * layer))
        program = StagedProgram(stages, search.budget_bytes - search.problem.resident_bytes)
        program.add_first_rows()
        width = max(2, round(0.4 * len(stages)))
        while width < 2 * len(stages) and not search.done:
            starts = list(range(-(width // 2), len(stages), max(1, width // 2)))
            rng.shuffle(starts)
            before = search.recompute_s
            for begin in starts:
                if search.done:
                    return
                _reoptimise(search, program, range(begin, begin + width), seed)
            if search.recompute_s >= before:
                width *= 2
        log.debug("%r: re-optimised, best %.6g s, %.2f s left", program, search.recompute_s, search.left_s)


def _reoptimise(search: _Search, program: StagedProgram, stretch: range, seed: int) -> None:
    """Solve ``stretch`` with everything else pinned to the best plan; rows are added while it helps."""
    pinned = pinned_outside(program, encode(program, search.steps), stretch)
    gap = MIP_GAP * search.problem.total_seconds / program.seconds_scale
    end = time.perf_counter() + min(STRETCH_S, search.left_s)
    for _ in range(3):
        left_s = end - time.perf_counter()
        if left_s <= 0.02:
            return
        answer = program.lp.solve(time_limit_s=0.95 * left_s, absolute_gap=gap, fixed=pinned, seed=seed)
        if answer.x is None:
            return
        search.offer_choice(program.stages, program.choice(answer.x))
        if not program.add_violated(answer.x):
            return


def _relax(search: _Search, program: StagedProgram, seed: int) -> float | None:
    """Solve the relaxation and offer its roundings; its recompute seconds, ``None`` if it has no point.

    Where the best rounding is a little over the budget, the relaxation is solved again for a budget
    lower by as much.
    """
    budget = program.budget_bytes
    relaxed_s: float | None = None
    for _ in range(RETARGETS):
        found = _relax_once(search, program, seed)
        if found is None:
            break
        objective_s, peak = found
        relaxed_s = objective_s if relaxed_s is None else relaxed_s
        over = peak - search.problem.resident_bytes - budget
        if over <= 0 or over > 0.1 * budget or program.peak is not None:
            break
        program.retarget(program.budget_bytes - over)
    program.retarget(budget)
    log.debug(
        "%r: relaxation %s s, best %.6g s, %.2f s left", program, relaxed_s, search.recompute_s, search.left_s
    )
    return relaxed_s


def _relax_once(search: _Search, program: StagedProgram, seed: int) -> tuple[float, int] | None:
    """Add rows until the relaxation needs none; its recompute seconds and its roundings' least peak."""
    program.add_first_rows()
    for _ in range(10):
        if search.left_s <= 0:
            return None
        answer = program.lp.solve(time_limit_s=min(search.left_s, 1e6), relax=True, seed=seed)
        if answer.x is None:
            return None
        x = answer.x
        if not program.add_violated(x):
            break
    choices = dict.fromkeys(program.choice(x, threshold) for threshold in THRESHOLDS)
    peaks = [search.offer_choice(program.stages, choice) for choice in choices if search.left_s > 0]
    return answer.objective * program.seconds_scale, min(peaks, default=0)


def _branch(search: _Search, program: StagedProgram, slice_s: float, seed: int) -> None:
    """Solve the integer program, adding rows while its plans are over the budget."""
    end = min(search.deadline, time.perf_counter() + slice_s)
    gap = MIP_GAP * search.problem.total_seconds / program.seconds_scale
    for _ in range(8):
        left_s = end - time.perf_counter()
        if left_s <= 0.02:
            return
        answer = program.lp.solve(time_limit_s=0.95 * left_s, absolute_gap=gap, seed=seed)
        if answer.x is None:
            log.debug("%r: %r", program, answer)
            return
        search.offer_choice(program.stages, program.choice(answer.x))
        log.debug("%r: %r, best %.6g s, %.2f s left", program, answer, search.recompute_s, search.left_s)
        if not program.add_violated(answer.x):
            return
