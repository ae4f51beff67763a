"""Training steps of further kinds that were tried against their plain twins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import planner
from planner._compat.running import dispatch_state
from planner.capture.joint_graph import capture
from planner.errors import PlannerError
from planner.regions.cut.piece import Piece, Slot
from planner.regions.forward import PATIENCE
from tests.hf import FAST


class Looked(nn.Module):
    """Two layers with a look at a value between them: no one graph."""

    def __init__(self, looks: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.looks = nn.Linear(16, 48), nn.Linear(48, 16), looks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.looks and h.sum().item() > 1e9:
            h = -h
        return torch.tanh(self.second(h))


def _trained(model: nn.Module, steps: int = 4) -> list[Tensor]:
    """Losses, and in the end parameters."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.05), []
    torch.manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(32, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def _assert_as_plain(plain: nn.Module, model: nn.Module) -> None:
    for a, b in zip(_trained(plain), _trained(model), strict=True):
        assert torch.equal(a, b)


def test_a_part_that_is_enabled_too_does_not_plan_while_its_whole_is_captured() -> None:
    model = nn.Sequential(Looked(), nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    for one in (model[0], model):
        planner.enable(one, 1, now=True, **FAST)
    _assert_as_plain(plain, model)
    plan = planner.plan_of(model)
    assert plan is not None and plan.regions
    # one graph: the whole's plan covers the part, which makes none
    model = nn.Sequential(Looked(looks=False), nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    for one in (model[0], model):
        planner.enable(one, 1, now=True, **FAST)
    _assert_as_plain(plain, model)
    plan = planner.plan_of(model)
    assert plan is not None and not plan.regions
    assert planner.plan_of(model[0]) is None


def test_torchs_own_modules_are_cut_after_ddp_or_a_reset_too() -> None:
    """DDP and process groups have Dynamo list anew which files it follows; a reset forgets code."""
    for _ in range(2):
        model = nn.Sequential(Looked(), nn.Linear(16, 16))
        plain = copy.deepcopy(model)
        for one in (model[0], model):  # the part is left alone: what is left to cut is torch's own code
            planner.enable(one, 1, now=True, **FAST)
        _assert_as_plain(plain, model)
        plan = planner.plan_of(model)
        assert plan is not None and plan.regions
        torch.compiler.reset()
        torch._dynamo.trace_rules.clear_lru_cache()  # as both of them do


class Gated(torch.autograd.Function):
    """Told of gradients that do not come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.sin(), y * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None if g is None else g * 3), (None if h is None else h * 2)


class Zeros(Gated):
    """The same, given zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), y * 2


@pytest.mark.parametrize("function", [Gated, Zeros])
def test_no_gradient_stays_none_behind_a_function_that_asks_for_none(function: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.a, self.b = Looked(), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            y: Tensor = function.apply(self.a(x), self.b(x))[0]
            return y

    model = Two()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, capture="regions", **FAST)
    _assert_as_plain(plain, model)
    for one in (plain, model):
        one(torch.ones(4, 16)).sum().backward()
    nones = [[p.grad is None for p in one.b.parameters()] for one in (plain, model)]
    assert nones[0] == nones[1] == [function is Gated] * 2
    plan = planner.plan_of(model)
    assert plan is not None and any("set_materialize_grads" in why for why in plan.cuts) == (
        function is Gated
    )


def test_gradients_taken_by_a_transform_within_the_forward() -> None:
    """Such a forward cannot be looked at under a checkpoint, nor be cut within the transform."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.layers = Looked(), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def energy(self, v: Tensor) -> Tensor:
            for layer in self.layers:
                v = torch.tanh(layer(v))
            return v.sum()

        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            return x - torch.func.vmap(torch.func.grad(self.energy))(x)

    class Mapped(Energy):
        def forward(self, x: Tensor) -> Tensor:
            x = self.looked(x)
            return x - torch.func.vmap(self.energy)(x)[:, None]

    for kind in (Energy, Mapped):
        model = kind()
        plain = copy.deepcopy(model)
        planner.enable(model, 1, now=True, **FAST)
        _assert_as_plain(plain, model)
        plan = planner.plan_of(model)
        assert plan is not None and len(plan.regions) > 1


@pytest.mark.parametrize("looks", [True, False])
def test_what_was_made_under_inference_mode_may_come_in(looks: bool) -> None:
    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.teacher = Looked(looks), nn.Linear(16, 16).requires_grad_(False)

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            with torch.inference_mode():
                y = self.teacher(x)
            return self.looked(x + given) + y

    model = Taught()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, **FAST)
    seen = []
    for one in (plain, model):
        torch.manual_seed(1)
        for _ in range(4):
            with torch.inference_mode():
                given = torch.randn(32, 16)
            one(torch.randn(32, 16), given).square().mean().backward()
        seen.append([p.grad for p in one.looked.parameters()])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    assert planner.plan_of(model) is not None


class Heads(nn.Module):
    """Three heads that read one value, in a graph of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.looked, self.heads = Looked(), nn.ModuleList(nn.Linear(16, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.looked(x)
        torch._dynamo.graph_break()
        return [head(x) for head in self.heads]


@pytest.mark.parametrize("counts", [(2, 3, 2, 3, 3), (3, 1, 2, 3, 1)])
def test_more_or_fewer_gradients_than_planned_for_are_added_up_where_one_value_is_read(
    counts: tuple[int, ...],
) -> None:
    model = Heads()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, capture="regions", **FAST)
    seen = []
    for one in (plain, model):
        torch.manual_seed(1)
        for count in counts:
            one.zero_grad()
            torch.stack([y.square().mean() for y in one(torch.randn(32, 16))[:count]]).sum().backward()
            seen += [(one is model, p.grad) for p in one.parameters()]
    half = len(seen) // 2
    for (_, a), (_, b) in zip(seen[:half], seen[half:], strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("shares", [True, False])
def test_a_weight_that_autocast_casts_once_for_two_regions(
    shares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo may cut one of them anew in a later step, while the other is eager's."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            if x.sum().item() > 1e9:
                x = -x
            y: Tensor = torch.tanh((self.a if shares else self.b)(x)).float()
            return y

    model = Twice()
    plain = copy.deepcopy(model)
    planner.enable(model, 1, now=True, capture="regions", **FAST)
    seen = []
    for one in (plain, model):
        torch.manual_seed(1)
        for _ in range(5):
            one.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = one(torch.randn(32, 16))
            y.square().mean().backward()
            seen.append([p.grad for p in one.parameters() if p.grad is not None])
    for a, b in zip(seen[:5], seen[5:], strict=True):
        assert all(map(torch.equal, a, b))
    assert ("casts once" in caplog.text) == shares
    assert (planner.plan_of(model) is None) == shares


def test_a_backward_that_comes_after_the_next_forward_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Looked()
    planner.enable(model, 1, now=True, capture="regions", **FAST)
    waiting: list[Tensor] = []
    for _ in range(PATIENCE + 3):
        waiting.append(model(torch.randn(32, 16)).square().mean())
        if len(waiting) > 1:
            waiting.pop(0).backward()
    assert "came before the backward of the last" in caplog.text
    # and it is planned from when they come in turn, with no word where one now and then does not come
    waiting.clear()
    for k in range(5):
        loss = model(torch.randn(32, 16)).square().mean()
        if k:
            loss.backward()
    assert planner.plan_of(model) is not None


def test_a_region_that_is_refused_closes_what_its_graph_had_open() -> None:
    """An open context is an object there, which keeps what a trace has on and sets it back as it goes."""

    def refuses(x: Tensor) -> Tensor:
        raise ValueError("not here")

    graph = fx.Graph()
    x = graph.placeholder("x")
    opened = graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (True,))
    made = graph.call_function(refuses, (x,))
    graph.call_function(torch.autograd.grad_mode._exit_inference_mode, (opened,))
    graph.output((made,))
    given = torch.randn(4, 8, requires_grad=True)
    piece = Piece(fx.GraphModule(nn.Module(), graph), (Slot("input"),), (given,))
    before = dispatch_state()
    try:
        capture(piece, (given,))
    except PlannerError as error:
        kept = error  # with its frames
    assert "not here" in str(kept) and dispatch_state() == before
    del kept
    assert dispatch_state() == before and not torch.is_inference_mode_enabled()


def test_verify_compares_with_a_call_that_is_not_the_models_first() -> None:
    """The first one makes modules here, which draws; a later one does not, and a plan is for those."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.last = Looked(), nn.Linear(16, 16)
            self.is_short = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.is_short:
                made = nn.Linear(16, 16)
                made.weight, made.bias = self.last.weight, self.last.bias
                self.last, self.is_short = made, True
            return self.last(nn.functional.dropout(self.looked(x), 0.5, self.training))

    model = Late()
    before = model.last
    plan = planner.plan(model, 1.0, (torch.randn(32, 16),), capture="regions", **FAST)
    report = plan.verify()
    assert report.ok, str(report)
    assert model.last is before and not model.is_short


def test_verify_runs_each_step_from_the_same_attributes_and_puts_all_back() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looked, self.scale = Looked(), nn.Parameter(torch.ones(16))
            self.seen: list[int] = []
            self.register_buffer("is_set", torch.tensor(False))

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "last"):
                self.last = nn.Linear(16, 16)
            if not self.is_set.item():
                self.scale.data.copy_(1 / x.std(0))
                self.is_set.fill_(True)
            self.seen.append(len(self.seen))
            return self.last(self.looked(x) * self.scale).square().mean() * min(1.0, len(self.seen) / 5)

    model = Moves()
    plan = planner.plan(model, 1.0, (torch.randn(32, 16),), capture="regions", **FAST)
    report = plan.verify()
    assert report.ok, str(report)
    assert not hasattr(model, "last") and not model.seen and not model.is_set
    assert torch.equal(model.scale, torch.ones(16)) and all(p.grad is None for p in model.parameters())
