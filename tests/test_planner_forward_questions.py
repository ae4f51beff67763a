"""Questions that a forward asks of its tensors and of torch: answered as eager answers them, or refused."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling

from planner.capture.joint_graph import capture
from planner.errors import TraceError
from tests.tiny import planned


@functools.singledispatch
def kind(x: object) -> bool:
    return False


@kind.register
def _(x: Tensor) -> bool:
    return type(x) in {Tensor: 0}


def is_tagged(m: Any) -> bool:
    return getattr(m.first.weight, "tagged", False) and not hasattr(m.last.weight, "tagged")


def names(m: Any, h: Tensor) -> bool:
    return f"{type(h).__name__} {type(m.first.bias).__name__}" == "Tensor Parameter"


def leaves(m: Any, x: Tensor, h: Tensor) -> bool:
    return m.first.weight.is_leaf and x.is_leaf and not h.is_leaf and h.detach().is_leaf


def compiles() -> bool:
    compiler = torch.compiler
    return (
        is_compiling() or compiler.is_compiling() or compiler.is_exporting() or compiler.is_dynamo_compiling()
    )


# Each with the answer that eager gives.
ASKS: dict[str, tuple[bool, Callable[[Any, Tensor, Tensor], bool]]] = {
    "type": (True, lambda m, x, h: type(h) is Tensor and type(x) is Tensor),
    "class": (True, lambda m, x, h: h.__class__ is Tensor and m.first.weight.__class__ is nn.Parameter),
    "name of class": (True, lambda m, x, h: names(m, h)),
    "dispatch": (True, lambda m, x, h: kind(h)),
    "isinstance of its type": (True, lambda m, x, h: isinstance(h, type(x)) and isinstance(type(x), type)),
    "Parameter": (True, lambda m, x, h: isinstance(m.first.weight, nn.Parameter)),
    "no Parameter": (False, lambda m, x, h: isinstance(h, nn.Parameter) or isinstance(m.seen, nn.Parameter)),
    "FakeTensor": (False, lambda m, x, h: isinstance(h, FakeTensor) or type(h) is FakeTensor),
    "leaf": (True, leaves),
    "grad_fn": (True, lambda m, x, h: m.first.weight.grad_fn is None and h.grad_fn is not None),
    "compiling": (False, lambda m, x, h: compiles()),
    "identity": (True, lambda m, x, h: any(p is m.first.weight for p in m.held[0]) and m.also[0] is m.seen),
    "key": (True, lambda m, x, h: m.first.weight in m.keys and m.last.weight not in m.keys),
    "id": (True, lambda m, x, h: m.named[id(m.first.weight)] == "first"),
    "attribute": (True, lambda m, x, h: is_tagged(m)),
    "layout": (
        True,
        lambda m, x, h: h.is_contiguous() and h.stride() == (4, 1) and not h.t().is_contiguous(),
    ),
    "device": (True, lambda m, x, h: h.device.type == "cpu" and h.dtype is torch.float32 and not h.is_meta),
}


class Net(nn.Module):
    """Two layers; a question decides what lies between them."""

    def __init__(self, asks: Callable[[Any, Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.ones(4))
        self.first.weight.tagged = True  # type: ignore[attr-defined]
        self.held, self.also = [[self.last.weight, self.first.weight]], (self.seen,)
        self.named = {id(self.first.weight): "first"}
        self.keys = {self.first.weight: 1}
        self.asks = asks
        self.answer: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * self.seen
        out: Tensor = self.last(h.relu() if self.asks(self, x, h) else h.tanh())
        return out.sum()


@pytest.mark.parametrize(("answer", "asks"), ASKS.values(), ids=ASKS.keys())
def test_a_question_is_answered_as_eager_answers_it(answer: bool, asks: Callable[..., bool]) -> None:
    net, inputs = Net(asks), {"x": torch.randn(2, 4)}
    assert bool(asks(net, inputs["x"], net.first(inputs["x"]))) is answer  # the test's own idea of eager
    names = {str(node.target) for node in capture(net, inputs).step.module.graph.nodes}
    assert ("aten.relu.default" in names, "aten.tanh.default" in names) == (answer, not answer)


def test_parameters_that_a_module_holds_a_second_time_are_trained() -> None:
    net, inputs = Net(lambda m, x, h: True), {"x": torch.randn(2, 4)}
    held = net.held[0]
    net.register_parameter("kept", held[0])  # type: ignore[arg-type]
    net.last = Tied(held)  # type: ignore[assignment]
    plan = planned(net, inputs)
    assert plan.verify().equal
    assert held[1] is net.first.weight and net.also[0] is net.seen  # and not what stood in for them


class Tied(nn.Module):
    """Uses the weights in a list that is nobody's parameter list."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weights[1] @ self.weights[0].t()


def sets_attribute(m: Any, _: Tensor, h: Tensor) -> bool:
    m.first.weight.scale = h.detach().amax()
    return True


def swallowed(_: Any, x: Tensor, h: Tensor) -> bool:
    try:
        return h.data_ptr() == x.data_ptr()
    except RuntimeError:
        return False


REFUSED = {
    "version": lambda m, x, h: m.first.weight._version == 0,
    "address": lambda m, x, h: h.data_ptr() != 0,
    "address, and what it raises": swallowed,
    "gradient": lambda m, x, h: m.first.weight.grad is None,
}


@pytest.mark.parametrize("asks", REFUSED.values(), ids=REFUSED.keys())
def test_a_question_without_one_answer_is_refused_with_its_line(asks: Callable[..., bool]) -> None:
    with pytest.raises(TraceError, match=r"asks for .*test_planner_forward_questions.py:\d+ \(") as refused:
        capture(Net(asks), {"x": torch.randn(2, 4)})
    assert "Functional" not in str(refused.value)


def test_an_attribute_set_on_a_parameter_is_refused_by_name() -> None:
    net = Net(sets_attribute)
    with pytest.raises(TraceError, match=r"sets the attribute 'scale' of first\.weight"):
        capture(net, {"x": torch.randn(2, 4)})
    assert not hasattr(net.first.weight, "scale")


def test_builtins_and_classes_are_what_they_were() -> None:
    before = builtins.type, builtins.id, torch.compiler.is_compiling, FakeTensor.__mro__
    net = Net(lambda m, x, h: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        capture(net, {"x": torch.randn(2, 4)})
    assert before == (builtins.type, builtins.id, torch.compiler.is_compiling, FakeTensor.__mro__)
