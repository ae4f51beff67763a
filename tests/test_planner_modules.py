"""Modules of two names, buffers that a forward registers, first calls unlike others, unnamed outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner._compat import pytree
from planner.errors import PlannerError, TraceError
from planner.options import Search
from planner.solving.priced import prepare
from tests import tiny


class Model(nn.Module):
    """``body(self, x)`` on a linear layer and whatever else it is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **members: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.body = body
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


X = tiny.batch()["x"]
IDS = torch.arange(24).reshape(4, 6) % 12


def members(model: nn.Module) -> dict[str, tuple[int, type]]:
    """Identity and type of each parameter and buffer, by every name it has."""
    held = (
        (f"{path}.{key}", tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return {name: (id(tensor), type(tensor)) for name, tensor in held}


# -- one module under two names (masked autoencoders that take their encoder's patches) -----------


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.BatchNorm1d(8))
        self.head = self.encoder[1:]
        self.patches = nn.Sequential(self.encoder[0])
        self.reads = False

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.head(self.patches(x)).sigmoid()
        if self.reads:
            h = h * h.max().item()
        out: Tensor = self.encoder(h)
        return out


def test_a_submodule_with_two_names_keeps_its_parameters() -> None:
    model = tiny.seeded(TwoNames)
    before = members(model)
    report = tiny.assert_steps_equal(model, (X,)).verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes
    assert members(model) == before
    vars(model)["reads"] = True
    with pytest.raises(PlannerError, match=r"h\.max\(\)\.item\(\)"):
        prepare(model, (X,), costs="roofline")
    assert members(model) == before


# -- containers registered without the names of their parts (diffusers' outputs) ------------------


@dataclass
class Unnamed(OrderedDict[str, Any]):
    sample: Tensor
    parts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        self.update(sample=self.sample, parts=self.parts)


def _rebuilt(values: Any, keys: Any) -> Unnamed:
    return Unnamed(**dict(zip(keys, values, strict=True)))


pytree.register_pytree_node(Unnamed, lambda u: (list(u.values()), list(u)), _rebuilt)


def test_an_output_whose_container_names_nothing() -> None:
    def body(self: Any, x: Tensor) -> Unnamed:
        h = self.first(x).tanh()
        return Unnamed(h.sigmoid(), (h.cos(), h.exp()))

    def loss_fn(out: Unnamed) -> Tensor:
        return out.sample.mean() + sum(p.mean() for p in out.parts)

    model = tiny.seeded(lambda: Model(body))
    step = prepare(model, (X,), loss_fn=loss_fn, costs="roofline", search=Search(time_limit_s=3))
    names = [leaf.name for leaf in step.joint.template.leaves]
    assert names == ["output['sample']", "output['parts'][0]", "output['parts'][1]"]
    report = step.plan_bytes(step.minimum_peak_bytes, search=Search(time_limit_s=3)).verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes


# -- what is refused, with the next step -----------------------------------------------------------


def _caches(self: Any, x: Tensor) -> Tensor:
    if self.bias is None:
        self.register_buffer("bias", torch.arange(8.0), persistent=False)
    return self.first(x).tanh() + self.bias


def _caching() -> nn.Module:
    model = Model(_caches)
    model.register_buffer("bias", None, persistent=False)
    return model


def test_a_buffer_registered_by_the_forward_is_refused_and_taken_off() -> None:
    model = tiny.seeded(_caching)
    before, rng = members(model), torch.get_rng_state()
    with pytest.raises(PlannerError, match=r"registers the buffer bias.*call the model once before"):
        prepare(model, (X,), costs="roofline", loss_fn=lambda out: out.mean())
    assert members(model) == before and torch.equal(rng, torch.get_rng_state())


def test_a_cache_that_a_first_call_filled_is_planned() -> None:
    model = tiny.seeded(_caching)
    model(X)
    plan = planner.plan(model, 1.0, (X,), costs="roofline")
    assert plan.verify().ok


# -- a first call that is not as the others --------------------------------------------------------


def _noise(self: Any, x: Tensor) -> Tensor:
    if not self.done:
        self.done = True
        x = x + torch.randn_like(x)
    return self.first(x).tanh()


def _other_part(self: Any, x: Tensor) -> Tensor:
    act, self.act = self.act, nn.GELU()
    return act(self.first(x))


def _other_weight(self: Any, x: Tensor) -> Tensor:
    self.turn, weight = 1, (self.first if self.turn else self.other).weight
    return nn.functional.linear(x, weight).tanh()


def _corrects(self: Any, x: Tensor) -> Tensor:
    self.done, self.side = True, min(self.side, x.shape[1])
    return self.first(x)[:, : self.side].tanh()


def _lazy(body: Callable[..., Any]) -> nn.Module:
    model = Model(body)
    model.act, model.other = nn.ReLU(), nn.Linear(8, 8)
    model.done, model.turn, model.side = False, 0, 64
    return model


@pytest.mark.parametrize(("body", "name"), [(_noise, "done"), (_other_part, "act"), (_other_weight, "turn")])
def test_a_first_call_that_runs_other_ops_is_refused_until_it_was_made(body: Any, name: str) -> None:
    model = tiny.seeded(lambda: _lazy(body))
    before = members(model), model.done, model.turn, type(model.act)
    with pytest.raises(TraceError, match=rf"other code than those.*changes {name}; .*Call the model once"):
        prepare(model, (X,), costs="roofline", loss_fn=lambda out: out.mean())
    assert (members(model), model.done, model.turn, type(model.act)) == before
    model(X)
    plan = planner.plan(model, 1.0, (X,), costs="roofline", loss_fn=lambda out: out.mean())
    assert plan.verify().ok


def test_a_first_call_that_only_corrects_is_planned() -> None:
    model = tiny.seeded(lambda: _lazy(_corrects))
    plan = planner.plan(model, 1.0, (X,), costs="roofline", loss_fn=lambda out: out.mean())
    assert plan.verify().ok and model.side == 8
