"""A model under FSDP2, planned whole, beside the same model without a plan, on two gloo ranks.

Functions whose first argument is ``rank`` run there; what they return is asserted here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import planner
from planner import PlannerError, _compat
from planner.distributed import shared_plan
from planner.measure.meter import StorageMeter
from planner.sharded import Sharding, sharded_step
from planner.solving.in_regions import JoinedStep
from tests import tiny
from tests.ranks import Block, Ranks, same

STEPS = 4
QUICK: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3, "now": True}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(2)
    yield pair
    pair.stop()


class Model(nn.Module):
    """A small language model: its loss is inside, its blocks in a loop."""

    def __init__(self, width: int = 32, count: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x: Tensor = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.norm(self.hidden(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _model(**options: Any) -> Model:
    return tiny.seeded(lambda: Model(**options))


def _shard(model: Model, **options: Any) -> Model:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _ids(rank: int, step: int, rows: int = 4) -> Tensor:
    return torch.randint(0, 64, (rows, 24), generator=torch.Generator().manual_seed(10 * step + rank))


class Watched(_compat.TorchDispatchMode):
    """Sees to it that no op reads a tensor whose storage was given back, and what the ranks talk about; and
    how many products of matrices had run when each reduction began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.talk: list[str] = []
        self.products, self.begins = 0, list[int]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(_compat.is_spread, types)):
            return NotImplemented
        tensors = [x for x in _compat.pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            self.talk.append(f"{func} {[x.numel() for x in tensors]}")
            if "reduce_scatter" in str(func):
                self.begins.append(self.products)
        elif not func.is_view:
            assert all(x.untyped_storage().nbytes() for x in tensors if x.numel()), func
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))

    @property
    def shares(self) -> list[float]:
        """Of the step's products, those that had run when each reduction began."""
        return [count / self.products for count in self.begins]


