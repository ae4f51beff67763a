"""A planned model in a training loop: the bits of eager where eager has an answer, else a clear error."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planner
from planner import PlannerError
from planner.options import Search
from planner.plan import CheckpointedModule
from planner.runtime.forward import planned_forward_of
from planner.solving.priced import prepare
from tests import tiny

INPUTS = tiny.batch(labels=True)
X = INPUTS["x"]


def pair(
    build: Callable[[], nn.Module] = tiny.Mlp, inputs: Any = None, **more: Any
) -> tuple[nn.Module, nn.Module]:
    """A model with its plan applied, and its twin without."""
    model = tiny.seeded(build)
    twin = copy.deepcopy(model)
    tiny.planned(model, INPUTS if inputs is None else inputs, **more).apply(model)
    return model, twin


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) and all(map(torch.equal, a, b))


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_three_optimizer_steps(optimizer: type[torch.optim.Optimizer], rewritten: bool) -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, INPUTS)
    used = plan.rewrite() if rewritten else plan.apply()
    for trained in (used, twin):
        torch.manual_seed(3)
        steps = optimizer(trained.parameters(), lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            trained(**INPUTS).backward()
            steps.step()
    assert_equal(list(model.parameters()), list(twin.parameters()))
    assert not torch.equal(model.last.weight, tiny.seeded(tiny.Mlp).last.weight)


@pytest.mark.parametrize("clear", [True, False])
def test_gradient_accumulation(clear: bool) -> None:
    model, twin = pair()
    for m in (model, twin):
        torch.manual_seed(0)
        m.zero_grad(set_to_none=clear)
        for seed in (1, 2, 3):
            (m(**tiny.batch(seed=seed, labels=True)) / 3).backward()
    assert_equal(gradients(model), gradients(twin))


@pytest.mark.parametrize("told", [False, True])
def test_gradients_that_are_there_and_go_over_the_budget_are_told(
    told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.seeded(
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    )
    inputs = torch.randn(128, 64)
    whole = planner.plan(model, 1, (inputs,), costs="roofline")
    plan = planner.plan(model, 0.8 * whole.peak_bytes / 1e9, (inputs,), costs="roofline") if told else whole
    assert plan.adding_peak_bytes is not None
    assert (plan.adding_peak_bytes > plan.budget_bytes) is told
    plan.apply()
    for _ in range(3):  # no zero_grad between
        model(inputs).square().mean().backward()
    plan.restore()
    lines = [r.getMessage() for r in caplog.records if "are there already" in r.getMessage()]
    assert len(lines) == int(told) and all("of 0.0.weight among them" in line for line in lines)
    counted = planner.plan(model, 1, (inputs,), costs="roofline")
    assert counted.adding_peak_bytes is None  # they are in it
    assert counted.peak_bytes >= whole.adding_peak_bytes


def test_two_forwards_then_two_backwards() -> None:
    model, twin = pair()
    for order in ((0, 1), (1, 0)):
        for m in (model, twin):
            torch.manual_seed(0)
            m.zero_grad()
            losses = [m(**tiny.batch(seed=s, labels=True)) for s in (1, 2)]
            for i in order:
                losses[i].backward()
        assert_equal(gradients(model), gradients(twin))


def test_one_backward_through_two_forwards() -> None:
    model, twin = pair()
    for m in (model, twin):
        torch.manual_seed(0)
        sum(m(**tiny.batch(seed=s, labels=True)) for s in (1, 2)).backward()
    assert_equal(gradients(model), gradients(twin))


def test_the_output_goes_on_into_another_graph() -> None:
    model, twin = pair(inputs=(X,))
    head = tiny.seeded(lambda: nn.Linear(4, 2))
    for m in (model, twin):
        torch.manual_seed(0)
        head(m(X)).square().mean().backward()
    assert_equal(gradients(model), gradients(twin))


def test_a_planned_part_of_a_larger_model() -> None:
    whole = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 8), tiny.Mlp(), nn.Linear(4, 2)))
    twin = copy.deepcopy(whole)
    tiny.planned(whole[1], (whole[0](X),)).apply(whole[1])
    for m in (whole, twin):
        torch.manual_seed(0)
        m(X).square().mean().backward()
    assert_equal(gradients(whole), gradients(twin))


def test_a_gradient_of_another_networks_output_goes_on_as_it_is_laid_out(tmp_path: Path) -> None:
    """What stands before adds up by that; a plan on disk knows of it too."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm = nn.Linear(16, 16), nn.LSTM(16, 16)
            self.up = nn.Sequential(nn.ELU(), nn.ConvTranspose1d(16, 8, 8, 4))

        def before(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return (self.lstm(h)[0] + h).permute(1, 2, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.before(x))

    x = torch.randn(100, 2, 16, generator=torch.Generator().manual_seed(0))
    whole = tiny.seeded(Whole)
    twin = copy.deepcopy(whole)
    plan = tiny.planned(whole.up, (whole.before(x),))
    plan.save(tmp_path / "plan.json")
    for made in (plan, planner.load(tmp_path / "plan.json")):
        made.apply(whole.up)
        for m in (whole, twin):
            m.zero_grad()
            m(x).square().mean().backward()
        assert_equal(gradients(whole), gradients(twin))
        made.restore(whole.up)


# -- what autograd may be asked -------------------------------------------------------------------


def test_autograd_grad() -> None:
    model, twin = pair()
    got, want = [], []
    for m, out in ((model, got), (twin, want)):
        torch.manual_seed(0)
        out += torch.autograd.grad(m(**INPUTS), list(m.parameters()))
    assert_equal(got, want)
    for name in ("last.weight", "first.weight"):
        torch.manual_seed(0)
        (g,) = torch.autograd.grad(model(**INPUTS), [model.get_parameter(name)])
        assert torch.equal(g, want[[n for n, _ in model.named_parameters()].index(name)])


def test_a_second_backward_is_refused() -> None:
    model, _ = pair()
    loss = model(**INPUTS)
    loss.backward()
    before = gradients(model)
    with pytest.raises(PlannerError, match=r"second backward.*Run the forward again.*retain_graph=True"):
        loss.backward()
    assert_equal(gradients(model), before)
    model(**INPUTS).backward()


def test_a_second_derivative_is_refused() -> None:
    model, _ = pair()
    with pytest.raises(PlannerError, match=r"no second derivative.*create_graph=True.*plan\.restore"):
        torch.autograd.grad(model(**INPUTS), list(model.parameters()), create_graph=True)
    model(**INPUTS).backward()


def test_a_gradient_for_an_output_that_a_plan_from_a_file_does_not_serve(tmp_path: Path) -> None:
    model, inputs = tiny.seeded(tiny.bert), tiny.bert_batch()
    tiny.planned(model, inputs).save(tmp_path / "plan.json")
    planner.load(tmp_path / "plan.json").apply(model)
    with pytest.raises(
        PlannerError, match=r"arrived for output.*logits.*differentiates output.*loss.*loss_fn"
    ):
        model(**inputs).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model(**inputs).loss.backward()


def test_an_output_modified_in_place() -> None:
    class Sine(tiny.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin()  # the backward needs its input, not its output

    class Exp(tiny.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).exp()

    model, twin = pair(Sine, (X,))
    for m in (model, twin):
        torch.manual_seed(0)
        m(X).mul_(2).sum().backward()
    assert_equal(gradients(model), gradients(twin))
    for m in pair(Exp, (X,)):
        out = m(X)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_parameter_changed_between_forward_and_backward() -> None:
    for m in pair():
        loss = m(**INPUTS)
        with torch.no_grad():
            m.last.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_changed_between_forward_and_backward() -> None:
    for m in pair(inputs=(X.clone(),)):
        x = X.clone()
        out = m(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_the_step_and_no_collector_is_needed(run_backward: bool) -> None:
    model, _ = pair(lambda: tiny.blocks(4), (torch.randn(64, 32),))
    model(torch.randn(64, 32)).sum().backward()  # what is made once
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(64, 32)
        out = model(x)
        kept = [weakref.ref(t.untyped_storage()) for t in (x, out)]
        kept.append(weakref.ref(out.grad_fn.call))
        if run_backward:
            out.sum().backward()
        del x, out
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


def test_an_exception_in_the_backward_leaves_the_model_usable() -> None:
    model, twin = pair()

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt

    handle = model.second.weight.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**INPUTS).backward()
    handle.remove()
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))


