"""Hypothesis profiles: ``--hypothesis-profile nightly`` looks at five times as many examples.

Measured costs are kept in a folder of the test run, never in the user's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from planner.cost_cache import VARIABLE

settings.register_profile("nightly", max_examples=5 * settings.get_profile("default").max_examples)


@pytest.fixture(scope="session", autouse=True)
def _costs_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("costs")))
        yield
