"""Random numbers in the forward: drawn as eager draws them, or refused with the line that draws."""

from __future__ import annotations

import importlib
import random
import secrets
from collections.abc import Callable
from random import choice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.capture.joint_graph import capture
from planner.errors import TraceError
from planner.measure.bits import compare, run_step
from tests.tiny import planned

OWN: random.Random
NUMPYS: np.random.Generator
OLD_NUMPYS: np.random.RandomState


@pytest.fixture(autouse=True, scope="module")
def _seen() -> None:
    """They are among what the garbage collector walks: made after conftest.py took all else out of it."""
    global OWN, NUMPYS, OLD_NUMPYS
    OWN, NUMPYS, OLD_NUMPYS = random.Random(3), np.random.default_rng(3), np.random.RandomState(3)


TORCHS = torch.Generator().manual_seed(3)


class Net(nn.Module):
    """Two layers with ``middle(module, h)`` in between."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.middle = middle
        self.skip = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self, self.first(x).relu()))
        return out.sum()


class DrawsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * random.gauss(1.0, 0.1)


def states() -> list[object]:
    return [
        random.getstate(),
        OWN.getstate(),
        repr(np.random.get_state(legacy=False)),
        repr(NUMPYS.bit_generator.state),
        repr(OLD_NUMPYS.get_state(legacy=False)),
        torch.get_rng_state().tolist(),
    ]


def entropy(_: Any, h: Tensor) -> Tensor:
    return h * float(np.random.default_rng().random())


def unseeded(_: Any, h: Tensor) -> Tensor:
    return h * random.Random().random()


def forked(_: Any, h: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return F.dropout(h, 0.5)


def same_mask_twice(_: Any, h: Tensor) -> Tensor:
    state = torch.get_rng_state()
    h = F.dropout(h, 0.5)
    torch.set_rng_state(state)
    return F.dropout(h, 0.5)


def reseeded(_: Any, h: Tensor) -> Tensor:
    torch.manual_seed(7)
    return F.dropout(h, 0.5)


def put_back(_: Any, h: Tensor) -> Tensor:
    state = random.getstate()
    h = h * random.random()
    random.setstate(state)
    return h


def kept(net: Any, h: Tensor) -> Tensor:
    if not hasattr(net, "made"):
        net.made = random.Random(5)
    return h * net.made.random()


DRAWS = {
    "python": lambda _, h: h if random.random() < 0.5 else h.tanh(),
    "python, by its method's name": lambda _, h: h * choice((1.0, 2.0)),
    "a Random of its own": lambda _, h: h * OWN.uniform(0, 1),
    "a state put back after the draw": put_back,
    "numpy": lambda _, h: h * float(np.random.rand()),
    "a numpy Generator": lambda _, h: h + torch.from_numpy(NUMPYS.random(4, dtype=np.float32)),
    "a numpy RandomState": lambda _, h: h * OLD_NUMPYS.randint(3),
    "in a backward": lambda _, h: DrawsInBackward.apply(h),
    "numpy without a seed": entropy,
    "the system's": lambda _, h: h * (1 + secrets.randbelow(3)),
    "the system's, through a helper of Python's": lambda _, h: h[
        :, random.SystemRandom().sample(range(4), 4)
    ],
    "Random without a seed": unseeded,
    "fork_rng": forked,
    "a state set again": same_mask_twice,
    "manual_seed": reseeded,
    "initial_seed": lambda _, h: h * (torch.initial_seed() % 7),
    "a torch.Generator of its own": lambda _, h: h + torch.randn(h.shape, generator=TORCHS),
    "that fills": lambda _, h: h * torch.empty_like(h).bernoulli_(0.5, generator=TORCHS),
}


@pytest.mark.parametrize("middle", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_that_a_graph_would_freeze_is_refused_with_its_line(middle: Callable[..., Tensor]) -> None:
    net = Net(middle)
    before = states()
    with pytest.raises(TraceError, match=r"test_planner_forward_random.py:\d+ \(.+\)") as refused:
        capture(net, (torch.ones(2, 4),))
    assert "outside forward" in str(refused.value)
    assert states() == before


def kept_in_a_dict(_: Any, h: Tensor) -> Tensor:
    return h * GENERATORS.setdefault("made", random.Random(5)).random()


GENERATORS: dict[str, random.Random] = {}


@pytest.mark.parametrize("middle", [kept, kept_in_a_dict])
def test_a_generator_that_the_first_call_makes_and_keeps_is_refused_by_name(middle: Any) -> None:
    with pytest.raises(TraceError, match=r"makes a generator and keeps it in made: .* outside forward"):
        capture(Net(middle), (torch.ones(2, 4),))


def seeded_for_a_while(_: Any, h: Tensor) -> Tensor:
    state = random.getstate()
    random.seed(0)
    h = h * random.random()
    random.setstate(state)
    return h


def skips(net: Any, h: Tensor) -> Tensor:
    return h.tanh() if net.skip > 0 and random.random() < net.skip else h


def same_noise(_: Any, h: Tensor) -> Tensor:
    return h * random.Random(7).random() + float(np.random.default_rng(7).random())


def defaults(_: Any, h: Tensor) -> Tensor:
    return h * torch.empty_like(h).bernoulli_(0.5, generator=torch.default_generator)


@pytest.mark.parametrize("middle", [skips, same_noise, seeded_for_a_while, defaults])
def test_what_draws_as_eager_draws_is_planned(middle: Callable[..., Tensor]) -> None:
    net = Net(middle)
    net.held = random.Random(0)  # type: ignore[assignment]
    before = states()
    assert planned(net, {"x": torch.ones(2, 4)}).verify().equal
    assert states() == before


def test_a_step_is_run_from_the_same_random_states_of_python_and_numpy() -> None:
    net = Net(lambda _, h: h * random.random() * float(np.random.rand()))
    before = states()
    first, second = (run_step(net, (torch.ones(2, 4),), seed=5) for _ in range(2))
    assert states() == before
    assert compare(first, second).equal
    other = run_step(Net(lambda _, h: h * random.random()), (torch.ones(2, 4),), seed=5)
    assert compare(first, other).rng.differing == ("numpy.random",)


def test_what_the_tracer_draws_for_itself_is_not_the_forwards() -> None:
    sympys = importlib.import_module("sympy.core.random")

    class Net(nn.Module):
        def __init__(self, draws: Callable[[], float]) -> None:
            super().__init__()
            self.layer, self.draws = nn.Linear(3, 3), draws

        def forward(self, x: Tensor) -> Tensor:
            self.draws()
            return self.layer(x).sum()

    x = torch.randn(2, 3)
    assert planner.estimate(Net(sympys._assumptions_rng.random).train(), (x,), costs="roofline")
    with pytest.raises(planner.TraceError, match=r"random\.Random of its own"):
        planner.estimate(Net(random.Random(1).random).train(), (x,), costs="roofline", capture="one graph")
