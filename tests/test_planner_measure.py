"""The meter against hand-computed peaks, to the byte; the step that every measurement runs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from planner._compat import FakeTensorMode
from planner.errors import PlannerError
from planner.measure import (
    compare,
    cuda_step_peak,
    loss_of,
    run_step,
    step_flops,
    step_peak,
    tensors_in,
)
from planner.measure.meter import StorageMeter
from tests.models import CASES, PEERS, PEERS_EAGER_MB

KB = 1024
N = 256  # floats of one kilobyte


def kilobyte(**options: Any) -> Tensor:
    return torch.ones(N, **options)


# --- the meter -----------------------------------------------------------------------------------


def test_an_op_holds_its_inputs_and_outputs() -> None:
    x = kilobyte()
    with StorageMeter() as meter:
        y = x + 1
        z = y * 2
        del y
        w = z.exp()
    assert meter.peak_bytes == 3 * KB
    assert meter.live_bytes == 3 * KB  # x, z, w
    del z
    assert meter.live_bytes == 2 * KB
    del w, x
    assert meter.live_bytes == 0


def test_views_cost_nothing_and_keep_their_base() -> None:
    with StorageMeter() as meter:
        x = torch.zeros(4, N)
        view = x.view(2, -1).transpose(0, 1)[1:]
        assert meter.live_bytes == 4 * KB
        del x
        assert meter.live_bytes == 4 * KB
        del view
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 4 * KB


def test_in_place_ops_make_nothing() -> None:
    with StorageMeter() as meter:
        x = torch.zeros(N)
        x.add_(1).relu_()
        torch.add(x, 1, out=x)
    assert meter.peak_bytes == KB


def test_several_outputs_and_lists_are_counted() -> None:
    x = torch.randn(4, N)
    with StorageMeter() as meter:
        kept = x.topk(2, dim=0)  # floats and int64 indices
        assert meter.live_bytes == (4 + 2 + 4) * KB
        summed = torch._foreach_add([x, kept.values], 1.0)
    assert meter.peak_bytes == (10 + 4 + 2) * KB
    assert len(summed) == 2


def test_resizes_are_followed() -> None:
    with StorageMeter() as meter:
        x = torch.zeros(N)
        x.resize_(3 * N)
        assert meter.live_bytes == 3 * KB
        x.untyped_storage().resize_(0)
        x.detach()  # what happens outside of ops is seen at the next op
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 3 * KB


def test_what_a_closure_holds_is_counted_from_the_start() -> None:
    hidden = torch.randn(8, N)

    def late(x: Tensor) -> Tensor:
        return x + hidden.sum()

    with StorageMeter() as meter:
        big = torch.zeros(4, N)  # the peak, before hidden has been met
        del big
        late(torch.zeros(N))
    assert meter.peak_bytes == (8 + 4) * KB


def test_python_tensors_are_new_not_old() -> None:
    with StorageMeter() as meter:
        big = torch.zeros(4, N)
        del big
        small = torch.tensor([0.0] * N)
        assert meter.live_bytes == KB
    assert meter.peak_bytes == 4 * KB
    del small


def test_registered_tensors_count_once_and_from_the_start() -> None:
    x = kilobyte()
    meter = StorageMeter()
    with meter:
        y = torch.zeros(2 * N)
        del y
    meter.register(x, x[:3], x.view(2, -1))
    assert (meter.live_bytes, meter.peak_bytes) == (KB, 3 * KB)


def test_reset_peak_and_timeline() -> None:
    with StorageMeter(timeline=True) as meter:
        x = torch.zeros(2 * N)
        y = x + 1
        del y
        meter.reset_peak()
        assert meter.peak_bytes == 2 * KB
        x.sum()
    assert meter.peak_bytes == 2 * KB + 4
    names = [name for name, _ in meter.timeline]
    assert names == ["aten.zeros.default", "aten.add.Tensor", "aten.sum.default"]
    assert [count for _, count in meter.timeline] == [2 * KB, 4 * KB, 2 * KB + 4]
    with pytest.raises(ValueError, match="timeline=True"):
        _ = StorageMeter().timeline


def test_a_device_filter_counts_one_device() -> None:
    with FakeTensorMode(), StorageMeter("cuda") as cuda, StorageMeter("cuda:1") as second:
        on_cpu = torch.zeros(4, N)
        on_cuda = torch.zeros(2 * N, device="cuda:0")
        on_other = on_cuda.to("cuda:1")
    assert cuda.peak_bytes == 4 * KB
    assert second.peak_bytes == 2 * KB
    assert on_cpu.device.type == "cpu" and on_other.device.index == 1


def test_fake_tensors_have_the_bytes_of_real_ones() -> None:
    def work(x: Tensor) -> Tensor:
        return (x @ x).softmax(-1).sum()

    with StorageMeter() as real:
        work(torch.ones(32, 32))
    with FakeTensorMode(), StorageMeter() as fake:
        work(torch.ones(32, 32))
    assert real.peak_bytes == fake.peak_bytes == 3 * 4 * KB  # x, its square, the softmax of that


def test_saved_tensors_live_until_their_backward_has_run() -> None:
    w = kilobyte(requires_grad=True)
    with StorageMeter() as meter:
        loss = (w * 2).exp().sum()  # exp saves its output; w * 2 is dropped
        assert meter.live_bytes == 2 * KB + 4
        loss.backward()
        assert meter.live_bytes == 2 * KB + 4  # w, its gradient, the loss; what exp saved is gone
    # Backward of exp: w, exp's output, the gradient it makes, the loss and its gradient (expanded).
    assert meter.peak_bytes == 3 * KB + 8


def test_the_engine_adds_and_accumulates_in_sight() -> None:
    w = kilobyte(requires_grad=True)
    w.sum().backward(inputs=[w])
    with StorageMeter(timeline=True) as meter:
        (w * 3).sum().backward()
    assert "aten.add_.Tensor" in [name for name, _ in meter.timeline]  # into the existing gradient
    with StorageMeter(timeline=True) as meter:
        torch.autograd.grad((w * w).sum(), w)
    assert [n for n, _ in meter.timeline].count("aten.add.Tensor") == 1  # the two slots of w * w


# --- peaks of steps ------------------------------------------------------------------------------


class Chain(nn.Module):
    """x -> exp -> sin -> sum, all of one kilobyte."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(kilobyte())

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).exp().sin()


