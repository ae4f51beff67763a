"""The loss in chunks as people call models: with a cache, under enable, in estimates, batches, frontiers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import planner
from planner.graph.chunks.region import NotInRows
from planner.measure.peaks import step_peak
from planner.options import Search
from planner.solving.priced import prepare
from tests.test_planner_chunk_loss import causal, gpt2, llama, t5, tokens
from tests.tiny import seeded

CACHE = "output['past_key_values']"


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_the_usual_call_with_a_cache_is_cut(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, batch = seeded(make), tokens()
    assert model.config.use_cache
    torch.manual_seed(0)
    theirs = model(**batch)
    assert len(theirs.past_key_values)
    plan = planner.plan(model, 1, batch, costs="roofline", chunk_loss=4, solver="keep_all")
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert plan.chunked[0].chunks == 4 and plan.unread == (CACHE,) and not plan.regions
    plan.save(tmp_path / "plan.json")
    assert planner.load(tmp_path / "plan.json").executable(model).program.code == plan.code
    plan.apply()
    torch.manual_seed(0)
    ours = model(**batch)
    assert type(ours) is type(theirs) and torch.equal(ours.logits, theirs.logits)
    with pytest.raises(planner.PlannerError, match=r"past_key_values'\] was not made"):
        ours.past_key_values.get_seq_length()


def test_without_a_wish_a_cache_stays_and_goes_where_nothing_fits_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = seeded(lambda: gpt2(2048)), tokens()
    how = {"costs": "roofline", "time_limit_s": 0.2}
    regions = planner.plan(model, 1, batch, **how)
    assert regions.regions and not regions.unread
    budget_gb = 0.9 * regions.floor_bytes / 1e9
    plan = planner.plan(model, budget_gb, batch, **how)
    assert CACHE in plan.unread and not plan.regions and plan.peak_bytes <= budget_gb * 1e9
    assert "it is planned as one graph without output['past_key_values']" in caplog.text
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes


@pytest.mark.parametrize("way", ["plan", "enable"])
def test_chunks_are_tried_where_a_search_found_nothing(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = seeded(lambda: gpt2(2048)), causal()
    step = prepare(model, batch, costs="roofline", search=Search(time_limit_s=0.3), outputs="unread")
    budget_bytes = step.floor_bytes  # which nothing reaches, and no proof says so
    assert budget_bytes < step.least.budget_bytes
    how = {"costs": "roofline", "outputs": "unread", "time_limit_s": 0.3}
    if way == "plan":
        plan = planner.plan(model, budget_bytes / 1e9, batch, **how)
    else:
        planner.enable(model, budget_bytes / 1e9, **how, optimizer=None, now=True)
        model(**batch).loss.backward()
        found = planner.plan_of(model)
        assert found is not None
        plan = found
        model.zero_grad(set_to_none=True)
        assert step_peak(model, batch) == plan.peak_bytes
    assert plan.chunked and plan.peak_bytes <= budget_bytes
    assert "none was found" in caplog.text
    with caplog.at_level(logging.ERROR), pytest.raises(planner.InfeasibleBudgetError):
        planner.plan(model, budget_bytes / 1e9, batch, **how, chunk_loss=False)


def test_an_estimate_has_the_floor_in_chunks_beside_the_floor_without() -> None:
    model = seeded(lambda: gpt2(2048))
    how = {"costs": "roofline", "outputs": "unread"}
    found = planner.estimate(model, causal(), **how)
    whole = planner.estimate(model, causal(), **how, chunk_loss=False)
    cut = planner.estimate(model, causal(), **how, chunk_loss=True)
    low, least = found.chunked_floor_bytes, found.chunked_least_bytes
    assert low == cut.floor_bytes and least == cut.least_known_bytes and cut.chunks == found.chunks > 1
    assert low < least < found.floor_bytes == whole.floor_bytes and whole.chunked_floor_bytes is None
    at = f"in {found.chunks} chunks of tokens"
    assert at in str(found) and "chunks" not in str(whole)
    for budget_bytes, verdict in ((least, "with a plan"), (low, "perhaps"), (low - 1, "no")):
        fit = found.fits(budget_bytes / 1e9)
        assert fit.verdict == verdict and at in fit.words
        assert fit.lacks_bytes == max(0, low - budget_bytes)
        assert whole.fits(budget_bytes / 1e9).verdict == "no"
    plan = planner.plan(model, least / 1e9, causal(), **how, time_limit_s=0.3)  # as the verdict says
    assert plan.chunked and plan.peak_bytes <= least
    with pytest.raises(NotInRows, match="there is no loss to compute in chunks"):
        planner.estimate(nn.Linear(2, 2), (torch.ones(2, 2),), costs="roofline", chunk_loss=2)
    assert planner.estimate(nn.Linear(2, 2), (torch.ones(2, 2),), costs="roofline").chunks == 0


def test_an_estimate_of_the_usual_call_with_a_cache_knows_chunks() -> None:
    found = planner.estimate(seeded(lambda: gpt2(2048)), tokens(), costs="roofline")
    assert found.regions and found.chunked_floor_bytes is not None
    assert found.chunked_floor_bytes < found.floor_bytes


@pytest.mark.parametrize("chunk_loss", [4, pytest.param("auto", marks=pytest.mark.nightly)])
def test_a_larger_batch_fits_in_chunks(chunk_loss: int | str) -> None:
    model = seeded(lambda: gpt2(2048))

    def make(n: int) -> dict[str, object]:
        return causal(**tokens(rows=n))

    def most(wish: object) -> planner.LargestBatch:
        return planner.largest_batch(
            model, 0.0013, make, costs="roofline", time_limit_s=0.1, high=9, outputs="unread", chunk_loss=wish
        )  # type: ignore[arg-type]

    whole, cut = most(False), most(chunk_loss)
    assert cut.batch > whole.batch and cut.plan.chunked and not whole.plan.chunked
    report = cut.plan.verify(model, make(cut.batch))
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert {o.name: o.batch for o in cut.others} == {o.name: o.batch for o in whole.others}


def test_a_frontier_in_chunks() -> None:
    model = seeded(lambda: gpt2(2048))
    how = {"costs": "roofline", "outputs": "unread", "time_limit_s": 0.2}
    whole = planner.frontier(model, causal(), points=2, **how)
    low_gb = 0.97 * whole.floor_bytes / 1e9
    for chunk_loss in (4, "auto"):
        cut = planner.frontier(model, causal(), [low_gb, 1], **how, chunk_loss=chunk_loss)
        assert cut.points[0].overhead is not None and cut.floor_bytes < whole.floor_bytes
    cut = planner.frontier(model, tokens(), points=2, **how, chunk_loss=True)  # with a cache
    assert cut.floor_bytes < whole.floor_bytes
    with pytest.raises(NotInRows, match="captured piece by piece"):
        planner.frontier(model, causal(), points=1, costs="roofline", chunk_loss=2, capture="regions")
