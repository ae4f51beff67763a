"""The order of the backward: the same calls, each behind what it needs; less is recomputed, bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.graph.nodes import is_mutation, is_random
from planner.graph.ordered import _writes, weights_first
from planner.graph.training_graph import TrainingGraph
from planner.options import Search
from planner.solving.in_backward import stepping_in_backward
from planner.solving.priced import PricedStep, prepare
from tests import tiny
from tests.models import CASES

IDS = torch.arange(48).view(3, 16) % 11


class Wide(nn.Module):
    """Layers whose inputs are larger than their weights, one of them used twice, with dropout and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, self.layers[0]):
            x = x + F.dropout(torch.tanh(layer(x)), 0.1)
        x = self.norm(x.mT).mT
        return F.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), labels.flatten())


def step_of(model: nn.Module, batch: Any, **how: Any) -> PricedStep:
    return prepare(model, batch, costs="roofline", search=Search(time_limit_s=0.3), **how)


def assert_only_moved(given: TrainingGraph, free: TrainingGraph) -> None:
    """The same calls; each still finds what it found, and what has an order among itself keeps it."""
    place = {op.name: i for i, op in enumerate(free.ops)}
    before = {op.name: i for i, op in enumerate(given.ops)}
    assert place.keys() == before.keys() and free.turn == given.turn
    assert [v.name for v in free.values] == [v.name for v in given.values]
    for i, op in enumerate(free.ops):
        assert all(p is None or p < i for v in op.inputs if (p := free.values[v].producer) is not None)
    for v in range(len(given.values)):  # a read and a write of one value are in the order that they were
        reads = [op.name for op in given.ops if v in op.inputs]
        writes = [op.name for op in given.ops if v in op.inputs and _writes(op)]
        for a in reads:
            for b in writes:
                assert (before[a] < before[b]) == (place[a] < place[b])
    fixed = [
        op.name for op in given.ops if op.node is not None and (is_random(op.node) or is_mutation(op.node))
    ]
    assert fixed == sorted(fixed, key=place.__getitem__)
    sums = [
        op.name for op in given.ops if any(v.producer == before[op.name] and v.final for v in given.values)
    ]
    read = {v for op in given.ops for v in op.inputs}
    alone = {op.name for op in given.ops if op.outputs and not read & {*op.outputs}}
    assert {n for n in place if place[n] < before[n]} <= alone & {*sums}


@pytest.mark.parametrize("case", ["bert", "vit", "unet"])
def test_calls_move_past_nothing_that_matters(case: str) -> None:
    of = CASES[case]
    given = step_of(of.build(), of.make_inputs(0), loss_fn=of.loss_fn).graph
    free = weights_first(given)
    assert_only_moved(given, free)
    assert (free is given) == (case == "unet")  # whose weights are larger than what they work on


def test_less_is_recomputed_in_the_same_memory_with_the_same_bits(tmp_path: Path) -> None:
    of = CASES["bert"]
    model, batch = of.build(), of.make_inputs(0)
    step = step_of(model, batch)
    free = step.in_order("free")
    assert free.floor_bytes <= step.floor_bytes and free.baseline_peak_bytes < step.baseline_peak_bytes
    assert step.in_order("given") is step
    assert [op.name for op in free.in_order("given").graph.ops] == [op.name for op in step.graph.ops]
    budget_gb = 0.7 * step.baseline_peak_bytes / 1e9
    how: dict[str, Any] = {"costs": "roofline", "time_limit_s": 2.0}
    given = planner.plan(model, budget_gb, batch, **how)
    plan = planner.plan(model, budget_gb, batch, order="free", **how)
    assert (given.order, plan.order) == ("given", "free")
    assert plan.overhead < given.overhead_bound  # no plan of the given order takes so little
    assert "bound and floor are for the order of this plan" in plan.summary()
    report = plan.verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes
    assert report.recompute_flops == report.predicted_recompute_flops
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert read.order == "free" and read.executable(model).program.code == plan.code


def test_the_order_goes_with_chunks_and_with_the_optimizer_in_the_backward() -> None:
    of = CASES["gpt2"]
    model, batch = of.build(), of.make_inputs(0)
    step = step_of(model, batch).in_chunks(4).in_order("free")
    plan = step.plan_bytes(step.baseline_peak_bytes, Search("keep_all"))
    report = plan.verify()
    assert plan.order == "free" and plan.chunked and report.ok
    assert report.peak_bytes == report.predicted_peak_bytes
    wide = tiny.seeded(Wide)
    planner.optimizer_in_backward(wide, torch.optim.AdamW)
    stepping = stepping_in_backward(step_of(wide, (IDS, IDS % 16)).in_order("free"), "auto", None)
    plan = stepping.least_plan()
    report = plan.verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes


def test_the_order_of_sizes_that_vary() -> None:
    model = tiny.seeded(Wide)
    batch = (IDS, IDS % 16)
    step = step_of(model, batch, dynamic=True).in_order("free")
    plan = step.plan_bytes(step.baseline_peak_bytes, Search("keep_all"))
    assert plan.order == "free" and plan.verify().equal
    assert plan.verify(model, (IDS[:2, :8], IDS[:2, :8] % 16)).equal


def test_what_an_order_may_be() -> None:
    model = tiny.seeded(Wide)
    with pytest.raises(ValueError, match="order must be 'given' or 'free', not 'any'"):
        planner.plan(model, 1, (IDS, IDS % 16), order="any")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order is not for backend='inductor'"):
        planner.plan(model, 1, (IDS, IDS % 16), order="free", backend="inductor")
    with pytest.raises(planner.PlannerError, match="order='free' is for a step of one graph"):
        planner.plan(model, 1, (IDS, IDS % 16), costs="roofline", order="free", capture="regions")
    with pytest.raises(planner.InfeasibleBudgetError):
        planner.plan(model, 1e-6, (IDS, IDS % 16), costs="roofline", order="free", time_limit_s=0.2)
