"""Plans of compiled steps: the graphs that are compiled, what they hold, and that they compute the same."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner import _compat
from planner.compiled.coded import Form
from planner.compiled.emit import Written
from planner.compiled.piece import Own, Piece
from planner.compiled.prices import costs_of_fused
from planner.compiled.session import CompiledSession
from planner.compiled.step import CompiledStep, compiled_step
from planner.costs.target import Target
from planner.options import Search
from planner.plans.lowering import lower
from planner.solving.fit import Answer
from solvers import Schedule, minimum_peak, simulate, solve
from solvers.bounds.lower_bounds import peak_floor, time_bound

WIDTH = 32


@pytest.fixture(autouse=True)
def _two_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of torch's partitions takes a while to be made and to be judged."""
    monkeypatch.setattr("planner.compiled.coded.SHARES", (1.0, 0.5))


class Block(nn.Module):
    """A residual block with a norm, two products, a GELU and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``WIDTH``."""
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + torch.nn.functional.dropout(y, 0.1, self.training)


class Net(nn.Module):
    """Blocks in a row, and a loss."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of squares."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def batch() -> torch.Tensor:
    """Rows."""
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


@functools.cache
def seen(same_bits: bool = False) -> tuple[Net, Piece, Any, tuple[Any, ...]]:
    """The one graph of a step, the problem that is made of it, and what the graph was given."""
    model, kept = Net(), []
    target = Target.of("roofline", torch.device("cpu"))
    session = CompiledSession(target, model, same_bits=same_bits)

    def backend(gm: Any, inputs: Any) -> Any:
        run = session.backend(gm, inputs)

        def called(*args: Any) -> Any:
            kept.append(args)
            return run(*args)

        return called

    torch.compile(model, backend=backend, dynamic=False)(batch()).backward()
    (piece,), (args,) = session.pieces, kept
    assert piece.step is not None
    costs = costs_of_fused(piece.step, session.target)
    return model, piece, lower(piece.step.graph, costs, resident_bytes=0), args


def scheduled(again: bool, same_bits: bool = False) -> Own:
    """Nothing recomputed, or as much as the least peak needs."""
    _, piece, problem, _ = seen(same_bits)
    if not again:
        return piece.keep_all
    assert piece.step is not None
    return own_of(piece, minimum_peak(problem, time_limit_s=1.0).schedule.steps(problem))


def own_of(piece: Piece, steps: list[int]) -> Own:
    """A schedule of its ops."""
    assert piece.step is not None
    ops = piece.step.graph.ops
    return Own(tuple(steps), next(k for k, i in enumerate(steps) if ops[i].phase == "backward"))


def halves(own: Own) -> tuple[Any, Any]:
    """Its forward and its backward."""
    return seen()[1].written(own).split()


def gradients(own: Own) -> dict[str, torch.Tensor]:
    """Of a step whose graph is split as ``own`` says, run call by call."""
    model, piece, _, args = seen()

    def split(joint: Any, forwards: int, static: Any) -> Any:
        return piece.written(own).split()

    call = _compat.compile_split(piece.gm, piece.inputs, split, inner=piece._interpreted)
    model.zero_grad()
    torch.manual_seed(7)
    call(*args)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_recomputed_dropout_draws_the_same_numbers_at_every_budget() -> None:
    _, piece, problem, _ = seen()
    kept = gradients(piece.keep_all)
    assert kept.keys() == {n for n, _ in seen()[0].named_parameters()}
    most, least = simulate(problem, Schedule.keep_all(problem)).peak_bytes, peak_floor(problem).bytes
    ways = {scheduled(again=True)}
    for share in (0.9, 0.7, 0.5):
        found = solve(problem, int(least + share * (most - least)), time_limit_s=0.5)
        ways.add(own_of(piece, found.schedule.steps(problem)))
    assert len(ways) > 1
    for own in ways:
        again = gradients(own)
        assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_what_is_recomputed_has_the_bits_it_had() -> None:
    from torch._inductor.compile_fx import compile_fx_inner

    _, piece, _, args = seen(same_bits=True)
    written = piece.written(scheduled(again=True, same_bits=True))
    nodes = {n.name: n for n in written.joint.graph.nodes}
    pairs = [(nodes[n.meta["recompute_of"]], n) for n in nodes.values() if "recompute_of" in n.meta]
    pairs = [(a, b) for a, b in pairs if isinstance(a.meta["val"], torch.Tensor)]
    targets = {str(a.target) for a, _ in pairs}
    assert "aten.addmm.default" in targets
    assert not targets & {"aten.var_mean.correction", "aten.erf.default"}
    (output,) = written.joint.graph.find_nodes(op="output")
    returned = output.args[0]
    originals, copies = map(list, zip(*dict(pairs).items(), strict=True))
    output.args = ([*returned[: written.forwards], *originals, *returned[written.forwards :], *copies],)
    output.meta = {"desc": [None] * len(output.args[0])}
    shown = Written(written.joint, written.saved, written.sizes, written.forwards + len(originals))
    forward, backward = shown.split()
    made: dict[str, torch.Tensor] = dict(zip(_given(forward), args, strict=True))
    (first,) = forward.graph.find_nodes(op="output")
    names = [n.name for n in first.args[0]]
    with torch.no_grad():
        fakes = [n.meta["val"] for n in forward.graph.find_nodes(op="placeholder")]
        values = compile_fx_inner(forward, fakes)(list(args))
        made.update(zip(names, values, strict=True))
        made.update((n, torch.ones(())) for n in _given(backward) if n.startswith("tangents"))
        fakes = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
        again = compile_fx_inner(backward, fakes, is_backward=True)([made[n] for n in _given(backward)])
    for before, after in zip([made[n.name] for n in originals], again[-len(copies) :], strict=True):
        assert torch.equal(before, after)


def _given(half: Any) -> list[str]:
    return [n.name for n in half.graph.find_nodes(op="placeholder")]


def test_what_crosses_is_what_the_schedule_keeps() -> None:
    (_, much), (_, little) = halves(scheduled(again=False)), halves(scheduled(again=True))
    calls = [
        sum(n.target is torch.ops.aten.addmm.default for n in half.graph.nodes) for half in (much, little)
    ]
    assert calls[0] == 0 < calls[1]

    def held(half: Any) -> int:
        given = (n.meta["val"] for n in half.graph.find_nodes(op="placeholder") if "primals" not in n.name)
        return sum(x.nbytes for x in given)

    assert held(little) < 0.7 * held(much)


def test_a_weights_gradient_is_made_before_that_of_its_operand() -> None:
    step = seen()[1].step
    assert step is not None
    graph = step.graph
    products = [op for op in graph.ops[graph.turn :] if op.target == "aten.mm"]
    is_gradient = [graph.values[op.outputs[0]].kind == "gradient" for op in products]
    assert is_gradient == [True, False] * (len(products) // 2)


def test_another_schedule_is_another_entry_of_the_caches() -> None:
    piece = seen()[1]
    keys = [piece.key_of(scheduled(again)) for again in (False, True, False)]
    assert keys[0] == keys[2] != keys[1]
    partitioners = [_compat.inductor._partitioner()(None, key) for key in keys]
    first, second, third = map(pickle.dumps, partitioners)
    assert first == third != second


@functools.cache
def compiled_plan() -> tuple[Net, planner.Plan]:
    """A model and its plan at a tight budget."""
    return between(Net(2))


def between(model: Net) -> tuple[Net, planner.Plan]:
    """A model and a plan half the way from the proved floor to torch's own."""
    step = compiled_step(model, (batch(),), costs="roofline", search=Search(time_limit_s=1.0))
    return model, step.plan_bytes((step.baseline_peak_bytes + step.floor_bytes) // 2)


def test_what_fits_without_a_plan_runs_as_torch_splits_it() -> None:
    _, plan = compiled_plan()
    step = plan._origin
    assert isinstance(step, CompiledStep)
    whole = step.plan_bytes(step.baseline_peak_bytes)
    between = step.plan_bytes((plan.budget_bytes + whole.budget_bytes) // 2, Search(time_limit_s=0.1))
    assert whole.overhead <= between.overhead <= plan.overhead
    assert (whole.solver, whole.peak_bytes) == ("torch's partition for 1", step.baseline_peak_bytes)
    assert whole.overhead <= 1e-3 and not plan.solver.startswith("torch's")
    for share, steps, _ in step.torchs:  # those that would draw dropout's seeds again are left out
        again = {step.problem.ops[i].name for i in steps if steps.count(i) > 1}
        assert not any("seeds" in name for name in again), share
    with pytest.raises(planner.PlannerError, match="other bits"):
        seen(same_bits=True)[1].torchs(0.5)


class Attention(nn.Module):
    """Attention, with or without dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, 8) to a number."""
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).square().sum()


@pytest.mark.parametrize(("dropout", "again"), [(0.0, True), (0.5, False)])
def test_attention_runs_again_where_it_draws_nothing(dropout: float, again: bool) -> None:
    session = CompiledSession(Target.of("roofline", torch.device("cpu")))
    torch.compile(Attention(dropout), backend=session.backend, dynamic=False)(torch.randn(2, 16, 8))
    (piece,) = session.pieces
    assert piece.step is not None
    forward = [op for op in piece.step.graph.ops if op.phase == "forward"]
    runs = [op.recomputable for op in forward if "attention" in op.target]
    drawn = [op for op in forward if not op.recomputable]
    assert runs == [True] if again else drawn


class Cut(Net):
    """The same, in two graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of squares."""
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x).square().mean()


