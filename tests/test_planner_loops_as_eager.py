"""Loops that do more than call layers: writes behind a forward, draws, hooks and backwards within it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planner
from planner.regions.forward import RegionsForward

WIDE = 8


class _Bank(nn.Module):
    """A bank of vectors that the forward reads, and that code behind a cut writes into."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.net, self.writes = nn.Sequential(nn.Linear(WIDE, 16), nn.GELU(), nn.Linear(16, WIDE)), writes
        self.register_buffer("bank", torch.randn(WIDE, 32))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        made = self.net(x)
        loss = (made @ (self.bank.clone() * 2.0)).logsumexp(-1).mean()
        at = int(self.place)  # Dynamo cuts here
        if self.writes:
            with torch.no_grad():
                self.bank[:, at : at + len(x)] = made.T
        self.place[0] = (at + len(x)) % 32
        return loss * 1.0


class _Iterated(nn.Module):
    """A layer that improves its estimate of a vector at each call, called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first = nn.Parameter(torch.randn(WIDE, WIDE)), nn.Linear(WIDE, WIDE)
        self.register_buffer("estimate", torch.ones(WIDE))

    def once(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.estimate.copy_(nn.functional.normalize(self.weight @ self.estimate, dim=0))
        scale = self.estimate.clone() @ self.weight @ self.estimate.clone()
        return torch.tanh(x @ self.weight / scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.once(self.first(x))
        torch._dynamo.graph_break()
        return self.once(x).pow(2).mean()


def _trained(make: Callable[[], nn.Module], capture: str) -> tuple[list[Tensor], nn.Module]:
    """Losses and gradients of five steps, and the model; ``capture`` "": as it is."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if capture:
        planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0, capture=capture)
    seen: list[Tensor] = []
    for _ in range(5):
        loss = model(torch.randn(4, WIDE))
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen, model


def _spoilt(model: nn.Module) -> list[frozenset[int]]:
    forward = model.forward._regions._forward  # type: ignore[union-attr]
    assert isinstance(forward, RegionsForward)
    return [region.spoilt for region in forward.session.regions]


@pytest.mark.parametrize("make", [lambda: _Bank(True), _Iterated], ids=["bank", "called twice"])
def test_a_region_reads_a_buffer_once_where_code_behind_it_writes_there(
    make: Callable[[], nn.Module],
) -> None:
    (plain, _), (planned, model) = _trained(make, ""), _trained(make, "regions")
    assert all(map(torch.equal, plain, planned))
    assert planner.plan_of(model) is not None
    assert any(_spoilt(model))


def test_a_bank_that_is_only_read_may_be_read_again() -> None:
    (plain, _), (planned, model) = (_trained(lambda: _Bank(False), of) for of in ("", "regions"))
    assert all(map(torch.equal, plain, planned))
    assert planner.plan_of(model) is not None and not any(_spoilt(model))


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, 64), nn.Linear(64, 1)
        self.register_buffer("scale", torch.full((64,), 2.0))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for _ in range(3):
            hidden = torch.tanh(hidden * self.scale.clone())
        return self.second(hidden).mean() + 0.0 * self.steps.clone()


def test_one_graph_refuses_a_backward_that_would_read_what_was_written_by_hand() -> None:
    torch.manual_seed(0)
    model, x = _Scaled(), torch.randn(256, WIDE)
    most = planner.plan(model, 1.0, (x,), costs="roofline", time_limit_s=1.0)
    least = planner.plan(model, most.minimum_peak_bytes / 1e9, (x,), costs="roofline", time_limit_s=1.0)
    assert any(p.op == "aten.clone" and p.decision == "recompute" for p in least.placements)
    least.apply(model)
    loss = model(x)
    model.steps.add_(1)  # nobody reads it again
    loss.backward()
    loss = model(x)
    model.scale.mul_(2)
    with pytest.raises(planner.PlannerError, match="the buffer scale was written to"):
        loss.backward()


