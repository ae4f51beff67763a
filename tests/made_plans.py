"""Plans made by hand, and a real one, for the tests of what plans show of themselves."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from planner import Placement, Plan
from planner.options import Search
from planner.solving.priced import prepare
from tests.models import CASES

MB = 10**6


@functools.cache
def planned_gpt2() -> Plan:
    """A real plan at about half of what keeping everything takes."""
    case = CASES["gpt2"]
    step = prepare(case.build(), case.make_inputs(0), costs="roofline")
    return step.plan_bytes(round(0.55 * step.baseline.peak_bytes), search=Search("greedy"))


def made_plan(placements: list[Placement], **changes: object) -> Plan:
    """A plan whose step is: make every value, turn, recompute what is to be; one byte count per step."""
    again = [p for p in placements if p.decision == "recompute"]
    names = [p.name for p in placements]
    sequence = (*names, "turn", *(p.name for p in reversed(again)))
    runs: dict[str, list[int]] = {}
    for t, name in enumerate(sequence):
        runs.setdefault(name, []).append(t)
    end = len(sequence) - 1
    placements = [
        dataclasses.replace(p, spans=tuple((t, end if p.decision == "save" else t) for t in runs[p.name]))
        for p in placements
    ]
    saved = np.cumsum([p.bytes if p.decision == "save" else 0 for p in placements] + [0] * (1 + len(again)))
    remade = np.array([0] * (len(names) + 1) + [p.bytes for p in reversed(again)])
    flying = np.array([0] * len(names) + [MB] * (1 + len(again)))
    by_kind = {
        "parameters": np.full(len(sequence), 5 * MB),
        "saved": saved,
        "recomputed": remade,
        "gradients_in_flight": flying,
    }
    timeline = sum(by_kind.values())
    peak = int(np.argmax(timeline))
    everything = 5 * MB + np.cumsum([p.bytes for p in placements] + [MB])
    recompute_s = sum(p.seconds * p.times_recomputed for p in placements)
    fields: dict[str, object] = {
        "model_name": "Made",
        "budget_bytes": int(timeline.max()) + MB,
        "peak_bytes": int(timeline.max()),
        "baseline_peak_bytes": int(everything.max()),
        "overhead": recompute_s / 2.0,
        "overhead_bound": recompute_s / 4.0,
        "status": "feasible",
        "placements": tuple(placements),
        "breakdown": {k: int(v[peak]) for k, v in by_kind.items()},
        "timeline": timeline,
        "timeline_by_kind": by_kind,
        "baseline_timeline": everything,
        "sequence": sequence,
        "op_count": len(everything),
        "step_s": 2.0,
        "step_flops": 1000,
        "recompute_flops": 125,
        "floor_bytes": 6 * MB,
        "optimizer_step_bytes": 0,
        "solver": "made",
        "solve_s": 0.25,
        "cost_source": "roofline",
        "cost_device": "an abacus",
        "device": "cpu",
        "torch_version": "0.0",
        "fingerprint": "0" * 64,
        "peak_op": sequence[peak],
        "peak_module": next((p.module for p in placements if p.name == sequence[peak]), ""),
        "differentiated": (),
        "inputs": {},
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def value(name: str, module: str, decision: str = "save", size: int = MB, op: str = "aten.mm") -> Placement:
    times = int(decision == "recompute")
    return Placement(name, module, op, size, decision, 0.01, times, name, ())  # type: ignore[arg-type]


def stack(depth: int, decisions: str = "srf") -> list[Placement]:
    """``depth`` layers below ``net.h``, each of a saved, a recomputed and a freed value, between two ends."""
    words = {"s": "save", "r": "recompute", "f": "free"}
    inner = [
        value(f"v{i}_{k}", f"net.h.{i}.{part}", words[d])
        for i in range(depth)
        for k, (part, d) in enumerate(zip(("norm", "mlp", "mlp"), decisions, strict=True))
    ]
    return [value("first", "net.embed"), *inner, value("last", "head")]
