"""Why a value is kept, recomputed or freed, with what the other choice would have cost.

Nothing here is guessed: the other choice is made in the plan's own schedule and put to the simulator.

*Keeping* what is recomputed takes its recomputations out of the schedule, and with them those that only
served them.  *Recomputing* what is kept lets it go at the end of the forward and runs its op again before
the first op behind it that reads it, after whichever ancestors are gone by then.  All else stays as the
plan has it, so each alternative is one schedule that can be run, not the best one of its kind: a solver
that is made to keep the value might rearrange the rest.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from planner.graph.step_graph import GLUE, RELEASE
from planner.plans.outline import Outline
from planner.units import DECISIONS, bytes_text, seconds_text
from planner.view.layers import ROOT, TEXT_ROWS, layers_of, recompute_seconds, rows_of
from solvers import Timeline
from solvers.core.just_in_time import trim

if TYPE_CHECKING:
    from planner.plans.plan_data import Placement, PlanData

__all__ = ["Alternative", "Explanation", "explain"]

_FEW = 3  # names in a list before it is cut short
_MANY = 8  # paths with the end that was asked about


@dataclass(frozen=True)
class Alternative:
    """The plan with one choice turned round, as simulated.

    ``decision``     what is done instead: "save" or "recompute".
    ``sequence``     op names in execution order.
    ``peak_bytes``   of the step; ``over_bytes`` by how much it exceeds the budget, negative if it fits.
    ``steps_over``   how many steps are above the budget.
    ``peak_op``      the op at the peak, ``peak_module`` its module.
    ``recompute_s``  seconds of recomputation in the step; ``extra_s`` those beyond the plan's.
    ``along``        ops beyond those asked about that run more or less often than in the plan.
    """

    decision: Literal["save", "recompute"]
    sequence: tuple[str, ...]
    peak_bytes: int
    over_bytes: int
    steps_over: int
    peak_op: str
    peak_module: str
    recompute_s: float
    extra_s: float
    along: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The answer of :meth:`planner.Plan.explain`; printed, it is the sentences.

    ``name``         what was asked about, in full; ``placements`` the values it stands for.
    ``bytes``        of them all; ``kept_bytes``, ``recomputed_bytes`` and ``freed_bytes`` by decision.
    ``recompute_s``  seconds the plan spends on running their own ops again.
    ``if_kept``      the plan, had it kept what it recomputes of them; ``None`` if it recomputes none.
    ``if_recomputed``  the plan, had it recomputed what it keeps; ``None`` if it keeps none that it could.
    """

    name: str
    placements: tuple[Placement, ...]
    recompute_s: float
    if_kept: Alternative | None
    if_recomputed: Alternative | None
    sentences: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.placements)

    @property
    def kept_bytes(self) -> int:
        return sum(p.bytes for p in self.placements if p.decision == "save")

    @property
    def recomputed_bytes(self) -> int:
        return sum(p.bytes for p in self.placements if p.decision == "recompute")

    @property
    def freed_bytes(self) -> int:
        return sum(p.bytes for p in self.placements if p.decision == "free")

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    __repr__ = __str__


