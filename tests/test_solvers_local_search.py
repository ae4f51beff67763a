"""Templates, their programs against all sub-sequences, and the search that opens windows of a schedule."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import Op, Problem, Schedule, Value, simulate
from solvers.core.incumbent import OVER_POWER, Incumbent
from solvers.core.just_in_time import trim
from solvers.core.simulate import simulate_steps
from solvers.search import local_search
from solvers.search.template import Template, template_around
from solvers.search.template_program import TemplateProgram
from solvers.staged import method as staged
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, from_seeds, random_problem, tense_problem, training_chain

MOST_OPTIONAL = 7
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """A template around ``steps`` with few optional slots."""

    problem: Problem
    steps: list[int]
    template: Template

    @property
    def optional(self) -> list[int]:
        return [s for s, required in enumerate(self.template.required) if not required]

    def sub_sequence(self, used: set[int]) -> list[int]:
        slots = zip(self.template.slots, self.template.required, strict=True)
        return [i for s, (i, required) in enumerate(slots) if required or s in used]

    def choices(self) -> list[set[int]]:
        """Every choice of optional slots."""
        rows = product((False, True), repeat=len(self.optional))
        return [{s for s, taken in zip(self.optional, row, strict=True) if taken} for row in rows]

    def runs_in_vain(self, used: set[int]) -> bool:
        """Whether some optional slot in use makes nothing that is read."""
        line = simulate_steps(self.problem, self.sub_sequence(used))
        slots = [s for s, required in enumerate(self.template.required) if required or s in used]
        made = [self.problem.ops[self.template.slots[s]].outputs for s in slots]
        return any(
            s in used and all(self.problem.values[v].final or v in frees for v in outputs)
            for s, outputs, frees in zip(slots, made, line.frees, strict=True)
        )

    def sensible_choices(self, rng: random.Random, most: int) -> list[set[int]]:
        """At most ``most`` choices without runs in vain."""
        choices = [used for used in self.choices() if not self.runs_in_vain(used)]
        return rng.sample(choices, min(most, len(choices)))


def random_case(rng: random.Random) -> Case:
    """Around a random trimmed schedule of a random graph, with stages and choices at random."""
    while True:
        problem = rng.choice([random_problem, tense_problem])(rng)
        n = len(problem)
        steps: list[int] = []
        for t in range(n):
            earlier = [i for i in range(t) if problem.ops[i].recomputable]
            steps += [rng.choice(earlier) for _ in range(rng.choice([0, 0, 1, 2])) if earlier]
            steps.append(t)
        steps = trim(problem, steps)
        first = sorted({0, *(i for i in range(1, n) if rng.random() < 0.5)})
        allowed = [{i for i in range(n) if problem.ops[i].recomputable and rng.random() < 0.6} for _ in first]
        opened = {g for g in range(len(first)) if rng.random() < 0.7}
        template = template_around(problem, steps, first, allowed, opened)
        if len(template) - sum(template.required) <= MOST_OPTIONAL:
            return Case(problem, steps, template)


cases = st.binary(min_size=8, max_size=8).map(lambda seed: random_case(random.Random(seed)))


def every_row(program: TemplateProgram) -> TemplateProgram:
    for slot in range(len(program.template)):
        program.memory.add(slot)
    return program


def all_closures(template: Template) -> list[int]:
    return list(range(1, len(template.starts)))


@settings(quick, max_examples=3 * settings.default.max_examples)
@given(cases, st.floats(0, 1), st.booleans())
def test_program_is_exact_inside_its_template(case: Case, fraction: float, closed: bool) -> None:
    problem, template = case.problem, case.template
    lines = [simulate_steps(problem, case.sub_sequence(used)) for used in case.choices()]
    peaks = sorted({line.peak_bytes for line in lines})
    low, top = max(0, peaks[0] - 1), peaks[-1]
    limit = round(low + fraction * (top - low)) - problem.resident_bytes
    closures = all_closures(template) if closed else ()
    program = every_row(TemplateProgram(template, limit, closures=closures))
    answer = program.lp.solve(time_limit_s=30, absolute_gap=0.0, relative_gap=0.0)
    costs = [x.recompute_seconds for x in lines if x.peak_bytes - problem.resident_bytes <= limit]
    assert answer.infeasible == (not costs)
    if costs:
        assert answer.optimal and answer.x is not None
        line = simulate_steps(problem, program.steps(answer.x))
        assert line.peak_bytes - problem.resident_bytes <= limit
        assert line.recompute_seconds == pytest.approx(min(costs))
        relaxed = program.lp.solve(time_limit_s=30, relax=True)
        assert relaxed.objective <= answer.objective + 1e-7


@quick
@given(cases, st.floats(0, 1))
def test_least_excess_is_exact_inside_the_template(case: Case, fraction: float) -> None:
    problem, template = case.problem, case.template
    lines = [simulate_steps(problem, case.sub_sequence(used)) for used in case.choices()]
    lowest = min(line.peak_bytes for line in lines) - problem.resident_bytes
    limit = round(fraction * lowest)
    program = every_row(TemplateProgram(template, limit, over=range(len(template))))
    answer = program.lp.solve(time_limit_s=30, absolute_gap=0.0, relative_gap=0.0)
    assert answer.x is not None
    line = simulate_steps(problem, program.steps(answer.x))
    assert line.peak_bytes - problem.resident_bytes == lowest
    if lowest > limit:
        program.over_below(lowest - limit - 0.5)
        assert program.lp.solve(time_limit_s=30).infeasible


def tightest(program: TemplateProgram, used: set[int]) -> np.ndarray | None:
    """The point that uses these slots and keeps nothing in vain; ``None`` if the program has none."""
    program.lp.cost = [1.0] * len(program.lp.cost)
    for s, column in enumerate(program.use):
        if column is not None:
            program.lp.lower[column] = program.lp.upper[column] = float(s in used)
    answer = program.lp.solve(time_limit_s=30)
    assert answer.infeasible or answer.optimal
    return answer.x


@settings(quick, max_examples=2 * settings.default.max_examples)
@given(cases, st.randoms(use_true_random=False))
def test_bytes_of_integral_points_are_the_simulators(case: Case, rng: random.Random) -> None:
    """At slots in use what is live, at the others what the step before left."""
    problem, template = case.problem, case.template
    for used in case.sensible_choices(rng, 4):
        program = TemplateProgram(template, 1e9)
        x = tightest(program, used)
        assert x is not None
        assert program.steps(x) == case.sub_sequence(used)
        line = simulate_steps(problem, program.steps(x))
        step, expected = -1, []
        for runs in program.used(x):
            step += runs
            expected.append(line.live_bytes[step] if runs else line.kept_bytes[step])
        assert program.memory.bytes_at(np.round(x)).tolist() == [b - problem.resident_bytes for b in expected]


@quick
@given(cases)
def test_the_schedule_a_template_was_made_around_is_in_its_program(case: Case) -> None:
    template = case.template
    assert [template.slots[s] for s in template.of_step] == case.steps
    around = {s for s in template.of_step if not template.required[s]}
    assert case.sub_sequence(around) == case.steps
    peak = simulate_steps(case.problem, case.steps).peak_bytes - case.problem.resident_bytes
    for limit, is_in in ((peak, True), (peak - 1, False)):
        program = every_row(TemplateProgram(template, limit, closures=all_closures(template)))
        assert (tightest(program, around) is not None) == is_in


@quick
@given(cases, st.randoms(use_true_random=False))
def test_closure_rows_cut_no_integral_point_off(case: Case, rng: random.Random) -> None:
    template = case.template
    for used in case.sensible_choices(rng, 16):
        assert tightest(TemplateProgram(template, 1e9, closures=all_closures(template)), used) is not None


def test_a_template_must_hold_every_first_run_once() -> None:
    problem = training_chain(1, 1)
    with pytest.raises(ValueError, match="2 slots, 1 of 2 required, for 3 ops"):
        Template(problem, (0, 1), (True, False), (0,), ())
    with pytest.raises(ValueError, match="steps reach 1 of 2 stages"):
        template_around(problem, [], [0, 1], [set(), set()], {0, 1})
    template = template_around(problem, [0, 1, 2], [0, 2], [set(), {0}], {1})
    assert repr(template) == "Template(4 slots, 1 optional, 2 stages)"
    assert repr(TemplateProgram(template, 9)).startswith("TemplateProgram(Template(4 slots")
    with pytest.raises(ValueError, match="no slot of this program may exceed its limit"):
        TemplateProgram(template, 9).over_below(1)


@quick
@given(st.one_of(from_seeds(random_problem), from_seeds(tense_problem)), st.floats(0, 1), st.integers(0, 99))
def test_search_never_makes_anything_worse(problem: Problem, fraction: float, seed: int) -> None:
    top = keep_all_peak(problem)
    budget = round(fraction * top)
    run = Incumbent(problem, budget)
    before = run.best.over, run.recompute_s, run.peak_bytes
    local_search.improve(run, seed=seed)
    line = simulate(problem, Schedule.of(problem, run.steps))
    over = float(((np.maximum(line.live_bytes - budget, 0) / max(1, budget)) ** OVER_POWER).sum())
    after = over, line.recompute_seconds, line.peak_bytes
    assert after == (run.best.over, run.recompute_s, run.peak_bytes)
    assert after <= before
    assert run.lowest.peak_bytes <= line.peak_bytes
    if run.fits and problem.turn is None:
        truth = best_seconds(problem, budget)
        assert truth is not None and truth[0] <= line.seconds + 1e-9


def test_a_find_that_is_not_taken_does_not_keep_the_search_going() -> None:
    """With this seed a window near the peak lowers the most bytes over the budget, but not their sum."""
    problem = random_training_graph(2, layers=3, width=2)
    run = Incumbent(problem, round(0.7 * keep_all_peak(problem)), deadline=time.perf_counter() + 120)
    staged.Relaxations(problem).offer_plans(run)
    local_search.improve(run, layer=staged.ops_per_layer(problem))
    assert run.left_s > 0


def test_until_fits_stops_at_the_first_plan_that_does() -> None:
    problem = random_training_graph(1)
    budget = round(0.6 * keep_all_peak(problem))
    first, best = Incumbent(problem, budget), Incumbent(problem, budget)
    local_search.improve(first, until_fits=True)
    local_search.improve(best)
    assert first.fits and best.fits
    assert best.recompute_s < first.recompute_s


def scaled(problem: Problem, size: int, speed: float) -> Problem:
    """Bytes times ``size``, seconds times ``speed``."""
    again = [op.recompute_seconds for op in problem.ops]
    return replace(
        problem,
        ops=tuple(
            replace(
                op,
                seconds=op.seconds * speed,
                workspace_bytes=op.workspace_bytes * size,
                recompute_seconds=None if s is None else s * speed,
            )
            for op, s in zip(problem.ops, again, strict=True)
        ),
        values=tuple(replace(v, bytes=v.bytes * size) for v in problem.values),
        resident_bytes=problem.resident_bytes * size,
    )


@pytest.mark.parametrize("seed", range(3))
def test_same_steps_in_other_units(seed: int) -> None:
    """Scaling by powers of two leaves every rounding as it is, so even the schedule is the same."""
    problem = scaled(random_training_graph(seed, layers=3, width=2), 2**20, 1.0)
    budget = round(0.7 * keep_all_peak(problem))
    found = []
    for size, speed in ((1, 1.0), (2, 1.0), (1024, 1.0), (1, 0.25), (1, 1024.0)):
        run = Incumbent(scaled(problem, size, speed), budget * size)
        local_search.improve(run, seed=seed)
        assert run.fits
        found.append(run.steps)
    assert all(steps == found[0] for steps in found)


def test_what_needs_two_places_at_once_is_found_by_a_wide_window() -> None:
    """Both of two distant values must go, or neither helps: narrow windows cannot lower the peak alone."""
    sizes = {"a": 6, "b": 6, "u": 1, "v": 1, "mid": 4, "c": 1, "d": 1}
    rows = [("a", ""), ("b", ""), ("u", "a"), ("v", "b"), ("mid", "u v"), ("c", "a mid"), ("d", "b c")]
    number = {name: k for k, (name, _) in enumerate(rows)}
    ops = tuple(
        Op(name, tuple(number[v] for v in reads.split()), (k,), 1.0) for k, (name, reads) in enumerate(rows)
    )
    problem = Problem(ops, tuple(Value(name, sizes[name], k) for k, (name, _) in enumerate(rows)))
    truth = best_seconds(problem, 14)
    run = Incumbent(problem, 14)
    local_search.improve(run)
    assert truth is not None and run.fits
    assert run.line.seconds == truth[0]


def test_random_budgets_need_no_time_limit() -> None:
    """The search ends by itself on graphs of some dozen ops."""
    for seed in range(4):
        problem = random_training_graph(seed, layers=3, width=2)
        run = Incumbent(problem, round(0.65 * keep_all_peak(problem)))
        local_search.improve(run, seed=seed)
        assert run.left_s == math.inf
