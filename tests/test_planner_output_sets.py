"""Which outputs get a gradient, the backward tells: for each set eager's bits, and ``None`` for ``None``."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner import PlannerError
from planner.measure import step_peak
from planner.runtime.apply import applied
from planner.runtime.forward import planned_forward_of
from planner.runtime.variants import step_of
from planner.solving import priced
from tests import tiny

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """A trunk with a norm, dropout and a residual; four heads, the third of which splits in two."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.3)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(F.gelu(self.trunk(x)))
        h = h + self.drop(h * self.scale)
        a, b = self.heads[0](h), self.heads[1](h).tanh()
        c, d = self.heads[2](h).chunk(2, -1)
        return a, b, c, d, (h * 0).sqrt()  # the last one's gradient is 0 * inf


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Bit for bit, ``NaN`` for ``NaN``, ``None`` for ``None``."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), name
        if g is not None and w is not None:
            assert torch.equal(g.view(torch.int32), w.view(torch.int32)), name


def pair(
    build: Callable[[], nn.Module], *inputs: Tensor, solver: str = "recompute_all"
) -> tuple[nn.Module, nn.Module]:
    """A planned model, by default one that recomputes all it can, and its twin without."""
    model = tiny.seeded(build)
    twin = copy.deepcopy(model)
    tiny.planned(model, inputs, solver=solver).apply(model)
    return model, twin