def explain(plan: PlanData, name: str) -> Explanation:
    """Why the value or the values of the module called ``name`` are kept, recomputed or freed.

    ``name``  a value (``gelu_3``), a module path (all below it), both (``model.layers.0.mlp.mm_7``), or a
              layer as :meth:`planner.Plan.summary` names it.  The front of a path may be left out where
              what is left means one thing: ``layers.0``.

    Raises ``ValueError`` for a name the plan does not have, with names that are near, and for the end of
    several paths, with these; ``TypeError`` for anything but a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"explain() takes the name of a value or a module, not {name!r}")
    name, placements = _named(plan, name)
    seconds = dict(zip(map(id, plan.placements), recompute_seconds(plan), strict=True))
    spent = sum(seconds[id(p)] for p in placements)
    outline = plan.outline
    if outline is None:
        said = (
            _value(placements[0], spent) if len(placements) == 1 else _what_is(name, placements, spent),
            "More is not known: the plan's file holds no graph of the step (it was written by an earlier "
            "version), so nothing can be simulated. Plan the model again.",
        )
        return Explanation(name, placements, spent, None, None, said)
    what_if = _WhatIf(plan, outline)
    recomputed = [p for p in placements if p.decision == "recompute"]
    kept = [p for p in placements if p.decision == "save"]
    if_kept = what_if.kept(recomputed) if recomputed else None
    if_recomputed = what_if.recomputed(kept) if kept else None
    single = len(placements) == 1
    said = (
        what_if.of_value(placements[0], spent) if single else _what_is(name, placements, spent),
        *(_of_keeping(plan, if_kept, single) if if_kept is not None else ()),
        *(_of_recomputing(plan, if_recomputed, kept, single) if if_recomputed is not None else ()),
        *((what_if.pinned(kept),) if kept and if_recomputed is None else ()),
    )
    return Explanation(name, placements, spent, if_kept, if_recomputed, said)


# -- names ----------------------------------------------------------------------------------------


def _named(plan: PlanData, name: str) -> tuple[str, tuple[Placement, ...]]:
    """The name in full, and the placements it stands for."""
    exact = _exactly(plan, name)
    if exact:
        return name, exact
    modules = list(dict.fromkeys(m for p in plan.placements for m in _prefixes(p.module)))
    inside = [f"{p.module}.{p.name}" for p in plan.placements if p.module]
    full = [path for path in (*modules, *inside) if path.endswith(f".{name}")]
    if len(full) == 1:
        return full[0], _exactly(plan, full[0])
    if full:
        rest = f" and {len(full) - _MANY} more" if len(full) > _MANY else ""
        raise ValueError(
            f"{name!r} is the end of {len(full)} paths in this plan of {plan.model_name}: "
            f"{', '.join(full[:_MANY])}{rest}; write more of the one that is meant"
        )
    known = [p.name for p in plan.placements] + modules
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else f"; there are {', '.join(known[:_FEW])}, ..."
    raise ValueError(f"no value or module of this plan of {plan.model_name} is called {name!r}{hint}")


def _exactly(plan: PlanData, name: str) -> tuple[Placement, ...]:
    """The placements of a value, a value in its module, a module, or a row of the summary."""
    of_value = tuple(p for p in plan.placements if name in (p.name, f"{p.module}.{p.name}"))
    if of_value:
        return of_value
    if name == ROOT:
        return tuple(p for p in plan.placements if not p.module)
    below = tuple(p for p in plan.placements if p.module == name or p.module.startswith(name + "."))
    if name and below:
        return below
    layers = layers_of(plan)
    rows = (*rows_of(layers, TEXT_ROWS), *rows_of(layers, len(layers) or 1))
    row = next((row for row in rows if row.name == name), None)
    return () if row is None else tuple(p for layer in row.layers for p in layer.placements)


def _prefixes(module: str) -> list[str]:
    parts = module.split(".") if module else []
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


# -- the other choice -----------------------------------------------------------------------------


class _WhatIf:
    """The plan's schedule, and what becomes of it when a choice is turned round."""

    def __init__(self, plan: PlanData, outline: Outline) -> None:
        self.plan, self.outline = plan, outline
        self.steps = outline.steps(plan.sequence)
        made = (k for k, v in enumerate(outline.problem.values) if v.producer is not None)
        self.value = {outline.values[k].name: k for k in made}

    @cached_property
    def line(self) -> Timeline:
        return self.outline.judge(self.steps)

    @cached_property
    def slack_bytes(self) -> int:
        """What an allocator adds to the plan's peak; other schedules are taken to have as much added."""
        return int(self.plan.timeline.max(initial=self.line.peak_bytes)) - self.line.peak_bytes

    def ops_of(self, placements: Iterable[Placement]) -> set[int]:
        return {self.outline.position[p.call] for p in placements}

    def kept(self, placements: Sequence[Placement]) -> Alternative:
        """The plan without the recomputations of these values."""
        own = self.ops_of(placements)
        seen: set[int] = set()
        steps = []
        for i in self.steps:
            if i not in own or i not in seen:
                steps.append(i)
            seen.add(i)
        return self._alternative("save", trim(self.outline.problem, steps), own)

    def recomputed(self, placements: Sequence[Placement]) -> Alternative | None:
        """The plan with these values made again in the backward; ``None`` if none of them can be."""
        able = [p for p in placements if self.outline.problem.ops[self.outline.position[p.call]].recomputable]
        steps = self._made_again({self.value[p.name] for p in able}) if able else None
        return (
            None
            if steps is None
            else self._alternative("recompute", trim(self.outline.problem, steps), self.ops_of(able))
        )

    def _alternative(
        self, decision: Literal["save", "recompute"], steps: list[int], own: set[int]
    ) -> Alternative:
        plan, ops = self.plan, self.outline.ops
        line = self.outline.judge(steps)
        at_peak = ops[steps[line.peak_step]]
        peak_bytes = max(line.peak_bytes + self.slack_bytes, plan.optimizer_step_bytes)
        in_optimizer = plan.optimizer_step_bytes > line.peak_bytes + self.slack_bytes
        before, after = Counter(self.steps), Counter(steps)
        along = tuple(op.name for i, op in enumerate(ops) if before[i] != after[i] and i not in own)
        return Alternative(
            decision,
            tuple(ops[i].name for i in steps),
            peak_bytes,
            peak_bytes - plan.budget_bytes,
            int((line.live_bytes + self.slack_bytes > plan.budget_bytes).sum()),
            "optimizer.step" if in_optimizer else at_peak.name,
            "" if in_optimizer else at_peak.module,
            line.recompute_seconds,
            line.recompute_seconds - self.line.recompute_seconds,
            along,
        )

    def _made_again(self, gone: set[int]) -> list[int] | None:
        """The schedule in which ``gone`` are dropped as the forward ends, and made when first read.

        ``None`` where one of them cannot be made; it is taken out of ``gone`` then.
        """
        problem, ops, frees = self.outline.problem, self.outline.ops, self.line.frees
        dropped, alive, made = set(gone), set[int](), set[int]()
        behind = False
        out: list[int] = []
        for t, i in enumerate(self.steps):
            behind = behind or ops[i].phase != "forward"
            todo = [i] if behind else []
            while todo:  # depth first: what is missing comes before what reads it
                reads = (u for u in problem.counted_inputs[todo[-1]] if u not in made)
                missing = next((u for u in reads if u in dropped or u not in alive), None)
                if missing is None:
                    again = todo.pop()
                    made.update(ops[again].outputs if todo else ())
                    out.append(again)
                    continue
                producer = problem.values[missing].producer
                assert producer is not None  # sources are not counted
                if problem.ops[producer].recomputable:
                    todo.append(producer)
                elif ops[producer].target == "rng_state":
                    made.add(missing)  # held from the forward on, where a replay reads it
                else:
                    gone.difference_update(v for n in (*todo, producer) for v in ops[n].outputs)
                    return None
            if not behind:
                out.append(i)
            alive.update(ops[i].outputs)
            dropped.difference_update(ops[i].outputs if behind else ())
            alive.difference_update(frees[t])
        return out

    def of_value(self, p: Placement, spent_s: float) -> str:
        """One value: what it is, what happens to it, and who reads it when."""
        v, ops = self.value[p.name], self.outline.ops
        if p.decision == "free":
            last = self.outline.readers(v, forward=True)
            after = f"after `{last[-1].name}`" if last else "at once"
            if any(ops[i].target == RELEASE for i in self.outline.problem.consumers[v]):
                after = "when the caller lets go of it"
            return _value(p, rest=f" {after}: the backward never reads it")
        if p.decision == "save":
            behind = [op.name for op in self.outline.readers(v, forward=False)]
            return _value(p, rest=f" for {_listed(behind)}" if behind else "")
        made = self.outline.position[p.call]
        again = len(self.steps) - 1 - self.steps[::-1].index(made)
        read = next((ops[i] for i in self.steps[again + 1 :] if v in ops[i].inputs), None)
        return _value(p, spent_s, f" for `{read.name}` in {read.module or ROOT}" if read is not None else "")

    def pinned(self, kept: Sequence[Placement]) -> str:
        """Why nothing of these can be computed again."""
        if all(self.outline.values[self.value[p.name]].final for p in kept):
            return "That is no choice: the model returns it, and the caller holds it to the end of the step."
        made_by = {self.outline.ops[self.outline.position[p.call]].target for p in kept}
        if made_by == {GLUE}:
            return "That is no choice: the model's own code between regions makes it, and runs once."
        return (
            "That is no choice: what makes it, or what that reads, may run only once (it is held by the "
            "caller, written in place, or the state of a random generator)."
        )


