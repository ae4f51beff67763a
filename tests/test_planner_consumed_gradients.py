"""The optimizer's step in a hook of the backward: its gradients are freed in the plan as in the run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.errors import PlannerError
from planner.measure.meter import StorageMeter
from planner.options import Search
from planner.solving.priced import prepare
from tests import tiny

IDS = torch.arange(16).view(2, 8) % 11
Make = Callable[[nn.Parameter], torch.optim.Optimizer]


class Tower(nn.Module):
    """An embedding that is also the head, blocks with a norm; its loss if given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)) for _ in range(2)
        )
        self.last = nn.Linear(16, 32)
        self.last.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out if labels is None else F.cross_entropy(out.view(-1, 32), labels.view(-1))


def loss_outside(out: Tensor) -> Tensor:
    return F.cross_entropy(out.view(-1, 32), IDS.view(-1))


def drops(model: nn.Module, *, only: str = "") -> nn.Module:
    """``model`` with hooks that take the gradients of parameters whose name begins so."""

    def drop(p: Tensor) -> None:
        p.grad = None

    for name, p in model.named_parameters():
        if name.startswith(only):
            p.register_post_accumulate_grad_hook(drop)
    return model


def steps_in_backward(model: nn.Module, make: Make) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """One optimizer per parameter, each stepped and cleared by a hook."""
    optimizers = {p: make(p) for p in model.parameters()}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=True)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)  # type: ignore[arg-type]
    return optimizers


def live_peak_bytes(model: nn.Module) -> int:
    """Of a step as a loop runs it."""
    meter = StorageMeter("cpu")
    meter.register(*model.parameters(), IDS)
    with meter:
        loss = model(IDS, IDS)
        loss.backward()
    return meter.peak_bytes


@pytest.mark.parametrize("loss", ["inside", "outside", "none"])
def test_a_gradient_counts_until_its_hook_has_run(loss: str, tmp_path: Path) -> None:
    model = drops(tiny.seeded(Tower))
    args = (IDS, IDS) if loss == "inside" else (IDS,)
    loss_fn, search = loss_outside if loss == "outside" else None, Search(time_limit_s=0.5)
    held = prepare(model, args, loss_fn=loss_fn, costs="roofline", search=search)
    step = held.consuming({n: 0 for n, _ in model.named_parameters()})
    for plan in (step.plan_bytes(step.baseline_peak_bytes, Search("keep_all")), step.least_plan()):
        report = plan.verify()
        assert report.equal and report.peak_bytes == report.predicted_peak_bytes <= report.eager_peak_bytes
        if loss == "inside":
            plan.apply(model)
            assert live_peak_bytes(model) == plan.peak_bytes
            assert all(p.grad is None for p in model.parameters())
            plan.restore(model)
    assert step.minimum_peak_bytes < held.floor_bytes and step.memory.gradient_bytes == 0
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json").executable(model)
    assert read.program.consumed == plan.executable().program.consumed == set(dict(model.named_parameters()))


@pytest.mark.parametrize("gradients", ["held", "consumed"])
@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW([p], lr=0.01)],
    ids=["sgd", "adamw"],
)
def test_training_is_eagers_bit_for_bit(make: Make, gradients: planner.options.GradientsMode) -> None:
    model = tiny.seeded(Tower)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        steps_in_backward(net, make)
    planner.plan(model, 1, (IDS, IDS), costs="roofline", solver="recompute_all", gradients=gradients).apply()
    for k in range(4):
        batch = (IDS + k) % 32
        losses = [net(batch, batch) for net in (model, twin)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_measuring_trains_nothing() -> None:
    model = tiny.seeded(Tower)
    optimizers = steps_in_backward(model, lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9))
    hooks = {p: dict(p._post_accumulate_grad_hooks) for p in model.parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = planner.plan(model, 1, (IDS, IDS), costs="roofline", gradients="consumed", calibrate=True)
    assert plan.verify().ok
    planner.measure.step_peak(model, (IDS, IDS))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not any(o.state for o in optimizers.values())
    assert all(p.grad is None and dict(p._post_accumulate_grad_hooks) == hooks[p] for p in hooks)


def test_parameters_without_a_hook_keep_their_gradients(tmp_path: Path) -> None:
    model = drops(tiny.seeded(Tower), only="blocks")
    plan = planner.plan(model, 1, (IDS, IDS), costs="roofline", solver="keep_all", gradients="consumed")
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert read.executable(model).program.consumed == plan.executable().program.consumed
    assert read.executable(model).program.code == plan.code
    plan.apply()
    assert live_peak_bytes(model) == plan.peak_bytes
    assert {n for n, p in model.named_parameters() if p.grad is None} == plan.executable().program.consumed
    assert model.last.bias.grad is not None


@pytest.mark.parametrize("kind", ["drops", "keeps", "held"])
def test_the_first_backward_shows_what_hooks_do(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.seeded(Tower)
    if kind == "keeps":
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: None)
    else:
        drops(model)
    planner.enable(
        model,
        1,
        costs="roofline",
        solver="keep_all",
        gradients="held" if kind == "held" else "auto",
        now=True,
    )
    hooks = [len(p._post_accumulate_grad_hooks) for p in model.parameters()]
    plans = []
    with caplog.at_level(logging.INFO, logger="planner"):
        for _ in range(3):
            model(IDS, IDS).backward()
            model.zero_grad(set_to_none=True)
            plans.append(planner.plan_of(model))
    first, second, third = plans
    assert second is third and (first is second) == (kind != "drops")
    assert ("use up the gradients" in caplog.text) == (kind == "drops")
    assert [len(p._post_accumulate_grad_hooks) for p in model.parameters()] == hooks
    if kind == "drops":
        assert live_peak_bytes(model) == second.peak_bytes < first.peak_bytes


def test_what_makes_no_sense_is_refused() -> None:
    model = tiny.seeded(Tower)
    with pytest.raises(PlannerError, match="register_post_accumulate_grad_hook"):
        planner.plan(model, 1, (IDS, IDS), costs="roofline", gradients="consumed")
    for call in (
        lambda: planner.plan(model, 1, (IDS,), gradients="gone"),
        lambda: planner.enable(model, 1, gradients="gone"),
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'held', 'consumed' or 'auto'"):
            call()
