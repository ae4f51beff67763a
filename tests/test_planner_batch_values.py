"""What a forward asks of the values of its batch: answered as in eager, and asked again of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.capture.as_eager.values import Values
from planner.capture.inputs import Inputs
from planner.errors import StalePlanError, TraceError
from planner.measure import compare, run_step
from planner.runtime import forward as forward_module
from planner.runtime.forward import planned_forward_of
from planner.solving.priced import prepare
from planner.training import ondemand

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
LABELS = [torch.tensor(labels) for labels in ([0, 3, 0, 0], [0, 1, 2, 3], [1, 2, 2, 1], [2, 2, 1, 1])]


class _Asks(nn.Module):
    """Takes one of two paths, which have other ops, as ``ask(labels, x, hidden)`` says."""

    def __init__(self, ask: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("flag", torch.tensor(True))
        self.ask = ask

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.ask(self, labels, x, hidden):
            hidden = torch.relu(self.second(hidden))
        else:
            hidden = torch.sigmoid(hidden) * self.second(hidden)
        return (hidden * labels[:, None]).sum()


def _writes(_: Any, labels: Tensor, x: Tensor, hidden: Tensor) -> bool:
    counts = torch.zeros(4, dtype=torch.long)
    counts[0] = 5
    counts -= torch.tensor([5, 0, 0, 0])
    counts[1:] = labels[1:]
    before = counts.sum() > 4  # read before what follows is written
    counts += 1
    counts[2:].mul_(0)
    return bool((counts.sum() > 4).logical_or(before))


def _mixes(_: Any, labels: Tensor, x: Tensor, hidden: Tensor) -> bool:
    mixed = torch.zeros(4)
    mixed[0] = hidden.sum()
    return bool((mixed >= 0).all())


ANSWERED: dict[str, Callable[..., Any]] = {
    "any": lambda _, labels, x, hidden: (labels == 3).any(),
    "all, item": lambda _, labels, x, hidden: (labels != 3).all().item(),
    "equal": lambda _, labels, x, hidden: torch.equal(labels, labels.flip(0)),
    "allclose": lambda _, labels, x, hidden: torch.allclose(labels.float(), labels.flip(0).float()),
    "a number as yes or no": lambda _, labels, x, hidden: labels.sum() - 6,
    "in": lambda _, labels, x, hidden: 3 in labels,
    "several": lambda _, labels, x, hidden: (labels > 0).all() and not (labels > 1).all(),
    "writes": _writes,
}
UNKNOWN: dict[str, Callable[..., Any]] = {
    "of a parameter": lambda _, labels, x, hidden: (hidden > 0).all(),
    "of a buffer": lambda model, labels, x, hidden: model.flag,
    "of random numbers": lambda _, labels, x, hidden: (torch.rand(2) > 0.5).any(),
    "of both": _mixes,
    "a number": lambda _, labels, x, hidden: labels.max().item() > 2,
}


def _train(model: nn.Module, labels: Tensor) -> Any:
    return run_step(model, (X, labels))


@pytest.mark.parametrize("kind", ANSWERED)
def test_each_batch_takes_its_path(kind: str) -> None:
    eager = [_train(_Asks(ANSWERED[kind]), labels) for labels in LABELS]
    answers = [bool(ANSWERED[kind](None, labels, X, X)) for labels in LABELS]
    assert len(set(answers)) == 2, "both paths are to be taken"
    model, given = _Asks(ANSWERED[kind]), LABELS[0].clone()
    plan = planner.plan(model, 1, (X, given), costs="roofline", capture="one graph")
    assert torch.equal(given, LABELS[0])
    plan.apply()
    for k in (0, 1, 2, 3, 2, 1, 0):
        assert compare(eager[k], _train(model, LABELS[k])).equal
    plan.restore()


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_the_batch_does_not_tell_is_no_graph(kind: str) -> None:
    model = _Asks(UNKNOWN[kind])
    with pytest.raises(TraceError, match="needs the value of a tensor"):
        prepare(model, (X, LABELS[0]), costs="roofline")


def test_without_a_batch_nothing_is_answered() -> None:
    model = _Asks(ANSWERED["any"])
    hollow = Inputs((X, LABELS[0]), {}).without_data()
    with pytest.raises(TraceError, match="needs the value of a tensor"):
        prepare(model, hollow, costs="roofline")


def test_what_no_batch_changes_is_not_asked_again() -> None:
    step = prepare(_Asks(lambda *_: (torch.arange(4) == 3).any()), (X, LABELS[0]), costs="roofline")
    assert not step.joint.asked
    step = prepare(_Asks(ANSWERED["any"]), (X, LABELS[0]), costs="roofline")
    assert step.joint.asked.answers == (True,)
    (place,) = step.joint.asked.places
    assert "test_planner_batch_values.py" in place


def test_the_same_question_is_one_program() -> None:
    def twice(_: Any, labels: Tensor, x: Tensor, hidden: Tensor) -> bool:
        return bool((labels == 3).any()) and bool((labels == 3).any()) and bool((labels == 0).any())

    asked = prepare(_Asks(twice), (X, LABELS[0]), costs="roofline").joint.asked
    assert asked.answers == (True, True, True) and asked.which == (0, 0, 1)
    assert asked.program is not None
    assert sum(node.op == "call_function" for node in asked.program.graph.nodes) == 6  # eq, any, any, each
    assert asked.of((X, LABELS[2])) == (False, False, False)


def test_a_plan_that_is_asked_too_often_says_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "_MOST_TURNS", 2)

    def counted(_: Any, labels: Tensor, x: Tensor, hidden: Tensor) -> bool:
        return any(bool((labels == k).any()) for k in range(3, -1, -1))

    model = _Asks(counted)
    plan = planner.plan(model, 1, (X, LABELS[0]), costs="roofline", capture="one graph")
    plan.apply()
    _train(model, LABELS[2])
    with pytest.raises(StalePlanError, match='capture="regions"'):
        _train(model, torch.ones_like(LABELS[0]))
    _train(model, LABELS[0])
    applied = planned_forward_of(model)
    assert applied is not None and len(applied.turns) == 1
    plan.restore()


def test_enabled_it_goes_on_in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondemand, "MOST_ANSWERS", 2)

    def counted(_: Any, labels: Tensor, x: Tensor, hidden: Tensor) -> bool:
        return any(bool((labels == k).any()) for k in range(3, -1, -1))

    batches = [*LABELS, torch.ones_like(LABELS[0])]
    eager = [_train(_Asks(counted), labels) for labels in batches]
    model = _Asks(counted)
    planner.enable(model, 1, costs="roofline", now=True)
    for labels, wanted in zip(batches, eager, strict=True):
        assert compare(wanted, _train(model, labels)).equal
    regions: Any = vars(model)["forward"]._regions
    assert "planned again 2 times" in regions.why


def test_ops_are_noted_by_what_they_write() -> None:
    """Of tensors that share memory, and after a write of something else: told by hand, without a trace."""
    values = Values(Inputs((LABELS[1],), {}))
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(LABELS[1])
    values.begin([fake])
    with mode, values.watching():
        held = torch.zeros(4, dtype=torch.long)
        view = held[1:]
        view.copy_(fake[1:])
        assert bool((held.sum() == 6).all()) and not bool((held[0] != 0).any())
        assert values.is_known(held)
        held.copy_(torch.randint(9, (4,)))
        assert not values.is_known(view)
    assert values.asked().answers == (True, False)
    assert values.asked().of([LABELS[2]]) == (False, False)


def test_torchs_own_transformer_asks_whether_its_mask_is_causal() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.body(x, mask=mask).square().mean()

    model, x = Masked(), torch.randn(2, 6, 16)
    masks = [nn.Transformer.generate_square_subsequent_mask(6), torch.zeros(6, 6)]
    eager = [run_step(model, (x, mask)) for mask in masks]
    planner.plan(model, 1, (x, masks[0]), costs="roofline", capture="one graph").apply()
    for k in (0, 1, 0):
        assert compare(eager[k], run_step(model, (x, masks[k]))).equal
