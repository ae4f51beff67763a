"""The benchmarks' own parts: graphs, generator, torch's knapsack restated, results and claims."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from planner._compat import dp_knapsack
from planner.checks import zoo
from solvers import Problem, Schedule, simulate
from solvers.core.simulate import simulate_steps
from tests.benchmarks import (
    bench_bounds,
    bench_families,
    bench_packages,
    bench_solvers,
    graphs,
    knapsack,
    layered,
    solver_jobs,
    solver_table,
)
from tests.benchmarks.bench_solvers import Results
from tests.benchmarks.packages import Case, Sample, load, squares
from tests.benchmarks.solver_jobs import Job
from tests.joint_graphs import keep_all_peak, random_training_graph

# ----------------------------------------------------------------------------------- layered DAGs

MOCCASIN_EDGES = {"layered-100": 236, "layered-250": 944, "layered-500": 2461, "layered-1000": 5875}


@pytest.mark.parametrize("name", layered.INSTANCES)
def test_layered_instances_have_the_published_sizes_and_are_those_on_file(name: str) -> None:
    problem = layered.layered_problem(name)
    assert len(problem) == int(name.split("-")[1])
    assert sum(len(op.inputs) for op in problem.ops) == pytest.approx(MOCCASIN_EDGES[name], rel=0.02)
    assert problem == graphs.load(name)


@pytest.mark.parametrize("ops", [1, 2, 5, 60, 300])
def test_layered_structure(ops: int) -> None:
    for seed in range(5):
        dag = layered.layered_dag(ops, seed)
        level = nx.get_node_attributes(dag, "layer")
        sizes = [sum(v == k for v in level.values()) for k in range(max(level.values()) + 1)]
        assert sum(sizes) == ops and all(sizes)
        spans = [level[b] - level[a] for a, b in dag.edges]
        assert all(span >= 1 for span in spans)
        if ops >= 60:
            share = sum(span > 1 for span in spans) / len(spans)
            assert share == pytest.approx(layered.SKIP_SHARE, abs=0.01)
            assert max(sizes) <= 1.75 * ops**0.5 and len(set(sizes)) > 1  # a width factor of 0.5 is widest
        # Between layers that follow each other, nobody in the larger one is left out.
        for k, (a, b) in enumerate(itertools.pairwise(sizes)):
            large, ends = (k, 0) if a >= b else (k + 1, 1)
            joined = {edge[ends] for edge in dag.edges if (level[edge[0]], level[edge[1]]) == (k, k + 1)}
            assert joined == {v for v in dag if level[v] == large}


def test_layered_dags_repeat_themselves_and_differ_by_seed() -> None:
    one, two, other = (layered.layered_dag(80, seed) for seed in (3, 3, 4))
    assert nx.utils.graphs_equal(one, two) and not nx.utils.graphs_equal(one, other)


# ---------------------------------------------------------------------------- bounds and the optimum


def test_bounds_are_the_exact_optimum_of_small_graphs_and_never_above() -> None:
    cases = [case for seed in range(0, 160, 4) if (case := bench_bounds.case(seed, 2.0))]
    assert len(cases) > 10 and {case.truth for case in cases} == {"search"}
    assert not bench_bounds.shortfalls(cases)
    assert len(list(bench_bounds.table(cases))) == 4  # a head of two lines, the kind, and all


def test_what_falls_short_of_the_optimum_is_said() -> None:
    case = bench_bounds.Case(7, "chain", 30, 0.5, 10.0, 11.0, 11.0, "plan", 0.1)
    open_, false = replace(case, bound_s=10.0, truth="open"), replace(case, bound_s=11.5)
    assert case.equal and not case.broken and not bench_bounds.shortfalls([case])
    assert open_.short_points == pytest.approx(10) and not open_.equal
    assert "in 1 of 2, want 95%" in "".join(bench_bounds.shortfalls([case, open_]))
    assert false.broken and bench_bounds.shortfalls([false])[0].startswith("false: seed 7")


# -------------------------------------------------------------------------------- captured graphs


def _tiny_gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    model = zoo.gpt2(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=64)
    ids = torch.zeros(2, 16, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids.clone()}


def test_a_capture_without_memory_is_the_planners_problem() -> None:
    problem, modules = graphs.capture_problem(_tiny_gpt2, "tiny")
    with torch.device("cpu"):
        model, inputs = _tiny_gpt2()
    parameters_bytes = 2 * sum(p.numel() for p in model.parameters())  # bfloat16; the tied one once
    inputs_bytes = sum(x.nbytes for x in inputs.values())
    assert problem.resident_bytes == parameters_bytes + inputs_bytes
    gradients = sum(v.bytes for v in problem.values if v.final and v.bytes > 4)
    assert gradients >= parameters_bytes
    assert problem.turn is not None and problem.name == "tiny"
    assert not any(op.recomputable for op in problem.ops[problem.turn :])
    assert any("dropout" in op.name for op in problem.ops)
    assert torch.get_default_dtype() == torch.float32
    assert len(modules) == problem.turn and "transformer.h.1.mlp.c_fc" in modules


@pytest.mark.parametrize("name", graphs.GRAPHS)
def test_captured_graphs_are_what_their_record_says(name: str) -> None:
    record = json.loads(graphs.RECORD.read_text())[name]
    problem = graphs.load(name)
    assert (len(problem), problem.turn) == (record["ops"], record["turn"])
    assert graphs.activation_peak_bytes(problem) == record["activation_peak_bytes"]
    assert problem.resident_bytes == record["resident_bytes"]
    assert problem.turn is not None
    assert not any(op.recomputable for op in problem.ops[problem.turn :])
    assert record["capture_peak_rss_bytes"] < 10**9 < 10 * record["activation_peak_bytes"]


# ------------------------------------------------------------------------------- torch's knapsack


def test_torchs_knapsack_is_one() -> None:
    assert sorted(dp_knapsack([0.5, 0.4, 0.3], [1.0, 2.0, 2.0], 0.75)) == [1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_least_saved_is_a_minimum(seed: int) -> None:
    """Against every subset: what may be saved, such that no op is recomputed that must not be."""
    problem = random_training_graph(seed, layers=2, width=2)
    rng = random.Random(seed)
    candidates = knapsack.items(problem, every_op=True)
    not_again = {i for i in candidates if rng.random() < 0.4}
    values = [v for i in candidates for v in problem.ops[i].outputs]
    assert problem.turn is not None

    def allowed(saved: set[int]) -> bool:
        return not not_again & set(knapsack.recompute_once(problem, saved)[problem.turn :])

    subsets = (set(s) for k in range(len(values) + 1) for s in itertools.combinations(values, k))
    least = min(sum(problem.values[v].bytes for v in s) for s in subsets if allowed(s))
    found = knapsack.least_saved(problem, not_again)
    assert allowed(found)
    assert sum(problem.values[v].bytes for v in found) == least


def test_recompute_once_recomputes_once_and_only_what_is_missing() -> None:
    problem = random_training_graph(1)
    droppable = {v for i in knapsack.items(problem, every_op=True) for v in problem.ops[i].outputs}
    assert knapsack.recompute_once(problem, droppable) == list(range(len(problem)))
    steps = knapsack.recompute_once(problem, set())
    assert set(Schedule.of(problem, steps).times_recomputed().values()) == {1}
    assert simulate_steps(problem, steps).recompute_seconds > 0


def test_the_sweep_reaches_from_keeping_all_to_a_lower_peak() -> None:
    problem = random_training_graph(2, layers=8)
    swept = knapsack.sweep(problem, [k / 20 for k in range(21)])
    for plan in swept:
        line = simulate(problem, plan.schedule)
        assert (line.peak_bytes, line.recompute_seconds) == (plan.peak_bytes, plan.recompute_seconds)
    assert min(plan.peak_bytes for plan in swept) < keep_all_peak(problem)
    everything = [plan for plan in swept if plan.every_op and plan.fraction >= 0.9]
    nothing = [plan for plan in swept if plan.every_op and plan.fraction <= 0.1]
    assert min(p.recompute_seconds for p in everything) < min(p.recompute_seconds for p in nothing)


def test_names_of_ops_that_torch_does_not_recompute() -> None:
    problem = graphs.load("bert-large-b16x512")
    names = {problem.ops[i].name for i in knapsack.items(problem)}
    assert any(n.startswith("addmm") for n in names)
    assert any(n.startswith("_scaled_dot_product") for n in names)
    assert any(n.startswith("dropout_mask") for n in names)
    assert not any(n.startswith(("add_", "gelu", "native_layer_norm")) for n in names)


# ----------------------------------------------------------------------------------- jobs and rows


def _row(graph: str = "m", budget: str = "0.5", **changes: Any) -> dict[str, Any]:
    row = {
        "graph": graph, "kind": "plan", "order": "fixed", "budget": budget, "budget_bytes": 50,
        "ops": 9, "turn": 4, "resident_bytes": 10,
        "status": "feasible", "solver": "staged", "overhead": 2.0, "bound": 1.9, "gap": 0.1, "seconds": 3.0,
        "time_limit_s": 30.0, "peak_rss_bytes": 10**8, "run": 0,
    }  # fmt: skip
    return row | changes


def _keyed(*rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"|".join((r["graph"], r["kind"], r["order"], r["budget"])): r for r in rows}


LEAST = _row(kind="least", budget="", budget_bytes=0, peak_bytes=30, floor_bytes=30, keep_all_bytes=90)
BASELINES = _row(kind="baselines", budget="", budget_bytes=0, plans={"sqrt": [[40, 2.5]], "knapsack": []})


def _failed(*rows: dict[str, Any]) -> list[str]:
    return [check.claim for check in solver_table.checks(_keyed(*rows)) if not check.met]


def test_a_row_that_holds() -> None:
    assert _failed(_row(), LEAST, BASELINES) == []


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({"gap": 0.31}, ["gap"]),
        ({"gap": 0.31, "budget": "0.4"}, []),
        ({"gap": 1.1, "budget": "0.4"}, ["gap"]),
        ({"gap": 2.9, "budget": "floor+2%"}, []),
        ({"gap": 3.1, "budget": "floor+2%"}, ["gap"]),
        ({"gap": 9.0, "budget": "0.35"}, []),
        ({"gap": 0.9, "budget": "0.25"}, []),
        ({"gap": 1.1, "budget": "0.25"}, ["edge"]),
        ({"gap": 2.1, "budget": "floor+20%"}, ["edge"]),
        ({"gap": 3.9, "budget": "floor+10%"}, []),
        ({"status": "unsettled", "budget": "floor+10%"}, ["plan", "edge"]),
        ({"status": "infeasible", "budget": "floor+10%", "budget_bytes": 29, "gap": None}, []),
        ({"overhead": 2.6}, ["baselines"]),
        ({"overhead": 2.6, "budget_bytes": 39}, []),
        ({"status": "unsettled"}, ["plan", "gap"]),
        ({"status": "unsettled", "budget": "floor+2%"}, ["plan", "gap", "plan at the floor"]),
        ({"status": "unsettled", "budget_bytes": 29}, ["gap"]),
        ({"status": "infeasible", "budget_bytes": 29, "gap": None}, []),
        ({"status": "infeasible", "gap": None}, ["plan"]),
        ({"status": "crashed", "error": "exit code 1"}, ["answer"]),
        ({"seconds": 33.1}, ["limit"]),
    ],
)
def test_claims_on_a_plan(changes: dict[str, Any], claims: list[str]) -> None:
    assert _failed(_row(**changes), LEAST, BASELINES) == claims


def test_claims_on_the_least_budget() -> None:
    assert _failed(LEAST | {"peak_bytes": 31}) == ["least"]  # 5 % above 20, with 10 resident
    assert _failed(LEAST | {"error": "killed"}) == ["answer"]


def test_claims_on_named_graphs() -> None:
    assert _failed(_row("traced/bert-base-b16x256", overhead=9.614)) == []
    assert _failed(_row("traced/bert-base-b16x256", overhead=9.62)) == ["prototype"]
    assert _failed(_row("internvl2-1b-b2x1792", seconds=11.0)) == ["speed"]
    assert _failed(_row("internvl2-1b-b2x1792", "0.9", seconds=11.0, peak_rss_bytes=2**31 + 1)) == ["memory"]
    assert _failed(_row("llama-7b-b2x4096", seconds=30.5)) == ["speed"]
    assert _failed(_row("vit-large-b64x224", "floor+2%", gap=10.6)) == ["gap"]  # half of 21.3 is 10.65
    assert _failed(_row("vit-large-b64x224", "floor+2%", gap=10.7)) == ["gap", "edge"]
    assert _failed(_row("gru-b256x64", "0.35", gap=1.1)) == ["recurrent"]
    assert _failed(_row("gru-cell-b1024x40", "0.35", gap=2.9)) == []


def test_a_lower_budget_is_never_faster() -> None:
    lower = _row(budget="0.35", budget_bytes=40, overhead=1.5)
    assert _failed(_row(), lower) == ["monotone"]
    assert _failed(_row(), lower | {"overhead": 2.0}) == []
    assert _failed(_row(), lower | {"status": "unsettled"}) == []


def test_claims_on_layered_dags() -> None:
    row = _row("layered-1000", "0.9", ops=1000, turn=None, overhead=0.7, seconds=179.0, time_limit_s=180.0)
    free = row | {"order": "free", "overhead": 0.05}
    row |= {"bound": 0.1}
    assert _failed(row, free) == []
    assert _failed(row | {"overhead": 0.71}, free) == ["layered"]
    assert _failed(row | {"overhead": 0.71, "bound": 0.65}, free) == []
    assert _failed(row, free | {"overhead": 0.2}) == ["free order"]
    assert _failed(row, free | {"overhead": 0.8}) == ["free order", "free order"]
    assert _failed(row | {"seconds": 181.0}) == ["layered speed"]


def test_the_table_shows_every_row_and_counts_what_is_not_met() -> None:
    rows = _keyed(_row(gap=0.4), _row(budget="0.4", status="unsettled", budget_bytes=20), LEAST, BASELINES)
    run = bench_solvers.this_run()
    before = _row(kind="before", overhead=2.75, gap=0.85)
    text = solver_table.markdown([run], rows | _keyed(before))
    assert _failed(*rows.values()) == ["gap", "gap"]  # the gap, and 1 point at 40 % without a plan
    lines = [line for line in text.splitlines() if line.startswith("| m |")]
    assert len(lines) == 3
    assert (
        "| 0.5 | 4e-08 | 2.00 | 1.90 | 0.40 | 2.75 | 1.90 | 0.85 |" in lines[0] and "gap (0.40)" in lines[0]
    )
    assert "| 2.50 |" in lines[0]  # sqrt fits; no other baseline does
    assert "| 0.4 | 1e-08 |  | 1.90 |  |  |  |  | unsettled |" in lines[1]
    assert len({line.count("|") for line in lines[:2]}) == 1
    assert run["date"] in text


def test_budgets_are_shares_of_activations() -> None:
    problem = replace(random_training_graph(3), resident_bytes=1000)
    top = keep_all_peak(problem) - 1000
    floor = 1000 + (top * 2) // 5
    assert bench_solvers.budget_bytes_of("0.5", "m", problem, floor) == 1000 + round(0.5 * top)
    jobs = bench_solvers.jobs_of("m", problem, [], None, floor)
    near = next(j for j in jobs if j.budget == "floor+2%")
    assert near.budget_bytes - 1000 == pytest.approx(1.02 * (floor - 1000), abs=1)
    shares = {"0.9", "0.7", "0.5", "0.4"}
    assert {j.budget for j in jobs} == shares | {*bench_solvers.ABOVE_FLOOR} or floor > 1000 + 0.4 * top
    assert all(j.budget_bytes >= floor for j in jobs)
    assert [j.kind for j in bench_solvers.first_jobs_of("m", None)] == ["least", "baselines"]
    assert len({j.key for j in jobs}) == len(jobs)
    some = bench_solvers.jobs_of("m", problem, ["0.9"], 7.0, floor)
    assert {(j.kind, j.budget, j.time_limit_s) for j in some} == {
        ("greedy", "0.9", 7.0),
        ("plan", "0.9", 7.0),
    }


def test_every_kind_of_job_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_training_graph(1)
    monkeypatch.setattr(solver_jobs, "load_graph", lambda name: problem)
    budget = round(0.8 * keep_all_peak(problem))
    job = Job("plan", "m", 1.0, "0.8", budget)
    rows = _keyed(*(solver_jobs.run(replace(job, kind=kind)) for kind in ("plan", "greedy")))
    rows |= _keyed(*(solver_jobs.run(Job(kind, "m", 1.0)) for kind in ("least", "baselines")))
    assert set(rows["m|baselines|fixed|"]["plans"]) == set(solver_table.BASELINES) - {"greedy"}
    plan = rows["m|plan|fixed|0.8"]
    assert plan["peak_bytes"] <= budget and 0 <= plan["bound"] <= plan["overhead"]
    assert plan["peak_rss_bytes"] > 10**7
    assert not {"answer", "plan", "baselines", "limit"} & set(_failed(*rows.values()))
    refused = solver_jobs.run(replace(job, budget_bytes=1))
    assert refused["status"] == "infeasible" and refused["floor_bytes"] > 1


def test_blocks_of_several_sizes() -> None:
    problem = random_training_graph(0, layers=4)
    paths = ["stem", "stages.0.layers.0.conv", "stages.0.layers.1", "stages.1.pool"]
    assert problem.turn is not None
    modules = (paths * problem.turn)[: problem.turn]
    coarse, fine = solver_jobs.blockings(problem, modules)
    assert [op.group for op in coarse.ops[:4]] == [None, "stages.0", "stages.0", "stages.1"]
    assert [op.group for op in fine.ops[:4]] == [None, "stages.0.layers.0", "stages.0.layers.1", "stages.1"]
    assert all(op.group is None for op in fine.ops[problem.turn :])
    assert solver_jobs.blockings(problem, []) == []
    assert solver_jobs.blockings(problem, ["stem"] * problem.turn) == []


def test_results_are_merged_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "results" / "solvers.json"
    job, other = Job("plan", "m", 30.0, "0.5", 50), Job("plan", "m", 30.0, "0.4", 40)
    first = Results(path)
    first.add(job, _row(), {"solvers": "old", "date": "1"})
    first.add(other, _row(budget="0.4"), {"solvers": "old", "date": "1"})
    assert len(json.loads(path.read_text())["runs"]) == 1
    second = Results(path)
    assert second.is_current(job, "old") and not second.is_current(job, "new")
    assert not second.is_current(replace(job, time_limit_s=9.0), "old")
    second.add(job, _row(overhead=1.0), {"solvers": "new", "date": "2"})
    assert second.is_current(job, "new") and second.is_current(replace(other, budget_bytes=50), "old")
    assert {run["date"] for run in second.runs} == {"1", "2"}
    second.add(other, _row(budget="0.4"), {"solvers": "new", "date": "2"})
    assert [run["date"] for run in Results(path).runs] == ["2"]


def test_a_crash_costs_one_row() -> None:
    row = bench_solvers.computed(Job("plan", "no such graph", 1.0, "0.5", 1))
    assert row["status"] == "crashed" and "FileNotFoundError" in row["error"]


def test_graphs_are_chosen_by_name_or_by_beginning() -> None:
    names = ["layered-100", "layered-1000", "unet", "unet-large"]
    assert bench_solvers.chosen(None, names) == names
    assert bench_solvers.chosen(["layered-100"], names) == ["layered-100"]
    assert bench_solvers.chosen(["layered-", "unet"], names) == names[:3]
    assert bench_solvers.chosen(["no"], names) == []


def test_all_graphs_of_the_benchmark_are_there() -> None:
    names = solver_jobs.graph_names()
    assert {*graphs.GRAPHS, *layered.INSTANCES, *solver_table.PROTOTYPE} <= set(names)
    assert len(names) == len(set(names))
    stated = solver_jobs.load_graph("traced/internvl2-1b-2x1792")
    assert isinstance(stated, Problem)
    assert solver_jobs.keep_all_bytes("traced/internvl2-1b-2x1792", stated) == 22_918_219_140


@pytest.mark.parametrize(
    ("name", "in_regions"), [("PatchTST", False), pytest.param("DebertaV2", True, marks=pytest.mark.nightly)]
)
def test_families_are_planned_as_one_graph_or_in_regions(
    name: str, in_regions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_families, "SOLVE_S", 0.5)
    assert len(bench_families.FAMILIES) >= 70
    row = bench_families.row_of(name)
    assert row.verdict == "equal" and row.ops and not row.note
    assert bool(row.regions) is in_regions


class _Reads(nn.Module):
    """Layers and, between two of them, a line that reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU())
        self.second = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if hidden.mean().item() < 2 else -hidden)


def test_a_model_of_a_package_is_trained_as_it_is_and_planned() -> None:
    rows: list[bench_packages.Row] = []
    case = Case("here/reads", "torch", lambda: Sample(_Reads(), lambda: (torch.randn(512, 16),), squares))
    bench_packages.measure(case, "auto", rows.append)
    row = rows[-1]
    assert row.status == "equal" and row.budget_bytes is not None and row.peak_bytes is not None
    assert row.regions == 2
    assert row.peak_bytes <= row.budget_bytes < (row.plain_bytes or 0)
    broken = Case(
        "here/broken", "torch", lambda: Sample(nn.Linear(2, 2), lambda: (torch.randn(3, 5),), squares)
    )
    bench_packages.measure(broken, "auto", rows.append)
    assert rows[-1].status == "broken" and "shapes" in rows[-1].words


def test_the_page_of_packages_is_that_of_its_rows() -> None:
    cases = load()
    assert len(cases) >= 120 and len({case.package for case in cases.values()}) >= 30
    file = bench_packages.RESULTS / "packages.json"
    rows = bench_packages.read(file)
    assert {row.name for row in rows} <= cases.keys()
    text = bench_packages.page(json.loads(file.read_text(encoding="utf-8")), rows)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == text
