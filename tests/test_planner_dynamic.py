"""One plan for many shapes: traces and solves are counted, bits and peaks are held to the unplanned step."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner import Plan, PlannerError, StalePlanError, TraceError, _compat
from planner.checks import zoo
from planner.graph.training_graph import training_graph
from planner.measure import step_peak
from planner.options import Search
from planner.solving import budgeted
from planner.solving import fit as search
from planner.solving.priced import prepare
from tests import tiny

Batch = dict[str, Tensor]


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        num_labels=3,
    )
    return hf.BertForSequenceClassification(config)


def bert_batch(rows: int, length: int) -> Batch:
    """Padded: every row but the first ends early."""
    random = torch.Generator().manual_seed(100 * rows + length)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, -(length // 3) :] = 0
    ids = torch.randint(0, 64, (rows, length), generator=random)
    labels = torch.randint(0, 3, (rows,), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gpt2() -> nn.Module:
    return zoo.gpt2(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=24)


def gpt2_batch(rows: int, length: int) -> Batch:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(100 * rows + length))
    return {"input_ids": ids, "labels": ids}


def resnet_batch(rows: int, side: int = 32) -> Batch:
    random = torch.Generator().manual_seed(100 * rows + side)
    pixels = torch.randn(rows, 3, side, side, generator=random)
    return {"pixels": pixels, "labels": torch.randint(0, 5, (rows,), generator=random)}


def internvl() -> nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**small, "num_key_value_heads": 1, "vocab_size": 64}
    return zoo.internvl(image=32, patch=8, vision=small, text=text)


def internvl_batch(tiles: int, length: int) -> Batch:
    return dict(zoo.internvl_batch(tiles, length, 64, image=32, patch=8, seed=tiles))


class Blocks(nn.Module):
    """Residual blocks on (rows, length, width) and a head; long sequences take another path."""

    def __init__(self, width: int = 16, long: int = 10**6) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.long = long

    def forward(self, x: Tensor) -> Tensor:
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + self.drop(outer(torch.tanh(F.gelu(inner(x)))))
            if x.shape[1] > self.long:
                x = x - x.mean(1, keepdim=True)
        return x.square().mean()


def rows_of(rows: int, length: int, width: int = 16) -> Batch:
    return {"x": torch.randn(rows, length, width, generator=torch.Generator().manual_seed(rows + length))}


# -- what every test asks -------------------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the tracer and the solvers were entered, counted from outside."""
    seen: Counter[str] = Counter()
    for module, name in ((_compat, "export_joint"), (search, "solve"), (budgeted, "minimum_peak")):
        original = getattr(module, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            seen[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return seen


def plan_at(model: nn.Module, batch: Batch, share: float, **options: Any) -> Plan:
    """A dynamic plan; ``share`` 0 is the least peak any plan can have, 1 that of the step as it is."""
    step = prepare(model, batch, costs="roofline", **{"dynamic": True, **options})
    low, high = step.floor_bytes, step.baseline.peak_bytes
    assert step.varying is not None
    varying = dataclasses.replace(step.varying, search=Search("greedy", 1.0))
    step = dataclasses.replace(step, varying=varying, least_limit_s=1.0)
    return step.plan_bytes(int(low + share * (high - low)), search=Search("greedy", 1.0))


def hold(plan: Plan, model: nn.Module, batches: Sequence[Batch], budget_bytes: int | None = None) -> None:
    """Each batch: same bits as a twin without the plan, dropout on, and a measured peak within the budget."""
    twin = copy.deepcopy(model)
    plan.apply(model)
    for batch in batches:
        tiny.assert_same_bits(tiny.run(model, batch), tiny.run(twin, batch))
        assert step_peak(model, batch) <= (budget_bytes or plan.budget_bytes)
    plan.restore(model)


def seen(plan: Plan) -> tuple[int, int]:
    """(traces, solves) as the plan itself counts them."""
    assert plan.variants is not None
    return plan.variants.traces, plan.variants.solves


# -- smaller batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "make", "shapes"),
    [
        (bert, bert_batch, [(6, 24), (5, 24), (6, 7), (2, 2)]),
        (gpt2, gpt2_batch, [(4, 24), (3, 9), (2, 2)]),
        (lambda: zoo.ResNet((1, 1), width=8, classes=5), resnet_batch, [(8,), (7,), (2,)]),
        (internvl, internvl_batch, [(3, 28), (2, 9), (3, 16)]),
    ],
    ids=["bert", "gpt2", "resnet", "internvl"],
)
def test_smaller_batches_need_no_trace_and_no_solve(
    build: Callable[[], nn.Module],
    make: Callable[..., Batch],
    shapes: list[tuple[int, ...]],
    counts: Counter[str],
) -> None:
    model = tiny.seeded(build)
    plan = plan_at(model, make(*shapes[0]), 0.5)
    assert plan.overhead > 0
    assert step_peak(model, make(*shapes[0])) > plan.budget_bytes
    assert counts["export_joint"] == 1
    counts.clear()
    hold(plan, model, [make(*shape) for shape in shapes])
    assert not counts
    assert seen(plan) == (1, 1)
    variant = plan.variants.all[0]
    values = variant.sizes.read(list(dict(sorted(make(*shapes[-1]).items())).values()))
    there = training_graph(variant.captured.joint.at(values))  # what the expressions say, evaluated anew
    assert variant.storage_bytes(*values).tolist() == [v.bytes for v in there.values]
    if build is gpt2:  # conditions that divide by a size do not hold for none
        assert variant.sizes.admit(list(gpt2_batch(2, 5).values()))
        assert not variant.sizes.admit([torch.zeros(0, 5, dtype=torch.long)] * 2)


class Calls(_compat.TorchDispatchMode):
    """Counts the forward kernels of ``Blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func.overloadpacket in (
            aten.addmm,
            aten.gelu,
            aten.tanh,
            aten.bernoulli_,
            aten.native_dropout,
        )
        return func(*args, **(kwargs or {}))


def test_a_batch_that_fits_as_it_is_recomputes_nothing() -> None:
    model = tiny.seeded(Blocks)
    batches = rows_of(6, 24), rows_of(2, 12)

    def calls() -> list[int]:
        found = []
        for batch in batches:
            with Calls() as kernels:
                model(**batch).backward()
            found.append(kernels.count)
            model.zero_grad(set_to_none=True)
        return found

    large, small = calls()
    plan = plan_at(model, batches[0], 0.3)
    plan.apply(model)
    calls()  # every shape has been seen now
    planned_large, planned_small = calls()
    assert planned_large > large
    assert planned_small == small
    assert seen(plan) == (1, 1)


def test_sizes_that_happen_to_be_equal_are_not_taken_for_one() -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(16, 16), 0.5)  # rows = length = width
    hold(plan, model, [rows_of(*shape) for shape in ((16, 16), (16, 5), (3, 16), (4, 7))])
    assert seen(plan)[1] == 1


def test_gradients_of_outputs_and_inputs_are_sized_as_the_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = tiny.blocks(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.blocks(x)
            return h.sum(1), h * 2

    model = tiny.seeded(Two)
    batches = [{"x": torch.randn(n, 5, 32).requires_grad_()} for n in (9, 4, 2)]
    plan = prepare(model, batches[0], costs="roofline", dynamic=True).plan_bytes(
        10**9, search=Search("recompute_all")
    )
    twin = copy.deepcopy(model)
    plan.apply(model)
    for batch in batches:
        tiny.assert_same_bits(tiny.run(model, batch), tiny.run(twin, batch))
        for module in (model, twin):  # the loss may leave an output alone
            torch.manual_seed(0)
            module(**batch)[0].sum().backward()
        got, want = ({n: p.grad for n, p in m.named_parameters()} for m in (model, twin))
        tiny.assert_same_bits(got, want)
        for module in (model, twin):
            module.zero_grad(set_to_none=True)
        batch["x"].grad = None
    assert plan.variants is not None
    assert plan.variants.traces == 1


def test_slices_of_larger_tensors_are_batches_too() -> None:
    model = tiny.seeded(Blocks)
    whole = rows_of(9, 14)["x"]
    plan = plan_at(model, {"x": whole[:, :12]}, 0.5)
    wider = torch.cat([whole, whole], 1)
    hold(plan, model, [{"x": whole[:, :12]}, {"x": whole[:5, :7]}, {"x": wider[:4, 3:9]}])
    assert seen(plan) == (1, 1)
    hold(plan, model, [rows_of(4, 6), {"x": whole[:3, 2:]}, {"x": whole[3:]}])  # and whole ones
    assert seen(plan)[0] <= 2


def test_the_loss_may_be_outside() -> None:
    model = tiny.seeded(tiny.Mlp)

    def loss_fn(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long))

    batches = [tiny.batch(rows) for rows in (24, 9)]
    plan = plan_at(model, batches[0], 0.5, loss_fn=loss_fn)
    for batch in batches:
        report = plan.verify(inputs=batch)
        assert report.ok, str(report)
    assert seen(plan) == (1, 1)


# -- sizes of one, branches on sizes --------------------------------------------------------------


def test_a_batch_of_one_is_traced_once(counts: Counter[str]) -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(6, 24), 0.5)
    hold(plan, model, [rows_of(1, 24)])
    assert seen(plan)[0] == 2
    before = seen(plan)
    hold(plan, model, [rows_of(1, 10), rows_of(4, 10), rows_of(1, 17), rows_of(6, 24)])
    assert seen(plan) == before
    assert counts["export_joint"] == 2


def test_a_branch_on_a_size_makes_one_more_trace(counts: Counter[str]) -> None:
    model = tiny.seeded(lambda: Blocks(long=8))
    plan = plan_at(model, rows_of(8, 20), 0.5)
    hold(plan, model, [rows_of(*shape) for shape in ((8, 20), (8, 8), (5, 4), (8, 9), (3, 12))])
    assert counts["export_joint"] == seen(plan)[0] == 2


# -- larger batches -------------------------------------------------------------------------------


def test_a_larger_batch_is_planned_without_a_trace(counts: Counter[str]) -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(3, 12), 0.95)
    larger = [rows_of(6, 20), rows_of(5, 20), rows_of(3, 12)]
    resized = [rows_of(2, 18), rows_of(3, 12)]  # more columns, but no more bytes
    counts.clear()
    hold(plan, model, resized)
    assert not counts
    plan = plan_at(model, rows_of(3, 12), 2.6)
    counts.clear()
    hold(plan, model, larger)
    assert counts["solve"] == 1
    assert counts["export_joint"] == 0
    assert seen(plan) == (1, 2)


def test_a_larger_batch_can_be_refused() -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(3, 12), 0.9, on_larger="raise")
    plan.apply(model)
    with pytest.raises(StalePlanError, match=r"6x20x16.*3x12x16.*on_larger='replan'"):
        model(**rows_of(6, 20))
    plan.restore(model)
    hold(plan, model, [rows_of(3, 12), rows_of(2, 5), rows_of(1, 12)])  # and goes on


def test_what_no_plan_can_serve_says_so() -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(2, 4), 0.9)
    plan.apply(model)
    with pytest.raises(planner.InfeasibleBudgetError, match="least budget"):
        model(**rows_of(24, 24))
    hold(plan, model, [rows_of(2, 4)])


# -- what is asked for ----------------------------------------------------------------------------


def test_dimensions_can_be_named() -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(8, 12), 0.5, dynamic={"x": (0,)})
    hold(plan, model, [rows_of(8, 12), rows_of(3, 12)])
    assert seen(plan) == (1, 1)
    hold(plan, model, [rows_of(8, 6)])  # the length was to be fixed: another trace
    assert seen(plan)[0] == 2
    for dynamic, says in (({"y": (0,)}, "'y'"), ({"x": (3,)}, "dimension 3")):
        with pytest.raises(ValueError, match=says):
            planner.plan(model, 1.0, rows_of(8, 12), dynamic=dynamic)
    with pytest.raises(ValueError, match="on_larger"):
        planner.plan(model, 1.0, rows_of(8, 12), dynamic=True, on_larger="ignore")  # type: ignore[arg-type]


class Sized(Blocks):
    """Returns a size beside its loss, which no graph with symbols can."""

    def forward(self, x: Tensor) -> Any:
        return {"loss": super().forward(x), "rows": x.shape[0]}


def test_what_cannot_be_symbolic_is_planned_by_shape(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.seeded(Sized)
    with caplog.at_level(logging.WARNING, logger="planner"):
        plan = plan_at(model, rows_of(8, 12), 0.5)
        hold(plan, model, [rows_of(8, 12), rows_of(5, 12), rows_of(5, 9), rows_of(5, 12)])
    # the steps are held without zero_grad between, of which the applied plan may tell as well
    others = [r for r in caplog.records if "gradients of Sized are there already" not in r.getMessage()]
    assert [r.levelname for r in others] == ["WARNING"]
    assert "Sized" in caplog.text
    assert seen(plan)[0] == 3
    with pytest.raises(TraceError, match="rows"):
        planner.plan(model, 1.0, rows_of(8, 12), dynamic={"x": (0,)}, capture="one graph")


def test_other_arguments_are_still_refused() -> None:
    model = tiny.seeded(tiny.Mlp)
    batch = tiny.batch(labels=True)
    plan = plan_at(model, batch, 0.5)
    plan.apply(model)
    with pytest.raises(StalePlanError, match="labels"):
        model(**{**batch, "labels": batch["labels"].int()})
    del batch["labels"]
    with pytest.raises(StalePlanError, match="called with"):
        model(**batch)
    model.drop = nn.Identity()
    with pytest.raises(StalePlanError, match="drop"):
        model(**tiny.batch(3, labels=True))


# -- other holders of the plan --------------------------------------------------------------------


def test_another_instance_and_a_rewritten_module_share_the_variants() -> None:
    model = tiny.seeded(Blocks)
    plan = plan_at(model, rows_of(6, 24), 0.5)
    other = copy.deepcopy(model)
    hold(plan, other, [rows_of(1, 9)])
    rewritten, small = plan.rewrite(model), rows_of(3, 9)
    want = tiny.run(copy.deepcopy(model), small)
    got = tiny.run(rewritten, small)
    tiny.assert_same_bits(got, want)
    assert seen(plan)[0] == 2


def test_a_plan_from_a_file_runs_what_is_no_larger(tmp_path: Path) -> None:
    model = tiny.seeded(Blocks)
    made = plan_at(model, rows_of(6, 20), 0.5)
    made.save(tmp_path / "plan.json")
    plan = planner.load(tmp_path / "plan.json")
    assert plan.varying_dims == made.varying_dims == ((0, 1),)
    hold(plan, model, [rows_of(6, 20), rows_of(3, 11)])
    plan.apply(model)
    for shape in ((1, 20), (6, 24)):
        with pytest.raises(StalePlanError, match="file"):
            model(**rows_of(*shape))


def test_a_plan_of_fixed_sizes_has_no_variants() -> None:
    model = tiny.seeded(Blocks)
    plan = tiny.planned(model, rows_of(4, 8))
    assert plan.variants is None
    assert plan.varying_dims is None
    plan.apply(model)
    with pytest.raises(PlannerError, match="dynamic=True"):
        model(**rows_of(3, 8))
