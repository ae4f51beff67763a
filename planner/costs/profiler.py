"""What an op takes when it runs: seconds and scratch bytes, measured on the device at hand.

One signature (target, shapes, strides, types, other arguments) is measured once per device, and kept on disk
(:mod:`planner.costs.cache`; of a CPU some are measured again in each process): on operands made from its fake
inputs, after a first call, the median of many.  Only one op's operands exist at a time, so a model that does
not fit can be priced, and random states are left as they were.

In a step an op seldom finds its operands in cache.  On CUDA several sets of them take turns, together
twice the second-level cache where ``_SETS_BYTES`` allow; on a CPU other memory is written in between.

Right about what a roofline misjudges by several times: attention on a CPU, small convolutions,
reductions.  Known weaknesses: on a CPU, memory that a step touches for the first time costs page faults
that a repeated op does not see; indices are uniform, kinder to scatters than skewed ones; scratch is
measured with the seconds on CUDA only, whose peak statistics are reset, and on a CPU where it is asked for
(:func:`cpu_scratch_bytes`).
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from planner._compat import allocated_peaks, modes_set_aside, pytree, size_hint, storage_key
from planner.capture import meta
from planner.costs.cache import Measured
from planner.costs.roofline import operands_of, packet_of
from planner.devices.rates import DEVICES, Device
from planner.graph import kernels

__all__ = ["cpu_scratch_bytes", "device_for", "measure", "signature_of", "undisturbed"]

aten = torch.ops.aten

_REPEATS_S = 0.02  # spent repeating one op
_MAX_REPEATS = 20
_COLD_BYTES = 2**24  # written between two calls on a CPU: more than its fast caches hold
_MAX_BATCH = 100  # calls between two CUDA events
_SETS_BYTES = 2**29  # of all sets of operands of an op, unless a single one is larger
_MAX_SETS = 8
_TILE = 2**16  # random numbers drawn for an operand; a larger one repeats them, at the speed of a copy


# --- Timing -----------------------------------------------------------------------------------


def _timed(calls: Sequence[Callable[[], Any]], device: torch.device) -> Measured:
    """The median of the ``calls``, which do the same on other operands and take turns."""
    if device.type == "cuda":
        return _timed_on_cuda(calls, device)
    for call in calls:
        call()
    times: list[float] = []
    others = torch.zeros(_COLD_BYTES, dtype=torch.uint8)
    began = time.perf_counter()
    for call in itertools.cycle(calls):
        others.add_(1)  # in a step, other ops have run since the operands were made
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
        del out  # one set of outputs at a time
        if len(times) >= 2 and (len(times) >= _MAX_REPEATS or time.perf_counter() - began > _REPEATS_S):
            break
    return Measured(statistics.median(times), 0)


def _timed_on_cuda(calls: Sequence[Callable[[], Any]], device: torch.device) -> Measured:
    """Batches of calls between two events, so that the queue is full, as it is in a step."""
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = calls[0]()
    torch.cuda.synchronize(device)
    workspace_bytes = _most_beyond_now(device)
    del out
    turns = itertools.cycle(calls)

    def per_call_s(count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            next(turns)()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3 / count, 1e-7)  # 1e-7: below the events' resolution

    one_s = per_call_s(1)
    batch = max(1, min(_MAX_BATCH, int(_REPEATS_S / _MAX_REPEATS / one_s)))
    batches = max(2, min(_MAX_REPEATS, int(_REPEATS_S / (batch * one_s))))
    return Measured(statistics.median(per_call_s(batch) for _ in range(batches)), workspace_bytes)


def _most_beyond_now(device: torch.device) -> int:
    """How many more bytes than now there were at the peak: as asked for, where the allocator says so.

    What it hands out beyond that depends on what lay free, here on nothing of the step.
    """
    stats = torch.cuda.memory_stats(device)
    kind = "requested_bytes" if stats.get("requested_bytes.all.peak") else "allocated_bytes"
    return int(stats.get(f"{kind}.all.peak", 0) - stats.get(f"{kind}.all.current", 0))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, real tensors, and afterwards the global random states of before."""
    cuda = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if cuda else -1
    with ExitStack() as stack:
        stack.enter_context(modes_set_aside())  # the caller's FakeTensorMode, where a model has no memory
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[index] if cuda else []))
        stack.enter_context(torch.cuda.device(index))
        yield


# --- Operands ---------------------------------------------------------------------------------


def _index_bound(node: fx.Node) -> int:
    """Integers below this are valid in every integer operand; 1, so zeros, if nothing is known."""
    packet, args = packet_of(node), node.args
    if packet is aten.embedding_dense_backward:
        return size_hint(args[2])  # type: ignore[arg-type]
    if packet is aten.embedding:
        return size_hint(meta.value(args[0]).shape[0])  # type: ignore[arg-type]
    if packet in (aten.nll_loss_forward, aten.nll_loss_backward):
        log_probabilities = args[0] if packet is aten.nll_loss_forward else args[1]
        return size_hint(meta.value(log_probabilities).shape[-1])  # type: ignore[arg-type]
    return 1


# Their masks may not hold more ones than their sources have elements, or a CUDA device gives up.
_COUNTED_MASKS = frozenset({aten.masked_scatter, aten.masked_scatter_backward})


