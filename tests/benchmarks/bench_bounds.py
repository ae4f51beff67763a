"""How often the proved bound is the exact optimum, on random graphs of up to 60 ops.

    python -m tests.benchmarks.bench_bounds [--cases 2000] [--first 0] [--limit 10]

A case is a seed: a graph of one of four kinds, and a budget somewhere between the least peak found and that
of keeping everything.  Judged is the bound that ``solvers.solve`` answers with.  The truth comes from others:

``search``   up to ``SEARCHED_OPS`` ops, a shortest path over all schedules (:mod:`tests.solver_graphs`),
             which shares no line with the solvers;
``plan``     a schedule that takes, simulated, what the bound says: then no other is faster;
``program``  else CP-SAT, on Checkmate's program below all schedules and on that of some, where both agree
             (the judged bound is HiGHS's).

Where none of them settles it the case is open, and counts as a miss: of at most the distance to the best
schedule known, of an unknown one where none is known to fit.
A bound above a schedule's seconds is false and ends in exit code 1, as do fewer than ``AIM`` of equal bounds.
Writes ``results/bounds.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from solvers import Problem, minimum_peak, solve
from solvers.exact.method import least_time_between
from tests.benchmarks.layered import layered_dag
from tests.joint_graphs import keep_all_peak, random_training_graph
from tests.solver_graphs import best_seconds, tense_problem, training_chain

__all__ = ["AIM", "KINDS", "Case", "case", "judged", "shortfalls", "table"]

RESULTS = Path(__file__).parent / "results" / "bounds.json"
MOST_OPS = 60
SEARCHED_OPS = 8
AIM = 0.95
# Equal is: apart by less than this share of the step, which is what adding seconds up in floats costs.
EQUAL = 1e-7
KINDS = ("tense", "chain", "skips", "layered")
# Seconds that look for the least peak, from which budgets are counted.
LEAST_S = 1.0


@dataclass(frozen=True)
class Case:
    """``bound_s`` beside ``optimum_s``, or beside the fastest schedule known where ``truth`` is ``open``."""

    seed: int
    kind: str
    ops: int
    share: float
    total_s: float
    bound_s: float
    optimum_s: float
    truth: str
    took_s: float

    @property
    def equal(self) -> bool:
        """Whether the bound is the optimum."""
        return self.truth != "open" and self.optimum_s - self.bound_s <= EQUAL * self.total_s

    @property
    def broken(self) -> bool:
        """Whether a schedule is faster than the bound."""
        return self.bound_s - self.optimum_s > EQUAL * self.total_s

    @property
    def short_points(self) -> float:
        """How far the bound is below, in percent of a step."""
        return 100 * (self.optimum_s - self.bound_s) / self.total_s

    def __str__(self) -> str:
        """One row."""
        return (
            f"{self.seed:>5} {self.kind:<8}{self.ops:>3} ops{self.share:>6.2f}{self.short_points:>9.4f} "
            f"{self.truth:<8}{self.took_s:>6.1f} s"
        )


def graph(seed: int) -> tuple[str, Problem]:
    """The kind and the graph of a seed; kinds take turns, sizes are drawn."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    if kind == "tense":
        return kind, tense_problem(rng, SEARCHED_OPS)
    if kind == "layered":
        return kind, Problem.from_networkx(layered_dag(rng.randint(8, MOST_OPS), seed))
    while True:
        layers, width = rng.randint(2, 9), rng.randint(1, 4)
        make = training_chain if kind == "chain" else random_training_graph
        problem = make(layers, width, seed) if kind == "chain" else make(seed, layers, width)
        if len(problem) <= MOST_OPS:
            return kind, problem


def case(seed: int, limit_s: float) -> Case | None:
    """The case of a seed, its bound sought for ``limit_s`` seconds; ``None`` where nothing can be saved."""
    kind, problem = graph(seed)
    share = random.Random(-1 - seed).random()
    low = minimum_peak(problem, time_limit_s=LEAST_S, fast=False).peak_bytes
    top = keep_all_peak(problem)
    if low >= top:
        return None
    return judged(problem, round(low + share * (top - low)), limit_s, seed=seed, kind=kind, share=share)


def judged(
    problem: Problem, budget_bytes: int, limit_s: float, *, seed: int = 0, kind: str = "", share: float = 0.0
) -> Case:
    """The bound of ``solve`` beside the truth."""
    began = time.perf_counter()
    found = solve(problem, budget_bytes, time_limit_s=limit_s)
    took_s = time.perf_counter() - began
    best_s, truth = found.seconds if found.fits else math.inf, "open"
    if len(problem) <= SEARCHED_OPS:
        searched = best_seconds(problem, budget_bytes)
        assert searched is not None, "the budget is at least the peak of a schedule"
        best_s, truth = searched[0], "search"
    elif best_s - found.bound_seconds <= EQUAL * problem.total_seconds:
        truth = "plan"
    else:
        low_s, high_s = least_time_between(problem, budget_bytes, hint=found.schedule, time_limit_s=limit_s)
        best_s = min(best_s, high_s)
        truth = "program" if best_s - low_s <= EQUAL * problem.total_seconds else "open"
    return Case(
        seed, kind, len(problem), share, problem.total_seconds, found.bound_seconds, best_s, truth, took_s
    )


def table(cases: Iterable[Case]) -> Iterator[str]:
    """Rows of kinds and sizes: how many, how their truth is known, and how many bounds are it."""
    cases = list(cases)
    yield "| graphs | ops | cases | truth known | bound equal | of all | mean miss, points | most |"
    yield "|---|---|---|---|---|---|---|---|"
    bands = ((1, 20), (21, 40), (41, MOST_OPS))
    groups = [(kind, *band) for kind in KINDS for band in bands] + [("all", 1, MOST_OPS)]
    for kind, least, most in groups:
        some = [c for c in cases if kind in (c.kind, "all") and least <= c.ops <= most]
        if some:
            known, equal = sum(c.truth != "open" for c in some), sum(c.equal for c in some)
            missed = [c.short_points for c in some if not c.equal and math.isfinite(c.short_points)] or [0.0]
            yield (
                f"| {kind} | {least} to {most} | {len(some)} | {known} | {equal} | {equal / len(some):.1%} "
                f"| {sum(missed) / len(missed):.3f} | {max(missed):.3f} |"
            )


def shortfalls(cases: Iterable[Case]) -> list[str]:
    """What falls short of the aim, or is false."""
    cases = list(cases)
    short = [
        f"false: seed {c.seed}, bound {c.bound_s} s, a schedule of {c.optimum_s} s" for c in cases if c.broken
    ]
    equal = sum(c.equal for c in cases)
    if equal < AIM * len(cases):
        short.append(f"the bound is the optimum in {equal} of {len(cases)}, want {AIM:.0%}")
    return short


def main() -> int:
    """Run the cases asked for; write, tell of the misses and the table."""
    parser = argparse.ArgumentParser(description="How often the proved bound is the exact optimum.")
    parser.add_argument("--cases", type=int, default=2000, help="so many seeds")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of each search")
    args = parser.parse_args()
    cases = []
    for seed in range(args.first, args.first + args.cases):
        found = case(seed, args.limit)
        if found is not None:
            cases.append(found)
            if not found.equal:
                print(found, flush=True)
    rows = [asdict(c) | {"optimum_s": c.optimum_s if math.isfinite(c.optimum_s) else None} for c in cases]
    RESULTS.write_text(json.dumps(rows) + "\n")
    print("\n".join(table(cases)))
    short = shortfalls(cases)
    print("\n".join(short))
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
