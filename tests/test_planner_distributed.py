"""Several processes: planned and plain DistributedDataParallel side by side, on two gloo ranks.

Functions whose first argument is ``rank`` run there; what they return is asserted here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode

import planner
from planner import PlannerError
from planner.measure.meter import StorageMeter
from planner.options import Search
from planner.rewrite import emit as rewrite
from planner.runtime.forward import planned_forward_of
from planner.solving.priced import prepare
from planner.training.distributed import shared_plan
from tests import tiny
from tests.ranks import QUICK, Ranks, blocks, data, same, train

SHORT = Search(time_limit_s=0.5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(2)
    yield pair
    pair.stop()


# -- gradients ------------------------------------------------------------------------------------


def _trains(rank: int, options: dict[str, Any]) -> dict[str, bool]:
    batches = [data(rank, step=step) for step in range(3)]
    plain = DDP(blocks(), bucket_cap_mb=0.005, **options)
    want = train(plain, batches)
    model = blocks()
    tiny.planned(model, (batches[0],)).apply()
    got = {"before wrapping": train(DDP(model, bucket_cap_mb=0.005, **options), batches)}
    model = blocks()
    wrapped = DDP(model, bucket_cap_mb=0.005, **options)
    tiny.planned(model, (batches[0],)).apply()
    got["after wrapping"] = train(wrapped, batches)
    wrapped = DDP(blocks(), bucket_cap_mb=0.005, **options)
    plan = planner.plan(wrapped, 1.0, (batches[0],), **QUICK)
    assert plan.apply(wrapped) is wrapped.module and planned_forward_of(wrapped.module) is not None
    got["the wrapper itself"] = train(wrapped, batches)
    plan.restore(wrapped)
    assert planned_forward_of(wrapped.module) is None
    return {order: same(tensors, want) for order, tensors in got.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=str,
)
def test_gradients_and_parameters_are_those_of_plain_ddp(ranks: Ranks, options: dict[str, Any]) -> None:
    for equal in ranks(_trains, options):
        assert equal == dict.fromkeys(("before wrapping", "after wrapping", "the wrapper itself"), True)


# -- when buckets are reduced ---------------------------------------------------------------------


def _fires(rank: int, share: float = 0.4) -> dict[str, tuple[list[float], int]]:
    """For each bucket, how much of the backward's FLOPs had run when its reduction began; and of how many
    segments the backward is."""
    batch = data(rank, 64, 256)
    step = prepare(blocks(8, 256), (batch,), costs="roofline")
    low, high = step.floor_bytes, step.baseline.peak_bytes
    budget = round(low + share * (high - low))
    found = {}
    for how in ("plain", "planned", "one segment"):
        model = blocks(8, 256)
        segments = 1
        if how != "plain":
            with _emitted_in(1 if how == "one segment" else None):
                step.plan_bytes(budget, search=Search("greedy")).apply(model)
            segments = len(planned_forward_of(model).step.program.segments)
        wrapped = DDP(model, bucket_cap_mb=1.5)
        counter = FlopCounterMode(display=False)
        fired: list[int] = []

        def reduce(_, bucket, fired=fired, counter=counter):  # type: ignore[no-untyped-def]  # it refuses strings
            fired.append(counter.get_total_flops())
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda done: done.value()[0] / 2)

        wrapped.register_comm_hook(None, reduce)
        for _ in range(2):  # the wrapper sorts its buckets by the order in which the first step's came
            loss = wrapped(batch).square().mean()
            fired.clear()
            with counter:
                loss.backward()
        found[how] = [flops / counter.get_total_flops() for flops in fired], segments
    return found


def test_buckets_are_reduced_during_the_backward(ranks: Ranks) -> None:
    found, _ = ranks(_fires)
    (plain, _), (ours, segments), (single, one) = found["plain"], found["planned"], found["one segment"]
    assert len(plain) == len(ours) == len(single) >= 6
    assert one == 1 and min(single) == 1.0  # what would be without segments: all at the very end
    assert segments >= 7
    for before, now in zip(plain, ours, strict=True):
        assert now <= before + 2 / segments  # late by the rest of its segment, and what it recomputes
    assert ours[0] < 0.3 and ours[len(ours) // 2] < 0.8


# -- memory ---------------------------------------------------------------------------------------


def _peak(model: nn.Module, work: Callable[[], None]) -> tuple[int, int]:
    """Bytes of the peak while ``work`` runs, and of what was there before."""
    meter = StorageMeter("cpu")
    meter.register(*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None))
    with meter:
        work()
    return meter.peak_bytes, meter.live_bytes


def _step(model: nn.Module, batch: Tensor) -> None:
    (model(batch).square().mean() / 3).backward()


def _budgets(rank: int, view: bool) -> list[tuple[int, int, int]]:
    """Predicted and measured peak of steps inside a DistributedDataParallel, and the budget."""
    batch = data(rank, 256, 64)
    wrapped = DDP(blocks(4, 64), bucket_cap_mb=0.05, gradient_as_bucket_view=view)
    for _ in range(2):  # buckets get their lasting order
        wrapped(batch).square().mean().backward()
    wrapped.zero_grad()
    step = prepare(
        wrapped, (batch,), costs="roofline", loss_fn=lambda out: out.square().mean() / 3, search=SHORT
    )
    low, high = step.floor_bytes, step.baseline.peak_bytes
    out = []
    for share in (0.3, 0.6):
        plan = step.plan_bytes(round(low + share * (high - low)), search=SHORT)
        plan.apply()
        peak, _ = _peak(wrapped, functools.partial(_step, wrapped, batch))
        out.append((plan.peak_bytes, peak, plan.budget_bytes))
        plan.restore()
        wrapped.zero_grad()
    return out


@pytest.mark.parametrize("view", [False, True])
def test_the_budget_holds_with_the_buckets_in_it(ranks: Ranks, view: bool) -> None:
    for predicted, measured, budget in [row for rows in ranks(_budgets, view) for row in rows]:
        assert measured <= predicted <= budget
        assert measured > 0.8 * predicted  # buckets are counted, but not twice


def _emitted_in(segments: int | None) -> contextlib.AbstractContextManager[Any]:
    """Plans applied in here have their backward cut in so many segments; ``None``: as always."""
    return mock.patch("planner.runtime.variants.emit", functools.partial(rewrite.emit, segments=segments))


def _accumulates(rank: int) -> dict[str, Any]:
    """Three micro-batches, two of them under ``no_sync``, twice; and the peak of the second one."""
    out: dict[str, Any] = {}
    tensors: dict[str, list[Tensor]] = {}
    step = prepare(blocks(8, 256), (data(rank, 4, 256),), costs="roofline")
    for how in ("plain", "planned", "one segment"):
        model = blocks(8, 256)
        if how != "plain":
            with _emitted_in(1 if how == "one segment" else None):
                step.plan_bytes(10**9, search=Search("keep_all")).apply(model)
        wrapped = DDP(model, bucket_cap_mb=1.5, gradient_as_bucket_view=True)
        torch.manual_seed(rank)
        seen = []
        for cycle in range(2):
            wrapped.zero_grad()
            for micro in range(3):
                batch = data(rank, 4, 256, 10 * cycle + micro)
                with wrapped.no_sync() if micro < 2 else contextlib.nullcontext():
                    peak, before = _peak(wrapped, functools.partial(_step, wrapped, batch))
                    if (cycle, micro) == (1, 1):
                        out[how] = (peak - before) / sum(p.nbytes for p in model.parameters())
                if micro != 1:  # gradients of this rank alone, and those of all
                    seen += [p.grad.clone() for p in wrapped.parameters()]
        tensors[how] = seen
    out["equal"] = same(tensors["planned"], tensors["plain"])
    return out


def test_accumulation_under_no_sync_holds_no_second_gradient_set(ranks: Ranks) -> None:
    for seen in ranks(_accumulates):
        assert seen["equal"]
        assert seen["one segment"] > 0.95  # of a gradient set: what would be without segments
        assert seen["planned"] < 0.35


# -- batches that differ ----------------------------------------------------------------------------


def _joins(rank: int) -> bool:
    """Rank 0 has three batches, rank 1 has two."""
    batches = [data(rank, step=step) for step in range(3 - rank)]
    results = []
    for planned in (True, False):
        wrapped = DDP(blocks())
        if planned:
            tiny.planned(wrapped, (batches[0],)).apply()
        with Join([wrapped]):
            train(wrapped, batches)
        results.append([p.detach() for p in wrapped.parameters()])
    return same(*results)


def test_ranks_with_different_numbers_of_batches(ranks: Ranks) -> None:
    assert ranks(_joins) == [True, True]


def _last_batch(rank: int) -> bool:
    """The last batch is smaller, on rank 1 only, which plans for it by itself."""
    batches = [data(rank), data(rank, step=1), data(rank, rows=8 - 5 * rank, step=2)]
    want = train(DDP(blocks()), batches)
    wrapped = DDP(blocks())
    full = planner.plan(wrapped, 1.0, (batches[0],), **QUICK)
    torch.manual_seed(3)
    seen = []
    for batch in batches:
        wrapped.zero_grad()
        plan = full if len(batch) == 8 else planner.plan(wrapped, 1.0, (batch,), **QUICK)
        plan.apply()
        wrapped(batch).square().mean().backward()
        seen += [p.grad.clone() for p in wrapped.parameters()]
        with torch.no_grad():
            for p in wrapped.parameters():
                p -= 0.1 * p.grad
    return same([*seen, *(p.detach().clone() for p in wrapped.parameters())], want)


def test_a_smaller_last_batch_on_one_rank(ranks: Ranks) -> None:
    assert ranks(_last_batch) == [True, True]


def _varying(rank: int) -> tuple[bool, str]:
    """One plan for many sizes; rank 1 gets smaller batches, and at last a larger one."""
    batches = [data(rank, rows=n, step=step) for step, n in enumerate([8, 8 - 5 * rank, 6, 8 + 4 * rank])]
    want = train(DDP(blocks()), batches)
    wrapped = DDP(blocks())
    plan = shared_plan(wrapped, 1.0, (batches[0],), dynamic=True, **QUICK)
    plan.apply()
    return same(train(wrapped, batches), want), str(plan.variants)


def test_one_plan_of_many_sizes_for_all_ranks(ranks: Ranks) -> None:
    (first, variants), (second, others) = ranks(_varying)
    assert first and second
    assert "1 traces" in variants and "1 traces" in others


# -- sharded models ---------------------------------------------------------------------------------


def _sharded(rank: int, how: str) -> list[Tensor] | str:
    """``how``: "plain" or "planned", and what: blocks whose batch needs a gradient, or the whole model."""
    model, batch = blocks(), data(rank)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "planned blocks":
        h = batch.requires_grad_()
        plan = tiny.planned(model[0], (h,))  # the blocks are alike: one plan serves them all
        for block in model:
            plan.apply(block)
    elif how == "planned whole":
        tiny.planned(model, (batch,)).apply()
    else:
        batch.requires_grad_(how == "plain blocks")
    if not how.endswith("whole"):
        for block in model:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if how == "plan afterwards":
        for part, name in ((model, "0"), (model[0], "the model")):
            with pytest.raises(PlannerError, match=rf"{name} is sharded \(FSDP2\).*planned in regions"):
                planner.plan(part, 1.0, (batch,), capture="one graph", **QUICK)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [p.full_tensor().detach() for p in model.parameters()]


def test_blocks_planned_before_they_are_sharded_train_as_plain_fsdp2(ranks: Ranks) -> None:
    plain = {what: ranks(_sharded, f"plain {what}") for what in ("blocks", "whole", "otherwise")}
    assert same(ranks(_sharded, "planned blocks")[0], plain["blocks"][0])
    assert same(ranks(_sharded, "planned whole")[1], plain["whole"][1])
    refused = ranks(_sharded, "plan afterwards")
    assert same(refused[0], plain["otherwise"][0])  # and otherwise as it was


def _sharded_below(rank: int) -> str:
    model, batch = blocks(), data(rank)
    tiny.planned(model, (batch,)).apply()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(PlannerError) as raised:
        model(batch)
    return str(raised.value)


def test_a_whole_plan_over_sharded_blocks_is_refused(ranks: Ranks) -> None:
    for message in ranks(_sharded_below):
        assert "0 is sharded (FSDP)" in message and "plan.apply(block), then fully_shard(block)" in message


def test_synchronized_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.SyncBatchNorm(16))
    with pytest.raises(PlannerError, match=r"^1 is a SyncBatchNorm.*talks to the other ranks"):
        planner.plan(model, 1.0, (data(0),), **QUICK)
    planner.plan(nn.Sequential(model[0], model[1].eval()), 1.0, (data(0),), **QUICK)
