"""A plan as text, as a table and as HTML.

All three read only the plan's own fields, so that a plan from a file looks as it did when it was
made, and looking never starts a solver.  The HTML is static: markup and style, no script, colours
that follow the notebook around it; it stays small for any model because values are gathered by
layer and, within a layer, by what happens to them.
"""

from __future__ import annotations

import dataclasses
import html as markup
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.errors import PlannerError
from planner.units import DECISIONS, ByteUnit, bytes_text, gb_text, label, seconds_text
from planner.view.bands import (
    aligned_baseline,
    bands_of,
    highest,
    peak_place,
    picture_title,
    top_bytes,
    turn_of,
)
from planner.view.canvas import FREED, KEPT, RECOMPUTED
from planner.view.layers import ROOT, TEXT_ROWS, Row, layers_of, recompute_seconds, rows_of
from planner.view.text import aligned

if TYPE_CHECKING:
    import pandas

    from planner.plans.frontier_data import FrontierData
    from planner.plans.plan_data import PlanData

__all__ = ["batches_dataframe", "dataframe", "frontier_dataframe", "html", "summary"]

_HTML_ROWS = 40
_HTML_LINES = 24  # within a layer
_HTML_NAME = 120  # characters of a name
_CUTS = 8  # places where a step in regions was cut, at most so many are shown

_HEAD = (*DECISIONS.values(), "extra time")


# -- text -----------------------------------------------------------------------------------------


def summary(plan: PlanData) -> str:
    """One screen of text: budget, peak, overhead and its bound, what fills the peak, layer by layer."""
    unit = ByteUnit.of(plan.peak_bytes)
    parts = [
        [f"{plan.model_name} on {_where(plan)}, torch {plan.torch_version}"],
        aligned([(name, *values) for name, *values in _figures(plan)], "lll", indent=2),
        [f"At the peak, {peak_place(plan)}:"],
        aligned(
            [(label(k), unit.text(b), _share(b, plan.peak_bytes)) for k, b in _filled(plan)], "lrr", indent=2
        ),
        ["Where it is decided:"],
        aligned(
            [("layer", *_HEAD), *_row_cells(plan, unit)],
            "lrrrr",
            indent=2,
        ),
        [_counts(plan)],
    ]
    lines = parts[0] + parts[1] + ["", *parts[2], *parts[3], "", *parts[4], *parts[5], "", *parts[6]]
    return "\n".join(lines)


def _where(plan: PlanData) -> str:
    return f"{plan.planned_for} (captured on {plan.device})" if plan.planned_for else plan.device


def _figures(plan: PlanData) -> list[tuple[str, str, str]]:
    """The numbers a plan is judged by: name, value, remark."""
    flops = plan.recompute_flops / plan.step_flops if plan.step_flops else 0.0
    return [
        ("budget", gb_text(plan.budget_bytes), ""),
        (
            "predicted peak",
            gb_text(plan.peak_bytes),
            f"{_share(plan.peak_bytes, plan.budget_bytes)} of the budget",
        ),
        *_reserved(plan),
        (
            "nothing recomputed",
            gb_text(plan.baseline_peak_bytes),
            f"the plan takes {_share(plan.peak_bytes, plan.baseline_peak_bytes)} of it",
        ),
        ("proved floor", gb_text(plan.floor_bytes), "no plan has a lower peak"),
        (
            "overhead",
            f"{plan.overhead:.2%} of step time",
            f"{seconds_text(plan.recompute_s)} on a step of {seconds_text(plan.step_s)}",
        ),
        (
            "proved bound",
            f"{plan.overhead_bound:.2%} of step time",
            f"gap {100 * plan.gap:.2f} points: {plan.status}"
            if plan.overhead_bound or not plan.overhead
            else "nothing is proved: the gap is unknown",
        ),
        (
            "recomputed FLOPs",
            f"{flops:.2%} of the step's",
            f"{plan.recompute_flops:.4g} on {plan.step_flops:.4g}",
        ),
        *_in_chunks(plan),
        *_order(plan),
        *_measured(plan),
        *_let_go(plan),
        *_regions(plan),
        ("costs", plan.cost_source, plan.cost_device),
        ("solver", plan.solver, f"{seconds_text(plan.solve_s)} to solve{_earlier(plan)}"),
    ]