def test_an_exception_in_the_forward_leaves_the_generator_and_the_model_usable() -> None:
    model, twin = pair()
    with pytest.raises(PlannerError):
        model(x=X[:3], labels=INPUTS["labels"][:3])
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))


# -- the original forward -------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_original_runs(context: Callable[[], Any]) -> None:
    model, twin = pair()
    for rows in (32, 5):  # any size
        with context():
            torch.manual_seed(0)
            got = model(X[:rows])
            torch.manual_seed(0)
            assert torch.equal(got, twin(X[:rows]))


def test_in_evaluation_the_original_runs_and_training_resumes() -> None:
    model, twin = pair()
    model.eval(), twin.eval()
    assert torch.equal(model(X[:5]), twin(X[:5]))
    tiny.assert_same_bits(*(tiny.run(m, tiny.batch(5, labels=True)) for m in (model, twin)))
    model.train(), twin.train()
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))


@pytest.mark.parametrize("rewritten", [False, True])
def test_torch_compile_compiles_the_original(rewritten: bool) -> None:
    model = tiny.seeded(lambda: tiny.Mlp(p=0.0))
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, INPUTS)
    used = plan.rewrite() if rewritten else plan.apply()
    torch._dynamo.reset()
    compiled = torch.compile(used, backend="aot_eager")
    compiled(**INPUTS).backward()
    twin(**INPUTS).backward()
    for a, b in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(a, b)


