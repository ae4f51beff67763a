"""A slice written into a larger storage: eager's bits, the peak to the byte, and no more than eager takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.devices.allocator import HeldBlocks, simulate_allocator
from planner.errors import PlannerError
from planner.graph import kernels
from planner.graph.passes.slices import _CHANGES, _POINTWISE
from planner.measure.meter import StorageMeter
from planner.options import Search
from planner.plan import Plan
from planner.solving.priced import prepare
from solvers import Op, Problem, Schedule, Value, simulate
from solvers.core.problem import ProblemError
from tests import tiny

aten = torch.ops.aten
X = torch.linspace(-1, 1, 64).view(8, 8)


class Net(nn.Module):
    """Two layers, a larger parameter, a queue of 64 rows with its pointer, an average, for ``body``."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.body = nn.Linear(8, 8), nn.Linear(8, 8), body
        self.large = nn.Parameter(torch.linspace(-1, 1, 1024).view(64, 16))
        self.register_buffer("queue", torch.linspace(0, 1, 512).view(64, 8))
        self.register_buffer("pointer", torch.tensor(5))
        self.register_buffer("average", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def plans(body: Callable[[Net, Tensor], Tensor], *, least: bool = True) -> tuple[nn.Module, list[Plan]]:
    """With nothing recomputed, and of the least peak; each held to eager's bits and its own bytes."""
    model = tiny.seeded(lambda: Net(body))
    step = prepare(model, (X,), costs="roofline", search=Search(time_limit_s=1))
    made = [step.plan_bytes(step.baseline_peak_bytes, Search("keep_all"))]
    made += [step.least_plan()] if least else []
    for plan in made:
        report = plan.verify()
        assert report.equal and report.within_budget
        assert report.peak_bytes == report.predicted_peak_bytes
        assert report.peak_bytes <= report.eager_peak_bytes
    return model, made


def canvas(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(8, 64)
    made[:, :8], made[:, 8:16] = net.first(x), net.second(x).relu()
    return (made @ net.large).pow(2).sum()


def nested(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(8, 4, 8)
    made[1:5, 2, :6] = net.first(x)[1:5, :6]
    return made.tanh().pow(2).sum()


def scan(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(5, 8)
    for i in range(4):
        made[i + 1] = made[i] * 0.5 + net.first(x[i]).tanh()
    return net.second(made).pow(2).sum()


def every_other(net: Net, x: Tensor) -> Tensor:
    made = net.first(x).tanh().clone()
    made[::2] += net.second(x)[::2]
    made.t()[:3].mul_(2)
    return made.pow(2).sum()


def onto_a_gradient(net: Net, x: Tensor) -> Tensor:
    made = net.large.tanh() * 2
    made[:8, :8] = net.first(x)
    made[3] = 0
    return made.pow(2).sum()


def indexed(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(8, 8)
    made[torch.tensor([1, 3, 5])] = net.first(x)[:3]
    made[x > 0.5] = 2.0
    made.index_add_(0, torch.tensor([1, 1]), net.second(x)[:2])
    return net.second(made).pow(2).sum()


def narrowed_and_masked(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(8, 64)
    made.narrow(1, 4, 8).copy_(net.first(x))
    made[:, 4:8].masked_fill_(x[:, :4] > 0, 0.5)
    made.as_strided((8, 2), (64, 1), 30).copy_(net.second(x)[:, :2])
    return (made @ net.large).pow(2).sum()


def clipped(net: Net, x: Tensor) -> Tensor:
    made = net.first(x) * 1
    made.diagonal().zero_()
    made[:4].relu_()
    return net.second(made).pow(2).sum()


def broadcast_and_cast(net: Net, x: Tensor) -> Tensor:
    made = torch.ones(8, 3, 8, dtype=torch.bfloat16)
    made[:] = net.first(x)[:, None]
    made[:, 0] = net.second(x[0])
    return made.float().pow(2).sum()


def overwritten_while_kept(net: Net, x: Tensor) -> Tensor:
    before = net.first(x) * 1
    made = before.clone()
    made[:4] = net.second(x)[:4]
    return (before.tanh() @ made.t()).pow(2).sum()


def cache_of_keys(net: Net, x: Tensor) -> Tensor:
    keys = x.new_zeros(2, 32, 8)
    for i in (0, 4):
        keys[:, i : i + 4] = net.first(x[i : i + 4])
        x = x + keys[:, :8].mean(0)
    return net.second(x).pow(2).sum()


def an_output(net: Net, x: Tensor) -> Tensor:
    made = x.new_zeros(8, 64)
    made[:, :8] = net.first(x)
    return made


def queue(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).relu()
    net.queue[: len(x)] = h.detach()
    return (net.second(h) + net.queue.mean(0)).pow(2).sum()


def queue_before(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    against = h @ net.queue.clone().detach().t()
    net.queue[2 : 2 + len(x)] = h.detach()
    return against.pow(2).sum()


def bank(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    net.queue[:8] = h.detach()
    net.queue[3].mul_(0.5)
    net.queue.view(-1)[5] = 1.0
    return (h @ net.queue.t()).pow(2).sum()


def ring(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    net.queue.index_copy_(0, (net.pointer + torch.arange(8)) % 64, h.detach())
    net.pointer.add_(8).remainder_(64)
    return (net.second(h) + net.queue.sum(0)).pow(2).sum()


def rolled(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    net.queue.copy_(torch.roll(net.queue, 8, 0))
    net.queue[:8] = h.detach()
    return (net.second(h) + net.queue.sum(0)).pow(2).sum()


def moving(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    net.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    net.average.lerp_(h.detach().amax(0), 0.1)
    return (h / (net.average.abs() + 1)).pow(2).sum()


def bound_anew(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    net.average = net.average * 0.9 + h.detach().mean(0)
    return (h * net.average).pow(2).sum()


WRITES = [
    canvas, nested, scan, every_other, onto_a_gradient, indexed, narrowed_and_masked, clipped,
    broadcast_and_cast, overwritten_while_kept, cache_of_keys, an_output,
]  # fmt: skip
BUFFERS = [queue, queue_before, bank, ring, rolled, moving, bound_anew]


@pytest.mark.parametrize("body", [*WRITES, *BUFFERS], ids=lambda body: body.__name__)
def test_as_eager_to_the_byte(body: Callable[[Net, Tensor], Tensor]) -> None:
    plans(body)


@pytest.mark.parametrize("body", [scan, indexed, overwritten_while_kept, bank, rolled])
def test_steps_with_everything_recomputed_are_eagers(body: Callable[[Net, Tensor], Tensor]) -> None:
    tiny.assert_steps_equal(tiny.seeded(lambda: Net(body)), (X,))


def test_a_write_is_repeated_like_any_other_call_and_apart_where_the_old_is_read_later() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        made = x.new_zeros(8, 64)  # kept for the products' backward, it would be there at the next ones
        made[:, :8] = net.first(x)
        return (made @ net.large).sum() + (net.large.repeat(8, 1).sin() ** 2).sum()

    _, (kept, least) = plans(body)
    assert "_recomputed = planner_graph_kernels_write_over(" not in kept.code
    assert "_recomputed = planner_graph_kernels_write_over(" in least.code
    assert "kernels_written(" not in kept.code + least.code

    def both(net: Net, x: Tensor) -> Tensor:
        before = net.first(x).exp()  # its backward reads what it made
        made = before.masked_fill(x > 0, 0.0)
        return (before * 2).sum() + made.pow(2).sum()

    _, (kept, _) = plans(both)
    forward, _, backward = kept.code.partition("# backward")
    assert "masked_fill(" in forward and "masked_fill_(" in backward


# (write, or read twice; where it begins, ends; which layer makes it)
_STEPS = st.lists(
    st.tuples(st.sampled_from("=+*rvi"), st.integers(0, 7), st.integers(1, 8), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(_STEPS, st.booleans(), st.booleans())
def test_any_program_of_writes_is_eagers(
    steps: list[tuple[str, int, int, bool]], wide: bool, grows: bool
) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        made = (net.large[:8].clone() if grows else x.new_zeros(8, 16)) if wide else x * 2
        total: Tensor = x.new_zeros(())
        for kind, start, length, which in steps:
            part = slice(start, start + length)
            value = (net.first if which else net.second)(x).tanh()
            if kind == "=":
                made[part, :8] = value[part]
            elif kind == "+":
                made[part, ::2] += value[part, : made.shape[1] // 2]
            elif kind == "*":
                made[:, start] = made[:, start] * 0.5
            elif kind == "i":
                made[torch.arange(start, 8)] = value.mean()
            elif kind == "v":
                made.t()[:8].copy_(value)
            else:
                total = total + made.sum() + made[part].clone().pow(2).sum()
        return total + made.pow(2).sum() + net.first(x).sum()

    plans(body, least=False)


# -- op by op: what a call takes, and that both of its forms are the same ------------------------------

INDEX = torch.tensor([4, 0, 2])
ROWS = torch.linspace(1, 2, 24).view(3, 8)
CALLS: dict[str, tuple[object, ...]] = {
    "index_put": ([INDEX], ROWS), "index_copy": (0, INDEX, ROWS), "index_add": (0, INDEX, ROWS),
    "index_fill": (0, INDEX, 3.0), "masked_fill": (X > 0, 3.0), "masked_scatter": (X > 0, X.flip(0)),
    "scatter": (0, INDEX[:, None].expand(3, 8), ROWS), "scatter_add": (0, INDEX[:, None].expand(3, 8), ROWS),
    "lerp": (X.flip(0), 0.3), "addcmul": (X, X), "addcdiv": (X, X.abs() + 1), "clamp": (-0.5, 0.5),
    "remainder": (0.3,), "neg": (), "relu": (), "exp": (), "sigmoid": (), "tanh": (),
}  # fmt: skip


def arguments(op: object) -> tuple[object, ...]:
    """Of a call beside its first operand."""
    packet, overload = str(op).removeprefix("aten.").split(".")
    if packet not in CALLS:
        return (0.7,) if overload == "Scalar" else (X.flip(0),)
    args = CALLS[packet]
    if overload in ("value", "int_Tensor", "Tensor"):
        last: object = 3.0 if overload == "value" else torch.tensor(0.25)
        return (*args[:-1], last)
    return args


@pytest.mark.parametrize("op", [*_CHANGES, *_POINTWISE], ids=str)
def test_in_place_a_call_is_the_same(op: Callable[..., Tensor]) -> None:
    form = {**_CHANGES, **_POINTWISE}[op]
    for base in (X.clone(), X.t().clone().t()):
        want, held = op(base, *arguments(op)), base.clone()
        form(held, *arguments(op))
        assert torch.equal(held, want)


@pytest.mark.parametrize(
    ("scatter", "args"),
    [
        (aten.slice_scatter.default, (1, 2, 7, 2)),
        (aten.select_scatter.default, (0, 3)),
        (aten.diagonal_scatter.default, ()),
        (aten.as_strided_scatter.default, ((2, 3), (16, 1), 2)),
    ],
    ids=str,
)
def test_a_scatter_clones_the_whole_storage_under_its_operand(
    scatter: Callable[..., Tensor], args: tuple[object, ...]
) -> None:
    view = {"slice": "slice.Tensor", "select": "select.int"}
    name = str(scatter).removeprefix("aten.").split("_scatter")[0]
    step = (view.get(name, f"{name}.default"), *args)
    whole = torch.arange(256.0).view(16, 16)
    base = whole[2:10, 3:11]
    source = kernels.aten_op(step[0])(base, *args).neg() if name != "as_strided" else torch.ones(2, 3)
    meter = StorageMeter("cpu")
    meter.register(base, source)
    with meter:
        want = scatter(base, source, *args)
        taken_bytes = meter.live_bytes
        made = kernels.written(base, "copy_.default", (source,), (step,))
        assert meter.live_bytes - taken_bytes == whole.nbytes == taken_bytes - whole.nbytes - source.nbytes
        assert torch.equal(made, want)
        kernels.write_over(base, "copy_.default", (source,), (step,))
        assert meter.live_bytes == 3 * whole.nbytes + source.nbytes
    assert torch.equal(base, want) and made.stride() == base.stride()


# -- buffers between a forward and its backward -------------------------------------------------------


def test_a_bank_written_by_another_forward_is_refused_as_autograd_refuses_it() -> None:
    model = tiny.seeded(lambda: Net(bank))
    twin = copy.deepcopy(model)
    prepare(model, (X,), costs="roofline").plan_bytes(10**9, Search("keep_all")).apply(model)
    for net, error in ((twin, RuntimeError), (model, PlannerError)):
        first, _ = net(X), net(X)
        with pytest.raises(error, match=r"queue|modified by an inplace"):
            first.backward()


@pytest.mark.parametrize("body", [queue, queue_before, bound_anew])
def test_two_forwards_before_the_backwards_where_eager_can(body: Callable[[Net, Tensor], Tensor]) -> None:
    model = tiny.seeded(lambda: Net(body))
    twin = copy.deepcopy(model)
    tiny.planned(model, (X,)).apply(model)
    for net in (model, twin):
        losses = [net(X), net(X * 2)]
        for loss in losses:
            loss.backward()
    pairs = zip((*model.parameters(), *model.buffers()), (*twin.parameters(), *twin.buffers()), strict=True)
    assert all(torch.equal(a, b) and (a.grad is None or torch.equal(a.grad, b.grad)) for a, b in pairs)


# -- sizes that vary, files, an allocator -------------------------------------------------------------


def test_smaller_batches_are_written_where_they_go() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            made = x.new_zeros(x.shape[0], 24)
            made[:, 2:10] = F.gelu(self.first(x))
            made[1:, 12] += x[:-1, 0]
            return self.last(made).pow(2).mean()

    model = tiny.seeded(Pads)
    twin = copy.deepcopy(model)
    plan = planner.plan(model, 1, (X,), costs="roofline", dynamic=True, time_limit_s=1)
    plan.apply(model)
    for rows in (8, 5):
        tiny.assert_same_bits(tiny.run(model, (X[:rows],)), tiny.run(twin, (X[:rows],)))
    assert plan.variants is not None and plan.variants.traces == 1


def test_a_plan_from_a_file_writes_in_place_too(tmp_path: Path) -> None:
    model, (kept, _) = plans(canvas)
    kept.save(tmp_path / "plan.json")
    read = planner.load(tmp_path / "plan.json")
    assert list(read.timeline) == list(kept.timeline)
    assert "write_over" in read.executable(model).program.code
    kinds = sum(read.timeline_by_kind.values())
    assert min(map(min, read.timeline_by_kind.values())) >= 0 and list(kinds) == list(kept.timeline)


def problem(workspace_bytes: int = -100, *, final: bool = False) -> Problem:
    """``a`` is written over by ``b``; ``c`` reads ``b``, ``d`` both if ``a`` is recomputed or kept."""
    values = (Value("a", 100, 0, final), Value("b", 100, 1), Value("c", 10, 2, True))
    ops = (
        Op("make", (), (0,), 1.0),
        Op("write", (0,), (1,), 1.0, workspace_bytes, reuses=0),
        Op("read", (1,), (2,), 1.0),
    )
    return Problem(ops, values, 2)


def test_what_is_reused_is_counted_once_where_it_dies_and_twice_where_it_does_not() -> None:
    once = simulate(problem(), Schedule(("make", "write", "read")))
    assert list(once.live_bytes) == [100, 100, 110]
    again = Problem(
        (*problem().ops, Op("late", (0,), (3,), 1.0)), (*problem().values, Value("d", 1, 3, True)), 2
    )
    assert list(simulate(again, Schedule.keep_all(again)).live_bytes) == [100, 200, 210, 111]
    twice = simulate(again, Schedule(("make", "write", "read", "make", "late")))
    assert list(twice.live_bytes) == [100, 100, 110, 110, 111]
    blocks = HeldBlocks((), ())
    assert simulate_allocator(problem(), once, blocks).allocated_peak_bytes == 2 * 512


@pytest.mark.parametrize("wrong", [{"workspace_bytes": -101}, {"final": True}])
def test_what_cannot_be_reused_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ProblemError, match="write"):
        problem(**wrong)  # type: ignore[arg-type]
