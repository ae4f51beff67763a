"""What each command of ``python -m planner`` does: arguments in, an :class:`Outcome` out.

What they need is imported by each: ``--help`` waits for nothing, and what only looks at saved plans does
without torch.

Nothing here prints: the result is text for stdout, and whatever runs meanwhile (progress, warnings, the
user's own prints) belongs on stderr.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from planner.errors import InfeasibleBudgetError, PlannerError
from planner.files import write_whole
from planner.progress import Bar

if TYPE_CHECKING:
    from planner.plans.plan_data import PlanData

__all__ = ["CANNOT", "FAILED", "HELD", "INTERRUPTED", "Outcome"]

T = TypeVar("T")

HELD, FAILED, CANNOT, INTERRUPTED = 0, 1, 2, 130

_NOT_TRAINING = "note: {} is in evaluation mode and was planned so; to plan its training return model.train()"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``text`` for stdout, ``notes`` for stderr, and the exit code."""

    text: str
    code: int = HELD
    notes: tuple[str, ...] = ()


# -- plans ----------------------------------------------------------------------------------------


def _of_step(arguments: Namespace) -> dict[str, Any]:
    """The options of every command that captures a step, as the planner names them."""
    from planner.cli import user_code as factories

    return {
        "loss_fn": _loss(arguments),
        "optimizer": factories.optimizer(arguments.optimizer, arguments.model),
        "costs": arguments.costs,
        "outputs": arguments.outputs,
        "capture": arguments.capture,
        "chunk_loss": _chunk_loss(arguments.chunk_loss),
        "time_limit_s": arguments.time_limit,
        "progress": _shown(arguments),
    }


def _chunk_loss(given: str) -> Any:
    """What ``--chunk-loss`` says; what is none of its words and no number is refused by the planner."""
    words = {"yes": True, "no": False}
    return int(given) if given.isdecimal() else words.get(given, given)


def plan(arguments: Namespace) -> Outcome:
    """Plan a model; its summary, or its figures as JSON."""
    import planner
    from planner.cli import user_code as factories

    _writable(arguments.out)
    built = factories.build(arguments.model, arguments.inputs, fake=arguments.fake)
    try:
        made = planner.plan(
            built.model,
            arguments.budget_gb,
            built.inputs,
            solver=arguments.solver,
            dynamic=arguments.dynamic,
            calibrate=arguments.calibrate,
            order=arguments.order,
            **_of_step(arguments),
        )
    except InfeasibleBudgetError as error:
        return _no_plan(error, arguments)
    notes = [] if built.model.training else [_NOT_TRAINING.format(made.model_name)]
    if arguments.out is not None:
        made.save(arguments.out)
        notes.append(f"written to {arguments.out}; look again with: show {arguments.out}")
    return Outcome(_json(figures(made)) if arguments.json else made.summary(), HELD, tuple(notes))


def estimate(arguments: Namespace) -> Outcome:
    """What a step takes; with a budget, whether it fits."""
    import planner
    from planner.cli import user_code as factories

    built = factories.build(arguments.model, arguments.inputs, fake=arguments.fake)
    found = planner.estimate(built.model, built.inputs, **_of_step(arguments))
    notes = () if built.model.training else (_NOT_TRAINING.format(found.model_name),)
    fit = None if arguments.budget_gb is None else found.fits(arguments.budget_gb)
    code = HELD if fit is None or fit else FAILED
    if arguments.json:
        told = None if fit is None else dataclasses.asdict(fit)
        return Outcome(_json(dataclasses.asdict(found) | {"fit": told}), code, notes)
    return Outcome(str(found) if fit is None else f"{found}\n\n{fit}", code, notes)


def largest(arguments: Namespace) -> Outcome:
    """The largest batch that a budget has a plan for."""
    import planner
    from planner.cli import user_code as factories

    _can_draw(arguments.plot)
    built = factories.build(arguments.model, arguments.inputs, fake=arguments.fake)
    try:
        found = planner.largest_batch(
            built.model,
            arguments.budget_gb,
            factories.named(arguments.make_batch, beside=arguments.model),
            at_most_overhead=arguments.at_most_overhead,
            low=arguments.low,
            high=arguments.high,
            solver=arguments.solver,
            **_of_step(arguments),
        )
    except InfeasibleBudgetError as error:
        return _no_plan(error, arguments)
    text = _json(found.figures()) if arguments.json else str(found)
    return Outcome(text, HELD, _drawn(found.plot, arguments.plot))


def show(arguments: Namespace) -> Outcome:
    """A saved plan: its summary, and on request a page and pictures."""
    from planner.view import display

    made = _loaded(arguments.plan)
    notes = []
    if arguments.html is not None:
        write_whole(arguments.html, page(made))
        notes.append(f"written to {arguments.html}")
    if arguments.plot is not None:
        notes += [f"written to {path}" for path in pictures(made, arguments.plot)]
    return Outcome(_json(figures(made)) if arguments.json else display.summary(made), HELD, tuple(notes))


