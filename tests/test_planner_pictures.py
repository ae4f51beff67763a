"""What a plan shows of itself: every picture has the plan's numbers, names and units."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest
from matplotlib.axes import Axes

from planner import Frontier, Placement, Plan, PlannerError, units
from planner.frontier import FrontierPoint
from planner.options import Search
from planner.solving.priced import prepare
from planner.view import bands, block, depth, layers, plots
from tests import tiny
from tests.benchmarks import bench_display
from tests.made_plans import MB, made_plan, planned_gpt2, stack, value


@pytest.fixture(scope="module")
def gpt2() -> Plan:
    return planned_gpt2()


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


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
    place = f"{gpt2.peak_op} in {gpt2.peak_module or 'the model itself'}"
    assert f"peak {units.bytes_text(gpt2.peak_bytes)}\n{place}" in notes
    assert {"forward", "backward"} <= set(notes)


def test_memory_of_a_large_model_is_in_gb() -> None:
    big = made_plan([value(f"v{i}", f"net.h.{i}.mlp", size=10**9) for i in range(5)])
    ax = plots.plot_memory(big)
    assert ax.get_ylabel() == "live memory (GB)"
    assert _line(ax, "budget")[0, 1] == pytest.approx(big.budget_bytes / 1e9)


def test_a_spike_of_one_step_among_thousands_is_as_wide_as_a_column() -> None:
    low = [value(f"v{i}", f"net.{i}", decision="free") for i in range(3000)]
    plan = made_plan([value("spike", "net", decision="recompute", size=900 * MB), *low])
    assert (plan.timeline > plan.peak_bytes / 2).sum() == 1
    ax = plan.plot_memory()
    corners = np.concatenate([c.get_paths()[0].vertices for c in ax.collections])
    high = corners[corners[:, 1] > 0.5 * plan.peak_bytes / 1e9]
    assert ax.get_ylabel() == "live memory (GB)"
    assert high[:, 1].max() == pytest.approx(plan.peak_bytes / 1e9)
    assert np.ptp(high[:, 0]) == pytest.approx(len(plan.sequence) / plots._COLUMNS)


def test_a_peak_in_the_optimizer_is_marked_there() -> None:
    plan = made_plan(stack(3))
    plan = dataclasses.replace(
        plan, optimizer_step_bytes=40 * MB, peak_bytes=40 * MB, peak_op="optimizer.step"
    )
    ax = plan.plot_memory()
    bar = ax.patches[0]
    assert bar.get_height() == pytest.approx(40) and bar.get_x() > len(plan.sequence)
    assert f"peak {units.bytes_text(40 * MB)}\noptimizer.step" in [t.get_text() for t in ax.texts]
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
    ("depth_", "first", "rows"), [(24, "net.h.0", 26), (60, "net.h.[0-1]", 32), (700, "net.h.[0-20]", 36)]
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


def test_the_frontier_of_a_plan_is_solved_from_its_own_trace() -> None:
    model = tiny.seeded(tiny.Mlp)
    step = prepare(model, tiny.batch(256), costs="roofline", search=Search(time_limit_s=2.0))
    plan = step.plan_bytes(step.baseline.peak_bytes, search=Search("greedy"))
    ax = plan.plot_frontier(points=4, time_limit_s=1.0, peers={"flag": (step.baseline.peak_bytes, 0.5)})
    unit = 10**3 if "kB" in ax.get_xlabel() else MB
    budgets, overhead = _line(ax, "plans found").T
    assert budgets[[0, -1]] * unit == pytest.approx([plan.minimum_peak_bytes, plan.baseline_peak_bytes])
    assert len(budgets) == 4 and (np.diff(budgets) > 0).all() and (np.diff(overhead) <= 0).all()
    assert overhead[-1] == 0 < overhead[0]
    assert (_line(ax, "proved: no plan has less")[:, 1] <= overhead).all()
    assert "flag" in _legend(ax) and any(name.startswith("this plan") for name in _legend(ax))
    curve = step.frontier(points=4, search=Search(time_limit_s=1.0))
    assert repr(curve) == str(curve) and str(curve).splitlines()[-1] == curve.next_gb()


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


@pytest.mark.parametrize("draw", ["plot_memory", "plot_placements", "plot_graph"])
def test_without_matplotlib_the_error_names_the_extra(
    gpt2: Plan, draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    arguments = ("transformer.h.0",) if draw == "plot_graph" else ()
    with pytest.raises(PlannerError, match=r"matplotlib.*pip install 'rematplan\[notebooks\]'"):
        getattr(gpt2, draw)(*arguments)
    with pytest.raises(PlannerError, match=r"pip install 'rematplan\[notebooks\]'"):
        made_frontier(made_plan(stack(1))).plot()


def test_what_looking_took_is_on_file_and_within_its_limits() -> None:
    record = json.loads(bench_display.RESULTS.read_text(encoding="utf-8"))
    assert record["ops"] > 9000 and bench_display.failures(record) == []
    assert {row["what"]: row["limit"] for row in record["rows"]}.items() >= {
        "repr": 0.2, "page": 0.2, "plot_placements": 3.0, "plot_memory": 3.0, "size of the page": 300_000,
    }.items()  # fmt: skip
    slow = [row | {"seconds": 3.5} if row["what"] == "plot_graph" else row for row in record["rows"]]
    assert bench_display.failures({"rows": slow}) == ["plot_graph: 3.5 of 3.0"]
    assert len(bench_display.table(record)) == 2 + len(record["rows"])
