"""Hypothesis profiles: half of its default examples by day, ten times as many with ``nightly``.

Measured costs are kept in a folder of the test run, never in the user's.  Files that take longest come first,
so that two workers end together.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

EXAMPLES = settings.get_profile("default").max_examples
settings.register_profile("nightly", max_examples=10 * EXAMPLES)
settings.register_profile("day", settings.default, max_examples=EXAMPLES // 2)
settings.load_profile("day")  # unless an option names another


@pytest.fixture(scope="session", autouse=True)
def _nothing_kept() -> Iterator[None]:
    """No costs and schedules of the user's, nor of other tests; for this process and those it starts."""
    from planner.costs.cache import VARIABLE  # which takes torch, and the process that hands out tests none

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        yield


@pytest.fixture(scope="module", autouse=True)
def _walked_once() -> None:
    """What the files before this one left alive is not walked again at every collection."""
    gc.collect()
    gc.freeze()


LONGEST = (
    "test_planner_few_plans.py",  # looks through all that is alive at every plan: least at the start
    "test_readme.py",
    "test_planner_distributed.py",
    "test_planner_dynamic.py",
    "test_planner_training.py",
    "test_planner_shared_plans.py",
    "test_planner_cross_encoder.py",
    "test_planner_regions_training.py",
    "test_planner_capture.py",
    "test_notebooks.py",
    "test_planner_errors.py",
    "test_planner_runtime.py",
    "test_solvers_bounds.py",
    "test_planner_ways_of_training.py",
    "test_planner_precision.py",
    "test_planner_huggingface.py",
    "test_planner_internvl2.py",
    "test_solvers_frontier.py",
    "test_planner_enable.py",
    "test_benchmarks.py",
    "test_solvers_staged.py",
    "test_planner_accelerate.py",
    "test_planner_regions_joined.py",
    "test_planner_cli.py",
    "test_planner_compile.py",
    "test_planner_demo.py",
    "test_solvers_anytime.py",
    "test_solvers_local_search.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of ``LONGEST``, then as collected; for workers that are given whole files in this order."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What the imports made stays, so the garbage collector need not walk it: half of what a capture took."""
    gc.collect()
    gc.freeze()
