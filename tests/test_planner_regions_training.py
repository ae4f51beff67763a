"""Ways of training a model in regions: each with a plan and without one, to the bit, within the budget."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.measure import StorageMeter
from tests import tiny
from tests.hf import FAST
from tests.ranks import Block

See = Callable[..., None]
Way = Callable[[nn.Module, See], None]


class Branches(nn.Module):
    """Two layers with a look at a value between them: logits (rows, 4) and a score (rows, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64)
        self.a, self.b, self.drop = nn.Linear(64, 4), nn.Linear(64, 1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        if h.abs().max().item() > 2:
            h = -h
        h = self.drop(torch.tanh(self.second(h)))
        return self.a(h), self.b(h)


def _x(rows: int = 32) -> Tensor:
    return torch.randn(rows, 8)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    a, b = model(x)
    return a.square().mean() + b.abs().mean()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.05, momentum=0.9)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, see: See) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    see(loss)


WAYS: list[Way] = []


def way(function: Way) -> Way:
    """One of the ways that train as without a plan."""
    WAYS.append(function)
    return function


@way
def gradients_accumulated(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for k in range(10):
        (_loss(model, _x()) / 2).backward()
        if k % 2:
            see(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=k < 6)


@way
def several_calls_before_one_backward(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for _ in range(4):
        _step(optimizer, _loss(model, _x()) + _loss(model, _x()), see)


@way
def sizes_that_change_and_come_back(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for rows in (32, 8, 32, 8, 48, 16, 48, 1):
        _step(optimizer, _loss(model, _x(rows)), see)


@way
def parts_frozen_and_thawed(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for k in range(8):
        model.first.requires_grad_(k % 4 < 2)
        _step(optimizer, _loss(model, _x()), see)


@way
def two_backwards_and_a_kept_graph(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for _ in range(4):
        a, b = model(_x())
        optimizer.zero_grad()
        a.square().mean().backward(retain_graph=True)
        (b.abs().mean() + a.mean()).backward()
        optimizer.step()
        see(a, b)


@way
def one_head_and_then_the_other(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for k in range(6):
        _step(optimizer, model(_x())[k % 2].square().mean(), see)


@way
def steps_that_break_off(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    for k in range(8):
        loss = _loss(model, _x())
        hook = model.first.weight.register_hook(interrupt) if k in (1, 5) else None
        try:
            if k != 3:  # left out, as where the loss is not finite
                _step(optimizer, loss, see)
        except KeyboardInterrupt:
            see(loss)
        if hook is not None:
            hook.remove()


@way
def looks_between_steps_and_outputs_that_stay(model: nn.Module, see: See) -> None:
    optimizer, kept = _sgd(model), []
    for _ in range(5):
        kept.append(model(_x()))  # with its graph
        _step(optimizer, _loss(model, _x()), see)
        with torch.no_grad():
            see(*model.eval()(_x()))
        model.train()


@way
def gradients_asked_for_by_name(model: nn.Module, see: See) -> None:
    parameters = list(model.parameters())
    for _ in range(5):
        found = torch.autograd.grad(_loss(model, _x()), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                p.sub_(0.05 * g)


@way
def half_precision_with_a_scaler(model: nn.Module, see: See) -> None:
    optimizer, scaler = _sgd(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, _x())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        see(loss)


@way
def micro_batches_under_autocast(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    for k in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, _x()) / 2
        loss.backward()
        if k % 2:
            optimizer.step()
            optimizer.zero_grad()
            see(loss)


@way
def compiled_by_its_user_in_between(model: nn.Module, see: See) -> None:
    optimizer = _sgd(model)
    compiled = torch.compile(model, backend="eager")
    for k in range(8):
        _step(optimizer, _loss(compiled if k in (0, 4, 5) else model, _x()), see)


@way
def a_layer_replaced_and_weights_assigned(model: nn.Module, see: See) -> None:
    for k in range(8):
        if k == 3:
            model.a = nn.Linear(64, 4)
        if k == 5:
            model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
        _step(_sgd(model), _loss(model, _x()), see)


@way
def an_optimizer_in_hooks(model: nn.Module, see: See) -> None:
    def use(p: Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.sub_(0.05 * p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(use)
    for _ in range(5):
        loss = _loss(model, _x())
        loss.backward()
        see(loss)


def _run(trained: Way, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    seen: list[Tensor] = []
    trained(model, lambda *values: seen.extend(v.detach().clone() for v in values))
    state = {f"seen {k}": value for k, value in enumerate(seen)}
    return state | {**model.state_dict(), "random": torch.get_rng_state()}


def _enable(model: nn.Module, budget_gb: float = 1.0, **options: Any) -> nn.Module:
    options = {**FAST, "solver": "recompute_all", **options}
    return planner.enable(model, budget_gb, **options, capture="regions", now=True)


@pytest.mark.parametrize("trained", WAYS, ids=lambda way: way.__name__)
def test_trains_bit_for_bit_as_without_a_plan(trained: Way) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branches()
        twin = copy.deepcopy(model)
        _enable(model)
        tiny.assert_same_bits(_run(trained, model), _run(trained, twin))
    plan = planner.plan_of(model)
    assert plan is not None and plan.overhead > 0
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def _peak(model: nn.Module, x: Tensor) -> int:
    optimizer = _sgd(model)
    optimizer.zero_grad()
    with StorageMeter() as meter:
        meter.register(*model.parameters(), x)
        _loss(model, x).backward()
    return meter.peak_bytes


def test_the_first_step_and_those_planned_keep_the_budget() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(24))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x, x * 2

    model, x = Deep(), _x(256)
    budget = 0.6 * _peak(copy.deepcopy(model), x)
    _enable(model, budget / 1e9, solver="auto")
    assert _peak(model, x) <= budget  # the one that is looked at
    for _ in range(2):
        model.zero_grad()
        _loss(model, x).backward()
    assert _peak(model, x) <= budget
    plan = planner.plan_of(model)
    assert plan is not None and plan.peak_bytes <= budget


def test_kinds_of_steps_have_plans_of_their_own_which_stay() -> None:
    model = Branches()
    _enable(model)
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for k in range(8):
        if k % 2 == 0:
            model.zero_grad()
        _loss(model, _x()).backward()
        if k > 4:
            seen[bool(k % 2)].add(id(planner.plan_of(model)))
    fresh, added = seen[False], seen[True]
    assert len(fresh) == len(added) == 1 and fresh != added


def test_a_budget_that_no_step_fits_is_refused_until_the_batch_is_smaller() -> None:
    model = Branches()
    _enable(model, _peak(copy.deepcopy(model), _x(64)) * 0.75 / 1e9, solver="auto")

    def train(rows: int) -> None:
        for _ in range(4):
            model.zero_grad()
            _loss(model, _x(rows)).backward()

    for _ in range(2):  # and again, at once
        with pytest.raises(InfeasibleBudgetError, match=r"least budget.*smaller.*out of memory"):
            train(512)
    train(16)
    assert planner.plan_of(model) is not None


def test_a_second_derivative_from_the_first_step_on_keeps_its_bits(caplog: pytest.LogCaptureFixture) -> None:
    def trained(model: nn.Module, see: See) -> None:
        optimizer = _sgd(model)
        for _ in range(5):
            x = _x().requires_grad_()
            loss = _loss(model, x)
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            _step(optimizer, loss + g.square().sum(), see)

    with torch.random.fork_rng(), caplog.at_level(logging.WARNING):
        model = Branches()
        twin = copy.deepcopy(model)
        _enable(model)
        tiny.assert_same_bits(_run(trained, model), _run(trained, twin))
    assert "for a gradient of it is differentiated itself" in caplog.text


class Twice(nn.Module):
    """One layer in two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        if x.abs().max().item() > 1e4:
            x = x / 2
        return self.layer(x).float().pow(2).mean()


def test_what_trains_without_a_plan_is_told_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with torch.random.fork_rng(), caplog.at_level(logging.WARNING):
        model = Twice()
        planner.enable(model, 1.0, capture="regions", costs="roofline", time_limit_s=1, now=True)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(8, 16))
            loss.backward()
    assert "a weight that autocast casts once" in caplog.text
    assert "differentiated" not in caplog.text and "no piece of its forward" not in caplog.text


def test_a_second_derivative_that_comes_later_is_refused_and_the_next_one_is_eager() -> None:
    model = Branches()
    _enable(model)
    for _ in range(3):
        _loss(model, _x()).backward()
    with pytest.raises(PlannerError, match=r"create_graph=True.*planner\.disable\(model\)"):
        torch.autograd.grad(_loss(model, _x()), list(model.parameters()), create_graph=True)
    for _ in range(2):  # region by region
        try:
            torch.autograd.grad(_loss(model, _x()), list(model.parameters()), create_graph=True)
        except PlannerError:
            continue


def test_copies_plan_for_themselves_and_disabling_gives_the_forward_back() -> None:
    model = Branches()
    _enable(model)
    for _ in range(4):
        _loss(model, _x()).backward()
    twin = copy.deepcopy(model)
    planner.disable(model)
    assert planner.plan_of(model) is None and "forward" not in vars(model)
    assert planner.plan_of(twin) is None
    for _ in range(4):
        _loss(twin, _x()).backward()
    assert planner.plan_of(twin) is not None


def test_a_part_of_another_model_is_planned_by_itself() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inner, self.behind = nn.Linear(8, 8), Branches(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.inner(torch.tanh(self.before(x)))
            return self.behind(a), b

    def trained(model: nn.Module, see: See) -> None:
        optimizer = _sgd(model)
        for _ in range(4):
            _step(optimizer, _loss(model, _x()), see)

    with torch.random.fork_rng():
        model = Outer()
        twin = copy.deepcopy(model)
        _enable(model.inner)
        tiny.assert_same_bits(_run(trained, model), _run(trained, twin))
    plan = planner.plan_of(model.inner)
    assert plan is not None and plan.overhead > 0


def test_pictures_of_listed_sizes_before_a_language_model() -> None:
    class Sees(nn.Module):
        """Patches of as many pictures as a grid lists, each attended to by itself, put among the words."""

        def __init__(self) -> None:
            super().__init__()
            self.eye = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.words = nn.Embedding(12, 16)
            self.blocks = nn.Sequential(*(Block(16) for _ in range(3)))

        def forward(self, ids: Tensor, patches: Tensor, grid: Tensor) -> Tensor:
            parts = patches.split([high * wide for high, wide in grid.tolist()])
            seen = torch.cat([self.eye(part[None])[0] for part in parts])
            h = self.words(ids)
            h = h.masked_scatter((ids == 11)[..., None], seen)
            return self.blocks(h).square().mean()

    grid = torch.tensor([[2, 3], [1, 2]])
    ids = torch.randint(0, 11, (2, 48))
    ids[0, :6], ids[1, :2] = 11, 11
    batch = ids, torch.randn(8, 16), grid

    def trained(model: nn.Module, see: See) -> None:
        optimizer = _sgd(model)
        for _ in range(5):
            _step(optimizer, model(*batch), see)
        with StorageMeter() as meter:
            meter.register(*model.parameters(), *(p.grad for p in model.parameters()), *batch)
            model(*batch).backward()
        peaks.append(meter.peak_bytes)

    peaks: list[int] = []
    with torch.random.fork_rng():
        model = Sees()
        twin = copy.deepcopy(model)
        want = _run(trained, twin)
        budget = int(0.95 * peaks.pop())
        _enable(model, budget / 1e9, solver="greedy")
        tiny.assert_same_bits(_run(trained, model), want)
    plan = planner.plan_of(model)
    assert plan is not None and sum(region.memory_share for region in plan.regions) > 0.8
    assert peaks.pop() <= budget


def test_two_models_train_in_two_threads() -> None:
    def trained(model: nn.Module, into: list[Tensor]) -> None:
        optimizer, random = _sgd(model), torch.Generator().manual_seed(1)
        for _ in range(6):
            loss = _loss(model, torch.randn(32, 8, generator=random))
            _step(optimizer, loss, lambda *values: into.extend(v.detach() for v in values))

    models = [Branches(), Branches()]
    for model in models:
        model.drop.p = 0.0  # the random state is the process's
    twins = copy.deepcopy(models)
    wants: list[list[Tensor]] = [[], []]
    gots: list[list[Tensor]] = [[], []]
    for twin, want in zip(twins, wants, strict=True):
        trained(twin, want)
    threads = [Thread(target=trained, args=pair) for pair in zip(map(_enable, models), gots, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(wants, gots, strict=True):
        assert len(got) == 6 and all(map(torch.equal, got, want))


def test_a_mode_that_stays_on_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Branches()
    _enable(model)
    with caplog.at_level(logging.WARNING), StorageMeter():
        for _ in range(6):
            _loss(model, _x()).backward()
    assert "Branches is not planned yet" in caplog.text
    assert planner.plan_of(model) is None
    _loss(model, _x()).backward()
    _loss(model, _x())
    assert planner.plan_of(model) is not None


class LayerDrop(nn.Module):
    """Runs as many of its layers as ``lengths`` says, another number at each step."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(8))
        self.layers, self.lengths = nn.ModuleList(layers), lengths

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.lengths.pop(0)]:
            torch._dynamo.graph_break()
            x = self.run(layer, x)
        return x.square().mean()


def test_a_step_longer_than_any_that_was_planned_keeps_the_budget() -> None:
    """As long as one that was looked at; its first calls cannot know."""
    torch.manual_seed(0)
    lengths = [6, 2, 3, 2, 3, 6, 6]
    plain = LayerDrop(list(lengths))
    model = copy.deepcopy(plain)
    batches = [torch.randn(64, 32) for _ in lengths]
    budget = 0.75 * max(_peak_of(plain, x) for x in batches)
    planner.enable(model, budget / 1e9, now=True, capture="regions", **FAST)
    for k, x in enumerate(batches):
        if lengths[k] < 6 and k < 5:
            model(x).backward()
            model.zero_grad()
        else:
            assert _peak_of(model, x) <= budget, k


def _peak_of(model: nn.Module, x: Tensor) -> int:
    with StorageMeter() as meter:
        meter.register(*model.parameters(), x)
        model(x).backward()
    model.zero_grad()
    return meter.peak_bytes
