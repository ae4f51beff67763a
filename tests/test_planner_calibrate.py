"""Planning until a measured step fits: it plans again, converges, says so, and leaves the model alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planner
from planner import InfeasibleBudgetError, PlannerError
from planner._compat import FakeTensorMode
from planner.devices.state import DeviceSegment, segments_of
from planner.measure import CudaPeak, cuda_step_peak, peaks, step_peak
from planner.options import Search
from planner.runtime.forward import planned_forward_of
from planner.solving import calibrate
from planner.solving.calibrate import Calibration, Round, StepBytes, calibrated, measured_bytes
from planner.solving.priced import PricedStep, prepare
from tests.tiny import Mlp, batch, seeded


class Net(nn.Module):
    """Buffers that move, dropout, and activations that outweigh the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.rest = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)))
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.norm(self.first(x)), 0.2, self.training)
        return F.cross_entropy(self.last(self.rest(x)), labels)


@pytest.fixture(scope="module")
def step() -> PricedStep:
    search = Search(time_limit_s=1.0)
    return prepare(seeded(Net), batch(256, labels=True), costs="roofline", search=search)


@pytest.fixture(scope="module")
def budget(step: PricedStep) -> int:
    low, high = step.minimum_peak_bytes, step.baseline.peak_bytes
    return low + (high - low) * 3 // 4


def fragmented(share: float) -> calibrate.Meter:
    """The meter of storages, with an allocator around it that cannot use ``share`` of what it has."""

    def meter(module: nn.Module, inputs: Any, loss_fn: Any, resident_bytes: int) -> StepBytes:
        allocated = step_peak(module, inputs, loss_fn=loss_fn)
        return StepBytes(allocated, int(allocated * (1 + share)))

    return meter