# -- applying and undoing -------------------------------------------------------------------------


def test_apply_twice_and_restore_twice() -> None:
    model = tiny.seeded(tiny.Mlp)
    before = dict(vars(model))
    plan = tiny.planned(model, INPUTS)
    assert plan.apply() is model and planned_forward_of(model) is not None
    applied = vars(model)["forward"]
    plan.apply()
    assert vars(model)["forward"] is applied
    assert plan.restore() is model and dict(vars(model)) == before
    plan.restore()
    assert dict(vars(model)) == before


def test_another_plan_over_it() -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    prepared = prepare(model, INPUTS, costs="roofline")
    first, second = (prepared.plan_bytes(10**9, search=Search(s)) for s in ("keep_all", "recompute_all"))
    first.apply()
    second.apply()
    assert planned_forward_of(model).step.program is second.rewrite().program
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))
    first.restore()  # whichever was applied
    assert "forward" not in vars(model)


def test_planning_a_planned_model_again() -> None:
    model, twin = pair()
    for loss_fn in (None, lambda loss: loss * 2):
        again = tiny.planned(model, INPUTS, loss_fn, solver="sqrt")
        again.apply()
        loss_of = loss_fn or (lambda loss: loss)
        tiny.assert_same_bits(tiny.run(model, INPUTS, loss_of), tiny.run(twin, INPUTS, loss_of))
    again.restore()
    assert "forward" not in vars(model)


def test_a_forward_that_was_set_on_the_instance_comes_back() -> None:
    model = tiny.seeded(tiny.Mlp)
    original = model.forward

    def doubled(x: Tensor) -> Tensor:
        return 2 * original(x)

    model.forward = doubled  # type: ignore[method-assign]
    twin = tiny.seeded(tiny.Mlp)
    plan = tiny.planned(model, (X,))
    plan.apply()
    torch.manual_seed(0)
    got = model(X)
    torch.manual_seed(0)
    assert torch.equal(got, 2 * twin(X))
    plan.restore()
    assert model.forward is doubled


def test_the_signature_stays_the_models_own() -> None:
    # transformers' Trainer reads it to drop columns
    model, twin = pair(tiny.bert, tiny.bert_batch())
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)


def test_verify_leaves_an_applied_plan_applied() -> None:
    model = tiny.seeded(tiny.Mlp)
    plan = tiny.planned(model, INPUTS)
    assert plan.verify().ok and "forward" not in vars(model)
    plan.apply()
    applied = vars(model)["forward"]
    assert plan.verify().ok and vars(model)["forward"] is applied


