"""At the sizes other tools were measured at, a plan beats the flag and hand-wrapped blocks.

Only bytes and FLOPs are asserted: both are counted, not timed.
"""

from __future__ import annotations

import pytest

from planner.measure import run_step, step_peak
from tests.models import PEERS_EAGER_MB
from tests.peer_steps import Measured, Peer, applied, by_hand, measured_plan, peer

SOLVE_S = 3.0


# One of the four by day; of attention, tests/test_planner_cross_encoder.py says as much.
BY_DAY = ("peers-resnet",)
PARAMS = [pytest.param(n, marks=() if n in BY_DAY else pytest.mark.nightly) for n in sorted(PEERS_EAGER_MB)]


@pytest.fixture(scope="module", params=PARAMS)
def case(request: pytest.FixtureRequest) -> Peer:
    return peer(request.param, least_s=2.0)


@pytest.fixture(scope="module")
def at_hand(case: Peer) -> Measured:
    """The plan at the peak that checkpointing by hand was measured to have."""
    plan = case.plan(case.by_hand.peak_bytes, time_limit_s=SOLVE_S)
    found = measured_plan(case, plan)
    assert found.extra_flops == plan.recompute_flops
    assert found.peak_bytes == plan.peak_bytes - case.resident_bytes
    return found


def test_checkpointing_by_hand_is_what_it_claims_to_be(case: Peer) -> None:
    """Less memory for some recomputation, and the same gradients: otherwise it is no peer."""
    assert case.by_hand.peak_bytes < case.eager_peak_bytes
    assert case.by_hand.extra_flops > 0
    mine = run_step(by_hand(case.case), case.inputs).gradients
    assert all(mine[name].equal(gradient) for name, gradient in case.eager_record.gradients.items())


def test_a_plan_at_the_same_peak_recomputes_less(case: Peer, at_hand: Measured) -> None:
    assert at_hand.peak_bytes <= case.by_hand.peak_bytes
    tenths = 6 if case.name in ("peers-gpt2", "peers-bert") else 10
    assert 10 * at_hand.extra_flops <= tenths * case.by_hand.extra_flops


def test_plans_reach_below_it(case: Peer) -> None:
    """The plan of the least peak, from the search that found that peak."""
    least = case.prepared.minimum_peak_bytes
    with applied(case, case.prepared.least_plan()):
        peak_bytes = step_peak(case.model, case.inputs, include_resident=False)
    assert peak_bytes <= least - case.resident_bytes < case.by_hand.peak_bytes