def _trained(
    rank: int, model: Model, *, rows: int = 4, micro: int = 1, last_only: bool = False, steps: int = STEPS
) -> tuple[list[Tensor], list[int], Watched]:
    """Losses, gradients and parameters of all steps; the peaks of the last one's micro-batches; what was
    seen in the one before.
    """
    if micro == 1:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    seen: list[Tensor] = []
    peaks: list[int] = []
    watched = Watched()
    for step in range(steps):
        for k in range(micro):
            ids = _ids(rank, 7 * step + k, rows)
            if last_only:
                model.set_requires_gradient_sync(k == micro - 1)
            meter = StorageMeter("cpu")
            meter.register(ids, *(x for of in optimizer.state.values() for x in of.values()))
            meter.register(*(p.grad for p in model.parameters() if p.grad is not None), *model.parameters())
            meter.register(
                *_compat.held_by_shards(model), *_compat.unreduced_gradients(_compat.shard_groups(model))
            )
            looks: Any = {steps - 2: watched, steps - 1: meter}.get(step, contextlib.nullcontext())
            with looks:
                loss = model(ids)
                loss.backward()
            if looks is meter:
                peaks.append(meter.peak_bytes)
            seen.append(loss.detach())
            del loss
        seen += [_local(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [_local(p) for p in model.parameters()], peaks, watched


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """What the planner logs on this rank."""
    said: list[str] = []
    log, handler = logging.getLogger("planner"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local()
    return found.detach().clone()


def _compared(
    rank: int, share: float, how: dict[str, Any], sharding: dict[str, Any], before: bool = False
) -> dict[str, Any]:
    want, peaks, plain = _trained(rank, _shard(_model(tied=before), **sharding), **how)
    budget_gb, model = share * max(peaks) / 1e9, _model(tied=before)
    if before:
        for k, block in enumerate(model.blocks):  # its author's, inside what is sharded: the plan's instead
            model.blocks[k] = checkpoint_wrapper(block)
        planner.enable(model, budget_gb, **QUICK)
    _shard(model, **sharding)
    if not before:
        planner.enable(model, budget_gb, **QUICK)
    got, measured, watched = _trained(rank, model, **how)
    plan = planner.plan_of(model)
    assert plan is not None
    return {
        "on paper": 1.0 if before or rank else _on_paper_bytes() / plan.baseline_peak_bytes,
        "equal": same(got, want),
        "talks as plain": watched.talk == plain.talk and len(plain.talk) > 0,
        "begins": list(zip(plain.shares, watched.shares, strict=True)),
        "predicted": plan.peak_bytes,
        "measured": measured[-1],
        "most": max(measured),
        "budget": plan.budget_bytes,
        "recomputed": {p.module for p in plan.placements if p.decision == "recompute"},
    }


def _on_paper_bytes() -> int:
    there = Sharding(2, "blocks", param_dtype=None, reduce_dtype=None)
    step = sharded_step(
        _model(tied=False), (_ids(0, 0),), there, optimizer=torch.optim.AdamW, costs="roofline"
    )
    return step.baseline_peak_bytes


@pytest.mark.parametrize(
    ("share", "how", "sharding", "before"),
    [
        (0.75, {}, {}, False),
        (0.7, {"micro": 3, "last_only": True}, {"reshard_after_forward": False}, True),
    ],
    ids=["plain", "no sync, not resharded, before, checkpointed within"],
)
def test_a_planned_model_trains_as_plain_fsdp2_within_its_budget(
    ranks: Ranks, share: float, how: dict[str, Any], sharding: dict[str, Any], before: bool
) -> None:
    found = ranks(_compared, share, how, sharding, before)
    for seen in found:
        assert seen["equal"] and seen["talks as plain"]
        assert any(module.startswith("blocks.") for module in seen["recomputed"])
        assert seen["measured"] <= seen["predicted"] <= 1.01 * seen["measured"]
        assert seen["predicted"] <= seen["budget"] and seen["most"] <= seen["budget"]
        assert 1.0 <= seen["on paper"] < 1.01
        assert len(seen["begins"]) >= 4
        for plain, ours in seen["begins"]:  # what is made again runs when it is needed, not before
            assert ours <= plain + 0.05


def _uneven(rank: int, path: str) -> dict[str, Any]:
    """Batches of other sizes in two dtypes; a checkpoint of the planned model; a plan made before."""
    bf16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    how = {"rows": 4 + 2 * rank, "micro": 2}
    want, peaks, _ = _trained(rank, _shard(_model(tied=False), **bf16), **how)
    model = planner.enable(_shard(_model(tied=False), **bf16), 0.85 * max(peaks) / 1e9, **QUICK)
    with _said() as said:
        got, measured, _ = _trained(rank, model, **how)
    plan = planner.plan_of(model)
    assert plan is not None
    planner.disable(model)
    checkpoint.save(model.state_dict(), checkpoint_id=path)
    loaded = _shard(_model(tied=False), **bf16)
    state = loaded.state_dict()
    checkpoint.load(state, checkpoint_id=path)
    loaded.load_state_dict(state)
    shared = shared_plan(loaded, max(peaks) / 1e9, (_ids(0, 1),), costs="roofline", time_limit_s=0.3)
    shared.apply()
    plain, planned = (_trained(rank, of, micro=2, steps=2)[0] for of in (model, loaded))
    return {
        "equal": same(got, want),
        "within": measured[-1] <= plan.peak_bytes and max(measured) <= plan.budget_bytes,
        "loads": same(planned, plain),
        "said": [text for text in said if "ranks of" in text],
        "sequence": shared.sequence,
    }


def test_ranks_of_other_sizes_checkpoints_and_one_plan_for_all(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(_uneven, str(tmp_path))
    for seen in found:
        assert seen["equal"] and seen["within"] and seen["loads"]
    assert found[0]["sequence"] == found[1]["sequence"]
    assert found[1]["said"] == [] and found[0]["said"]
    for text in found[0]["said"]:
        assert "What differs is budget, elements of the batch, graph: rank 0: budget " in text
        assert "elements of the batch (96,), graph" in text and "elements of the batch (144,), graph" in text


def _alone(rank: int, budgets_gb: list[float]) -> dict[str, Any]:
    """Each rank has a budget; steps until this one raises, and what; how often it searched."""
    seen: list[str] = []
    model = _shard(_model(count=2, tied=False))
    planner.enable(model, budgets_gb[rank], **QUICK)
    search = JoinedStep.plan_bytes
    with mock.patch.object(JoinedStep, "plan_bytes", autospec=True, side_effect=search) as made:
        try:
            for step in range(8):
                model(_ids(rank, step)).backward()
                seen.append("ran")
        except PlannerError as error:
            seen.append(f"{type(error).__name__}: {error}")
    return {"seen": seen, "made": made.call_count}


def test_where_one_rank_has_no_plan_all_raise_at_the_same_call(ranks: Ranks) -> None:
    well, poor = ranks(_alone, [1.0, 1e-5], timeout_s=50.0)  # the group's own timeout is longer
    assert len(well["seen"]) == len(poor["seen"]) == 4
    assert poor["seen"][-1].startswith("InfeasibleBudgetError: no plan for FSDPModel fits 1e-05 GB")
    assert well["seen"][-1].startswith("PlannerError: 1 of 2 ranks found no plan, and all of them stop here")
    assert "rank 1: InfeasibleBudgetError: no plan for FSDPModel fits 1e-05 GB" in well["seen"][-1]
    assert poor["made"] == 1  # and not at every step until then
    first, second = ranks(_alone, [2.0, 2.0])
    assert first["seen"] == second["seen"] == ["ran"] * 8
    assert first["made"] + second["made"] == 1  # one made the plan of both


def _shared_fails(rank: int, inputs: bool) -> str:
    model = _shard(_model(count=2, tied=False))
    given = (_ids(rank, 0, 4 + 2 * rank),) if inputs else (_ids(rank, 0), *[torch.zeros(1)] * rank)
    with pytest.raises((PlannerError, TypeError)) as caught:
        shared_plan(model, 1.0, given, costs="roofline", time_limit_s=0.3)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_plan_for_all_is_refused_on_all_ranks_with_what_differs(ranks: Ranks) -> None:
    first, second = ranks(_shared_fails, True, timeout_s=50.0)
    assert first.startswith(
        "PlannerError: rank 1 cannot run the plan that rank 0 made: PlannerError: its step"
    )
    assert (
        "its inputs are (6, 24)): give all ranks batches of the same sizes" in first and "(6, 24)" in second
    )
    first, second = ranks(_shared_fails, False, timeout_s=50.0)  # one cannot so much as run a step
    assert first.startswith("PlannerError: rank 1 cannot run the step: TypeError") and "TypeError" in second


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


class Plain(nn.Module):
    """Two blocks and a loss, with few kernels to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Part() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def _train_compiled(rank: int, model: Any, steps: int, call: Any = None) -> tuple[list[Tensor], int]:
    """Gradients of all steps; least of what those behind the third took, as gloo lets go of buffers when it
    likes.  ``call``  what runs instead of ``model``.
    """
    optimizer, seen, peaks = torch.optim.SGD(model.parameters(), lr=0.1), [], []
    for step in range(steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(10 * step + rank))
        meter = StorageMeter("cpu")
        meter.register(x, *model.parameters(), *_compat.held_by_shards(model))
        run = functools.partial(_backward, model if call is None else call, x)
        if step < 3:  # planning measures so itself
            run()
        else:
            peaks.append(meter.live_bytes + _compat.allocated_peak(run))
        seen += [_local(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return seen, min(peaks)


def _backward(model: Any, x: Tensor) -> None:
    model(x).backward()


def _compiled(rank: int, order: str) -> dict[str, Any]:
    """Compiled by code of its own, whose root nobody names: blocks before they are sharded, the root too, in
    a wrapper, or a function that calls it.
    """
    model: Any = _shard(tiny.seeded(Plain))  # type: ignore[arg-type]
    want, peak = _train_compiled(rank, model, 9)
    planned: Any = tiny.seeded(Plain)
    backend = planner.inductor(0.8 * peak / 1e9, costs="roofline", time_limit_s=0.3)
    if "blocks" in order:
        for block in planned.blocks:
            block.compile(backend=backend)
    _shard(planned)
    if "root" in order:
        planned.compile(backend=backend)
    trained = torch.compile(planned, backend=backend) if "wrapper" in order else planned
    if order == "function":
        trained = torch.compile(lambda x: planned(x), backend=backend)
    with torch._inductor.config.patch(compile_threads=1), _said() as said:
        got, measured = _train_compiled(rank, planned, 9, trained)
        planned.set_requires_gradient_sync(False)
        trained(torch.randn(64, 32)).backward()
    assert backend.plan is not None
    return {
        "near": all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, want, strict=True)),
        "measured": measured,
        "predicted": backend.plan.peak_bytes,
        "budget": backend.plan.budget_bytes,
        "regions": len(backend.plan.regions),
        "said": said,
    }


@pytest.mark.nightly  # two ranks that compile C++
@pytest.mark.parametrize("order", ["blocks", "blocks and root", "wrapper", "function"])
def test_compiled_and_sharded_blocks_share_one_budget(ranks: Ranks, order: str) -> None:
    found = ranks(_compiled, order)
    for seen in found:
        assert seen["near"] and seen["regions"] == 2
        assert seen["measured"] <= seen["predicted"] <= seen["budget"]
        assert seen["predicted"] <= 1.03 * seen["measured"]
        assert any("runs with other settings of FSDP2 (set_requires_gradient_sync" in t for t in seen["said"])
    assert any("2 ranks of FSDPPlain run " in text for text in found[0]["said"])


def _refused(rank: int) -> list[str]:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    outside, compiled = _model(), _model()
    for k, block in enumerate(outside.blocks):
        outside.blocks[k] = checkpoint_wrapper(fully_shard(block, mesh=mesh))
    for block in compiled.blocks:
        block.compile(backend="eager")
    said = []
    for model in (fully_shard(outside, mesh=mesh), _shard(compiled)):
        planner.enable(model, 1.0, **QUICK)
        with pytest.raises(PlannerError) as raised:
            model(_ids(rank, 0))
        said.append(str(raised.value))
    return said


def test_what_would_talk_again_is_refused_with_the_way_out(ranks: Ranks) -> None:
    for around, compiled in ranks(_refused):
        assert (
            "blocks.0 is compiled by itself and sharded" in compiled and "Leave the compile out" in compiled
        )
        assert "blocks.0 is checkpointed by PyTorch" in around and "fully_shard(checkpoint_wrapper(" in around
