"""Costs of ops: FLOPs against torch's counter, the roofline's shape, and what a profile must not do."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from planner._compat import FakeTensorMode
from planner.costs import op_costs as costs_module
from planner.costs import profiler
from planner.costs.op_costs import Costs, costs_of
from planner.costs.roofline import is_view, node_bytes, node_flops, roofline_seconds
from planner.devices.rates import DEVICES
from planner.measure import FLOP_FORMULAS, step_flops

aten = torch.ops.aten
CPU = torch.device("cpu")


class Convolutions(nn.Module):
    """Grouped, strided, dilated and transposed convolutions, batch norm, an in-place op, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.up(F.max_pool2d(self.grouped(x), 2)).mean()


class Attention(nn.Module):
    """An embedding, fused attention, batched and plain products, dropout, a cross-entropy, an index."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.qkv = nn.Linear(32, 96)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32, bias=False))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + torch.baddbmm(x, x @ x.transpose(1, 2), self.mlp(x))
        return F.cross_entropy(self.head(x[:, torch.arange(8)]).flatten(0, 1), ids[:, :8].flatten())


def trace(fn: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """The aten graph of ``fn`` with fake values."""
    return make_fx(fn, tracing_mode="fake")(*inputs)


def joint(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The aten graph of loss and gradients, and the real inputs to run it with."""
    names, weights = zip(*model.named_parameters(), strict=True)
    buffers = dict(model.named_buffers())

    def step(x: torch.Tensor, *state: torch.Tensor) -> Any:
        values = dict(zip((*names, *buffers), state, strict=True))
        loss = functional_call(model, values, x)
        return loss, *torch.autograd.grad(loss, state[: len(names)])

    inputs = [x, *weights, *(b.clone() for b in buffers.values())]
    return trace(step, *inputs), inputs


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Convolutions(), torch.randn(2, 3, 16, 16)


def attention() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(), torch.randint(0, 50, (3, 12))


FAMILIES = [convolutions, attention]


def one(gm: fx.GraphModule, target: Any) -> fx.Node:
    """The only node that calls ``target``, any overload."""
    [node] = [n for n in gm.graph.nodes if getattr(n.target, "overloadpacket", n.target) is target]
    return node


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """An empty cache of measurements, and the nodes that are measured from now on."""
    seen: list[fx.Node] = []

    def watched(node: fx.Node, device: torch.device) -> profiler.Measured:
        seen.append(node)
        return profiler.measure(node, device)

    monkeypatch.setattr(costs_module, "_measured", {})
    monkeypatch.setattr(costs_module, "measure", watched)
    return seen


# --- FLOPs ------------------------------------------------------------------------------------


