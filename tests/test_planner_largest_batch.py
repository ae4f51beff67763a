"""``planner.largest_batch``: the answer fits, one more does not or is said not to have been found."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import planner
from planner.measure import step_peak
from planner.sizing.batches import LargestBatch
from planner.solving.priced import prepare
from planner.solving.sizes import last_within
from tests import tiny
from tests.benchmarks import bench_largest

quickly = functools.partial(planner.largest_batch, costs="roofline", time_limit_s=0.1)


class Net(nn.Module):
    """A chain of three blocks with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.blocks(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().mean()


BUDGET_GB = 0.0001


def rows(n: int) -> tuple[Tensor]:
    return (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)),)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return tiny.seeded(Net)


@pytest.fixture(scope="module")
def found(net: nn.Module) -> LargestBatch:
    return quickly(net, BUDGET_GB, rows)


def measured_peak(net: nn.Module, found: LargestBatch, inputs: Any) -> int:
    found.plan.apply(net)
    try:
        return step_peak(net, inputs)
    finally:
        found.plan.restore(net)


def test_at_the_answer_the_measured_peak_fits_and_one_more_is_refused(
    net: nn.Module, found: LargestBatch
) -> None:
    assert measured_peak(net, found, rows(found.batch)) == found.plan.peak_bytes <= found.budget_bytes
    more = found.batch + 1
    assert found.stop.at == more and found.traces == 1
    if found.stop.by == "floor":
        assert found.stop.is_proved
        with pytest.raises(planner.InfeasibleBudgetError):
            planner.plan(net, BUDGET_GB, rows(more), costs="roofline", time_limit_s=0.1)
    else:
        assert found.stop.by == "search" and "no plan was found" in str(found.stop)


def test_the_frontier_has_the_figures_of_plans_and_of_other_ways(net: nn.Module, found: LargestBatch) -> None:
    assert [p.batch for p in found.points] == sorted(found.plans) and found.batch == max(found.plans)
    for p in found.points:
        assert p.floor_bytes <= p.peak_bytes <= found.budget_bytes and p.overhead_bound <= p.overhead
        assert p.examples_per_s == pytest.approx(p.batch / (p.step_s * (1 + p.overhead)))
    assert max(found.points, key=lambda p: p.examples_per_s).batch == found.fastest
    as_it_is, every_block = found.others
    assert as_it_is.batch <= found.batch and as_it_is.overhead == 0 < every_block.overhead
    for size, fits in ((as_it_is.batch, True), (as_it_is.batch + 1, False)):
        step = prepare(net, rows(size), costs="roofline").all_released
        assert (step.baseline_peak_bytes <= found.budget_bytes) is fits
    text = str(found)
    assert f"largest batch {found.batch}" in text and "largest of every block checkpointed" in text
    assert "taken for granted" in text and "1 trace, with sizes as symbols" in text


def test_the_frontier_is_drawn_and_tabled(found: LargestBatch) -> None:
    matplotlib.use("Agg")
    frame = found.to_dataframe()
    assert list(frame.way[: len(found.points)]) == ["plan"] * len(found.points)
    assert {"batch", "overhead", "examples_per_s", "peak_bytes"} <= {*frame.columns}
    ax = found.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"largest: {found.batch}, by {found.stop.by}" in labels
    assert any("every block checkpointed" in label for label in labels)
    import matplotlib.pyplot as plt

    plt.close(ax.figure)


@pytest.mark.nightly
def test_an_overhead_bounds_it_too(net: nn.Module, found: LargestBatch) -> None:
    as_it_is = found.others[0].batch
    none = quickly(net, BUDGET_GB, rows, at_most_overhead=0.0, low=as_it_is - 2)
    assert (none.batch, none.stop.by, none.stop.at) == (as_it_is, "overhead", as_it_is + 1)
    assert none.plan.overhead == 0 and "more time" in str(none.stop)
    with pytest.raises(planner.PlannerError, match=r"at_most_overhead is 0\.00%"):
        quickly(net, BUDGET_GB, rows, at_most_overhead=0.0, low=as_it_is + 1, high=as_it_is + 1)


def test_no_more_is_looked_for_than_was_asked(net: nn.Module) -> None:
    only = quickly(net, 1, rows, low=3, high=3)
    assert (only.batch, only.fastest, only.stop.by) == (3, 3, "high")
    assert only.plan.peak_bytes == only.plan.baseline_peak_bytes


