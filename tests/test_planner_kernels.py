"""Every kernel a model may call is captured as eager runs it: the same bits, the same bytes, the same op.

The tracer restates some ops in Python, as a compiler would want them, with other rounding and other
memory; and the fake forms of some kernels lay their results out otherwise than the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner import _compat
from planner._compat import FakeTensorMode, tracing
from planner.capture import meta
from planner.capture.as_eager.recurrences import gru, lstm_gradients
from planner.capture.joint_graph import capture
from planner.capture.state.effects import attributes_kept
from planner.capture.state.second_call import settled
from planner.errors import TraceError
from planner.measure.flops import FLOP_FORMULAS
from planner.options import Search
from planner.solving.priced import PricedStep, prepare


class Around(nn.Module):
    """``op`` between two linear layers over the last dimension."""

    def __init__(self, op: Callable[..., Tensor], width: int, *modules: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(width, 8)
        self.op, self.inner = op, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x), *self.inner))


def around(op: Callable[..., Tensor], x: Tensor, *modules: nn.Module) -> PricedStep:
    """The step of ``op`` on ``x``; it takes whatever width ``op`` leaves."""
    torch.manual_seed(0)
    with torch.no_grad():
        width = op(nn.Linear(8, 8)(x), *modules).shape[-1]
    model = Around(op, width, *modules)
    return prepare(
        model, (x,), loss_fn=lambda y: y.pow(2).mean(), costs="roofline", search=Search(time_limit_s=0.3)
    )


def assert_as_eager(step: PricedStep) -> None:
    """Bit-equal and to the byte, with everything kept and with as little as can be."""
    for plan in (step.plan_bytes(step.baseline.peak_bytes, search=Search("keep_all")), step.least_plan()):
        report = plan.verify()
        assert report.equal, str(report)
        assert report.peak_bytes == report.predicted_peak_bytes <= plan.budget_bytes, str(report)


WORDS, IMAGES, VOLUMES = torch.randn(4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 2, 4, 6, 8)


def resized(mode: str, **how: object) -> Callable[[Tensor], Tensor]:
    return lambda h: F.interpolate(h, mode=mode, **how)  # type: ignore[arg-type]


RESIZED: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "upsample_nearest1d": (resized("nearest", scale_factor=2), WORDS),
    "upsample_linear1d": (resized("linear", scale_factor=2), WORDS),
    "upsample_nearest2d": (resized("nearest", scale_factor=2), IMAGES),
    "upsample_bilinear2d": (resized("bilinear", size=(9, 11), align_corners=True), IMAGES),
    "upsample_bicubic2d": (resized("bicubic", size=(4, 5)), IMAGES),
    "_upsample_bilinear2d_aa": (resized("bilinear", size=(4, 5), antialias=True), IMAGES),
    "_upsample_nearest_exact2d": (resized("nearest-exact", size=(9, 11)), IMAGES),
    "upsample_trilinear3d": (resized("trilinear", scale_factor=2), VOLUMES),
    "upsample_nearest3d": (resized("nearest", scale_factor=2), VOLUMES),
    "hardshrink": (F.hardshrink, WORDS),
    "softshrink": (F.softshrink, WORDS),
    "multi_margin_loss": (lambda h: h + F.multi_margin_loss(h[0], torch.arange(6)), WORDS),
}


@pytest.mark.parametrize("name", RESIZED)
def test_an_op_is_not_restated(name: str) -> None:
    op, x = RESIZED[name]
    step = around(op, x)
    targets = [op.target for op in step.graph.ops]
    assert targets.count(f"aten.{name}") == 1 and targets.count(f"aten.{name}_backward") == 1
    assert_as_eager(step)


def turned(h: Tensor, norm: nn.Module) -> Tensor:
    """A norm over a tensor whose memory lies the other way round, and a reshape of its result."""
    return norm(h.transpose(1, 2)).transpose(1, 2).reshape(-1, 8)


def _experts(h: Tensor, experts: nn.Bilinear) -> Tensor:
    """Rows by expert, in single precision, for which torch's own formula has no fakes."""
    ends = torch.tensor([10, 24], dtype=torch.int32)
    return F.grouped_mm(h.flatten(0, 1), experts.weight, offs=ends).view_as(h)


