"""How the ranks that train one sharded model fare with their plans.

Such ranks are in step: each gathers what the others have, so whoever does not come is waited for until the
process group's own timeout.  A rank that finds no plan therefore does not raise at once.  It says so in the
job's key-value store, goes on with next to nothing saved, as it ran the step it was to plan by, and all of
them raise at the same call: the next at which all look.  It left its words before it took part in its own
call, and a rank that has waited for its device has seen that call through, so every rank finds them.

They look at each of their first :data:`OFTEN` calls, then at one of :data:`SELDOM`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from planner import _compat
from planner.errors import PlannerError
from planner.graph.step_graph import BETWEEN
from planner.plans.plan_data import PlanData
from planner.plans.reading import FORMAT
from planner.ranks.once import is_shared

__all__ = ["Company"]

log = logging.getLogger(__name__)

OFTEN, SELDOM = 8, 16

_COUNTED: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # companies of a process group so far


def _next_look(call: int) -> int:
    """The first call after ``call`` at which all look."""
    return call + 1 if call < OFTEN else (call // SELDOM + 1) * SELDOM


class Company:
    """This rank among those of its job that train one model; every rank makes one in the same order.

    ``name``   of the model.
    ``ranks``  how many there are, of which this is number ``rank``; ``store`` is the job's.
    """

    def __init__(self, store: Any, rank: int, ranks: int, name: str, device: torch.device) -> None:
        self.store, self.rank, self.ranks, self.name, self.device = store, rank, ranks, name, device
        self.call = 0  # calls that have begun
        self._failed: Exception | None = None
        self._fails_at = 0
        self._heeded: set[str] = set()  # failures that were raised
        self._is_told = True  # what runs
        self._warned: set[tuple[str, ...]] = set()  # of what differs

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> Company | None:
        """That of a model whose parameters are spread over ranks; ``None`` for another."""
        is_spread = any(map(_compat.is_fully_sharded, model.modules())) or _compat.spread_parameters(model)
        store = _compat.job_store() if is_spread and is_shared() else None
        if store is None:
            return None
        group: Any = dist.group.WORLD
        number = _COUNTED[group] = _COUNTED.get(group, 0) + 1
        name = f"{FORMAT}/company/{number}/{type(model).__name__}"
        return cls(store, dist.get_rank(), dist.get_world_size(), name, device)

    # -- failures ----------------------------------------------------------------------------------

    def begins(self) -> None:
        """A call begins.  Raises what this rank failed with, or ``PlannerError`` for another that did."""
        self.call += 1
        if self.call > OFTEN and self.call % SELDOM:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last call is through, here and so everywhere
        if self.store.check([f"{self.name}/failed"]):
            self._raise()
        if not self._is_told and self.rank == 0:
            self._tell()

    def failed(self, error: Exception) -> None:
        """This rank has no plan: all raise at a call to come."""
        if self._failed is not None:
            return
        self._failed, self._fails_at = error, _next_look(self.call)
        log.warning(
            "rank %d has no plan and runs on with next to nothing saved until call %d, at which all %d ranks "
            "of %s stop: %s", self.rank, self._fails_at, self.ranks, self.name.rpartition("/")[2], error,
        )  # fmt: skip
        words = json.dumps([self._fails_at, f"{type(error).__name__}: {error}"])
        self.store.set(f"{self.name}/failed/{self.rank}", words)
        self.store.set(f"{self.name}/failed", "1")

    def _raise(self) -> None:
        found = {}
        for rank in range(self.ranks):
            key = f"{self.name}/failed/{rank}"
            if self.store.check([key]):
                text = self.store.get(key).decode()
                at, words = json.loads(text)
                if at <= self.call and text not in self._heeded:
                    found[rank] = words
                    self._heeded.add(text)
        own, self._failed = (self._failed, None) if self.rank in found else (None, self._failed)
        if own is not None:
            raise own
        if found:
            told = "; ".join(f"rank {rank}: {words}" for rank, words in found.items())
            raise PlannerError(
                f"{len(found)} of {self.ranks} ranks found no plan, and all of them stop here rather than "
                f"wait for one that does not come. {told}"
            )

    # -- plans -------------------------------------------------------------------------------------

    def runs(self, plan: PlanData, made: bool, depends: Mapping[str, str]) -> None:
        """From here on this rank runs ``plan``.

        ``made``     whether it was made here, and not taken over from another rank.
        ``depends``  what it depends on, in words.
        """
        self._is_told = False
        own = [name for name in plan.sequence if name.partition("/")[0] not in BETWEEN]
        schedule = hashlib.sha256(f"{plan.fingerprint} {own}".encode()).hexdigest()
        text = json.dumps({"schedule": schedule, "made": made, "depends": dict(depends)})
        self.store.set(f"{self.name}/runs/{self.rank}", text)

    def _tell(self) -> None:
        """Say once, on the first rank, which ranks run one plan, and if not all do, what differs."""
        keys = [f"{self.name}/runs/{rank}" for rank in range(self.ranks)]
        if not all(self.store.check([key]) for key in keys):
            return
        self._is_told = True
        found = [json.loads(self.store.get(key).decode()) for key in keys]
        plans: dict[str, list[int]] = {}
        for rank, of in enumerate(found):
            plans.setdefault(of["schedule"], []).append(rank)
        model = self.name.rpartition("/")[2]
        if len(plans) == 1:
            makers = [rank for rank, of in enumerate(found) if of["made"]]
            log.info("all %d ranks of %s run one plan; made by %s", self.ranks, model, _ranks(makers))
            return
        differs = sorted({k for of in found for k in of["depends"]})
        differs = [k for k in differs if len({of["depends"].get(k) for of in found}) > 1]
        told = "; ".join(
            f"{_ranks(of)}: " + ", ".join(f"{k} {found[of[0]]['depends'].get(k)}" for k in differs)
            for of in plans.values()
        )
        is_news = bool(differs) and tuple(differs) not in self._warned
        self._warned.add(tuple(differs))
        log.log(
            logging.WARNING if is_news else logging.INFO,
            "the %d ranks of %s run %d plans, each its own within the budget, so that the slowest is waited "
            "for. What differs is %s: %s",
            self.ranks, model, len(plans),
            ", ".join(differs) or "what they hold beside their regions", told,
        )  # fmt: skip


def _ranks(of: Sequence[int]) -> str:
    return f"rank{'s' if len(of) > 1 else ''} {', '.join(map(str, of))}"