class Listed(nn.Module):
    """As many images as there are, each by itself, and their number as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, images: list[Tensor], count: int) -> Tensor:
        return sum((self.net(image).sum() for image in images), torch.zeros(())) / count


class Deciding(nn.Module):
    """A value decides, so it is planned in regions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny.blocks(2, 16), tiny.blocks(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.abs().max().item() > 1e4:
            x = x / 2
        return self.second(x).square().mean()


def test_a_batch_of_another_structure_at_each_size_is_captured_at_each() -> None:
    def images(n: int) -> dict[str, Any]:
        return {"images": [torch.randn(1, 1, 5, 5) for _ in range(n)], "count": n}

    found = quickly(Listed().train(), 1, images, high=2)
    assert (found.batch, found.stop.by) == (2, "high") and found.traces == 2
    assert "each size by itself" in str(found)


@pytest.mark.nightly
def test_in_regions_each_size_is_run() -> None:
    net = tiny.seeded(Deciding)
    full_bytes = planner.estimate(net, rows(16), costs="roofline").unplanned_peak_bytes
    found = quickly(net, (full_bytes - 1) / 1e9, rows, low=16, high=16)
    assert "in regions" in found.kind and found.plan.regions and not found.others
    net.zero_grad(set_to_none=True)
    assert measured_peak(net, found, rows(found.batch)) <= found.budget_bytes


def test_a_model_without_memory_has_the_same_answer(found: LargestBatch) -> None:
    with torch.device("meta"):
        net = Net().train()
    again = quickly(net, BUDGET_GB, rows, low=found.others[0].batch, high=found.others[0].batch + 1)
    assert again.traces == 1 and all(p.device.type == "meta" for p in net.parameters())
    real = {p.batch: p for p in found.points}
    for p in again.points:
        if p.batch in real:
            assert p == real[p.batch]


def test_the_loss_is_made_for_each_size() -> None:
    net = tiny.seeded(lambda: tiny.blocks(1, 16))

    def make_loss(n: int) -> Callable[[Tensor], Tensor]:
        target = torch.zeros(n, 16)
        return lambda out: (out - target).square().mean()

    found = quickly(net, 1, rows, make_loss=make_loss, low=4, high=5)
    assert found.batch == 5
    with pytest.raises(planner.TraceError, match="pass make_loss instead"):
        quickly(net, 1, rows, loss_fn=make_loss(3), low=4, high=5)
    with pytest.raises(ValueError, match="not both"):
        quickly(net, 1, rows, loss_fn=make_loss(3), make_loss=make_loss)


@pytest.mark.parametrize(
    ("wrong", "how", "kind", "words"),
    [
        (lambda n: rows(4), {}, ValueError, "tensors of the same shapes"),
        (lambda n: {"input": n}, {}, ValueError, "returned no tensor"),
        (lambda n: None, {}, TypeError, "returned None"),
        (lambda n: {"y": torch.zeros(n, 16)}, {}, TypeError, "do not fit"),
        (3, {}, TypeError, "make_batch must be a function"),
        (rows, {"low": 2.5}, TypeError, "low must be a whole number"),
        (rows, {"low": 0}, ValueError, "low must be 1 or more"),
        (rows, {"low": 4, "high": 3}, ValueError, "high=3 is below low=4"),
        (rows, {"at_most_overhead": -1}, ValueError, "at_most_overhead must be 0 or more"),
        (rows, {"at_most_overhead": True}, TypeError, "at_most_overhead must be a share"),
        (rows, {"budget_gb": -1}, ValueError, "budget_gb must be positive"),
        (rows, {"costs": "abacus"}, ValueError, "costs must be"),
        (rows, {"budget_gb": 1e-6}, planner.InfeasibleBudgetError, "what is there throughout"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_trace(
    net: nn.Module,
    wrong: Any,
    how: dict[str, Any],
    kind: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("planner.solving.request.prepare", lambda *_, **__: pytest.fail("it was traced"))
    with pytest.raises(kind, match=words):
        quickly(net, **{"budget_gb": 1.0, "make_batch": wrong, **how})


def test_outputs_that_have_to_be_let_go_of_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net = tiny.seeded(lambda: tiny.blocks(4, 16))
    held = prepare(net, rows(8), costs="roofline").floor_bytes
    found = quickly(net, (held - 1) / 1e9, rows, low=8, high=8)
    assert found.plan.released == ("output",)
    assert "let go of before the backward: output" in str(found)
    assert "outputs='held'" in caplog.text


def test_where_not_even_the_smallest_fits_the_least_budget_is_told(net: nn.Module) -> None:
    least = prepare(net, rows(8), costs="roofline").floor_bytes
    with pytest.raises(planner.InfeasibleBudgetError, match="not even a batch of 8: ") as refused:
        quickly(net, (least - 1) / 1e9, rows, low=8)
    assert refused.value.floor_bytes >= least


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40),
    st.integers(0, 1200),
    st.integers(1, 5),
    st.integers(0, 39),
)
def test_the_last_size_is_found_with_few_looks(growth: list[int], limit: int, low: int, at: int) -> None:
    value = {low + i: sum(growth[: i + 1]) for i in range(len(growth))}
    high, looks = max(value), []

    def value_of(n: int) -> float:
        looks.append(n)
        return value[n]

    seen = low + min(at, len(growth) - 1)
    expected = max((n for n, v in value.items() if v <= limit), default=low - 1)
    assert last_within(value_of, limit, low, high, {seen: value[seen]}) == expected
    assert len(looks) == len(set(looks)) <= 4 * math.ceil(math.log2(len(value) + 1)) + 4


def test_where_values_fall_once_the_last_size_is_still_found_with_few_looks() -> None:
    looks = []

    def value_of(n: int) -> float:  # as a floor is whose loss goes into chunks where it does not fit whole
        looks.append(n)
        return 2.098 * n if 2.098 * n <= 300 else 2.78 + 0.3446 * n

    assert last_within(value_of, 300, 1, 4000, {}) == 862
    assert len(looks) <= 12


def test_what_was_measured_is_as_promised() -> None:
    rows = [bench_largest.Row(**row) for row in json.loads(bench_largest.RESULTS.read_text())["rows"]]
    assert [row.case for row in rows] == list(bench_largest.CASES) and bench_largest.failures(rows) == []
    for row in rows:
        assert f"| {row.largest} |" in (bench_largest.RESULTS.parent / "README.md").read_text("utf-8")
    worse = dataclasses.replace(rows[0], measured_bytes=1, largest=1)
    assert len(bench_largest.failures([worse])) == 3
