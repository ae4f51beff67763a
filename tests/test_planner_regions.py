"""Models whose step is not one graph, one for each mechanism, trained in regions as eager trains them.

Every model is trained on the same batches as its twin without a plan, under a budget that eager does not keep
(where there is something to recompute), for more steps than are looked at and recorded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import planner
from planner.measure import StorageMeter
from tests import tiny
from tests.hf import FAST

STEPS = 5
SETTINGS = {"scales": [0.5, 2.0], "clip": (1.0,)}


class Block(nn.Module):
    """A residual MLP with dropout on (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(x))))
        return out


class Blocks(nn.Module):
    """Two of them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(8, 2)


class Branches(Blocks):
    """Looks at a value, and runs one layer or another."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.second(h) if h.abs().max().item() < 100 else -h
        return self.head(h).square().mean()


class Stores(Blocks):
    """Keeps tensors and counters on itself, in containers too, and reads them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.unread, self.last, self.seen = 0, 0.0, torch.zeros(()), {"norm": torch.zeros(())}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.unread += 0.1
        h = self.second(self.first(x))
        loss = self.head(h).square().mean() + self.last
        self.last = loss.detach() * 0.1
        self.seen["norm"] = self.seen["norm"] + h.detach().norm()
        return loss


class Hooked(Blocks):
    """A hook takes a feature out of a layer, another adds noise to its output, as NEFTune does."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.first.register_forward_hook(self._noise)
        self.second.down.register_forward_hook(lambda module, args, out: self.features.append(out))

    def _noise(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + torch.empty_like(out).uniform_(-0.1, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        h = self.second(self.first(x))
        return self.head(h).square().mean() + self.features[0].abs().mean()


@dataclass
class Batch:
    """What a loader of dataclasses hands over."""

    x: Tensor
    name: str = "train"


@dataclass
class Result:
    """Outputs with a cache, as models that generate return them."""

    loss: Tensor
    cache: list[Tensor]
    more: Mapping[str, Any]


class Packs(Blocks):
    """Takes a dataclass, returns a dataclass with a cache that it fills."""

    def forward(self, batch: Batch) -> Result:
        cache: list[Tensor] = []
        h = self.first(batch.x)
        cache.append(h)
        if h.isnan().any():
            raise ValueError(batch.name)
        h = self.second(h)
        cache.append(h)
        return Result(self.head(h).square().mean(), cache, {"name": batch.name, "h": h.detach()})


class Checkpoints(Blocks):
    """Its author checkpoints the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        h: Any = checkpoint(self.first, x, use_reentrant=False)
        if h.sum().item() > 1e9:
            h = h * 0
        h = checkpoint(self.second, h, use_reentrant=False)
        return self.head(h).square().mean()


class Loops(Blocks):
    """As many turns as its data say."""

    def forward(self, x: Tensor) -> Tensor:
        h, turns = x, 0
        while turns < 2 or (turns < 4 and h.abs().mean().item() < 0.5):
            h, turns = self.first(h) * 0.8, turns + 1
        return self.head(self.second(h)).square().mean()


class Settings(Blocks):
    """Reads its settings in lists, private names and globals, and draws a number of Python's from them."""

    def __init__(self) -> None:
        super().__init__()
        self._modes, self.rate = ["gelu", "tanh"], 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.rate *= 0.9
        h = self.first(x) * SETTINGS["scales"][len(self._modes) % 2]
        h = torch.tanh(h) if "tanh" in self._modes else h
        if h.isinf().any():
            h = h.clamp(max=SETTINGS["clip"][0])
        return self.head(self.second(h) / (1 + self.rate)).square().mean()


class Forces(Blocks):
    """An energy, and forces as its derivative, which are trained too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = torch.tanh(self.head(torch.tanh(self.first.up(x))[:, :8])).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy.square() * 1e-3 + (self.second(x) + force).square().mean()


class Uncapturable(Blocks):
    """Part of it changes the gradient by a hook that reads values, which no graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.register_hook(lambda g: g * (0.5 if g.abs().max().item() > 1e-3 else 1.0))
        return self.head(self.second(h)).square().mean()


class Normed(Blocks):
    """Running statistics and a count, updated around a look at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("book", torch.ones(8))
        self.book: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)) * self.book.clone()
        with torch.no_grad():
            self.book.lerp_(h.abs().mean(0), 0.1)
        if self.book.max().item() > 1e6:
            h = -h
        return self.head(self.second(h) * self.book).square().mean()


MODELS = (
    Branches, Stores, Hooked, Packs, Checkpoints, Loops, Settings, Forces, Uncapturable, Normed,
)  # fmt: skip


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    outputs = model(Batch(x)) if isinstance(model, Packs) else model(x)
    loss: Tensor = outputs.loss if isinstance(outputs, Result) else outputs
    loss.backward()
    optimizer.step()
    return loss.detach()


def _trained(model: nn.Module) -> tuple[dict[str, Tensor], list[int]]:
    """What training leaves, and the peak of the last step."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses, peaks = [], []
    for k in range(STEPS + 1):
        x = torch.randn(64, 8)
        if k < STEPS:
            losses.append(_step(model, optimizer, x))
            continue
        optimizer.zero_grad()
        with StorageMeter() as meter:
            meter.register(*model.parameters(), *model.buffers(), x)
            losses.append(_step(model, optimizer, x))
        peaks.append(meter.peak_bytes)
    state = {f"loss {k}": loss for k, loss in enumerate(losses)}
    state |= {name: t.detach().clone() for name, t in model.state_dict().items()}
    state |= {"random": torch.get_rng_state()}
    return state, peaks


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_trains_as_eager_within_the_budget(
    kind: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
        twin = copy.deepcopy(model)
        if isinstance(twin, Hooked):  # a hook is bound to the model that it was registered on
            torch.manual_seed(0)
            twin = Hooked()
        want, eager = _trained(twin)
        budget = eager[0] * (2.0 if kind in (Forces, Checkpoints, Loops) else 0.85)
        planner.enable(model, budget / 1e9, **FAST, capture="regions", now=True)
        with caplog.at_level(logging.WARNING):
            got, ours = _trained(model)
    tiny.assert_same_bits(got, want)
    assert ours[0] <= budget
    plan = planner.plan_of(model)
    assert plan is not None and plan.regions, caplog.text
    assert "Graph break" not in caplog.text
    if isinstance(model, Stores) and isinstance(twin, Stores):
        assert (model.calls, model.unread) == (twin.calls, twin.unread) == (STEPS + 1, pytest.approx(0.6))
        assert torch.equal(model.seen["norm"], twin.seen["norm"])


def _compiles(model: nn.Module) -> int:
    return len(vars(model)["_planner_switch"]._regions.session.regions)


def test_what_nobody_reads_costs_no_compile_and_what_changes_few() -> None:
    class Counts(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.unread, self.rate, self.note = 0, 0, 0.75, ""

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.second(self.first(x)) * self.rate).square().mean() * (1 + self.calls / 100)

    def train(model: Counts) -> dict[str, Tensor]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for k in range(8):
            _step(model, optimizer, torch.randn(16, 8))
            model.unread, model.note, model.rate = k, f"step {k}", model.rate * 0.95
        return {name: t.detach().clone() for name, t in model.state_dict().items()}

    with torch.random.fork_rng():
        model = Counts()
        twin = copy.deepcopy(model)
        planner.enable(model, 1.0, **{**FAST, "solver": "recompute_all"}, capture="regions", now=True)
        tiny.assert_same_bits(train(model), train(twin))
    assert model.calls == twin.calls == 8
    plan = planner.plan_of(model)
    assert plan is not None and plan.overhead > 0
    assert _compiles(model) <= 2  # as constants, then as numbers that are given
    (numbers,) = [r for r in vars(model)["_planner_switch"]._regions.session.regions if r.numbers is not None]
    assert len(numbers.variants) == 1


def test_a_step_that_is_one_graph_stays_one() -> None:
    class Plain(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x))).square().mean()

    model = planner.enable(Plain(), 1.0, **FAST, now=True)
    model(torch.randn(16, 8)).backward()
    plan = planner.plan_of(model)
    assert plan is not None and not plan.regions


def test_planning_leaves_the_batch_as_it_was() -> None:
    class Scales(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.head(self.second(self.first(x))).square().mean()

    x = torch.randn(16, 8)
    given = x.clone()
    plan = planner.plan(Scales(), 1.0, (x,), **FAST, capture="regions")
    assert torch.equal(x, given)
    assert plan.verify().ok  # each of its steps begins with the same batch
    assert torch.equal(x, given)
