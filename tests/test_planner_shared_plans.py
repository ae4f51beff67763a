"""One plan for several ranks: as a collective, and under the switch, where nobody may wait for anybody.

Functions whose first argument is ``rank`` run on two gloo ranks; what they return is asserted here.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import planner
from planner import InfeasibleBudgetError, PlannerError, StalePlanError, _compat
from planner.memory.resident import bucket_bytes
from planner.plan import Plan
from planner.plans.reading import FORMAT, from_text
from planner.plans.serialize import to_text
from planner.ranks import once
from planner.runtime.build import recaptured
from planner.solving import fit as search
from planner.solving import priced
from planner.training.distributed import made_once, shared_plan
from tests import tiny
from tests.ranks import QUICK, Ranks, blocks, data, same, train


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(2)
    yield pair
    pair.stop()


# -- one plan for all -------------------------------------------------------------------------------


def _shared(rank: int, given: bool) -> dict[str, Any]:
    batches = [data(rank, step=step) for step in range(2)]
    want = train(DDP(blocks()), batches)
    wrapped = DDP(blocks())
    with mock.patch.object(search, "solve", side_effect=search.solve) as solver:
        plan = shared_plan(
            wrapped, 1.0, (batches[0],) if given or rank == 0 else None, costs="roofline", solver="sqrt"
        )
    plan.apply()
    equal = same(train(wrapped, batches), want)
    wrapped.zero_grad()
    verified = plan.verify(inputs=(batches[0],)).equal
    return {"equal": equal, "verified": verified, "sequence": plan.sequence, "solves": solver.call_count}


@pytest.mark.parametrize("given", [True, False])
def test_the_first_rank_solves_and_all_run_its_plan(ranks: Ranks, given: bool) -> None:
    first, second = ranks(_shared, given)
    assert first["equal"] and first["verified"] and second["equal"] and second["verified"]
    assert first["sequence"] == second["sequence"] and len(set(first["sequence"])) < len(first["sequence"])
    assert (first["solves"], second["solves"]) == (1, 0)


def _fails(rank: int, case: str) -> tuple[str, str]:
    model, batch = blocks(3 if case == "model" and rank else 4), data(rank)
    if case == "inputs" and rank:
        batch = batch[:5]
    interrupted = case == "interrupt" and rank == 0
    problem = KeyboardInterrupt("at rank 0") if interrupted else None
    with mock.patch.object(priced, "capture", side_effect=problem or priced.capture):
        try:
            shared_plan(model, 1e-6 if case == "budget" else 1.0, (batch,), **QUICK)
        except (PlannerError, KeyboardInterrupt) as error:
            return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_one_rank_is_raised_by_all(ranks: Ranks) -> None:
    first, second = ranks(_fails, "budget")
    assert first == second and first[0] == "InfeasibleBudgetError"
    first, second = ranks(_fails, "inputs")
    assert second[0] == "StalePlanError"
    assert first[0] == "PlannerError" and "rank 1 cannot run the plan that rank 0 made" in first[1]
    first, second = ranks(_fails, "model")
    assert second[0] == "StalePlanError" and "rank 1 cannot" in first[1]
    first, second = ranks(_fails, "interrupt")
    assert first == ("KeyboardInterrupt", "at rank 0")
    assert second[0] == "PlannerError" and "rank 0 stopped while it made the plan" in second[1]
    assert ranks(_fails, "") == [("", "")] * 2  # and the group is as good as before


# -- the switch -------------------------------------------------------------------------------------


def _switched(rank: int, rows: list[list[int]], outside: bool) -> dict[str, Any]:
    batches = [data(rank, rows=n, step=step) for step, n in enumerate(rows[rank])]
    want = train(DDP(blocks(1)), batches)
    model = blocks(1)
    options = {"now": True, "costs": "roofline", "solver": "sqrt", "calls_per_step": 1}
    if outside:
        wrapped = DDP(model)
        planner.enable(wrapped, 1.0, **options)
    else:
        planner.enable(model, 1.0, **options)
        wrapped = DDP(model)
    with mock.patch.object(search, "solve", side_effect=search.solve) as solver:
        got = train(wrapped, batches)
    plan = planner.plan_of(model)
    assert plan is not None
    return {"equal": same(got, want), "solves": solver.call_count, "sequence": plan.sequence}


@pytest.mark.parametrize("outside", [False, True])
def test_under_the_switch_one_rank_solves_for_all(ranks: Ranks, outside: bool) -> None:
    rows = [9 + outside] * 2  # a step that no test before it has planned
    first, second = ranks(_switched, [rows, rows], outside)
    assert first["equal"] and second["equal"]
    assert first["sequence"] == second["sequence"] and first["solves"] + second["solves"] == 1


def test_under_the_switch_other_sizes_on_one_rank_wait_for_nobody(ranks: Ranks) -> None:
    for rows in ([[8, 8, 8], [5, 8, 8]], [[8, 8, 8], [8, 8, 3]], [[8, 6, 2], [8, 8, 8]]):
        first, second = ranks(_switched, rows, False)
        assert first["equal"] and second["equal"], rows


def _interrupted(rank: int) -> tuple[int, str]:
    """The rank that makes the plan first is interrupted; how often this one made it, and its outcome."""
    made = 0

    def make() -> planner.Plan:
        nonlocal made
        made += 1
        if _compat.job_store().add("test/made", 1) == 1:
            raise KeyboardInterrupt
        return planner.plan(blocks(), 1.0, (data(rank),), **QUICK)

    try:
        made_once("the first is interrupted", make, lambda received: received, wait_s=30.0)
    except KeyboardInterrupt:
        return made, "interrupted"
    return made, "planned"


def _waits(rank: int) -> tuple[list[str], bool]:
    """Another rank asked for the plan and never answers; what is said of it, and whether there is a plan."""
    key = "never answered"
    name = f"{FORMAT}/{hashlib.sha256(key.encode()).hexdigest()}"
    assert _compat.job_store().add(f"{name}/asked", 1) >= 1
    said: list[str] = []

    def make() -> planner.Plan:
        return planner.plan(blocks(), 1.0, (data(rank),), **QUICK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(once.log, "warning", lambda text, *values: said.append(text % values))
        plan = made_once(key, make, lambda received: received, wait_s=1.0)
    return said, plan.peak_bytes > 0


def test_a_rank_that_does_not_deliver_its_plan_is_not_waited_for(ranks: Ranks) -> None:
    assert sorted(ranks(_interrupted, timeout_s=30.0)) == [(1, "interrupted"), (1, "planned")]
    for said, planned in ranks(_waits, timeout_s=30.0):
        assert planned and len(said) == 1
        assert said[0].startswith("no plan came from another rank in 1 s, this one makes its own: ")


class _Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Ten texts of two lengths, so that batches have other shapes than the other rank's."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = (16, 11)[index % 3 == 0]
        ids = torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.tensor(index % 3)}


def _padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def _trainer(rank: int, switched: bool, where: str) -> tuple[str, bool, list[Tensor]]:
    """transformers' own Trainer on this rank, which wraps the model itself."""
    import transformers

    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}  # asked for; the group is there already
    with mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}):
        model = tiny.seeded(lambda: tiny.bert(layers=1))
        if switched:
            planner.enable(model, 1.0, **QUICK)
        arguments = transformers.TrainingArguments(
            where,
            use_cpu=True,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            gradient_checkpointing=switched,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=_Texts(), data_collator=_padded
        )
        trainer.train()
    planned = switched and planner.plan_of(model) is not None
    return type(trainer.model_wrapped).__name__, planned, [p.detach() for p in model.parameters()]


