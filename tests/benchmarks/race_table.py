"""The race as a table, and what must hold judged from its rows.

A verdict is held, failed, or not measured, with its figures beside it.  On a CPU those on seconds are told
for what they are, figures of a busy machine at small sizes, and fail nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from planner.view.text import aligned
from tests.benchmarks.race_methods import is_compiled
from tests.benchmarks.race_rows import Row

__all__ = ["Verdict", "markdown", "table", "verdicts"]

MISPREDICTED_BYTES, MISPREDICTED_S = 0.01, 0.05
ABOVE_BOUND = 0.02
SHARE_OF_FLAG = 0.6
NOTHING_RECOMPUTED = 1.02
PEERS = ("hf", "sac")
# Times what two eager steps differ by: kernels that add atomically round anew each time.
NOISE = 4.0


@dataclass(frozen=True)
class Verdict:
    """One thing that must hold for one family; ``held`` is ``None`` where it was not measured.

    ``needs_gpu``  it is about seconds or kernels, which only a GPU that runs nothing else can settle.
    """

    claim: str
    model: str
    figures: str
    held: bool | None
    needs_gpu: bool = False
    on_cpu: bool = False

    @property
    def failed(self) -> bool:
        return self.held is False and not (self.needs_gpu and self.on_cpu)

    @property
    def word(self) -> str:
        if self.held is None:
            return "not measured"
        word = "held" if self.held else "FAILED" if self.failed else "not held"
        return f"{word} (CPU)" if self.on_cpu else word


# -------------------------------------------------------------------------------------- verdicts


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All that must hold, family by family, from the rows of one machine."""
    found: list[Verdict] = []
    for model in dict.fromkeys(row.model for row in rows if row.part in ("race", "batch")):
        found += _of_model(model, [row for row in rows if row.model == model])
    found += [
        Verdict("same kernels as eager", row.label, _kernels(row), not row.kernels_differ, True, _cpu(row))
        for row in rows
        if row.part == "kernels" and row.status == "ok"
    ]
    return found


def _of_model(model: str, rows: list[Row]) -> list[Verdict]:
    race = {(row.method, row.label): row for row in rows if row.part == "race" and row.status == "ok"}
    on_cpu = any(_cpu(row) for row in rows)
    ours = {label: row for (method, label), row in race.items() if method == "ours"}
    eager = race.get(("eager", ""))
    calibrated = [row for (method, _), row in race.items() if method == "ours-calibrated"]
    found = [
        *_memory(model, ours, calibrated),
        *_seconds(model, eager, ours),
        *_peers(model, eager, race, ours),
    ]
    found += _gradients(model, eager, ours)
    found += _batches(model, [row for row in rows if row.part == "batch"])
    return [Verdict(v.claim, v.model, v.figures, v.held, v.needs_gpu, on_cpu) for v in found]


def _memory(model: str, ours: dict[str, Row], calibrated: list[Row]) -> Iterator[Verdict]:
    sized = [r for r in ours.values() if r.allocated_bytes and r.budget_bytes and r.predicted_bytes]
    worst = max(((r.allocated_bytes or 0) / (r.budget_bytes or 1) for r in sized), default=None)
    yield _most("allocated <= budget", model, worst, 1.0, f"worst of {len(sized)}: {{:.4f}} of the budget")
    reserved = [r.reserved_bytes / r.budget_bytes for r in calibrated if r.reserved_bytes and r.budget_bytes]
    if reserved:
        yield _most("reserved <= budget, calibrated", model, max(reserved), 1.0, "{:.4f} of the budget")
    off = [
        abs(r.predicted_bytes / r.allocated_bytes - 1)
        for r in sized
        if r.predicted_bytes and r.allocated_bytes
    ]
    yield _most(
        "predicted peak within 1 %", model, max(off, default=None), MISPREDICTED_BYTES, "worst: {:.2%}"
    )