OTHERS: dict[str, tuple[Callable[..., Tensor], Tensor, tuple[nn.Module, ...]]] = {
    "batch_norm, turned": (turned, WORDS, (nn.BatchNorm1d(8),)),
    "layer_norm, turned": (turned, WORDS, (nn.LayerNorm(6),)),
    "mse, turned": (lambda h: h + F.mse_loss(h.transpose(1, 2), torch.ones(4, 8, 6)), WORDS, ()),
    "fold": (lambda h: F.fold(F.unfold(h, 3, padding=1), (6, 8), 3, padding=1), IMAGES, ()),
    "instance_norm": (lambda h, m: m(h), IMAGES, (nn.InstanceNorm2d(4, track_running_stats=True),)),
    "group_norm": (lambda h, m: m(h), IMAGES, (nn.GroupNorm(2, 4),)),
    "conv_transpose": (lambda h, m: m(h), IMAGES, (nn.ConvTranspose2d(4, 4, 3, padding=1),)),
    "max_pool": (lambda h: F.max_pool2d(h, 2), IMAGES, ()),
    "adaptive_pool": (lambda h: F.adaptive_avg_pool2d(h, 3), IMAGES, ()),
    "rrelu": (lambda h, m: m(h), IMAGES, (nn.RReLU(),)),
    "alpha_dropout": (lambda h, m: m(h), IMAGES, (nn.AlphaDropout(0.2),)),
    "noise": (lambda h: h + torch.randn_like(h), WORDS, ()),
    "shuffle": (lambda h: h[torch.randperm(4)], WORDS, ()),
    "attention": (lambda h, m: m(h, h, h)[0], WORDS, (nn.MultiheadAttention(8, 2, 0.1, batch_first=True),)),
    "lstm cell": (lambda h, m: m(h[0])[0], WORDS, (nn.LSTMCell(8, 8),)),
    "weight_norm": (lambda h, m: m(h), WORDS, (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),)),
    "fft": (lambda h: torch.fft.irfft(torch.fft.rfft(h)), WORDS, ()),
    "scatter": (lambda h: torch.zeros_like(h).index_add(0, torch.tensor([0, 0, 1, 2]), h), WORDS, ()),
    "sort": (lambda h: h.sort(-1)[0], WORDS, ()),
    "grouped": (_experts, WORDS, (nn.Bilinear(8, 8, 2),)),
    "grid_sample": (lambda h: F.grid_sample(h, torch.rand(2, 6, 8, 2) * 2 - 1), IMAGES, ()),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Default grid_sample")
def test_an_op_is_as_in_eager(name: str) -> None:
    op, x, modules = OTHERS[name]
    assert_as_eager(around(op, x, *modules))


def _stands(form: tuple[tuple[Any, Any], Any]) -> bool:
    (op, key), python = form
    return op.py_kernels.get(key) is python


def test_the_tracer_is_left_as_it_was() -> None:
    formulas = torch._decomp.decomposition_table
    forms = {(op, key): op.py_kernels[key] for op, key in tracing._python_forms()}
    before = dict(formulas)
    assert len(forms) > 40
    with (
        pytest.raises(TraceError, match="0, False"),
        _compat.kernels_as_eager(gru, lstm_gradients),
    ):
        raise TraceError(f"{sum(map(_stands, forms.items()))}, {dict(formulas) == before}")
    assert {(op, key): op.py_kernels.get(key) for op, key in forms} == forms and dict(formulas) == before


