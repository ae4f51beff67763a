"""Backward calls that write over an operand: the same bits, less memory, never over what is read later."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from planner._compat.ops import is_in_place
from planner.graph.passes.inplace import IN_PLACE, OUT, OUT_ON_CPU
from planner.options import Search
from planner.solving.priced import prepare
from tests import tiny

aten = torch.ops.aten


def _operands(target: Any) -> tuple[Any, ...]:
    """Arguments of a call, its overwritten operand first."""
    random = torch.Generator().manual_seed(0)
    gradient, value = (torch.randn(33, 257, generator=random) for _ in range(2))
    name = str(target.overloadpacket).removeprefix("aten.")
    if name == "threshold_backward":
        return gradient, value, 0
    if name in ("tanh_backward", "sigmoid_backward"):
        return gradient, value.sigmoid()
    if name == "_log_softmax_backward_data":
        return gradient, value.log_softmax(1), 1, torch.float32
    if name == "_softmax_backward_data":
        return gradient, value.softmax(1), 1, torch.float32
    if name == "neg":
        return (gradient,)
    return (gradient, 3.7) if target._overloadname == "Scalar" else (gradient, value)


@pytest.mark.parametrize("target", [*OUT, *OUT_ON_CPU], ids=str)
def test_given_its_operand_as_result_a_derivative_is_the_same(target: Any) -> None:
    form, name = {**OUT, **OUT_ON_CPU}[target]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = [a.to(dtype) if isinstance(a, Tensor) else a for a in _operands(target)]
        args = [dtype if a is torch.float32 else a for a in args]
        want = target(*args)
        got = form(*args, **{name: args[0]})
        assert got.data_ptr() == args[0].data_ptr()
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("target", list(OUT_ON_CPU), ids=str)
def test_softmax_derivatives_over_any_dimension(target: Any, dim: int) -> None:
    form, name = OUT_ON_CPU[target]
    gradient, value = torch.randn(5, 1031, 18), torch.randn(5, 1031, 18)
    output = value.log_softmax(dim) if "log" in str(target) else value.softmax(dim)
    want = target(gradient, output, dim, torch.float32)
    got = form(gradient, output, dim, torch.float32, **{name: gradient})
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("target", list(IN_PLACE), ids=str)
def test_in_place_arithmetic_is_the_same_both_ways_round(target: Any) -> None:
    form, places = IN_PLACE[target]
    for place in places:
        args = list(_operands(target))
        want = target(*args)
        turned = [args[place], *(a for k, a in enumerate(args) if k != place)]
        assert torch.equal(form(*turned).view(torch.uint8), want.view(torch.uint8))


class Branching(nn.Module):
    """Gradients that meet, are read twice, seen through views, broadcast, and handed to two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.left(x).tanh()
        y = h * self.right(h) + h.view(4, 2, 8, 16).transpose(1, 2).reshape(4, 16, 16).sigmoid()
        y = F.relu(y + self.shift) * self.scale + h.neg() / 3
        return (y.log_softmax(-1) * y.softmax(1)).mean() + self.shift.square().sum()


@pytest.mark.parametrize("solver", ["keep_all", "recompute_all"])
def test_nothing_is_overwritten_that_is_read_later(solver: str) -> None:
    x = torch.randn(4, 16, 16, requires_grad=True)
    plan = tiny.assert_steps_equal(tiny.seeded(Branching), (x,), solver=solver)
    report = plan.verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes
    written = Counter(
        op.target for op in plan._origin.captured.graph.ops if op.node and "over" in op.node.meta
    )  # type: ignore[union-attr]
    assert written["aten.add_"] and written["aten.mul_"]


