"""Ways to train that are no plain loop: each on a model under a budget and on its twin without one.

A way is a function of ``enable`` and ``see``: it enables its models, trains, and shows what it sees.  Plans
recompute whatever can be recomputed.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import planner
from planner.errors import PlannerError, TraceError
from tests import tiny
from tests.hf import FAST

Enable = Callable[[nn.Module], nn.Module]
Way = Callable[[Enable, "Seen"], None]


class Seen:
    """What a loop looks at, in the order in which it looks: tensors copied, everything else as it prints."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.texts: list[str] = []

    def __call__(self, *values: Any) -> None:
        """Tensors, or what prints."""
        for value in values:
            if isinstance(value, Tensor):
                self.values[str(len(self.values))] = value.detach().clone()
            else:
                self.texts.append(str(value))

    def state(self, *models: nn.Module) -> None:
        """Parameters, gradients or that there are none, buffers, and where the generators stand."""
        for model in models:
            for p in model.parameters():
                self(p, p.requires_grad, "none" if p.grad is None else p.grad)
            self(*model.buffers())
        self(torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3])


def _seen(way: Way, enable: Enable) -> Seen:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    seen = Seen()
    way(enable, seen)
    return seen


def _enable(model: nn.Module, **more: Any) -> nn.Module:
    return planner.enable(model, 1.0, **{**FAST, "solver": "recompute_all"}, **more, now=True)


WAYS: list[Way] = []


def way(function: Way) -> Way:
    """One of the ways that train as without a plan."""
    WAYS.append(function)
    return function


@pytest.mark.parametrize("trained", WAYS, ids=lambda way: way.__name__)
def test_trains_bit_for_bit_as_without_a_plan(trained: Way) -> None:
    enabled: list[nn.Module] = []

    def enable(model: nn.Module) -> nn.Module:
        enabled.append(_enable(model))
        return model

    with torch.random.fork_rng():
        got = _seen(trained, enable)
        want = _seen(trained, lambda model: model)
    assert got.texts == want.texts
    tiny.assert_same_bits(got.values, want.values)
    plans = [plan for model in enabled if (plan := planner.plan_of(model)) is not None]
    assert any(plan.overhead > 0 for plan in plans)


def _x(rows: int = 16) -> Tensor:
    return torch.randn(rows, 8)


def _y(rows: int = 16) -> Tensor:
    return torch.randint(4, (rows,))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, see: Seen) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    see(loss)


class Small(nn.Module):
    """Two layers, dropout between them: logits (rows, 4)."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.tanh(self.first(x))))
        return out


class Heads(nn.Module):
    """Two heads on one trunk, with batch norm: outputs that may get a gradient or not."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.a(h), self.b(h)


# -- several models -------------------------------------------------------------------------------


@way
def gan_with_a_critic_frozen_in_turns(enable: Enable, see: Seen) -> None:
    generator, critic = (
        enable(Small()),
        enable(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))),
    )
    optimizers = _sgd(generator), _sgd(critic)
    for _ in range(2):
        made = generator(_x())
        critic.requires_grad_(True)
        _step(
            optimizers[1],
            F.softplus(critic(made.detach())).mean() + F.softplus(-critic(_x()[:, :4])).mean(),
            see,
        )
        critic.requires_grad_(False)
        _step(optimizers[0], F.softplus(-critic(made)).mean(), see)
        see.state(generator, critic)


@way
def student_and_its_moving_average(enable: Enable, see: Seen) -> None:
    student = enable(Heads())
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = _sgd(student)
    for _ in range(3):
        x = _x()
        with torch.no_grad():
            aim, _ = teacher(x)
        _step(optimizer, F.mse_loss(student(x)[0], aim), see)
        with torch.no_grad():
            for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(its, 0.1)
    see.state(student, teacher)


@way
def distilled_from_a_frozen_teacher_in_eval_mode(enable: Enable, see: Seen) -> None:
    teacher, student = enable(Small().eval().requires_grad_(False)), enable(Small())
    optimizer = _sgd(student)
    for _ in range(2):
        x = _x()
        _step(optimizer, F.kl_div(student(x).log_softmax(-1), teacher(x).softmax(-1), reduction="sum"), see)
    see.state(student, teacher)


@way
def copied_and_pickled_between_steps(enable: Enable, see: Seen) -> None:
    model = enable(Small())
    for _ in range(2):
        _step(_sgd(model), model(_x()).square().mean(), see)
        see.state(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)


