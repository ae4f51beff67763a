"""Does a plan change which kernels run?  It must not: flash attention stays flash attention.

A planned step that recomputes nothing is compared with the eager one as a multiset of kernels: on CUDA
the names that torch's profiler saw on the device, on a CPU the ops that make or change a storage.

``CASES`` are the places where a captured graph could take another kernel than eager does: each backend of
scaled dot product attention, chosen by mask, dropout, dtype and head size; convolutions in channels-last;
products in TF32.  Each is a small module, so that all of them take seconds.

Known weakness: names of cuBLAS and cuDNN kernels depend on heuristics that look at pointers' alignment; a
difference in these alone is for a person to judge.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner._compat import TorchDispatchMode, storage_key
from planner.checks.zoo import Example
from planner.measure.step import backward, forward, tensors_in, undone
from planner.options import Search
from planner.solving.priced import prepare

__all__ = ["CASES", "Case", "compare_kernels", "kernel_counts", "kernels_differ", "op_counts"]


# ------------------------------------------------------------------------------------------ counting


def kernel_counts(example: Example, device: torch.device) -> Counter[str]:
    """How often one step calls each kernel; on a CPU, each op that makes or changes a storage."""

    def step() -> None:
        with undone(example.model, example.inputs):
            passed = forward(example.model, example.inputs, example.loss_fn)
            backward(passed)

    if device.type != "cuda":
        with op_counts() as counts:
            step()
        return counts
    step()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    on_device = [e for e in profile.events() or () if e.device_type.name == "CUDA"]
    return Counter(e.name for e in on_device if not e.name.startswith(("Memcpy", "Memset")))


def kernels_differ(eager: Counter[str], planned: Counter[str]) -> dict[str, int]:
    """Calls of the planned step beyond eager's, by name; empty where they are the same."""
    names = sorted({*eager, *planned})
    return {name: planned[name] - eager[name] for name in names if planned[name] != eager[name]}


class _OpCounter(TorchDispatchMode):
    """Counts ops by name, those left out whose results all lie on storages they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_key(t) for t in tensors_in((args, kwargs or {}))}
        made = any(storage_key(t) not in given for t in tensors_in(result))
        name = str(func.overloadpacket)
        if (made or func._schema.is_mutable) and not name.startswith("aten.empty"):
            self.counts[name.rstrip("_")] += 1  # in place or not, it is the same kernel
        return result


@contextlib.contextmanager
def op_counts() -> Iterator[Counter[str]]:
    """Count the ops that compute something, by name, while the context is open."""
    with _OpCounter() as counter:
        yield counter.counts


# --------------------------------------------------------------------------------------------- cases


class _Attention(nn.Module):
    """Projections around ``scaled_dot_product_attention``; x and its output are (batch, rows, width)."""

    def __init__(self, heads: int, depth: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.project = nn.Linear(heads * depth, 3 * heads * depth)
        self.out = nn.Linear(heads * depth, heads * depth)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, rows, width = x.shape
        split = self.project(x).view(batch, rows, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, is_causal=self.causal
        )
        return self.out(y.transpose(1, 2).reshape(batch, rows, width)).float().square().mean()


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, groups=2),
            nn.GELU(),
            nn.ConvTranspose2d(32, 16, 2, 2),
            nn.AdaptiveAvgPool2d(4),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels).float().square().mean()


class _Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 64, 3, padding=1)
        self.linear = nn.Linear(64, 64)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.convolution(pixels).flatten(2).transpose(1, 2)
        scores = self.linear(tokens) @ tokens.transpose(1, 2)
        return scores.square().mean()


@dataclass(frozen=True)
class Case:
    """A module small enough to check in a second, and the global flags it is run under."""

    build: Callable[[torch.device], tuple[nn.Module, dict[str, Tensor]]]
    flags: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def _half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _attention(
    mask: str = "none",
    *,
    dropout: float = 0.0,
    causal: bool = False,
    depth: int = 64,
    dtype: torch.dtype | None = None,
) -> Callable[[torch.device], tuple[nn.Module, dict[str, Tensor]]]:
    def build(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
        kind = dtype or _half(device)
        batch, rows, heads = 2, 64, 4
        model = _Attention(heads, depth, dropout, causal).to(device, kind)
        random = torch.Generator().manual_seed(0)
        x = torch.randn(batch, rows, heads * depth, generator=random).to(device, kind)
        inputs = {"x": x}
        if mask != "none":
            kept = torch.arange(rows) < torch.tensor([[rows], [rows // 2]])
            seen = kept[:, None, None, :].expand(batch, 1, rows, rows)
            added = torch.zeros(batch, 1, rows, rows).masked_fill(~seen, -1e4)
            inputs["mask"] = (seen.contiguous() if mask == "bool" else added.to(kind)).to(device)
        return model, inputs

    return build


def _pixels(model: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 8, 16, 16, generator=random).to(device, dtype).contiguous(memory_format=layout)
    model = model.to(device=device, dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
    return model, {"pixels": pixels}


def _convolutions(
    layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Callable[[torch.device], tuple[nn.Module, dict[str, Tensor]]]:
    return lambda device: _pixels(_Convolutions(), device, dtype or _half(device), layout)


def _products(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    found: tuple[nn.Module, dict[str, Tensor]] = _pixels(
        _Products(), device, torch.float32, torch.contiguous_format
    )
    return found


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "attention": Case(_attention()),
        "attention, causal": Case(_attention(causal=True)),
        "attention, dropout": Case(_attention(dropout=0.1)),
        "attention, bool mask": Case(_attention("bool")),
        "attention, added mask": Case(_attention("added")),
        "attention, added mask, dropout": Case(_attention("added", dropout=0.1)),
        "attention, float32": Case(_attention(dtype=torch.float32)),
        "attention, heads of 36": Case(
            _attention(depth=36)
        ),  # not a multiple of 8: padded, or another kernel
        "convolutions": Case(_convolutions(torch.contiguous_format)),
        "convolutions, channels last": Case(_convolutions(torch.channels_last)),
        "convolutions, float32": Case(_convolutions(torch.contiguous_format, torch.float32)),
        "products, TF32": Case(_products, lambda: _tf32(True)),
        "products, full float32": Case(_products, lambda: _tf32(False)),
    }
)


def compare_kernels(name: str, device: torch.device) -> dict[str, int]:
    """Calls that a planned step of ``CASES[name]`` makes beyond eager's; empty where they are the same."""
    case = CASES[name]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model, inputs = case.build(device)
    example = Example(name, model.train(), inputs)
    with case.flags():
        eager = kernel_counts(example, device)
        step = prepare(model, inputs, costs="roofline")
        plan = step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all"))
        plan.apply(model)
        try:
            return kernels_differ(eager, kernel_counts(example, device))
        finally:
            plan.restore(model)
