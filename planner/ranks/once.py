"""A plan that is made by one process of a job and taken over by those whose step is the same."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from planner import _compat
from planner.errors import PlannerError
from planner.plans.plan_data import PlanData
from planner.plans.reading import FORMAT, from_text
from planner.plans.serialize import to_text
from planner.ranks.job_store import JobStore

__all__ = ["is_shared", "made_once", "text_of"]

log = logging.getLogger(__name__)


P = TypeVar("P", bound=PlanData)


def made_once(key: str, make: Callable[[], P], adopt: Callable[[PlanData], P], *, wait_s: float) -> P:
    """The plan called ``key``, made by the rank that asks first and taken over by the others.  No collective.

    It passes through the job's key-value store (:mod:`planner.ranks.job_store`).

    ``key``       everything the plan depends on: ranks with equal keys can run each other's plan.
    ``make()``    runs where nobody else has made the plan, or who tried failed or took too long.
    ``adopt(received)``  turns another rank's plan into one for this rank's model.
    ``wait_s``    how long to wait for another rank's plan, in seconds.
    """
    texts = _texts_of_this_job()
    if texts is None:
        return make()
    name = texts.name_of(FORMAT, key)
    text: str | None = None
    while text is None:
        if texts.is_first(name):
            return _offered(make, texts, name)
        try:
            text = texts.wait(name, wait_s)
        except (TimeoutError, RuntimeError) as error:  # too late, or the store is not to be had
            log.warning("no plan came from another rank in %.0f s, this one makes its own: %s", wait_s, error)
            return make()
    return adopt(from_text(text, "the plan of another rank")) if text else make()


def _offered(make: Callable[[], P], texts: JobStore, name: str) -> P:
    text: str | None = None
    try:
        plan = make()
        text = text_of(plan)
    finally:  # whatever happened here, nobody waits for it
        texts.offer(name, text or "")
    return plan


def _texts_of_this_job() -> JobStore | None:
    """What this rank remembers of the texts it left; forgotten with the process group."""
    store = _compat.job_store() if is_shared() else None
    if store is None:
        return None
    group = dist.group.WORLD
    if group not in _JOBS:
        _JOBS[group] = JobStore(store, dist.get_world_size())
    return _JOBS[group]


_JOBS: weakref.WeakKeyDictionary[Any, JobStore] = weakref.WeakKeyDictionary()


def text_of(plan: PlanData) -> str | None:
    """``plan`` as in its file; ``None`` if no file can describe its inputs."""
    try:
        return to_text(plan)
    except PlannerError as error:  # inputs that no file can describe
        log.info("the plan cannot be sent, each rank makes its own: %s", error)
        return None


def is_shared(group: Any = None) -> bool:
    """Whether this process is one of several in ``group``, or in the job."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