def each(models: tuple[nn.Module, nn.Module], step: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """The same step of both from the same seed and no gradients; their gradients are equal after it."""
    results = []
    for m in models:
        m.zero_grad()
        torch.manual_seed(7)
        results.append(step(m))
    assert_same(gradients(models[0]), gradients(models[1]))
    return results[0], results[1]


@pytest.fixture(scope="module")
def heads() -> tuple[nn.Module, nn.Module]:
    return pair(Heads, X)


# -- sets within what is planned for --------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(chosen=st.sets(st.integers(0, 4), min_size=1))
def test_every_set_of_outputs(heads: tuple[nn.Module, nn.Module], chosen: set[int]) -> None:
    def step(m: nn.Module) -> None:
        out = m(X)
        torch.stack([out[i].square().sum() for i in sorted(chosen)]).sum().backward()

    each(heads, step)


def test_nothing_is_planned_again_for_them(
    heads: tuple[nn.Module, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    each(heads, lambda m: m(X)[0].sum().backward())
    each(heads, lambda m: (m(X)[1].sum() + m(X)[3].sum()).backward())
    assert not caplog.records
    forward = planned_forward_of(heads[0])
    assert forward is not None and forward.sets.now is forward.step


def test_a_head_that_is_never_read_does_not_move() -> None:
    models = pair(Heads, X)
    before = models[0].heads[1].weight.clone()
    for m in models:
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(X)[0].square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert torch.equal(models[0].heads[1].weight, before)


def test_the_peak_is_no_higher_than_with_all_of_them() -> None:
    model = tiny.seeded(lambda: Heads())
    plan = tiny.planned(model, (X,))
    plan.apply(model)
    model(X)[0].sum().backward()
    model.zero_grad()
    assert step_peak(model, (X,), loss_fn=lambda out: out[0].sum()) <= plan.peak_bytes
    assert step_peak(model, (X,), loss_fn=lambda out: out[1].sum() + out[4].sum()) <= plan.peak_bytes


def test_accumulation_and_subsets_of_parameters(heads: tuple[nn.Module, nn.Module]) -> None:
    def twice(m: nn.Module) -> None:
        m(X)[0].sum().backward()
        m(X)[1].sum().backward()

    each(heads, twice)

    def some(m: nn.Module) -> list[Tensor | None]:
        wanted = [m.trunk.weight, m.heads[1].weight]
        return list(torch.autograd.grad(m(X)[0].square().sum(), wanted, allow_unused=True))

    got, want = each(heads, some)
    assert torch.equal(got[0], want[0]) and got[1] is None and want[1] is None


class Shared(nn.Module):
    """One weight is used in both heads, one gradient goes to two parameters, one input comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.tied = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x + self.one
        s = h + self.two
        u = s + 1
        return {"s": s, "u": u * 1.0, "t": self.tied(u), "n": (self.again(h), u.neg())}


@pytest.mark.parametrize("read", ["s", "u", "t", "n", "su", "st", "sn", "ut", "tn", "un", "sut"])
def test_sums_that_become_one_of_their_operands(read: str) -> None:
    models = _SHARED.setdefault("pair", pair(Shared, X[0].repeat(8, 1)) if "pair" not in _SHARED else None)
    x = X[0].repeat(8, 1)
    upstream = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def step(m: nn.Module) -> None:
        out = m(x)
        chosen = [t for k in read for t in (out[k] if isinstance(out[k], tuple) else [out[k]])]
        given = [g.clone() for g in upstream[: len(chosen)]]
        torch.autograd.backward(chosen, given)
        assert all(map(torch.equal, given, upstream))  # what the caller gave is the caller's

    each(models, step)


_SHARED: dict[str, Any] = {}


# -- formulas that are given some of their gradients only -----------------------------------------


class Both(torch.autograd.Function):
    """Two outputs; of a missing gradient it makes zeros, as autograd does for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.exp()

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return a * x.cos() + b * x.exp()


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.inner(x)
        variance, mean = torch.var_mean(h, -1)
        return (*Both.apply(h), variance, mean)


def test_formulas_of_several_outputs_are_captured_again() -> None:
    models = pair(Statistics, X)
    for i in (0, 1, 2, 3, 1):
        each(models, lambda m, i=i: m(X)[i].sum().backward())  # type: ignore[misc]
    each(models, lambda m: sum(t.sum() for t in m(X)).backward())


# -- outputs that were not planned for ------------------------------------------------------------


class Aux(nn.Module):
    """Logits and a scalar beside them, which is no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.norm(self.first(x)))
        self.seen.mul_(0.5).add_(h.detach().mean(0))
        return self.last(h + self.seen), h.square().mean()


def test_a_scalar_that_was_taken_for_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    models = pair(Aux, X)

    def step(m: nn.Module) -> Tensor:
        logits, aux = m(X)
        (F.cross_entropy(logits, torch.arange(6) % 4) + 0.1 * aux).backward()
        return torch.get_rng_state()

    for _ in range(3):
        got, want = each(models, step)
        assert torch.equal(got, want)
        assert all(map(torch.equal, models[0].buffers(), models[1].buffers()))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "planned for the gradient of output[1]" in caplog.text
    each(models, lambda m: m(X)[1].backward())
    assert len(caplog.records) == 1


def test_it_is_planned_once_for_all_sizes() -> None:
    model = tiny.seeded(Aux)
    twin = copy.deepcopy(model)
    planner.plan(model, 1, (X,), costs="roofline", time_limit_s=1, dynamic=True).apply(model)
    for rows in (6, 4, 3):
        each((model, twin), lambda m: m(X[:rows])[0].sum().backward())  # noqa: B023
    forward = planned_forward_of(model)
    assert forward is not None and forward.sets.now.variants is not None
    assert forward.sets.now.variants.traces == 1


class Plain(nn.Module):
    """No backward reads its input, so nobody but the caller holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.last = nn.Parameter(torch.zeros(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x + self.bias).tanh()
        return self.last(h), h.square().mean()


@pytest.mark.parametrize(("build", "what"), [(Plain, "input 0"), (Aux, "buffer seen, which .* reads,")])
def test_it_cannot_be_run_again_from_what_is_gone(build: type[nn.Module], what: str) -> None:
    models = pair(build, X, solver="keep_all")
    each(models, lambda m: m(X)[1].backward())  # from here on inputs are the caller's to hold
    before = gradients(models[0])
    logits, _ = models[0](X.clone() if build is Plain else X)
    with pytest.raises(PlannerError, match=rf"{what} is not there any more.*Keep the batch.*loss_fn"):
        logits.sum().backward()
    assert_same(gradients(models[0]), before)
    models[0].load_state_dict(models[1].state_dict())
    each(models, lambda m: m(X)[0].sum().backward())  # the plan for it is there now


def test_a_trainer_that_computes_its_own_loss(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny.seeded(tiny.gpt2), tiny.gpt2_batch()
    twin = copy.deepcopy(model)
    planner.enable(model, 1, now=True, costs="roofline", time_limit_s=1)

    def step(m: nn.Module) -> Tensor:
        out = m(**batch)  # labels among it, so the model computes a loss that nobody reads
        F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1).backward()
        return out.loss.detach()

    for _ in range(2):
        got, want = each((model, twin), step)
        assert torch.equal(got, want)
    assert sum("planned again" in r.message for r in caplog.records) == 1
    plan = planner.plan_of(model)
    assert plan is not None and plan.differentiated == (1,)
    each((model, twin), lambda m: m(**batch).loss.backward())


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    model = tiny.seeded(Heads)
    twin = copy.deepcopy(model)
    tiny.planned(model, (X,)).save(tmp_path / "plan.json")
    planner.load(tmp_path / "plan.json").apply(model)
    each((model, twin), lambda m: (m(X)[1].sum() + m(X)[2].sum()).backward())


# -- further backwards of one call ----------------------------------------------------------------


class Apart(nn.Module):
    """An actor and a critic that share nothing but a sum, or a whole layer."""

    def __init__(self, trunk: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8) if trunk else None
        self.bias = nn.Parameter(torch.zeros(8))
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, n)) for n in (3, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.bias
        h = h if self.trunk is None else self.trunk(h)
        return self.actor(h), self.critic(h)


def test_two_backwards_of_disjoint_outputs(caplog: pytest.LogCaptureFixture) -> None:
    models = pair(lambda: Apart(trunk=False), X)

    def step(m: nn.Module) -> None:
        actor, critic = m(X)
        actor.square().sum().backward()
        critic.square().sum().backward()

    for _ in range(3):
        each(models, step)
    assert [r.message for r in caplog.records] == [
        "Apart has another backward after that of output[0]: what it needs is held from now on, as in eager"
    ]


def test_two_backwards_through_one_trunk_are_refused_as_in_eager() -> None:
    models = pair(lambda: Apart(trunk=True), X)

    def step(m: nn.Module) -> None:
        actor, critic = m(X)
        actor.sum().backward()
        with pytest.raises(RuntimeError, match=r"[Bb]ackward through"):
            critic.sum().backward()

    with pytest.raises(AssertionError, match="critic"):  # eager breaks off in the middle, the plan before
        each(models, step)
    each(models, lambda m: sum(t.sum() for t in m(X)).backward())


def test_retain_graph(caplog: pytest.LogCaptureFixture) -> None:
    models = pair(lambda: Apart(trunk=True), X)

    def step(m: nn.Module) -> None:
        actor, critic = m(X)
        actor.sum().backward(retain_graph=True)
        critic.square().sum().backward(retain_graph=True)
        (actor.square().sum() + critic.sum()).backward()
        with pytest.raises(RuntimeError, match=r"second|freed"):
            actor.sum().backward()

    for _ in range(2):
        each(models, step)
    assert len(caplog.records) == 1 and "retain_graph=True" in caplog.text

    def changed(m: nn.Module) -> None:
        actor, _ = m(X)
        actor.sum().backward(retain_graph=True)
        with torch.no_grad():
            m.trunk.weight.mul_(1.0)
            m.actor[3].weight.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            actor.sum().backward()

    each(models, changed)


# -- gradients of outputs themselves --------------------------------------------------------------


class Within(nn.Module):
    """A hidden state that is returned, and a result computed from it; an output beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.inner(x)
        return self.outer(h), h, x * self.outer.bias.sum()


def test_retain_grad_of_an_output() -> None:
    models = pair(Within, X)

    def beside(m: nn.Module) -> Tensor:
        out, h, other = m(X)
        other.retain_grad()
        h.retain_grad()
        (other.square().sum() + h.square().sum()).backward()
        assert out.grad_fn is not None and h.grad is not None
        return h.grad + other.grad

    got, want = each(models, beside)
    assert torch.equal(got, want)
    for ask in (Tensor.retain_grad, lambda h: h.register_hook(print)):
        models[0].zero_grad()
        out, h, _ = models[0](X)
        ask(h)
        with pytest.raises(PlannerError, match=r"gradient of output\[1\] is asked for.*output\[0\].*restore"):
            out.sum().backward()
        assert all(p.grad is None for p in models[0].parameters())


def test_an_output_by_another_one() -> None:
    models = pair(Within, X)
    for m in models:
        out, h, _ = m(X)
        (got,) = torch.autograd.grad(h.square().sum(), h)
        assert torch.equal(got, 2 * h)
    out, h, _ = models[0](X)
    for unused in (False, True):
        with pytest.raises(PlannerError, match=r"output\[0\] by another.*output\[1\].*restore"):
            torch.autograd.grad(out.sum(), h, allow_unused=unused)


# -- hooks ----------------------------------------------------------------------------------------


def test_hooks_of_parameters_without_a_gradient_are_left_alone(
    heads: tuple[nn.Module, nn.Module],
) -> None:
    calls: list[list[str]] = []
    handles = []
    for m in heads:
        seen: list[str] = []
        calls.append(seen)
        for name, p in m.named_parameters():
            handles.append(p.register_hook(lambda g, s=seen, n=name: s.append(f"{n} {tuple(g.shape)}")))
            handles.append(
                p.register_post_accumulate_grad_hook(lambda p, s=seen, n=name: s.append(f"{n} after"))
            )
    for i in (0, 1, 0):
        each(heads, lambda m, i=i: m(X)[i].sum().backward())  # type: ignore[misc]
    each(heads, lambda m: sum(t.sum() for t in m(X)).backward())
    assert sorted(calls[0]) == sorted(calls[1]) and calls[0]
    for handle in handles:
        handle.remove()


def test_a_loss_that_is_kept_does_not_hold_its_batch() -> None:
    model = tiny.seeded(Heads)
    tiny.planned(model, (X,), solver="recompute_all").apply(model)
    batch = X.clone()
    seen = weakref.ref(batch)
    loss = model(batch)[0].sum()
    loss.backward()
    del batch
    assert seen() is None and loss.grad_fn is not None


class Canvas(nn.Module):
    """Writes into a part of what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        canvas = self.inner(x).sin()
        mean = canvas.mean()
        canvas[:, :4] = x[:, 4:] * canvas[:, 4:]
        return (canvas.exp() * mean).sum()


def test_a_retained_graph_is_not_written_over() -> None:
    """The write is made again in the backward, over what was saved of the canvas before it."""
    model = tiny.seeded(Canvas)
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, (X,))
    captured = priced.prepare(model, (X,), costs="roofline").captured
    ops, turn = captured.graph.ops, captured.turn(plan.sequence)
    write = next(op for op in ops if op.name.startswith("slice_scatter"))
    reader = next(op.name for op in ops if write.outputs[0] in op.inputs and op.phase == "forward")
    sequence = list(plan.sequence)
    sequence[turn + 1 : turn + 1] = [write.name, reader]
    applied(model, step := step_of(plan, captured, captured.steps(sequence), turn))
    assert any(segment.overwrites for segment in step.program.segments)
    for net in (model, twin):
        loss = net(X)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(gradients(model), gradients(twin))
