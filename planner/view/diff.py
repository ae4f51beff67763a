"""What changed from one plan to another of the same model: decisions, bytes and seconds, layer by layer.

Values are matched by name, so the two plans must be of one model.  Where only sizes, costs or library
versions differ (another fingerprint, the same values) the difference is shown, and a note says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from planner.errors import PlannerError
from planner.units import DECISIONS, bytes_text, seconds_text
from planner.view.layers import ROOT, layers_of, recompute_seconds
from planner.view.text import aligned

if TYPE_CHECKING:
    import pandas

    from planner.plans.plan_data import Decision, Placement, PlanData

__all__ = ["Change", "LayerChange", "PlanDiff", "diff"]

_ROWS = 40


@dataclass(frozen=True)
class Change:
    """A value that the two plans treat differently.

    ``before``, ``after``    its decision, "free" where a plan does not hold it at all.
    ``bytes``                of it in the second plan.
    ``recompute_s_before``   seconds spent on running its op again, ``recompute_s_after`` likewise.
    """

    name: str
    module: str
    op: str
    layer: str
    bytes: int
    before: Decision
    after: Decision
    recompute_s_before: float
    recompute_s_after: float


@dataclass(frozen=True)
class LayerChange:
    """A layer: how many of its values changed, and by how much what it keeps and recomputes."""

    layer: str
    changed: int
    kept_bytes: int
    recompute_s: float


@dataclass(frozen=True)
class PlanDiff:
    """From the first plan to the second; printed, it is a table.  Differences are second minus first.

    ``changed``   the values decided otherwise, in order of execution; ``layers`` sums them up.
    ``kept_bytes``, ``recompute_s``, ``peak_bytes``, ``overhead``  by how much each grew, over all layers.
    ``notes``     what to know before reading the numbers side by side.
    """

    model_name: str
    figures: tuple[tuple[str, str, str, str], ...]
    changed: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    kept_bytes: int
    recompute_s: float
    peak_bytes: int
    overhead: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.model_name]
        lines += aligned([("", "first", "second", "change"), *self.figures], "lrrr", indent=2)
        if self.layers:
            shown = sorted(self.layers, key=lambda row: -row.changed)[:_ROWS]
            rows = [row for row in self.layers if row in shown]
            cells = [(r.layer, str(r.changed), _signed(r.kept_bytes), _longer(r.recompute_s)) for r in rows]
            lines += ["", *aligned([("layer", "changed", "kept", "recomputation"), *cells], "lrrr", indent=2)]
            if len(rows) < len(self.layers):
                lines.append(f"  and {len(self.layers) - len(rows)} layers with fewer changes")
        turned = Counter((c.before, c.after) for c in self.changed)
        said = ", ".join(f"{n} {DECISIONS[a]} -> {DECISIONS[b]}" for (a, b), n in turned.most_common())
        lines += ["", f"{len(self.changed)} values decided otherwise" + (f": {said}" if said else "")]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per changed value, columns the fields of :class:`Change` (needs pandas)."""
        try:
            import pandas
        except ImportError:
            raise PlannerError("to_dataframe needs pandas: pip install 'rematplan[notebooks]'") from None
        frame: pandas.DataFrame = pandas.DataFrame(
            [asdict(change) for change in self.changed], columns=list(Change.__dataclass_fields__)
        )
        return frame