# -- several forwards or backwards in a step ------------------------------------------------------


@way
def sharpness_aware(enable: Enable, see: Seen) -> None:
    model = enable(Heads())
    optimizer = _sgd(model)
    for _ in range(2):
        x, y = _x(), _y()
        F.cross_entropy(model(x)[0], y).backward()
        moved = [(p, p.grad * 0.05) for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for p, by in moved:
                p.add_(by)
        optimizer.zero_grad()
        F.cross_entropy(model(x)[0], y).backward()
        with torch.no_grad():
            for p, by in moved:
                p.sub_(by)
        optimizer.step()
        see.state(model)


@way
def embeddings_first_then_chunk_by_chunk(enable: Enable, see: Seen) -> None:
    model = enable(Small())
    optimizer = _sgd(model)
    for _ in range(2):
        chunks, states, made = _x(24).split(8), [], []
        with torch.no_grad():
            for x in chunks:
                states.append(torch.get_rng_state())
                made.append(model(x))
        z = torch.cat(made).requires_grad_()
        (gradient,) = torch.autograd.grad((z @ z.T).softmax(-1).square().mean(), z)
        for x, state, g in zip(chunks, states, gradient.split(8), strict=True):
            with torch.random.fork_rng():
                torch.set_rng_state(state)
                model(x).backward(gradient=g)
        optimizer.step()
        see.state(model)
        optimizer.zero_grad()


@way
def adversarial_inputs(enable: Enable, see: Seen) -> None:
    model = enable(Heads())
    optimizer = _sgd(model)
    for _ in range(2):
        x, y = _x().requires_grad_(), _y()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x)[0], y), x)
        _step(optimizer, F.cross_entropy(model((x + 0.1 * g.sign()).detach())[0], y), see)
        see.state(model)


@way
def tasks_weighted_by_their_gradients(enable: Enable, see: Seen) -> None:
    model = Heads()
    enable(model)
    optimizer, shared = _sgd(model), list(model.trunk.parameters())
    for _ in range(2):
        a, b = model(_x())
        losses = a.square().mean(), b.abs().mean()
        norms = [
            torch.stack([g.norm() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).sum()
            for loss in losses
        ]
        see(*norms)
        _step(optimizer, losses[0] / norms[0] + losses[1] / norms[1], see)
        see.state(model)


@way
def one_head_at_a_time(enable: Enable, see: Seen) -> None:
    model = enable(Heads())
    optimizer = _sgd(model)
    for step in range(4):
        outputs = model(_x())
        for out in outputs:
            out.register_hook(lambda g: see("came", g) or g * 2)
            out.retain_grad()
        _step(optimizer, outputs[step % 2].square().mean(), see)
        see(*(out.grad for out in outputs))
        see.state(model)


@way
def hidden_state_over_steps(enable: Enable, see: Seen) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.go, self.drop = nn.Linear(8, 16), nn.Linear(16, 16), nn.Dropout(0.1)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.read(x) + self.go(self.drop(h)))

    model = enable(Cell())
    optimizer, h = _sgd(model), torch.zeros(16, 16)
    for _ in range(2):
        loss = torch.zeros(())
        for _ in range(3):
            h = model(_x(), h)
            loss = loss + h.square().mean()
        _step(optimizer, loss, see)
        h = h.detach()
        see.state(model)


@way
def closure_called_by_lbfgs(enable: Enable, see: Seen) -> None:
    model = enable(Small(p=0.0))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    x, y = _x(), _y()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    see(optimizer.step(closure))  # type: ignore[arg-type]
    see.state(model)


@way
def some_epochs_over_a_rollout(enable: Enable, see: Seen) -> None:
    model = enable(Heads())
    optimizer, x = _sgd(model), _x(32)
    with torch.no_grad():
        rolled = torch.distributions.Categorical(logits=model(x)[0])
        action = rolled.sample()
        before = rolled.log_prob(action)
    for _ in range(2):
        for rows in torch.randperm(32).split(16):
            logits, value = model(x[rows])
            ratio = (
                torch.distributions.Categorical(logits=logits).log_prob(action[rows]) - before[rows]
            ).exp()
            if ratio.max() > 3:
                break
            _step(optimizer, value.square().mean() - ratio.clamp(0.8, 1.2).mean(), see)
    see.state(model)


