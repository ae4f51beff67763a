"""From a step captured on the CPU to the step a CUDA device would run: one table, op by op.

Which attention kernel runs is decided during the capture (:mod:`planner.capture.as_eager.cuda_attention`);
everything else that differs is a rule here: what changes, and where that is written.  A
:class:`Translation` says what was applied to a step, and prints it.

Scratch is estimated from the sources of the kernels.  It is what stands in where nothing was measured: a
profile on a CUDA device replaces it, and so does what ``plan(..., calibrate=True)`` finds.  Known
weaknesses: scratch of convolutions on fp32 operands is not known and taken for none; cuDNN's attention
does not publish its own and is taken for flash's; kernels that only a CPU has (``mkldnn``) are kept as
they are, and named.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from planner._compat import size_hint
from planner.capture import meta
from planner.devices.rates import Device
from planner.graph.nodes import tensors_of
from planner.graph.training_graph import GraphOp, GraphValue, TrainingGraph
from planner.units import bytes_text, rounded_up

__all__ = ["RULES", "Change", "Rule", "Translation", "scratch_bytes", "translated"]

_HALF = (torch.bfloat16, torch.float16)


def _tensor(node: fx.Node, index: int) -> torch.Tensor:
    """The fake value of an argument."""
    source = node.args[index]
    assert isinstance(source, fx.Node)
    value: torch.Tensor = meta.tensor(source)
    return value


def _sizes(tensor: torch.Tensor) -> list[int]:
    return [*map(size_hint, tensor.shape)]


# --- Scratch ----------------------------------------------------------------------------------


def _flash_backward(node: fx.Node) -> int:
    query, key = _tensor(node, 1), _tensor(node, 2)
    batch, heads, length, depth = _sizes(query)
    rows, columns = rounded_up(length, 128), rounded_up(depth, 32 if depth <= 128 else 64)
    groups = heads // _sizes(key)[1]
    expanded = 2 * batch * heads * _sizes(key)[2] * depth * query.element_size() if groups > 1 else 0
    return 4 * batch * heads * rows * (columns + 1) + expanded


def _efficient_backward(node: fx.Node) -> int:
    query, key = _tensor(node, 1), _tensor(node, 2)
    batch, heads, length, depth = _sizes(query)
    held = 4 * batch * heads * rounded_up(length, 64) * (rounded_up(depth, 64) + 1)
    if query.dtype in _HALF and depth > 128:
        held += 2 * 4 * batch * heads * rounded_up(_sizes(key)[2], 64) * rounded_up(depth, 64)
    return held


def _embedding_backward(node: fx.Node) -> int:
    gradient, indices = _tensor(node, 0), _tensor(node, 1)
    count, width = size_hint(indices.numel()), _sizes(gradient)[-1]
    if count <= 3072:
        return 0
    return count * (4 * width + 6 * indices.element_size())


def _convolution(node: fx.Node) -> int:
    backward = "backward" in str(node.target)
    x = _tensor(node, 1 if backward else 0)
    if x.dtype not in _HALF or x.is_contiguous(memory_format=torch.channels_last) or x.dim() != 4:
        return 0
    y = _tensor(node, 0) if backward else tensors_of(node)[0]
    return size_hint(x.numel() + y.numel()) * x.element_size()


# --- Sizes ------------------------------------------------------------------------------------


def _statistics_in_fp32(node: fx.Node) -> Mapping[int, int]:
    """Output -> bytes, for mean and inverse deviation behind the first output."""
    x, outputs = _tensor(node, 0), tensors_of(node)
    if x.dtype not in _HALF:
        return {}
    return {i: 4 * size_hint(t.numel()) for i, t in enumerate(outputs) if i in (1, 2)}


def _on_the_host(node: fx.Node) -> Mapping[int, int]:
    return {0: 0}


@dataclass(frozen=True)
class Rule:
    """How CUDA differs from the capture on some ops.

    ``ops``      names as in ``GraphOp.target``.
    ``change``   what differs, ``source`` where that is written (paths are PyTorch's).
    ``outputs``  bytes of those outputs that differ, by their position.
    ``scratch``  bytes the kernel takes while it runs.
    """

    ops: tuple[str, ...]
    change: str
    source: str
    outputs: Callable[[fx.Node], Mapping[int, int]] | None = None
    scratch: Callable[[fx.Node], int] | None = None


_SDPA = "aten._scaled_dot_product"
RULES: tuple[Rule, ...] = (
    Rule(
        ("rng_state",),
        "the generator's state is a tensor on the host",
        "torch/cuda/random.py, get_rng_state",
        outputs=_on_the_host,
    ),
    Rule(
        ("aten.native_layer_norm", "aten._fused_rms_norm"),
        "mean and inverse deviation of half-precision inputs are fp32",
        "aten/src/ATen/native/cuda/layer_norm_kernel.cu, toAccumulateType",
        outputs=_statistics_in_fp32,
    ),
    Rule(
        tuple(
            f"aten.{name}"
            for name in (
                "native_batch_norm",
                "_native_batch_norm_legit",
                "_native_batch_norm_legit_functional",
                "cudnn_batch_norm",
            )
        ),
        "mean and inverse deviation of half-precision inputs are fp32; cuDNN's reserve is taken for none",
        "aten/src/ATen/native/cuda/Normalization.cu, acc_type; aten/src/ATen/native/cudnn/BatchNorm.cpp",
        outputs=_statistics_in_fp32,
    ),
    Rule(
        ("dropout_apply",),
        "runs in the kernel that draws the mask, the first time",
        "aten/src/ATen/native/cuda/Dropout.cu, fused_dropout_kernel",
    ),
    Rule(
        (f"{_SDPA}_flash_attention_backward", f"{_SDPA}_cudnn_attention_backward"),
        "gradients of queries are added up in fp32, with a sum per row; grouped keys are expanded",
        "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: dq_accum, softmax_d",
        scratch=_flash_backward,
    ),
    Rule(
        (f"{_SDPA}_efficient_attention_backward",),
        "gradients of queries are added up in fp32, those of keys and values too above 128 wide",
        "aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h, kNeedsAccumGradQ",
        scratch=_efficient_backward,
    ),
    Rule(
        ("aten.embedding_dense_backward",),
        "above 3072 indices they are sorted, and partial sums of rows kept in fp32",
        "aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu, grad_weight_per_segment",
        scratch=_embedding_backward,
    ),
    Rule(
        ("aten.convolution", "aten.convolution_backward", "aten.cudnn_convolution"),
        "half-precision NCHW input and output are transposed to NHWC for the tensor cores",
        "NVIDIA, Convolutional Layers User's Guide, Tensor Layouts In Memory: NCHW vs NHWC",
        scratch=_convolution,
    ),
)
_RULE: Mapping[str, Rule] = MappingProxyType({op: rule for rule in RULES for op in rule.ops})


def scratch_bytes(op: str, node: fx.Node) -> int:
    """An estimate of what the kernel of ``op`` takes on CUDA while it runs; 0 where nothing is known."""
    rule = _RULE.get(op)
    return 0 if rule is None or rule.scratch is None else rule.scratch(node)


# --- The stage --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One rule as applied to a step: ops it met, and bytes of their outputs before, after, and scratch."""

    rule: Rule
    ops: int
    before_bytes: int
    after_bytes: int
    scratch_bytes: int

    def __str__(self) -> str:
        sizes = ""
        if self.before_bytes != self.after_bytes:
            sizes += f"; {bytes_text(self.before_bytes)} -> {bytes_text(self.after_bytes)}"
        if self.scratch_bytes:
            sizes += f"; scratch up to {bytes_text(self.scratch_bytes)}"
        names = ", ".join(name.removeprefix("aten.") for name in self.rule.ops)
        return f"{self.ops} x {names}: {self.rule.change}{sizes} [{self.rule.source}]"


@dataclass(frozen=True, eq=False)
class Translation:
    """A step as ``device`` would run it.

    ``graph``            with the device's sizes.
    ``workspace_bytes``  estimated scratch by op name; ops without any are left out.
    ``changes``          rules that met an op, in the order of ``RULES``.
    ``attention``        how often each kernel of attention runs in the forward, by name.
    ``kept``             kernels that only a CPU has, and how often they run: nothing is known of CUDA's.
    """

    device: Device
    graph: TrainingGraph
    workspace_bytes: Mapping[str, int]
    changes: tuple[Change, ...]
    attention: Mapping[str, int]
    kept: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"captured on {self.graph.device}, as {self.device.name} runs it:"]
        lines += [f"  {count} x {name}, the kernel CUDA chooses" for name, count in self.attention.items()]
        lines += [f"  {change}" for change in self.changes]
        lines += [f"  {count} x {name}: kept as on the CPU" for name, count in self.kept.items()]
        return "\n".join(lines)

    __repr__ = __str__


