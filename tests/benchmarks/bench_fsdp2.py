"""Models under FSDP2: planned on gloo ranks beside the plain ones, and for a cluster from this machine.

    python tests/benchmarks/bench_fsdp2.py ranks [COUNT ...]    # 2 and 4 processes by default
    python tests/benchmarks/bench_fsdp2.py once [COUNT ...]
    python tests/benchmarks/bench_fsdp2.py cluster [NAME ...]

``ranks``: BERT, GPT2 and Llama with untied and tied heads, blocks and root sharded, in each of seven
settings, of which the last spreads BERT's and Llama's products over two ranks and shards over the rest:
losses, gradients and parameters of five steps bit for bit, and of the last one the peak of each rank,
measured and predicted.  ``once``: seconds of search, summed over ranks, where one makes the plan of all and
where each makes its own.  ``cluster``: Llama of 7B and 70B on 8 and 256 H100s, no process group and no
memory: seconds to prepare, and overhead, bound and largest micro-batch of a plan beside every-block
checkpointing and a greedy choice under the same accounting.

Writes ``results/fsdp2.json``; exit code 1 if bits differ, a peak is above what was predicted or more than 1 %
below, or preparing took more than 30 s.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import planner
from planner import InfeasibleBudgetError, _compat
from planner._compat import FakeTensorMode
from planner.costs.cache import VARIABLE
from planner.measure.meter import StorageMeter
from planner.options import Search
from planner.plan import Plan
from planner.ranks import once
from planner.sharded import ShardedStep, Sharding, largest_micro_batch, sharded_step
from planner.solving.in_regions import JoinedStep
from planner.solving.sizes import last_within
from planner.view.text import aligned
from tests.ranks import Ranks, same

RESULTS = Path(__file__).parent / "results" / "fsdp2.json"
MOST_PREPARED_S, MOST_BELOW = 30.0, 0.01

# -- on gloo ranks ---------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
STEPS, ROWS, TOKENS = 5, 4, 32


def _llama(tied: bool) -> nn.Module:
    config = LlamaConfig(**SHAPE, intermediate_size=128, tie_word_embeddings=tied, use_cache=False)
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0))


def _bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=128, max_position_embeddings=64))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BERT": (_bert, "bert.encoder.layer"),
    "GPT2": (_gpt2, "transformer.h"),
    "Llama": (functools.partial(_llama, False), "model.layers"),
    "Llama, tied": (functools.partial(_llama, True), "model.layers"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "enabled before": {"before": True},
    "not resharded": {"sharding": {"reshard_after_forward": False}},
    "bf16": {"sharding": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}},
    "3 micro-batches": {"micro": 3},
    "no sync but the last": {"micro": 3, "last_only": True},
    "tensor parallel": {"tensor": 2},
}
_COLUMNS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj"
_BERT_COLUMNS = "attention.self.query attention.self.key attention.self.value intermediate.dense"
# Of families that are spread: products by columns, and by rows, in each block.
SPREAD: dict[str, tuple[str, str]] = {
    "BERT": (_BERT_COLUMNS, "attention.output.dense output.dense"),
    "Llama": (_COLUMNS, "self_attn.o_proj mlp.down_proj"),
    "Llama, tied": (_COLUMNS, "self_attn.o_proj mlp.down_proj"),
}


def _shard(
    name: str, sharding: dict[str, Any], budget_gb: float | None, before: bool, tensor: int = 1
) -> nn.Module:
    torch.manual_seed(0)
    build, path = FAMILIES[name]
    model = build().train()
    options: dict[str, Any] = {"costs": "roofline", "time_limit_s": 2.0, "now": True}
    if budget_gb is not None and before:
        planner.enable(model, budget_gb, **options)
    shape = dist.get_world_size() // tensor, tensor
    grid = dist.init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    mesh = grid["data"]
    for block in model.get_submodule(path).children():
        if tensor > 1:
            columns, rows = (of.split() for of in SPREAD[name])
            styles: dict[str, Any] = {part: ColwiseParallel() for part in columns}
            parallelize_module(block, grid["tensor"], styles | {part: RowwiseParallel() for part in rows})
        fully_shard(block, mesh=mesh, **sharding)
    fully_shard(model, mesh=mesh, **sharding)
    if budget_gb is not None and not before:
        planner.enable(model, budget_gb, **options)
    return model


def _trained(rank: int, model: Any, micro: int, last_only: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Losses, gradients and parameters of all steps, and the peaks of the last one's micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    seen: list[torch.Tensor] = []
    peaks: list[int] = []
    for step in range(STEPS):
        for k in range(micro):
            seed = torch.Generator().manual_seed(rank + 10 * step + 100 * k)
            ids = torch.randint(0, 300, (ROWS, TOKENS), generator=seed)
            if last_only:
                model.set_requires_gradient_sync(k == micro - 1)
            meter = StorageMeter("cpu")
            state = [x for of in optimizer.state.values() for x in of.values()]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            meter.register(ids, *state, *gradients, *model.parameters(), *model.buffers())
            meter.register(
                *_compat.held_by_shards(model), *_compat.unreduced_gradients(_compat.shard_groups(model))
            )
            if step == STEPS - 1:
                with meter:
                    loss = model(input_ids=ids, labels=ids).loss
                    loss.backward()
                peaks.append(meter.peak_bytes)
            else:
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            seen.append(loss.detach().clone())
            del loss
        seen += [p.grad.to_local().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.to_local().detach().clone() for p in model.parameters()], peaks


def on_rank(rank: int, name: str, setting: str, share: float) -> dict[str, Any]:
    """One model in one setting, plain and planned; runs on each rank."""
    logging.disable(logging.WARNING)
    how = SETTINGS[setting]
    sharding, before = how.get("sharding", {}), how.get("before", False)
    tensor = how.get("tensor", 1)
    rank //= tensor  # those that share products have one batch
    passes = how.get("micro", 1), how.get("last_only", False)
    want, plain = _trained(rank, _shard(name, sharding, None, False, tensor), *passes)
    model = _shard(name, sharding, share * max(plain) / 1e9, before, tensor)
    got, measured = _trained(rank, model, *passes)
    plan = planner.plan_of(model)
    return {
        "equal": same(got, want),
        "plain_bytes": max(plain),
        "measured_bytes": measured[-1],
        "most_bytes": max(measured),
        "predicted_bytes": 0 if plan is None else plan.peak_bytes,
        "budget_bytes": 0 if plan is None else plan.budget_bytes,
        "overhead": None if plan is None else plan.overhead,
    }


def ranks_rows(counts: list[int], share: float = 0.85) -> Iterator[dict[str, Any]]:
    """All models in all settings on so many processes."""
    for count in counts:
        group = Ranks(count)
        for setting in SETTINGS:
            for name in FAMILIES if "tensor" not in SETTINGS[setting] else SPREAD:
                found = group(on_rank, name, setting, share, timeout_s=600.0)
                worst = max(found, key=lambda row: row["most_bytes"])
                row = {"ranks": count, "model": name, "setting": setting, **worst}
                row["equal"] = all(one["equal"] for one in found)
                off = [1 - one["measured_bytes"] / max(1, one["predicted_bytes"]) for one in found]
                row["off"] = [min(off), max(off)]
                row["well"] = row["equal"] and min(off) >= 0 and max(off) <= MOST_BELOW
                yield row
        group.stop()


# -- one plan for all ------------------------------------------------------------------------------------

DEEP = {"n_layer": 12, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}


def planning_on_rank(rank: int, together: bool, share: float, number: int) -> dict[str, Any]:
    """Seconds of CPU that this rank searched for the plan of a GPT2 of 12 blocks, and of the step in which it
    did; with ``together`` one rank makes the plan of all.  ``number`` of the run: budgets differ by it.
    """
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    config = GPT2Config(**DEEP, use_cache=False, bos_token_id=0, eos_token_id=0)
    model: Any = GPT2LMHeadModel(config).train()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    ids = torch.randint(0, 300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(rank))
    with StorageMeter("cpu") as meter:
        meter.register(*model.parameters())
        model(input_ids=ids, labels=ids).loss.backward()
    budget_gb = (share * meter.peak_bytes + number) / 1e9
    planner.enable(model, budget_gb, costs="roofline", time_limit_s=5.0, now=True)
    spent, search = [], JoinedStep.plan_bytes

    def timed(step: JoinedStep, *args: Any, **kwargs: Any) -> Plan:
        began = time.process_time()
        try:
            return search(step, *args, **kwargs)
        finally:
            spent.append(time.process_time() - began)

    alone = (
        contextlib.nullcontext()
        if together
        else mock.patch.object(once, "_texts_of_this_job", return_value=None)
    )
    steps = []
    with alone, mock.patch.object(JoinedStep, "plan_bytes", timed):
        for _ in range(4):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            steps.append(time.perf_counter() - began)
    plan = planner.plan_of(model)
    assert plan is not None
    return {"search_s": sum(spent), "step_s": steps[2], "sequence": plan.sequence}


def once_rows(counts: list[int]) -> Iterator[dict[str, Any]]:
    """One plan for all ranks beside a plan of each rank's own."""
    for count in counts:
        group = Ranks(count)
        for number, together in enumerate((True, False)):
            found = group(planning_on_rank, together, 0.7, number, timeout_s=600.0)
            yield {
                "ranks": count,
                "model": "GPT2, 12 blocks",
                "setting": "made once" if together else "each its own",
                "search_cpu_s": sum(of["search_s"] for of in found),
                "searched": sum(of["search_s"] > 0 for of in found),
                "step_s": max(of["step_s"] for of in found),
                "plans": len({tuple(of["sequence"]) for of in found}),
            }
        group.stop()