# -- what changes while training ------------------------------------------------------------------


@way
def layers_thawed_one_by_one(enable: Enable, see: Seen) -> None:
    model = Small()
    enable(model.requires_grad_(False))
    optimizer = _sgd(model)
    for layer in (model.last, model.first):
        layer.requires_grad_(True)
        _step(optimizer, F.cross_entropy(model(_x()), _y()), see)
        see.state(model)


@way
def dropout_and_default_dtype_moved(enable: Enable, see: Seen) -> None:
    class Scaled(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (torch.arange(4) * 0.1)

    model = Scaled()
    enable(model)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.drop.p /= 2
        torch.set_default_dtype(dtype)
        try:
            out = model(torch.ones(16, 8, dtype=torch.float32))
            _step(_sgd(model), out.square().mean(), see)
        finally:
            torch.set_default_dtype(torch.float32)
        see(out.dtype)
        see.state(model)


@way
def resumed_from_a_checkpoint(enable: Enable, see: Seen) -> None:
    model: nn.Module = Heads()
    saved: dict[str, Any] = {}
    for _ in range(2):
        enable(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        if saved:
            model.load_state_dict(saved["model"], assign=True)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
            optimizer.load_state_dict(saved["optimizer"])
        _step(optimizer, model(_x())[0].square().mean(), see)
        see.state(model)
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        model = Heads()


@way
def weights_computed_from_others(enable: Enable, see: Seen) -> None:
    model = Small()
    parametrizations.weight_norm(model.first)
    parametrizations.spectral_norm(model.last)
    enable(model)
    optimizer = _sgd(model)
    for _ in range(2):
        _step(optimizer, model(_x()).square().mean(), see)
        see.state(model)


@way
def interrupted_in_the_loss_and_in_the_backward(enable: Enable, see: Seen) -> None:
    model = Heads()
    enable(model)
    optimizer = _sgd(model)

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    for step in range(4):
        out, _ = model(_x())
        if step == 1:
            continue  # as where the loss raised
        hook = model.a.weight.register_hook(interrupt) if step == 2 else None
        try:
            _step(optimizer, out.square().mean(), see)
        except KeyboardInterrupt:
            see("interrupted")
        if hook is not None:
            hook.remove()
    see.state(model)


# -- what comes in and goes out -------------------------------------------------------------------


@way
def mixed_by_numpy_in_bfloat16_with_a_scaler(enable: Enable, see: Seen) -> None:
    model = enable(Small())
    optimizer, scaler = _sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for _ in range(2):
        x, y, share = _x(), _y(), float(np.random.beta(0.4, 0.4))
        order = torch.from_numpy(np.random.permutation(16))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(share * x + (1 - share) * x[order])
            loss = share * F.cross_entropy(out, y, label_smoothing=0.1) + (1 - share) * F.cross_entropy(
                out, y[order]
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        see(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        see.state(model)


@way
def patches_hidden_by_a_permutation(enable: Enable, see: Seen) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.hidden, self.decode = Small(), nn.Parameter(torch.zeros(4)), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(x.shape[1])
            seen = self.encode(x[:, order[:4]])
            whole = torch.cat([seen, self.hidden.expand(x.shape[0], x.shape[1] - 4, 4)], 1)
            return F.mse_loss(self.decode(whole[:, order.argsort()]), x)

    model = enable(Masked())
    optimizer = _sgd(model)
    for _ in range(2):
        _step(optimizer, model(torch.randn(4, 8, 8)), see)
        see.state(model)


@dataclass
class Answer:
    """A model's output with something missing and something that is no tensor."""

    logits: Tensor
    more: dict[str, Any]
    nothing: None = None


@way
def outputs_hooked_and_written_over(enable: Enable, see: Seen) -> None:
    class Answers(Small):
        def forward(self, x: Tensor, scale: int | None = None) -> Answer:  # type: ignore[override]
            out = super().forward(x)
            more = {"squashed": torch.tanh(self.first(x)), "name": ("a", 1)}
            return Answer(out if scale is None else out * scale, more)

    model = enable(Answers())
    optimizer = _sgd(model)
    for scale in (None, 2):
        answer = model(_x(), scale)
        see(answer.more["name"], answer.nothing)
        answer.logits.register_hook(lambda g: g * 2)
        answer.logits[:2] = 0
        answer.logits.mul_(2)
        _step(optimizer, answer.logits.square().mean() + answer.more["squashed"].sum(), see)
        see.state(model)


@way
def watched_for_nan_with_looks_in_between(enable: Enable, see: Seen) -> None:
    model = enable(Heads())
    optimizer = _sgd(model)
    for rows in (16, 3):
        with torch.autograd.set_multithreading_enabled(False), torch.autograd.set_detect_anomaly(True):
            _step(optimizer, model(_x(rows))[0].square().mean(), see)
        with torch.no_grad():
            see(*model(_x()))
        with torch.inference_mode():
            see(*model.eval()(_x()))
        model.train()
        see.state(model)


# -- what is refused, before anything changes ------------------------------------------------------


def test_weights_shared_by_calls_are_refused_before_a_plan_and_after() -> None:
    model = Small(p=0.0)
    parametrizations.weight_norm(model.first)
    _enable(model)
    x = _x()
    for _ in range(2):
        with parametrize.cached():
            with pytest.raises(PlannerError, match=r"Small is called under .*cached\(\).*planner\.disable"):
                model(x)
            with torch.no_grad():
                assert type(model(x)) is Tensor  # what is cached are real weights
        model(x).sum().backward()


def test_a_model_without_computed_weights_is_planned_where_they_are_cached() -> None:
    model = _enable(Small())
    with parametrize.cached():
        model(_x()).sum().backward()
    assert planner.plan_of(model) is not None


def test_other_parameters_are_served_by_a_plan_and_refused_without_one() -> None:
    model = Small(p=0.0)
    twin, x = copy.deepcopy(model), _x()
    _enable(model)

    def gradients(of: nn.Module) -> dict[str, Tensor]:
        others = {n: (2 * p.detach()).requires_grad_() for n, p in of.named_parameters()}
        torch.func.functional_call(of, others, (x,)).square().sum().backward()
        return {n: p.grad for n, p in others.items() if p.grad is not None}

    with pytest.raises(
        PlannerError, match=r"first\.weight of Small is no parameter.*functional_call.*its plan"
    ):
        gradients(model)
    model(x).sum().backward()
    tiny.assert_same_bits(gradients(model), gradients(twin))


def test_a_second_derivative_is_refused_with_the_ways_to_have_one() -> None:
    model, x = _enable(Small()), _x().requires_grad_()
    out = model(x).sum()
    with pytest.raises(PlannerError, match=r"create_graph=True.*planner\.disable.*inside the forward"):
        torch.autograd.grad(out, x, create_graph=True)
    assert all(p.grad is None for p in model.parameters())
    planner.disable(model)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()


@pytest.mark.parametrize("then", ["held", "written over", "let go of"])
def test_a_hook_on_an_output_that_another_is_computed_from_is_refused(then: str) -> None:
    class Twice(Small):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            out = super().forward(x)
            return out, out * 2

    def step(model: nn.Module, *, early: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        out, twice = model(x)
        if early:
            out.register_hook(lambda g: g * 3)
        if then == "written over":
            out.mul_(2)
        if not early:
            out.register_hook(lambda g: g * 3)
        loss = twice.sum() if then == "let go of" else out.sum() + twice.sum()
        del out
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model, x = Twice(), _x()
    twin = copy.deepcopy(model)
    _enable(model)
    with torch.random.fork_rng(), pytest.raises(PlannerError, match=r"the gradient of output\[0\] is asked"):
        step(model, early=True)
    assert all(p.grad is None for p in model.parameters())
    if then == "written over":  # what is hooked now is not what the other was computed from
        with torch.random.fork_rng():
            tiny.assert_same_bits(step(model, early=False), step(twin, early=False))


def test_a_pruned_layer_is_refused_by_that_name() -> None:
    model = Small()
    prune.l1_unstructured(model.first, "weight", 0.5)
    with pytest.raises(PlannerError, match=r"first.*torch\.nn\.utils\.prune"):
        _enable(model, capture="one graph")(_x())
    prune.remove(model.first, "weight")
    model(_x()).sum().backward()
    assert planner.plan_of(model) is not None


def test_a_draw_of_pythons_is_refused_with_its_line() -> None:
    class Forced(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if random.random() < 0.5 else -x)

    before = random.getstate()
    with pytest.raises(TraceError, match=r"random\.random\(\) < 0\.5.*Draw it outside"):
        _enable(Forced(), capture="one graph")(_x())
    assert random.getstate() == before