def test_step_peak_by_hand() -> None:
    # After the forward: w, x, e = exp(w x) (saved twice, once stored), s = sin(e) (held), tangent: 5 KB.
    # Backward of sin: cos(e) is made (6), then tangent * cos(e) (7 KB).  Of exp: cos is gone, g * e:
    # w, x, e, s, tangent, g, g * e (7 KB).  Of mul by x: e and g gone; w, x, s, tangent, g', g' x: 6 KB.
    assert step_peak(Chain(), (kilobyte(),)) == 7 * KB
    assert step_peak(Chain(), (kilobyte(),), include_resident=False) == 4 * KB  # above w, x, tangent


def test_dropped_outputs_are_not_counted() -> None:
    x = kilobyte()
    held = step_peak(Chain(), (x,), loss_fn=torch.sum)
    dropped = step_peak(Chain(), (x,), loss_fn=torch.sum, hold_outputs=False)
    assert held - dropped == KB


def test_tangents_are_resident_and_checked() -> None:
    x, wide = kilobyte(), torch.ones(4, N)
    assert step_peak(Chain(), (x,), tangents=[wide[0]]) == 7 * KB + 3 * KB
    with pytest.raises(ValueError, match=r"tangents have shapes \[\(4, 256\)\]"):
        step_peak(Chain(), (x,), tangents=[wide])


def test_tied_weights_are_counted_once() -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    x = torch.ones(1, 64)
    resident = {}
    for tied in (False, True):
        if tied:
            second.weight = first.weight
        model = nn.Sequential(first, second)
        whole = step_peak(model, (x,))
        resident[tied] = whole - step_peak(model, (x,), include_resident=False)
    assert resident[False] - resident[True] == 64 * 64 * 4


def test_a_callable_is_run_and_counted() -> None:
    w = kilobyte(requires_grad=True)

    def step(x: Tensor) -> None:
        (w * x).sum().backward()

    # w, x, the product's gradient: w, x, loss, its gradient, g x (1 KB); w * x itself is gone by then.
    assert step_peak(step, (kilobyte(),)) == 3 * KB + 8
    assert w.grad is not None


def test_two_identical_runs_measure_the_same_and_leave_nothing() -> None:
    case = CASES["resnet"]
    model, batch = case.build(), case.make_inputs(0)
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    peaks = {step_peak(model, batch) for _ in range(3)}
    gc.collect()
    assert len(peaks) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", PEERS)
