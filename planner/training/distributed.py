"""Several processes: one plan for all ranks, what DistributedDataParallel holds, what sharding changes.

**DistributedDataParallel.**  A planned step is a chain of autograd nodes, one per segment of the backward
(:mod:`planner.rewrite.emit`), so gradients arrive while the backward runs and each bucket is reduced as
soon as its last gradient is there.  Planning before wrapping and after it are the same: what is planned is
the module inside, whose ``forward`` the wrapper calls.  A plan contains no collective: which plan a rank
runs, and whether it plans again for a batch of another size, is its own affair, and the gradients that the
ranks exchange are those of the plain step.  So ranks need not agree on a plan, and nothing waits on anybody.

**One plan.**  Agreeing is still worth it: one rank solves instead of all, and no rank is slower than the
others because its clock found another plan.  There are two ways, and neither leaves a rank waiting for good:
:func:`shared_plan`, a collective, for loops that plan before they train; and :func:`made_once`, for
``planner.enable``, which plans when a batch asks for it, when nobody knows whether the other ranks need that
plan.  There a rank with a batch of another size asks for another plan and meets nobody.

**Buckets.**  DistributedDataParallel holds the gradients once more.  These bytes are counted where a wrapper
around the model exists when the plan is made.

**FSDP2.**  ``fully_shard`` hangs on a module's hooks: they gather the parameters before its forward and its
backward, and scatter the gradients after it.  One graph of the whole model never calls the blocks and so
would never gather.  So a sharded model is planned in regions (:mod:`planner.regions`): Dynamo ends its graphs
at these hooks, and each block's own forward is a region (all blocks of one kind share a capture), as is what
the root does itself, its loss too.

* A region reads gathered parameters as it reads any, and saves no copy of them.  What it recomputes runs
  between the hooks of its own backward, while they are gathered: no collective is begun that plain FSDP2
  would not begin, and in its order.
* The budget is a rank's.  What the hooks hold (gathered parameters of the blocks in flight, buffers of
  collectives, gradients before they are scattered) is measured in the recorded step, where it is held; of
  parameters, gradients and optimizer state a rank's own shards count.
* Settings that change what is held (``set_requires_gradient_sync``, resharding) make steps of another kind,
  with a plan of their own.
* Ranks whose steps are of one kind run one plan; a rank whose collectives happened to let go of a buffer
  later counts what it takes there.
* A rank without a plan would be waited for: it runs on with next to nothing saved until all ranks raise, at
  one call (:mod:`planner.ranks.company`).

A plan for each block, applied before ``fully_shard(block)``, works as well, with a budget for each; and one
for the whole model with ``fully_shard(model)`` on the root alone.  Applied as one graph over sharded blocks
it is refused, as is FSDP of the first version.

**Tensor parallelism.**  Parameters that are spread (``parallelize_module``: column-wise, row-wise,
sequences) are planned in regions too, alone or under FSDP2 beside it.  A region is captured on what the rank
has of them, its collectives with it (:mod:`planner.regions.cut.spread`).  A collective runs once: what it
gives is kept, or what is made of that is made again.  So the ranks of a group talk as they do without a plan,
in the same order, and may run different plans.  An op on a spread tensor that draws random numbers by its
rank (CUDA) is left to eager.

Known limits: in :func:`shared_plan` a rank that is killed between the two messages is noticed by the others
only when the process group's own timeout ends.  ``nn.SyncBatchNorm`` talks to the other ranks inside the
forward and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from planner import _compat
from planner.api import plan
from planner.errors import PlannerError
from planner.memory.resident import budget_bytes_of
from planner.options import Search
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.plans.reading import from_text
from planner.plans.serialize import inputs_of
from planner.ranks.once import is_shared, made_once, text_of
from planner.runtime.build import check_is_of
from planner.solving.chunked import chunked_as
from planner.solving.in_backward import stepping_in_backward
from planner.solving.in_regions import step_in_regions, taken_in
from planner.solving.priced import prepare

__all__ = ["agreed", "made_once", "shared_plan"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXPECTED = (PlannerError, TypeError, ValueError)  # what planning raises on purpose


def shared_plan(
    model: nn.Module, budget_gb: float, inputs: object = None, *, group: Any = None, **options: Any
) -> Plan:
    """:func:`planner.plan` made by the first rank of ``group`` and received by the others.

    A collective: every rank of ``group`` (default: all) calls it, under the same autocast.  The plan's text
    goes round (as in its file), then how each rank fared with it.  It is for the first rank's ``inputs``;
    the others pass inputs of the same sizes, or ``None`` to take its word.
    Wrap the model in DistributedDataParallel before, so that its buckets are counted.

    ``budget_gb`` and ``options`` as for :func:`planner.plan`.  Each rank's plan belongs to its own ``model``.

    Raises, on every rank, what the first rank's ``plan`` raised, or ``PlannerError`` that names the rank
    whose model or inputs do not fit.  Without an initialized process group it is ``planner.plan``.
    """

    if any(map(_compat.is_fully_sharded, model.modules())):
        return _shared_of_sharded(model, budget_gb, inputs, group, options)

    def adopt(received: PlanData) -> Plan:
        device = next((p.device for p in model.parameters()), None)
        given = inputs_of(received, device) if inputs is None else inputs
        step = prepare(model, given, **_of_the_step(options), drops=bool(received.unread))
        step = chunked_as(step.in_order(received.order), received)
        optimizer, gradients = options.get("optimizer"), options.get("gradients", "auto")
        step = stepping_in_backward(step, gradients, optimizer)
        check_is_of(received, step.captured)
        return Plan.of(received, step.as_planned(received))

    return agreed(lambda: plan(model, budget_gb, inputs, **options), adopt, group)


def _shared_of_sharded(
    model: nn.Module, budget_gb: float, inputs: object, group: Any, options: Mapping[str, Any]
) -> Plan:
    """One plan for all ranks of a sharded model, whose step they run together to see it."""
    how = _of_the_step(options)
    unknown = set(how) - {"loss_fn", "optimizer", "costs", "search", "capture"}
    if unknown or how.pop("capture", "auto") == "one graph":
        raise ValueError(f"a sharded model is planned in regions, for which {sorted(unknown)} says nothing")
    budget_bytes = budget_bytes_of(budget_gb)
    # a rank that does not run the step would be waited for, and one that has no step of its own too
    _all_can(lambda: taken_in(model, inputs, how.get("costs", "auto")), group, "run the step")
    step = _all_can(lambda: step_in_regions(model, inputs, **how), group, "plan its step")

    def adopt(received: PlanData) -> Plan:
        plan = step.as_run_here(received, budget_bytes)
        if plan is not None:
            return plan
        mine, other = step.captured.fingerprint[:12], received.fingerprint[:12]
        sizes = ", ".join(str(tuple(x.shape)) for x in step.captured.inputs.tensors())
        why = (
            f"its step is another (graph {mine}, that of rank 0 is {other}; its inputs are {sizes})"
            if mine != other
            else f"it takes more than {budget_gb} GB with what this rank holds beside its regions"
        )
        raise PlannerError(
            f"{why}: give all ranks batches of the same sizes, or use planner.enable, with which ranks of "
            "other sizes have plans of their own"
        )

    return agreed(lambda: step.plan_bytes(budget_bytes, how["search"]), adopt, group)


_OF_THE_PLAN = ("progress", "calibrate", "chunk_loss", "gradients", "order")


def _of_the_step(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``options`` of :func:`planner.plan`, those that a captured step depends on."""
    search = {name: options[name] for name in ("solver", "time_limit_s") if name in options}
    step = {name: v for name, v in options.items() if name not in (*search, *_OF_THE_PLAN)}
    return {**step, "search": Search(**search)}


