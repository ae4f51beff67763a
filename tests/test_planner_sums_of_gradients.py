"""What is read several times, and by others too: gradients are added up in eager's order, to the bit.

Each model is planned once, in one graph, and trains in several ways beside a twin without a plan.  The other
order is shown to give other bits, so that the cases are not equal by chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.measure import StorageMeter
from planner.runtime.autograd import PendingCall
from tests import tiny

Step = Callable[[nn.Module, list[Tensor]], None]


class Looped(nn.Module):
    """One layer run ``turns`` times."""

    def __init__(self, turns: int = 5, width: int = 24) -> None:
        super().__init__()
        self.layer, self.last, self.turns = nn.Linear(width, width), nn.Linear(width, width), turns

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = torch.tanh(self.layer(x))
        out: Tensor = self.last(x)
        return out


class Tied(nn.Module):
    """A table that embeds and predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 24)
        self.inner = nn.Linear(24, 24)
        self.head = nn.Linear(24, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(self.table(x))))
        return out


def normed() -> nn.Module:
    """Weights that are read for their largest singular value, and divided by it."""
    spectral = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(spectral(nn.Linear(24, 24)), nn.Tanh(), spectral(nn.Linear(24, 24)))


RANDOM = torch.Generator().manual_seed(0)
ROWS = [torch.randn(16, 24, generator=RANDOM) for _ in range(3)]
TOKENS = [torch.randint(0, 32, (8, 6), generator=RANDOM) for _ in range(3)]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def loss_of(model: nn.Module, xs: list[Tensor]) -> Tensor:
    losses = (model(x).float().sin().pow(2).mean() * k for k, x in enumerate(xs, start=1))
    return torch.stack(list(losses)).sum()


def one(model: nn.Module, xs: list[Tensor]) -> None:
    loss_of(model, xs[:1]).backward()


def together(model: nn.Module, xs: list[Tensor]) -> None:
    loss_of(model, xs).backward()


def one_in_one_context(model: nn.Module, xs: list[Tensor]) -> None:
    with autocast():
        loss = loss_of(model, xs[:1])
    loss.backward()


def in_one_context(model: nn.Module, xs: list[Tensor]) -> None:
    with autocast():
        loss = loss_of(model, xs)
    loss.backward()


def in_contexts_of_their_own(model: nn.Module, xs: list[Tensor]) -> None:
    losses = []
    for x in xs:
        with autocast():
            losses.append(loss_of(model, [x]))
    torch.stack(losses).sum().backward()


def one_after_another(model: nn.Module, xs: list[Tensor]) -> None:
    with autocast():
        losses = [loss_of(model, [x]) for x in xs]
    for loss in losses:
        loss.backward()


def some_of_them(model: nn.Module, xs: list[Tensor]) -> None:
    with autocast():
        first, second, third = (loss_of(model, [x]) for x in xs)
    (first + third).backward()
    second.backward()