def _order(plan: PlanData) -> list[tuple[str, str, str]]:
    """Where it is not the traced one, which order bound and floor are for."""
    if plan.order == "given":
        return []
    return [("backward's order", "free", "bound and floor are for the order of this plan")]


def _earlier(plan: PlanData) -> str:
    return f" on {plan.searched_on}, from the cache" if plan.searched_on else ""


def _in_chunks(plan: PlanData) -> list[tuple[str, str, str]]:
    """What the loss in chunks takes, beside the same step with it whole."""
    if not plan.chunked:
        return []
    rows = [("loss in chunks", str(of), "") for of in plan.chunked]
    if plan.whole_step_s:
        whole = f"{seconds_text(plan.whole_step_s)} and {gb_text(plan.whole_peak_bytes)}"
        rows.append(("loss whole", whole, "the step, nothing recomputed"))
    return rows


def _reserved(plan: PlanData) -> list[tuple[str, str, str]]:
    """What the allocator would take from the driver, where there is one that takes more than it hands out."""
    if plan.reserved_bytes is None:
        return []
    reserved = plan.reserved_bytes
    return [("predicted reserved", gb_text(reserved), f"{_share(plan.peak_bytes, reserved)} of it allocated")]


def _measured(plan: PlanData) -> list[tuple[str, str, str]]:
    """What the planned step was measured to take, if it was."""
    if plan.calibration is None:
        return []
    last, count = plan.calibration.last, len(plan.calibration.rounds)
    reserved = "" if last.reserved_bytes is None else f", reserved {gb_text(last.reserved_bytes)}"
    rounds = f"measured in {count} round{'s' * (count > 1)}"
    return [("measured peak", gb_text(last.allocated_bytes), rounds + reserved)]


def _let_go(plan: PlanData) -> list[tuple[str, str, str]]:
    """Which outputs the plan counts as gone when the backward begins, or as beside the next call, if any."""
    rows = [
        ("outputs let go of", plan.released, "before the backward, or the peak is higher"),
        ("outputs kept", plan.kept, "until the next call has returned"),
    ]
    return [(name, ", ".join(which), remark) for name, which, remark in rows if which]


def _regions(plan: PlanData) -> list[tuple[str, str, str]]:
    """How much of a step in regions lies in them, and where it was cut."""
    if not plan.regions:
        return []
    memory, time = (sum(getattr(r, f"{of}_share") for r in plan.regions) for of in ("memory", "time"))
    within = f"{memory:.1%} of the step's memory and {time:.1%} of its time in them"
    cuts = [("cut at", *_place_of(cut)) for cut in plan.cuts[:_CUTS]]
    more = len(plan.cuts) - len(cuts)
    return [
        ("regions", f"{len(plan.regions)} regions", within),
        *cuts,
        *([("cut at", f"{more} more places", "")] if more else []),
    ]


def _place_of(cut: str) -> tuple[str, str]:
    """Where and why, of one of a plan's cuts."""
    found = re.search(r"(\S+:\d+):? (.*)", cut)
    where, why = (found[1].rpartition("/")[2], found[2]) if found else ("", cut)
    return where, textwrap.shorten(why, 100, placeholder=" ...")


def _filled(plan: PlanData) -> list[tuple[str, int]]:
    """What there is at the peak, largest first."""
    return sorted(((k, b) for k, b in plan.breakdown.items() if b), key=lambda item: -item[1])


