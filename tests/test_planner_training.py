"""The promise, on real models: the budget is kept, the peak is as predicted, every bit is eager's.

Peaks are measured by a meter of live storages that knows nothing of plans; FLOPs are counted while
the step runs; outputs, gradients, buffers and random state are compared with eager's bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner._compat import TorchDispatchMode
from planner.measure import (
    StepRecord,
    StorageMeter,
    compare,
    run_step,
    step_flops,
    step_peak,
    tensors_in,
)
from planner.measure.step import forward, undone
from planner.options import Search
from planner.runtime.forward import planned_forward_of
from planner.solving.priced import PricedStep, prepare
from tests import tiny
from tests.models import CASES, Case

FAMILIES = ("gpt2", "llama", "bert", "vit", "resnet", "unet", "internvl", "transformer")
FRACTIONS = (0.75, 0.35)


class Subject:
    """A model of a family, its eager step measured once, its capture shared by all budgets."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model: nn.Module = case.build()
        self.inputs: Any = case.make_inputs(0)
        prepared = prepare(self.model, self.inputs, loss_fn=case.loss_fn, costs="roofline")
        self.prepared: PricedStep = dataclasses.replace(prepared, least_limit_s=0.5)
        self.eager = self.record()
        self.eager_peak_bytes = self.peak()
        self.eager_flops = self.flops()
        self.resident_bytes = self.prepared.problem.resident_bytes

    def record(self) -> StepRecord:
        return run_step(self.model, self.inputs, loss_fn=self.case.loss_fn, seed=7)

    def peak(self) -> int:
        return step_peak(self.model, self.inputs, loss_fn=self.case.loss_fn)

    def flops(self) -> int:
        return step_flops(self.model, self.inputs, loss_fn=self.case.loss_fn)

    def budget_bytes(self, fraction: float) -> int:
        """``fraction`` of what eager's step takes above parameters, buffers and inputs."""
        return self.resident_bytes + int(fraction * (self.eager_peak_bytes - self.resident_bytes))

    @functools.cache  # noqa: B019  (subjects live as long as the session)
    def plan(self, budget_bytes: int) -> planner.Plan:
        return self.prepared.plan_bytes(budget_bytes, search=Search(time_limit_s=0.5))

    def check(self, plan: planner.Plan) -> None:
        """Run the planned step and hold it to every promise."""
        plan.apply()
        try:
            ours, peak_bytes, flops = self.record(), self.peak(), self.flops()
        finally:
            plan.restore()
        same = compare(self.eager, ours)
        assert same.equal, str(same)
        assert peak_bytes <= plan.budget_bytes
        assert peak_bytes == plan.peak_bytes
        assert flops - self.eager_flops == plan.recompute_flops
        assert sum(plan.breakdown.values()) == plan.peak_bytes
        assert (sum(plan.timeline_by_kind.values()) == plan.timeline).all()
        assert plan.overhead_bound <= plan.overhead