def translated(graph: TrainingGraph, device: Device) -> Translation:
    """``graph``, captured on a CPU under :class:`~.cuda_attention.CudaAttention`, as on ``device``."""
    values = list(graph.values)
    scratch: dict[str, int] = {}
    met: dict[str, list[tuple[int, int, int]]] = {}
    for op in graph.ops:
        rule = _RULE.get(op.target)
        if rule is None or op.node is None or (op.target == "dropout_apply" and op.phase != "forward"):
            continue
        before = sum(values[v].bytes for v in op.outputs)
        for v, size in _resized(op, values, rule).items():
            values[v] = dataclasses.replace(values[v], bytes=size)
        after = sum(values[v].bytes for v in op.outputs)
        needs = 0 if rule.scratch is None else rule.scratch(op.node)
        if needs:
            scratch[op.name] = needs
        met.setdefault(rule.change, []).append((before, after, needs))
    changes = tuple(
        Change(rule, len(of), sum(o[0] for o in of), sum(o[1] for o in of), max(o[2] for o in of))
        for rule in RULES
        if (of := met.get(rule.change))
    )
    fused = dataclasses.replace(graph, values=tuple(values), ops=_with_fused_dropout(graph))
    names = Counter(op.target.removeprefix("aten.") for op in graph.ops)
    attention = {n: c for n, c in names.items() if "_attention" in n and "backward" not in n}
    kept = {n: c for n, c in names.items() if "mkldnn" in n or n.endswith(("_for_cpu", "_for_cpu_backward"))}
    return Translation(device, fused, scratch, changes, attention, kept)