def test_the_gradient_of_a_language_models_loss_takes_no_second_buffer() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(512, 8), nn.Linear(8, 512)

        def forward(self, ids: Tensor) -> Tensor:
            return F.cross_entropy(self.out(self.embed(ids)), ids)

    prepared = prepare(Head(), (torch.arange(256),), costs="roofline")
    logits_bytes = 256 * 512 * 4
    resident = prepared.problem.resident_bytes
    assert 2 * logits_bytes < prepared.baseline.peak_bytes - resident < 2.5 * logits_bytes
    report = prepared.plan_bytes(prepared.baseline.peak_bytes, search=Search("keep_all")).verify()
    assert report.equal and report.peak_bytes == report.predicted_peak_bytes
    assert report.eager_peak_bytes - resident > 3 * logits_bytes


class Mixed(nn.Module):
    """Attention whose heads are mixed after the softmax: its gradient comes in the order of that sum.

    Of one query, the trace's tensors say that the gradient is contiguous where the real one is not.
    """

    def __init__(self, queries: int, dropout: float) -> None:
        super().__init__()
        self.queries, self.dropout = queries, dropout
        self.scores, self.mix = nn.Linear(8, 3 * queries * 7), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.scores(x).view(4, 3, self.queries, 7).softmax(-1)
        a = F.dropout(a, self.dropout) if self.dropout else a * a.detach()
        return torch.einsum("bhij,hg->bgij", a, self.mix).square().mean()


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_softmax_is_differentiated_in_place_where_its_gradient_is_contiguous_only(
    queries: int, dropout: float
) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = tiny.seeded(lambda: Mixed(queries, dropout))
    plan = tiny.planned(model, (x,))
    found = []
    for make in (model, plan.rewrite()):
        torch.manual_seed(1)
        make.zero_grad()
        make(x).backward()
        found.append([p.grad.clone() for p in make.parameters() if p.grad is not None])
    assert len(found[0]) == 3 and all(map(torch.equal, *found))


class Frequencies(nn.Module):
    """Attention between complex values: the gradient behind its tanh is laid out otherwise than that."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(8, 2 * 3 * 5 * 2), nn.Linear(8, 2 * 3 * 5 * 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (torch.view_as_complex(of(x).view(4, 2, 3, 5, 2)) for of in (self.queries, self.keys))
        weights = torch.einsum("bhex,bhey->bhxy", q, k).tanh()
        return torch.view_as_real(torch.einsum("bhxy,bhey->bhex", weights, k)).square().mean()


def test_complex_products_are_not_written_over_their_factors() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = tiny.seeded(Frequencies)
    report = tiny.planned(model, (x,)).verify()
    assert report.equal, report


def test_what_writes_over_its_first_operand_is_known_from_the_schema() -> None:
    """As the names have it, and a tag where torch has one (2.12+)."""
    told, tag = 0, getattr(torch.Tag, "inplace", None)
    packets = (getattr(aten, name, None) for name in dir(Tensor) if not name.startswith("__"))
    for packet in (p for p in packets if hasattr(p, "overloads")):
        for name in packet.overloads():
            op = getattr(packet, name)
            arguments = op._schema.arguments
            if arguments and str(arguments[0].type) == "Tensor":
                told += is_in_place(op)
                assert is_in_place(op) == op._schema.name.endswith("_"), op
                assert is_in_place(op) or tag not in op.tags, op  # an overload of copy_ lacks it
    assert told > 100


class Turned(nn.Module):
    """What it returns is read here too."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.bias
        return h, torch.tanh(h).sum()


class Sums(TorchDispatchMode):
    """How what is summed for a bias was laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.sum.dim_IntList:
            self.strides.append(args[0].stride())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("turns", [False, True])
def test_a_sum_with_the_gradient_of_an_output_is_laid_out_as_that(turns: bool) -> None:
    """Which may come in any layout, whatever it was traced in; sums over it take an order from its layout."""
    model = tiny.seeded(Turned)
    twin = copy.deepcopy(model)
    tiny.planned(model, (torch.randn(4, 5, 6),)).apply(model)
    seen = []
    for each in (twin, model):
        h, s = each(torch.randn(4, 5, 6))
        with Sums() as sums:
            ((h.transpose(0, 1).contiguous() if turns else h).square().sum() + s).backward()
        seen.append(sums.strides)
    assert seen[0] == seen[1] and ((6, 24, 1) in seen[0]) == turns