def explain(arguments: Namespace) -> Outcome:
    """Why a value of a saved plan is kept or recomputed."""
    from planner.view import explain as view

    why = view.explain(_loaded(arguments.plan), arguments.name)
    if not arguments.json:
        return Outcome(str(why))
    record = dataclasses.asdict(why) | {"bytes": why.bytes}
    for key in ("if_kept", "if_recomputed"):
        if record[key] is not None:
            del record[key]["sequence"]
    return Outcome(_json(record))


def diff(arguments: Namespace) -> Outcome:
    """Two saved plans side by side."""
    from planner.view import diff as view

    found = view.diff(_loaded(arguments.first), _loaded(arguments.second))
    return Outcome(_json(dataclasses.asdict(found)) if arguments.json else str(found))


def snapshot(arguments: Namespace) -> Outcome:
    """A saved plan as a memory snapshot."""
    from planner.view import snapshot as view

    made = _loaded(arguments.plan)
    view.save(made, arguments.out)
    how = f"python -m torch.cuda._memory_viz trace {arguments.out}"
    note = f"drop it on https://pytorch.org/memory_viz, or: {how}"
    return Outcome(f"{arguments.out}: {made.model_name}, peak {made.peak_bytes} bytes", HELD, (note,))


def verify(arguments: Namespace) -> Outcome:
    """Run a step with and without a saved plan and compare."""
    from planner.cli import user_code as factories
    from planner.plan import load

    made = _from_file(arguments.plan, load)
    built = factories.build(arguments.model, arguments.inputs)
    report = made.verify(built.model, built.inputs, loss_fn=_loss(arguments))
    code = HELD if report.ok else FAILED
    if arguments.json:
        kinds = (int, float, str, tuple)
        record = {k: v for k, v in dataclasses.asdict(report).items() if isinstance(v, kinds)}
        record |= {"ok": report.ok, "equal": report.equal, "within_budget": report.within_budget}
        return Outcome(_json(record), code)
    return Outcome(str(report), code)


def frontier(arguments: Namespace) -> Outcome:
    """Overhead against budget."""
    import planner
    from planner.cli import user_code as factories

    _can_draw(arguments.plot)
    built = factories.build(arguments.model, arguments.inputs, fake=arguments.fake)
    curve = planner.frontier(
        built.model,
        built.inputs,
        arguments.budgets_gb,
        points=arguments.points,
        solver=arguments.solver,
        **_of_step(arguments),
    )
    text = _json(dataclasses.asdict(curve)) if arguments.json else str(curve)
    return Outcome(text, HELD, _drawn(curve.plot, arguments.plot))


# -- the demo and the CUDA check ------------------------------------------------------------------


def demo(arguments: Namespace) -> Outcome:
    """Five models, planned and trained."""
    import torch

    from planner.checks import demo

    settings = demo.QUICK if arguments.quick else demo.FULL
    if arguments.models:
        settings = dataclasses.replace(settings, models=tuple(arguments.models))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with PhaseBar(settings.phases) as bar:
        shown = demo.run(settings, device=device, out=arguments.out, tell=bar.tell)
    picture = (
        f"memory over the step: {shown.picture}"
        if shown.picture
        else "no picture: matplotlib is not installed"
    )
    return _judged(f"{shown}\n\ntotal {shown.seconds:.0f} s; {picture}", shown.failures())


def check_cuda(arguments: Namespace) -> Outcome:
    """The demo's measurements on a GPU."""
    from planner.checks import cuda_check

    results: Path | None = arguments.results
    _writable(results)
    settings = cuda_check.settings_of(arguments.device, size=arguments.size, quick=arguments.quick)
    if arguments.models:
        settings = dataclasses.replace(settings, models=tuple(arguments.models))
    with PhaseBar(settings.phases) as bar:
        found = None if results is None else partial(cuda_check.append_rows, results)
        check = cuda_check.run(settings, bar.tell, found)
    told = f"total {check.seconds:.0f} s"
    if results is not None:
        told += f"; {len(check.rows)} lines appended to {results}"
    return _judged(f"{check}\n\n{told}", check.failures())


def _judged(text: str, failures: Any) -> Outcome:
    failed = tuple(f"FAILED {line}" for line in failures)
    return Outcome(text, FAILED if failed else HELD, failed)


# -- results --------------------------------------------------------------------------------------


