"""Trainers' own FSDP2 with an enabled model, beside the same without a plan, on two gloo processes.

    python tests/benchmarks/bench_fsdp2_trainers.py accelerate
    python tests/benchmarks/bench_fsdp2_trainers.py lightning

``accelerate``: its plugin of version 2, which shards on GPUs only, so it is told that this is one.
``lightning``: ``ModelParallelStrategy``, where ``configure_model`` shards.  Each enables the model before it
is sharded and after.  A line per rank and order; exit code 1 where losses or gradients of five steps differ,
or no plan was made.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

import planner
from tests.ranks import Ranks, same
from tests.test_planner_fsdp2 import _ids, _local, _model

BUDGET_GB, STEPS = 0.0006, 5
OPTIONS: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.5, "now": True}
ORDERS = ("not at all", "after", "before")


def _accelerated(rank: int, order: str) -> tuple[list[Tensor], bool]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    model: Any = _model(tied=False)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if order == "before":
        planner.enable(model, BUDGET_GB, **OPTIONS)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule) and isinstance(model.blocks[0], FSDPModule)
    if order == "after":
        planner.enable(model, BUDGET_GB, **OPTIONS)
    torch.manual_seed(rank)
    seen: list[Tensor] = []
    for step in range(STEPS):
        loss = model(_ids(rank, step))
        accelerator.backward(loss)
        seen += [loss.detach(), *(_local(p.grad) for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return seen, planner.plan_of(model) is not None


def accelerated(rank: int) -> list[tuple[str, bool, bool]]:
    """Of each order: whether all is equal, and whether there is a plan; runs on each rank."""
    found = {order: _accelerated(rank, order) for order in ORDERS}
    want = found[ORDERS[0]][0]
    return [(order, same(found[order][0], want), found[order][1]) for order in ORDERS[1:]]


def _lit(order: str) -> tuple[int, list[Tensor], bool]:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = _model(tied=False)
            self.seen: list[Tensor] = []

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            if isinstance(self.model, FSDPModule):
                return
            if order == "before":
                planner.enable(self.model, BUDGET_GB, **OPTIONS)
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            if order == "after":
                planner.enable(self.model, BUDGET_GB, **OPTIONS)

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.model(batch[0])
            self.seen.append(loss.detach().clone())
            return loss

        def on_after_backward(self) -> None:
            self.seen += [_local(p.grad) for p in self.parameters()]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    lightning.seed_everything(1)
    module, strategy = Lit(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, enable_model_summary=False, **quiet
    )
    batches = torch.utils.data.TensorDataset(torch.cat([_ids(0, step, 8) for step in range(STEPS)]))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=4))
    return trainer.global_rank, module.seen, planner.plan_of(module.model) is not None


def main(arguments: list[str]) -> int:
    """Run what is asked for; the exit code."""
    rows: list[tuple[int, str, bool, bool]] = []
    if arguments == ["lightning"]:
        _, want, _ = _lit(ORDERS[0])
        for order in ORDERS[1:]:
            rank, seen, planned = _lit(order)
            rows.append((rank, order, same(seen, want), planned))
    else:
        group = Ranks(2)
        for rank, found in enumerate(group(accelerated, timeout_s=300.0)):
            rows += [(rank, *row) for row in found]
        group.stop()
    for rank, order, equal, planned in rows:
        print(f"rank {rank}, enabled {order} it is sharded: equal {equal}, planned {planned}", flush=True)
    return int(not all(equal and planned for _, _, equal, planned in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