def test_two_graphs_share_one_budget() -> None:
    _, plan = between(Cut(2))
    assert [region.name for region in plan.regions] == ["r0", "r1"]
    assert plan.peak_bytes <= plan.budget_bytes < plan.baseline_peak_bytes
    assert sum(region.recomputed_bytes for region in plan.regions) > 0


def test_a_compiled_step_takes_what_was_predicted_and_computes_the_same() -> None:
    model, plan = compiled_plan()
    report = plan.verify()
    assert report.ok, str(report)
    assert report.peak_bytes == pytest.approx(report.predicted_peak_bytes, rel=0.03)
    assert plan.overhead > 0
    assert "forward" not in vars(model)


class Half(Net):
    """Under autocast, without dropout; a bias whose gradient is rounding alone, for a norm is behind it."""

    def __init__(self) -> None:
        super().__init__(2)
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.blocks.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``WIDTH`` to a number."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(self.norm(self.first(x.flatten(0, -2)))).float()


def test_what_rounding_alone_makes_other_is_told_beside_float64() -> None:
    step = compiled_step(Half(), (batch(),), costs="roofline", search=Search(time_limit_s=0.5))
    plan = step.least_plan()
    assert plan.overhead > 0
    report = plan.verify()
    assert not report.equal and report.errors is not None, str(report)
    assert report.ok, str(report)
    assert "torch.compile" in str(report) and "float64" in str(report)
    off = dataclasses.replace(report, errors=dataclasses.replace(report.errors, share=2.1))
    unknown = dataclasses.replace(report, errors=None, no_reference="it draws random numbers")
    assert not off.ok and not unknown.ok
    assert "it draws random numbers" in str(unknown)


