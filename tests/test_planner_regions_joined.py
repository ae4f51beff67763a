"""A step in regions as one problem: what it counts, what its schedules mean to regions, what plans say."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import planner
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import capture
from planner.costs.op_costs import Costs, graph_costs
from planner.costs.target import target_for
from planner.devices.rates import Device
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.memory.resident import Resident
from planner.options import Search
from planner.plan import Plan
from planner.plans.lowering import lower
from planner.regions.join import join
from planner.regions.joined import Joined, parts
from planner.regions.record import Crossing, Event, Record, RegionCall
from planner.rewrite.emit import emit
from planner.solving.in_regions import JoinedStep, step_in_regions
from planner.solving.priced import prepare
from solvers import Problem, Schedule, minimum_peak, simulate, solve
from solvers.core.simulate import simulate_steps
from tests.solver_graphs import best_seconds, least_peak

WIDTH = 8
BYTES = 16 * WIDTH * 4  # of what passes from one piece to the next

PIECES: dict[str, list[nn.Module]] = {
    "tiny": [nn.Linear(WIDTH, 12), nn.Sigmoid(), nn.Linear(12, WIDTH)],
    "half": [nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Tanh()],
    "mlp": [nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.Tanh()],
    "dropout": [nn.Linear(WIDTH, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, WIDTH)],
    "norm": [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Sigmoid(), nn.Linear(16, WIDTH)],
}


RATES = Device("made", 5e10, 1e11, 1e11, 1e11, 1e10, 1e-6)  # no machine's: all schedules are looked at


@functools.cache
def piece(kind: str) -> tuple[TrainingGraph, Costs]:
    """A region's own step, and what it costs; captured once."""
    x = torch.randn(16, WIDTH, requires_grad=True)
    graph = training_graph(capture(nn.Sequential(*PIECES[kind]), (x,), None))
    return graph, graph_costs(graph, "roofline", rates=RATES)


def named(graph: TrainingGraph, prefix: str) -> dict[str, str]:
    """The parameters of a region, as they are called in the model."""
    names = (str(key) for kind, key in graph.sources.values() if kind == "parameter")
    return {name: f"{prefix}.{name}" for name in names}


def row_of(count: int, *, apart: bool = False) -> list[Event]:
    """``count`` regions forward and back, nothing measured; ``apart``: the loss ends in glue of its own."""
    glue = ("glue", None)
    forward = [kind for k in range(count) for kind in (("forward", k), glue)]
    backward = [kind for k in reversed(range(count)) for kind in (("backward", k), glue)]
    before = [glue, *forward]
    after = [*([glue] if apart else []), *backward]
    rows = [(kind, call, True) for kind, call in before] + [(kind, call, False) for kind, call in after]
    return [
        Event(kind, call, 0, 0, 1e-5 if kind == "glue" else 0.0, is_forward)  # type: ignore[arg-type]
        for kind, call, is_forward in rows
    ]


def made_record(rng: random.Random, kinds: Sequence[str], *, measured: bool = True) -> Record:
    """A chain of pieces; what passes between them is at times another tensor, and lives as it likes."""
    events = row_of(len(kinds), apart=rng.random() < 0.5)
    forward = {e.call: i for i, e in enumerate(events) if e.kind == "forward"}
    backward = {e.call: i for i, e in enumerate(events) if e.kind == "backward"}
    crossings: list[Crossing] = []

    def cross(born: int) -> int:
        died = rng.choice([None, *range(born + 1, len(events))])
        crossings.append(Crossing(BYTES, born, died))
        return len(crossings) - 1

    taken: list[dict[tuple[str, str | int], int]] = [{} for _ in kinds]
    given_: list[dict[tuple[str, str | int], int]] = [{} for _ in kinds]
    passed = cross(0)
    for k in range(len(kinds)):
        taken[k]["input", 0] = passed
        passed = given_[k]["output", 0] = cross(forward[k])
        passed = passed if rng.random() < 0.5 else cross(forward[k] + 1)
    passed = cross(backward[len(kinds) - 1] - 1)
    for k in reversed(range(len(kinds))):
        taken[k]["tangent", 0] = passed
        if k and rng.random() < 0.8:
            passed = given_[k]["gradient", 0] = cross(backward[k])
        if rng.random() < 0.5:
            passed = cross(backward[k] + 1)
    calls = []
    for k, kind in enumerate(kinds):
        graph, costs = piece(kind)
        renamed = named(graph, kind if rng.random() < 0.5 else f"blocks.{k}")
        steps, turn = tuple(range(len(graph.ops))), graph.turn
        if rng.random() < 0.3:  # it was recorded with something made again
            again = next(i for i in range(turn) if graph.ops[i].recomputable)
            steps = (*steps[:turn], again, *steps[turn:])
        path = "" if k % 2 else f"blocks.{k}"
        calls.append(RegionCall(f"r{k}", graph, costs, path, renamed, taken[k], given_[k], steps, turn))
    if measured:
        for i, event in enumerate(events):
            live = rng.choice([0, rng.randint(0, 9000)])
            peak = live + rng.choice([0, rng.randint(0, 4000)])
            events[i] = dataclasses.replace(event, live_bytes=live, peak_bytes=peak)
    return Record(tuple(events), tuple(calls), tuple(crossings), 0)