# -- sentences ------------------------------------------------------------------------------------


def _value(p: Placement, spent_s: float = 0.0, rest: str = "") -> str:
    """What a value is, what happens to it, ``rest``, and how long that takes."""
    times = f" {p.times_recomputed} times" if p.times_recomputed > 1 else ""
    took = f", in {seconds_text(spent_s)}" if spent_s else ""
    what = f"`{p.name}` ({p.op} in {p.module or ROOT}, {bytes_text(p.bytes)})"
    return f"{what} is {DECISIONS[p.decision]}{times}{rest}{took}."


def _what_is(name: str, placements: Sequence[Placement], spent_s: float) -> str:
    """What a module makes, by decision."""
    parts = []
    for decision, word in DECISIONS.items():
        of = [p for p in placements if p.decision == decision]
        if of:
            parts.append(f"{len(of)} {word} ({bytes_text(sum(p.bytes for p in of))})")
    took = f", {seconds_text(spent_s)} of recomputation" if spent_s else ""
    total = bytes_text(sum(p.bytes for p in placements))
    return f"`{name}` makes {len(placements)} values, {total}: {', '.join(parts)}{took}."


def _of_keeping(plan: PlanData, a: Alternative, single: bool) -> Iterable[str]:
    """What keeping the recomputed would win, and what stands against it."""
    saved_s = -a.extra_s
    what = "it" if single else "what it recomputes"
    also = f"; {_listed(a.along)} would run less often too" if a.along else ""
    yield f"Keeping {what} would save {_time(plan, saved_s)}{also}."
    where = f"`{a.peak_op}` in {a.peak_module or ROOT}"
    if a.over_bytes > 0:
        yield (
            f"The step would then peak at {bytes_text(a.peak_bytes)} at {where}, "
            f"{bytes_text(a.over_bytes)} over the budget of {bytes_text(plan.budget_bytes)}"
            + (f", and be above it in {a.steps_over} of {len(a.sequence)} steps" if a.steps_over > 1 else "")
            + f". A budget of {math.ceil(a.peak_bytes / 1e3) / 1e6:.6f} GB has room for it."
        )
    else:
        better = (
            f": a faster plan than this one, whose gap is {100 * plan.gap:.2f} points; a longer search may "
            "find it or a better one"
            if saved_s > 0
            else ""
        )
        yield f"It would fit, with a peak of {bytes_text(a.peak_bytes)} at {where}{better}."