def _seconds(model: str, eager: Row | None, ours: dict[str, Row]) -> Iterator[Verdict]:
    off = [abs(r.predicted_step_s / r.step_s - 1) for r in ours.values() if r.predicted_step_s and r.step_s]
    yield _most(
        "predicted time within 5 %", model, max(off, default=None), MISPREDICTED_S, "worst: {:.1%}", True
    )
    everything = ours.get("all")
    ratio = None
    if everything is not None and everything.step_s and everything.eager_step_s:
        ratio = everything.step_s / everything.eager_step_s
    yield _most(
        "nothing recomputed <= 1.02x eager", model, ratio, NOTHING_RECOMPUTED, "{:.3f}x", needs_gpu=True
    )
    for label in ("70%", "50%"):
        row, claim = ours.get(label), f"overhead at {label} <= bound + 2 points"
        if row is None or row.step_s is None or eager is None or not eager.step_s:
            yield Verdict(claim, model, "", None, True)
            continue
        overhead, bound = row.step_s / eager.step_s - 1, row.overhead_bound or 0.0
        yield Verdict(
            claim,
            model,
            f"{overhead:.1%} measured, {bound:.1%} proved",
            overhead <= bound + ABOVE_BOUND,
            True,
        )


def _peers(
    model: str, eager: Row | None, race: dict[tuple[str, str], Row], ours: dict[str, Row]
) -> Iterator[Verdict]:
    for peer in PEERS:
        claim, other, mine = (
            f"not slower than {peer} at its peak",
            race.get((peer, "")),
            ours.get(f"at {peer}"),
        )
        if other is None or mine is None or not other.step_s or not mine.step_s:
            yield Verdict(claim, model, "", None, True)
            continue
        ratio = mine.step_s / other.step_s
        yield _most(claim, model, ratio, 1.0, "{:.3f} of its step time", needs_gpu=True)
        if peer == "hf" and eager is not None and eager.step_s:
            theirs = other.step_s - eager.step_s
            share = (mine.step_s - eager.step_s) / theirs if theirs > 0 else None
            yield _most(
                "<= 0.6 of the flag's extra time", model, share, SHARE_OF_FLAG, "{:.2f}", needs_gpu=True
            )
    for (method, _), other in race.items():
        if not is_compiled(method) or not other.allocated_bytes or not other.step_s:
            continue
        fitting = [r for r in ours.values() if r.step_s and (r.allocated_bytes or 0) <= other.allocated_bytes]
        best = min((r.step_s for r in fitting if r.step_s), default=None)
        text = (
            "no plan of ours is as low"
            if best is None
            else f"ours takes {best / other.step_s:.3f} of its time"
        )
        yield Verdict(f"beside {method} (told, not judged)", model, text, None, True)


def _gradients(model: str, eager: Row | None, ours: dict[str, Row]) -> Iterator[Verdict]:
    errors = [r.grad_rel_err for r in ours.values() if r.grad_rel_err is not None]
    if not errors or eager is None or eager.grad_rel_err is None:
        yield Verdict("gradients as eager's", model, "", None)
        return
    noise = eager.grad_rel_err
    text = f"worst {max(errors):.1e}, two eager steps {noise:.1e}"
    yield Verdict("gradients as eager's", model, text, max(errors) <= NOISE * noise)


def _batches(model: str, rows: list[Row]) -> Iterator[Verdict]:
    for label in dict.fromkeys(row.label for row in rows):
        at = {row.method: row.batch for row in rows if row.label == label and row.status == "ok"}
        mine, others = at.pop("ours", None), at
        claim = f"largest batch in {label} >= every peer's"
        if mine is None or not others:
            yield Verdict(claim, model, "", None)
            continue
        text = f"{mine}; " + ", ".join(f"{method} {batch}" for method, batch in others.items())
        yield Verdict(claim, model, text, mine >= max(others.values()))


def _most(
    claim: str, model: str, value: float | None, most: float, text: str, needs_gpu: bool = False
) -> Verdict:
    if value is None:
        return Verdict(claim, model, "", None, needs_gpu)
    return Verdict(claim, model, text.format(value), value <= most, needs_gpu)


def _cpu(row: Row) -> bool:
    return row.machine.is_cpu


def _kernels(row: Row) -> str:
    differ = row.kernels_differ or {}
    return ", ".join(f"{name[:40]} {count:+d}" for name, count in differ.items()) or "no difference"


