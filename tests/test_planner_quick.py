"""Preparing a plan in less time gives the same plan: what is counted, remembered or left out is as it was."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn, optim

import planner
from planner._compat import (
    FakeTensorMode,
    at_once,
    collecting_seldom,
    fakes_as_last_time,
    graphs_quick,
    in_one_run,
    storage_key,
    symbolic_mode,
    tracing,
)
from planner.capture import flat_model, on_fakes
from planner.capture.as_eager import generators
from planner.capture.joint_graph import JointGraph, capture
from planner.errors import PlannerError, TraceError
from planner.graph.nodes import same_layout
from planner.memory import optimizer_state
from planner.memory.optimizer_state import optimizer_state_bytes
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent

# -- optimizers: some parameters of each kind step, the rest are counted --------------------------------

COUNTED = (
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
)  # fmt: skip
OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "cpu"),
    ({"weight_decay": 0.1, "maximize": True}, "cuda"),
    ({"momentum": 0.9, "foreach": True}, "cpu"),
    ({"amsgrad": True, "foreach": True}, "cpu"),
)


def _many() -> nn.Module:
    """Parameters of three kinds, small after large and large after small."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24, bias=False)) for _ in range(9)))


def _grouped(cls: Any, parameters: list[Tensor]) -> optim.Optimizer:
    weights = [p for p in parameters if p.dim() > 1]
    biases = [p for p in parameters if p.dim() == 1]
    made: optim.Optimizer = cls([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    return made


@pytest.mark.parametrize("cls", COUNTED, ids=lambda cls: cls.__name__)
def test_counted_optimizers_take_what_they_take_with_every_parameter_stepped(cls: Any) -> None:
    parameters = list(_many().parameters())
    every = type(cls.__name__, (cls,), {})  # of a class that it does not know, all parameters step
    for options, as_on in OPTIONS:
        try:
            groups = _grouped(functools.partial(cls, **options), parameters)
        except TypeError:  # not among its options
            continue
        whole = _grouped(functools.partial(every, **options), parameters)
        try:
            want = optimizer_state_bytes(whole, parameters, as_on=as_on)
        except PlannerError:
            with pytest.raises(PlannerError):
                optimizer_state_bytes(groups, parameters, as_on=as_on)
            continue
        assert optimizer_state_bytes(groups, parameters, as_on=as_on) == want, (options, as_on)


def test_parameters_of_many_shapes_are_counted_from_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.empty(3, (7 * k) % 40 + 1)) for k in range(40)]
    want = optimizer_state_bytes(type("AdamW", (optim.AdamW,), {}), parameters)
    counts: list[int] = []
    stepped = optimizer_state._stepped

    def counted(optimizer: Any, params: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        counts.append(len(params))
        return stepped(optimizer, params, *args, **kwargs)

    monkeypatch.setattr(optimizer_state, "_stepped", counted)
    assert optimizer_state_bytes(optim.AdamW, parameters) == want
    assert max(counts) < 8
    parameters[5] = nn.Parameter(torch.empty(3, 8)[:, ::2])  # of gaps, which its state has not
    whole = optimizer_state_bytes(optim.AdamW, parameters)
    assert whole == optimizer_state_bytes(type("AdamW", (optim.AdamW,), {}), parameters)
    assert max(counts) == len(parameters)


def test_optimizers_that_make_state_for_what_does_not_train_are_run_with_all() -> None:
    parameters = list(_many().parameters())
    parameters[0].requires_grad_(False)
    assert optimizer_state_bytes(optim.Adagrad, parameters) == optimizer_state_bytes(
        type("Adagrad", (optim.Adagrad,), {}), parameters
    )


def test_an_optimizer_that_looks_at_all_parameters_is_run_with_all() -> None:
    class First(optim.SGD):
        """Remembers its last parameter, once more for each parameter before it."""

        def step(self, closure: Any = None) -> Any:
            *others, last = self.param_groups[0]["params"]
            self.state[last]["copies"] = [torch.empty_like(last) for _ in others]
            return super().step(closure)

    parameters = list(_many().parameters())
    want_bytes = (len(parameters) - 1) * parameters[-1].nbytes
    assert optimizer_state_bytes(First, parameters).state_bytes == want_bytes


# -- the trace ------------------------------------------------------------------------------------------


def test_what_ops_gave_on_fakes_is_what_they_give() -> None:
    class Reads(nn.Module):
        """What ops give hangs on more than their tensors: the default dtype, the type of a number."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            whole = torch.full((4,), 1)
            half = torch.full((4,), 1.0)
            return self.layer(x) * half + whole + torch.ones(4).t() + x.t().contiguous().t()

    model, x = Reads(), torch.randn(4, 4)
    first, again = capture(model, (x,)), capture(model, (x,))
    assert first.code == again.code
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide, wide_again = capture(model, (x,)), capture(model, (x,))
    finally:
        torch.set_default_dtype(before)
    nodes = [
        [
            n.meta["val"].dtype
            for n in j.step.module.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
        ]
        for j in (first, again, wide, wide_again)
    ]
    assert nodes[0] == nodes[1] == [torch.int64, torch.float32]
    assert nodes[2] == nodes[3] == [torch.int64, torch.float64]


class _Varied(nn.Module):
    """Calls in place, views of views, lists of tensors, numbers of both kinds, buffers, dropout, autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.layer.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = torch.relu_(self.layer(x)).split([3, 5], dim=1)
        h = torch.cat([b, a], dim=1)
        h[:, :4] += 2
        self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            g = self.other(nn.functional.dropout(h, 0.25)).float()
        h = self.norm(h + g.unsqueeze(0).expand(2, -1, -1).sum(0))
        top = h.topk(2, dim=1).values.clamp(max=1)
        return {"loss": torch.stack([top.std(), h.pow(2).mean()]).sum(), "view": h.t()[1:3].reshape(-1)}


class _Writes(nn.Module):
    """Views of what was written through another name, before and after; what only torch's own code takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(64.0).reshape(8, 8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        row, rest = self.table[0], self.table[1:].t()
        self.table.mul_(0.9)
        h = self.layer(x.unsqueeze(0)).squeeze(0)  # 3 dimensions: a view that no schema tells of
        h.detach().view(-1)[::3] = 0  # from the first on: of others torch remembers another offset
        ends = h.chunk(2, dim=-1)
        product = torch.matmul(x.unsqueeze(1).expand(-1, 3, -1), self.layer.weight)
        whole = product.transpose(0, 1)
        product[:, 0].add_(row * self.steps)
        whole[:, :, ::2].zero_()
        scores = torch.where(h > 0, h, h.new_tensor(-1.0)).masked_fill(torch.eye(6, 8).bool(), 0.5)
        index = torch.tensor([0, 2, 1])
        scores = scores.index_put((index,), whole.sum(0)[index]) + torch.complex(h, h).conj().abs()
        with torch.no_grad():
            low = scores.exp().bfloat16()
        loss = scores.sigmoid_().mean() + ends[0].square().sum() + rest.sum() + low.float().max()
        return {"loss": loss, "first": whole[0], "many": torch.stack(torch.split(whole, 2, dim=1), 1)}


class _Attends(nn.Module):
    """Attention without a mask, of which C++ tells as an undefined tensor; norms and dropouts, whose results
    have names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.table(torch.arange(6) % 5))
        heads = h.view(1, 6, 2, 4).transpose(1, 2)
        for causal in (True, True, False):
            heads = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=causal)
        out: Tensor = nn.functional.dropout(heads, 0.1).square().mean()
        return out


