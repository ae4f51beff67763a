"""The optimizer in the backward: recognised, counted to the byte while it steps, with the bits of eager."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, AdamW, Optimizer

import planner
from planner.errors import PlannerError
from planner.graph.consumed import _read_too_late
from planner.measure.meter import StorageMeter
from planner.memory.in_backward import in_backward
from planner.options import Search
from planner.solving.in_backward import stepping_in_backward
from planner.solving.priced import PricedStep, prepare
from tests import tiny
from tests.models import CASES

IDS = torch.arange(24).view(3, 8) % 11
Make = Callable[[list[nn.Parameter]], Optimizer]
MAKES: dict[str, Make] = {
    "sgd": functools.partial(SGD, lr=0.1, momentum=0.9),
    "adamw": functools.partial(AdamW, lr=0.01),
    "adamw, lists": functools.partial(AdamW, lr=0.01, foreach=True),
    "adafactor": functools.partial(Adafactor, lr=0.01),
}


class Net(nn.Module):
    """An embedding that is also the head, a wide layer whose gradient is the largest, convolutions, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.wide = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 400), nn.GELU(), nn.Linear(400, 16))
        self.last = nn.Linear(16, 32)
        self.last.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        x = x + self.norm(self.conv(x.mT)).mT
        x = x + F.dropout(self.wide(x), 0.1)
        out: Tensor = self.last(x)
        return out if labels is None else F.cross_entropy(out.flatten(0, 1), labels.flatten())


def by_hand(model: nn.Module, make: Make) -> object:
    """As torch's tutorial does it."""
    optimizers = {p: make([p]) for p in model.parameters()}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)  # type: ignore[arg-type]
    return optimizers


def state_of(optimizers: object) -> list[Tensor]:
    """What the optimizers keep."""
    own = optimizers.optimizers if isinstance(optimizers, planner.OptimizerInBackward) else optimizers
    return [t for o in own.values() for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]


def train(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    loss: Tensor = model(IDS, IDS)
    loss.backward()
    return loss.detach()


def live_peak_bytes(model: nn.Module, state: list[Tensor]) -> int:
    """Of one more step, with what is there before it."""
    torch.manual_seed(9)
    meter = StorageMeter("cpu")
    meter.register(*model.parameters(), *model.buffers(), IDS, *state)
    with meter:
        loss = model(IDS, IDS)
        loss.backward()
    return meter.peak_bytes


def step_of(model: nn.Module) -> PricedStep:
    step = prepare(model, (IDS, IDS), costs="roofline", search=Search(time_limit_s=0.3))
    return stepping_in_backward(step, "auto", None)


@pytest.mark.parametrize("way", [planner.optimizer_in_backward, by_hand], ids=["planner's", "by hand"])
@pytest.mark.parametrize("kind", MAKES)
def test_bits_and_bytes_are_those_of_eager(kind: str, way: Callable[..., object]) -> None:
    model = tiny.seeded(Net)
    twin = copy.deepcopy(model)
    held, theirs = way(model, MAKES[kind]), by_hand(twin, MAKES[kind])
    step = step_of(model)
    for solver in ("keep_all", "recompute_all"):
        plan = step.plan_bytes(2 * step.baseline_peak_bytes, Search(solver))
        assert (plan.overhead > 0) == (solver == "recompute_all")
        assert (plan.timeline_by_kind["workspace"].max() > 0) == (kind != "sgd")  # scratch of the steps
        plan.apply(model)
        for k in range(3):
            assert torch.equal(train(model, k), train(twin, k))
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(a, b) and a.grad is None for a, b in pairs)
        both = zip(state_of(held), state_of(theirs), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
        assert live_peak_bytes(model, state_of(held)) == plan.peak_bytes
        live_peak_bytes(twin, state_of(theirs))
        plan.restore(model)


def tower() -> nn.Module:
    """Many layers, of which each is a small part."""
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(24)]
    return nn.Sequential(nn.Embedding(11, 16), *layers)


def test_a_hook_runs_behind_all_that_reads_its_parameter() -> None:
    """Of products of a packed weight torch computes the gradient of the weight first."""
    case = CASES["transformer"]
    model, batch = case.build(), case.make_inputs(0)
    planner.optimizer_in_backward(model, MAKES["adamw"])
    step = prepare(model, batch, loss_fn=case.loss_fn, costs="roofline")
    graph = stepping_in_backward(step, "auto", None).graph
    reads: dict[str, int] = {}
    for node, (_, name) in graph.sources.items():
        if node in graph.value_of:
            v = graph.value_of[node]
            reads[str(name)] = max((i for i, op in enumerate(graph.ops) if v in op.inputs), default=-1)
    place = {op.name: i for i, op in enumerate(graph.ops)}
    steps = {name: place[f"optimizer_step/{name}"] for name, _ in model.named_parameters()}
    assert all(reads[name] < at for name, at in steps.items())
    made = [graph.values[graph.value_of[graph.gradients[n]]].producer for n in steps]
    assert any(m < reads[n] for m, n in zip(made, steps, strict=True))  # or this shows nothing


def test_nothing_that_reads_a_parameter_runs_again_behind_its_step() -> None:
    graph = step_of(tiny.seeded(Net)).graph
    turn = {str(name): graph.turn for name in graph.gradients}  # as if all stepped before the backward
    late = {graph.ops[i].name for i in _read_too_late(graph, turn)}
    weights = {graph.value_of[n] for n, (kind, _) in graph.sources.items() if kind == "parameter"}
    reads = {op.name for op in graph.ops if op.phase == "forward" and weights & {*op.inputs}}
    assert late and late <= reads and "gelu" not in late
    assert not _read_too_late(graph, dict.fromkeys(turn, len(graph.ops)))


def test_gradients_never_exist_together() -> None:
    held = prepare(tiny.seeded(tower), (IDS,), loss_fn=torch.sum, costs="roofline", optimizer=AdamW)
    model = tiny.seeded(tower)
    optimizers = planner.optimizer_in_backward(model, AdamW)
    step = prepare(model, (IDS,), loss_fn=torch.sum, costs="roofline")
    step = stepping_in_backward(step, "auto", None)
    total = sum(p.nbytes for p in model.parameters())
    assert step.memory.resident.optimizer_state_bytes == held.memory.resident.optimizer_state_bytes
    assert step.memory.gradient_bytes == 0 and held.memory.gradient_bytes == total
    assert step.floor_bytes + total // 2 < held.floor_bytes
    assert {f"optimizer_step/{name}" for name in optimizers.optimizers} <= {op.name for op in step.graph.ops}
    assert in_backward(model).scratch_bytes.keys() == dict(model.named_parameters()).keys()


def test_a_plan_from_a_file_and_its_report_count_the_steps(tmp_path: Path) -> None:
    model = tiny.seeded(Net)
    planner.optimizer_in_backward(model, MAKES["adamw"])
    before = [p.detach().clone() for p in model.parameters()]
    plan = planner.plan(model, 1, (IDS, IDS), costs="roofline", solver="keep_all")
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    plan.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert read.steps_in_backward == plan.steps_in_backward == in_backward(model).scratch_bytes
    assert read.executable(model).program.code == plan.code
    assert "optimizer_step/wide.1.weight" in read.sequence


@pytest.mark.parametrize("keeps", [False, True], ids=["lets go", "keeps"])
def test_enable_plans_for_it_before_a_step_was_seen(keeps: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.seeded(Net)
    if keeps:  # a hook that steps and leaves the gradient
        optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())  # type: ignore[index]
    else:
        held = planner.optimizer_in_backward(model, MAKES["adamw"])
    planner.enable(model, 1, costs="roofline", solver="keep_all", now=True)
    plans = []
    with caplog.at_level(logging.INFO, logger="planner"):
        for k in range(3):
            train(model, k)
            model.zero_grad(set_to_none=True)
            plans.append(planner.plan_of(model))
    first, second, third = plans
    assert first is not None and second is third and (first is second) != keeps
    assert ("planned again" in caplog.text) == keeps
    if not keeps:
        assert live_peak_bytes(model, state_of(held)) == second.peak_bytes


