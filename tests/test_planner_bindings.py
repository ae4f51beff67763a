"""Generated code calls torch's bindings: the same ops arrive, with the same arguments, or it calls the op."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

from planner._compat import OpOverload, TorchDispatchMode
from planner.options import Search
from planner.rewrite.bindings import bind
from planner.solving.priced import prepare
from tests.tiny import assert_steps_equal, bert, bert_batch, seeded

aten = torch.ops.aten
X, Y, W = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6, 3)
IMAGE, KERNEL = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
INDEX = torch.tensor([[0, 1], [2, 3]])


class Seen(TorchDispatchMode):
    """Ops below autograd with their arguments, tensors by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = [a.tolist() if isinstance(a, torch.Tensor) else a for a in args]
        self.calls.append((func, told, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


CALLS = {
    "addmm": (aten.addmm.default, (torch.randn(3), X, W), {}),
    "add": (aten.add.Tensor, (X, Y), {}),
    "add alpha": (aten.add.Tensor, (X, Y), {"alpha": 2}),
    "add number": (aten.add.Tensor, (X, 2), {}),
    "add in place": (aten.add_.Tensor, (X, Y), {}),
    "sum": (aten.sum.dim_IntList, (X, [0], True), {}),
    "sum all": (aten.sum.default, (X,), {}),
    "mean": (aten.mean.dim, (X, [1]), {}),
    "transpose": (aten.transpose.int, (X, 0, 1), {}),
    "clone": (aten.clone.default, (X.t(),), {"memory_format": torch.contiguous_format}),
    "softmax": (aten._softmax.default, (X, -1, False), {}),
    "where": (aten.where.self, (X > 0, X, Y), {}),
    "embedding": (aten.embedding.default, (X, INDEX), {}),
    "gelu": (aten.gelu.default, (X,), {"approximate": "tanh"}),
    "convolution": (aten.convolution.default, (IMAGE, KERNEL, None, *([[1, 1]] * 3), False, [0, 0], 1), {}),
    "layer norm": (aten.native_layer_norm.default, (X, [6], None, None, 1e-5), {}),
    "max": (aten.max.dim, (X, 1), {}),
    "select": (aten.select.int, (X, 0, 1), {}),
    "expand": (aten.expand.default, (torch.randn(1, 6), [4, 6]), {}),
    "cumsum": (aten.cumsum.default, (X, 0), {}),
    "pow": (aten.pow.Tensor_Scalar, (X, 2), {}),
}  # fmt: skip
NOT_THE_SAME = {
    "mul by a number": (aten.mul.Scalar, (X, 0.5), {}),  # torch.mul makes a tensor of the number
    "div by a number": (aten.div.Scalar, (X, 3), {}),
    "unbound": (aten.threshold_backward.default, (X, Y, 0.0), {}),
    "method that is Python": (aten.norm.ScalarOpt_dim, (X, 2, [1]), {}),
}


def _one_call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph that makes the call, each tensor an argument of it."""
    graph, given = fx.Graph(), []

    def placed(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        node = graph.placeholder(f"x{len(given)}")
        node.meta["val"] = argument
        given.append(argument)
        return node

    call = graph.call_function(op, tuple(map(placed, args)), kwargs)
    graph.output(call)
    bind(graph)
    graph.lint()
    return fx.GraphModule({}, graph), given


def _arrived(function: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
    with torch.no_grad(), Seen() as seen:
        made = function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    return seen.calls, made


@pytest.mark.parametrize("name", [*CALLS, *NOT_THE_SAME])
def test_the_same_op_arrives_with_the_same_arguments(name: str) -> None:
    op, args, kwargs = {**CALLS, **NOT_THE_SAME}[name]
    module, given = _one_call(op, args, kwargs)
    [call] = [n for n in module.graph.nodes if n.op.startswith("call")]
    assert isinstance(call.target, OpOverload) is (name in NOT_THE_SAME), module.code
    wanted, made = _arrived(op, *args, **kwargs)
    got, bound = _arrived(module, *given)
    assert got == wanted
    torch.testing.assert_close(bound, made, rtol=0, atol=0)


def test_one_ops_kinds_of_call_are_told_apart() -> None:
    """A number that is a tensor without dimensions takes another overload than one that is not."""
    scalar, vector = torch.tensor(2.0), torch.arange(2)
    for value in (1.5, scalar):
        overload = aten.index_fill.int_Scalar if value is not scalar else aten.index_fill.int_Tensor
        module, given = _one_call(overload, (X, 0, vector, value), {})
        assert _arrived(module, *given)[0] == _arrived(overload, X, 0, vector, value)[0]


def test_a_plan_that_keeps_all_makes_eagers_calls_and_says_so_in_plain_torch() -> None:
    model, inputs = bert(), bert_batch()
    prepared = prepare(model, inputs, costs="roofline")
    plan = prepared.plan_bytes(prepared.baseline.peak_bytes, search=Search("keep_all"))
    assert "torch.addmm(" in plan.code
    assert "torch.ops.aten.addmm" not in plan.code


class Counted(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(
            dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x).float().square().mean()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_moves_its_buffers_by_eagers_kernels(dtype: torch.dtype) -> None:
    model = seeded(lambda: Counted(dtype))
    inputs = (torch.randn(4, 3, 12, 12, dtype=dtype),)
    prepared = prepare(model, inputs, costs="roofline")
    targets = Counter(op.target for op in prepared.graph.ops)
    assert targets["aten.add_"] == 1  # the count of batches
    assert targets["aten.copy_"] == 0
    assert targets["aten._native_batch_norm_legit"] == 1
    assert_steps_equal(model, inputs)