def some_records(most: int, *, measured: bool = True) -> st.SearchStrategy[Record]:
    def make(seed: bytes) -> Record:
        rng = random.Random(seed)
        kinds = [rng.choice(list(PIECES)) for _ in range(rng.randint(1, most))]
        return made_record(rng, kinds, measured=measured)

    return st.binary(min_size=8, max_size=8).map(make)


def problem_of(joined: Joined) -> Problem:
    return lower(joined.graph, joined.costs, resident_bytes=0)


def series(joined: Joined) -> tuple[list[int], list[int]]:
    """Most bytes in each event of the recorded step, and bytes at its end."""
    problem = problem_of(joined).as_run(joined.recorded)
    placed = joined.placed(joined.recorded)
    line = simulate_steps(problem, [i for i, _ in placed])
    peak, live = ([0] * len(joined.record.events) for _ in range(2))
    for t, (_, event) in enumerate(placed):
        peak[event] = max(peak[event], int(line.live_bytes[t]))
        live[event] = int(line.kept_bytes[t])
    return peak, live


several = settings(max_examples=60, deadline=None)


# -- what it counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "dropout", "norm"])
def test_one_region_and_no_glue_is_the_regions_own_problem(kind: str) -> None:
    graph, costs = piece(kind)
    steps = tuple(range(len(graph.ops)))
    gives: dict[tuple[str, str | int], int] = {("output", 0): 0, ("gradient", 0): 1}
    call = RegionCall("r0", graph, costs, "", {}, {}, gives, steps, graph.turn)
    held = (Crossing(BYTES, 1, None), Crossing(BYTES, 3, None))
    events = tuple(dataclasses.replace(event, seconds=0.0) for event in row_of(1))
    joined = problem_of(join(Record(events, (call,), held, 0)))
    own = lower(graph, costs, resident_bytes=0)
    top = simulate(own, Schedule.keep_all(own)).peak_bytes
    assert simulate(joined, Schedule.keep_all(joined)).peak_bytes == top
    least = minimum_peak(own, time_limit_s=5)
    assert minimum_peak(joined, time_limit_s=5).budget_bytes == least.budget_bytes
    for budget in (least.budget_bytes, (least.budget_bytes + top) // 2):
        a, b = (solve(p, budget, time_limit_s=5) for p in (own, joined))
        assert a.seconds == pytest.approx(b.seconds, rel=1e-9)
        assert a.bound_seconds == pytest.approx(b.bound_seconds, rel=1e-6)


@several
@given(some_records(3))
def test_the_recorded_step_takes_at_least_what_was_measured(record: Record) -> None:
    peak, live = series(join(record))
    for e, event in enumerate(record.events):
        assert peak[e] >= event.peak_bytes and live[e] >= event.live_bytes, (e, event)


@several
@given(some_records(3, measured=False), st.randoms(use_true_random=False))
def test_what_glue_holds_and_needs_is_found_to_the_byte(record: Record, rng: random.Random) -> None:
    peak, live = series(join(record))
    held = scratch = before = 0
    events = []
    for e, event in enumerate(record.events):
        if event.call is None:  # what glue holds it lets go of only where it runs
            before, held, scratch = held, rng.choice([0, held, rng.randint(0, 3000)]), rng.choice([0, 700])
            most = peak[e] + max(before, held) + scratch
        else:
            most = peak[e] + held
        events.append(dataclasses.replace(event, peak_bytes=most, live_bytes=live[e] + held))
    found = join(dataclasses.replace(record, events=tuple(events)))
    assert series(found) == ([e.peak_bytes for e in events], [e.live_bytes for e in events])
    ends = sum(v.bytes for v in found.graph.values if v.name.startswith("held/") and v.final)
    assert ends == held  # what is left when the step is over stays


def test_what_passes_between_regions_is_one_value_and_made_once() -> None:
    record = made_record(random.Random(3), ["mlp", "mlp"], measured=False)
    lives = [Crossing(BYTES, 1, 2)]  # r0 gives it, the glue behind lets go of it: r1 takes another
    (first, second) = record.calls
    calls = (
        dataclasses.replace(first, crossings={}, gives={("output", 0): 0}),
        dataclasses.replace(second, crossings={}, gives={}),
    )
    record = Record(tuple(row_of(2)), calls, tuple(lives), 0)
    joined = join(record)
    graph = joined.graph
    (given_away,) = (v for v in graph.values if v.name == "r0/tanh")
    assert given_away.producer is not None and not graph.ops[given_away.producer].recomputable
    index = graph.values.index(given_away)
    readers = [op.name for op in graph.ops if index in op.inputs]
    assert readers == ["glue/1", "r0/tanh_backward"]
    # what r1 makes and nobody takes is there until it returns, and may be made again
    (nobodys,) = (v for v in graph.values if v.name == "r1/tanh")
    assert not nobodys.final and graph.ops[nobodys.producer or 0].recomputable
    assert graph.values.index(nobodys) in next(op for op in graph.ops if op.name == "glue/2").inputs
    late = dataclasses.replace(record, crossings=(Crossing(BYTES, 1, 6),))
    (op,) = (op for op in join(late).graph.ops if op.name == "glue/3")
    assert index in op.inputs  # nothing is gone before it was


def test_gradients_added_up_within_a_backward_are_there_until_it_ends() -> None:
    record = made_record(random.Random(3), ["mlp"], measured=False)
    ends = next(e for e, event in enumerate(record.events) if event.kind == "backward")
    lives = (Crossing(BYTES, ends, ends), Crossing(BYTES, ends, ends + 1))  # the sum has no giver
    call = dataclasses.replace(record.calls[0], crossings={}, gives={("gradient", 0): 0})
    joined = join(dataclasses.replace(record, calls=(call,), crossings=lives))
    ops, values = joined.graph.ops, joined.graph.values
    (at,) = (i for i, op in enumerate(ops) if op.target == "gradient_sum")
    assert joined.owners[at - 1] is not None and ops[at + 1].target == "glue"
    assert [values[v].name for v in ops[at].inputs] == ["r0/mm_2"]
    assert set(ops[at].outputs) <= set(ops[at + 1].inputs)
    assert [event for i, event in joined.placed(joined.recorded) if i == at] == [ends]


def test_a_parameter_of_two_calls_is_there_once_and_its_gradients_are_added() -> None:
    graph, costs = piece("mlp")
    calls = tuple(
        RegionCall(f"r{k}", graph, costs, "", named(graph, "shared"), {}, {}, tuple(range(len(graph.ops))), 4)
        for k in range(2)
    )
    joined = join(Record(tuple(row_of(2)), calls, (), 0))
    values = joined.graph.values
    assert sum(v.kind == "parameter" and v.bytes > 0 for v in values) == len(named(graph, ""))
    left = [v for v in values if v.kind == "gradient" and v.final]
    sizes = [p.numel() * 4 for p in nn.Sequential(*PIECES["mlp"]).parameters()]
    assert sorted(v.bytes for v in left) == sorted(sizes)
    problem = problem_of(joined)
    steps = list(range(len(problem)))
    line = simulate_steps(problem, steps)
    assert int(line.kept_bytes[-1]) == sum(sizes)
    for t, op in enumerate(joined.graph.ops):  # in place: no more than the two that are there
        if op.target == "gradient_sum":
            assert line.live_bytes[t] == line.kept_bytes[t - 1]
    assert sum(op.target == "gradient_sum" for op in joined.graph.ops) == len(sizes)


def test_records_that_are_no_row_of_events_are_refused() -> None:
    record = made_record(random.Random(0), ["mlp"])
    for events in (record.events[1:], record.events[:-1], record.events[:1], (*record.events[:2],) * 2):
        with pytest.raises(ValueError, match=r"glue|ran|calls"):
            dataclasses.replace(record, events=events)
    with pytest.raises(ValueError, match="a crossing that there is not"):
        dataclasses.replace(record, crossings=())
    call = dataclasses.replace(record.calls[0], crossings={("tangent", 0): 0}, gives={})
    late = (Crossing(BYTES, len(record.events) - 1, None),)
    with pytest.raises(ValueError, match="before it is made"):  # a tangent of after the backward
        join(dataclasses.replace(record, calls=(call,), crossings=late))


# -- the way back ---------------------------------------------------------------------------------


def somewhere_else(joined: Joined, problem: Problem, rng: random.Random) -> list[int]:
    """All ops in order, and recomputations wherever a schedule may have them."""
    steps = list(range(len(problem)))
    able = [i for i, op in enumerate(problem.ops) if op.recomputable]
    for _ in range(rng.randint(1, 8) if able else 0):
        i = rng.choice(able)
        steps.insert(rng.randint(steps.index(i) + 1, len(steps)), i)
    return steps


@several
@given(some_records(3), st.randoms(use_true_random=False))
def test_every_schedule_is_run_by_the_regions(record: Record, rng: random.Random) -> None:
    joined = join(record)
    problem = problem_of(joined)
    steps = somewhere_else(joined, problem, rng)
    normal = joined.normal(steps)
    assert joined.normal(normal) == normal
    assert list(dict.fromkeys(normal)) == list(dict.fromkeys(steps))
    simulate_steps(problem.as_run(normal), normal)
    for call, (own, turn) in zip(record.calls, parts(joined, steps), strict=True):
        assert set(own) == set(range(len(call.graph.ops)))
        # nothing of the backward runs before the turn, and each step finds what it reads
        assert all(i < call.graph.turn for i in own[:turn])
        there = {v for v, value in enumerate(call.graph.values) if value.producer is None}
        for i in own:
            assert there.issuperset(call.graph.ops[i].inputs)
            there.update(call.graph.ops[i].outputs)
        assert len(emit(call.graph, own, turn=turn).segments) >= 1


def test_what_is_made_again_between_its_passes_waits_for_the_backward() -> None:
    joined = join(made_record(random.Random(1), ["mlp", "norm"], measured=False))
    ops = joined.graph.ops
    at = {op.name: i for i, op in enumerate(ops)}
    steps = list(range(len(ops)))
    first, last = at["glue/1"], len(steps) - 1
    again = [*steps[: first + 1], at["r0/addmm"], *steps[first + 1 : last], at["r1/addmm"], *steps[last:]]
    begins = joined.windows[0][1]
    placed = joined.placed(again)
    assert (at["r0/addmm"], begins) in placed
    moved = [i for i, _ in placed].index(at["r0/addmm"], first)
    assert ops[[i for i, _ in placed][moved + 1]].name == "r0/tanh_backward"
    assert [i for i, _ in placed].count(at["r1/addmm"]) == 1  # nobody reads it there


@pytest.mark.parametrize("seed", range(3))
def test_answers_and_bounds_hold_against_all_schedules(seed: int) -> None:
    rng = random.Random(seed)
    two = seed == 1
    joined = join(made_record(rng, ["half", "half"] if two else ["tiny"], measured=not two))
    problem = problem_of(joined)
    least, _ = least_peak(problem)
    assert minimum_peak(problem, time_limit_s=5).budget_bytes == least
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    for budget in {least, (least + top) // 2}:
        found, best = solve(problem, budget, time_limit_s=5), best_seconds(problem, budget)
        assert best is not None and found.seconds == pytest.approx(best[0], rel=1e-9)
        assert found.bound_seconds <= best[0] * (1 + 1e-9)
        normal = joined.normal(found.schedule.steps(problem))
        assert simulate_steps(problem.as_run(normal), normal).peak_bytes <= budget


# -- plans ----------------------------------------------------------------------------------------

CUTS = ("model.py:12 in forward: a tensor's value is read", "model.py:20 in forward: a print")


@pytest.fixture(scope="module")
def step() -> JoinedStep:
    model = nn.ModuleDict({kind: nn.Sequential(*PIECES[kind]) for kind in ("mlp", "dropout", "norm")})
    record = made_record(random.Random(7), ["mlp", "dropout", "norm"])
    resident = Resident(1000, 0, 0, BYTES)
    inputs = Inputs((torch.zeros(16, WIDTH),), {})
    target = target_for(model, "roofline")
    record = dataclasses.replace(record, cuts=CUTS)
    return JoinedStep.of(record, model, inputs, resident, target, least_limit_s=2.0)


@pytest.fixture(scope="module")
def plan(step: JoinedStep) -> Plan:
    between = (step.minimum_peak_bytes + step.baseline_peak_bytes) // 2
    return step.plan_bytes(between, Search(time_limit_s=2.0))


def test_one_budget_over_all_regions(step: JoinedStep, plan: Plan) -> None:
    assert step.floor_bytes <= step.minimum_peak_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert 0 < plan.overhead_bound <= plan.overhead
    made = parts(step.joined, [step.joined.graph.ops.index(op) for op in step.joined.graph.ops])
    assert [len(own) for own, _ in made] == [len(call.graph.ops) for call in step.record.calls]
    again = sum(len(own) for own, _ in step.parts(plan)) - sum(len(own) for own, _ in made)
    assert again == len(plan.sequence) - plan.op_count > 0
    curve = step.frontier(points=2, search=Search(time_limit_s=0.5))
    assert (curve.points[0].overhead or 0.0) > 0.0 == curve.points[-1].overhead
    with pytest.raises(InfeasibleBudgetError, match="least budget"):
        step.plan_bytes(step.floor_bytes - 1)


def test_a_plan_names_its_regions(step: JoinedStep, plan: Plan) -> None:
    assert [r.name for r in plan.regions] == ["r0", "r1", "r2"]
    assert [r.path for r in plan.regions] == ["blocks.0", "", "blocks.2"]
    assert sum(r.recompute_s for r in plan.regions) == pytest.approx(plan.recompute_s)
    glue_s = sum(event.seconds for event in step.record.events)
    assert sum(r.seconds for r in plan.regions) == pytest.approx(plan.step_s - glue_s)
    recomputed = {p.name: p.bytes for p in plan.placements if p.decision == "recompute"}
    assert recomputed and sum(r.recomputed_bytes for r in plan.regions) == sum(recomputed.values())
    text = plan.summary()
    assert "3 regions" in text and all(
        part in text for cut in CUTS for part in re.split(" in forward: ", cut)
    )
    memory, time = (sum(getattr(r, f"{of}_share") for r in plan.regions) for of in ("memory", "time"))
    assert 0 < memory < 1 and 0 < time < 1
    assert f"{memory:.1%} of the step's memory and {time:.1%} of its time in them" in text
    assert "3 regions" in plan._repr_html_()
    places = {p.call.partition("/")[0] for p in plan.placements}
    assert places == {"r0", "r1", "r2", "glue"}
    assert {p.module for p in plan.placements if p.call.startswith("glue")} == {"(between regions)"}


def test_it_is_looked_at_as_a_plan_of_one_graph(step: JoinedStep, plan: Plan) -> None:
    for p in plan.placements:
        assert p.name in str(plan.explain(p.name))
    assert "code between regions" in str(plan.explain("(between regions)"))
    assert plan.diff(step.least_plan()).changed
    assert len(plan.to_dataframe()) == len(plan.placements)
    assert plan.plot_placements() is not None and plan.plot_memory() is not None


def test_files(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = planner.load(tmp_path / "plan.json")
    assert loaded.regions == plan.regions and loaded.cuts == plan.cuts == CUTS
    assert loaded.summary() == plan.summary()
    assert str(loaded.explain("r0/gelu")) == str(plan.explain("r0/gelu"))
    for of in (plan, loaded):
        with pytest.raises(PlannerError, match="3 regions"):  # there is no one program to run
            of.rewrite(nn.Linear(2, 2))
    text = (tmp_path / "plan.json").read_text().replace('"name": "r0"', '"name": 0')
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(planner.InvalidPlanFileError, match="region"):
        planner.load(tmp_path / "bad.json")


def test_the_fingerprint_is_of_what_runs_and_not_of_what_was_measured(step: JoinedStep) -> None:
    def of(record: Record) -> str:
        return JoinedStep.of(
            record, step.model, step.captured.inputs, step.resident, step.target
        ).captured.fingerprint

    record = step.record
    other = tuple(dataclasses.replace(e, live_bytes=0, peak_bytes=0, seconds=0.0) for e in record.events)
    assert of(dataclasses.replace(record, events=other)) == of(record)
    swapped = (record.calls[0], dataclasses.replace(record.calls[1], path="elsewhere"), record.calls[2])
    assert of(dataclasses.replace(record, calls=swapped)) != of(record)


def test_a_plan_serves_a_step_whose_glue_is_cut_elsewhere(step: JoinedStep) -> None:
    """As another process may have cut it, by what was freed when: the plan is that of the same regions."""
    record = step.record
    at = max(e for e, event in enumerate(record.events) if event.kind == "glue" and event.is_forward)
    events = (*record.events[: at + 1], record.events[at], *record.events[at + 1 :])
    crossings = tuple(
        dataclasses.replace(
            c, born=c.born + (c.born > at), died=None if c.died is None else c.died + (c.died > at)
        )
        for c in record.crossings
    )
    cut = dataclasses.replace(record, events=events, crossings=crossings)
    other = JoinedStep.of(cut, step.model, step.captured.inputs, step.resident, step.target)
    assert other.captured.fingerprint == step.captured.fingerprint
    budget = (step.minimum_peak_bytes + step.baseline_peak_bytes) // 2
    plan = step.plan_bytes(budget, Search(time_limit_s=0.5))
    served = other.as_run_here(plan, budget)
    assert served is not None and len(served.sequence) == len(plan.sequence) + 1
    assert other.parts(served) == step.parts(plan)
    # what was proved holds by the costs of who takes it over, too
    slower = dataclasses.replace(
        other,
        costs=dataclasses.replace(other.costs, seconds={k: 2 * s for k, s in other.costs.seconds.items()}),
    )
    again = slower.as_run_here(plan, budget)
    assert again is not None and again.overhead_bound == pytest.approx(served.overhead_bound)


# -- steps that ran -------------------------------------------------------------------------------


class Block(nn.Module):
    """No ``nn.Sequential``, whose code Dynamo leaves alone once it was called under a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Looped(nn.Module):
    """One block called over and over, until a number that is read in Python says stop.

    The loop is eager's, however much of the step the machine is found to spend outside the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    @torch._dynamo.disable(recursive=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x + self.block(x)
            if x.sum().item() > 1e9:
                break
        return x.pow(2).mean()


RAN: list[str] = []  # is not put back when a step is looked at


class Warmed(nn.Module):
    """Other code runs the first time; and no gradient comes for a part of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.sigmoid(self.inner(x))
        for _ in range(3):
            h = torch.tanh(h * h) + h.exp()
        state = (h * h * len(RAN)).softmax(-1)
        torch._dynamo.graph_break()
        if not RAN:
            RAN.append("warm")
        return self.out(h), state


class Whole(nn.Module):
    """Nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*PIECES["norm"], *PIECES["dropout"], *PIECES["mlp"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).pow(2).mean()


def in_regions(model: nn.Module, x: torch.Tensor) -> JoinedStep:
    torch.manual_seed(0)
    RAN.clear()
    loss_fn = None if not isinstance(model, Warmed) else lambda out: out[0].pow(2).mean()
    return step_in_regions(model, (x,), loss_fn=loss_fn, costs="roofline", search=Search(time_limit_s=1.0))


@pytest.mark.parametrize("build", [Looped, Warmed])
def test_plans_of_one_step_take_turns_and_what_they_take_is_predicted(build: type[nn.Module]) -> None:
    step = in_regions(build(), torch.randn(64, 32))
    least, top = step.minimum_peak_bytes, step.baseline_peak_bytes
    for budget in (top, (least + top) // 2, least, top):
        plan = step.plan_bytes(budget, Search(time_limit_s=1.0))
        report = plan.verify()
        assert report.equal, str(report)
        assert report.peak_bytes <= plan.peak_bytes <= budget
        assert plan.peak_bytes <= 1.01 * report.peak_bytes


def test_a_block_that_is_called_over_and_over_is_captured_once() -> None:
    step = in_regions(Looped(), torch.randn(64, 32))
    assert step.session is not None and len(step.record.calls) == 4
    first, *others = (call.graph for call in step.record.calls)
    assert first is not others[0]  # no gradient goes to the batch
    assert all(graph is others[0] for graph in others)
    assert sum(len(region.variants) for region in step.session.regions) == 2


class Apart(nn.Module):
    """Blocks of one structure, each in a graph of its own; and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.last = nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        x = torch.tanh(first(x)).exp()
        torch._dynamo.graph_break()
        x = torch.tanh(second(x)).exp()
        torch._dynamo.graph_break()
        x = torch.tanh(third(x)).exp()
        torch._dynamo.graph_break()
        return torch.tanh(self.last(x)).exp().mean()


def test_graphs_of_one_structure_are_captured_once() -> None:
    step = in_regions(Apart(), torch.randn(64, 32))
    assert step.session is not None and len(step.session.regions) == 4
    first, second, third, last = (call.graph for call in step.record.calls)
    made = {id(v) for region in step.session.regions for v in region.variants.values()}
    assert len(made) == 3  # to the batch no gradient goes
    assert {op.module for op in third.ops} != {op.module for op in second.ops}
    assert first.turn == second.turn == third.turn and [op.name for op in second.ops] != [
        op.name for op in last.ops
    ]
    plan = step.plan_bytes(
        (step.minimum_peak_bytes + step.baseline_peak_bytes) // 2, Search(time_limit_s=0.5)
    )
    report = plan.verify()
    assert report.equal and report.peak_bytes == plan.peak_bytes, str(report)


def test_a_step_of_one_region_is_planned_as_one_graph_is() -> None:
    model, x = Whole(), torch.randn(64, WIDTH)
    torch.manual_seed(0)
    first = Search(time_limit_s=0.0)  # what is found at first, on whatever machine
    one = prepare(model, (x,), costs="roofline", search=first)
    step = step_in_regions(model, (x,), costs="roofline", search=first)
    assert len(step.record.calls) == 1
    assert step.baseline_peak_bytes == one.baseline_peak_bytes
    assert step.minimum_peak_bytes == one.minimum_peak_bytes
    assert step.floor_bytes == one.floor_bytes
    between = (one.floor_bytes + 2 * one.baseline_peak_bytes) // 3
    until_proved = Search(time_limit_s=60.0)
    a, b = (of.plan_bytes(between, until_proved) for of in (one, step))
    assert a.status == b.status == "optimal" and a.recompute_s > 0
    assert b.recompute_s == pytest.approx(a.recompute_s, rel=1e-9)
    assert b.overhead_bound * b.step_s == pytest.approx(a.overhead_bound * a.step_s, rel=1e-6)


class Recurrent(nn.Module):
    """A GRU, whose weights are read at each of twelve turns; ``apart``: beside code of eager's."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.net, self.head, self.apart = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4), apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)[0]
        if self.apart:
            torch._dynamo.graph_break()
        return self.head(x).pow(2).mean()


def test_a_recurrence_is_planned_where_nothing_else_can_read_its_weights() -> None:
    x = torch.randn(1, 12, 16)
    whole = prepare(Recurrent(False), (x,), costs="roofline", search=Search(time_limit_s=1.0))
    alone, beside = (in_regions(Recurrent(apart), x) for apart in (False, True))
    assert alone.baseline_peak_bytes == whole.baseline_peak_bytes  # no gradient of a turn is kept by itself
    assert alone.session is not None and not alone.session.left_to_eager
    assert beside.session is not None and len(beside.record.calls) == 1
    (why,) = beside.session.left_to_eager
    assert "reads weight_hh_l0 12 times" in why
    for step in (alone, beside):
        plan = step.plan_bytes(step.baseline_peak_bytes, Search(time_limit_s=1.0))
        report = plan.verify()
        assert report.equal and report.peak_bytes <= plan.peak_bytes, str(report)
