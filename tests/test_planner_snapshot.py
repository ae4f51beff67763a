"""The prediction as a memory snapshot: torch's own reader takes it, its peak is the plan's to the byte."""

from __future__ import annotations

import copy
import pickle
import pickletools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz as viz

import planner
from planner import Plan
from planner.memory.lifetimes import MEMORY_KINDS
from planner.options import Search
from planner.solving.priced import PricedStep, prepare
from planner.view import snapshot
from tests import tiny

# What the web viewer's own pickle reader knows (torch/utils/viz/MemoryViz.js), by pickletools' names.
VIEWER_READS = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "BINUNICODE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip


@pytest.fixture(scope="module")
def step() -> PricedStep:
    model = tiny.seeded(tiny.gpt2)
    return prepare(model, tiny.gpt2_batch(), costs="roofline", optimizer=torch.optim.AdamW)


@pytest.fixture(scope="module")
def plan(step: PricedStep) -> Plan:
    return step.plan_bytes((step.floor_bytes + step.baseline.peak_bytes) // 2, search=Search("greedy"))


@pytest.fixture(scope="module")
def file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshots") / "step.pickle"
    plan.to_memory_snapshot(path)
    return path


@pytest.fixture
def data(file: Path) -> Any:
    return pickle.loads(file.read_bytes())


def most_allocated(trace: list[dict[str, Any]]) -> int:
    """The peak of what is allocated, from the events alone; live blocks must not overlap."""
    live: dict[int, int] = {}
    peak = now = 0
    for event in trace:
        at, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            assert size > 0
            assert all(at + size <= other or other + n <= at for other, n in live.items())
            live[at] = size
            now += size
        elif event["action"] == "free_completed":
            assert live.pop(at) == size
            now -= size
        peak = max(peak, now)
    return peak


def test_the_peak_is_the_plans_to_the_byte(plan: Plan, data: Any) -> None:
    (trace,) = data["device_traces"]
    assert most_allocated(trace) == plan.peak_bytes
    times = [event["time_us"] for event in trace]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(1e6 * (plan.step_s + plan.recompute_s), abs=2)


def test_the_kinds_at_the_peak_are_the_breakdown(plan: Plan, data: Any) -> None:
    live: dict[int, tuple[str, int]] = {}
    for event in data["device_traces"][0]:
        if event["action"] == "alloc":
            live[event["addr"]] = event["category"], event["size"]
        elif event["action"] == "free_completed":
            del live[event["addr"]]
        if sum(size for _, size in live.values()) == plan.peak_bytes:
            break
    kinds = dict.fromkeys(MEMORY_KINDS, 0)
    for kind, size in live.values():
        kinds[kind] += size
    assert kinds == {**dict.fromkeys(MEMORY_KINDS, 0), **plan.breakdown}


def test_torchs_own_reader_takes_it(plan: Plan, data: Any) -> None:
    assert "segments: 1\n" in viz.segsum(data)
    listed = viz.trace(copy.deepcopy(data))
    assert listed.startswith("Device 0") and " = cudaMalloc(" in listed and "\n# free completed for" in listed
    for page in (viz.trace_plot(data), viz.segment_plot(data), viz.trace_plot(data, plot_segments=True)):
        assert "snapshot.pickle" in page
    flames = viz.memory(data, format_flamegraph=lambda lines: lines)
    assert "GPT2LMHeadModel" in flames and "parameters: transformer.wte.weight" in flames
    assert viz.segments(data, format_flamegraph=lambda lines: lines).count("\n") == flames.count("\n")
    left = viz.filter_alloc_free_pairs(copy.deepcopy(data))["device_traces"][0]
    assert {e["action"] for e in left} == {"segment_alloc", "alloc"}


def test_what_is_left_is_parameters_state_inputs_and_gradients(
    step: PricedStep, plan: Plan, data: Any
) -> None:
    (segment,) = data["segments"]
    sizes = [b["size"] for b in segment["blocks"]]
    assert sum(sizes) == segment["total_size"] >= plan.peak_bytes
    assert all(a["address"] + a["size"] == b["address"] for a, b in pairwise(segment["blocks"]))
    gradients = sum(v.bytes for v in step.graph.values if v.kind == "gradient")
    outputs = sum(v.bytes for v in step.graph.values if v.kind == "output")
    held = sum(b["size"] for b in segment["blocks"] if b["state"] == "active_allocated")
    assert held == segment["allocated_size"]
    gone = outputs if plan.optimizer_step_bytes else 0
    assert held == step.problem.resident_bytes - step.memory.tangent_bytes + gradients + outputs - gone


def test_frames_name_value_module_and_model_and_what_runs_again(plan: Plan, data: Any) -> None:
    allocated = [e for e in data["device_traces"][0] if e["action"] == "alloc"]
    p = next(p for p in plan.placements if p.decision == "recompute" and p.module)
    frames = [[f["name"] for f in e["frames"]] for e in allocated]
    assert [f"{p.op}: {p.name}", p.module] in [names[:2] for names in frames]
    again = next(names for names in frames if names[0] == f"{p.op}: {p.name} (recomputed)")
    assert again[1] == p.module and again[-2:] == ["recomputed", "GPT2LMHeadModel"]
    marked = sum(names[0].endswith("(recomputed)") for names in frames)
    assert marked == sum(e["category"] == "recomputed" for e in allocated) > 0
    assert all(set(f) == {"name", "filename", "line"} for e in allocated for f in e["frames"])


def test_the_web_viewer_can_read_the_file(file: Path, data: Any) -> None:
    """Its reader knows few opcodes and numbers up to 2**53, and trips over categories without "unknown"."""
    opcodes = list(pickletools.genops(file.read_bytes()))
    assert {op.name for op, _, _ in opcodes} <= VIEWER_READS
    assert all(abs(n) < 2**53 for _, n, _ in opcodes if isinstance(n, int))
    assert not [n for op, n, _ in opcodes if op.name == "PROTO" and n != 4]
    assert "unknown" in {e.get("category") for e in data["device_traces"][0]}


def test_a_loaded_plan_writes_the_same_file(plan: Plan, file: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    planner.load(tmp_path / "plan.json").to_memory_snapshot(tmp_path / "again.pickle")
    assert pickle.loads((tmp_path / "again.pickle").read_bytes()) == pickle.loads(file.read_bytes())


def test_the_optimizers_step_may_be_the_peak() -> None:
    """One row through wide layers: hardly any activations, and an optimizer with large temporaries."""
    model = tiny.seeded(lambda: tiny.blocks(2, 128))
    wide = prepare(model, (torch.zeros(1, 128),), costs="roofline", optimizer=torch.optim.Adam)
    plan = wide.plan_bytes(10**9)
    assert plan.peak_bytes == plan.optimizer_step_bytes > plan.timeline.max()
    (trace,) = snapshot.memory_snapshot(plan)["device_traces"]
    assert most_allocated(trace) == plan.peak_bytes
    assert any(e["frames"] and e["frames"][0]["name"].startswith("optimizer.step") for e in trace)


def test_a_failed_write_leaves_no_half_a_file(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        plan.to_memory_snapshot(tmp_path / "nowhere" / "s.pickle")
    assert not list(tmp_path.iterdir())


def test_a_gpus_trace_stands_at_its_index() -> None:
    assert [snapshot._device_index(d) for d in ("cpu", "cuda", "cuda:0", "cuda:3")] == [0, 0, 0, 3]