class Convolutions(nn.Module):
    """Two convolutions: inductor lays out what they make as it likes, and saves it so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures to a number."""
        x = torch.relu(self.stem(x))
        return torch.relu(x + self.up(x)).square().mean()


def test_convolutions_take_what_was_predicted_in_the_layout_that_inductor_chooses() -> None:
    model, inputs = Convolutions(), (torch.randn(4, 3, 32, 32),)
    step = compiled_step(model, inputs, costs="roofline", search=Search(time_limit_s=0.5))
    plan = step.least_plan()
    report = plan.verify()
    assert report.equal, str(report)
    assert plan.overhead > 0 or torch.__version__ < (2, 12)  # whose inductor takes as little keeping all
    assert report.peak_bytes == pytest.approx(report.predicted_peak_bytes, rel=0.01)
    assert report.compiled_peak_bytes == pytest.approx(step.baseline_peak_bytes, rel=0.01)
    # what the solvers count beside operands is of that layout too: in the other it is more than they are
    assert max(step.costs.workspace_bytes.values()) < 100_000


class Wide3x3(nn.Module):
    """Convolutions with weights that are larger than their pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures to a number."""
        return torch.relu(self.second(torch.relu(self.first(x)))).square().mean()


def test_a_weight_is_not_kept_a_second_time_in_another_layout() -> None:
    """``torch.compile`` itself does that (findings/compiled_keeps_weights_twice.sh)."""
    model, inputs = Wide3x3(), (torch.randn(1, 16, 4, 4),)
    step = compiled_step(model, inputs, costs="roofline", search=Search(time_limit_s=0.5))
    piece = step.calls[0].piece
    weights_bytes = model.first.weight.nbytes + model.second.weight.nbytes
    ours, theirs = (piece.played(own)[0].left_bytes for own in (piece.keep_all, piece.torchs(1.0)))
    assert theirs > weights_bytes
    assert ours < 0.5 * weights_bytes


def test_code_that_spares_memory_takes_what_was_predicted_and_computes_the_same() -> None:
    model, x = Net(3), batch()
    step = compiled_step(model, (x,), costs="roofline", search=Search(time_limit_s=0.5))
    plan = step.plan_of(step.least)
    (own,) = step.owns_of(plan)
    plain, spared = (dataclasses.replace(own, sparing=sparing) for sparing in (False, True))
    assert own == spared  # whose peak is the least
    plan.apply()
    assert step.forward is not None
    run = step.forward
    measured, gradients = {}, {}
    for code in (plain, spared):
        step.owner.follow([code])

        def one_step() -> None:
            run(x).backward()

        torch.manual_seed(0)
        one_step()
        gradients[code] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        measured[code] = planner.measure.allocated_peak(one_step)
        model.zero_grad()
    assert measured[spared] < measured[plain]
    assert measured[spared] == pytest.approx(plan.peak_bytes - step.memory.total_bytes, rel=0.01)
    for name, gradient in gradients[plain].items():
        torch.testing.assert_close(gradients[spared][name], gradient, rtol=1e-5, atol=1e-7)