def _resized(op: GraphOp, values: list[GraphValue], rule: Rule) -> dict[int, int]:
    """Value -> bytes, where the device's differ; an output that is the op's own storage keeps its number."""
    if rule.outputs is None or op.node is None:
        return {}
    sizes = rule.outputs(op.node)
    made = tensors_of(op.node)
    if len(made) != len(op.outputs):  # outputs that alias one another, or buffers that it updates
        return {}
    return {v: sizes[i] for i, v in enumerate(op.outputs) if i in sizes and values[v].bytes}


def _with_fused_dropout(graph: TrainingGraph) -> tuple[GraphOp, ...]:
    """A mask's first application right behind its draw is one kernel with it, whose result is there too."""
    ops = list(graph.ops)
    draws = {op.outputs[0]: i for i, op in enumerate(ops) if op.target == "dropout_mask" and op.outputs}
    for i, op in enumerate(ops):
        if op.target != "dropout_apply" or op.phase != "forward" or not op.outputs:
            continue
        draw = next((draws[v] for v in op.inputs if v in draws), None)
        if draw is not None and ops[draw].workspace is None:
            ops[draw] = dataclasses.replace(ops[draw], workspace=op.outputs[0])
            ops[i] = dataclasses.replace(op, fused_with_previous=True)
    return tuple(ops)
