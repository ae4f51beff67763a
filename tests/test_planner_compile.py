"""torch.compile, torch.export and torch.func on planned models: they get the plain model, and it is said."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner import PlannerError
from planner.runtime import tracing
from planner.runtime.forward import planned_forward_of
from tests import tiny

INPUTS = tiny.batch(labels=True)


@pytest.fixture(autouse=True)
def _nothing_compiled_and_nothing_said() -> Iterator[None]:
    torch._dynamo.reset()
    tracing._told.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend() -> str:
    return "aot_eager"  # Dynamo and AOTAutograd, no kernels to build


def build() -> nn.Module:
    return tiny.seeded(lambda: tiny.Mlp(p=0.0))


def applied() -> nn.Module:
    model = build()
    return tiny.planned(model, INPUTS).apply(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def assert_right(model: nn.Module) -> None:
    """The gradients are those of one plain step."""
    plain = build()
    plain(**INPUTS).backward()
    for got, want in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(got, want)


def ran_as_planned(model: nn.Module) -> bool:
    planned = planned_forward_of(model)
    assert planned is not None
    return planned.last_call is not None


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "planner.runtime.tracing"]


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
def test_a_planned_model_is_compiled_as_it_was_and_the_warning_comes_once(
    backend: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = applied()
    compiled = torch.compile(model, backend=backend, **options)
    with caplog.at_level(logging.WARNING):
        compiled(**INPUTS).backward()
        compiled(**tiny.batch(5, labels=True))  # traced again
    assert not ran_as_planned(model)
    (message,) = said(caplog)
    assert "Mlp is being compiled" in message and "budget does not hold" in message
    model.zero_grad()
    compiled(**INPUTS).backward()
    assert_right(model)


def test_outside_the_compiled_model_the_plan_runs(backend: str) -> None:
    model = applied()
    torch.compile(model, backend=backend)(**INPUTS).backward()
    model.zero_grad()
    model(**INPUTS).backward()
    assert ran_as_planned(model)
    assert_right(model)


def test_compiled_in_place_before_and_after(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    before, after = build(), applied()
    before.compile(backend=backend)
    tiny.planned(before, INPUTS).apply(before)
    after.compile(backend=backend)
    for model in (before, after):
        model(**INPUTS).backward()
        assert not ran_as_planned(model)
        assert_right(model)
    assert len(said(caplog)) == 1


def test_a_compiled_model_that_is_planned_later_is_compiled_again(backend: str) -> None:
    model = build()
    compiled = torch.compile(model, backend=backend)
    compiled(**INPUTS).backward()
    plan = tiny.planned(model, INPUTS)
    for change in (plan.apply, plan.restore):
        change(model)
        model.zero_grad()
        compiled(**INPUTS).backward()
        assert_right(model)


def test_planning_what_is_compiled_already_says_the_order(backend: str) -> None:
    compiled = torch.compile(build(), backend=backend)
    for use in (
        lambda: planner.plan(compiled, 1.0, INPUTS),
        lambda: planner.frontier(compiled, INPUTS),
        lambda: planner.enable(compiled, 1.0),
        lambda: tiny.planned(build(), INPUTS).apply(compiled),
    ):
        with pytest.raises(PlannerError, match=r"this Mlp is compiled already: plan the model first"):
            use()


@pytest.mark.parametrize("with_backward", [False, True])
def test_a_planned_model_inside_a_compiled_function(backend: str, with_backward: bool) -> None:
    model = applied()

    @torch.compile(backend=backend)
    def step() -> Tensor:
        loss: Tensor = 2 * model(**INPUTS)
        if with_backward:
            loss.backward()
        return loss

    loss = step()
    if not with_backward:
        loss.backward()
    for p in model.parameters():
        p.grad /= 2
    assert_right(model)


def test_a_planned_part_of_a_compiled_model(backend: str) -> None:
    whole = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 8), tiny.Mlp(p=0.0), nn.Linear(4, 2)))
    twin = copy.deepcopy(whole)
    tiny.planned(whole[1], (whole[0](INPUTS["x"]),)).apply(whole[1])
    torch.compile(whole, backend=backend)(INPUTS["x"]).sum().backward()
    twin(INPUTS["x"]).sum().backward()
    for got, want in zip(gradients(whole), gradients(twin), strict=True):
        torch.testing.assert_close(got, want)


def compile_in_place(model: nn.Module, backend: str) -> None:
    model.second.compile(backend=backend)


def compile_the_method(model: nn.Module, backend: str) -> None:
    model.second.forward = torch.compile(model.second.forward, backend=backend)


def compile_around(model: nn.Module, backend: str) -> None:
    model.second = torch.compile(model.second, backend=backend)


@pytest.mark.parametrize(
    ("run_before", "how"),
    [
        (False, compile_in_place),
        (True, compile_in_place),
        (True, compile_the_method),
        (False, compile_around),
    ],
)
def test_compiled_parts_of_a_model_are_planned_as_what_they_compute(
    backend: str, run_before: bool, how: Callable[[nn.Module, str], None]
) -> None:
    model = build()
    how(model, backend)
    if run_before:
        model(**INPUTS).backward()
        model.zero_grad()
    compiles = torch._dynamo.utils.counters["frames"]["total"]
    tiny.planned(model, INPUTS).apply(model)
    model(**INPUTS).backward()
    assert ran_as_planned(model)
    assert_right(model)
    assert torch._dynamo.utils.counters["frames"]["total"] == compiles  # a capture asks for none


def test_the_switch_stays_out_of_a_compiled_model(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model = planner.enable(build(), 1.0, now=True, costs="roofline")
    torch.compile(model, backend=backend)(**INPUTS).backward()
    assert planner.plan_of(model) is None
    assert len(said(caplog)) == 1
    assert_right(model)
    model.zero_grad()
    model(**INPUTS).backward()
    assert planner.plan_of(model) is not None
    assert_right(model)


def test_evaluation_is_nobodys_plan_and_not_warned_of(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model = applied().eval()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(INPUTS["x"]), build().eval()(INPUTS["x"]))
    with torch.no_grad():
        compiled(INPUTS["x"])
    assert said(caplog) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("trace", ["export", "jit"])
def test_tracers_see_the_plain_model(trace: str) -> None:
    model, x = build(), INPUTS["x"]
    tiny.planned(model, (x,)).apply(model)
    tracers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "export": lambda: torch.export.export(model, (x,)).module(),
        "jit": lambda: torch.jit.trace(model, (x,)),
    }
    traced = tracers[trace]()
    assert not ran_as_planned(model)
    torch.testing.assert_close(traced(x), build()(x))


def test_transforms_of_torch_func() -> None:
    model = applied()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (), INPUTS))(parameters)
    model(**INPUTS).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    x = INPUTS["x"]
    tiny.planned(model, (x,)).apply(model)
    many = torch.func.vmap(lambda one: model(one))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1], build()(2 * x))


def test_other_tensors_in_the_place_of_the_parameters_are_planned_for() -> None:
    model, twin = applied(), build()
    given = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, given, (), INPUTS).backward()
    assert ran_as_planned(model) and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p *= 2
    twin(**INPUTS).backward()
    assert all(torch.equal(given[n].grad, p.grad) for n, p in twin.named_parameters())


def test_the_switch_stays_out_of_a_compiled_model_whose_graph_ends_in_the_middle() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.layer(x))
            torch._dynamo.graph_break()
            return self.layer(h).sum()

    model, x = planner.enable(Ends(), 1.0, now=True, costs="roofline"), torch.randn(3, 4)
    want = Ends.forward(model, x)
    assert torch.equal(torch.compile(model, backend="eager")(x), want)
    assert torch.equal(model(x), want) and planner.plan_of(model) is not None