class Masks(nn.Module):
    """Two masks for the backward alone: of what a product reads there too, and of what nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.last = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to a number."""
        x = torch.relu(self.inner(x))
        return torch.relu(self.outer(x)).sum() + self.last(x).square().sum()


def test_a_mask_is_kept_only_instead_of_what_it_is_made_of() -> None:
    step = compiled_step(Masks(), (torch.randn(8, 16),), costs="roofline", search=Search(time_limit_s=0.5))
    fused = step.calls[0].piece.step
    assert fused is not None
    graph = fused.graph
    made = [(k, graph.values[op.outputs[0]]) for k, op in enumerate(graph.ops[: graph.turn])]
    masks = [k for k, value in made if value.root is not None and value.root.meta["val"].dtype == torch.bool]
    assert len(masks) == 1  # of the second relu
    (product,) = (v for v in graph.ops[masks[0]].inputs if graph.values[v].producer is not None)
    products = [k for k in range(graph.turn) if graph.ops[k].target in ("aten.addmm", "aten.mm")]
    assert graph.values[product].producer == products[1]
    assert products[1] < masks[0] < products[2]  # where that is made, not behind the loss


class Depthwise(nn.Module):
    """Patches, and a convolution of each channel by itself, whose gradient wants other layouts than most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.mixed = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.end = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures to a number."""
        x = torch.tanh(self.patches(x))
        rows = torch.tanh(self.mixed(x)).permute(0, 2, 3, 1)
        return torch.tanh(self.end(rows)).square().mean()


def test_a_convolution_made_again_leaves_gradients_their_layout() -> None:
    """Its own would spread over the backward, where a depthwise gradient takes 17 times its operands."""
    step = compiled_step(
        Depthwise(), (torch.randn(4, 3, 32, 32),), costs="roofline", search=Search(time_limit_s=0.5)
    )
    ops, turn = step.graph.ops, step.graph.turn
    again = [i for i, op in enumerate(ops) if op.phase == "forward" and op.recomputable]
    assert sum("convolution" in ops[i].name for i in again) == 2
    ran = step.execution([*range(turn), *again, *range(turn, len(ops))])
    seconds = 2 * step.problem.total_seconds
    plan = step.plan_of(Answer(ran.peak_bytes, ran, 0.0, 0, seconds))
    assert plan.peak_bytes < 2 * step.baseline_peak_bytes
    report = plan.verify()
    assert report.equal, str(report)
    assert report.peak_bytes == pytest.approx(report.predicted_peak_bytes, rel=0.01)


