"""What cannot be planned says so: the thing, the numbers, the next step; and nothing is left half-applied."""

from __future__ import annotations

import copy
import os
import re
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.traceback as fx_traceback
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

import planner
from planner import InfeasibleBudgetError, PlannerError, StalePlanError, TraceError
from planner.errors import TESTED_TORCH, of_unknown_torch
from planner.solving.priced import prepare
from planner.units import bytes_text
from tests import tiny

X = tiny.batch()["x"]


def quick(model: nn.Module, budget_gb: Any = 1.0, inputs: object = None, **more: Any) -> planner.Plan:
    return planner.plan(model, budget_gb, inputs, **{"costs": "roofline", "solver": "greedy"} | more)


def mlp() -> nn.Module:
    return tiny.seeded(tiny.Mlp)


@contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside leaves the model, torch's switches and the environment as they were."""

    def state() -> tuple[Any, ...]:
        hooks = nn.modules.module
        return (
            {name: (m, dict(vars(m)), m.training) for name, m in model.named_modules()},
            {n: (t, t._version, t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()},
            dict(os.environ),
            torch.get_rng_state().tolist(),
            torch.compiler.is_compiling(),
            torch.compiler.is_exporting(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_anomaly_enabled(),
            dict(vars(checkpointing)),
            dict(vars(checkpointing.CheckpointFunction)),
            checkpointing.CheckpointFunction.apply,
            dict(hooks._global_forward_hooks),
            dict(hooks._global_forward_pre_hooks),
        )

    before = state()
    yield
    for was, now in zip(before, state(), strict=True):
        assert was == now


def refused(
    error: type[Exception], model: nn.Module, inputs: object, *parts: str, **more: Any
) -> pytest.ExceptionInfo[Exception]:
    """``planner.plan`` raises ``error`` whose message holds every part, and leaves no trace."""
    with nothing_changes(model), pytest.raises(error) as caught:
        quick(model, inputs=inputs, capture="one graph", **more)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"
    assert "forward" not in vars(model)
    return caught


# -- budget and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, float("nan"), float("inf"), -float("inf"), 1e-12])
def test_budget_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget_gb.*(positive|finite|less than a byte)"):
        quick(mlp(), budget, (X,))


@pytest.mark.parametrize("budget", ["8", "8GB", True, None, [8], torch.tensor(8.0), 8j])
def test_budget_that_is_no_number(budget: object) -> None:
    with pytest.raises(TypeError, match=r"budget_gb must be a number of gigabytes such as 8"):
        quick(mlp(), budget, (X,))


def test_budget_below_the_least_names_the_least_and_what_fills_it() -> None:
    model, inputs = tiny.seeded(lambda: tiny.blocks(2)), (torch.randn(64, 32),)
    prepared = prepare(model, inputs, costs="roofline")
    with pytest.raises(InfeasibleBudgetError) as caught:
        prepared.plan_bytes(1000)
    error = caught.value
    assert error.budget_bytes == 1000 and error.floor_bytes <= error.minimum_bytes
    assert sum(error.breakdown.values()) == error.minimum_bytes
    resident = sum(p.nbytes for p in model.parameters())
    assert error.breakdown["parameters"] == resident
    message = str(error)
    (said,) = re.findall(r"The least budget with a plan is ([0-9.]+) GB", message)
    assert error.minimum_bytes <= float(said) * 1e9 < error.minimum_bytes + 1001 and "Sequential" in message
    assert "1e-06 GB" in message and f"parameters {bytes_text(resident)}" in message
    assert "Raise the budget" in message

    plan = prepared.plan_bytes(error.minimum_bytes)
    assert plan.peak_bytes <= error.minimum_bytes == plan.minimum_peak_bytes
    report = plan.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    with pytest.raises(InfeasibleBudgetError):
        prepared.plan_bytes(error.floor_bytes - 1)


def test_a_budget_that_only_the_optimizer_exceeds() -> None:
    model = tiny.seeded(lambda: nn.Linear(256, 256))
    with pytest.raises(InfeasibleBudgetError) as caught:
        quick(model, 4 * 256 * 256 * 3 / 1e9, (torch.randn(1, 256),), optimizer=torch.optim.AdamW)
    assert caught.value.breakdown["optimizer_state"] >= 2 * 4 * 256 * 256
    assert sum(caught.value.breakdown.values()) == caught.value.minimum_bytes


def test_the_message_can_be_used_as_the_next_budget() -> None:
    model, inputs = mlp(), tiny.batch(labels=True)
    with pytest.raises(InfeasibleBudgetError) as caught:
        quick(model, 1e-6, inputs, solver="auto")
    (named,) = re.findall(r"least budget with a plan is (\S+) GB", str(caught.value))
    assert quick(model, float(named), inputs, solver="auto").peak_bytes <= round(float(named) * 1e9)


def test_unknown_names_list_the_known() -> None:
    refused(ValueError, mlp(), (X,), "'magic'", "greedy", solver="magic")
    refused(ValueError, mlp(), (X,), "'free'", "profile", "roofline", costs="free")


def test_time_limit_that_makes_no_sense() -> None:
    for limit in (-0.5, -1, float("nan")):
        refused(ValueError, mlp(), (X,), "time_limit_s", time_limit_s=limit)


def test_dynamic_names_what_is_there() -> None:
    refused(ValueError, mlp(), (X,), "'y'", "inputs", dynamic={"y": (0,)})
    refused(ValueError, mlp(), (X,), "dimension 7", dynamic={0: (7,)})
    refused(ValueError, mlp(), (X,), "on_larger", "'replan'", dynamic=True, on_larger="grow")


# -- inputs ---------------------------------------------------------------------------------------


def test_missing_inputs() -> None:
    refused(TypeError, mlp(), None, "Mlp", r"inputs=\(x, \.\.\.\)")


def test_a_model_may_bring_its_own_inputs() -> None:
    model = mlp()
    model.example_input_array = X
    assert quick(model).peak_bytes == quick(mlp(), inputs=(X,)).peak_bytes
    model = mlp()
    model.dummy_inputs = {"x": X}
    assert quick(model).peak_bytes == quick(mlp(), inputs={"x": X}).peak_bytes


def test_inputs_of_wrong_names() -> None:
    refused(TypeError, mlp(), {"pixels": X}, r"Mlp\.forward", "'?(pixels|x)'?", r"\(x, labels\)")
    refused(TypeError, mlp(), (X, None, X), r"Mlp\.forward", "too many positional")
    refused(TypeError, mlp(), {"labels": X}, r"missing a required argument: 'x'")


def test_inputs_of_a_wrong_type() -> None:
    refused(TypeError, mlp(), 3, "inputs is a int", "tuple", "dict")
    refused(TypeError, mlp(), "x", "inputs is a str")


def test_inputs_of_a_wrong_shape_name_the_line_that_failed() -> None:
    refused(TraceError, mlp(), (torch.randn(4, 9),), "Mlp", r"tiny\.py:\d+ \(h = F\.gelu", r"\[4, 9\]")
    refused(TraceError, mlp(), ("text",), "Mlp", r"tiny\.py:\d+")


def test_inputs_on_another_device() -> None:
    refused(TraceError, mlp(), (torch.empty(4, 8, device="meta"),), "meta and cpu. Move the inputs")


def test_any_mapping_is_a_set_of_keywords() -> None:
    from transformers import BatchEncoding

    want = quick(mlp(), inputs=tiny.batch(labels=True))
    for wrapped in (BatchEncoding(tiny.batch(labels=True)), UserDict(tiny.batch(labels=True))):
        model = mlp()
        plan = quick(model, inputs=wrapped)
        assert plan.peak_bytes == want.peak_bytes
        assert plan.verify(inputs=wrapped).equal
        plan.apply()
        model(**wrapped).backward()


# -- models ---------------------------------------------------------------------------------------


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not <function"):
        quick(lambda x: x, inputs=(X,))  # type: ignore[arg-type]


def test_nothing_to_train() -> None:
    refused(PlannerError, mlp().requires_grad_(False), (X,), "Mlp has no trainable parameter", "all 8")
    refused(PlannerError, nn.ReLU(), (X,), "ReLU has no trainable parameter")


class Body(nn.Module):
    """``body(self, h)`` after one linear layer."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.first(x))


def test_no_gradient_reaches_the_outputs() -> None:
    refused(PlannerError, Body(lambda self, h: h.detach()), (X,), "no gradient reaches", "output", "loss_fn")
    refused(PlannerError, Body(lambda self, h: h.argmax(-1)), (X,), "no gradient reaches")


def test_a_model_under_no_grad() -> None:
    with torch.no_grad():
        plan = quick(mlp(), inputs=(X,))
    assert plan.verify().equal


def test_loss_function_that_is_no_loss() -> None:
    refused(PlannerError, mlp(), (X,), "scalar", r"\(32, 4\)", loss_fn=lambda out: out)
    refused(PlannerError, mlp(), (X,), "scalar", "float", loss_fn=lambda out: 1.0)
    refused(PlannerError, mlp(), (X,), "does not depend", loss_fn=lambda out: torch.tensor(1.0))
    refused(PlannerError, mlp(), (X,), "does not depend", loss_fn=lambda out: out.detach().sum())


def test_loss_function_that_fails_is_named() -> None:
    def loss_fn(out: Tensor) -> Tensor:
        return out.logits.sum()

    refused(TraceError, mlp(), (X,), r"test_planner_errors\.py:\d+ \(return out\.logits", loss_fn=loss_fn)


def _if(self: Any, h: Tensor) -> Tensor:
    if h.sum() > 0:
        return h
    return -h


def _item(self: Any, h: Tensor) -> Tensor:
    return h * h.max().item()


def _nonzero(self: Any, h: Tensor) -> Tensor:
    rows = (h > 0).nonzero()
    return h * rows.sum()


def _mask(self: Any, h: Tensor) -> Tensor:
    return h[h > 0]


def _unique(self: Any, h: Tensor) -> Tensor:
    return h * h.unique().sum()


def _numpy(self: Any, h: Tensor) -> Tensor:
    return h * float(h.detach().numpy().max())


def _while(self: Any, h: Tensor) -> Tensor:
    while bool((h.abs() > 1e3).any()):
        h = h / 2
    return h


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (_if, r"if h\.sum\(\) > 0:"),
        (_item, r"return h \* h\.max\(\)\.item\(\)"),
        (_nonzero, r"rows = \(h > 0\)\.nonzero\(\)"),
        (_mask, r"return h\[h > 0\]"),
        (_unique, r"return h \* h\.unique\(\)"),
        (_while, r"while bool\("),
    ],
)
def test_control_flow_by_values_is_named_by_file_line_and_code(body: Any, line: str) -> None:
    start = body.__code__.co_firstlineno
    caught = refused(TraceError, Body(body), (X,), line, "value of a tensor", r"torch\.where")
    (at,) = re.findall(r"test_planner_errors\.py:(\d+)", str(caught.value))
    assert start < int(at) <= start + 4
    # The same after a good trace, and a good trace after it.
    quick(mlp(), inputs=(X,))


class Counted(nn.Module):
    """Its way hangs on numbers that it holds, or is given."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("held", held)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        number = self.held if given is None else given
        return self.linear(x) * 2 if number.item() > 2 else self.linear(x)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32])
