"""The one judge: run a schedule on paper and report memory at every step, or say why it is invalid.

Memory while an op runs is: ``resident_bytes`` + every value alive before the step + the op's
outputs + its workspace; an op that ``reuses`` an input counts it once where it dies with the op and
twice where it does not.  When an op runs again, the copy it replaces has died after its own last
use, so two copies of one value are never alive together.  A final value is the exception: it stays
once computed, so an op that runs again for the sake of another output makes a second copy of it,
which is resident for that step only.  A ``replay_only`` value has its bytes only in schedules that run a
reader of it again (``Problem.as_run``).

Every solver's answer passes through here before anyone sees it, and the planner's predicted peak
is this function's.  Work is linear in the steps and their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.core.problem import Problem
from solvers.core.schedule import Schedule

__all__ = ["InvalidScheduleError", "Timeline", "simulate"]


class InvalidScheduleError(ValueError):
    """The schedule cannot be executed; the message names the step and the op."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happens at each step of a schedule.

    ``steps``        op position per step, shape (T,).
    ``live_bytes``   bytes resident while the step runs, workspace included, shape (T,).
    ``kept_bytes``   bytes alive after the step's frees, shape (T,).
    ``frees``        per step, the values whose copy dies right after it.
    ``seconds``      total; ``recompute_seconds`` the part beyond every op's first execution.
    """

    steps: np.ndarray
    live_bytes: np.ndarray
    kept_bytes: np.ndarray
    frees: tuple[tuple[int, ...], ...]
    seconds: float
    recompute_seconds: float
    resident_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes resident at any step."""
        return int(self.live_bytes.max()) if len(self.live_bytes) else self.resident_bytes

    @property
    def peak_step(self) -> int:
        """The first step at which the peak is reached."""
        return int(self.live_bytes.argmax())

    def __repr__(self) -> str:
        return (
            f"Timeline({len(self.steps)} steps, peak {self.peak_bytes} bytes at step "
            f"{self.peak_step if len(self.steps) else 0}, {self.seconds:.6g} s of which "
            f"{self.recompute_seconds:.6g} s recomputation)"
        )


def simulate(problem: Problem, schedule: Schedule) -> Timeline:
    """The timeline of ``schedule``; ``InvalidScheduleError`` if it breaks a rule.

    Rules: every op runs at least once; an op that is not recomputable runs exactly once; an op's
    inputs have been computed before it; final values never die once computed.
    """
    return simulate_steps(problem, schedule.steps(problem))


def simulate_steps(problem: Problem, steps: list[int]) -> Timeline:
    """``simulate`` for op positions instead of names."""
    ops, values, reads = problem.ops, problem.values, problem.counted_inputs
    times = np.bincount(np.asarray(steps, dtype=np.int64), minlength=len(ops)).tolist()
    for i, n in enumerate(times):
        if n == 0:
            raise InvalidScheduleError(f"{problem.name}: op {ops[i].name!r} never runs")
        if n > 1 and not ops[i].recomputable:
            raise InvalidScheduleError(
                f"{problem.name}: op {ops[i].name!r} runs {n} times but may run only once"
            )

    # last_touch[v]: the latest step that made or read v's current copy.
    last_touch = [-1] * len(values)
    frees: list[list[int]] = [[] for _ in steps]
    for t, i in enumerate(steps):
        for v in reads[i]:
            if last_touch[v] < 0:
                raise InvalidScheduleError(
                    f"{problem.name}: step {t} runs {ops[i].name!r} before its input "
                    f"{values[v].name!r} is made"
                )
            last_touch[v] = t
        for v in ops[i].outputs:
            if last_touch[v] >= 0 and not values[v].final:
                frees[last_touch[v]].append(v)
            last_touch[v] = t
    for v, t in enumerate(last_touch):
        if t >= 0 and not values[v].final:
            frees[t].append(v)

    size = [value.bytes for value in values]
    for v in problem.idle_values(times):
        size[v] = 0
    live = np.empty(len(steps), dtype=np.int64)
    kept = np.empty(len(steps), dtype=np.int64)
    now = problem.resident_bytes
    seconds = again = 0.0
    ran = bytearray(len(ops))
    for t, i in enumerate(steps):
        op = ops[i]
        second_copies = 0
        for v in op.outputs:
            if ran[i] and values[v].final:
                second_copies += size[v]
            else:
                now += size[v]
        live[t] = now + second_copies + op.workspace_bytes
        if op.reuses is not None and op.reuses not in frees[t]:  # it is read later: the result lies apart
            live[t] += size[op.reuses]
        for v in frees[t]:
            now -= size[v]
        kept[t] = now
        if ran[i]:
            seconds += op.again_s
            again += op.again_s
        else:
            ran[i] = 1
            seconds += op.seconds
    return Timeline(
        np.asarray(steps, dtype=np.int64),
        live,
        kept,
        tuple(map(tuple, frees)),
        seconds,
        again,
        problem.resident_bytes,
    )