def _of_recomputing(plan: PlanData, a: Alternative, kept: Sequence[Placement], single: bool) -> Iterable[str]:
    """What making the kept again would cost and free."""
    also = f", and {_listed(a.along)} with it," if a.along else ""
    what = "it" if single else "what it keeps"
    moved = a.peak_bytes - plan.peak_bytes
    where = f"{bytes_text(a.peak_bytes)} at `{a.peak_op}` in {a.peak_module or ROOT}"
    if moved:
        effect = f"{'raise' if moved > 0 else 'lower'} the peak by {bytes_text(abs(moved))}, to {where}"
    else:
        effect = f"leave the peak at {where}"
    yield f"Making {what} again in the backward{also} would take {_time(plan, a.extra_s)} and {effect}."
    freed_mb = sum(p.bytes for p in plan.placements if p.decision == "recompute") / 1e6
    here_mb = sum(p.bytes for p in kept) / 1e6
    if not freed_mb:
        yield f"The plan recomputes nothing: everything fits the budget of {bytes_text(plan.budget_bytes)}."
    elif moved < 0 and here_mb:
        price = seconds_text(a.extra_s / here_mb) if a.extra_s > 0 else "nothing"
        paid = seconds_text(plan.recompute_s / freed_mb)
        yield (
            f"That is {price} per MB kept, where what the plan recomputes costs {paid} per MB on average. "
            "Only a lower budget could ask for it."
        )


def _time(plan: PlanData, seconds: float) -> str:
    share = f" ({seconds / plan.step_s:.2%} of the step)" if plan.step_s and seconds > 0 else ""
    return f"{seconds_text(seconds)}{share}" if seconds > 0 else "no time"


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b, c and 4 more``."""
    shown = [name if name.startswith("`") else f"`{name}`" for name in names[:_FEW]]
    rest = len(names) - len(shown)
    tail = f"{rest} more" if rest else shown.pop() if len(shown) > 1 else ""
    return ", ".join(shown) + (f" and {tail}" if tail else "")