# -- copies and state -----------------------------------------------------------------------------


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_deep_copy_trains_by_itself(rewritten: bool) -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, INPUTS)
    used = plan.rewrite() if rewritten else plan.apply()
    copied = copy.deepcopy(used)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        model.last.weight.zero_()
    tiny.assert_same_bits(
        {k: v for k, v in tiny.run(copied, INPUTS).items() if "kind" not in k},
        {k: v for k, v in tiny.run(twin, INPUTS).items() if "kind" not in k},
    )
    assert all(p.grad is None for p in model.parameters())
    plan.restore(copied)
    copied(**tiny.batch(5, labels=True)) if not rewritten else None


def test_a_copy_of_a_model_that_holds_a_planned_one() -> None:
    whole = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 8), tiny.Mlp()))
    tiny.planned(whole[1], (whole[0](X),)).apply(whole[1])
    copied = copy.deepcopy(whole)
    assert planned_forward_of(copied[1]).model is copied[1]
    torch.manual_seed(0)
    whole(X).sum().backward()
    torch.manual_seed(0)
    copied(X).sum().backward()
    assert_equal(gradients(whole), gradients(copied))


@pytest.mark.parametrize("rewritten", [False, True])
def test_pickle_says_what_to_save_instead(rewritten: bool) -> None:
    plan = tiny.planned(tiny.seeded(tiny.Mlp), INPUTS)
    used = plan.rewrite() if rewritten else plan.apply()
    with pytest.raises(PlannerError, match=r"cannot be pickled.*state_dict.*plan\.save"):
        pickle.dumps(used)
    plan.restore()
    pickle.loads(pickle.dumps(plan._model(None, "restore")))


@pytest.mark.parametrize("rewritten", [False, True])
def test_state_dicts_go_both_ways(rewritten: bool) -> None:
    model = tiny.seeded(tiny.Mlp)
    plan = tiny.planned(model, INPUTS)
    keys = list(model.state_dict())
    used = plan.rewrite() if rewritten else plan.apply()
    assert list(used.state_dict()) == keys
    other = tiny.seeded(tiny.Mlp, seed=9)
    used.load_state_dict(other.state_dict())
    other.load_state_dict(used.state_dict())
    tiny.assert_same_bits(
        {k: v for k, v in tiny.run(used, INPUTS).items() if "kind" not in k},
        {k: v for k, v in tiny.run(other, INPUTS).items() if "kind" not in k},
    )


def test_a_rewritten_module_shares_what_it_was_made_from() -> None:
    model = tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
    module = tiny.planned(model, (X,)).rewrite()
    assert isinstance(module, CheckpointedModule) and isinstance(module, torch.fx.GraphModule)
    named = dict(model.named_parameters())
    assert dict(module.named_parameters()).keys() == named.keys()
    assert all(p is named[n] for n, p in module.named_parameters())
    assert all(b is model.get_buffer(n) for n, b in module.named_buffers())
    assert "_recomputed" in module.code and "def forward" in module.code
    module(X).sum().backward()
    assert int(model[1].num_batches_tracked) == 1
    module.eval()
    assert not model[1].training
    module(X)
    assert int(model[1].num_batches_tracked) == 1


def test_a_change_of_dtype_asks_for_a_new_plan_and_gets_one() -> None:
    model = tiny.seeded(tiny.Mlp)
    plan = tiny.planned(model, (X,))
    plan.apply()
    model.to(torch.float64)
    with pytest.raises(PlannerError, match=r"float32.*float64|float64.*float32"):
        model(X.double())
    plan.restore()
    tiny.assert_steps_equal(model, (X.double(),))


def test_a_hugging_face_model_saves_and_loads(tmp_path: Any) -> None:
    model, twin = pair(tiny.bert, tiny.bert_batch())
    read = []  # the twin from a file too: a file's tensors may lie elsewhere than a vector needs them
    for name, saved in (("planned", model), ("plain", twin)):
        saved.save_pretrained(tmp_path / name)
        read.append(type(twin).from_pretrained(tmp_path / name).train())
    tiny.assert_same_bits(*(tiny.run(loaded, tiny.bert_batch()) for loaded in read))