def _materialize(fake: torch.Tensor, below: int, generator: torch.Generator) -> torch.Tensor:
    """A real tensor of the same sizes, strides, type and device.

    Uniform in [0, 1), which no kernel refuses as a probability, a variance or a logarithm's argument;
    integers and bits uniform below ``below``.
    """
    sizes, strides = [*map(size_hint, fake.shape)], [*map(size_hint, fake.stride())]
    extent = 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    drawn = min(extent, _TILE)
    if fake.dtype.is_floating_point or fake.dtype.is_complex:
        tile = torch.rand(drawn, generator=generator, device=fake.device)
    else:
        tile = torch.randint(below, (drawn,), generator=generator, device=fake.device)
    tile = tile.to(fake.dtype)
    if extent > drawn:
        tile = tile.repeat(-(-extent // drawn))
    return tile.as_strided(sizes, strides)


def _sets(operand_bytes: int, device: torch.device) -> int:
    """How many sets of operands take turns."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    evict = -(-2 * cache_bytes // max(operand_bytes, 1))
    return max(1, min(max(2, evict), _MAX_SETS, _SETS_BYTES // max(operand_bytes, 1)))


def measure(node: fx.Node, device: torch.device) -> Measured:
    """One execution of ``node`` on operands of its own, inside :func:`undisturbed`.

    Raises what the op raises on such operands, ``torch.OutOfMemoryError`` among it.
    """
    operand_bytes = sum(size_hint(t.numel()) * t.element_size() for t in operands_of(node))
    made = _on_operands(node)
    return _timed([made() for _ in range(_sets(operand_bytes, device))], device)


def cpu_scratch_bytes(nodes: Sequence[fx.Node]) -> list[int]:
    """What each of ``nodes`` takes from the CPU's allocator beside its results while it runs.

    Raises as :func:`measure` does.
    """
    with undisturbed(torch.device("cpu")):
        calls = [_on_operands(node)() for node in nodes]
        results_bytes = [
            _storage_bytes(call()) for call in calls
        ]  # the first call, whose library sets itself up
        peaks = allocated_peaks(calls)
    return [max(0, peak - own) for peak, own in zip(peaks, results_bytes, strict=True)]


def _storage_bytes(results: Any) -> int:
    tensors = [t for t in pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _on_operands(node: fx.Node) -> Callable[[], Callable[[], Any]]:
    """Makes calls of ``node``, each on operands of its own."""
    bound = _index_bound(node)
    bits = 1 if packet_of(node) in _COUNTED_MASKS else 2
    generators: dict[torch.device, torch.Generator] = {}

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return size_hint(leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.device not in generators:
            generators[leaf.device] = torch.Generator(leaf.device).manual_seed(0)
        return _materialize(leaf, bits if leaf.dtype == torch.bool else bound, generators[leaf.device])

    def prepared() -> Callable[[], Any]:
        operands = {source: pytree.tree_map(real, meta.value(source)) for source in node.all_input_nodes}
        args, kwargs = map_arg((node.args, node.kwargs), operands.__getitem__)
        target: Any = kernels.write_over if node.target is kernels.written else node.target
        return lambda: target(*args, **kwargs)

    return prepared


def signature_of(node: fx.Node, device: torch.device) -> str:
    """Equal for nodes that cost the same on ``device`` under torch's present settings."""

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            sizes, strides = [*map(size_hint, leaf.shape)], [*map(size_hint, leaf.stride())]
            return f"{leaf.dtype}{sizes}{strides}@{leaf.device}"
        return size_hint(leaf) if isinstance(leaf, torch.SymInt) else leaf

    arguments = map_arg(
        (node.args, node.kwargs), lambda source: pytree.tree_map(describe, meta.value(source))
    )
    target: Any = node.target
    name = f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__qualname__") else str(target)
    return f"{name}{arguments} on {device} {_settings(device)}"


def _settings(device: torch.device) -> tuple[object, ...]:
    """What chooses between kernels, or between speeds of one."""
    if device.type != "cuda":
        return torch.get_float32_matmul_precision(), torch.get_num_threads()
    cudnn = torch.backends.cudnn
    return (
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


# --- Rates ------------------------------------------------------------------------------------


def device_for(device: torch.device, *, may_measure: bool = True) -> Device:
    """The rates of ``device``: a GPU's from ``DEVICES`` if it is there, else measured once per process.

    With ``may_measure=False`` what is not in the table is taken for its "cpu", or its "A100".
    """
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        for name, known in DEVICES.items():
            if set(name.split()) <= set(words) and "Laptop" not in words:
                return known
    if may_measure:
        return _measured_rates(device, torch.get_num_threads())
    return DEVICES["cpu" if device.type == "cpu" else "A100"]


@functools.cache
def _measured_rates(device: torch.device, threads: int) -> Device:
    """The rates seen in a matrix product, a copy and a tiny sum; ``threads`` is there for the cache."""
    side, elements = (8192, 2**27) if device.type == "cuda" else (1024, 2**23)
    with undisturbed(device):
        square = torch.ones(side, side, device=device)
        flops_per_s = 2 * side**3 / _timed([lambda: square @ square], device).seconds
        source, target = torch.ones(2, elements, device=device)
        bandwidth = 8 * elements / _timed([lambda: target.copy_(source)], device).seconds  # 4 bytes each way
        one = torch.ones(1, device=device)
        launch_s = _timed([lambda: one + one], device).seconds
    name = f"{device.type}, {threads} threads" if device.type == "cpu" else str(device)
    return Device(name, flops_per_s / 2, flops_per_s, flops_per_s, flops_per_s, bandwidth, launch_s)