class _Block(nn.Module):
    """A layer that is like its neighbours but for what stands on it."""

    def __init__(self, index: int, shared: nn.Linear) -> None:
        super().__init__()
        self.index, self.rate = index, 0.1 * (index % 2)
        self.norm, self.inner = nn.LayerNorm(8, eps=1e-5 * (1 + index // 3)), nn.Linear(8, 8)
        self.shared = (shared,)
        self.inner.weight.requires_grad_(index != 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.inner(self.norm(x))
        if self.index == 2:
            h = h.tanh()
        h = nn.functional.dropout(self.shared[0](h), self.rate)
        return x + h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8) / x.shape[0]


class _Blocks(nn.Module):
    """Equal layers, and some that only look equal: frozen, with dropout, another eps, another way."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.layers = nn.ModuleList([_Block(i, self.shared) for i in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def _told(joint: JointGraph) -> list[str]:
    """Every node with what it makes; storages by the first node that lies on each."""
    first: dict[int, str] = {}

    def of(x: Any, name: str) -> Any:
        if isinstance(x, (tuple, list)):
            return [of(item, name) for item in x]
        if not isinstance(x, Tensor):
            return x
        on = first.setdefault(storage_key(x), name)
        return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad, on

    nodes = list(joint.step.module.graph.nodes)
    begins = min(n.meta["seq_nr"] for n in nodes if "seq_nr" in n.meta)
    own = "_torchdynamo_"  # what Dynamo notes when it first comes by a function of torch's
    calls = [n for n in nodes if n.op != "output"]  # which is of no module, whatever the tracer wrote last
    noted = {n: {k: v for k, v in n.meta.get("custom", {}).items() if not k.startswith(own)} for n in calls}
    return [
        f"{n.name} {n.target} {n.args} {n.kwargs} {of(n.meta.get('val'), n.name)} {noted.get(n)} "
        f"{n.meta.get('is_gradient_acc')} {n.meta.get('seq_nr', begins) - begins} {n.meta.get('desc')}"
        for n in nodes
    ]


def _as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("asked_once", "code_when_run"):
        monkeypatch.setattr(tracing, name, contextlib.nullcontext)
    monkeypatch.setattr(tracing, "fakes_remembered", lambda known: contextlib.nullcontext())
    monkeypatch.setattr(tracing, "sizes_remembered", lambda env: contextlib.nullcontext())
    monkeypatch.setattr(tracing, "without_writes_at_once", lambda run: run)

    def not_at_all(*_: Any) -> Any:
        raise in_one_run.NotInOneRun

    monkeypatch.setattr(tracing, "joint_in_one_run", not_at_all)


def test_ops_that_pass_all_layers_at_once_are_those_that_torch_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (torch.randn(6, 8, requires_grad=True),)
    taken: list[Any] = []
    noted = at_once.AtOnce._noted

    def counted(self: Any, mode: Any, func: Any, *args: Any) -> Any:
        made = noted(self, mode, func, *args)
        if made is not at_once._TORCHS:
            taken.append(func)
        return made

    monkeypatch.setattr(at_once.AtOnce, "_noted", counted)
    for model in (_Varied, _Writes, _Attends):
        capture(tiny.seeded(model), given)  # from here on what ops give is known
        taken.clear()
        quick = capture(tiny.seeded(model), given)
        calls = [n for n in quick.step.module.graph.nodes if n.op == "call_function"]
        assert len(taken) > len(calls) / 2  # of calls that stayed in the graph
        with monkeypatch.context() as patch:
            _as_torch(patch)
            torchs = capture(tiny.seeded(model), given)
        assert _told(quick) == _told(torchs)


class _Twice(tiny.Mlp):
    """Two inputs, of which it may write into one."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.register_buffer("past", torch.zeros(4, 8))
        self.register_buffer("rows", self.past[1:3])  # on the memory of another

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.writes:
            self.past.mul_(2)
        return super().forward(x + y * 2 + self.past) + self.rows.sum()


def test_the_forward_runs_once_where_that_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as often as torch's own tracer runs it beside, where one buffer is written through another."""
    runs = []
    run = flat_model.called

    def called(*args: Any) -> Any:
        runs.append(args)
        return run(*args)

    monkeypatch.setattr(flat_model, "called", called)
    x = torch.randn(4, 8)
    once = 1 if in_one_run.knows_torch() else 2
    for inputs in ((x, x), (x, torch.randn(4, 8))):  # one tensor under two names, or two
        runs.clear()
        quick = capture(tiny.seeded(lambda: _Twice(writes=False)), inputs)
        assert len(runs) == once
        with monkeypatch.context() as patch:
            patch.setattr(in_one_run, "_PREPARES", frozenset())  # a version of torch that is not known
            torchs = capture(tiny.seeded(lambda: _Twice(writes=False)), inputs)
        assert len(runs) == once + 2
        assert _told(quick) == _told(torchs)
    runs.clear()
    with contextlib.suppress(PlannerError):  # what comes of it is torch's
        capture(tiny.seeded(lambda: _Twice(writes=True)), (x, x))
    assert len(runs) == (3 if once == 1 else 2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model", [_Varied, _Blocks])
def test_a_trace_makes_the_graph_that_torch_makes_by_itself(
    monkeypatch: pytest.MonkeyPatch, model: type[nn.Module], dynamic: bool
) -> None:
    given = (torch.randn(6, 8, requires_grad=True),)
    dims = ((0,),) if dynamic else None
    quick = capture(tiny.seeded(model), given, dims=dims)
    again = quick if dynamic else capture(tiny.seeded(model), given)
    _as_torch(monkeypatch)
    torchs = capture(tiny.seeded(model), given, dims=dims)
    assert (torchs.sizes is not None) is dynamic
    if torchs.sizes is not None and quick.sizes is not None:
        assert set(map(str, quick.sizes.conditions)) == set(map(str, torchs.sizes.conditions))
        assert [*map(str, quick.step.storage_bytes.values())] == [
            *map(str, torchs.step.storage_bytes.values())
        ]
    assert quick.code == again.code == torchs.code
    assert _told(quick) == _told(again) == _told(torchs)


def test_sizes_that_are_compared_are_no_reason_to_run_the_step_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sympy draws from generators of its own for that; what the forward draws is found as before."""
    looked = []
    find = generators._line_that_moves

    def counted(source: Any, again: Any) -> str | None:
        looked.append(source.name)
        return find(source, again)

    class Draws(tiny.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random()

    monkeypatch.setattr(generators, "_line_that_moves", counted)
    capture(tiny.seeded(_Varied), (torch.randn(6, 8),), dims=((0,),))
    assert looked == []
    with pytest.raises(TraceError, match=r"random\.random"):
        capture(tiny.seeded(Draws), tiny.batch(), dims=((0,),))


def test_batch_norms_are_what_their_formulas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(6, affine=False).eval(),
        nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2),
    )  # fmt: skip
    last = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    for x in (torch.randn(2, 3, 9, 8), torch.randn(2, 3, 7, 8), last):  # the second ends in one row
        few = capture(model, (x,))
        with monkeypatch.context() as patch:
            patch.setattr(tracing, "_on_few", lambda formula: formula)
            patch.setattr(tracing, "fakes_remembered", lambda known: contextlib.nullcontext())
            assert _told(capture(model, (x,))) == _told(few)


class _Settles(tiny.Mlp):
    """Its first call corrects a setting, as transformers' does the kind of a problem.

    ``other``: and runs other ops than later ones.
    """

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.kind: str | None = None
        self.other = other

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        first, self.kind = self.kind is None, "one of many"
        return super().forward(x * 2 if self.other and first else x)


def test_a_setting_that_the_first_call_corrects_is_seen_in_the_two_runs_of_the_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[str | None] = []
    run = flat_model.called

    def called(model: Any, *args: Any) -> Any:
        kinds.append(model.kind)
        return run(model, *args)

    monkeypatch.setattr(flat_model, "called", called)
    monkeypatch.setattr(on_fakes, "called", called)
    model, other, x = _Settles(other=False), _Settles(other=True), torch.randn(4, 8)
    capture(model, (x, x))  # one tensor under two names
    assert kinds == [None, "one of many"]
    assert model.kind == "one of many"
    with pytest.raises(TraceError, match="runs other code than those that come after it"):
        capture(other, tiny.batch())
    assert other.kind is None


@pytest.mark.parametrize("sized", [False, True])
def test_a_device_without_a_number_is_the_current_one_each_time(
    monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    """What was made on one GPU is not what another gives: ``set_device`` chooses between them."""
    mode = symbolic_mode() if sized else FakeTensorMode()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    found = []
    with fakes_as_last_time(), mode:
        like = torch.empty(2, device="cpu")
        for number in (0, 1, 0):
            monkeypatch.setattr(torch.cuda, "current_device", lambda number=number: number)
            found.append(torch.empty_like(like, device="cuda").device.index)
    assert found == [0, 1, 0]


def test_views_on_remembered_fakes_lie_on_the_storage_that_they_view() -> None:
    model = tiny.seeded(tiny.Mlp)
    capture(model, tiny.batch())
    graph = capture(model, tiny.batch()).step.module.graph
    views = graph.find_nodes(op="call_function", target=torch.ops.aten.t.default)
    assert len(views) > 3
    for view in views:
        (base,) = view.all_input_nodes
        assert view.meta["val"].untyped_storage()._cdata == base.meta["val"].untyped_storage()._cdata


def test_torchs_own_is_back_when_two_threads_have_run_on_fakes() -> None:
    before = FakeTensorMode.__torch_dispatch__, FakeTensorMode.cache
    inside = threading.Event()

    def other() -> None:
        with fakes_as_last_time():
            inside.set()
            time.sleep(0.05)  # while the first thread comes in

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with fakes_as_last_time():
        thread.join()
    assert (FakeTensorMode.__torch_dispatch__, FakeTensorMode.cache) == before


def test_torchs_graphs_are_back_when_the_last_of_several_threads_is_through() -> None:
    graphs = fx.graph
    before = graphs.pytree  # type: ignore[attr-defined]
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with graphs_quick():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with graphs_quick():
        thread.start()
        inside.wait(10)
    assert graphs.pytree is not before  # type: ignore[attr-defined]
    leave.set()
    thread.join()
    assert graphs.pytree is before  # type: ignore[attr-defined]


def test_a_gradient_is_laid_out_as_its_leaf_where_one_like_the_leaf_is() -> None:
    made = [
        torch.empty(4, 1, 3), torch.empty(3, 4).t(), torch.empty(2, 4, 3, 5).contiguous(
            memory_format=torch.channels_last
        ), torch.empty(4, 1).expand(4, 3), torch.empty(4, 6)[:, ::2], torch.empty_strided((4, 1), (1, 7)),
        torch.empty(0, 3), torch.empty(()),
    ]  # fmt: skip
    for leaf in made:
        for grad in (*made, torch.empty(leaf.shape), leaf.double()):
            if grad.shape == leaf.shape:
                like = torch.empty_like(leaf)
                pairs = zip(grad.shape, grad.stride(), like.stride(), strict=True)
                want = grad.dtype == leaf.dtype and all(n == 1 or a == b for n, a, b in pairs)
                assert same_layout(grad, leaf) == want


# -- the garbage collector ------------------------------------------------------------------------------


def test_the_garbage_collector_is_as_it_was_when_the_last_of_several_threads_is_through() -> None:
    before = gc.get_threshold()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collecting_seldom():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with collecting_seldom():
        thread.start()
        inside.wait(10)
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold()[0] > before[0]  # the other goes on
    leave.set()
    thread.join()
    assert gc.get_threshold() == before


def test_a_garbage_collector_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with collecting_seldom():
            assert gc.get_threshold()[0] == 0
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


# -- imports --------------------------------------------------------------------------------------------


def _python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return ran.stdout.strip()


def test_importing_the_package_and_its_help_import_no_torch() -> None:
    asked = (
        "import sys, planner\n"
        "from planner.cli.parser import parser\n"
        "parser().format_help()\n"
        "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'solvers', 'planner.api'}), *planner.__all__)\n"
        "print(set(planner.__all__) <= set(dir(planner)))"
    )
    said, whole = _python(asked).splitlines()
    assert said == " ".join(["[]", *planner.__all__])
    assert whole == "True"


def test_names_are_what_they_are_whoever_imported_a_file_of_that_name_before() -> None:
    import planner.frontier
    import planner.plan

    assert planner.plan is planner.api.plan and planner.frontier is planner.api.frontier  # type: ignore
    asked = (
        "import planner.plan, planner.frontier, sys\n"
        "from planner import plan, frontier\n"
        "print(*(x.__module__ for x in (planner.plan, planner.frontier, plan, frontier, planner.Plan)))"
    )
    assert _python(asked) == "planner.api planner.api planner.api planner.api planner.plan"
    assert {name for name in planner.__all__ if getattr(planner, name) is None} == set()
    with pytest.raises(AttributeError, match="'planner' has no attribute 'plann'"):
        planner.plann  # type: ignore[attr-defined]  # noqa: B018
