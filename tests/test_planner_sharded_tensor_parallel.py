"""A model under tensor parallelism, planned, beside the same model without a plan, on two gloo ranks."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import planner
from planner import _compat
from planner.costs.op_costs import costs_of
from planner.graph import kernels
from planner.measure.meter import StorageMeter
from tests import tiny
from tests.ranks import Ranks, same

STEPS = 5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(2)
    yield pair
    pair.stop()


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        heads = (f(x).view(rows, tokens, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        out: Tensor = self.o(made.transpose(1, 2).reshape(rows, tokens, -1))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.up, self.down, self.drop = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        out: Tensor = x + self.down(self.drop(nn.functional.gelu(self.up(self.norm2(x)))))
        return out


class Model(nn.Module):
    """A small language model with its loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def _spread(kind: str) -> Model:
    """Sequences, norms, words and products; or that, and "sharded" beside it."""
    model = tiny.seeded(Model)
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    here, whole = (Shard(1),), (Replicate(),)
    block: dict[str, Any] = {f"attention.{n}": ColwiseParallel() for n in "qkv"} | {
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm1": SequenceParallel(), "norm2": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=here, desired_input_layouts=whole),
    }  # fmt: skip
    root: dict[str, Any] = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], root)
    for part in model.blocks:
        parallelize_module(part, mesh["tensor"], block)
    if kind == "sharded":
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh["data"])
    return model


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


class Talk(_compat.TorchDispatchMode):
    """What ranks do together, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(_compat.is_spread, types)):
            return NotImplemented
        if "c10d" in func.namespace and not re.search("wait|wrap", str(func)):
            self.said.append(f"{func} {[tuple(x.shape) for x in args if isinstance(x, Tensor)]}")
        return func(*args, **(kwargs or {}))


def _trained(rank: int, model: Model) -> tuple[list[Tensor], int, list[list[str]]]:
    """Losses, gradients and parameters of all steps, the last one's peak, and what was said in the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    torch.manual_seed(rank)
    seen: list[Tensor] = []
    talk = []
    for step in range(STEPS):
        ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(step))
        meter = StorageMeter("cpu")
        state = (x for of in optimizer.state.values() for x in of.values())
        meter.register(ids, *state, *model.parameters(), *_compat.held_by_shards(model))
        # what is recorded, which no other mode may look on at, is seen between
        look: Any = {0: Talk(), STEPS - 2: Talk(), STEPS - 1: meter}.get(step, contextlib.nullcontext())
        with look:
            loss = model(ids)
            loss.backward()
        if isinstance(look, Talk):
            talk.append(look.said)
        seen += [loss.detach(), *(_local(p.grad) for p in model.parameters() if p.grad is not None)]
        del loss
        optimizer.step()
        optimizer.zero_grad()
    return seen + [_local(p) for p in model.parameters()], meter.peak_bytes, talk


def _compared(rank: int, kind: str, share: float) -> dict[str, Any]:
    want, peak, plain = _trained(rank, _spread(kind))
    options: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3}
    model, budget_gb = _spread(kind), share * peak / 1e9
    if kind == "sharded":
        planner.enable(model, budget_gb, now=True, **options)
    else:  # an embedding by rows, whose gradient is larger than its part, is inside of a region
        ids = torch.zeros(4, 24, dtype=torch.long)
        made = planner.plan(model, budget_gb, (ids,), optimizer=torch.optim.AdamW, **options)
        made.apply()
    got, measured, ours = _trained(rank, model)
    plan = planner.plan_of(model) if kind == "sharded" else made
    assert plan is not None
    return {
        "equal": same(got, want),
        "talks": ours == plain and all(map(len, plain)),
        "measured": measured,
        "predicted": plan.peak_bytes,
        "within": max(measured, plan.peak_bytes) <= plan.budget_bytes,
        "recomputed": {p.op for p in plan.placements if p.decision == "recompute"},
    }


@pytest.mark.parametrize(
    ("kind", "share"), [pytest.param("sequences", 0.8, marks=pytest.mark.nightly), ("sharded", 0.85)]
)
def test_a_spread_model_trains_as_it_does_without_a_plan(ranks: Ranks, kind: str, share: float) -> None:
    for seen in ranks(_compared, kind, share):
        assert seen["equal"] and seen["within"]
        assert seen["talks"]  # what is made again talks to nobody, and nobody talks in another order
        assert seen["measured"] <= seen["predicted"] <= 1.01 * seen["measured"]
        assert seen["recomputed"] and "collective" not in seen["recomputed"]


def _compiled(rank: int) -> dict[str, Any]:
    """Losses of a compiled model of spread tensors, with a budget and without; and what was said."""
    found = []
    said: list[str] = []
    log, handler = logging.getLogger("planner"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        for backend in ("inductor", planner.inductor(1.0, costs="roofline", time_limit_s=0.3)):
            torch._dynamo.reset()
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            model = tiny.seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            compiled = torch.compile(model, backend=backend)
            with torch._inductor.config.patch(compile_threads=1):
                for step in range(3):
                    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
                    compiled(x).square().mean().backward()
            found.append([_local(p.grad) for p in model.parameters() if p.grad is not None])
    finally:
        log.removeHandler(handler)
    return {"equal": same(*found), "gradients": len(found[0]), "said": said}


@pytest.mark.nightly  # two ranks that compile C++
def test_spread_tensors_under_inductor_are_compiled_as_torch_does_and_that_is_said(ranks: Ranks) -> None:
    for seen in ranks(_compiled):
        assert seen["equal"] and seen["gradients"] == 4
        (said,) = seen["said"]
        assert "is compiled as torch compiles it, outside the plan and its budget" in said
        assert "tensor parallelism), and such graphs are planned in eager: planner.enable(model" in said


def test_a_collective_is_not_measured_by_one_rank_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    talk, add = graph.call_function(kernels.collective, ("no_such.default", x, "sum", "0")), None
    add = graph.call_function(torch.ops.aten.add.Tensor, (talk, x))
    with _compat.FakeTensorMode():
        for node in (x, talk, add):
            node.meta["val"] = torch.empty(64)
    costs = costs_of([talk, add], "profile")
    assert costs.estimated == 1 and costs.seconds[talk.name] > 0
