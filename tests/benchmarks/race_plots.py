"""The race in two pictures, drawn from the results file alone.

    python -m tests.benchmarks.race_plots [--results FILE] [--out FOLDER]

``race-time-<machine>.png``: seconds of a step against its measured peak, all methods, one panel per family.
``race-predicted-<machine>.png``: predicted against measured, peaks and seconds, all plans.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.race_methods import is_compiled
from tests.benchmarks.race_rows import RESULTS, Row, latest, read

__all__ = ["draw", "draw_predictions", "draw_race"]

_COLOURS = {
    "eager": "black",
    "hf": "tab:orange",
    "sac": "tab:brown",
    "greedy": "tab:green",
    "ours": "tab:blue",
    "ours-calibrated": "tab:cyan",
}
_COMPILED = {
    "compile": "tab:red",
    "compile-budget-0.75": "tab:pink",
    "compile-budget-0.5": "tab:purple",
    "compile-budget-0.25": "tab:olive",
}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Both pictures of every machine that has rows; returns the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        mine = [r for r in rows if r.gpu == gpu and r.part == "race" and r.status == "ok" and r.step_s]
        word = "cpu" if mine and mine[0].machine.is_cpu else "-".join(gpu.lower().split())
        for name, drawn in (("time", draw_race(mine)), ("predicted", draw_predictions(mine))):
            if drawn is not None:
                path = out / f"race-{name}-{word}.png"
                drawn.savefig(path, dpi=110, bbox_inches="tight")
                written.append(path)
    return written


def draw_race(rows: Sequence[Row]) -> Any:
    """A figure of step time against peak; ``None`` without rows."""
    models = list(dict.fromkeys(row.model for row in rows))
    if not models:
        return None
    figure = _figure(figsize=(4.2 * min(4, len(models)), 3.4 * -(-len(models) // 4)))
    for k, model in enumerate(models):
        axes = figure.add_subplot(-(-len(models) // 4), min(4, len(models)), k + 1)
        mine = [r for r in rows if r.model == model and r.allocated_bytes]
        for method in dict.fromkeys(r.method for r in mine):
            points = sorted((r.allocated_bytes or 0, r.step_s or 0.0) for r in mine if r.method == method)
            colour = (_COLOURS | _COMPILED).get(method, "grey")
            marker = "s" if is_compiled(method) else "o"
            line = "-" if method == "ours" else "none"
            x, y = [p[0] / 1e9 for p in points], [p[1] * 1e3 for p in points]
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, markersize=5, label=method)
        axes.set_title(f"{model}, batch {mine[0].batch}", fontsize=9)
        axes.set_xlabel("measured peak, GB")
        axes.set_ylabel("step, ms")
        axes.set_ylim(bottom=0)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=9, fontsize=8, frameon=False)
    figure.suptitle(_title(rows), y=-0.01, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def draw_predictions(rows: Sequence[Row]) -> Any:
    """A figure of predicted against measured peaks and seconds; ``None`` without plans."""
    plans = [r for r in rows if r.predicted_bytes and r.allocated_bytes and r.predicted_step_s and r.step_s]
    if not plans:
        return None
    figure = _figure(figsize=(9, 4.2))
    pairs = (
        (
            "peak, GB",
            [((r.allocated_bytes or 0) / 1e9, (r.predicted_bytes or 0) / 1e9, r.model) for r in plans],
        ),
        ("step, ms", [((r.step_s or 0) * 1e3, (r.predicted_step_s or 0) * 1e3, r.model) for r in plans]),
    )
    for k, (name, points) in enumerate(pairs):
        axes = figure.add_subplot(1, 2, k + 1)
        ends = [min(min(p[:2]) for p in points), max(max(p[:2]) for p in points)]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        for model in dict.fromkeys(p[2] for p in points):
            mine = [p for p in points if p[2] == model]
            axes.plot([p[0] for p in mine], [p[1] for p in mine], "o", markersize=4, label=model)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"measured {name}")
        axes.set_ylabel(f"predicted {name}")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(_title(rows), y=-0.01, fontsize=8)
    figure.tight_layout()
    return figure


def _figure(figsize: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    FigureCanvasAgg(figure)  # no window, whatever the caller's backend is
    return figure


def _title(rows: Sequence[Row]) -> str:
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    return f"{rows[0].gpu}, torch {rows[0].torch}, {rows[0].dtype}, commit {commits}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; 2 if there is nothing to draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    given = parser.parse_args(arguments)
    written = draw(latest(read(given.results)), given.out)
    for path in written:
        print(path)
    if not written:
        print(f"race_plots: no measured rows in {given.results}", file=sys.stderr)
    return 0 if written else 2


if __name__ == "__main__":
    sys.exit(main())