def test_a_parameter_that_the_forward_writes_to_is_refused() -> None:
    words = torch.randint(9, (4, 6))
    with pytest.raises(
        TraceError, match=r"the forward writes into inner\.0\.weight \(an embedding's max_norm"
    ):
        around(lambda h, m: h + m(words), WORDS, nn.Embedding(9, 8, max_norm=1.0))


class Recording(nn.Module):
    """Sets hooks at its first call and remembers that it did, as transformers' recorders do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.heard = nn.Linear(8, 8), []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "is_set", False):
            hook = lambda *_: self.heard.append(1)  # noqa: E731
            hook.__module__ = "transformers.utils.output_capturing"
            self.inner.register_forward_hook(hook)
            self.is_set = True
        self.heard.clear()
        return self.inner(x) * len(self.heard)


def test_hooks_that_the_forward_sets_are_set_once() -> None:
    model = Recording()
    step = prepare(model, (WORDS,), loss_fn=lambda y: y.sum(), costs="roofline")
    assert not model.inner._forward_hooks and not hasattr(model, "is_set")
    assert model(WORDS).allclose(model.inner(WORDS)) and len(model.inner._forward_hooks) == 1
    assert step.least_plan().verify().ok


class Correcting(nn.Module):
    """Finds at its first call that the text is short, and stays with that, as Swin and BigBird do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.window, self.kind = nn.Linear(8, 8), 9, "sparse"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.window:
            self.window, self.kind = 0, "full"
        return self.inner(x) * (2.0 if self.kind == "full" else 3.0)


def test_what_the_first_call_corrects_is_corrected() -> None:
    model = Correcting()
    step = prepare(model, (WORDS,), loss_fn=lambda y: y.sum(), costs="roofline")
    assert (model.window, model.kind) == (0, "full")
    assert step.least_plan().verify().ok


def test_a_correction_that_fails_is_taken_back() -> None:
    model = Correcting()
    with attributes_kept(model) as effects:
        model(WORDS)
    assert [(name, was, now) for name, _, _, was, now in effects.changed] == [
        ("window", 9, 0),
        ("kind", "sparse", "full"),
    ]
    with pytest.raises(ZeroDivisionError):
        settled(model, effects, lambda: 1 // 0)
    assert (model.window, model.kind) == (9, "sparse")


class Pooled(nn.Module):
    """A volume of one place, channels last, in which a call in place stands before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.turned = nn.GroupNorm(2, 4), nn.Conv3d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.permute(0, 4, 1, 2, 3))
        h = nn.functional.leaky_relu(h, 0.1, inplace=True)
        self.strides = h.stride()
        return self.turned(h).square().mean()


def test_a_call_in_place_leaves_the_layout_by_which_a_convolution_chooses_its_kernel() -> None:
    model, x = Pooled(), torch.randn(2, 1, 1, 1, 4)
    model(x)
    want = model.strides
    step = capture(model, (x,)).step
    convolutions = step.module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert [meta.tensor(n.all_input_nodes[0]).stride() for n in convolutions] == [want]


GROUPED = {
    "rows": ((8, 16), (2, 16, 4), 8),
    "sums": ((8, 16), (16, 4), 16),
    "columns": ((2, 8, 16), (16, 4), 4),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_fakes_of_grouped_products_are_laid_out_as_they_are(kind: str) -> None:
    a, b, end = GROUPED[kind]
    given = torch.randn(a), torch.randn(b), torch.tensor([end // 2, end], dtype=torch.int32)
    made = torch._grouped_mm(*given[:2], offs=given[2])
    with FakeTensorMode() as mode, tracing.fakes_as_kernels():
        fakes = [mode.from_tensor(t) for t in given]
        fake = torch._grouped_mm(*fakes[:2], offs=fakes[2])
    assert (fake.shape, fake.stride(), fake.dtype) == (made.shape, made.stride(), made.dtype)
    assert FLOP_FORMULAS[torch.ops.aten._grouped_mm](a, b) == 2 * 8 * 16 * 4
