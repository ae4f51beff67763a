"""Plans for a GPU that is not here: its kernels, bytes and scratch, what is refused, and what is said."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import planner
from planner import PlannerError
from planner._compat import FakeTensorMode
from planner.capture.as_eager.cuda_attention import CudaAttention, _Call, kernel_for
from planner.capture.joint_graph import capture
from planner.costs.target import Target
from planner.costs.translation import RULES, scratch_bytes, translated
from planner.devices import state as devices
from planner.devices.cublas import cublas_workspace_bytes, cublaslt_workspace_bytes, library_blocks
from planner.devices.rates import DEVICES, device_named
from planner.devices.state import DeviceMemory, memory_of, warn_of_little_memory
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.measure import step_peak
from planner.plan import Plan
from planner.solving.calibrate import calibrated
from planner.solving.priced import PricedStep, prepare

MB = 2**20
CPU = torch.device("cpu")
BATCH, HEADS, LENGTH, DEPTH = 2, 4, 40, 16


class Attention(nn.Module):
    """A norm, attention with dropout of its own, dropout, and a loss of sorts."""

    def __init__(self, p: float = 0.1, masked: bool = False, deep: int = 0) -> None:
        super().__init__()
        width = HEADS * DEPTH
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.p, self.masked = p, masked
        self.deep = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(deep)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mask = x.new_ones(LENGTH, LENGTH, dtype=torch.bool).tril() if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.p)
        return F.dropout(self.deep(self.out(y.transpose(1, 2).flatten(2))), 0.1).float().square().mean()


def attending(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Attention(**settings).to(dtype), (torch.randn(BATCH, LENGTH, HEADS * DEPTH, dtype=dtype),)


def graph_on(name: str, model: nn.Module, inputs: object) -> TrainingGraph:
    device = device_named(name)
    assert device is not None and device.capability is not None
    with CudaAttention(device.capability):
        return training_graph(capture(model, inputs))


def outputs_of(graph: TrainingGraph, op: str) -> list[int]:
    """Bytes of what the only call of ``op`` makes."""
    [found] = [o for o in graph.ops if o.target == f"aten.{op}"]
    return [graph.values[v].bytes for v in found.outputs]


@pytest.fixture(scope="module")
def step() -> PricedStep:
    model, inputs = attending(masked=True, deep=16)
    return prepare(model, inputs, costs="h100", optimizer=torch.optim.AdamW)


@pytest.fixture(scope="module")
def plan(step: PricedStep) -> Plan:
    return step.plan_bytes((step.minimum_peak_bytes + step.baseline.peak_bytes) // 2)


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["H100", "h100", "rtx 4090", "RTX4090", "rtx-4090", "L4", "a100", "H200"])
def test_devices_go_by_their_names(name: str) -> None:
    target = Target.of(name, CPU)
    assert target.elsewhere and target.source == "roofline"
    assert target.named is not None and target.named.name.lower().replace(" ", "") == name.lower().replace(
        " ", ""
    ).replace("-", "")


@pytest.mark.parametrize("name", ["H1000", "cpu", "", "guess", None, 100])
def test_other_names_are_refused_with_those_there_are(name: Any) -> None:
    with pytest.raises(ValueError, match=r"'H200', 'H100', 'A100', 'L4', 'RTX 4090'\), not") as error:
        planner.plan(nn.Linear(2, 2), 1.0, (torch.ones(1, 2),), costs=name)
    assert repr(name) in str(error.value)


def test_the_name_of_the_gpu_that_is_here_is_only_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    target = Target.of("H100", here)
    assert not target.elsewhere
    assert (target.name, target.grain, target.capability) == ("", 512, (9, 0))
    assert Target.of("L4", here).elsewhere
    assert Target.of("L4", here).capability == (8, 9)
    assert Target.of("auto", CPU).grain == 1


# --- A plan for another device ----------------------------------------------------------------


def test_it_says_which_device_it_is_for_and_its_bytes_add_up(
    plan: Plan, step: PricedStep, tmp_path: Path
) -> None:
    assert (plan.planned_for, plan.cost_device, plan.device) == ("H100", "H100", "cpu")
    assert plan.summary().startswith("Attention on H100 (captured on cpu), torch")
    assert "on H100 (captured on cpu)" in plan._repr_html_()
    assert sum(plan.breakdown.values()) == plan.peak_bytes <= plan.budget_bytes
    assert all(size % 512 == 0 for size in plan.breakdown.values())
    assert (plan.timeline % 512 == 0).all()
    assert plan.breakdown["library_workspace"] == step.memory.library_bytes == 2 * (32 + 1) * MB
    assert "cuBLAS workspace" in plan.summary()
    assert plan.recompute_flops > 0
    plan.save(tmp_path / "plan.json")
    again = planner.load(tmp_path / "plan.json")
    assert (again.planned_for, again.summary()) == (plan.planned_for, plan.summary())
    with pytest.raises(PlannerError, match="for the H100"):
        again.apply(step.model)


@pytest.mark.parametrize("use", ["apply", "rewrite", "verify"])
def test_it_is_not_used_here(plan: Plan, step: PricedStep, use: str) -> None:
    before = dict(vars(step.model))
    with pytest.raises(PlannerError, match=r"for the H100, captured on cpu: its kernels, bytes and seconds"):
        getattr(plan, use)()
    assert vars(step.model) == before


def test_training_and_measuring_are_for_this_device(step: PricedStep) -> None:
    with pytest.raises(ValueError, match="for a model that trains, not 'H100'"):
        planner.enable(step.model, 1.0, costs="H100")
    with pytest.raises(PlannerError, match="calibrate where that is"):
        calibrated(step, 10**9)


def test_a_plan_for_the_cpu_is_exact_and_has_neither_rounding_nor_workspace() -> None:
    model, inputs = attending(torch.float32)
    here = planner.plan(model, 1.0, inputs, costs="roofline")
    assert here.planned_for == ""
    assert here.breakdown["library_workspace"] == here.breakdown["margin"] == 0
    assert here.peak_bytes == step_peak(here.rewrite(), inputs)
    assert here.peak_bytes % 512


def test_a_model_without_memory_is_planned_for_a_gpu() -> None:
    with FakeTensorMode():
        model, inputs = Attention(), (torch.empty(BATCH, LENGTH, HEADS * DEPTH),)
        inside = planner.plan(model, 1.0, inputs, costs="L4")
    found = planner.frontier(model, inputs, costs="L4", points=2)
    assert inside.planned_for == "L4"
    assert found.baseline_peak_bytes == inside.baseline_peak_bytes
    assert inside.breakdown["library_workspace"] == 2 * (9 * MB + 128 * 1024)


# --- Which kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "h100", "a100", "l4"),
    [
        ({}, "cudnn", "flash", "flash"),
        ({"dropout_p": 0.1}, "cudnn", "flash", "flash"),
        ({"mask": True}, "cudnn", "efficient", "efficient"),
        ({"mask": True, "dropout_p": 0.1}, "cudnn", "efficient", "efficient"),
        ({"dtype": torch.float32}, "efficient", "efficient", "efficient"),
        ({"dtype": torch.float64}, "math", "math", "math"),
        ({"depth": 256}, "cudnn", "flash", "flash"),
        ({"depth": 200}, "cudnn", "flash", "efficient"),
        ({"depth": 320}, "efficient", "efficient", "efficient"),
        ({"depth": 20}, "flash", "flash", "flash"),  # padded
        ({"depth": 20, "mask": True}, "math", "math", "math"),
        ({"keys": 64, "is_causal": True}, "cudnn", "efficient", "efficient"),
        ({"key_heads": 2, "enable_gqa": True}, "cudnn", "flash", "flash"),
        ({"key_heads": 2, "enable_gqa": True, "dtype": torch.float32}, "math", "math", "math"),
        ({"key_heads": 2}, "math", "math", "math"),
        ({"keys": 1}, "flash", "flash", "flash"),
    ],
)
def test_the_kernel_is_cudas_choice(change: dict[str, Any], h100: str, a100: str, l4: str) -> None:
    change = dict(change)
    depth, keys, heads = change.pop("depth", 64), change.pop("keys", 32), change.pop("key_heads", 4)
    dtype, masked = change.pop("dtype", torch.bfloat16), change.pop("mask", False)
    query = torch.empty(2, 4, 32, depth, dtype=dtype, device="meta")
    key = torch.empty(2, heads, keys, depth, dtype=dtype, device="meta")
    call = _Call(query, key, key, torch.empty(32, keys, device="meta") if masked else None, **change)
    assert [kernel_for(call, c) for c in ((9, 0), (8, 0), (8, 9))] == [h100, a100, l4]
    assert kernel_for(call, (7, 5)) == "math"
    assert kernel_for(call, (10, 0)) == (h100 if depth <= 128 or h100 != "cudnn" else a100)


def test_attention_keeps_what_its_kernel_keeps() -> None:
    rows, head_bytes = BATCH * HEADS * LENGTH, BATCH * HEADS * LENGTH * DEPTH * 2
    plain, dropping = attending(p=0.0), attending(p=0.1)
    assert outputs_of(graph_on("H100", *plain), "_scaled_dot_product_cudnn_attention")[:2] == [
        head_bytes,
        4 * rows,
    ]
    assert outputs_of(graph_on("A100", *dropping), "_scaled_dot_product_flash_attention")[:2] == [
        head_bytes,
        4 * rows,
    ]
    padded = BATCH * HEADS * 64  # rows of the logsumexp are padded to 32
    graph = graph_on("A100", *attending(torch.float32))
    assert outputs_of(graph, "_scaled_dot_product_efficient_attention")[:2] == [2 * head_bytes, 4 * padded]


def test_no_gpu_keeps_the_probabilities_that_a_cpu_keeps_for_dropout() -> None:
    square = BATCH * HEADS * LENGTH * LENGTH
    model, inputs = attending(p=0.1)
    matrices = {square, 2 * square, 4 * square}  # of bools, half and full precision
    assert any(v.bytes in matrices for v in training_graph(capture(model, inputs)).values)
    assert not any(v.bytes in matrices for v in graph_on("H100", model, inputs).values)
    # A mask is made additive for every call: half-precision, one for all heads.
    masked = graph_on("A100", *attending(masked=True))
    assert [v.bytes for v in masked.values if v.producer is not None and "where" in v.name] == [
        LENGTH * LENGTH * 2
    ]


def test_padded_depths_and_groups_of_heads_are_captured() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 4 * 20), nn.Linear(8, 2 * 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (m(x).unflatten(-1, (-1, 20)).transpose(1, 2) for m in (self.q, self.k))
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum()

    x = torch.ones(2, 16, 8, dtype=torch.bfloat16)
    graph = graph_on("A100", Grouped().to(torch.bfloat16), (x,))
    assert outputs_of(graph, "_scaled_dot_product_flash_attention")[0] == 2 * 4 * 16 * 24 * 2


# --- What is translated -----------------------------------------------------------------------


def test_every_rule_has_its_source_and_the_stage_prints_what_it_did(step: PricedStep) -> None:
    assert all(rule.change and rule.source and (rule.outputs or rule.scratch or rule.ops) for rule in RULES)
    page = str(step.translation)
    assert page.startswith("captured on cpu, as H100 runs it:")
    for said in (
        "1 x _scaled_dot_product_cudnn_attention, the kernel CUDA chooses",
        "2 x rng_state: the generator's state is a tensor on the host; 10.11 kB -> 0 B",
        "layer_norm_kernel.cu",
        "1 x dropout_apply: runs in the kernel that draws the mask",
        "flash_api.cpp, mha_bwd",
    ):
        assert said in page
    assert step.translation is not None and not step.translation.kept


def test_statistics_of_half_precision_are_fp32() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.batch = nn.LayerNorm(6), nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.batch(self.layer(x)).float().sum()

    device = DEVICES["A100"]
    x = torch.ones(3, 5, 6, dtype=torch.bfloat16)
    half = translated(graph_on("A100", Norms().to(torch.bfloat16), (x,)), device).graph
    assert outputs_of(half, "native_layer_norm") == [3 * 5 * 6 * 2, 4 * 15, 4 * 15]
    [norm] = [o for o in half.ops if "batch_norm" in o.target and o.phase == "forward"]
    assert [half.values[v].bytes for v in norm.outputs][:3] == [3 * 5 * 6 * 2, 4 * 5, 4 * 5]
    graph = graph_on("A100", Norms(), (x.float(),))
    full = translated(graph, device)
    assert [v.bytes for v in full.graph.values] == [v.bytes for v in graph.values]
    assert full.changes and all(c.before_bytes == c.after_bytes for c in full.changes)


def node(op: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **layout: Any) -> fx.Node:
    """A call of ``op`` on tensors of these shapes; its result is like the first."""
    graph = fx.Graph()
    sources = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for source, shape in zip(sources, shapes, strict=True):
        source.meta["val"] = torch.empty(shape, dtype=dtype, device="meta", **layout)
    packet = getattr(torch.ops.aten, op)
    call = graph.call_function(packet.default, tuple(sources))
    call.meta["val"] = sources[0].meta["val"]
    return call


def test_scratch_is_what_the_kernels_sources_say() -> None:
    q, grouped = (2, 4, 100, 40), (2, 2, 100, 40)
    flash = "_scaled_dot_product_flash_attention_backward"
    expected = 4 * 2 * 4 * 128 * (64 + 1)  # rows to 128, columns to 32, and a sum per row
    assert scratch_bytes(f"aten.{flash}", node(flash, q, q, q)) == expected
    assert scratch_bytes(f"aten.{flash}", node(flash, q, q, grouped)) == expected + 2 * (2 * 4 * 100 * 40 * 2)
    efficient = "_scaled_dot_product_efficient_attention_backward"
    assert scratch_bytes(f"aten.{efficient}", node(efficient, q, q, q)) == 4 * 2 * 4 * 128 * 65
    conv, x = "convolution", (2, 8, 16, 16)
    assert scratch_bytes(f"aten.{conv}", node(conv, x)) == 2 * (2 * 8 * 16 * 16 * 2)
    assert scratch_bytes(f"aten.{conv}", node(conv, x, memory_format=torch.channels_last)) == 0
    assert scratch_bytes(f"aten.{conv}", node(conv, x, dtype=torch.float32)) == 0
    lookup = "embedding_dense_backward"
    assert scratch_bytes(f"aten.{lookup}", node(lookup, (4096, 8), (4096,))) == 4096 * (4 * 8 + 6 * 2)
    assert scratch_bytes(f"aten.{lookup}", node(lookup, (3072, 8), (3072,))) == 0
    assert scratch_bytes("aten.exp", node("exp", x)) == 0


# --- Workspaces and memory --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "environ", "expected"),
    [
        ((9, 0), {}, 32 * MB),
        ((8, 0), {}, 8 * MB + 128 * 1024),
        ((8, 9), {}, 8 * MB + 128 * 1024),
        ((9, 0), {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, 32 * MB),
        ((9, 0), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, 128 * 1024),
        ((8, 0), {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}, 8 * MB + 128 * 1024),
        ((9, 0), {"CUBLAS_WORKSPACE_CONFIG": "nonsense"}, 32 * MB),
        ((9, 0), {"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "1"}, 32 * MB),
        ((9, 0), {"CUBLASLT_WORKSPACE_SIZE": "512"}, 32 * MB),
    ],
)
def test_the_workspace_is_pytorchs(
    capability: tuple[int, int], environ: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cublas_workspace_bytes(capability, environ) == expected
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCH_CUBLASLT_UNIFIED_WORKSPACE", "CUBLASLT_WORKSPACE_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if name in environ:
            monkeypatch.setenv(name, environ[name])
    unified = environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") == "1"
    own = 0 if unified else int(environ.get("CUBLASLT_WORKSPACE_SIZE", 1024)) * 1024
    assert cublaslt_workspace_bytes(environ) == own
    assert library_blocks(capability, products=True, biased=True) == (expected, own) * 2
    assert library_blocks(capability, products=True, biased=False) == (expected,) * 2
    assert library_blocks(None, products=True, biased=True) == ()


def test_a_step_without_products_has_no_workspace() -> None:
    step = prepare(nn.LayerNorm(8), (torch.ones(2, 8),), costs="H100")
    assert step.memory.library_bytes == 0


def test_a_budget_above_what_a_gpu_has_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = attending()
    with caplog.at_level(logging.WARNING):
        planner.plan(model, 30.0, inputs, costs="L4", solver="keep_all")
    assert "the budget is 30 GB, but L4 has 24 GB in total; the plan takes" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        planner.plan(model, 20.0, inputs, costs="L4", solver="keep_all")
    assert not caplog.messages


def test_memory_that_others_hold_is_said(caplog: pytest.LogCaptureFixture) -> None:
    card = DeviceMemory("A made GPU", total_bytes=80 * 10**9, free_bytes=10 * 10**9, reserved_bytes=5 * 10**9)
    assert card.others_bytes == 65 * 10**9
    warn_of_little_memory(40 * 10**9, 14 * 10**9, card)
    warn_of_little_memory(40 * 10**9, 14 * 10**9, None)
    assert not caplog.messages
    warn_of_little_memory(40 * 10**9, 16 * 10**9, card)
    [line] = caplog.messages
    assert "takes 16 GB" in line and "only 15 GB can be had" in line and "65 GB are held by other" in line


def test_the_driver_is_asked_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_of(CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    assert memory_of(torch.device("cuda")) == DeviceMemory("X", 100, 60, 30)


def test_a_model_on_a_gpu_that_is_not_there_is_refused_before_it_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tracing it would end the process where torch was built without CUDA."""
    with FakeTensorMode():
        model = nn.Module()
        model.register_parameter("weight", nn.Parameter(torch.empty(4, device="cuda")))
        x = torch.empty(4, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlannerError, match=r'on cuda:0, but torch .* finds none .*costs="H200" or "H100"'):
        planner.plan(model, 1.0, (x,))
    monkeypatch.setattr(devices, "torch", _with_one_gpu())
    with pytest.raises(PlannerError, match=r"on cuda:1, but torch .* finds 1 of them"):
        devices.reachable(torch.device("cuda", 1))
    devices.reachable(torch.device("cuda", 0))


def _with_one_gpu() -> SimpleNamespace:
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    return SimpleNamespace(cuda=cuda, __version__="0", version=SimpleNamespace(cuda="13.0"))
