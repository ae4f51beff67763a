"""What the backward writes besides gradients, and new memory for a buffer: as eager, or refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from planner import plan
from planner.capture.joint_graph import capture
from planner.errors import TraceError
from planner.regions.cut.writes import positions, written_by
from tests.tiny import planned


class Observed(torch.autograd.Function):
    """The identity; its backward notes the largest gradient, as fp8 layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor, saved: bool) -> Tensor:
        ctx.largest = None if saved else largest
        if saved:
            ctx.save_for_backward(largest)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        largest = ctx.saved_tensors[0] if ctx.largest is None else ctx.largest
        largest.copy_(torch.maximum(largest, g.abs().amax()))
        return g, None, None


def hooked(net: Any, h: Tensor) -> Tensor:
    def note(g: Tensor) -> None:
        net.largest.copy_(g.abs().amax())

    h.register_hook(note)
    return h


def stored(net: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: setattr(net, "last", g))
    return h


def counted(net: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: setattr(net, "count", net.count + 1))
    return h


def logged(_: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: LOG.append(g.mean()))
    return h


def counted_outside(_: Any, h: Tensor) -> Tensor:
    seen = {"count": 0}

    def count(g: Tensor) -> None:
        seen["count"] += 1

    h.register_hook(count)
    return h


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.log = LOG
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        ctx.log.append(1)
        return g


class Reversed(torch.autograd.Function):
    """Uses lists of its own in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.done = False
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        ctx.done, parts = True, []
        for part in (g, g):
            parts.append(-part)
        return parts[0] + parts[1]


def given_other_memory(net: Any, h: Tensor) -> Tensor:
    net.largest.data = h.detach().abs().amax(0)
    return h


def note_outside(_: Any, g: Tensor) -> None:
    LOG.append(g.mean())


def noted(what: Callable[[Any, Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    """A middle whose hook does ``what`` and leaves the gradient."""

    def middle(net: Any, h: Tensor) -> Tensor:
        h.register_hook(lambda g: what(net, g) and None)
        return h

    return middle


LOG: list[Any] = []


class Net(nn.Module):
    """Two layers with ``middle(module, h)`` in between, and a buffer."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last_layer = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("largest", torch.full((), 0.5))
        self.middle, self.count = middle, 0
        self.norms: list[float] = []
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last_layer(self.middle(self, self.first(x).relu()) * self.largest)
        return out.sum()


WRITES = {
    "in a Function": (lambda net, h: Observed.apply(h, net.largest, False), r"largest at .*py:\d+ \("),
    "in a Function, saved": (lambda net, h: Observed.apply(h, net.largest, True), r"largest at .*py:\d+ \("),
    "by a hook": (hooked, r"writes into largest at .*py:\d+ \("),
    "an attribute": (stored, "backward of Net changes last"),
    "a count": (counted, "backward of Net changes count"),
    "a list of the model": (noted(lambda net, g: net.norms.append(1.0)), "backward of Net changes norms"),
    "a dict of the model": (noted(lambda net, g: net.seen.update(g=g.mean())), r"changes seen\['g'\]"),
    "a buffer bound anew": (noted(lambda net, g: setattr(net, "largest", g.amax())), "changes largest"),
    "a list, by a helper": (noted(note_outside), r"<lambda> at .*py:\d+ changes LOG"),
    "a list outside the model": (logged, r"<lambda> at .*py:\d+ changes LOG"),
    "a count in a closure": (counted_outside, r"count at .*py:\d+ changes seen"),
    "a list of the context": (lambda net, h: Counted.apply(h), r"backward at .*py:\d+ changes log"),
    "other memory": (given_other_memory, r"other memory .*py:\d+ \("),
    "a parameter": (lambda net, h: h * net.first.weight.data.clamp_(-1, 1).sum(), "into first.weight"),
}


@pytest.mark.parametrize(("middle", "says"), WRITES.values(), ids=WRITES.keys())
def test_what_a_plan_would_not_write_is_refused_by_name(middle: Callable[..., Tensor], says: str) -> None:
    net = Net(middle)
    before = [*vars(net)["_buffers"].values(), *net.parameters()]
    with pytest.raises(TraceError, match=says):
        capture(net, {"x": torch.ones(2, 4)})
    after = [*vars(net)["_buffers"].values(), *net.parameters()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert (
        not LOG
        and not net.norms
        and not net.seen
        and net.count == 0
        and net.largest.item() == 0.5
        and "last" not in vars(net)
    )


def scaled(net: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * net.largest)  # reads what the forward left there
    net.largest.mul_(2)
    return h


def replaced(net: Any, h: Tensor) -> Tensor:
    net.largest.data = h.detach().abs().amax()
    return h


def set_anew(net: Any, h: Tensor) -> Tensor:
    net.largest.set_(h.detach().abs().amax())
    return h


def written_by_data(net: Any, h: Tensor) -> Tensor:
    net.largest.data.copy_(h.detach().abs().amax())
    return h


def negated(_: Any, h: Tensor) -> Tensor:
    return Reversed.apply(h)


@pytest.mark.parametrize("middle", [negated, scaled, replaced, set_anew, written_by_data])
def test_what_the_forward_writes_is_there_as_in_eager(middle: Callable[..., Tensor]) -> None:
    report = planned(Net(middle), {"x": torch.ones(2, 4)}).verify()
    assert report.equal and report.comparison.buffers.count == 1


@pytest.mark.parametrize("what", ["in a Function", "in a Function, saved", "by a hook"])
def test_regions_leave_what_writes_in_its_backward_to_eager(what: str) -> None:
    eager, net = (Net(WRITES[what][0]) for _ in range(2))
    eager.largest.fill_(-0.5)  # below every largest gradient: the first step writes
    net.load_state_dict(eager.state_dict())
    inputs = torch.ones(2, 4)
    plan(net, 1, (inputs,), costs="roofline", capture="regions").apply()
    for _ in range(2):
        for each in (eager, net):
            each.zero_grad()
            each(inputs).backward()
        assert torch.equal(net.largest, eager.largest)
        assert net.largest.item() != -0.5
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), eager.parameters(), strict=True))


def test_what_python_names_with_an_underscore_for_its_keywords_writes_nothing() -> None:
    """``mask & other`` in one of Dynamo's graphs; a write there keeps a call out of what is planned."""
    graph = fx.Graph()
    mask, other, sums = (graph.placeholder(name) for name in ("mask", "other", "sums"))
    calls = [graph.call_function(of, (mask, other)) for of in (operator.and_, operator.or_, operator.is_)]
    assert all(written_by(call) == () for call in [*calls, graph.call_function(operator.not_, (mask,))])
    assert written_by(graph.call_method("add_", (sums, mask))) == (sums,)
    assert positions(graph) == {2}