def diff(first: PlanData, second: PlanData) -> PlanDiff:
    """What ``second`` does differently from ``first``.

    Raises ``TypeError`` for anything but plans, and ``PlannerError`` for plans of different models.
    """
    from planner.plans.plan_data import PlanData

    for plan in (first, second):
        if not isinstance(plan, PlanData):
            raise TypeError(f"diff compares two plans, got a {type(plan).__name__}")
    before, after = ({p.name: p for p in plan.placements} for plan in (first, second))
    spent = [
        dict(zip((p.name for p in plan.placements), recompute_seconds(plan), strict=True))
        for plan in (first, second)
    ]
    notes = (*_same_model(first, second), *_unlike_outputs(first, second))
    layer = {
        p.name: of.path or ROOT for plan in (first, second) for of in layers_of(plan) for p in of.placements
    }
    order = list(dict.fromkeys((*(p.name for p in second.placements), *before)))
    changed = []
    for name in order:
        was, now = before.get(name), after.get(name)
        shown = now or was
        assert shown is not None
        if _decision(was) != _decision(now):
            changed.append(
                Change(
                    name, shown.module, shown.op, layer[name], shown.bytes, _decision(was), _decision(now),
                    spent[0].get(name, 0.0), spent[1].get(name, 0.0),
                )
            )  # fmt: skip
    kept, took, count = Counter[str](), dict.fromkeys(layer.values(), 0.0), Counter(c.layer for c in changed)
    for name in order:
        kept[layer[name]] += _kept(after.get(name)) - _kept(before.get(name))
        took[layer[name]] += spent[1].get(name, 0.0) - spent[0].get(name, 0.0)
    return PlanDiff(
        second.model_name,
        _figures(first, second),
        tuple(changed),
        tuple(LayerChange(of, count[of], kept[of], took[of]) for of in took if count[of]),
        sum(kept.values()),
        second.recompute_s - first.recompute_s,
        second.peak_bytes - first.peak_bytes,
        second.overhead - first.overhead,
        notes,
    )


def _same_model(first: PlanData, second: PlanData) -> tuple[str, ...]:
    """``PlannerError`` if the plans have different values; a note if they are of different steps."""
    if first.fingerprint == second.fingerprint:
        return ()
    ours, theirs = (
        {(p.name, p.module, p.op) for p in plan.placements if p.op != "rng_state"} for plan in (first, second)
    )
    if first.model_name != second.model_name or ours != theirs:
        alone = len(ours ^ theirs)
        raise PlannerError(
            f"these are plans of different models: {first.model_name} with {first.op_count} ops and "
            f"{second.model_name} with {second.op_count}; {alone} of their values have no counterpart"
        )
    return (
        "note: the plans are of different steps of this model (other sizes, flags or library versions, "
        f"fingerprints {first.fingerprint[:12]} and {second.fingerprint[:12]}); bytes and seconds are each "
        "plan's own",
    )


def _unlike_outputs(first: PlanData, second: PlanData) -> tuple[str, ...]:
    """A note if the plans count on another loop."""
    gone = [", ".join(plan.released) or "none" for plan in (first, second)]
    if gone[0] == gone[1]:
        return ()
    return (
        f"note: of the outputs the first counts {gone[0]} as gone when the backward begins, the second "
        f"{gone[1]}",
    )


def _decision(p: Placement | None) -> Decision:
    return "free" if p is None else p.decision


def _kept(p: Placement | None) -> int:
    return p.bytes if p is not None and p.decision == "save" else 0


def _figures(a: PlanData, b: PlanData) -> tuple[tuple[str, str, str, str], ...]:
    """Name, first, second, change."""

    def size(name: str, x: int, y: int) -> tuple[str, str, str, str]:
        return name, bytes_text(x), bytes_text(y), _signed(y - x)

    def share(name: str, x: float, y: float) -> tuple[str, str, str, str]:
        return name, f"{x:.2%}", f"{y:.2%}", f"{100 * (y - x):+.2f} points" if x != y else "-"

    def time(name: str, x: float, y: float) -> tuple[str, str, str, str]:
        return name, seconds_text(x), seconds_text(y), _longer(y - x)

    return (
        size("budget", a.budget_bytes, b.budget_bytes),
        size("predicted peak", a.peak_bytes, b.peak_bytes),
        size("nothing recomputed", a.baseline_peak_bytes, b.baseline_peak_bytes),
        share("overhead", a.overhead, b.overhead),
        share("proved bound", a.overhead_bound, b.overhead_bound),
        time("recomputation", a.recompute_s, b.recompute_s),
        time("step without it", a.step_s, b.step_s),
        ("status", a.status, b.status, "-" if a.status == b.status else ""),
    )


def _signed(count: int) -> str:
    return ("+" if count > 0 else "") + bytes_text(count) if count else "-"


def _longer(seconds: float) -> str:
    return ("+" if seconds > 0 else "-") + seconds_text(abs(seconds)) if abs(seconds) > 1e-12 else "-"