def test_layouts_that_take_less_time_are_the_plans_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which take less is measured; here all grouped ones are taken to."""
    monkeypatch.setattr("planner.compiled.layouts.CLEARLY", float("inf"))
    step = compiled_step(
        Depthwise(), (torch.randn(4, 3, 32, 32),), costs="profile", search=Search(time_limit_s=0.5)
    )
    (swift,) = step.swifter
    assert step.graph.ops[swift].target == "aten.convolution_backward"
    everything = list(range(len(step.problem)))
    last = step.coded(everything, None, Form(last=frozenset([swift])))
    rows = step.coded(everything, None, Form(sparing=True))
    assert rows.peak_bytes < last.gradient_bytes[swift] <= last.peak_bytes
    roomy, tight = step.plan_bytes(last.peak_bytes), step.plan_bytes(last.gradient_bytes[swift] - 1)
    assert roomy.channels_last == (step.graph.ops[swift].name,) and tight.channels_last == ()
    for plan in (roomy, tight):
        report = plan.verify()
        assert report.ok, str(report)
        assert report.peak_bytes == report.predicted_peak_bytes
        plan.save(tmp_path / "plan.json")
        read = planner.load(tmp_path / "plan.json")
        assert read.channels_last == plan.channels_last
        assert step.owns_of(read) == step.owns_of(plan)
    assert step.owns_of(roomy)[0].last and not step.owns_of(tight)[0].last


def test_nothing_is_laid_out_anew_where_seconds_are_not_measured() -> None:
    step = compiled_step(
        Depthwise(), (torch.randn(4, 3, 32, 32),), costs="roofline", search=Search(time_limit_s=0.5)
    )
    assert step.swifter == {}


def test_a_profile_that_is_at_work_goes_on_and_nothing_is_measured_in_it() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))  # calls that were not measured yet
    with torch.profiler.profile() as seen:
        with pytest.raises(planner.PlannerError, match="before a profile begins"):
            planner.plan(model, 1, (torch.randn(7, 24),), backend="inductor", costs="roofline")
        with pytest.raises(RuntimeError, match="measure outside of it"):
            planner.measure.allocated_peak(lambda: torch.ones(1))
        torch.ones(3).cosh()
    assert "aten::cosh" in {event.key for event in seen.key_averages()}


def test_running_statistics_move_once_where_all_is_recomputed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    eager = copy.deepcopy(model)
    eager(batch()).square().mean().backward()

    def backend(gm: Any, inputs: Any) -> Any:
        target = Target.of("roofline", torch.device("cpu"))
        piece = Piece(0, gm, inputs, CompiledSession(target), target)
        assert piece.step is not None
        graph = piece.step.graph
        again = [i for i, op in enumerate(graph.ops) if op.phase == "forward" and op.recomputable]
        own = Own((*range(graph.turn), *again, *range(graph.turn, len(graph.ops))), graph.turn)

        def split(joint: Any, forwards: int, static: Any) -> Any:
            return piece.written(own).split()

        return _compat.compile_split(piece.gm, piece.inputs, split, inner=piece._interpreted)

    torch.compile(model, backend=backend, dynamic=False)(batch()).square().mean().backward()
    for (name, ours), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_code_that_compiles_itself_trains_within_the_budget(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledSession, "seen_bytes", 10**9)  # of the first step, which is not compiled
    model = Net(1)
    there = sum(t.nbytes for t in (*model.parameters(), batch()))
    budget = there + 160_000
    backend = planner.inductor(budget / 1e9, optimizer=None, costs="roofline", time_limit_s=1.0)
    call = torch.compile(model, backend=backend, dynamic=False)

    def step() -> None:
        model.zero_grad()
        call(batch()).backward()

    with caplog.at_level("WARNING", "planner"):
        step()  # is compiled
        step()  # is seen
        assert backend.plan is None
        step()
    assert backend.plan is not None and backend.plan.peak_bytes <= budget
    assert "the step that was seen took 1 GB" in caplog.text and "call by call" in caplog.text
    model.zero_grad()
    assert there + planner.measure.allocated_peak(step) <= budget


class Wide(nn.Module):
    """As large as its outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 16 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """The mean of what a layer says of scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A number."""
        return self.inner(x).sigmoid().mean()  # type: ignore[no-any-return]


def by_itself(model: nn.Module, budget_gb: float) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """Compiled whole: what to call, and the plan."""
    backend = planner.inductor(budget_gb, optimizer=None, costs="roofline", time_limit_s=1.0)
    return torch.compile(model, backend=backend), lambda: backend.plan


def in_a_function(model: nn.Module, budget_gb: float) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """A function that calls it is compiled."""
    backend = planner.inductor(budget_gb, optimizer=None, costs="roofline", time_limit_s=1.0)
    return torch.compile(lambda x: model(x) * 1.0, backend=backend), lambda: backend.plan


def by_blocks(model: nn.Module, budget_gb: float) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """Its blocks are, in place."""
    backend = planner.inductor(budget_gb, optimizer=None, costs="roofline", time_limit_s=1.0)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    return model, lambda: backend.plan


def enabled(model: nn.Module, budget_gb: float) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """By us."""
    planner.enable(
        model, budget_gb, optimizer=None, backend="inductor", costs="roofline", time_limit_s=1.0, now=True
    )
    return model, lambda: planner.plan_of(model)


def enabled_and_compiled(model: nn.Module, budget_gb: float) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """By us, and once more around it, as ``TrainingArguments(torch_compile=True)`` does."""
    _, plan = enabled(model, budget_gb)
    return torch.compile(model), plan


@pytest.mark.parametrize("way", [by_itself, in_a_function, by_blocks, enabled, enabled_and_compiled])
def test_a_loss_outside_of_compiled_code_is_in_the_peak(
    way: Callable[[nn.Module, float], tuple[Callable[..., Any], Callable[[], Any]]],
) -> None:
    """It saves copies as large as the outputs, in the loop and not in a graph."""
    model, x = Wide(), batch()
    there = sum(t.nbytes for t in (*model.parameters(), x))

    def step() -> None:
        scores = call(x)
        torch.cat([scores, scores.exp()], 1).square().mean().backward()

    call, plan = way(model, 1.0)
    for _ in range(3):
        model.zero_grad()
        step()
    free = plan()
    assert free is not None and free.peak_bytes > there + 4 * x.nbytes * 16  # scores and copies of them
    model.zero_grad()
    measured = there + planner.measure.allocated_peak(step)
    assert 0.97 * free.peak_bytes <= measured <= free.peak_bytes
    assert plan() is free  # no further step is seen