def test_another_meters_figures_are_found_again(name: str) -> None:
    case = PEERS[name]
    peak = step_peak(case.build(), case.make_inputs(0), include_resident=False, hold_outputs=False)
    assert peak / 1e6 == pytest.approx(PEERS_EAGER_MB[name], abs=0.05)  # they are rounded to 0.1


@pytest.mark.filterwarnings("ignore")  # of its module hooks, about containers of tensors
@pytest.mark.parametrize("name", CASES)
def test_torchs_own_tracker_counts_the_same(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.make_inputs(0)
    torch.manual_seed(0)
    peak = step_peak(model, batch, loss_fn=case.loss_fn)
    tracker = MemTracker()
    tracker.track_external(model, *tensors_in(batch))
    with tracker:
        outputs = model(**batch) if isinstance(batch, dict) else model(*batch)
        loss = loss_of(outputs, case.loss_fn)
        assert loss is not None
        loss.backward()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert counted["Total"] == peak


def test_gradients_must_be_empty() -> None:
    model = Chain()
    model.w.grad = kilobyte()
    for measure in (step_peak, step_flops, run_step):
        with pytest.raises(PlannerError, match=r"gradient of 'w' is not None.*zero_grad"):
            measure(model, (kilobyte(),))


def test_nothing_to_differentiate() -> None:
    model = Chain().requires_grad_(False)
    with pytest.raises(PlannerError, match="nothing to differentiate"):
        step_peak(model, (kilobyte(),))


def test_inputs_of_another_type() -> None:
    with pytest.raises(TypeError, match="a tuple or a dict of arguments, or a tensor, got list"):
        step_peak(Chain(), [kilobyte()])  # type: ignore[arg-type]


def test_the_cuda_meter_refuses_the_cpu() -> None:
    with pytest.raises(ValueError, match="measures CUDA devices, got cpu"):
        cuda_step_peak(Chain(), (kilobyte(),))


# --- the loss ------------------------------------------------------------------------------------


def test_which_output_is_the_loss() -> None:
    logits, loss = kilobyte(requires_grad=True) * 2, kilobyte(requires_grad=True).sum()
    assert loss_of(logits, torch.sum) is not None
    assert loss_of({"loss": loss, "logits": logits}) is loss
    assert loss_of(loss) is loss
    assert loss_of((loss, logits)) is loss
    assert loss_of(logits) is None
    assert loss_of((loss, loss * 2)) is None  # two candidates: neither is chosen
    with pytest.raises(TypeError, match=r"loss_fn must return a scalar tensor, got \(256,\).*mean"):
        loss_of(logits, lambda out: out * 2)
    with pytest.raises(TypeError, match="got float"):
        loss_of(logits, lambda out: 1.0)


# --- FLOPs ---------------------------------------------------------------------------------------


def test_flops_of_a_matrix_product() -> None:
    model = nn.Linear(32, 16, bias=False)
    x = torch.ones(8, 32)
    once = 2 * 8 * 32 * 16
    assert step_flops(model, (x,)) == 2 * once  # forward, gradient of the weight
    assert step_flops(model, (x.requires_grad_(),)) == 3 * once
    assert x.grad is None


def test_flops_of_attention_on_the_cpu() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (10, 12, 12))
    once = 2 * 2 * 3 * 10 * 12 * 16
    assert step_flops(Attend(), (q, k, v)) == (2 + 5) * once