def figures(made: PlanData) -> dict[str, Any]:
    """The numbers of a plan for other programs: bytes, seconds, shares of step time."""
    names = (
        "model_name", "device", "torch_version", "budget_bytes", "peak_bytes", "baseline_peak_bytes",
        "floor_bytes", "optimizer_step_bytes", "overhead", "overhead_bound", "gap", "status", "step_s",
        "recompute_s", "step_flops", "recompute_flops", "op_count", "peak_op", "peak_module", "solver",
        "solve_s", "searched_on", "cost_source", "cost_device", "fingerprint",
    )  # fmt: skip
    count = Counter(p.decision for p in made.placements)
    size = Counter[str]()
    for p in made.placements:
        size[p.decision] += p.bytes
    return {
        **{name: getattr(made, name) for name in names},
        "minimum_peak_bytes": made.minimum_if_known,
        "outputs": dict(made.outputs),
        "breakdown": dict(made.breakdown),
        "decisions": {d: {"values": count[d], "bytes": size[d]} for d in ("save", "recompute", "free")},
    }


def infeasible(error: InfeasibleBudgetError) -> dict[str, Any]:
    """What there is to know of a budget that no plan fits."""
    return {
        "status": "infeasible",
        "budget_bytes": error.budget_bytes,
        "minimum_bytes": error.minimum_bytes,
        "floor_bytes": error.floor_bytes,
        "breakdown": dict(error.breakdown),
    }


def page(made: PlanData) -> str:
    """The plan's HTML as a page of its own."""
    import html

    from planner.view import display

    title = html.escape(f"{made.model_name} in {made.budget_bytes / 1e9:.4g} GB")
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>\n"
        "<meta name='viewport' content='width=device-width'>\n"
        "<style>:root{color-scheme:light dark}body{margin:2em auto;max-width:62em;padding:0 1em}</style>\n"
        f"</head><body>\n{display.html(made)}\n</body></html>\n"
    )


def pictures(made: PlanData, folder: Path) -> list[Path]:
    """``memory.png`` and ``placements.png`` in ``folder``."""
    from planner.view.depth import plot_placements
    from planner.view.plots import plot_memory

    _needs_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, Callable[[], Any]]] = [
        ("memory.png", partial(plot_memory, made)),
        ("placements.png", partial(plot_placements, made)),
    ]
    paths = []
    for name, draw in drawn:
        _draw(draw(), folder / name)
        paths.append(folder / name)
    return paths


def _no_plan(error: InfeasibleBudgetError, arguments: Namespace) -> Outcome:
    return Outcome(_json(infeasible(error)) if arguments.json else "", FAILED, (str(error),))


def _drawn(draw: Callable[[], Any], path: Path | None) -> tuple[str, ...]:
    """The note of a picture that was asked for, drawn now."""
    if path is None:
        return ()
    _draw(draw(), path)
    return (f"written to {path}",)


def _draw(axes: Any, path: Path) -> None:
    axes.figure.savefig(path, bbox_inches="tight")


def _needs_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError:
        raise PlannerError("pictures need matplotlib: pip install 'rematplan[notebooks]'") from None
    matplotlib.use("Agg")


def _loaded(path: Path) -> PlanData:
    """A saved plan as data, for looking."""
    from planner.plans.reading import load

    return _from_file(path, load)


def _from_file(path: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(path)
    except FileNotFoundError:
        raise PlannerError(f"there is no file {path}; `plan ... --out {path}` writes one") from None


def _loss(arguments: Namespace) -> Any:
    from planner.cli import user_code as factories

    return None if arguments.loss is None else factories.named(arguments.loss, beside=arguments.model)


def _shown(arguments: Namespace) -> bool:
    """Whether to draw progress: not if told, nor without tqdm."""
    return not arguments.quiet and Bar.is_possible()


def _can_draw(path: Path | None) -> None:
    """``PlannerError`` if a picture is asked for and cannot be drawn: said before the minutes of work."""
    if path is not None:
        _needs_matplotlib()
    _writable(path)


def _writable(path: Path | None) -> None:
    """``PlannerError`` if nothing can be written at ``path``: said before the minutes of work."""
    if path is not None and not path.absolute().parent.is_dir():
        raise PlannerError(f"there is no folder {path.absolute().parent} to write {path.name} to")


def _json(record: Any) -> str:
    return json.dumps(record, indent=2, default=str)


class PhaseBar:
    """A bar of known length on stderr; silent where tqdm is not installed."""

    def __init__(self, phases: int) -> None:
        import sys

        self._bar: Any = None
        if Bar.is_possible():
            from tqdm import tqdm

            self._bar = tqdm(
                total=phases, file=sys.stderr, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
            )
        self._started = False

    def tell(self, phase: str) -> None:
        """A new phase begins, so the one before it is done."""
        if self._bar is not None:
            self._bar.update(1 if self._started else 0)
            self._bar.set_description(f"{phase:<28}")
        self._started = True

    def __enter__(self) -> PhaseBar:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(0 if failed else 1)
            self._bar.close()
