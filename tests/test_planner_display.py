"""What a plan shows of itself: every number on the page is the plan's, and every picture has its units."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest
from matplotlib.axes import Axes

import planner
from planner import (
    Frontier,
    Placement,
    Plan,
    PlannerError,
    bands,
    block,
    depth,
    layers,
    plots,
    prepared,
    units,
)
from planner.frontier import FrontierPoint
from tests.models import CASES

MB = 10**6


@pytest.fixture(scope="module")
def gpt2() -> Plan:
    """A real plan at half of what keeping everything takes."""
    case = CASES["gpt2"]
    step = prepared.prepare(case.build(), case.make_inputs(0), costs="roofline")
    return step.plan_bytes(round(0.55 * step.baseline.peak_bytes), solver="greedy")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


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
        "input_spec": None,
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


def shares(text: str) -> list[tuple[float, float]]:
    """(MB, %) of each line of the table of what is at the peak."""
    block = text.split("At the peak")[1].split("\n\n")[0]
    return [(float(a), float(b)) for a, b in re.findall(r"(\d+\.\d+) MB +(\d+\.\d+)%", block)]


# -- text -----------------------------------------------------------------------------------------


def test_summary_states_the_fields_of_the_plan(gpt2: Plan) -> None:
    text = gpt2.summary()
    figures = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    for name, count in (
        ("budget", gpt2.budget_bytes),
        ("predicted peak", gpt2.peak_bytes),
        ("nothing recomputed", gpt2.baseline_peak_bytes),
        ("proved floor", gpt2.floor_bytes),
    ):
        gb, gib = re.findall(r"([\d.]+) Gi?B", figures[name])
        assert float(gb) == pytest.approx(count / 10**9, rel=1e-3)
        assert float(gib) == pytest.approx(count / 2**30, rel=1e-3)
    assert gpt2.overhead > 0.01
    assert f"{100 * gpt2.overhead:.2f}% of step time" in figures["overhead"]
    assert f"{100 * gpt2.overhead_bound:.2f}% of step time" in figures["proved bound"]
    assert f"gap {100 * gpt2.gap:.2f} points: {gpt2.status}" in figures["proved bound"]
    assert f"{100 * gpt2.recompute_flops / gpt2.step_flops:.2f}%" in figures["recomputed FLOPs"]
    for fact in (gpt2.model_name, gpt2.device, gpt2.torch_version, gpt2.peak_op):
        assert fact in text
    assert gpt2.cost_source in figures["costs"] and gpt2.solver in figures["solver"]
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 110


def test_the_parts_of_the_peak_add_up_to_it(gpt2: Plan) -> None:
    parts = shares(gpt2.summary())
    assert len(parts) >= 3
    assert sum(size for size, _ in parts) == pytest.approx(gpt2.peak_bytes / MB, abs=0.02 * len(parts))
    assert sum(share for _, share in parts) == pytest.approx(100, abs=0.1 * len(parts))


def test_the_rows_of_the_summary_add_up_to_the_plan(gpt2: Plan) -> None:
    rows = layers.rows_of(layers.layers_of(gpt2), 16)
    for decision, column in (("save", "kept"), ("recompute", "recomputed"), ("free", "freed")):
        want = sum(p.bytes for p in gpt2.placements if p.decision == decision)
        assert want > 0 and sum(getattr(row, f"{column}_bytes") for row in rows) == want
    total = next(line for line in gpt2.summary().splitlines() if line.startswith("  total"))
    kept = sum(p.bytes for p in gpt2.placements if p.decision == "save")
    assert f"{kept / MB:.2f} MB" in total
    assert all(row.name in gpt2.summary() for row in rows)


def test_recompute_seconds_count_each_call_once(gpt2: Plan) -> None:
    several = [p for p in gpt2.placements if p.op == "aten.native_layer_norm" and p.times_recomputed]
    assert len(several) >= 6  # three outputs each
    assert sum(layers.recompute_seconds(gpt2)) == pytest.approx(gpt2.recompute_s, rel=1e-9)


def test_a_plan_from_a_file_looks_the_same(gpt2: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    dataclasses.replace(gpt2, known_minimum_bytes=gpt2.floor_bytes).save(path)
    loaded = planner.load(path)
    assert loaded.summary() == gpt2.summary()
    assert loaded._repr_html_() == gpt2._repr_html_()
    assert loaded.to_dataframe().equals(gpt2.to_dataframe())
    assert (
        block.block_graph(loaded, "transformer.h.1").nodes == block.block_graph(gpt2, "transformer.h.1").nodes
    )


def test_looking_never_solves() -> None:
    plan = made_plan(stack(3))
    with pytest.raises(PlannerError):
        _ = plan.minimum_peak_bytes
    assert plan.summary() and plan._repr_html_()
    plan.plot_memory()


def test_the_peak_names_the_module_of_a_forward_op() -> None:
    plan = made_plan(stack(2), peak_op="v1_1", peak_module="net.h.1.mlp")
    assert "At the peak, v1_1 in net.h.1.mlp:" in plan.summary()


@pytest.mark.parametrize(
    ("count", "text"),
    [(13_154_321, "13.15 MB"), (8_000_000_000, "8 GB"), (1_500, "1.5 kB"), (999, "999 B"), (0, "0 B")],
)
def test_bytes_in_the_unit_that_fits(count: int, text: str) -> None:
    assert units.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-5, "40 \u00b5s"), (0.0, "-")]
)
def test_seconds_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert units.seconds_text(seconds) == text


def test_a_shared_unit_does_not_call_a_little_nothing() -> None:
    unit = units.ByteUnit.of(20 * MB)
    assert (unit.text(1234), unit.text(0), unit.text(1_250_000_000)) == ("<0.01 MB", "-", "1,250.00 MB")


# -- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("net.h.2.mlp", "net.h.2"),
        ("net.h.2", "net.h.2"),
        ("net.embed.norm", "net.embed"),
        ("net", "net"),
        ("stages.0.1.conv", "stages.0.1"),
        ("stages.0.1.shortcut.0", "stages.0.1"),
        ("down.1.3", "down.1"),
        ("stem.0", "stem"),
        ("head", "head"),
        ("", layers.ROOT),
    ],
)
def test_the_layer_of_a_module(module: str, layer: str) -> None:
    others = ["net.h.0.mlp", "stages.0.0.conv", "down.0.3", "stem.1"]
    placements = [value(f"v{i}", path) for i, path in enumerate([*others, module])]
    assert made_plan(placements).to_dataframe()["layer"].iloc[-1] == layer


def test_a_model_of_few_layers_is_shown_by_its_modules() -> None:
    plan = made_plan([value(f"v{i}", str(i)) for i in range(6)])
    assert [layer.path for layer in layers.layers_of(plan)] == list("012345")


def test_alike_layers_fold_and_others_do_not() -> None:
    placements = stack(6)
    odd = next(i for i, p in enumerate(placements) if p.name == "v3_0")
    placements[odd] = dataclasses.replace(placements[odd], decision="recompute", times_recomputed=1)
    made = layers.layers_of(made_plan(placements))
    rows = layers.rows_of(made, 16)
    assert [row.name for row in rows] == ["net.embed", "net.h.[0-2,4-5]", "net.h.3", "head"]
    assert (rows[1].kept_bytes, rows[2].kept_bytes, rows[2].recomputed_bytes) == (5 * MB, 0, 2 * MB)
    assert [row.name for row in layers.rows_of(made, 3)] == ["net.embed", "net.h.[0-5]", "head"]
    assert [row.name for row in layers.rows_of(made, 8, unfolded=True)][1:4] == [
        f"net.h.{i}" for i in range(3)
    ]


def test_what_does_not_fit_is_gathered_and_nothing_is_lost() -> None:
    placements = [value(f"v{i}", f"part{i}", size=MB * (1 + i % 7)) for i in range(50)]
    rows = layers.rows_of(layers.layers_of(made_plan(placements)), 10)
    assert len(rows) == 10 and rows[-1].name == "(41 smaller)" and not rows[-1].alike
    assert sum(row.total_bytes for row in rows) == sum(p.bytes for p in placements)
    assert min(row.total_bytes for row in rows[:-1]) >= max(
        v.bytes for x in rows[-1].layers for v in x.placements
    )


# -- table ----------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_placement(gpt2: Plan) -> None:
    table = gpt2.to_dataframe()
    assert list(table.columns) == [
        "name", "module", "op", "bytes", "decision", "recompute_s", "times_recomputed",
        "made_at", "freed_at", "recomputed_at", "freed_again_at", "layer",
    ]  # fmt: skip
    for column in ("name", "module", "op", "bytes", "decision", "times_recomputed"):
        assert table[column].tolist() == [getattr(p, column) for p in gpt2.placements]
    for p, made, freed, again, freed_again in zip(
        gpt2.placements,
        *(table[name] for name in ("made_at", "freed_at", "recomputed_at", "freed_again_at")),
        strict=True,
    ):
        assert [gpt2.sequence[t] for t in (made, *again)] == [p.call] * (1 + p.times_recomputed)
        assert made <= freed and all(a <= b for a, b in zip(again, freed_again, strict=True))
        assert sorted([made, freed, *again, *freed_again]) == [t for span in p.spans for t in span]
    assert table["recompute_s"].sum() == pytest.approx(gpt2.recompute_s, rel=1e-9)
    assert (table.loc[table["decision"] != "recompute", "recompute_s"] == 0).all()
    assert set(table["layer"]) >= {f"transformer.h.{i}" for i in range(5)}


# -- HTML -----------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_static_and_says_what_the_summary_says(gpt2: Plan) -> None:
    page = _Tags(gpt2._repr_html_())
    text = " ".join(page.text)
    rows = layers.rows_of(layers.layers_of(gpt2), 40)
    assert page.seen.count("details") == len(rows) == page.seen.count("summary")
    assert page.seen.count("svg") == 1 and "script" not in page.seen and "link" not in page.seen
    assert not {name for name in page.attributes if name.startswith("on") or name in ("href", "src")}
    facts = [f"{gpt2.overhead:.2%}", units.gb_text(gpt2.budget_bytes), gpt2.peak_op, *(r.name for r in rows)]
    assert [fact for fact in facts if fact not in text] == []


def test_a_notebook_stores_the_summary_too(gpt2: Plan) -> None:
    """Viewers that show no HTML, and those that drop its style sheet, have all of it."""
    shown = gpt2._repr_mimebundle_()
    assert shown == {"text/html": gpt2._repr_html_(), "text/plain": gpt2.summary()}
    bare = _Tags(re.sub(r"<style>.*?</style>", "", shown["text/html"], flags=re.S))
    row = next(r for r in layers.rows_of(layers.layers_of(gpt2), 40) if r.kept_bytes and r.recomputed_bytes)
    kept = units.ByteUnit.of(gpt2.peak_bytes).text(row.kept_bytes)
    assert f"{row.name} kept {kept} recomputed " in "".join(bare.text)


def test_html_escapes_every_name() -> None:
    evil = "<script>alert('x')</script>"
    placements = [value(evil, f"{evil}.{i}.mlp", op=evil) for i in range(3)] + [value("b", evil, "recompute")]
    plan = made_plan(placements, model_name=evil, peak_op=evil, device=evil, solver=evil, cost_source=evil)
    page = _Tags(plan._repr_html_())
    assert "script" not in page.seen
    assert sum(evil in text for text in page.text) >= 6


def test_html_stays_small_for_ten_thousand_values() -> None:
    long = "a_rather_long_name_of_a_module"
    words = ("save", "recompute", "free")
    placements = [
        value(
            f"v{i}", f"{long}.{i // 100}.{long}.{long}_{i}", words[i % 3], size=1 + i, op=f"aten.{long}_{i}"
        )
        for i in range(10_000)
    ]
    text = made_plan(placements)._repr_html_()
    _Tags(text)
    assert len(text.encode()) < 300_000


def test_the_small_picture_keeps_the_peak() -> None:
    level = np.zeros(10_000)
    level[7_777] = 5
    at = bands.highest(level, 320)
    assert len(at) == 320 and 7_777 in at and (np.diff(at) > 0).all()
    assert bands.highest(level[:7], 320).tolist() == list(range(7))


# -- pictures -------------------------------------------------------------------------------------


def _legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def _line(ax: Axes, name: str) -> np.ndarray:
    """(x, y) of the line of that name, shape (n, 2)."""
    return next(line.get_xydata() for line in ax.lines if line.get_label() == name)


def test_the_baseline_stands_where_the_plan_runs_its_ops() -> None:
    plan = made_plan(
        [value("a", "x"), value("b", "y")],
        sequence=("a", "b", "turn", "b", "end"),
        timeline=np.zeros(5, dtype=int),
        baseline_timeline=np.array([1, 2, 3, 4]),
    )
    assert bands.aligned_baseline(plan).tolist() == [1, 2, 3, 3, 4]


def test_bands_leave_nothing_out(gpt2: Plan) -> None:
    made = bands.bands_of(gpt2)
    assert (sum(band.bytes for band in made) == sum(gpt2.timeline_by_kind.values())).all()
    assert made[0].name == "parameters" and len({band.color for band in made}) == len(made)
    assert gpt2.sequence[bands.turn_of(gpt2) or 0] == "ones_like_loss"


def test_memory_over_the_step(gpt2: Plan) -> None:
    ax = gpt2.plot_memory()
    assert ax.get_ylabel() == "live memory (MB)" and "step of the plan" in ax.get_xlabel()
    assert gpt2.model_name in ax.get_title(loc="left")
    assert {"budget", "nothing recomputed", "saved for backward", "recomputed", "parameters"} <= set(
        _legend(ax)
    )
    assert len(_legend(ax)) <= 14
    budget = _line(ax, "budget")
    assert budget[:, 1] == pytest.approx(gpt2.budget_bytes / MB)
    before = _line(ax, "nothing recomputed")
    assert before[:, 1].max() == pytest.approx(gpt2.baseline_peak_bytes / MB)
    assert before[-1, 0] == len(gpt2.sequence)
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in ax.collections]
    assert max(tops) == pytest.approx(gpt2.peak_bytes / MB, rel=1e-6)
    notes = [t.get_text() for t in ax.texts]
    place = f"{gpt2.peak_op} in {gpt2.peak_module}" if gpt2.peak_module else gpt2.peak_op
    assert f"peak {units.bytes_text(gpt2.peak_bytes)}\n{place}" in notes
    assert {"forward", "backward"} <= set(notes)


def test_memory_of_a_large_model_is_in_gb() -> None:
    big = made_plan([value(f"v{i}", f"net.h.{i}.mlp", size=10**9) for i in range(5)])
    ax = plots.plot_memory(big)
    assert ax.get_ylabel() == "live memory (GB)"
    assert _line(ax, "budget")[0, 1] == pytest.approx(big.budget_bytes / 1e9)


def test_a_peak_in_the_optimizer_is_marked_there() -> None:
    plan = made_plan(stack(3))
    plan = dataclasses.replace(
        plan, optimizer_step_bytes=40 * MB, peak_bytes=40 * MB, peak_op="optimizer.step"
    )
    ax = plan.plot_memory()
    bar = ax.patches[0]
    assert bar.get_height() == pytest.approx(40) and bar.get_x() > len(plan.sequence)
    marks = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
    assert marks == [[pytest.approx(1.02 * len(plan.sequence)), pytest.approx(40)]]


def test_a_budget_far_above_everything_does_not_flatten_the_picture() -> None:
    plan = made_plan(stack(3), budget_bytes=10**12)
    assert plan.plot_memory().get_ylim()[1] < 100


def test_depth_and_time_add_up_to_the_memory_of_the_step(gpt2: Plan) -> None:
    rows = layers.depth_rows(layers.layers_of(gpt2), 36)
    kept, again, before, gone, freed = sum(depth.states_of(row, len(gpt2.sequence)) for row in rows)
    kinds = gpt2.timeline_by_kind
    assert (again == kinds["recomputed"]).all() and again.any()
    forward = sum(kinds[kind] for kind in ("saved", "temporaries", "outputs"))
    assert (kept + before + freed == forward).all()
    turn = bands.turn_of(gpt2)
    dropped = sum(p.bytes for p in gpt2.placements if p.decision == "recompute" and p.spans[0][1] < turn)
    assert gone[turn] == dropped > 0


def test_every_state_of_a_row_has_its_steps() -> None:
    placements = [value("k", "x.0.a"), value("r", "x.0.a", "recompute", 2 * MB), value("f", "x.0.a", "free")]
    plan = made_plan(placements)  # k r f turn r
    (row,) = layers.depth_rows(layers.layers_of(plan), 9)
    wanted = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 2], [0, 2, 0, 0, 0], [0, 0, 2, 2, 0], [0, 0, 1, 0, 0]]
    assert depth.states_of(row, 5).tolist() == [[MB * n for n in state] for state in wanted]
    assert list(depth.STATES)[::3] == ["kept", "dropped"]


@pytest.mark.parametrize(
    ("depth_", "first", "rows"), [(24, "net.h.0", 26), (60, "net.h.[0-1]", 32), (2000, "net.h.[0-58]", 36)]
)
def test_placements_over_depth_and_time(depth_: int, first: str, rows: int) -> None:
    plan = made_plan(stack(depth_))
    ax = plan.plot_placements()
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert (names[0], names[1], names[-1], len(names)) == ("net.embed", first, "head", rows)
    assert _legend(ax) == list(depth.STATES)
    assert "step of the plan" in ax.get_xlabel() and ax.get_xlim() == (0, len(plan.sequence))
    top, bottom = ax.get_ylim()[::-1]
    assert top < 0 < rows - 1 < bottom  # the first layer is above
    (panel,) = ax.child_axes
    assert "(MB)" in panel.get_xlabel() and "extra time" in panel.get_xlabel()
    kept, recomputed, freed = ([bar.get_width() for bar in group] for group in panel.containers)
    assert sum(kept) == pytest.approx(depth_ + 2)
    assert sum(recomputed) == sum(freed) == pytest.approx(depth_)
    each = round(kept[1])
    assert panel.texts[0].get_text() == f"+{units.seconds_text(0.01 * each)}"


def test_a_dropped_value_leaves_a_gap_in_its_row() -> None:
    ax = made_plan([value("a", "x.0.m"), value("r", "y.0.m", "recompute", 3 * MB)]).plot_placements()
    extents = {
        (round(box.x0), round(box.x1), round((box.y0 + box.y1) / 2))
        for box in (c.get_paths()[0].get_extents() for c in ax.collections)
    }
    # steps are a r turn r: kept from 0 on; there at 1, gone at 2, there again at 3
    assert extents == {(0, 4, 0), (1, 2, 1), (2, 3, 1), (3, 4, 1)}


# -- the graph of a block -------------------------------------------------------------------------


def test_the_graph_of_a_block_is_the_plans(gpt2: Plan) -> None:
    graph = block.block_graph(gpt2, "transformer.h.1")
    inside = [p for p in gpt2.placements if p.module.startswith("transformer.h.1.")]
    forward = {n.name for n in graph if n.inside and not n.side}
    again = {n.name: graph.nodes[n]["times"] for n in graph if n.inside and n.side}
    assert forward >= {p.call for p in inside if p.decision != "free"}
    counted = {name: gpt2.sequence.count(name) - 1 for name in forward}
    assert again == {name: times for name, times in counted.items() if times} != {}
    shown = sum(graph.nodes[n]["bytes"] for n in graph if n.inside and not n.side)
    assert shown == sum(p.bytes for p in gpt2.placements if layers_at(p, "transformer.h.1"))
    crossing = [a for a, _, kept in graph.edges(data="kept") if kept]
    assert crossing and all(a.side == 0 for a in crossing)
    assert nx.is_directed_acyclic_graph(graph)


def layers_at(p: Placement, module: str) -> bool:
    return p.module == module or p.module.startswith(module + ".")


def test_a_block_is_drawn_with_names_and_bytes(gpt2: Plan) -> None:
    ax = gpt2.plot_graph("transformer.h.1.mlp")
    texts = [t.get_text() for t in ax.texts]
    tanh = next(p for p in gpt2.placements if p.op == "aten.tanh" and ".h.1." in p.module)
    assert f"tanh\nact {units.bytes_text(tanh.bytes)}" in texts
    assert "forward" in texts and "computed again in the backward" in texts
    made = [p for p in gpt2.placements if layers_at(p, "transformer.h.1.mlp")]
    kept = sum(p.bytes for p in made if p.decision == "save")
    assert ax.get_title(loc="left").startswith(f"transformer.h.1.mlp: {units.bytes_text(kept)} kept")
    assert _legend(ax)[:2] == ["kept", "recomputed"]
    figure = mpl.figure.Figure()
    given = figure.subplots()
    assert gpt2.plot_graph("transformer.h.1.ln_1", given) is given
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("transformer.h.11", r"'transformer\.h\.11'.*near names: .*'transformer\.h\.1'"),
        ("", r"the whole model has \d+ ops.*64 at most; its parts are 'lm_head', 'transformer'"),
    ],
)
def test_a_block_that_cannot_be_drawn(gpt2: Plan, module: str, message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        gpt2.plot_graph(module)


def test_a_plan_without_its_ops_has_no_graph() -> None:
    with pytest.raises(PlannerError, match=r"does not say what each op reads"):
        made_plan(stack(1)).plot_graph("net")


# -- the frontier ---------------------------------------------------------------------------------


def made_frontier(plan: Plan) -> Frontier:
    points = (
        FrontierPoint(7 * MB, 9 * MB, None, None, "infeasible"),
        FrontierPoint(9 * MB, 9 * MB, 0.3, 0.25, "feasible"),
        FrontierPoint(12 * MB, 11 * MB, 0.1, 0.1, "optimal"),
    )
    return Frontier(plan.model_name, 15 * MB, 6 * MB, points)


def test_the_frontier() -> None:
    plan = made_plan(stack(3), budget_bytes=10 * MB)
    ax = plots.plot_frontier(made_frontier(plan), plan=plan)
    assert ax.get_xlabel() == "budget (MB)" and ax.get_ylabel() == "overhead (% of step time)"
    assert _line(ax, "plans found") == pytest.approx(np.array([[9, 30], [12, 10]]))
    assert _line(ax, "proved: no plan has less") == pytest.approx(np.array([[9, 25], [12, 10]]))
    assert _line(ax, "no plan found") == pytest.approx(np.array([[7, 0]]))
    assert _line(ax, "nothing recomputed")[0, 0] == 15
    mine = next(line for line in ax.lines if str(line.get_label()).startswith("this plan"))
    assert mine.get_xydata()[0] == pytest.approx([10, 100 * plan.overhead])
    assert any("floor" in name for name in _legend(ax))
    assert ax.patches[0].get_extents().x1 > ax.transData.transform((5.99, 0))[0]


def test_a_frontier_without_any_plan_is_still_a_picture() -> None:
    frontier = Frontier("Made", 10 * MB, 6 * MB, (FrontierPoint(5 * MB, 9 * MB, None, None, "infeasible"),))
    assert _line(frontier.plot(), "no plan found")[0, 0] == 5


def test_what_the_next_gb_buys() -> None:
    frontier = made_frontier(made_plan(stack(3)))
    assert frontier.saved_per_gb == (None, pytest.approx(0.2 / 3e-3), None)
    assert frontier.overhead_at(0.008) is None and frontier.overhead_at(0.009) == 0.3
    assert frontier.overhead_at(0.0105) == pytest.approx(0.2)
    assert frontier.overhead_at(1.0) == 0.1
    line = "at 9 MB the next 100 kB buys 0.67 points of step time: overhead 30.00% -> 29.33%"
    assert frontier.next_gb() == line == str(frontier).splitlines()[-1]
    assert "at 10 MB the next 2 MB buys 13.33 points" in frontier.next_gb(0.01, 0.002)
    assert frontier.next_gb(0.007) == "at 7 MB there is no plan; the least of these budgets with one is 9 MB"
    assert "6.67 points" in str(frontier) and "next MB buys" in str(frontier)
    table = frontier.to_dataframe()
    assert table["saved_per_gb"].iloc[1] == pytest.approx(0.2 / 3e-3)
    assert table["budget_bytes"].tolist() == [p.budget_bytes for p in frontier.points]


def test_next_gb_of_a_large_model() -> None:
    points = (
        FrontierPoint(8 * 10**9, 8 * 10**9, 0.3, 0.25, "feasible"),
        FrontierPoint(18 * 10**9, 18 * 10**9, 0.1, 0.1, "optimal"),
    )
    line = Frontier("Made", 20 * 10**9, 10**9, points).next_gb()
    assert line == "at 8 GB the next 1 GB buys 2.00 points of step time: overhead 30.00% -> 28.00%"


def test_peers_stand_where_they_were_measured() -> None:
    peers = {"flag": (14 * MB, 0.33), "by hand": [(9 * MB, 0.4), (20 * MB, 0.05)]}
    ax = made_frontier(made_plan(stack(3))).plot(peers=peers)
    assert _line(ax, "flag") == pytest.approx(np.array([[14, 33]]))
    assert _line(ax, "by hand") == pytest.approx(np.array([[9, 40], [20, 5]]))
    assert ax.get_xlim()[1] > 20 and ax.get_ylim()[1] > 40
    for wrong in (3.0, (1, 2, 3), [(1, float("nan"))]):
        with pytest.raises(ValueError, match=r"peer 'flag' is"):
            made_frontier(made_plan(stack(3))).plot(peers={"flag": wrong})  # type: ignore[dict-item]


@pytest.mark.parametrize("draw", [plots.plot_memory, depth.plot_placements])
def test_drawing_on_given_axes_makes_no_figure(draw: object) -> None:
    figure = mpl.figure.Figure()
    ax = figure.subplots()
    before = dict(mpl.rcParams)
    assert draw(made_plan(stack(3)), ax) is ax  # type: ignore[operator]
    assert plots.plot_frontier(made_frontier(made_plan(stack(3))), figure.subplots()) in figure.axes
    assert plt.get_fignums() == [] and dict(mpl.rcParams) == before
    figure.canvas.draw()


def test_ten_thousand_steps_draw() -> None:
    plan = made_plan(stack(2500))
    assert len(plan.sequence) > 10_000
    for ax in (plan.plot_memory(), plan.plot_placements()):
        ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", ["plot_memory", "plot_placements"])
def test_without_matplotlib_the_error_names_the_extra(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(PlannerError, match=r"pip install 'rematplan\[notebooks\]'"):
        getattr(made_plan(stack(1)), draw)()
    with pytest.raises(PlannerError, match=r"pip install 'rematplan\[notebooks\]'"):
        made_frontier(made_plan(stack(1))).plot()


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PlannerError, match=r"pandas.*pip install 'rematplan\[notebooks\]'"):
        made_plan(stack(1)).to_dataframe()