def everything(model: nn.Module) -> dict[str, Any]:
    """The state a step could have changed, copied."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": {k: id(b) for k, b in model.named_buffers()},
        "gradients": {
            k: (id(p.grad), None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()
        },
        "random": torch.get_rng_state(),
        "attributes": sorted(vars(model)),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (a["buffers"], a["attributes"]) == (b["buffers"], b["attributes"])
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    assert torch.equal(a["random"], b["random"])
    for name, (identity, gradient) in a["gradients"].items():
        assert b["gradients"][name][0] == identity
        assert gradient is None or torch.equal(gradient, b["gradients"][name][1])


# --- By the real meter ------------------------------------------------------------------------


def test_on_the_cpu_the_first_plan_is_measured_to_the_byte_and_the_model_left_alone() -> None:
    model, inputs = seeded(Net), batch(256, labels=True)
    model(**inputs).backward()  # gradients of an earlier batch are there
    before = everything(model)
    least = planner.plan(model, 1.0, inputs, costs="roofline")
    made = planner.plan(model, 0.9 * least.peak_bytes / 1e9, inputs, costs="roofline", calibrate=True)
    assert_same(before, everything(model))
    assert planned_forward_of(model) is None
    assert made.calibration is not None
    [only] = made.calibration.rounds
    assert only.allocated_bytes == only.predicted_bytes == made.peak_bytes <= made.budget_bytes
    assert only.reserved_bytes is None
    assert made.breakdown["margin"] == 0 < made.overhead
    made.apply(model)
    model(**inputs).backward()


def test_a_loss_outside_and_an_optimizer_are_in_what_is_compared() -> None:
    model, inputs = seeded(Mlp), batch(64)
    common: dict[str, Any] = {"loss_fn": lambda out: out.square().mean(), "optimizer": torch.optim.AdamW}
    made = planner.plan(model, 1.0, inputs, costs="roofline", calibrate=True, **common)
    assert made.calibration is not None
    assert made.calibration.last.allocated_bytes == made.timeline.max()


# --- By an allocator that fragments -----------------------------------------------------------


def test_a_step_that_takes_more_is_planned_again_until_it_fits(
    step: PricedStep, budget: int, tmp_path: Path
) -> None:
    plain = step.plan_bytes(budget)
    made = calibrated(step, budget, meter=fragmented(0.15))
    assert made.calibration is not None
    first, *_, last = made.calibration.rounds
    assert len(made.calibration.rounds) >= 2
    assert first.margin_bytes == 0 and first.taken_bytes > budget
    assert first.predicted_bytes == plain.peak_bytes
    assert last.taken_bytes <= budget
    assert last.taken_bytes == last.reserved_bytes > last.allocated_bytes == last.predicted_bytes
    assert 0 < last.margin_bytes == made.breakdown["margin"] == made.timeline_by_kind["margin"].min()
    assert sum(made.breakdown.values()) == made.peak_bytes <= made.budget_bytes == budget
    assert made.peak_bytes - last.margin_bytes < plain.peak_bytes
    assert made.overhead > plain.overhead
    page = made.summary()
    assert "margin, as measured" in page and f"measured in {len(made.calibration.rounds)} rounds" in page
    assert "measured peak" in made._repr_html_()
    made.save(tmp_path / "plan.json")
    again = planner.load(tmp_path / "plan.json")
    assert again.calibration == made.calibration
    assert again.breakdown["margin"] == last.margin_bytes
    assert again.summary() == page


def test_a_plan_that_was_not_measured_says_nothing_of_it(
    step: PricedStep, budget: int, tmp_path: Path
) -> None:
    plain = step.plan_bytes(budget)
    plain.save(tmp_path / "plan.json")
    assert "calibration" not in (tmp_path / "plan.json").read_text()
    assert planner.load(tmp_path / "plan.json").calibration is None
    assert "measured" not in plain.summary()


def test_where_it_does_not_converge_the_error_has_the_numbers(step: PricedStep, budget: int) -> None:
    seen: list[int] = []

    def greedy(module: nn.Module, inputs: Any, loss_fn: Any, resident_bytes: int) -> StepBytes:
        seen.append(resident_bytes)
        return StepBytes(budget + 1, None)

    with pytest.raises(PlannerError, match=r"(?s)after 2 rounds.*round 2: predicted") as error:
        calibrated(step, budget, meter=greedy, rounds=2)
    assert not isinstance(error.value, InfeasibleBudgetError)
    assert seen == [step.resident.total_bytes] * 2


def test_a_margin_that_leaves_too_little_is_an_infeasible_budget(step: PricedStep, budget: int) -> None:
    def huge(*_: Any) -> StepBytes:
        return StepBytes(2 * budget, None)

    with pytest.raises(InfeasibleBudgetError, match=r"(?s)measured to take .*round 1: predicted") as error:
        calibrated(step, budget, meter=huge)
    assert error.value.breakdown["margin"] > 0
    assert error.value.minimum_bytes > error.value.budget_bytes == budget


def test_each_round_sets_more_aside(step: PricedStep, budget: int) -> None:
    taken = iter([budget + 1000, budget + 10, budget])

    def meter(*_: Any) -> StepBytes:
        return StepBytes(next(taken), None)

    made = calibrated(step, budget, meter=meter)
    assert made.calibration is not None
    margins = [r.margin_bytes for r in made.calibration.rounds]
    assert len(margins) == 3 and margins == sorted(set(margins))


# --- Bad ground -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory\nx"), RuntimeError("broken")])
def test_a_step_that_breaks_leaves_the_model_as_it_was(step: PricedStep, error: RuntimeError) -> None:
    model = copy.deepcopy(step.model)
    own = prepare(model, batch(256, labels=True), costs="roofline")
    model(**batch(256, labels=True)).backward()
    before = everything(model)

    def breaks(module: nn.Module, inputs: Any, loss_fn: Any, resident_bytes: int) -> StepBytes:
        module(*inputs.args, **inputs.kwargs).backward()  # moves buffers and the random state
        raise error

    with pytest.raises(RuntimeError) as found:
        calibrated(own, 10**9, meter=breaks)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    assert isinstance(found.value, PlannerError) == out_of_memory
    if out_of_memory:
        assert "memory ran out" in str(found.value) and "predicted to take" in str(found.value)
    assert_same(before, everything(model))
    assert planned_forward_of(model) is None


def test_a_model_without_memory_cannot_be_measured() -> None:
    with FakeTensorMode():
        model, x = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(PlannerError, match="has no memory"):
        planner.plan(model, 1.0, (x,), costs="roofline", calibrate=True)


def test_arguments_and_records_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TypeError, match="calibrate must be True or False"):
        planner.plan(nn.Linear(4, 4), 1.0, (torch.ones(2, 4),), calibrate="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one round"):
        Calibration(())
    with pytest.raises(ValueError, match="allocated_bytes"):
        Round(0, 1, -1)
    with pytest.raises(ValueError, match="predicted_bytes"):
        Round(0, 1.5, 1)  # type: ignore[arg-type]


# --- CUDA's meter, its allocator made up ------------------------------------------------------


def test_on_cuda_what_others_hold_in_the_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(torch.empty(2, device="cuda")))
    monkeypatch.setattr(calibrate, "cuda_step_peak", lambda *a, **k: CudaPeak(1000, 1500, 300))
    assert measured_bytes(module, (), None, 200) == StepBytes(900, 1400)
    assert (
        measured_bytes(module, (), None, 300)
        == measured_bytes(module, (), None, 400)
        == StepBytes(1000, 1500)
    )


def test_what_the_allocator_handed_out_is_read_from_its_own_books(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 90, "requested_bytes.all.peak": 70}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert peaks._slack_bytes(torch.device("cuda")) == 20
    segment = {
        "device": 0,
        "address": 4096,
        "total_size": 2048,
        "segment_type": "small",
        "blocks": [
            {"state": "inactive", "size": 512},
            {"state": "active_allocated", "size": 1024},
            {"state": "active_pending_free", "size": 512},
        ],
    }
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [segment, {**segment, "device": 1}])
    assert segments_of(torch.device("cuda", 0)) == [DeviceSegment(4096, 2048, True, {4096 + 512: 1024})]
    assert segments_of(torch.device("cpu")) == []


def test_the_scratch_of_cublas_is_part_of_a_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's figures when the step begins are taken without it, and the peak with it."""
    log: list[str] = []
    model = nn.Linear(4, 4)
    model.register_forward_pre_hook(lambda *_: log.append("step"))

    def says(name: str, value: int | None = None) -> Any:
        return lambda *_: (log.append(name), value)[1]

    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 10,
        "max_memory_allocated": 80,
        "max_memory_reserved": 90,
    }.items():
        monkeypatch.setattr(torch.cuda, name, says(name, value))
    monkeypatch.setattr(peaks, "clear_cublas_workspaces", says("clear"))
    assert cuda_step_peak(model, (torch.ones(2, 4),), device="cuda") == CudaPeak(80, 90, 10)
    told = [name for name in log if name not in ("synchronize", "empty_cache")]
    assert told == [
        *("step", "clear", "memory_allocated", "step"),  # the second makes the scratch again
        *("reset_peak_memory_stats", "step", "max_memory_allocated", "max_memory_reserved"),
    ]