@functools.cache
def subject(family: str) -> Subject:
    return Subject(CASES[family])


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_kept_and_every_bit_is_eagers(family: str, fraction: float) -> None:
    s = subject(family)
    budget_bytes = s.budget_bytes(fraction)
    refusal: planner.InfeasibleBudgetError | None = None
    try:
        plan = s.plan(budget_bytes)
    except planner.InfeasibleBudgetError as error:
        refusal = error
    if refusal is None:  # also below the least that another search found
        assert budget_bytes >= s.prepared.floor_bytes
        s.check(plan)
        return
    assert refusal.budget_bytes == budget_bytes < refusal.minimum_bytes
    assert refusal.floor_bytes <= s.prepared.minimum_peak_bytes <= refusal.minimum_bytes < s.eager_peak_bytes
    assert sum(refusal.breakdown.values()) == refusal.minimum_bytes
    assert f"{budget_bytes / 1e9:.4g} GB" in str(refusal)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_least_feasible_budget_works(family: str) -> None:
    s = subject(family)
    least = s.prepared.minimum_peak_bytes
    assert s.prepared.floor_bytes <= least < s.eager_peak_bytes
    s.check(s.plan(least))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_nothing_is_optimal_at_the_baseline_peak(family: str) -> None:
    s = subject(family)
    plan = s.plan(s.prepared.baseline.peak_bytes)
    assert plan.status == "optimal"
    assert plan.overhead == plan.overhead_bound == plan.gap == 0.0
    assert plan.recompute_flops == 0
    s.check(plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_plan_beats_a_bound_that_was_proved_for_as_much_memory_or_more(family: str) -> None:
    s = subject(family)
    least, most = s.prepared.minimum_peak_bytes, s.prepared.baseline.peak_bytes
    budgets = {least, most, *(b for f in FRACTIONS if (b := s.budget_bytes(f)) >= least)}
    plans = [s.plan(b) for b in sorted(budgets)]
    for i, tighter in enumerate(plans):
        assert tighter.floor_bytes <= tighter.peak_bytes
        for looser in plans[i:]:
            assert looser.overhead_bound <= tighter.overhead


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_less_memory_never_costs_less_time(family: str) -> None:
    s = subject(family)
    budgets = [b for f in (0.75, 0.5) if (b := s.budget_bytes(f)) >= s.prepared.minimum_peak_bytes]
    curve = s.prepared.frontier(budgets, search=Search(time_limit_s=0.5))
    assert len(curve.points) == len(budgets) > 1
    overheads = [p.overhead for p in curve.points]
    assert overheads == sorted(overheads, reverse=True)


@pytest.mark.parametrize("segments", [1, 3, 1000])
@pytest.mark.parametrize("family", ["gpt2", "unet", "transformer"])
def test_segments_change_no_bit_and_no_peak(family: str, segments: int) -> None:
    from planner.rewrite.emit import emit

    s = subject(family)
    plan = s.plan(s.prepared.minimum_peak_bytes)
    program = emit(s.prepared.graph, s.prepared.captured.steps(plan.sequence), segments=segments)
    assert (len(program.segments) == 1) == (segments == 1)
    plan.apply()
    try:
        planned = planned_forward_of(s.model)
        assert planned is not None
        planned.step = dataclasses.replace(planned.step, program=program)
        assert compare(s.eager, s.record()).equal
        # In one segment the engine holds the output gradients of an outside loss to the end of it.
        graph, outside = s.prepared.graph, s.prepared.joint.loss is not None
        tangents = [n.meta["val"] for n in graph.tangents.values()] if outside and segments == 1 else []
        slack = sum(t.numel() * t.element_size() for t in tangents)
        assert s.peak() <= plan.peak_bytes + slack
    finally:
        plan.restore()


def test_batch_norm_statistics_move_once_per_step() -> None:
    s = subject("resnet")
    plan = s.plan(s.prepared.minimum_peak_bytes)
    norms = [m for m in s.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(p.times_recomputed and "batch_norm" in p.op for p in plan.placements)
    tracked = [n for n, _ in s.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert len(tracked) == len(norms) > 0
    before = {n: int(b) for n, b in s.model.named_buffers() if n in tracked}
    plan.apply()
    try:
        after = s.record().buffers
    finally:
        plan.restore()
    assert {n: int(after[n]) for n in tracked} == {n: k + 1 for n, k in before.items()}


class Calls(TorchDispatchMode):
    """Names of the kernels that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_kernels_run_where_and_as_often_as_scheduled(family: str) -> None:
    s = subject(family)
    plan = s.plan(s.budget_bytes(0.5))
    ops = {op.name: op for op in s.prepared.graph.ops}
    by_hand = {"rng_state", "dropout_apply", "gradient_like"}
    drawn = {"dropout_mask": "aten.bernoulli_"}
    targets = [ops[name].target for name in plan.sequence]
    expected = [drawn.get(target, target) for target in targets if target not in by_hand]
    own = {"aten.lift_fresh", "aten.mul", "aten.mul_", "aten.empty_like", "aten.copy_", "aten.empty"}
    plan.apply()
    try:
        with undone(s.model, s.inputs), Calls() as calls:
            passed = forward(s.model, s.inputs, s.case.loss_fn)
            torch.autograd.backward(passed.roots)
    finally:
        plan.restore()
    assert [n for n in calls.names if n not in own] == [n for n in expected if n not in own]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_whole_step_with_its_optimizer_is_predicted_to_the_byte(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    model, inputs = tiny.seeded(lambda: tiny.bert(layers=1)), tiny.bert_batch(rows=8)
    prepared = prepare(model, inputs, optimizer=optimizer, costs="roofline")
    prepared = dataclasses.replace(prepared, least_limit_s=0.5)
    plan = prepared.plan_bytes(prepared.minimum_peak_bytes, search=Search(time_limit_s=0.5))
    stepper = optimizer(model.parameters(), lr=1e-3)
    plan.apply()
    meter = StorageMeter(torch.device("cpu"))
    for step in range(2):  # the optimizer's state exists from the second step on
        meter.register(*model.parameters(), *model.buffers(), *tensors_in(inputs))
        meter.reset_peak()
        with meter:
            outputs = model(**inputs)
            outputs.loss.backward()
            del outputs
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step == 0:
            assert meter.peak_bytes <= plan.peak_bytes
    assert meter.peak_bytes == plan.peak_bytes <= plan.budget_bytes
    assert plan.breakdown["optimizer_state"] == prepared.resident.optimizer_state_bytes