def test_recomputation_is_counted() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    x = torch.ones(8, 32)

    def checkpointed(recompute: bool) -> int:
        def step() -> None:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            out.sum().backward()

        return step_flops(step)

    # The second product's result is read by nothing: early stop leaves one of the two to recompute.
    assert checkpointed(True) - checkpointed(False) == 2 * 8 * 32 * 32


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_step_repeats_itself_bit_for_bit(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.make_inputs(0)
    first = run_step(model, batch, loss_fn=case.loss_fn, seed=3)
    same = compare(first, run_step(model, batch, loss_fn=case.loss_fn, seed=3))
    assert same.equal, str(same)
    other = compare(first, run_step(model, case.make_inputs(1), loss_fn=case.loss_fn, seed=3))
    assert not other.gradients.equal and other.gradients.max_relative > 0
    assert len(first.gradients) == sum(1 for _ in model.parameters())
    assert all(torch.isfinite(g).all() for g in first.gradients.values())


@pytest.mark.parametrize("name", sorted(set(CASES) - {"resnet"}))  # which has no random op
def test_the_families_draw_random_numbers(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.make_inputs(0)
    a, b = (run_step(model, batch, loss_fn=case.loss_fn, seed=seed) for seed in (0, 1))
    assert not compare(a, b).gradients.equal


@pytest.mark.parametrize("name", CASES)
def test_the_families_have_more_activations_than_parameters(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.make_inputs(0)
    parameters = sum(p.nbytes for p in model.parameters())
    above = step_peak(model, batch, loss_fn=case.loss_fn, include_resident=False)
    assert above > 3 * parameters


def test_compare_names_what_differs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    x = torch.randn(4, 8)
    a = run_step(model, (x,))
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    model[1].running_mean += 1.0
    b = run_step(model, (x,))
    found = compare(a, b)
    assert not found.equal and found.rng.equal and found.same_output_type
    assert "0.weight" in found.gradients.differing
    assert found.buffers.differing == ("1.running_mean", "1.running_var")
    assert found.outputs.differing == ("0",)
    assert "differ, by up to" in str(found) and "outputs differentiated" in str(a)
    drawn = compare(a, run_step(nn.Sequential(*model[:2]), (x,)))
    assert drawn.rng.differing == ("cpu",)  # no dropout, so the generator is elsewhere


def test_bits_not_values_are_compared() -> None:
    class Sign(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
            self.scale = scale

        def forward(self) -> Tensor:
            return self.w * self.scale

    found = compare(run_step(Sign(1.0)), run_step(Sign(-1.0)))
    assert not found.outputs.equal and found.outputs.max_relative == 0.0  # 0.0 and -0.0
    assert found.gradients.max_relative == 2.0 and found.gradients.max_absolute == 2.0
    nan = compare(run_step(Sign(float("nan"))), run_step(Sign(float("nan"))))
    assert nan.equal
    assert compare(run_step(Sign(1.0)), run_step(Sign(float("nan")))).outputs.max_absolute == float("inf")


def test_a_changed_shape_or_a_missing_name_is_a_difference() -> None:
    a = run_step(nn.Linear(4, 4), (torch.ones(2, 4),))
    b = run_step(nn.Linear(4, 4, bias=False), (torch.ones(3, 4),))
    found = compare(a, b)
    assert set(found.gradients.differing) >= {"bias"}
    assert found.outputs.max_relative == float("inf")


def test_run_step_undoes_itself_even_when_it_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            raise ArithmeticError(f"after {self.norm(x).shape}")

    model, x = Fails(), torch.randn(8, 4)
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        run_step(model, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert int(model.norm.num_batches_tracked) == 0 and not model.norm.running_mean.any()


def test_inputs_that_require_gradients_are_recorded() -> None:
    x = kilobyte(requires_grad=True)
    record = run_step(Chain(), (x,))
    assert set(record.gradients) == {"w", "input 0"} and x.grad is None


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_tensor_is_its_indices_and_values(layout: torch.layout) -> None:
    whole, each, values = torch.arange(51), torch.arange(50), torch.ones(50)
    if layout is torch.sparse_coo:
        indices = torch.stack([each, each])
        parts, sparse = [indices], torch.sparse_coo_tensor(indices, values, (50, 50))
    else:
        parts = [whole, each]
        sparse = torch.sparse_compressed_tensor(*parts, values, (50, 50), layout=layout)
    with StorageMeter() as meter:
        meter.register(sparse)
        assert meter.live_bytes == sum(p.nbytes for p in parts) + values.nbytes
        double = sparse * 2
    assert meter.live_bytes == meter.made_bytes + sum(p.nbytes for p in parts) + values.nbytes
    assert double.layout is layout and meter.made_bytes >= values.nbytes


def test_a_gradient_that_is_there_already_is_named_with_what_clears_it() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4, requires_grad=True)
    x.grad = torch.ones_like(x)
    with pytest.raises(PlannerError, match=r"'input 0' is not None.*set its \.grad to None"):
        step_peak(model, (x,))
    x.grad = None
    model.bias.grad = torch.ones(2)
    with pytest.raises(PlannerError, match=r"'bias' is not None.*model.zero_grad"):
        step_peak(model, (x,))