# ----------------------------------------------------------------------------------------- tables

_HEAD = (
    "model", "batch", "method", "budget", "budget MB", "allocated MB", "reserved MB", "predicted",
    "step ms", "x eager", "predicted", "bound", "items/s", "setup s", "gradients",
)  # fmt: skip
_BATCH_HEAD = (
    "model", "cap", "method", "largest batch", "failed at", "tries", "allocated MB", "reserved MB", "items/s",
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text: the race, then the largest batches, then what did not run and why."""
    lines: list[str] = []
    race, batches = _race_cells(rows), _batch_cells(rows)
    if race:
        lines += aligned([_HEAD, *race], "lrll" + "r" * 11, ruled=True)
    if batches:
        lines += ["", *aligned([_BATCH_HEAD, *batches], "lllrrrrrr", ruled=True)]
    notes = [f"{_name(row)}: {row.status}: {row.note}" for row in rows if row.status != "ok"]
    return [*lines, *(["", *notes] if notes else [])]


def markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown, one section per machine."""
    out = ["# The race", ""]
    for machine in dict.fromkeys((r.gpu, r.driver, r.torch, r.dtype) for r in rows):
        mine = [r for r in rows if (r.gpu, r.driver, r.torch, r.dtype) == machine]
        commits = ", ".join(dict.fromkeys(r.commit for r in mine))
        out += [
            f"## {machine[0]}, driver {machine[1]}, torch {machine[2]}, {machine[3]}, commit {commits}",
            "",
        ]
        for head, cells in ((_HEAD, _race_cells(mine)), (_BATCH_HEAD, _batch_cells(mine))):
            if cells:
                out += [_bar(head), _bar(["---"] * len(head)), *map(_bar, cells), ""]
        told = [(v.word, v.claim, v.model, v.figures) for v in verdicts(mine)]
        out += [
            _bar(("verdict", "what must hold", "model", "figures")),
            _bar(["---"] * 4),
            *map(_bar, told),
            "",
        ]
        out += [f"* {_name(r)}: {r.status}: {r.note}" for r in mine if r.status != "ok"] + [""]
    return "\n".join(out)


def _bar(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _name(row: Row) -> str:
    return f"{row.model}, {row.method} {row.label}".rstrip()


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _relative(error: float | None) -> str:
    return "-" if error is None else "equal" if error == 0 else f"{error:.1e}"


def _race_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    eager = {r.model: r.step_s for r in rows if r.part == "race" and r.method == "eager"}
    cells = []
    for r in rows:
        if r.part != "race" or r.status != "ok":
            continue
        base = r.eager_step_s or eager.get(r.model)
        off = r.predicted_bytes / r.allocated_bytes - 1 if r.predicted_bytes and r.allocated_bytes else None
        cells.append(
            (
                r.model,
                str(r.batch),
                r.method,
                r.label,
                _mb(r.budget_bytes),
                _mb(r.allocated_bytes),
                _mb(r.reserved_bytes),
                "" if off is None else f"{off:+.2%}",
                "" if r.step_s is None else f"{r.step_s * 1e3:.1f}",
                f"{r.step_s / base:.3f}" if r.step_s and base else "",
                f"{r.predicted_step_s / r.step_s - 1:+.1%}" if r.predicted_step_s and r.step_s else "",
                "" if r.overhead_bound is None else f"{1 + r.overhead_bound:.3f}",
                "" if r.items_per_s is None else f"{r.items_per_s:.0f} {r.unit}",
                "" if r.setup_s is None else f"{r.setup_s:.1f}",
                "-"
                if r.grad_rel_err is None
                else "equal"
                if r.grad_rel_err == 0
                else f"{r.grad_rel_err:.1e}",
            )
        )
    return cells


def _batch_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            r.model,
            r.label,
            r.method,
            str(r.batch),
            "" if r.failed_batch is None else str(r.failed_batch),
            str(r.tries or ""),
            _mb(r.allocated_bytes),
            _mb(r.reserved_bytes),
            "" if r.items_per_s is None else f"{r.items_per_s:.0f} {r.unit}",
        )
        for r in rows
        if r.part == "batch" and r.status == "ok"
    ]
