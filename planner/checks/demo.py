"""The demo: five real models planned to three budgets each, trained, measured, and shown in one table.

Each model is captured once; for 75 % and 50 % of its eager peak and for the least budget that has a
plan, it is planned, applied, compared with the eager step bit for bit, measured, and trained for some
steps beside the eager model.  :func:`run` returns the figures; ``python -m planner demo`` prints them.

Known weakness: the models are small, so that the whole takes minutes on a CPU; planning a model of
any size takes seconds, its steps do not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from planner.checks.trials import Eager, Race, Trial, eager_step, planned_copies, prepare_example, race, trial
from planner.checks.zoo import MODELS, Example
from planner.costs.target import CostSource
from planner.errors import InfeasibleBudgetError
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import PricedStep
from planner.units import bytes_text
from planner.view.text import aligned

__all__ = ["FULL", "QUICK", "Demo", "Row", "Settings", "run", "table"]

MISPREDICTED = 0.005  # of the measured peak; beyond it the demo fails
RISES = (0.0, 0.02, 0.1)  # above the least peak found, in parts of what the eager step adds

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What to run and how long to search.

    ``fractions``  budgets, as parts of what the eager step adds to what is resident; the least feasible
                   budget comes on top.
    ``patience``   the least budget is the lowest of those tried, in steps of ``RISES`` from the least peak
                   found, whose plan has no more overhead than this.
    ``steps``      of training, the first not timed.
    """

    models: tuple[str, ...] = tuple(MODELS)
    fractions: tuple[float, ...] = (0.75, 0.5)
    solve_s: float = 3.0
    least_s: float = 3.0
    patience: float = 1.0
    steps: int = 4
    costs: CostSource = "auto"

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown or not self.models:
            raise ValueError(f"models must be among {', '.join(MODELS)}, got {', '.join(unknown) or 'none'}")
        if not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions must lie in (0, 1], got {self.fractions}")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2 (the first is not timed), got {self.steps}")

    @property
    def phases(self) -> int:
        """How often :func:`run` tells what it does."""
        return len(self.models) * (5 + 2 * len(self.fractions))


FULL = Settings()
QUICK = Settings(
    models=("resnet", "unet"), fractions=(0.5,), solve_s=0.5, least_s=1.0, steps=2, costs="roofline"
)


@dataclass(frozen=True)
class Row:
    """A model at one budget.

    ``label``      the budget as asked for: "75 %", "50 %", "least".
    ``needs_bytes``  the least budget with a plan, where this one has none; then ``trial`` is ``None``.
    ``time_ratio``   seconds of a planned over those of an eager step.
    ``same_losses``  the losses of all training steps equal eager's, bit for bit.
    """

    model: str
    label: str
    ops: int
    eager_bytes: int
    budget_bytes: int
    predicted_bytes: int = 0
    overhead: float = 0.0
    gap: float = 0.0
    trial: Trial | None = None
    time_ratio: float = math.nan
    same_losses: bool = False
    needs_bytes: int | None = None

    def failures(self) -> list[str]:
        """What is wrong with this row; empty if it holds what the plan promised."""
        t = self.trial
        if t is None:
            return []
        found = []
        if t.peak_bytes > self.budget_bytes:
            found.append(f"peak {t.peak_bytes} over the budget of {self.budget_bytes} bytes")
        if abs(t.peak_bytes - self.predicted_bytes) > MISPREDICTED * t.peak_bytes:
            found.append(f"peak {t.peak_bytes} bytes, predicted {self.predicted_bytes}")
        if not t.comparison.equal:
            found.append(str(t.comparison))
        if not self.same_losses:
            found.append("the losses of the training steps differ from eager's")
        return [f"{self.model} at {self.label}: {what}" for what in found]


@dataclass(frozen=True)
class Demo:
    """All rows, where they were measured, how long it took, and the picture (``None`` without matplotlib)."""

    rows: tuple[Row, ...]
    device: str
    steps: int
    seconds: float
    picture: Path | None

    def failures(self) -> list[str]:
        """What went wrong, one line each."""
        return [line for row in self.rows for line in row.failures()]

    def __str__(self) -> str:
        return table(self)


def run(
    settings: Settings = FULL,
    *,
    device: str | torch.device = "cpu",
    out: Path | None = None,
    tell: Tell | None = None,
) -> Demo:
    """Plan and train the models; ``tell`` hears of each of ``settings.phases`` phases as it begins.

    ``out``  folder for ``memory.png``; ``None`` draws nothing.

    Raises ``PlannerError`` if a package the models need is missing.
    """
    began = time.perf_counter()
    say = tell or _silent
    rows: list[Row] = []
    drawn: list[Plan] = []
    for key in settings.models:
        say(f"{key}: build")
        example = MODELS[key](device)
        made, plan = _run_model(example, settings, prefixed(say, key))
        rows += made
        drawn.append(plan)
    picture = None if out is None else draw(drawn, out)
    return Demo(
        tuple(rows), _name_of(torch.device(device)), settings.steps, time.perf_counter() - began, picture
    )