def test_a_number_of_this_batch_is_none_of_every_batch(dtype: torch.dtype, is_given: bool) -> None:
    """Torch 2.14 and later note the values of whole and of double numbers with what stands in for them."""
    number = torch.tensor(3, dtype=dtype)
    inputs = (X, number) if is_given else (X,)
    refused(TraceError, Counted(number.clone()), inputs, r"if number\.item\(\) > 2", "value of a tensor")


@pytest.mark.parametrize("capture", ["one graph", "regions", "auto"])
def test_a_torch_without_a_name_that_is_private_in_it(monkeypatch: pytest.MonkeyPatch, capture: Any) -> None:
    """Is what is told, and no place in the model."""
    monkeypatch.delattr(proxy_tensor, "snapshot_fake")
    with pytest.raises(PlannerError) as caught:
        quick(mlp(), inputs=(X,), capture=capture)
    said = str(caught.value)
    assert f"torch {torch.__version__} is none" in said and "snapshot_fake" in said
    assert all(version in said for version in TESTED_TORCH)
    assert "trace cannot follow" not in said


def test_only_what_the_folder_for_private_names_raises_is_about_the_torch() -> None:
    def raised(line: str, file: str) -> BaseException:
        with pytest.raises((AttributeError, ImportError, TypeError)) as caught:
            exec(compile(line, str(Path(planner.__file__).parent / file), "exec"), {"torch": torch})
        return caught.value

    for line in (
        "torch.nothing",
        "torch.ops.aten.nothing",
        "from torch.fx import nothing",
        "import torch.nothing",
        "import importlib; importlib.import_module('torch.nothing')",
        "torch.autograd.graph.get_gradient_edge(nothing=1)",
    ):
        assert "nothing" in str(of_unknown_torch(raised(line, "_compat/one.py")))
        assert of_unknown_torch(raised(line, "capture/one.py")) is None
    for line in ("import nothing_of_torch", "torch.nn.Linear(2, 'nothing')"):
        assert of_unknown_torch(raised(line, "_compat/one.py")) is None
    refused(TraceError, Body(lambda self, h: h.nothing), (X,), r"test_planner_errors\.py:\d+ ", "nothing")