class Forked(nn.Module):
    """What is larger than a few rows takes another way behind a graph that both share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide, self.last = Block(), nn.Linear(WIDTH, 32 * WIDTH), Block()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A mean."""
        x = self.first(x)
        torch._dynamo.graph_break()
        return (
            torch.nn.functional.gelu(self.wide(x)).square().mean()
            if len(y) > 1
            else self.last(x).square().mean()
        )


@pytest.mark.parametrize("way", [by_itself, enabled])
def test_a_call_that_never_has_a_backward_does_not_keep_a_step_from_its_plan(
    way: Callable[[nn.Module, float], tuple[Callable[..., Any], Callable[[], Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two models in turns: what one makes is detached for the other, and made again for itself."""
    maker, judge, x = Wide(), Head(), batch()
    (make, plan), (judged, _) = way(maker, 1.0), way(judge, 1.0)

    def step() -> None:
        maker.zero_grad()
        judge.zero_grad()
        made = make(x)
        judged(made.detach()).backward()
        del made
        judge.zero_grad()
        judged(make(x)).backward()

    with caplog.at_level("INFO", "planner"):
        for _ in range(6):
            step()
        told = len(caplog.records)
        step()
    assert plan() is not None and len(caplog.records) == told
    assert not any(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize("way", [by_itself, enabled])
def test_a_forward_without_a_backward_is_looked_at_a_few_times_alone(
    way: Callable[[nn.Module, float], tuple[Callable[..., Any], Callable[[], Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An evaluation that leaves gradients on."""
    model, x = Wide(), batch()
    (call, plan), told = way(model, 1.0), 0
    with caplog.at_level("INFO", "planner"):
        for k in range(12):
            told = len(caplog.records) if k == 10 else told
            model.zero_grad()
            call(x).square().mean().backward()
            call(x[:40])
    assert plan() is not None and len(caplog.records) == told
    assert sum("3 steps were seen, and no backward came" in r.message for r in caplog.records) == 1


class _Sums(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Words, and whether they are many."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": (ids.sum() > 32 * 32).long()}


@pytest.mark.nightly  # compiles C++ twice
def test_the_trainer_compiles_within_a_budget_below_what_it_would_take(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )

    def trained(folder: Path, budget_gb: float) -> tuple[Any, list[int]]:
        torch.manual_seed(0)
        model, peaks = BertForSequenceClassification(config), []
        planner.enable(model, budget_gb, backend="inductor", costs="roofline", time_limit_s=2.0)

        class Metered(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                if self.state.global_step < 4:
                    return super().training_step(*args, **kwargs)
                batch, losses = args[1].values(), list[torch.Tensor]()
                state = [t for of in self.optimizer.state.values() for t in of.values()]
                tensors = (*model.parameters(), *model.buffers(), *batch, *state)
                there = sum(t.nbytes for t in tensors)
                run = functools.partial(super().training_step, *args, **kwargs)
                peaks.append(there + planner.measure.allocated_peak(lambda: losses.append(run())))
                return losses[0]

        settings = TrainingArguments(
            str(folder), per_device_train_batch_size=8, max_steps=6, torch_compile=True, use_cpu=True,
            gradient_checkpointing=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        Metered(model=model, args=settings, train_dataset=_Sums()).train()
        plan = planner.plan_of(model)
        assert plan is not None and len(peaks) == 2
        return plan, peaks

    free, _ = trained(tmp_path / "free", 1.0)
    plan, peaks = trained(tmp_path / "tight", 0.8 * free.peak_bytes / 1e9)
    assert plan.overhead > 0 and plan.peak_bytes <= plan.budget_bytes
    assert all(0.97 * plan.peak_bytes <= peak <= plan.peak_bytes for peak in peaks)


def test_a_batch_that_comes_once_leaves_the_others_planned(caplog: pytest.LogCaptureFixture) -> None:
    """The last of an epoch is smaller: it is seen once, and those before and behind it run as planned."""
    model = Wide()
    call, plan = enabled(model, 1.0)
    small = batch()[:24]

    def step(x: torch.Tensor) -> None:
        model.zero_grad()
        call(x).square().mean().backward()

    peaks = []
    with caplog.at_level("INFO", "planner"):
        for _ in range(2):
            for x in (batch(), batch(), batch(), small):
                step(x)
                peaks.append(plan().peak_bytes if plan() else 0)
    told = [record.message for record in caplog.records]
    assert sum("a step is seen" in m for m in told) == 2
    assert sum("planned in" in m for m in told) == 2
    assert peaks[0] == 0 and peaks[1] > peaks[4] > 0  # planned when the next step begins


@pytest.mark.parametrize("casts", [False, True])
def test_steps_that_alternate_have_a_plan_each(casts: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One that adds to gradients holds these too; with autocast there are other graphs."""
    model, x = Wide(), batch()
    call, _ = enabled(model, 1.0)
    there = sum(t.nbytes for t in (*model.parameters(), x))

    def step(k: int) -> None:
        if casts or k % 2 == 0:
            model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts and k % 2 == 1):
            scores = call(x)
        scores.float().square().mean().backward()

    with caplog.at_level("INFO", "planner"):
        for k in range(8):
            step(k)
    assert sum("a step is seen" in record.message for record in caplog.records) == 2
    peaks = {}
    for k in (0, 1):
        held = 0 if casts or k == 0 else sum(p.nbytes for p in model.parameters())
        if casts or k == 0:
            model.zero_grad()
        peaks[k] = there + held + planner.measure.allocated_peak(lambda k=k: step(k))
    planned = [record.args[0].peak_bytes for record in caplog.records if "planned in" in record.message]  # type: ignore
    assert all(0.97 * p <= peaks[k] <= p for k, p in enumerate(planned)) and len(planned) == 2


def test_a_graph_that_two_kinds_of_steps_share_runs_in_each_as_planned_for_it() -> None:
    model, x = Forked(), batch()
    there = sum(t.nbytes for t in (*model.parameters(), x))
    kinds = {n: torch.zeros(n) for n in (1, 2)}
    planner.enable(
        model, (there + 440_000) / 1e9, optimizer=None, backend="inductor", costs="roofline",
        time_limit_s=1.0, now=True,
    )  # fmt: skip

    def step(n: int) -> None:
        model.zero_grad()
        model(x, kinds[n]).backward()

    plans = {}
    for n in (1, 1, 2, 2):
        step(n)
        plans[n] = planner.plan_of(model)
    for n in (1, 2, 1, 2):
        step(n)
        model.zero_grad()
        peak = there + planner.measure.allocated_peak(lambda n=n: step(n))
        plan = plans[n]
        assert plan is not None and 0.97 * plan.peak_bytes <= peak <= plan.peak_bytes
    assert plans[1] is not None and plans[2] is not None
    assert plans[1].overhead == 0 < plans[2].overhead


def _assert_near(model: nn.Module, theirs: nn.Module) -> None:
    """Gradients are off by a millionth of their norm at most: where one is made again, loops are others."""
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and other.grad is not None
        assert torch.linalg.vector_norm(ours.grad - other.grad) <= 1e-6 * torch.linalg.vector_norm(other.grad)


class Joined(nn.Module):
    """Its graph computes with sizes, and hands one on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The mean of squares, and how many."""
        n = x.shape[0]
        y = self.down(torch.nn.functional.gelu(self.up(x)))
        y = torch.cat([x, y]).view(2, n, WIDTH).sum(0) / (n // 2) + x.new_ones(n, 1)
        return y.square().mean(), n * WIDTH


def test_a_mode_of_torchs_own_backends_is_refused_with_what_to_set_instead() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    call = torch.compile(model, backend=planner.inductor(1.0, costs="roofline"), mode="max-autotune")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"no mode='max-autotune'.*config\.max"):
        call(batch())


def test_each_size_of_a_graph_with_symbols_is_planned(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "recompile_limit", lambda: 2)  # not Dynamo's, which needs no more than 2
    model = Joined()
    theirs = copy.deepcopy(model)
    rows = {n: torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (64, 96, 160, 200)}
    there = sum(t.nbytes for t in model.parameters())
    budget = 560_000
    backend = planner.inductor(budget / 1e9, optimizer=None, costs="roofline", time_limit_s=1.0)
    call, plain = torch.compile(model, backend=backend), torch.compile(theirs)
    own = dict[int, int]()

    def step(n: int) -> None:
        model.zero_grad()
        call(rows[n])[0].backward()

    with caplog.at_level("WARNING", "planner"):
        for n in (64, 96, 160):  # of the second on, Dynamo has symbols
            for _ in range(3):
                step(n)
            assert backend.plan is not None
            own[n] = backend.plan.peak_bytes
            step(n)
            model.zero_grad()
            assert there + rows[n].nbytes + planner.measure.allocated_peak(lambda n=n: step(n)) <= own[n]
            theirs.zero_grad()
            loss, size = plain(rows[n])
            loss.backward()
            assert call(rows[n])[1] == size == n * WIDTH
            _assert_near(model, theirs)
        assert "outside the plan" not in caplog.text
        step(200)
    assert own[64] < own[96] < own[160] <= budget
    assert "planned at 2 sizes" in caplog.text and "recompile_limit" in caplog.text


def test_a_number_that_is_a_symbol_is_that_of_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """An epsilon and a share, with ``dynamic=True``; of an evaluation in between nothing is said."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1))
    theirs = copy.deepcopy(model)
    backend = planner.inductor(1.0, optimizer=None, costs="roofline", time_limit_s=0.5)
    call = torch.compile(model, backend=backend, dynamic=True)
    plain = torch.compile(theirs, dynamic=True)
    with caplog.at_level("WARNING", "planner"):
        for n in (64, 64, 64, 96, 96, 96):
            with torch.no_grad():
                call(torch.randn(n + 1, WIDTH))
            for each, module in ((call, model), (plain, theirs)):
                torch.manual_seed(n)
                module.zero_grad()
                each(torch.randn(n, WIDTH)).square().mean().backward()
    assert backend.plan is not None and "outside the plan" not in caplog.text
    _assert_near(model, theirs)


def test_a_graph_that_is_called_several_times_in_a_step_is_within_the_budget() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH), nn.GELU(), nn.Linear(8 * WIDTH, WIDTH))
    theirs = copy.deepcopy(block)
    backend = planner.inductor(1.0, optimizer=None, costs="roofline", time_limit_s=1.0)
    twice = [torch.compile(block, backend=backend), torch.compile(theirs)]
    x = batch()
    there = sum(t.nbytes for t in (*block.parameters(), x))

    def step(call: Any, module: nn.Module) -> None:
        module.zero_grad()
        y = x
        for _ in range(3):
            y = y + call(y)
        y.square().mean().backward()

    for _ in range(3):
        step(twice[0], block)
    assert backend.plan is not None
    free = backend.plan.peak_bytes
    tight = planner.inductor(0.95 * free / 1e9, optimizer=None, costs="roofline", time_limit_s=4.0)
    call = torch.compile(block, backend=tight)
    for _ in range(4):
        step(call, block)
    assert tight.plan is not None and tight.plan.overhead > 0 and tight.plan.peak_bytes < free
    step(twice[1], theirs)
    _assert_near(block, theirs)
    block.zero_grad()
    assert there + planner.measure.allocated_peak(lambda: step(call, block)) <= tight.plan.peak_bytes


def test_the_last_compile_of_a_piece_of_code_is_told(caplog: pytest.LogCaptureFixture) -> None:
    linear = nn.Linear(4, 4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear(x)  # type: ignore[no-any-return]

    call = torch.compile(forward, backend=planner.inductor(1.0, costs="roofline"), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level("WARNING", "planner"):
        call(torch.randn(2, 4))
        assert "compiled for the last time" not in caplog.text
        call(torch.randn(3, 4))
    assert "compiled for the last time" in caplog.text and "recompile_limit" in caplog.text
    assert not _compat.watching_modes()  # nothing looks on where no backward comes


def test_a_plan_from_a_file_is_for_looking(tmp_path: Path) -> None:
    model, plan = compiled_plan()
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert (read.backend, read.peak_bytes) == ("inductor", plan.peak_bytes)
    with pytest.raises(planner.PlannerError, match="makes it again"):
        read.apply(model)


def test_options_that_make_no_sense_compiled() -> None:
    with pytest.raises(ValueError, match="dynamic is not for"):
        planner.plan(Net(1), 1, (batch(),), backend="inductor", dynamic=True)
    with pytest.raises(ValueError, match="backend must be"):
        planner.plan(Net(1), 1, (batch(),), backend="nvfuser")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        planner.inductor("8 GB")  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_is_refused_with_the_least() -> None:
    _, plan = compiled_plan()
    assert isinstance(plan._origin, CompiledStep)
    with pytest.raises(planner.InfeasibleBudgetError, match="least budget") as refused:
        plan._origin.plan_bytes(plan.floor_bytes // 2)
    assert refused.value.minimum_bytes >= plan.floor_bytes


def test_what_is_proved_of_a_compiled_step_is_below_what_was_found() -> None:
    _, plan = compiled_plan()
    step = plan._origin
    assert isinstance(step, CompiledStep)
    assert plan.overhead_bound <= plan.overhead
    least = step.least
    total = step.problem.total_seconds
    proved = step._with_bound(dataclasses.replace(least, bound_seconds=0.0), 10.0)
    assert total <= proved.bound_seconds <= least.seconds
    # at the floor something is proved, whichever least plan the search had time to find
    problem, counted = step._below
    assert total < time_bound(problem, step.floor_bytes, time_limit_s=10.0, counted=counted)
    assert step.floor_bytes <= least.peak_bytes


def test_the_layers_of_a_compiled_plan_have_their_names() -> None:
    _, plan = compiled_plan()
    assert {"blocks.0.up", "blocks.1.down"} <= {p.module for p in plan.placements}


def test_a_model_that_is_sharded_is_not_compiled_as_if_it_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(1)
    monkeypatch.setattr(_compat, "is_fully_sharded", lambda module: module is model.blocks[0])
    with pytest.raises(planner.PlannerError, match=r"Net is sharded \(FSDP2\).*planner\.enable\("):
        planner.plan(model, 1, (batch(),), backend="inductor")