def _all_can(work: Callable[[], T], group: Any, what: str) -> T:
    """``work()``; where it raises on one rank all of them raise, with its words.  A collective."""
    if not is_shared(group):
        return work()
    problem, done = "stopped before it could", None
    try:
        done, problem = work(), ""
    except _EXPECTED as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:  # whatever happened here, nobody waits for it
        problems = [""] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, other in enumerate(problems):
        if other:
            raise PlannerError(f"rank {rank} cannot {what}: {other}")
    return done


def agreed(make: Callable[[], Plan], adopt: Callable[[PlanData], Plan], group: Any = None) -> Plan:
    """The plan that the first rank of ``group`` makes and every other adopts.  A collective, once.

    ``make()``         runs on the first rank only.
    ``adopt(received)``  turns what was received into a plan for this rank's model.

    An error of one rank is raised by all: the first rank's as it is, another's as a ``PlannerError``.
    """
    if not is_shared(group):
        return make()
    made, text = _from_the_first(make, group)

    def taken_over() -> Plan:
        if made is not None:
            return made
        return make() if text is None else adopt(from_text(text, "the plan of rank 0"))

    return _all_can(taken_over, group, "run the plan that rank 0 made")


def _from_the_first(make: Callable[[], Plan], group: Any) -> tuple[Plan | None, str | None]:
    """The first rank's plan, as it is there and as text elsewhere; no text if none can be written."""
    everyone: Any = dist.group.WORLD if group is None else group
    first = dist.get_global_rank(everyone, 0)
    message: list[Any] = [PlannerError("rank 0 stopped while it made the plan; its own error says why")]
    if dist.get_rank() != first:
        dist.broadcast_object_list(message, src=first, group=group)
        if isinstance(message[0], Exception):
            raise message[0]
        return None, message[0]
    try:
        plan = make()
        message = [text_of(plan)]
    except _EXPECTED as error:
        message = [error]
        raise
    finally:
        dist.broadcast_object_list(message, src=first, group=group)
    return plan, message[0]