def without_the_cache(model: nn.Module, xs: list[Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = loss_of(model, xs)
    loss.backward()


PLAIN: tuple[Step, ...] = (one, together)
LOW: tuple[Step, ...] = (
    one_in_one_context,
    in_one_context,
    in_contexts_of_their_own,
    one_after_another,
    some_of_them,
)


def differing(model: nn.Module, twin: nn.Module, step: Step, xs: list[Tensor]) -> list[str]:
    """Names of the parameters whose gradients differ; those are dropped afterwards."""
    for each in (model, twin):
        each.zero_grad()
        step(each, xs)
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    out = [name for (name, p), q in pairs if not _same(p.grad, q.grad)]
    model.zero_grad()
    twin.zero_grad()
    return out


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "looped": (Looped, ROWS),
    "tied": (Tied, TOKENS),
    "normed": (normed, ROWS),
    "once": (lambda: Looped(turns=1), ROWS),
}


def planned(name: str, *, low: bool) -> tuple[nn.Module, nn.Module, planner.Plan]:
    build, xs = MODELS[name]
    model = tiny.seeded(build)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        plan = planner.plan(
            model, 1.0, inputs=(xs[0],), costs="roofline", time_limit_s=1, capture="one graph"
        )
    plan.apply(model)
    return model, twin, plan


@pytest.mark.parametrize("name", MODELS)
def test_calls_before_one_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, _ = planned(name, low=False)
    xs = MODELS[name][1]
    for step in PLAIN:
        assert not differing(model, twin, step, xs), step.__name__
    monkeypatch.setattr(PendingCall, "_apart", lambda *_, **__: None)
    assert bool(differing(model, twin, together, xs)) == (name == "looped")
    assert not differing(model, twin, one, xs)


@pytest.mark.parametrize("name", MODELS)
def test_calls_in_one_context_of_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, _ = planned(name, low=True)
    xs = MODELS[name][1]
    for step in LOW:
        assert not differing(model, twin, step, xs), step.__name__
    monkeypatch.setattr(PendingCall, "_apart", lambda *_, **__: None)
    assert differing(model, twin, in_one_context, xs)
    assert not differing(model, twin, one_in_one_context, xs)


def penalized(model: nn.Module, xs: list[Tensor]) -> None:
    loss = loss_of(model, xs[:1])
    (loss + 0.1 * squares_of(model)).backward()


def penalized_before(model: nn.Module, xs: list[Tensor]) -> None:
    penalty = squares_of(model)
    (loss_of(model, xs[:1]) + 0.1 * penalty).backward()


def penalized_between(model: nn.Module, xs: list[Tensor]) -> None:
    first = loss_of(model, xs[:1])
    penalty = squares_of(model)
    (first + 0.1 * penalty + loss_of(model, xs[1:])).backward()


def squares_of(model: nn.Module) -> Tensor:
    return torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "looped"])
def test_a_penalty_on_weights(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, twin, _ = planned(name, low=False)
    xs = MODELS[name][1]
    for step in (penalized, penalized_before, penalized_between):
        assert not differing(model, twin, step, xs), step.__name__
    assert not caplog.records


def test_a_penalty_on_what_is_read_often_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model, twin, _ = planned("looped", low=False)
    for step in (one, penalized_before, penalized_between, one):
        assert not differing(model, twin, step, ROWS), step.__name__
    told = "gets a gradient from elsewhere"
    assert told not in caplog.text
    assert differing(model, twin, penalized, ROWS)
    assert "layer." in caplog.text and "capture='regions'" in caplog.text
    for step in (penalized, one):
        assert not differing(model, twin, step, ROWS)
    assert caplog.text.count(told) == 1


class Within(nn.Module):
    """A planned part whose input is computed outside, and read outside too."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part = nn.Linear(24, 24), part

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        out: Tensor = self.part(h) + h.sin()
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + torch.tanh(self.inner(x)) * x
        return out


def test_an_input_that_others_read() -> None:
    model = tiny.seeded(lambda: Within(Residual()))
    twin = copy.deepcopy(model)
    part: nn.Module = model.part  # type: ignore[assignment]
    planner.plan(part, 1.0, inputs=(model.before(ROWS[0]),), costs="roofline", time_limit_s=1).apply(part)
    for step in (one, together):
        assert not differing(model, twin, step, ROWS)


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_as_predicted(name: str, share: float) -> None:
    build, xs = MODELS[name]
    model = tiny.seeded(build)
    how: dict[str, Any] = {"inputs": (xs[0],), "loss_fn": mean_of, "costs": "roofline", "time_limit_s": 1}
    whole = planner.plan(model, 1.0, **how)
    budget_bytes = whole.minimum_peak_bytes + share * (whole.baseline_peak_bytes - whole.minimum_peak_bytes)
    plan = planner.plan(model, budget_bytes / 1e9, **how)
    assert plan.verify().ok
    plan.apply(model)
    with StorageMeter() as meter:
        mean_of(model(xs[0])).backward()
    assert meter.peak_bytes == plan.peak_bytes


def mean_of(out: Tensor) -> Tensor:
    return out.sin().pow(2).mean()