class _Several(nn.Module):
    """Linear layers over three dimensions: what eager returns of them is no view, and kernels make one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(torch.tanh(x))

    def forward(self, x: Tensor, cut: bool = True) -> Tensor:
        left, right = self.pair(x)
        if cut:
            torch._dynamo.graph_break()
        left[:, 0] = 0.0
        right.clamp_(max=0.1)
        return (left * right).mean()


class _Alone(_Several):
    def forward(self, x: Tensor, cut: bool = True) -> Tensor:
        return self.first(x)


@pytest.mark.parametrize("capture", ["one graph", "regions"])
def test_what_a_planned_call_returns_may_be_written_into(capture: str) -> None:
    def gradients(planned: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = _Alone() if capture == "one graph" else _Several()
        if planned:
            planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0, capture=capture)
        for _ in range(4):
            model.zero_grad()
            out = model(torch.randn(2, 4, WIDE))
            if out.dim():
                out.clamp_(max=0.1)
            out.mean().backward()
        assert not planned or planner.plan_of(model) is not None
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_what_the_backward_needs_may_not_be_written_into() -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()), torch.randn(4, WIDE)
    planner.plan(model, 1.0, (x,), costs="roofline", time_limit_s=1.0).apply(model)
    out = model(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_hook_that_comes_later_is_seen_where_the_step_is_in_regions() -> None:
    def losses(planned: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, 1))
        model[1].register_forward_hook(lambda *_: None)
        if planned:
            planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0, capture="regions")
        seen = []
        for step in range(5):
            if step == 3:
                assert not planned or planner.plan_of(model) is not None
                handle = model[0].register_forward_hook(lambda _, __, out: 2 * out)
            if step == 4:
                handle.remove()
            loss = model(torch.randn(4, WIDE)).pow(2).mean()
            loss.backward()
            seen.append(loss.item())
        return seen

    assert losses(False) == losses(True)


class _Cached(nn.Module):
    """A gradient cache: a backward within the forward, and a hook that runs the encoder again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDE, 16), nn.GELU(), nn.Linear(16, WIDE))
        self.scale = nn.Linear(WIDE, WIDE)

    def score(self, made: Tensor) -> Tensor:
        return (self.scale(made) @ made.T).logsumexp(-1).mean()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            made = self.encoder(x)
        made = made.detach().requires_grad_()
        loss = self.score(made)
        loss.backward()
        loss = loss.detach().requires_grad_()

        def again(_: Tensor) -> None:
            with torch.enable_grad():
                (self.encoder(x) * made.grad).sum().backward()

        loss.register_hook(again)
        return loss


def test_a_forward_may_run_a_backward_of_its_own() -> None:
    (plain, _), (planned, _) = _trained(_Cached, ""), _trained(_Cached, "regions")
    assert all(map(torch.equal, plain, planned))


class _Drawing(nn.Module):
    """Draws of numpy's in a forward of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDE, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept = np.random.rand(len(x)) + np.random.randint(0, 3, (len(x),)) + np.random.normal()
        return (self.net(x).squeeze(-1) * torch.from_numpy(kept.astype(np.float32))).mean()


def test_numpy_draws_in_regions_as_it_draws_in_eager() -> None:
    found = []
    for capture in ("", "regions"):
        np.random.seed(3)
        found.append((_trained(_Drawing, capture), np.random.get_state()))
    ((plain, _), before), ((planned, model), after) = found
    assert all(map(torch.equal, plain, planned)) and planner.plan_of(model) is not None
    assert before[2] == after[2] and (before[1] == after[1]).all()


class _Heads(nn.Module):
    """Two outputs, and a constant that the trace keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(WIDE, 8), nn.Linear(8, 8), [torch.randn(8, 8)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x) @ self.table[0])
        return hidden.sum(1), self.second(hidden)


def test_other_outputs_than_before_get_gradients_where_the_step_has_constants() -> None:
    def gradients(planned: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = _Heads(), torch.randn(4, WIDE)
        if planned:
            planner.plan(
                model, 1.0, (x,), loss_fn=lambda out: out[1].mean(), costs="roofline", time_limit_s=1.0
            ).apply(model)
        sum(out.mean() for out in model(x)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_two_forwards_before_a_backward_of_a_layer_that_normalizes_its_spectrum() -> None:
    """The second writes over the vectors that the first one's backward needs."""

    def gradients(planned: bool) -> list[Tensor]:
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDE, 16))
        model = nn.Sequential(first, nn.GELU(), nn.Linear(16, 1))
        if planned:
            planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0, capture="regions")
        for _ in range(4):
            model.zero_grad()
            sum(model(torch.randn(4, WIDE)).pow(2).mean() for _ in range(2)).backward()
        assert not planned or planner.plan_of(model) is not None
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_a_model_with_a_scripted_layer_is_enabled_and_trains() -> None:
    def losses(planned: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDE, 8), torch.jit.script(nn.Linear(8, 8)), nn.Tanh())
        if planned:
            planner.enable(model, 1.0, now=True, costs="roofline", time_limit_s=1.0)
        out = []
        for _ in range(3):
            loss = model(torch.randn(4, WIDE)).mean()
            loss.backward()
            out.append(loss.item())
        return out

    assert losses(False) == losses(True)


class _Taught(nn.Module):
    """A teacher that each forward moves, and a bank so large that the first step is made again."""

    def __init__(self, binds: bool) -> None:
        super().__init__()
        self.net, self.teacher = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE).requires_grad_(False)
        self.register_buffer("bank", torch.randn(WIDE, 40_000))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.binds = binds

    def forward(self, x: Tensor) -> Tensor:
        for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.binds:
                own.data = own.data * 0.9 + other.data * 0.1
            else:
                own.data.mul_(0.9).add_(other.data, alpha=0.1)
        loss = (self.net(x) @ self.bank.clone()).logsumexp(-1).mean()
        at = int(self.place)
        with torch.no_grad():
            self.bank[:, at : at + len(x)] = self.teacher(x).T
        self.place += len(x)
        return loss * 1.0


@pytest.mark.parametrize("binds", [False, True], ids=["in place", "bound anew"])
def test_a_first_step_that_is_made_again_moves_a_teacher_once(binds: bool) -> None:
    (plain, _), (planned, model) = (_trained(lambda: _Taught(binds), of) for of in ("", "regions"))
    assert all(map(torch.equal, plain, planned))
    assert any(_spoilt(model))