class Counting(fx.Interpreter):
    """Runs a graph and keeps, for every node, what torch's counter saw."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.counted: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS)) as counter:
            out = super().run_node(n)
        self.counted[n.name] = counter.get_total_flops()
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_what_the_counter_sees_op_by_op(family: Callable[[], Any]) -> None:
    model, x = family()
    gm, inputs = joint(model, x)
    run = Counting(gm)
    run.run(*inputs)
    predicted = {n.name: node_flops(n) for n in gm.graph.nodes}
    assert predicted == run.counted
    assert sum(predicted.values()) == step_flops(model, (x,)) > 0


def test_fused_attention_on_the_cpu_is_counted_forward_and_backward() -> None:
    model, x = attention()
    gm, _ = joint(model, x)
    forward = one(gm, aten._scaled_dot_product_flash_attention_for_cpu)
    backward = one(gm, aten._scaled_dot_product_flash_attention_for_cpu_backward)
    batch, heads, length, width = 3, 4, 12, 8
    product = 2 * batch * heads * length * length * width
    assert (node_flops(forward), node_flops(backward)) == (2 * product, 5 * product)


@pytest.mark.parametrize(
    ("call", "products"),
    [
        (lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.1, True), 2),
        (lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True), 2),
    ],
    ids=["flash", "efficient"],
)
def test_cuda_attention_is_counted_without_cuda(call: Callable[..., Any], products: int) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 16, 8, dtype=torch.float16, device="cuda") for _ in range(3))
        gm = make_fx(call)(q, k, v)
    assert sum(map(node_flops, gm.graph.nodes)) == products * 2 * 2 * 4 * 16 * 16 * 8


def test_symbolic_sizes_count_as_traced() -> None:
    gm = make_fx(lambda a, b: a @ b, tracing_mode="symbolic")(torch.ones(5, 7), torch.ones(7, 3))
    node = one(gm, aten.mm)
    assert node_flops(node) == 2 * 5 * 7 * 3
    assert node_bytes(node) == 4 * (5 * 7 + 7 * 3 + 5 * 3)
    assert costs_of(gm.graph.nodes, "profile").seconds[node.name] > 0


# --- Bytes and views --------------------------------------------------------------------------


def test_bytes_count_each_storage_once_and_expanded_elements_once() -> None:
    def f(x: torch.Tensor, row: torch.Tensor) -> Any:
        return x.t().mm(x), x + row.expand(6, 6), x * x

    gm = trace(f, torch.ones(6, 6), torch.ones(6))
    assert node_bytes(one(gm, aten.mm)) == 4 * (36 + 36)
    assert node_bytes(one(gm, aten.add)) == 4 * (36 + 6 + 36)
    assert node_bytes(one(gm, aten.mul)) == 4 * (36 + 36)


def test_a_gather_reads_only_the_rows_it_takes() -> None:
    gm = trace(lambda table, i: F.embedding(i, table), torch.ones(1000, 4), torch.zeros(3, dtype=torch.int64))
    assert node_bytes(one(gm, aten.embedding)) == 4 * 12 + 8 * 3 + 4 * 12


def test_views_are_free_and_writes_are_not() -> None:
    def f(x: torch.Tensor) -> Any:
        y = x.exp()
        a, b = y.view(2, 8).t().split(4)
        return a.sum(), b.clone(), y.relu_()

    gm = trace(f, torch.ones(4, 4))
    free = {n.target for n in gm.graph.nodes if n.op == "call_function" and is_view(n)}
    assert free == {aten.view.default, aten.t.default, aten.split.Tensor, operator.getitem}
    costs = costs_of(gm.graph.nodes, "profile")
    for node in gm.graph.nodes:
        assert (costs.seconds[node.name] == 0) == is_view(node)
        assert (roofline_seconds(node, DEVICES["cpu"]) == 0) == is_view(node)


# --- Roofline ---------------------------------------------------------------------------------


def product_of(side: int, dtype: torch.dtype = torch.float32) -> fx.Node:
    a = torch.ones(side, side, dtype=dtype)
    return one(trace(torch.mm, a, a), aten.mm)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_roofline_grows_with_work_and_falls_with_rates(device: costs_module.Device) -> None:
    times = [roofline_seconds(product_of(side), device) for side in (16, 64, 256, 1024)]
    assert device.launch_s < times[0]
    assert times == sorted(times)
    faster = replace(device, fp32_flops=2 * device.fp32_flops, bandwidth=2 * device.bandwidth)
    work, less = (roofline_seconds(product_of(1024), d) - d.launch_s for d in (device, faster))
    assert less == pytest.approx(work / 2)


def test_roofline_is_the_longer_of_compute_and_traffic() -> None:
    h100, a = DEVICES["H100"], torch.ones(4096, 4096, dtype=torch.bfloat16)
    product = roofline_seconds(product_of(4096, torch.bfloat16), h100)
    assert product == pytest.approx(h100.launch_s + 2 * 4096**3 / 989.4e12)
    total = roofline_seconds(one(trace(torch.add, a, a), aten.add), h100)
    assert total == pytest.approx(h100.launch_s + 2 * 2 * 4096**2 / 3.35e12)


def test_tf32_is_for_convolutions_and_for_products_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    a100, work = DEVICES["A100"], 2 * 2048**3
    assert roofline_seconds(product_of(2048), a100) == pytest.approx(a100.launch_s + work / 19.5e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert roofline_seconds(product_of(2048), a100) == pytest.approx(a100.launch_s + work / 156e12)
    monkeypatch.undo()
    x, w = torch.ones(8, 256, 64, 64), torch.ones(256, 256, 3, 3)
    conv = one(trace(lambda x, w: F.conv2d(x, w, padding=1), x, w), aten.convolution)
    assert roofline_seconds(conv, a100) == pytest.approx(a100.launch_s + node_flops(conv) / 156e12)


@pytest.mark.parametrize("field", ["fp32_flops", "bandwidth", "launch_s"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_device_has_positive_rates(field: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"'L4' has {field}"):
        replace(DEVICES["L4"], **{field: bad})


# --- Profile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_profile_measures_every_op_of_a_step(family: Callable[[], Any], unmeasured: list[fx.Node]) -> None:
    gm, _ = joint(*family())
    costs = costs_of(gm.graph.nodes, "profile")
    assert costs.estimated == 0
    assert costs.signatures == len(unmeasured)
    assert costs.seconds.keys() == {n.name for n in gm.graph.nodes}
    assert all(costs.seconds[n.name] > 0 for n in gm.graph.nodes if not is_view(n))
    assert costs.total_flops == sum(map(node_flops, gm.graph.nodes))


def test_profile_tells_long_from_short(unmeasured: list[fx.Node]) -> None:
    short, long = (costs_of([product_of(side)], "profile").total_seconds for side in (32, 512))
    assert long > 10 * short  # 4096 times the FLOPs


def test_like_ops_are_measured_once_and_others_again(unmeasured: list[fx.Node]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.exp().exp().exp() * 2.0 * 2.0 * 3.0).t().exp().sum()

    gm = trace(f, torch.ones(4, 6))
    first = costs_of(gm.graph.nodes, "profile")
    # exp, exp of the transposed strides, times 2, times 3, sum.
    assert first.signatures == len(unmeasured) == 5
    assert costs_of(gm.graph.nodes, "profile") == first
    assert len(unmeasured) == 5
    costs_of(trace(f, torch.ones(4, 7)).graph.nodes, "profile")
    assert len(unmeasured) == 10


def test_profile_leaves_random_state_and_operands_alone(unmeasured: list[fx.Node]) -> None:
    gm, inputs = joint(*attention())
    before = [t.detach().clone() for t in inputs]
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        costs_of(gm.graph.nodes, "profile")
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
    assert any(torch.Tag.nondeterministic_seeded in n.target.tags for n in unmeasured)  # they did run
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_operands_have_the_layout_of_the_fakes() -> None:
    seen: list[torch.Tensor] = []

    def spy(table: torch.Tensor, mask: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        seen.extend((table, mask, wide))
        return table.sum()

    table = torch.empty(300, 500).t()
    with FakeTensorMode() as mode:
        fakes = [
            mode.from_tensor(t)
            for t in (table, torch.ones(9, dtype=torch.bool), torch.ones(3, 1).expand(3, 4))
        ]
        graph = fx.Graph()
        nodes = [graph.placeholder(f"x{i}") for i in range(3)]
        for node, fake in zip(nodes, fakes, strict=True):
            node.meta["val"] = fake
        call = graph.call_function(spy, tuple(nodes))
        call.meta["val"] = mode.from_tensor(torch.ones(()))
    costs = costs_of([call], "profile")
    assert costs.estimated == 0
    for real, fake in zip(seen, fakes, strict=False):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert seen[0].t()[-1].std() > 0.2  # numbers, not zeros, to the end
    assert 0 <= seen[0].min() < seen[0].max() < 1
    assert seen[1].any()

    embedding = one(
        trace(lambda w, i: F.embedding(i, w), torch.ones(7, 2), torch.zeros(99, dtype=torch.int64)),
        aten.embedding,
    )
    assert profiler._index_bound(embedding) == 7


def test_operands_suit_ops_that_are_picky(unmeasured: list[fx.Node]) -> None:
    """Each of these raises, or stops a CUDA device, on numbers drawn without care."""

    def f(
        x: torch.Tensor, wide: torch.Tensor, some: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        return (
            F.binary_cross_entropy(x, x),
            torch.bernoulli(x),
            wide.masked_scatter(mask, some),
            wide.gather(1, ids),
            wide.index_put((ids[0],), wide[:3], accumulate=True),
            F.nll_loss(wide[:3], ids[0]),
            torch.normal(0.0, x),
        )

    x, wide, some = torch.full((8,), 0.5), torch.ones(8, 5), torch.ones(2)
    gm = trace(f, x, wide, some, torch.zeros(8, 3, dtype=torch.int64), torch.zeros(8, 5, dtype=torch.bool))
    costs = costs_of(gm.graph.nodes, "profile")
    assert costs.estimated == 0
    assert costs.signatures == len(unmeasured) >= 7


def test_what_cannot_be_measured_falls_back_to_a_scaled_roofline(
    unmeasured: list[fx.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(node: fx.Node, device: torch.device) -> profiler.Measured:
        if node.target is aten.mm.default:
            raise RuntimeError("no such kernel")
        return profiler.Measured(2 * roofline_seconds(node, DEVICES["L4"]), 64)

    monkeypatch.setattr(costs_module, "measure", refuse)
    gm = trace(lambda x: (x @ x).exp(), torch.ones(64, 64))
    costs = costs_of(gm.graph.nodes, "profile", rates=DEVICES["L4"])
    mm, exp = one(gm, aten.mm), one(gm, aten.exp)
    assert costs.estimated == 1
    assert "1 by roofline" in str(costs)
    assert costs.seconds[mm.name] == pytest.approx(2 * roofline_seconds(mm, DEVICES["L4"]))
    assert (costs.workspace_bytes[mm.name], costs.workspace_bytes[exp.name]) == (0, 64)


def test_a_profile_out_of_time_keeps_the_largest_shares(unmeasured: list[fx.Node]) -> None:
    gm = trace(lambda x: (x @ x).exp().sum(), torch.ones(256, 256))
    costs = costs_of(gm.graph.nodes, "profile", rates=DEVICES["cpu"], limit_s=1e-9)
    assert costs.estimated == costs.signatures - len(unmeasured) > 0
    assert [n.target for n in unmeasured] in ([], [aten.mm.default])


# --- The front door ---------------------------------------------------------------------------


def test_auto_profiles_on_a_cpu_only_what_is_quick(unmeasured: list[fx.Node]) -> None:
    nodes = [product_of(64)]
    assert costs_of(nodes, "auto", rates=DEVICES["cpu"]).source == "profile"
    slow = replace(DEVICES["cpu"], name="abacus", fp32_flops=1e3)
    costs = costs_of(nodes, "auto", rates=slow)
    assert (costs.source, costs.device) == ("roofline", "abacus")
    assert costs.total_seconds == roofline_seconds(nodes[0], slow)


def test_rates_of_this_machine_are_measured_once() -> None:
    here = profiler.device_for(CPU)
    assert here is profiler.device_for(CPU)
    assert 1e8 < here.fp32_flops < 1e14
    assert 1e8 < here.bandwidth < 1e13
    assert profiler.device_for(CPU, may_measure=False) is DEVICES["cpu"]


@pytest.mark.parametrize(
    ("full_name", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "A100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "A100"),
    ],
)
def test_gpus_go_by_their_names(full_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: full_name)
    assert profiler.device_for(torch.device("cuda", 0), may_measure=False).name == name


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="not 'guess'"):
        costs_of([], "guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'a' has seconds=nan"):
        Costs({"a": math.nan}, {"a": 0}, {"a": 0}, "roofline", "L4", 1)
    with pytest.raises(ValueError, match="same nodes"):
        Costs({"a": 1.0}, {}, {"a": 0}, "roofline", "L4", 1)


def test_costs_print_themselves() -> None:
    costs = costs_of([product_of(1000)], "roofline", rates=DEVICES["L4"])
    assert str(costs) == "roofline on L4: 1 nodes, 1 distinct, 0.071 ms, 2.000 GFLOP, workspace up to 0.0 MB"
    assert str(DEVICES["L4"]) == "L4 (30.3 TFLOP/s fp32, 121 half, 300 GB/s)"
