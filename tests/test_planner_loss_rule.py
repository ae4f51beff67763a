"""Which output is the loss: a capture, a measurement and the two of them in verify go by one rule."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.capture.joint_graph import capture
from planner.measure import loss_of, run_step
from planner.measure.step import forward

X = torch.linspace(-1, 1, 12).reshape(3, 4)

# What the output holds, of parts by name ("detached" has no gradient, "rows" one element each), and what is
# differentiated; all that requires grad where no output is the loss.
CASES: dict[str, tuple[Any, set[str]]] = {
    "a name that ends in loss": ({"mask_loss": "a", "balance": "b", "logits": "rows"}, {"a"}),
    "an unreduced loss": ({"loss": "rows", "logits": "wide"}, {"rows", "wide"}),
    "an unreduced loss and a scalar": ({"loss": "rows", "balance": "b"}, {"b"}),
    "a loss inside": ({"a": {"loss": "a", "scale": "b"}, "logits": "rows"}, {"a"}),
    "a detached loss and one to train on": ({"loss": "detached", "train_loss": "a", "scale": "b"}, {"a"}),
    "loss beside others": ({"box_loss": "b", "loss": "a", "mask_loss": "c"}, {"a"}),
    "the output's own loss and one inside": ({"loss": "a", "aux": {"loss": "b"}, "logits": "rows"}, {"a"}),
    "two losses inside": ({"x": {"loss": "a"}, "y": {"loss": "b"}, "logits": "rows"}, {"a", "b", "rows"}),
    "two that end in loss": ({"mask_loss": "a", "box_loss": "b", "n": "detached"}, {"a", "b"}),
    "the only scalar": (("rows", "a"), {"a"}),
    "two scalars": (("a", "b"), {"a", "b"}),
    "no scalar": (("rows", "wide"), {"rows", "wide"}),
}


class Parts(nn.Module):
    """Returns ``form`` with tensors for the names in it."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 5)

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        wide = self.outer(torch.tanh(self.inner(x)))
        rows = wide.square().mean(1)
        a, b, c = wide.sum(), rows.exp().sum(), rows.mean()
        return {"wide": wide, "rows": rows, "a": a, "b": b, "c": c, "detached": a.detach() * 2}

    def forward(self, x: Tensor) -> Any:
        return filled(self.form, self.parts(x))


def filled(form: Any, parts: dict[str, Tensor]) -> Any:
    if isinstance(form, str):
        return parts[form]
    if isinstance(form, tuple):
        return tuple(filled(each, parts) for each in form)
    return {key: filled(each, parts) for key, each in form.items()}


def names_in(form: Any) -> list[str]:
    if isinstance(form, str):
        return [form]
    return [n for each in (form if isinstance(form, tuple) else form.values()) for n in names_in(each)]


def model_of(form: Any) -> nn.Module:
    torch.manual_seed(0)
    return Parts(form)


@pytest.mark.parametrize("case", CASES)
def test_capture_and_measure_differentiate_the_same(case: str) -> None:
    form, wanted = CASES[case]
    model = model_of(form)
    leaves = capture(model, (X,)).template.leaves
    captured = {n for n, leaf in zip(names_in(form), leaves, strict=True) if leaf.differentiated}
    assert captured == wanted
    passed = forward(model, (X,), None)
    parts = model.parts(X)
    equal = {n for n in names_in(form) if any(torch.equal(parts[n], root) for root in passed.roots)}
    assert equal == wanted and len(passed.roots) == len(wanted)
    assert (passed.loss is not None) == (len(wanted) == 1 and passed.roots[0].numel() == 1)


@pytest.mark.parametrize("case", CASES)
def test_a_plan_verifies_whatever_the_loss_is_called(case: str) -> None:
    model = model_of(CASES[case][0])
    report = planner.plan(model, 1.0, (X,), costs="roofline").verify()
    assert report.comparison.equal and report.ok, str(report)


def test_the_gradients_of_a_named_loss_are_its_own() -> None:
    model = model_of({"mask_loss": "a", "balance": "b", "logits": "rows"})
    found = run_step(model, (X,)).gradients
    model.parts(X)["a"].backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items() if grad is not None)


def test_outputs_that_no_graph_carries_are_read_too() -> None:
    parts = Parts({}).parts(X)
    assert loss_of(UserDict(loss=parts["a"], scale=parts["b"])) is parts["a"]
    assert loss_of(SimpleNamespace(loss=parts["a"], scale=parts["b"])) is parts["a"]
    assert loss_of(SimpleNamespace(logits=parts["rows"])) is None
    assert loss_of({"loss": parts["detached"]}) is None