def test_the_trainer_of_transformers_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    plain, ours = (ranks(_trainer, switched, str(tmp_path)) for switched in (False, True))
    for (_, _, want), (wrapper, planned, got) in zip(plain, ours, strict=True):
        assert wrapper == "DistributedDataParallel" and planned
        assert same(got, want)
    assert same(ours[0][2], ours[1][2])


# -- one process ------------------------------------------------------------------------------------


def test_without_a_group_a_shared_plan_is_a_plan() -> None:
    model, batch = blocks(), data(0)
    plan = shared_plan(model, 1.0, (batch,), **QUICK)
    assert plan.sequence == planner.plan(model, 1.0, (batch,), **QUICK).sequence
    assert bucket_bytes(model) == 0


def test_a_plan_of_one_device_serves_another() -> None:
    """Ranks have devices of their own.  Here there is only one, so the plan's is renamed."""
    text = to_text(tiny.planned(blocks(), (data(0),)))
    received = Plan.of(from_text(text.replace('"cpu"', '"cuda:3"')))
    assert received.device == "cuda:3" and "'cuda:3'" in str(received.inputs)
    model = blocks()
    twin = copy.deepcopy(model)
    step, _ = recaptured(received, model)
    assert step.fingerprint == received.fingerprint and step.graph.device == torch.device("cpu")
    received.apply(model)
    assert same(train(model, [data(1)]), train(twin, [data(1)]))
    with pytest.raises(StalePlanError, match="another step"):
        recaptured(received, blocks(3))


def test_an_infeasible_budget_travels_whole() -> None:
    with pytest.raises(InfeasibleBudgetError) as raised:
        planner.plan(blocks(1), 1e-6, (data(0),), **QUICK)
    there = pickle.loads(pickle.dumps(raised.value))
    assert str(there) == str(raised.value) and vars(there) == vars(raised.value)
    assert copy.copy(there).minimum_bytes == raised.value.minimum_bytes > 1000