def _run_model(example: Example, settings: Settings, say: Tell) -> tuple[list[Row], Plan]:
    """The rows of one model, and the plan to draw: that of the smallest fraction with a plan."""
    say("capture and price")
    prepared = dataclasses.replace(prepare_example(example, settings.costs), least_limit_s=settings.least_s)
    eager = eager_step(example, prepared)
    say("solve least")
    least = _least(prepared, eager, settings)
    budgets = {f"{f:.0%}".replace("%", " %"): eager.budget_bytes(f) for f in settings.fractions}
    budgets["least"] = least.budget_bytes
    plans: dict[str, Plan] = {}
    needs: dict[str, int] = {}
    for label, budget in budgets.items():
        if label == "least":
            plans[label] = least
            continue
        say(f"solve {label}")
        try:
            plans[label] = prepared.plan_bytes(budget, search=Search(time_limit_s=settings.solve_s))
        except InfeasibleBudgetError as error:
            needs[label] = error.minimum_bytes
    trials: dict[str, Trial] = {}
    for label in budgets:
        say(f"measure {label}")
        if label in plans:
            trials[label] = trial(plans[label], example, eager)
    say("train")
    runners = planned_copies(example.model, list(plans.values()))
    ran = race(runners, example.inputs, example.loss_fn, steps=settings.steps)
    del runners
    return _rows(example, prepared, eager, budgets, plans, needs, trials, ran), plans[
        next((label for label in reversed(budgets) if label in plans and label != "least"), "least")
    ]


def _least(prepared: PricedStep, eager: Eager, settings: Settings) -> Plan:
    """The plan of the least budget; where that one would mostly recompute, of one a little above."""
    for rise in RISES:
        budget = prepared.minimum_peak_bytes + int(rise * eager.above_bytes)
        plan = prepared.plan_bytes(budget, search=Search(time_limit_s=settings.solve_s))
        if plan.overhead <= settings.patience:
            break
    return plan


def _rows(
    example: Example,
    prepared: PricedStep,
    eager: Eager,
    budgets: Mapping[str, int],
    plans: Mapping[str, Plan],
    needs: Mapping[str, int],
    trials: Mapping[str, Trial],
    ran: Race,
) -> list[Row]:
    rows = []
    place = {label: k for k, label in enumerate(plans)}
    for label, budget in budgets.items():
        row = Row(example.name, label, len(prepared.graph.ops), eager.peak_bytes, budget)
        if label in needs:
            rows.append(dataclasses.replace(row, needs_bytes=needs[label]))
            continue
        plan, k = plans[label], place[label]
        rows.append(
            dataclasses.replace(
                row,
                predicted_bytes=plan.peak_bytes,
                overhead=plan.overhead,
                gap=plan.gap,
                trial=trials[label],
                time_ratio=ran.ratios[k],
                same_losses=ran.losses[k + 1] == ran.losses[0],
            )
        )
    return rows


# ---------------------------------------------------------------------------------------- showing

_HEAD = (
    "model", "ops", "eager MB", "budget", "MB", "predicted MB", "measured MB",
    "extra FLOPs", "extra time", "step time", "gap", "gradients, losses",
)  # fmt: skip


def table(demo: Demo) -> str:
    """The rows as aligned text under a caption that says what each figure is."""
    body = [_cells(row, demo.rows[k - 1] if k else None) for k, row in enumerate(demo.rows)]
    lines = [_caption(demo), "", *aligned([_HEAD, *body], "lrrlrrrrrrrl", ruled=True)]
    return "\n".join(lines)


def _caption(demo: Demo) -> str:
    return f"""\
Training steps (forward, backward, SGD) on {demo.device}, torch {torch.__version__}; MB are 10^6 bytes, all of
the step's. A budget of 75 % is what is resident (parameters, buffers, inputs) plus 75 % of what the eager
step's measured peak adds to it; "least" is the lowest budget found whose plan at most doubles the step.
"predicted" is the plan's peak, "measured" is counted without knowing the plan. "extra FLOPs" are counted
while running, as a share of eager's; "extra time" is what the plan expects of recomputation; "step time" is
measured, planned over eager, taking turns. "gap": at most so many points of step time could still be saved
at this budget, proved. The last column compares outputs, gradients, buffers and random state after a step,
and the losses of {demo.steps} training steps, with eager's, bit for bit."""


def _cells(row: Row, above: Row | None) -> tuple[str, ...]:
    repeated = above is not None and above.model == row.model
    named = ("", "", "") if repeated else (row.model, str(row.ops), _mb(row.eager_bytes))
    start = (*named, row.label, _mb(row.budget_bytes))
    t = row.trial
    if t is None:
        return (*start, f"infeasible: needs {bytes_text(row.needs_bytes or 0)}", *[""] * 6)
    equal = t.comparison.equal and row.same_losses
    return (
        *start,
        _mb(row.predicted_bytes),
        _mb(t.peak_bytes),
        f"{t.recompute_flops / t.flops:.1%}" if t.flops else "-",
        f"{row.overhead:.1%}",
        f"{row.time_ratio:.2f}x",
        f"{100 * row.gap:.2f}",
        "equal" if equal else "DIFFER",
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"


def draw(plans: Sequence[Plan], out: Path) -> Path | None:
    """Memory over the step of each plan, before and after, with its budget: ``out/memory.png``.

    ``None`` if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    columns = min(2, len(plans))
    height = -(-len(plans) // columns)
    figure = Figure(figsize=(7.5 * columns, 3.6 * height), layout="constrained")
    FigureCanvasAgg(figure)
    for k, plan in enumerate(plans):
        plan.plot_memory(figure.add_subplot(height, columns, k + 1))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "memory.png"
    figure.savefig(path, dpi=120)
    return path


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def prefixed(tell: Tell, name: str) -> Tell:
    """``tell``, saying ``name: `` before each phase."""
    return lambda what: tell(f"{name}: {what}")


def _silent(_: str) -> None:
    return