def _row_cells(plan: PlanData, unit: ByteUnit) -> list[tuple[str, ...]]:
    rows = rows_of(layers_of(plan), TEXT_ROWS)
    cells = [
        (
            row.name,
            unit.text(row.kept_bytes),
            unit.text(row.recomputed_bytes),
            unit.text(row.freed_bytes),
            seconds_text(row.recompute_s),
        )
        for row in rows
    ]
    total = [sum(getattr(row, f"{d}_bytes") for row in rows) for d in ("kept", "recomputed", "freed")]
    return [*cells, ("total", *(unit.text(b) for b in total), seconds_text(plan.recompute_s))]


def _counts(plan: PlanData) -> str:
    count = {d: sum(p.decision == d for p in plan.placements) for d in DECISIONS}
    return (
        f"{len(plan.placements):,} values: {count['save']:,} kept, {count['recompute']:,} recomputed, "
        f"{count['free']:,} freed; {plan.op_count:,} ops in {len(plan.sequence):,} steps"
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


# -- table ----------------------------------------------------------------------------------------


def dataframe(plan: PlanData) -> pandas.DataFrame:
    """One row per value of the forward, in order of execution.

    ``name``, ``module``, ``op``, ``bytes``, ``decision``, ``layer``;
    ``recompute_s``       seconds, 0 where nothing is recomputed; of a call with several outputs the first
                          carries them, so that the column adds up to ``plan.recompute_s``;
    ``times_recomputed``;
    ``made_at``           step of ``plan.sequence`` that makes the value in the forward;
    ``freed_at``          the last step that it is in memory for, until it is recomputed if it is;
    ``recomputed_at``     steps that make it again, a tuple;
    ``freed_again_at``    for each of those, the last step that it is in memory for.

    Raises ``PlannerError`` without pandas.
    """
    pd = _pandas()
    layer = {p.module: layer.path or ROOT for layer in layers_of(plan) for p in layer.placements}
    seconds = recompute_seconds(plan)
    frame: pandas.DataFrame = pd.DataFrame(
        {
            "name": [p.name for p in plan.placements],
            "module": [p.module for p in plan.placements],
            "op": [p.op for p in plan.placements],
            "bytes": [p.bytes for p in plan.placements],
            "decision": [p.decision for p in plan.placements],
            "recompute_s": list(seconds),
            "times_recomputed": [p.times_recomputed for p in plan.placements],
            "made_at": [p.spans[0][0] for p in plan.placements],
            "freed_at": [p.spans[0][1] for p in plan.placements],
            "recomputed_at": [tuple(first for first, _ in p.spans[1:]) for p in plan.placements],
            "freed_again_at": [tuple(last for _, last in p.spans[1:]) for p in plan.placements],
            "layer": [layer[p.module] for p in plan.placements],
        }
    )
    return frame


def frontier_dataframe(frontier: FrontierData) -> pandas.DataFrame:
    """One row per budget.

    ``budget_bytes``, ``peak_bytes``, ``overhead`` and ``overhead_bound`` (shares of step time), ``status``;
    ``saved_per_gb``  share of step time that a GB more saves on the way to the next budget.
    """
    frame: pandas.DataFrame = _pandas().DataFrame([dataclasses.asdict(point) for point in frontier.points])
    return frame.assign(saved_per_gb=list(frontier.saved_per_gb))


def batches_dataframe(found: Any) -> pandas.DataFrame:
    """One row per size of a :class:`planner.sizing.batches.LargestBatch`, and of other ways to train.

    ``way``, "plan" or the other's name; ``batch``; ``peak_bytes`` and, of plans, ``floor_bytes``;
    ``overhead`` and, of plans, ``overhead_bound`` (shares of step time); ``step_s`` without recomputation;
    ``examples_per_s``, predicted; ``status``.
    """
    figures = found.figures()
    rows = [{"way": row.pop("name", "plan"), **row} for row in (*figures["points"], *figures["others"])]
    frame: pandas.DataFrame = _pandas().DataFrame(rows)
    return frame


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise PlannerError("to_dataframe needs pandas: pip install 'rematplan[notebooks]'") from None
    return pandas


# -- HTML -----------------------------------------------------------------------------------------

# No background and no text colour: both are the notebook's.
_STYLE = """
.rematplan{font:13px/1.45 system-ui,sans-serif;max-width:60em}
.rematplan table{border-collapse:collapse;margin:.3em 0 .8em;font-size:inherit;color:inherit}
.rematplan td,.rematplan th{padding:.12em 1em .12em 0;text-align:left;border:0;background:none}
.rematplan .n{text-align:right;font-variant-numeric:tabular-nums}
.rematplan .q{opacity:.7}
.rematplan h4{margin:.9em 0 .2em;font-size:1em}
.rematplan svg{width:100%;height:auto;display:block}
.rematplan i{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 0;border-radius:2px}
.rematplan .key span{margin-right:1.2em;white-space:nowrap}
.rematplan summary,.rematplan .head{display:grid;grid-template-columns:1fr repeat(4,6.2em) 9em;gap:.4em;
 cursor:pointer;border-bottom:1px solid rgba(128,128,128,.25);padding:.15em 0}
.rematplan .head{cursor:default;opacity:.7}
.rematplan summary span:first-child{overflow:hidden;text-overflow:ellipsis}
.rematplan summary small{display:none}
.rematplan summary span:first-child::before{content:'\\25B8';display:inline-block;width:1.1em;opacity:.6}
.rematplan details[open] span:first-child::before{content:'\\25BE'}
.rematplan .bar{align-self:center;line-height:0;white-space:nowrap;margin-left:.6em}
.rematplan .bar i{height:.75em;margin:0;border-radius:0}
.rematplan details>table{margin-left:1.2em}
@media (prefers-color-scheme:dark){.rematplan svg polygon,.rematplan i{opacity:.85}}
"""


def html(plan: PlanData) -> str:
    """The plan for a notebook: figures, memory over the step, the peak, and each layer to unfold.

    Static markup in which every name is escaped; below 300 kB for any model.
    """
    unit = ByteUnit.of(plan.peak_bytes)
    rows = rows_of(layers_of(plan), _HTML_ROWS)
    largest = max((row.total_bytes for row in rows), default=0)
    figures = [[_cell(name), _cell(value), _cell(remark, "q")] for name, value, remark in _figures(plan)]
    kinds = [
        [_cell(label(k)), _cell(unit.text(b), "n"), _cell(_share(b, plan.peak_bytes), "n")]
        for k, b in _filled(plan)
    ]
    return "".join(
        (
            f"<div class='rematplan'><style>{_STYLE}</style>",
            f"<strong>{_text(plan.model_name)}</strong> on {_text(_where(plan))}, ",
            f"torch {_text(plan.torch_version)}",
            _table(figures),
            _svg(plan),
            f"<h4>At the peak, {_text(peak_place(plan))}</h4>",
            _table(kinds),
            "<h4>Where it is decided</h4>",
            "<div class='head'><span>layer</span> ",
            *(f"<span class='n'>{name}</span> " for name in _HEAD),
            "</div>",
            *(_details(row, unit, largest) for row in rows),
            f"<p class='q'>{_text(_counts(plan))}</p></div>",
        )
    )


def _details(row: Row, unit: ByteUnit, largest: int) -> str:
    """A line that unfolds.  What each number is stands beside it for viewers that drop the style sheet."""
    sizes = (row.kept_bytes, row.recomputed_bytes, row.freed_bytes)
    numbers = (*(unit.text(b) for b in sizes), seconds_text(row.recompute_s))
    cells = " ".join(
        f"<span class='n'><small>{name} </small>{_text(c)}</span>"
        for name, c in zip(_HEAD, numbers, strict=True)
    )
    bars = "".join(
        f"<i style='width:{100 * size / largest:.1f}%;background:{color}'></i>"
        for size, color in zip(sizes, (KEPT, RECOMPUTED, FREED), strict=True)
        if size
    )
    head = f"<summary><span>{_text(row.name)}</span> {cells} <span class='bar'>{bars}</span></summary>"
    return f"<details>{head}{_table(_lines(row, unit))}</details>"


def _lines(row: Row, unit: ByteUnit) -> list[list[str]]:
    """Within a row, values of the same module, op and decision together; the largest."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for layer in row.layers:
        for p, seconds in zip(layer.placements, layer.seconds, strict=True):
            inside = p.module[len(layer.path) :].lstrip(".") if layer.numbered else p.module
            sums = groups.setdefault((inside, p.op, p.decision), [0, 0, 0.0])
            sums[0] += 1
            sums[1] += p.bytes
            sums[2] += seconds
    largest = sorted(groups.items(), key=lambda item: -item[1][1])
    lines = [
        [
            _cell(DECISIONS[decision]),
            _cell(f"{inside}: {op}" if inside else op),
            _cell(f"{count:,.0f} x" if count > 1 else "", "n"),
            _cell(unit.text(size), "n"),
            _cell(seconds_text(seconds), "n"),
        ]
        for (inside, op, decision), (count, size, seconds) in largest[:_HTML_LINES]
    ]
    rest = largest[_HTML_LINES:]
    if rest:
        size = unit.text(sum(sums[1] for _, sums in rest))
        lines.append([_cell(""), _cell(f"{len(rest)} smaller"), _cell(""), _cell(size, "n"), _cell("")])
    return lines


def _svg(plan: PlanData, width: int = 640, height: int = 170) -> str:
    """Memory over the step; where there are more steps than pixels, the highest of each pixel's."""
    if not len(plan.timeline):
        return ""
    baseline = aligned_baseline(plan)
    shown, shown_before = highest(plan.timeline, width // 2), highest(baseline, width // 2)
    top = 1.06 * top_bytes(plan)

    def points(level: np.ndarray) -> list[str]:
        x = np.linspace(0.0, width, len(level))
        return [f"{a:.1f},{height * (1 - b / top):.1f}" for a, b in zip(x, level, strict=True)]

    below = np.zeros(len(shown))
    drawn, key = [], []
    for band in bands_of(plan):
        above = below + band.bytes[shown]
        outline = " ".join((*points(above), *reversed(points(below))))
        drawn.append(f"<polygon points='{outline}' fill='{band.color}'/>")
        if band.visible:
            key.append(f"<span><i style='background:{band.color}'></i>{_text(band.name)}</span>")
        below = above
    before = " ".join(points(baseline[shown_before]))
    budget = f"{height * (1 - plan.budget_bytes / top):.1f}"
    turn = turn_of(plan)
    if turn is not None:
        x = f"{width * turn / len(plan.timeline):.1f}"
        drawn.append(
            f"<path d='M{x} 0V{height}' stroke='currentColor' stroke-opacity='.4' stroke-dasharray='1 3'/>"
        )
    return (
        f"<h4>Memory over the step</h4><svg viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='{_text(picture_title(plan))}'>{''.join(drawn)}"
        f"<polyline points='{before}' fill='none' stroke='currentColor' stroke-opacity='.6'/>"
        f"<line x1='0' x2='{width}' y1='{budget}' y2='{budget}' stroke='#d0433b' stroke-dasharray='6 4'/>"
        f"</svg><div class='key'>{' '.join(key)} <span>line: nothing recomputed, "
        f"{bytes_text(plan.baseline_peak_bytes)} at most</span> "
        f"<span>dashed: budget, {bytes_text(plan.budget_bytes)}</span> "
        "<span>dots: the backward begins</span></div>"
    )


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = ("<tr>" + "".join(cells) + "</tr>" for cells in rows)
    return "<table>" + "".join(lines) + "</table>"


def _cell(text: str, css: str = "") -> str:
    return f"<td class='{css}'>{_text(text)}</td>" if css else f"<td>{_text(text)}</td>"


def _text(text: Any) -> str:
    """Escaped, and cut where a name is absurdly long."""
    text = str(text)
    return markup.escape(
        text if len(text) <= _HTML_NAME else text[: _HTML_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )
