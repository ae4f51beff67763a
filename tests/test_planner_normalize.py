"""The graph between capture and plan can be read and run: printed code, and what each pass did."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.capture import meta
from planner.capture.joint_graph import JointGraph, capture
from planner.graph.captured import CapturedStep
from planner.graph.normalize import Normalized, normalize
from planner.graph.training_graph import training_graph
from planner.rewrite.emit import emit
from tests import tiny

PASSES = [
    "load",
    "write_parts",
    "copy_gradients",
    "split_dropout",
    "note_random_state",
    "update_buffers",
    "cudnn_batch_norms",
    "onednn_lstms",
    "order",
    "leave_sums_to_engine",
    "write_in_place",
]


class Convolutions(nn.Module):
    """Batch norm, dropout, a buffer that counts, a constant, a weight used twice; the loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.3)
        self.last = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.seen.add_(1)
        h = F.silu(self.norm(self.first(x)))
        h = h + self.second(self.drop(self.second(h)))
        h = self.last(self.last(h.mean((2, 3)))) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return F.cross_entropy(h, labels)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.last(self.cells(x)[0]).squeeze(-1) - labels).square().mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "mlp": (tiny.Mlp, (torch.linspace(-1, 1, 40).view(5, 8), torch.tensor([0, 1, 2, 3, 0]))),
    "convolutions": (Convolutions, (torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.tensor([1, 3]))),
    "lstm": (Recurrent, (torch.linspace(-1, 1, 24).view(3, 2, 4), torch.linspace(0, 1, 6).view(3, 2))),
}


def compiled(code: str) -> dict[str, Any]:
    """The functions that printed code defines."""
    found: dict[str, Any] = {}
    exec(compile(code, "printed", "exec"), found)
    return found


def arguments(normalized: Normalized, model: nn.Module, inputs: tuple[Tensor, ...], tangent: Tensor) -> Any:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kinds: dict[str, Callable[[Any], Tensor]] = {
        "parameter": lambda name: named[name].detach(),
        "buffer": lambda name: named[name],
        "input": lambda place: inputs[place],
        "tangent": lambda place: tangent,
        "constant": lambda name: normalized.step.constants[name],
    }
    return [kinds[kind](name) for kind, name in normalized.step.sources.values()]


def eager(build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Tensor]:
    model = tiny.seeded(build)
    torch.manual_seed(1)
    loss = model(*inputs)
    loss.backward()
    return model, loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_the_printed_step_has_the_bits_of_eager(name: str) -> None:
    build, inputs = MODELS[name]
    twin, loss = eager(build, inputs)
    model = tiny.seeded(build)
    normalized = normalize(capture(model, inputs))
    step = compiled(str(normalized))["step"]
    torch.manual_seed(1)
    result = step(*arguments(normalized, model, inputs, torch.ones(())))
    assert torch.equal(result["outputs"][0], loss)
    assert result["gradients"].keys() == dict(twin.named_parameters()).keys()
    for key, parameter in twin.named_parameters():
        assert parameter.grad is not None and torch.equal(result["gradients"][key], parameter.grad), key
    for key, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_printed_capture_has_the_bits_of_eager(name: str) -> None:
    build = (lambda: tiny.Mlp(p=0.0)) if name == "mlp" else MODELS[name][0]
    inputs = MODELS[name][1]
    twin, loss = eager(build, inputs)
    joint = capture(tiny.seeded(build), inputs)
    if name == "lstm":  # the captured call leaves its workspace out where no gradients are recorded
        return _lstm_compiles(joint)
    parts = joint.step
    named = dict(twin.named_parameters())
    given = {n: named[k].detach() for k, n in parts.parameters.items()}
    given |= {n: inputs[k] for k, n in parts.inputs.items()}
    given |= {n: torch.ones(()) for n in parts.tangents.values()}
    placeholders = parts.module.graph.find_nodes(op="placeholder")
    result = compiled(str(joint))["step"](*(given[n] for n in placeholders))
    assert torch.equal(result["outputs"][0], loss)
    for key, parameter in named.items():
        assert parameter.grad is not None and torch.equal(result["gradients"][key], parameter.grad), key


def _lstm_compiles(joint: JointGraph) -> None:
    assert "mkldnn_rnn_layer" in joint.code
    assert callable(compiled(joint.code)["step"])


def test_a_loss_outside_is_printed_beside_the_step() -> None:
    inputs = (torch.linspace(-1, 1, 40).view(5, 8),)
    target = torch.linspace(0, 1, 20).view(5, 4)
    model = tiny.seeded(lambda: tiny.Mlp(p=0.0))
    normalized = normalize(capture(model, inputs, lambda out: (out - target).square().mean()))
    functions = compiled(normalized.code)
    (output,) = functions["step"](*arguments(normalized, model, inputs, torch.ones(5, 4)))["outputs"]
    assert normalized.loss is not None
    kinds = {"input": output, "constant": target, "tangent": torch.ones(())}
    judged = functions["loss"](*(kinds[kind] for kind, _ in normalized.loss.sources.values()))
    (tangent,) = judged["gradients"].values()
    found = functions["step"](*arguments(normalized, model, inputs, tangent))["gradients"]
    loss = (model(*inputs) - target).square().mean()
    loss.backward()
    assert torch.equal(judged["outputs"][0], loss.detach())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(found[key], parameter.grad), key


def test_each_pass_says_what_it_did_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    build, inputs = MODELS["convolutions"]
    joint = capture(tiny.seeded(build), inputs)
    with caplog.at_level(logging.DEBUG, logger="planner"):
        normalized = normalize(joint)
    passes = normalized.step.passes
    assert [p.name for p in passes] == PASSES
    head = normalized.code.splitlines()[: len(passes)]
    assert head == [f"# {p}" for p in passes]
    logged = [r.message for r in caplog.records if r.name == "planner.graph.normalize"]
    assert logged == [str(p) for p in passes]
    counts = {p.name: dict(p.counts) for p in passes}
    calls = [n.target for n in normalized.step.graph.nodes if n.op == "call_function"]
    names = [getattr(target, "__name__", "") for target in calls]
    assert counts["split_dropout"]["dropouts"] == names.count("dropout_mask") == 1
    assert counts["note_random_state"]["states"] == names.count("rng_state") == 1
    assert counts["copy_gradients"]["copies"] == names.count("gradient_like")
    assert counts["update_buffers"] == {
        "buffers written": 0,
        "buffers written in place": 2,
        "batch norms that move theirs": 1,
    }
    nodes = normalized.step.graph.nodes
    in_place = [n for n in nodes if meta.over(n) is not None and not meta.is_engines(n)]
    assert counts["leave_sums_to_engine"]["sums"] == sum(map(meta.is_engines, nodes)) > 0
    assert counts["write_in_place"]["calls"] == len(in_place) > 0
    order = {"calls forward": len(normalized.step.forward), "backward": len(normalized.step.backward)}
    assert counts["order"] == order
    assert all(p.seconds >= 0 and str(p).endswith(" ms") for p in passes)


def test_what_normalize_returns_does_not_change() -> None:
    build, inputs = MODELS["mlp"]
    normalized = normalize(capture(tiny.seeded(build), inputs))
    for owner in (normalized, normalized.step, normalized.step.passes[0]):
        first = dataclasses.fields(owner)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, first, None)


def test_a_program_says_which_calls_are_further_executions() -> None:
    model, inputs = tiny.seeded(tiny.Mlp), MODELS["mlp"][1]
    roomy = planner.plan(model, 1.0, inputs, costs="roofline")
    plan = planner.plan(model, roomy.minimum_peak_bytes / 1e9, inputs, costs="roofline")
    joint = capture(model, inputs)
    step = CapturedStep.of(model, joint, training_graph(joint))
    program = emit(step.graph, step.steps(plan.sequence), turn=step.turn(plan.sequence))
    graphs = [program.forward.graph, *(segment.module.graph for segment in program.segments)]
    again = [n for graph in graphs for n in graph.nodes if n.op == "call_function" and meta.recomputes(n)]
    assert len(again) == len(plan.sequence) - plan.op_count > 0
    assert all("_recomputed" in n.name for n in again)
