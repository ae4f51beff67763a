"""Outputs that the caller holds to the end of the step, and those it lets go of before the backward."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.__main__ import main
from planner.measure import step_peak
from planner.options import OutputsMode, Search
from planner.plan import Plan
from planner.plans.reading import from_text
from planner.plans.serialize import to_text
from planner.solving.priced import PricedStep, prepare
from tests.benchmarks import bench_outputs
from tests.tiny import assert_same_bits, batch, run, seeded

SOON = Search(time_limit_s=2.0)


class Returned(NamedTuple):
    loss: Tensor
    logits: Tensor
    hidden: Tensor


class Head(nn.Module):
    """A trunk of two layers, a wide head, its own loss: loss, logits (32, 64) and hidden (32, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Returned:
        hidden = F.gelu(self.first(x))
        logits = self.head(torch.tanh(self.second(hidden)).square())
        return Returned(logits.float().log_softmax(-1)[:, 0].mean().neg(), logits, hidden)


class Trunk(nn.Module):
    """The same without a loss: the logits, and a view of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Head()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x).logits
        return {"logits": logits, "first": logits[:1]}


LOGITS_BYTES = 32 * 64 * 4


@pytest.fixture(scope="module")
def steps() -> dict[str, PricedStep]:
    """The step of ``Head`` with its outputs held, and with them released."""
    model, inputs = seeded(Head), batch()
    modes: tuple[OutputsMode, ...] = ("held", "released", "auto")
    return {m: prepare(model, inputs, costs="roofline", search=SOON, outputs=m) for m in modes}


def _at_least(step: PricedStep) -> Plan:
    return step.plan_bytes(step.least.budget_bytes, SOON)


def test_what_the_caller_lets_go_of_is_not_counted_in_the_backward(steps: dict[str, PricedStep]) -> None:
    held, released = _at_least(steps["held"]), _at_least(steps["released"])
    assert held.peak_bytes - released.peak_bytes >= LOGITS_BYTES
    assert released.outputs["output.loss"] == "held"
    assert released.released == ("output.logits", "output.hidden")
    assert set(held.outputs.values()) == {"held"} and held.released == ()
    assert released.floor_bytes < held.floor_bytes
    assert "output.logits, output.hidden" in released.summary()
    assert "outputs let go of" not in held.summary()


@pytest.mark.parametrize("mode", ["held", "released"])
def test_predicted_is_measured_to_the_byte(steps: dict[str, PricedStep], mode: str) -> None:
    step = steps[mode]
    for budget in (step.baseline_peak_bytes, step.least.budget_bytes):
        plan = step.plan_bytes(budget, SOON)
        report = plan.verify()
        assert report.ok and report.peak_bytes == report.predicted_peak_bytes == plan.peak_bytes
        assert report.recompute_flops == plan.recompute_flops
        assert report.held_outputs == tuple(n for n, s in plan.outputs.items() if s == "held")
    assert f"outputs held to the end: {', '.join(report.held_outputs)}\n" in str(report)


def test_each_output_by_itself(steps: dict[str, PricedStep]) -> None:
    some = steps["held"].releasing({1})
    plan = _at_least(some)
    assert plan.released == ("output.logits",)
    report = plan.verify()
    assert report.peak_bytes == plan.peak_bytes and report.held_outputs == ("output.loss", "output.hidden")
    assert some.releasing({0, 2}).graph.released == {2}  # a loss that the backward starts from is held
    assert some.releasing(()).graph is steps["held"].graph


@pytest.mark.parametrize(("released", "kept"), [((), (1, 2)), ((1,), (2,)), ((2,), (0, 1))])
def test_outputs_that_lie_beside_the_next_call(
    steps: dict[str, PricedStep], released: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    """To the byte, beside a forward that the last call's outputs outlive."""
    step = steps["held"].releasing(released, kept)
    for budget in (step.baseline_peak_bytes, step.least.budget_bytes):
        plan = step.plan_bytes(budget, SOON)
        report = plan.verify()
        assert report.ok and report.peak_bytes == plan.peak_bytes
        assert report.kept_outputs == plan.kept == tuple(n for n, s in plan.outputs.items() if s == "kept")
        assert len(plan.kept) == len(set(kept) - {0})  # a loss that the backward starts from
    without = steps["held"].releasing(released)
    assert (step.baseline_peak_bytes > without.baseline_peak_bytes) == (2 in kept)  # saved throughout
    assert Plan.of(from_text(to_text(plan))).verify(seeded(Head), batch()).peak_bytes == plan.peak_bytes


def test_an_output_that_is_let_go_of_may_be_made_again(steps: dict[str, PricedStep]) -> None:
    """``hidden`` is read by the backward: it runs again, where a caller that holds it would pin it."""
    ran = {mode: _at_least(steps[mode]) for mode in ("held", "released")}
    (hidden,) = (op.name for op in steps["held"].graph.ops if op.target == "aten.gelu")
    assert ran["held"].sequence.count(hidden) == 1
    assert ran["released"].sequence.count(hidden) > 1
    model = seeded(Head)
    ran["released"].apply(model)
    assert_same_bits(run(model, batch()), run(seeded(Head), batch()))


def test_outputs_on_one_storage_go_together() -> None:
    held = prepare(seeded(Trunk), batch(), costs="roofline", search=SOON)
    assert held.graph.releasable == {0, 1}
    assert held.releasing({0}) is held and held.releasing({1}) is held
    plan = _at_least(held.all_released)
    assert plan.verify().peak_bytes == plan.peak_bytes < _at_least(held).peak_bytes


def test_what_the_loss_saves_of_an_output_stays() -> None:
    """The square's backward reads the logits: let go of or not, they are there until it ran."""

    def loss_fn(outputs: dict[str, Tensor]) -> Tensor:
        return outputs["logits"].square().mean()

    for mode in ("held", "released"):
        step = prepare(seeded(Trunk), batch(), loss_fn=loss_fn, costs="roofline", search=SOON, outputs=mode)
        plan = _at_least(step)
        report = plan.verify()
        assert report.ok and report.peak_bytes == plan.peak_bytes
        assert report.recompute_flops == plan.recompute_flops


def test_auto_is_released_only_where_held_does_not_fit(
    steps: dict[str, PricedStep],
) -> None:
    held, auto = steps["held"], steps["auto"]
    fits = auto.plan_bytes(held.least.budget_bytes, SOON)
    assert fits.released == ()
    below = auto.plan_bytes(held.least.budget_bytes - 1, SOON)
    assert below.released == ("output.logits", "output.hidden")
    assert auto.minimum_peak_bytes == fits.minimum_peak_bytes == steps["released"].minimum_peak_bytes


def test_the_refusal_of_a_budget_says_what_letting_go_would_do(steps: dict[str, PricedStep]) -> None:
    held, released = steps["held"], steps["released"]
    with pytest.raises(planner.InfeasibleBudgetError, match="pass outputs='released'") as refused:
        held.plan_bytes(held.least.budget_bytes - 1, SOON)
    named = float(str(refused.value).rpartition(" GB: pass")[0].rpartition(" ")[2])
    assert released.plan_bytes(round(named * 1e9), SOON).released
    with pytest.raises(planner.InfeasibleBudgetError, match="with the outputs let go of") as refused:
        steps["auto"].plan_bytes(released.least.budget_bytes - 1, SOON)
    assert "outputs='released'" not in str(refused.value)  # it would not help
    assert refused.value.minimum_bytes == released.minimum_peak_bytes


def test_files(steps: dict[str, PricedStep]) -> None:
    plan = _at_least(steps["released"])
    back = Plan.of(from_text(to_text(plan)))
    assert back.outputs == plan.outputs
    assert back.verify(seeded(Head), batch()).peak_bytes == plan.peak_bytes
    earlier = from_text(to_text(dataclasses.replace(plan, outputs={})))
    assert earlier.released == ()
    with pytest.raises(planner.InvalidPlanFileError, match="'gone'"):
        from_text(to_text(plan).replace('"output.loss": "held"', '"output.loss": "gone"'))


def test_step_peak_holds_what_it_is_told() -> None:
    model, x = seeded(Head), batch()
    peak: dict[Any, int] = {hold: step_peak(model, x, hold_outputs=hold) for hold in (True, False)}
    peak[(1,)] = step_peak(model, x, hold_outputs=(1,))
    assert peak[True] - peak[False] == peak[(1,)] - peak[False] == LOGITS_BYTES
    assert step_peak(seeded(Trunk), x) > step_peak(seeded(Trunk), x, hold_outputs=False)  # without a loss


def test_arguments() -> None:
    for call in (planner.plan, planner.frontier):
        with pytest.raises(ValueError, match="outputs must be 'held', 'released', 'unread' or 'auto', not"):
            call(seeded(Head), 1.0, batch(), outputs="gone")  # type: ignore[operator]


def test_looking(steps: dict[str, PricedStep]) -> None:
    held, released = (steps[m].plan_bytes(10**6, SOON) for m in ("held", "released"))
    said = str(held.diff(released))
    assert "the first counts none as gone when the backward begins, the second output.logits" in said
    assert "the first counts" not in str(held.diff(held))
    logits, hidden = (steps["held"].graph.outputs[i].name for i in (1, 2))
    assert "freed when the caller lets go of it" in str(released.explain(logits))
    assert "the caller holds it to the end of the step" in str(held.explain(hidden))
    assert "outputs_released" not in str(released.explain(hidden))  # the backward reads it, and it is kept
    kinds, at = released.timeline_by_kind["outputs"], released.sequence.index("outputs_released")
    assert kinds[at] == LOGITS_BYTES + 4 and set(kinds[at + 1 :]) == {4}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "build.py"
    file.write_text(
        "from tests.test_planner_outputs_held import Head\nfrom tests.tiny import batch\n"
        "def build():\n    return Head(), batch()\n"
    )
    said = {}
    for outputs in ("held", "released"):
        line = f"plan {file}:build --budget-gb 0.001 --costs roofline --outputs {outputs} --json -q"
        out = tmp_path / f"{outputs}.json"
        assert main([*line.split(), "--out", str(out)]) == 0
        said[outputs] = json.loads(capsys.readouterr().out)
        assert main(["verify", f"{file}:build", "--plan", str(out), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert seen["held_outputs"] == [n for n, s in said[outputs]["outputs"].items() if s == "held"]
        assert seen["peak_bytes"] == said[outputs]["peak_bytes"]
    assert said["released"]["baseline_peak_bytes"] < said["held"]["baseline_peak_bytes"]
    line = f"frontier {file}:build --points 1 --time-limit 1 --costs roofline --json -q --outputs"
    least = {}
    for outputs in ("auto", "held", "released"):
        assert main([*line.split(), outputs]) == 0
        least[outputs] = json.loads(capsys.readouterr().out)["points"][0]["peak_bytes"]
    assert least["released"] < least["held"] == least["auto"]


def test_the_flags_own_peak_as_measured() -> None:
    """What the benchmark's rows claim, of every model it has."""
    rows = [bench_outputs.Row(**row) for row in json.loads(bench_outputs.RESULTS.read_text())["rows"]]
    assert {row.model for row in rows} == set(bench_outputs.CASES) and len(rows) == 5 * len(
        bench_outputs.CASES
    )
    assert bench_outputs.failures(rows) == []
    worse = [dataclasses.replace(row, peak_bytes=1) for row in rows if row.way == "held"]
    assert len(bench_outputs.failures([*rows, *worse])) == sum(r.predicted_bytes is not None for r in worse)


# -- what the loop was seen to do -----------------------------------------------------------------


def _gone(model: nn.Module) -> None:
    model(**batch()).loss.backward()
    model.zero_grad(set_to_none=True)


def _held(model: nn.Module) -> None:
    outputs = model(**batch())
    outputs.loss.backward()
    model.zero_grad(set_to_none=True)


def _peeked(model: nn.Module) -> None:
    outputs = model(**batch())
    loss, rows = outputs.loss, outputs.logits.detach()[:3]
    del outputs
    loss.backward()
    model.zero_grad(set_to_none=True)
    assert rows.shape == (3, 64)


def _numbers(model: nn.Module) -> set[int]:
    """The outputs that the program on ``model`` counts as gone."""
    return set(vars(model)["forward"].step.lifetimes.released)


def test_an_applied_plan_learns_what_the_loop_lets_go_of(
    steps: dict[str, PricedStep], caplog: pytest.LogCaptureFixture
) -> None:
    plan = steps["auto"].plan_bytes(steps["held"].least.budget_bytes, SOON)
    model = plan.apply(seeded(Head))
    counted = []
    for step in (_held, _held, _gone, _gone, _peeked, _peeked, _gone, _held, _gone, _gone, _held, _gone):
        step(model)
        counted.append(_numbers(model))
    # Held until one step lets go; the logits held after that stay held, the hidden states then too.
    assert counted == [set()] * 3 + [{1, 2}] * 2 + [{2}] * 3 + [set()] * 4
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2 and "output.logits (8.192 kB)" in warned[0] and "output.hidden" in warned[1]
    assert "del outputs" in warned[0] and "planned as held" in warned[0]
    assert plan.apply(model) is model and _numbers(model) == set()  # applied still: nothing starts over


def test_what_lies_beside_the_next_call_is_counted(
    steps: dict[str, PricedStep], caplog: pytest.LogCaptureFixture
) -> None:
    """A name that is only assigned again: what fits beside it is not searched for, what does not is said."""
    least = steps["held"].releasing((), (1, 2)).least.budget_bytes
    assert least > steps["held"].least.budget_bytes
    for budget, learns in ((least, True), (least - 1, False)):
        model = steps["auto"].plan_bytes(budget, SOON).apply(seeded(Head))
        caplog.clear()
        for step in range(5):
            outputs = model(**batch())
            outputs.loss.backward()
            model.zero_grad(set_to_none=True)
            lifetimes = vars(model)["forward"].step.lifetimes
            assert lifetimes == (set(), {1, 2} if learns and step > 1 else set())
        del outputs
        assert [m.partition(" ")[0] for m in caplog.messages] == ([] if learns else ["no"])


def test_what_is_learned_trains_bit_for_bit_within_the_budget(steps: dict[str, PricedStep]) -> None:
    budget = steps["held"].least.budget_bytes
    plan = steps["auto"].plan_bytes(budget, SOON)
    model = plan.apply(seeded(Head))
    for _ in range(2):
        _gone(model)
    forward = vars(model)["forward"]
    assert forward.step.lifetimes.released == {1, 2} and not forward.step.is_tight and plan.recompute_flops
    assert step_peak(model, batch(), hold_outputs=False) <= budget
    want = run(seeded(Head), batch(), steps=3)
    assert_same_bits(run(model, batch(), steps=3), want)


def test_a_plan_that_recomputes_nothing_is_not_made_again() -> None:
    model = planner.plan(seeded(Head), 1.0, batch(), costs="roofline").apply()
    standing = vars(model)["forward"].step
    for _ in range(3):
        _gone(model)
    assert vars(model)["forward"].step is standing


@pytest.mark.parametrize("loop", [_held, _peeked])
def test_released_outputs_that_are_held_are_named_once(
    steps: dict[str, PricedStep], loop: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    plan = _at_least(steps["released"])
    for model in (plan.apply(seeded(Head)), plan.rewrite(seeded(Head))):
        caplog.clear()
        _gone(model)
        assert not caplog.records
        for _ in range(3):
            loop(model)
        (warned,) = caplog.messages
        assert "output.logits (8.192 kB)" in warned and "outputs='held'" in warned
        assert ("output.hidden" in warned) == (loop is _held)


def test_where_only_released_fits_a_loop_that_holds_is_told(
    steps: dict[str, PricedStep], caplog: pytest.LogCaptureFixture
) -> None:
    budget_gb = (steps["held"].least.budget_bytes - 1) / 1e9
    plan = planner.plan(seeded(Head), budget_gb, batch(), costs="roofline", time_limit_s=2)
    assert "only where output.logits, output.hidden is let go of" in caplog.messages[-1]
    model = plan.apply()
    caplog.clear()
    for _ in range(3):
        _held(model)
    assert [m.partition(" ")[0] for m in caplog.messages] == ["the", "no"] and _numbers(model) == {1, 2}
    assert "over the budget by what is held" in caplog.messages[1]


def test_the_switch_learns_too(steps: dict[str, PricedStep], caplog: pytest.LogCaptureFixture) -> None:
    budget_gb = steps["held"].least.budget_bytes / 1e9
    for outputs, plans in {"auto": [0, 0, 2, 2, 0, 0], "held": [0] * 6, "released": [2] * 6}.items():
        model = seeded(Head)
        planner.enable(model, budget_gb, costs="roofline", time_limit_s=2, optimizer=None)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"outputs": outputs})  # type: ignore[operator]
        caplog.clear()
        released = []
        for loop in (_held, _gone, _gone, _held, _held, _gone):
            loop(model)
            made = planner.plan_of(model)
            assert made is not None and made.budget_bytes >= made.peak_bytes
            released.append(len(made.released))
        assert len(caplog.messages) == (0 if outputs == "held" else 1)
        assert released == plans
    model = seeded(Head)
    planner.enable(model, budget_gb * 1.2, costs="roofline", time_limit_s=2, optimizer=None, now=True)
    for _ in range(4):
        outputs = model(**batch())
        outputs.loss.backward()
        model.zero_grad(set_to_none=True)
    made = planner.plan_of(model)
    assert made is not None and made.kept == ("output.logits", "output.hidden")
    assert "until the next call has returned" in made.summary() and made.verify(model, batch()).ok
    with pytest.raises(ValueError, match="outputs must be"):
        planner.enable(seeded(Head), 1.0, outputs="none")  # type: ignore[arg-type]