def test_what_leaves_torch_is_named() -> None:
    refused(TraceError, Body(_numpy), (X,), r"test_planner_errors\.py:\d+ \(return h \* float")


def test_an_object_that_no_graph_can_carry() -> None:
    refused(TraceError, Body(lambda self, h: (h, object())), (X,), "Body returns a object at", "dataclass")
    refused(PlannerError, Body(lambda self, h: None), (X,), "no gradient reaches", r"\(none\)")


def test_an_input_changed_in_place() -> None:
    class Scales(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    before = X.clone()
    refused(TraceError, Scales(8, 8), (X,), "in place")
    assert torch.equal(before, X)


def test_a_tensor_stored_on_a_module() -> None:
    def stores(self: Any, h: Tensor) -> Tensor:
        self.seen = h
        return h

    def collects(self: Any, h: Tensor) -> Tensor:
        self.all.append(h.detach())
        return h

    def counts(self: Any, h: Tensor) -> Tensor:
        self.calls += 1
        return h

    refused(TraceError, Body(stores), (X,), r"\bseen\b", "buffers")
    model = Body(collects)
    model.all = []
    refused(TraceError, model, (X,), r"\ball\b")
    assert model.all == []
    model = Body(counts)
    model.calls = 7
    refused(TraceError, nn.Sequential(model), (X,), r"0\.calls\b")
    assert model.calls == 7


def test_a_cache_on_a_module_is_put_back() -> None:
    def caches(self: Any, h: Tensor) -> Tensor:
        self.known = "yes"
        return h

    model = Body(caches)
    with nothing_changes(model):
        quick(model, inputs=(X,))
    assert not hasattr(model, "known")


def test_a_buffer_that_changes_its_size() -> None:
    def grows(self: Any, h: Tensor) -> Tensor:
        self.memory = torch.cat([self.memory, h.detach()])
        return h

    model = Body(grows)
    model.register_buffer("memory", torch.zeros(1, 8))
    refused(TraceError, model, (X,), "memory", r"\(1, 8\)", r"\(33, 8\)")


def test_meta_device_and_several_devices() -> None:
    refused(TraceError, nn.Linear(8, 8, device="meta"), (X,), "meta device", "FakeTensorMode")
    mixed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    refused(TraceError, mixed, (X,), "meta")


# -- hooks ----------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> list[Callable[[], Any]]:
    return [
        lambda: module.register_forward_hook(lambda *_: None),
        lambda: module.register_forward_pre_hook(lambda *_: None),
        lambda: module.register_full_backward_hook(lambda *_: None),
        lambda: module.register_full_backward_pre_hook(lambda *_: None),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_hooks_on_submodules(kind: int) -> None:
    model = mlp()
    handle = _hooks(model.second)[kind]()
    refused(PlannerError, model, (X,), "hooks on submodules", r"\(second\)")
    handle.remove()

    plan = quick(model, inputs=(X,))
    plan.apply()
    handle = _hooks(model.second)[kind]()
    with pytest.raises(PlannerError, match=r"second has a hook.*plan\.restore"):
        model(X)
    handle.remove()
    model(X).sum().backward()


def test_hooks_on_the_model_itself_keep_firing() -> None:
    model, fired = mlp(), []
    model.register_forward_pre_hook(lambda m, args: fired.append("before"))
    model.register_forward_hook(lambda m, args, out: out * 2)
    model.register_full_backward_hook(lambda m, gi, go: fired.append("backward"))
    twin = copy.deepcopy(model)
    quick(model, inputs=(X,)).apply()
    tiny.assert_same_bits(tiny.run(model, (X,), steps=1), tiny.run(twin, (X,), steps=1))
    assert fired == ["before", "backward"] * 2


def test_hooks_on_parameters_keep_firing() -> None:
    model, seen = mlp(), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    quick(model, inputs=(X,)).apply()
    model(X).sum().backward()
    assert sorted(seen) == sorted(n for n, _ in model.named_parameters())


# -- models that checkpoint themselves ------------------------------------------------------------


def test_the_hugging_face_flag() -> None:
    model = tiny.seeded(tiny.bert)
    model.gradient_checkpointing_enable()
    refused(
        TraceError, model, tiny.bert_batch(), "already checkpoints itself", "gradient_checkpointing_disable"
    )
    model.gradient_checkpointing_disable()
    quick(model, inputs=tiny.bert_batch())


@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_calls_in_the_forward(reentrant: bool, draws: bool) -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        how = {"use_reentrant": reentrant, "preserve_rng_state": draws}
        return checkpointing.checkpoint(torch.sigmoid, h, **how)

    refused(TraceError, Body(body), (X,), r"already checkpoints itself", r"torch\.utils\.checkpoint")
    x = X.clone().requires_grad_()
    body(None, x).sum().backward()  # still works
    assert x.grad is not None


# -- another model, another input -----------------------------------------------------------------


def _replaced(model: Any) -> None:
    model.second = nn.Linear(16, 16)


def _other_class(model: Any) -> None:
    model.second = nn.Identity()


def _frozen(model: Any) -> None:
    model.norm.weight.requires_grad_(False)


def _halved(model: Any) -> None:
    model.bfloat16()


def _extended(model: Any) -> None:
    model.extra = nn.Linear(2, 2)


def _parametrized(model: Any) -> None:
    model.gain = nn.Parameter(torch.ones(()))


def _removed(model: Any) -> None:
    model.last.bias = None


def _resized(model: Any) -> None:
    model.last.weight = nn.Parameter(torch.randn(5, 16))


def _evaluated(model: Any) -> None:
    model.drop.eval()


def _restrided(model: Any) -> None:
    model.second.weight = nn.Parameter(model.second.weight.detach().t().contiguous().t())


CHANGES = {
    _replaced: None,  # replaced before binding it is a model of the same structure
    _other_class: "second",
    _frozen: r"norm\.weight.*requires_grad=True.*requires_grad=False",
    _halved: r"first\.weight was float32.*is bfloat16",
    _extended: r"Mlp was added or removed|this one has",
    _parametrized: r"Mlp was added or removed|gain",
    _removed: r"last\.bias",
    _resized: r"last\.weight.*4x16.*5x16",
    _evaluated: r"drop has training=False.*training=True",
    _restrided: r"second\.weight.*strides",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_model_that_changed_after_the_plan_was_applied(change: Callable[[Any], None]) -> None:
    model, inputs = mlp(), tiny.batch(labels=True)
    plan = quick(model, inputs=inputs)
    plan.apply()
    change(model)
    with pytest.raises(StalePlanError, match=CHANGES[change] or "'second' was replaced") as caught:
        model(**inputs)
    assert "plan" in str(caught.value)
    plan.restore()
    if change not in (_halved, _resized):
        model(**inputs).backward()


@pytest.mark.parametrize(
    "change", [c for c in CHANGES if c not in (_replaced, _evaluated)], ids=lambda f: f.__name__.strip("_")
)
def test_a_model_that_changed_before_the_plan_was_applied(change: Callable[[Any], None]) -> None:
    model, inputs = mlp(), tiny.batch(labels=True)
    plan = quick(model, inputs=inputs)
    change(model)
    for use in (plan.apply, plan.rewrite):
        with pytest.raises(StalePlanError, match=CHANGES[change]):
            use(model)
    assert "forward" not in vars(model)


def test_another_model_of_the_same_structure_may_take_the_plan() -> None:
    plan = quick(mlp(), inputs=tiny.batch(labels=True))
    other = tiny.seeded(tiny.Mlp, seed=5)
    twin = copy.deepcopy(other)
    plan.apply(other)
    tiny.assert_same_bits(*(tiny.run(m, tiny.batch(labels=True)) for m in (other, twin)))


def test_another_model() -> None:
    plan = quick(mlp(), inputs=tiny.batch(labels=True))
    for other in (tiny.seeded(tiny.blocks), tiny.seeded(lambda: tiny.Mlp(width=24))):
        with pytest.raises(StalePlanError, match="plan"):
            plan.apply(other)
        assert "forward" not in vars(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(x=X[:7]), r"input \['x'\] is float32\[7x8\].*float32\[32x8\].*per shape"),
        (lambda m: m(x=X.double()), r"input \['x'\] is float64\[32x8\]"),
        (lambda m: m(x=X.t().contiguous().t()), r"input \['x'\].*strides \(1, 32\).*strides \(8, 1\)"),
        (lambda m: m(x=X.clone().requires_grad_()), r"requires_grad=True.*requires_grad=False"),
        (lambda m: m(X), r"planned for keyword x and is called with 1 positional input"),
        (lambda m: m(x=X, labels=None), r"planned for keyword x and is called with keywords labels, x"),
        (lambda m: m(x=X.to("meta")), r"on meta"),
        (lambda m: m(x=3), r"input \['x'\] is 3"),
    ],
    ids=["rows", "dtype", "strides", "requires_grad", "positional", "more keywords", "device", "number"],
)
def test_other_inputs(call: Callable[[nn.Module], Any], message: str) -> None:
    model = mlp()
    quick(model, inputs={"x": X}).apply()
    with pytest.raises(StalePlanError, match=message):
        call(model)
    model(x=X).sum().backward()


def test_other_constants() -> None:
    model = Body(lambda self, h: h)
    model.forward = lambda x, scale, mode="a": model.first(x) * (2 if mode == "a" else scale)  # type: ignore
    plan = quick(model, inputs=(X, 3))
    module = plan.rewrite()
    for wrong in (4, True, 3.0, torch.tensor(3)):
        with pytest.raises(StalePlanError, match=r"input \[1\] is .*plan was made for 3"):
            module(X, wrong)
    module(X, 3).sum().backward()


def test_keywords_in_another_order_are_the_same_inputs() -> None:
    model, inputs = mlp(), tiny.batch(labels=True)
    quick(model, inputs=inputs).apply()
    model(**dict(reversed(inputs.items()))).backward()


def test_autocast_switched_on_or_off_after_planning() -> None:
    model = mlp()
    quick(model, inputs=(X,)).apply()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StalePlanError, match=r"autocast is .*bfloat16"),
    ):
        model(X)
    model(X).sum().backward()
    other = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        quick(other, inputs=(X,)).apply()
    with pytest.raises(StalePlanError, match=r"autocast is off, it was .*bfloat16"):
        other(X)


def test_a_refused_trace_leaves_no_name_behind_for_the_next_ones_ops() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.inner(x).sum().item()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = Reads()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.reads(x)
            return y

    before = dict(fx_traceback.current_meta)
    with pytest.raises(planner.TraceError):
        planner.plan(Outer(), 1, (torch.ones(2, 4),), capture="one graph", costs="roofline")
    assert fx_traceback.current_meta == before