# -- for a cluster ---------------------------------------------------------------------------------------

LLAMAS: dict[str, tuple[dict[str, int], int]] = {
    "Llama 7B": (
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        },
        4096,
    ),
    "Llama 70B": (
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        },
        8192,
    ),
}  # fmt: skip
CARD_GB = 72.0  # of an H100's 80: what its context, the communicator and fragments leave
LIMIT_S, MOST_ROWS = 30.0, 1024


def _step_of(name: str, ranks: int, size: int) -> ShardedStep:
    config, tokens = LLAMAS[name]
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=tokens, use_cache=False))
    ids = torch.zeros(size, tokens, dtype=torch.long)
    sharding = Sharding(ranks, "model.layers")
    batch = {"input_ids": ids, "labels": ids}
    return sharded_step(
        model.train(), batch, sharding, optimizer=torch.optim.AdamW, costs="H100", time_limit_s=LIMIT_S
    )


def _plan(step: ShardedStep, budget_bytes: int, solver: str = "auto") -> Plan | None:
    try:
        return step.plan_bytes(budget_bytes, Search(solver, LIMIT_S))
    except InfeasibleBudgetError:
        return None


def _told(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {"peak_bytes": plan.peak_bytes, "overhead": plan.overhead, "bound": plan.overhead_bound}


def cluster_row(name: str, ranks: int) -> dict[str, Any]:
    """One model on one cluster."""
    began = time.perf_counter()
    step = _step_of(name, ranks, 1)
    prepared_s = time.perf_counter() - began
    budget = int(CARD_GB * 1e9)
    others = functools.cache(functools.partial(_step_of, name, ranks))

    def at(size: int) -> ShardedStep:
        return step if size == 1 else others(size)

    def last(bytes_at: Callable[[int], int]) -> int:
        return last_within(bytes_at, budget, 1, MOST_ROWS, {})

    checkpointed = step.checkpointed
    row: dict[str, Any] = {
        "model": name, "ranks": ranks, "tokens": LLAMAS[name][1], "prepared_s": prepared_s,
        "ops": len(step.problem), "resident_bytes": step.problem.resident_bytes,
        "keep_all_bytes": step.baseline_peak_bytes, "floor_bytes": step.floor_bytes,
        "checkpointed": {
            "peak_bytes": step.checkpointed_peak_bytes, "overhead": step.overhead_of(checkpointed),
        },
    }  # fmt: skip
    if step.floor_bytes > budget:
        row["fits"] = False
        return row
    row["at_its_peak"] = _told(_plan(step, step.checkpointed_peak_bytes))
    row["greedy_at_its_peak"] = _told(_plan(step, step.checkpointed_peak_bytes, "greedy"))
    row["largest"] = {
        "keep all": last(lambda n: at(n).baseline_peak_bytes),
        "every block": last(lambda n: at(n).checkpointed_peak_bytes),
        "plan": largest_micro_batch(at, CARD_GB, time_limit_s=LIMIT_S / 3)[0],
        "none above": last(lambda n: at(n).floor_bytes),  # proved
    }
    size = max(1, row["largest"]["every block"])
    full = at(size)
    row["at"] = size
    row["there"] = {
        "every block": full.overhead_of(full.checkpointed),
        "plan": _told(_plan(full, budget)),
        "greedy": _told(_plan(full, budget, "greedy")),
    }
    row["row_s"] = time.perf_counter() - began
    return row


def cluster_rows(some: list[str]) -> Iterator[dict[str, Any]]:
    """Both models on both clusters; ``some``: words of which one is in the name."""
    for name in (n for n in LLAMAS if not some or any(word in n for word in some)):
        for ranks in (8, 256):
            yield cluster_row(name, ranks)


def _percent(of: dict[str, Any] | None, key: str = "overhead") -> str:
    return "none found" if of is None else f"{of[key]:.1%}"


def _shown(rows: list[dict[str, Any]]) -> str:
    head = ["model", "ranks", "prepared", "all kept", "every block", "plan there (bound)", "greedy there"]
    head += ["largest: kept", "every block", "plan", "at it: every block", "plan (bound)", "greedy"]
    lines = [head]
    for row in rows:
        block = row["checkpointed"]
        line = [row["model"], str(row["ranks"]), f"{row['prepared_s']:.1f} s"]
        line += [f"{row['keep_all_bytes'] / 1e9:.1f} GB"]
        line += [f"{block['peak_bytes'] / 1e9:.1f} GB, {block['overhead']:.1%}"]
        if row.get("fits") is False:
            line += [f"no plan: {row['floor_bytes'] / 1e9:.0f} GB are needed"] + [""] * 7
        else:
            there, largest = row["there"], row["largest"]
            line += [f"{_percent(row['at_its_peak'])} ({_percent(row['at_its_peak'], 'bound')})"]
            line += [_percent(row["greedy_at_its_peak"])]
            line += [str(largest[of]) for of in ("keep all", "every block", "plan")]
            line += [f"{there['every block']:.1%} at {row['at']}"]
            line += [f"{_percent(there['plan'])} ({_percent(there['plan'], 'bound')})"]
            line += [_percent(there["greedy"])]
        lines.append(line)
    return "\n".join(aligned(lines, "l" + "r" * (len(head) - 1), ruled=True))


def _keep(part: str, row: dict[str, Any]) -> None:
    """Write a row down, in place of the one of its kind."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kind = [row.get(key) for key in ("ranks", "model", "setting")]
    others = [r for r in known.get(part, ()) if [r.get(key) for key in ("ranks", "model", "setting")] != kind]
    known.update({"torch": str(torch.__version__), "machine": platform.machine(), part: [*others, row]})
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> int:
    """Run what is asked for; the exit code."""
    os.environ[VARIABLE] = "0"  # schedules that an earlier run left are not its own
    what, *more = arguments or ["cluster"]
    well = True
    if what == "once":
        for row in once_rows([int(count) for count in more] or [2, 4]):
            _keep(what, row)
    elif what == "ranks":
        for row in ranks_rows([int(count) for count in more] or [2, 4]):
            well &= row["well"]
            _keep(what, row)
    else:
        for row in cluster_rows(more):
            well &= row["prepared_s"] <= MOST_PREPARED_S
            _keep(what, row)
        print(_shown(json.loads(RESULTS.read_text())["cluster"]))
    return int(not well)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
