"""The methods that scale beside the exact optimum, on graphs small enough to have one.

    python -m tests.benchmarks.bench_exactness

Prints a row per graph and budget: recomputation in percent of a step, and why a method's answer is not the
optimum.  The reasons are looked up:

Local search starts from keeping everything, ``staged`` from rounded relaxations, and goes on likewise.

``no template``   the optimum is no sub-sequence of the widest template around local search's schedule: it
                  runs an op where no slot is, for instance twice before one first run.
``windows``       it is one, so a window over everything would have found it; none that was opened did.
``blocks``        the chain program with one block per op and slots of one byte is no faster: no plan is
                  that saves what a block needs until the backward of that block.
``slots``         it is faster: blocks of several ops, or bytes rounded to slots, cost the difference.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from solvers import Op, Problem, Schedule, Value, simulate
from solvers.chain import method as chain
from solvers.chain.blocks import cut_into_blocks
from solvers.chain.method import ChainTable, Ways
from solvers.core.incumbent import Incumbent
from solvers.exact import method as checkmate
from solvers.search import local_search
from solvers.search.local_search import Reach, Window, window_template
from solvers.staged import method as staged
from tests.joint_graphs import keep_all_peak, random_training_graph

__all__ = ["METHODS", "Row", "budgets", "compare", "graphs"]

METHODS = ("local search", "staged", "chain")
# Of the way from the least peak to that of keeping everything.
SHARES = (0.6, 0.25, 0.0)
EXACT_S = 60.0


@dataclass(frozen=True)
class Row:
    """``found_s``: recomputation by method, ``None`` where nothing fits; ``why`` it is not the optimum."""

    graph: str
    ops: int
    share: float
    total_s: float
    optimum_s: float
    found_s: dict[str, float | None]
    why: dict[str, str]

    def __str__(self) -> str:
        def percent(seconds: float | None) -> str:
            return "none" if seconds is None else f"{100 * seconds / self.total_s:.2f}"

        found = "".join(f"{percent(self.found_s[m]) if m in self.found_s else '':>14}" for m in METHODS)
        why = ", ".join(f"{method}: {reason}" for method, reason in self.why.items())
        return f"{self.graph:<16}{self.ops:>4}{self.share:>6.2f}{percent(self.optimum_s):>9}{found}  {why}"


def graphs(count: int) -> Iterator[Problem]:
    """``count`` training graphs with skips of 10 to 30 ops, and as many DAGs of 12 ops without a turn."""
    for seed in range(count):
        layers, width = ((2, 2), (3, 2), (3, 3))[seed % 3]
        yield random_training_graph(seed, layers=layers, width=width)
        yield _dag(seed)


def _dag(seed: int) -> Problem:
    rng = random.Random(seed)
    ops, values = [], []
    for i in range(12):
        inputs = {rng.randrange(max(0, i - 2), i)} if i else set()
        inputs |= {rng.randrange(i) for _ in range(rng.choice([0, 1, 1, 2])) if i}
        ops.append(Op(f"op{i}", tuple(sorted(inputs)), (i,), rng.randint(1, 9) / 4))
        values.append(Value(f"v{i}", rng.randint(1, 30), i))
    return Problem(tuple(ops), tuple(values), name=f"dag{seed}")


def budgets(problem: Problem) -> dict[float, int]:
    """Budgets at ``SHARES`` of the way up from the least peak; none where that is the highest as well."""
    lowest, _ = checkmate.minimum_peak(problem, time_limit_s=EXACT_S)
    low, top = simulate(problem, lowest).peak_bytes, keep_all_peak(problem)
    return {share: round(low + share * (top - low)) for share in SHARES} if low < top else {}


def compare(problem: Problem, budget_bytes: int, share: float) -> Row | None:
    """Every method that suits beside the optimum; ``None`` where that is not proved or costs nothing."""
    exact = checkmate.solve(problem, budget_bytes, time_limit_s=EXACT_S)
    if exact.status != "optimal" or not exact.recompute_seconds:
        return None
    found: dict[str, float | None] = {}
    why: dict[str, str] = {}

    def note(method: str, run: Incumbent) -> bool:
        found[method] = run.recompute_s if run.fits else None
        return run.fits and run.recompute_s <= exact.recompute_seconds + 1e-9 * exact.seconds

    run = Incumbent(problem, budget_bytes)
    local_search.improve(run, layer=staged.ops_per_layer(problem))
    if not note("local search", run):
        why["local search"] = _why_not_local(problem, run, exact.schedule)
    if problem.turn is not None:
        run = Incumbent(problem, budget_bytes)
        staged.Relaxations(problem).offer_plans(run)
        local_search.improve(run, layer=staged.ops_per_layer(problem))
        if not note("staged", run):
            why["staged"] = _why_not_local(problem, run, exact.schedule)
        run = Incumbent(problem, budget_bytes)
        chain.Chains(problem).offer_plans(run, time_limit_s=math.inf)
        if not note("chain", run):
            why["chain"] = _why_not_chain(problem, run)
    return Row(problem.name, len(problem), share, problem.total_seconds, exact.recompute_seconds, found, why)


def _why_not_local(problem: Problem, run: Incumbent, optimum: Schedule) -> str:
    n = len(problem)
    template = window_template(problem, Reach(problem), run.steps, Window(0, n, n))
    slots = iter(template.slots)
    return "windows" if all(step in slots for step in optimum.steps(problem)) else "no template"


def _why_not_chain(problem: Problem, run: Incumbent) -> str:
    assert problem.turn is not None
    room = run.budget_bytes - problem.resident_bytes
    table = ChainTable(Ways(cut_into_blocks(problem, problem.turn)), 1, room)
    best_s = float(table.seconds[-1][0, room])
    return "slots" if best_s < (run.recompute_s if run.fits else math.inf) else "blocks"


def main() -> int:
    print(f"{'graph':<16}{'ops':>4}{'share':>6}{'optimum':>9}{''.join(f'{m:>14}' for m in METHODS)}  why not")
    optimal: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for problem in graphs(16):
        for share, budget in budgets(problem).items():
            row = compare(problem, budget, share)
            if row is not None:
                print(row, flush=True)
                tried.update(row.found_s.keys())
                optimal.update(set(row.found_s) - set(row.why))
    for method in METHODS:
        print(f"{method}: the optimum in {optimal[method]} of {tried[method]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