def test_estimates_and_batches_know_it() -> None:
    model = tiny.seeded(Net)
    optimizers = planner.optimizer_in_backward(model, MAKES["adamw"])
    found = planner.estimate(model, (IDS, IDS), costs="roofline")
    step = step_of(model)
    assert (found.unplanned_peak_bytes, found.floor_bytes) == (step.baseline_peak_bytes, step.floor_bytes)
    most = planner.largest_batch(
        model, 0.0005, lambda n: (IDS[:1].expand(n, 8),) * 2, costs="roofline", time_limit_s=0.2, high=40
    )
    assert most.plan.steps_in_backward.keys() == optimizers.optimizers.keys()
    optimizers.remove()
    assert in_backward(model).scratch_bytes == {}


def test_the_optimizers_can_be_saved_and_scheduled() -> None:
    model, other = tiny.seeded(Net), tiny.seeded(Net)
    first, second = (planner.optimizer_in_backward(m, MAKES["adamw"]) for m in (model, other))
    train(model, 0)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each in (first, second):
        for group in each.param_groups:
            group["lr"] = 0.5
    assert torch.equal(train(model, 1), train(other, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state = first.state_dict()
    state.pop("last.bias")
    with pytest.raises(KeyError, match=r"last\.bias"):
        second.load_state_dict(state)


def test_what_does_not_go_with_it_is_refused() -> None:
    model = tiny.seeded(Net)
    with pytest.raises(TypeError, match=r"want a torch\.optim\.Optimizer"):
        planner.optimizer_in_backward(model, lambda params: "adam")  # type: ignore
    with pytest.raises(TypeError, match=r"embed\.weight alone"):
        planner.optimizer_in_backward(model, lambda params: SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"want what makes .*functools\.partial"):
        planner.optimizer_in_backward(model, SGD(model.parameters(), lr=0.1))  # type: ignore
    with pytest.raises(TypeError, match="LBFGS computes the loss again"):
        planner.optimizer_in_backward(model, torch.optim.LBFGS)
    train(model, 0)
    with pytest.raises(PlannerError, match="would add to them"):
        planner.optimizer_in_backward(model, MAKES["sgd"])
    model.zero_grad(set_to_none=True)
    optimizers = planner.optimizer_in_backward(model, MAKES["sgd"])
    with pytest.raises(PlannerError, match="in the backward already"):
        planner.optimizer_in_backward(model, MAKES["sgd"])
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    loss = scaler.scale(model(IDS, IDS))
    with pytest.raises(PlannerError, match="GradScaler"):
        loss.backward()
    del scaler
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizers.remove()
    model.requires_grad_(False)
    with pytest.raises(PlannerError, match="nothing to step"):
        planner.optimizer_in_backward(model, MAKES["sgd"])


def test_a_layer_that_is_thawed_is_told_unless_another_optimizer_holds_it() -> None:
    net = Net()
    net.wide[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    own = planner.optimizer_in_backward(net, functools.partial(SGD, lr=0.1))
    net(IDS, IDS).backward()
    thawed = net.get_parameter("wide.1.weight").requires_grad_(True)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(PlannerError, match=r"wide\.1\.weight among them, were frozen .*\.remove\(\) and"):
        net(IDS, IDS).backward()
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
    net.zero_grad()
    beside = SGD([thawed], lr=0.1)
    net(IDS, IDS).backward()
    assert thawed.grad is not None and net.last.weight.grad is None
    beside.step()
    own.remove()
    net.zero_grad()
    planner.optimizer_in_backward(net, functools.partial(SGD, lr=0.1))
    net(IDS, IDS).backward()
    assert thawed.grad is None


def test_accumulation_by_accelerate_is_refused_at_its_first_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import GradientState

    net = Net()
    planner.optimizer_in_backward(net, functools.partial(SGD, lr=0.1))
    before = net.last.weight.detach().clone()
    monkeypatch.setattr(GradientState(), "sync_gradients", False)
    with pytest.raises(PlannerError, match="gradient_accumulation_steps=1 with a larger batch"):
        net(IDS, IDS).backward()
    assert torch.equal(net.last.weight, before)
    monkeypatch.undo()
    net.zero_grad()
    net(IDS, IDS).backward()
    assert not torch.equal(net.last.weight, before)
