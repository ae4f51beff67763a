"""What an optimizer takes: its state, and the temporaries of its step.

Optimizer state is not looked up in a table: the optimizer's own step runs on fake tensors (shapes, no
memory) under :class:`~planner.measure.meter.StorageMeter`, so any optimizer that keeps to tensor code is
counted to the byte, state made by its constructor and temporaries of its step included.

Nothing of the user's changes: the step runs on a copy that holds fake parameters and empty state.

Most parameters of a model are of few kinds (shape, strides, dtype, group).  Optimizers of ``torch.optim``
treat each parameter by itself, so of those only some of each kind step, and the rest is counted
(:class:`_Counted`); where the count for a part is not what that part takes, and for any other class, all
step.

Known weaknesses: a step that reads a value from a tensor (``.item()``) gets 1, since fake tensors have no
values; gradients are taken to be dense and of their parameter's dtype.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from planner._compat import (
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    dense_parts,
    fakes_as_last_time,
    foreach_takes_fakes,
    is_spread,
    reads_a_number,
    storage_key,
)
from planner.devices.state import allocation_grain
from planner.errors import PlannerError, of_unknown_torch
from planner.measure.meter import StorageMeter
from planner.measure.step import tensors_in
from planner.units import rounded_up

__all__ = ["OptimizerBytes", "OptimizerLike", "check_counts", "on_device", "optimizer_state_bytes"]

# An optimizer, its class, a functools.partial of it, or the bytes of its state.
OptimizerLike: TypeAlias = Optimizer | Callable[..., Optimizer] | int


_STEPS = 2  # the first makes the state, the second is what every later one is like

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes on one device.

    ``state_bytes``           kept between steps.
    ``step_transient_bytes``  most it has beyond parameters, gradients and state during its step,
                              when the activations are gone.
    """

    state_bytes: int
    step_transient_bytes: int

    def __post_init__(self) -> None:
        check_counts(self)

    def __str__(self) -> str:
        state_mb, more_mb = self.state_bytes / 1e6, self.step_transient_bytes / 1e6
        return f"state {state_mb:.1f} MB, in its step {more_mb:.1f} MB more"


def check_counts(record: Any) -> None:
    for each in fields(record):
        count = getattr(record, each.name)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{each.name} must be a count of bytes, 0 or more, got {count!r}")


def on_device(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and wanted.index in (None, device.index)


def optimizer_state_bytes(
    optimizer: OptimizerLike,
    params: Iterable[Tensor],
    *,
    device: torch.device | str | None = None,
    as_on: torch.device | str | None = None,
) -> OptimizerBytes:
    """State and step temporaries of an optimizer, by running its step twice on fake tensors.

    An instance: its own parameter groups and settings, its present state ignored, but where its constructor
    makes that (Adagrad before torch 2.13).  A class or a
    ``functools.partial``: constructed on ``params``, with ``lr=1e-3`` if it insists on one.  An int:
    the state's bytes, taken as they are.  ``device`` (default: the first parameter's) is the one
    counted; ``as_on`` as for :func:`resident_of`.  Raises TypeError for anything else, PlannerError for
    an optimizer that cannot be run so (LBFGS wants a closure, SparseAdam sparse gradients).
    """
    if isinstance(optimizer, int) and not isinstance(optimizer, bool):
        return OptimizerBytes(state_bytes=optimizer, step_transient_bytes=0)
    if not callable(optimizer) and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, its class, a functools.partial of it, or the bytes "
            f"of its state as an int; got {optimizer!r}"
        )
    if isinstance(optimizer, Optimizer):
        optimizer = _unwrapped(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    params = list(params)
    if not params:
        return OptimizerBytes(0, 0)
    try:
        here = torch.device(device) if device else params[0].device
        return _run_on_fakes(optimizer, params, here, torch.device(as_on) if as_on else here)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        if isinstance(error, PlannerError):
            raise
        raise of_unknown_torch(error) or PlannerError(
            f"the step of {_name_of(optimizer)} does not run on fake tensors "
            f"({type(error).__name__}: {str(error).strip() or 'no message'}); "
            "pass the bytes of its state instead, e.g. 2 * sum(p.nbytes for p in model.parameters())"
        ) from error


class _AnyValue(TorchDispatchMode):
    """Values read from fake tensors are 1 (``False`` for a truth value): bytes do not hang on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if not reads_a_number(func):
                raise
            dtype = args[0].dtype
            if dtype == torch.bool:
                return False
            return 1.0 if dtype.is_floating_point else 1


def _run_on_fakes(
    optimizer: Optimizer | Callable[..., Optimizer],
    params: list[Tensor],
    device: torch.device,
    as_on: torch.device,
) -> OptimizerBytes:
    # Optimizers may draw random numbers (stochastic rounding); the caller's are not theirs to use.
    with torch.random.fork_rng(devices=[]), fakes_as_last_time(), foreach_takes_fakes():
        step = functools.partial(_stepped, optimizer, device=device, as_on=as_on)
        try:
            counted = _by_kinds(optimizer, params, step, allocation_grain(as_on))
            return step(params).bytes if counted is None else counted
        except LookupError:
            if not isinstance(optimizer, Optimizer) or not optimizer.state:
                raise
            return step(params, keeps_state=True).bytes  # its constructor made what the step looks for


@dataclass(frozen=True)
class _Stepped:
    """What an optimizer of some parameters took.

    ``state``     bytes of what it keeps for each parameter, in their order.
    ``timeline``  of its last step: the ops, and the bytes there were after each beyond those before it.
    ``held``      after each op of all steps: the bytes beyond parameters and gradients.
    """

    bytes: OptimizerBytes
    state: tuple[int, ...]
    timeline: tuple[tuple[str, int], ...]
    held: tuple[int, ...]

    @property
    def shared_bytes(self) -> int:
        """State that is no parameter's own."""
        return self.bytes.state_bytes - sum(self.state)

    @property
    def by_lists(self) -> bool:
        """Whether its ops take all parameters at once."""
        return any("_foreach_" in name or "_fused_" in name for name, _ in self.timeline)


def _stepped(
    optimizer: Optimizer | Callable[..., Optimizer],
    params: list[Tensor],
    counts: Sequence[int] = (),
    *,
    device: torch.device,
    as_on: torch.device,
    keeps_state: bool = False,
) -> _Stepped:
    """An optimizer like ``optimizer`` steps on fakes of ``params``; ``counts``: of so many elements each.

    ``keeps_state``  it has what ``optimizer`` has, as fakes.
    """
    meter = StorageMeter(as_on, timeline=True, grain=allocation_grain(as_on))
    with FakeTensorMode(allow_non_fake_inputs=True), _AnyValue(), meter:
        places = (as_on if on_device(p.device, device) else p.device for p in params)
        pairs = itertools.zip_longest(params, places, counts)
        fakes = {id(p): _fake_of(p, place, count) for p, place, count in pairs}
        gradients = {key: torch.empty_like(f) for key, f in fakes.items() if f.requires_grad}
        base_bytes, seen = meter.live_bytes, len(meter.timeline)
        if isinstance(optimizer, Optimizer):
            running = _copy_on_device(optimizer, fakes, as_on, keeps_state=keeps_state)
        else:
            running = _construct(optimizer, list(fakes.values()))
        most_bytes = before = began = 0
        for _ in range(_STEPS):
            for key, gradient in gradients.items():
                fakes[key].grad = gradient
            meter.reset_peak()
            before, began = meter.live_bytes, len(meter.timeline)
            running.step()
            most_bytes = max(most_bytes, meter.peak_bytes)
        state_bytes = meter.live_bytes - base_bytes
        state = tuple(_state_bytes(running.state.get(fake), meter) for fake in fakes.values())
    taken = OptimizerBytes(state_bytes, most_bytes - base_bytes - state_bytes)
    timeline = tuple((name, held - before) for name, held in meter.timeline[began:])
    return _Stepped(taken, state, timeline, tuple(held - base_bytes for _, held in meter.timeline[seen:]))


def _state_bytes(state: Any, meter: StorageMeter) -> int:
    held = {
        storage_key(t): rounded_up(int(t.untyped_storage().nbytes()), meter.grain)
        for t in tensors_in(state)
        if meter.device is None or on_device(t.device, meter.device)
    }
    return sum(held.values())


# Elements of parameters that stand for others: whole allocations, whatever the dtype and the device.
_SOME, _MORE = 4096, 3 * 4096


def _by_kinds(
    optimizer: Optimizer | Callable[..., Optimizer],
    params: list[Tensor],
    step: Callable[..., _Stepped],
    grain: int,
) -> OptimizerBytes | None:
    """What ``step`` would find of all ``params``, from a few of each kind.

    ``None`` where the class is not known to take each parameter by itself, where a part of ``params`` takes
    something else than is counted for it, or where nothing is saved.
    """
    cls = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    if (type(cls) if isinstance(cls, Optimizer) else cls) not in _EACH_BY_ITSELF:
        return None
    group_of: dict[int, int] = {}
    if isinstance(optimizer, Optimizer):
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    kinds: dict[int, Any] = {}
    sizes: dict[int, int] = {}
    for p in params:
        here = dense_parts(p)[0] if is_spread(type(p)) else p
        kinds[id(p)] = group_of.get(id(p), 0), p.dtype, p.device, type(p)
        sizes[id(p)] = here.nbytes
        if not _is_dense(here):
            return None
    first = {kinds[id(p)]: p for p in reversed(params)}
    # Some dozen parameters of each kind step here; of those that do not train, some make state all the same.
    if 12 * len(first) >= len(kinds) or not all(p.requires_grad for p in params):
        return None
    lines = {kind: _Line.of(step, [p]) for kind, p in first.items()}
    counted = _Counted(lines, kinds, sizes, step, grain)
    by_size = sorted(params, key=lambda p: sizes[id(p)])
    chosen = {id(p) for p in (*params[: 3 * len(first)], by_size[0], by_size[-1], by_size[len(by_size) // 2])}
    few = [p for p in params if id(p) in chosen]
    if not counted.is_one_way or counted.of(few) != step(few).bytes:
        log.debug("the steps of %s are not each parameter's own: all are run", _name_of(optimizer))
        return None
    return counted.of(params)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie one beside the other, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True)
class _Line:
    """What an optimizer takes for one or two parameters of a kind, of any size.

    Each count of bytes is a straight line over the bytes of each parameter, found by stepping at two sizes.

    ``some``      stepped at few elements, ``bytes_of``: of these parameters.
    ``held``      slopes of its ``held``, for each of the parameters.
    ``state``     slope of each parameter's state.
    ``timeline``  slopes of its ``timeline``, for the first parameter.
    ``is_whole``  whether the same ops ran at both sizes.
    """

    some: _Stepped
    bytes_of: tuple[int, ...]
    held: tuple[tuple[float, ...], ...]
    state: tuple[float, ...]
    timeline: tuple[float, ...]
    is_whole: bool

    @classmethod
    def of(cls, step: Callable[..., _Stepped], params: list[Tensor]) -> _Line:
        some = step(params, [_SOME] * len(params))
        gains = [(_MORE - _SOME) * p.element_size() for p in params]
        more = [step(params, [_MORE if p is other else _SOME for p in params]) for other in params]
        ops = [[name for name, _ in each.timeline] for each in (some, *more)]
        is_whole = all(names == ops[0] for names in ops) and len({len(m.held) for m in (some, *more)}) == 1
        return cls(
            some,
            tuple(_SOME * p.element_size() for p in params),
            tuple(_slopes(some.held, m.held, gain) for m, gain in zip(more, gains, strict=True)),
            tuple((m.state[i] - some.state[i]) / gains[i] for i, m in enumerate(more)),
            _slopes([b for _, b in some.timeline], [b for _, b in more[0].timeline], gains[0]),
            is_whole,
        )

    def is_counted(self, grain: int) -> bool:
        """Whether what is said of other sizes is right where allocations are rounded up to ``grain``."""
        slopes = (*self.state, *self.timeline, *itertools.chain(*self.held))
        return self.is_whole and (grain == 1 or all(slope == int(slope) for slope in slopes))

    def state_at(self, size_bytes: int) -> int:
        """Of the first parameter."""
        return round(self.some.state[0] + self.state[0] * (size_bytes - self.bytes_of[0]))

    def timeline_at(self, size_bytes: int) -> list[int]:
        """Of the first parameter."""
        grown = size_bytes - self.bytes_of[0]
        pairs = zip(self.some.timeline, self.timeline, strict=True)
        return [round(held + slope * grown) for (_, held), slope in pairs]

    def transient_at(self, sizes_bytes: Sequence[int]) -> int:
        """The most that is held beyond parameters, gradients and what is kept in the end."""
        grown = [size - own for size, own in zip(sizes_bytes, self.bytes_of, strict=True)]
        most = max(
            held + sum(slope * more for slope, more in zip(slopes, grown, strict=True))
            for held, *slopes in zip(self.some.held, *self.held, strict=True)
        )
        state = self.some.bytes.state_bytes + sum(map(operator.mul, self.state, grown))
        return max(0, round(most - state))


def _slopes(some: Sequence[int], more: Sequence[int], gain: int) -> tuple[float, ...]:
    return tuple((b - a) / gain for a, b in zip(some, more, strict=False))


@dataclass(frozen=True)
class _Counted:
    """What an optimizer takes whose parameters step by themselves.

    State is each parameter's own.  Ops that take lists leave temporaries of all that are in a list: of one
    group, dtype and device.  A loop leaves those of the parameter at hand and, until their names are bound
    again, of the one before it.

    ``alone``  a parameter of each kind, stepped by itself; ``kinds``, ``sizes``: of each, by id.
    """

    alone: Mapping[Any, _Line]
    kinds: Mapping[int, Any]
    sizes: Mapping[int, int]
    step: Callable[..., _Stepped]
    grain: int
    pairs: dict[Any, _Line] = field(default_factory=dict)

    @property
    def is_one_way(self) -> bool:
        """Whether all kinds step by lists of the same ops, or all in a loop."""
        alone = [line.some for line in self.alone.values()]
        return (
            all(line.is_counted(self.grain) for line in self.alone.values())
            and len({(each.shared_bytes, each.by_lists) for each in alone}) == 1
            and all(len(names) == 1 for names in self._names.values())
        )

    @property
    def _names(self) -> Mapping[Any, set[tuple[str, ...]]]:
        names: dict[Any, set[tuple[str, ...]]] = {}
        for kind, line in self.alone.items():
            if line.some.by_lists:
                names.setdefault(kind[:3], set()).add(tuple(name for name, _ in line.some.timeline))
        return names

    def of(self, params: list[Tensor]) -> OptimizerBytes | None:
        """State and temporaries of these, which are of the kinds that were seen; ``None``: not known."""
        sized = [(self.kinds[id(p)], rounded_up(self.sizes[id(p)], self.grain)) for p in params]
        some = self.alone[sized[0][0]].some
        own_bytes = sum(self.alone[kind].state_at(size) for kind, size in sized)
        state_bytes = some.shared_bytes + own_bytes
        transient_bytes = self._in_lists(sized) if some.by_lists else self._in_loop(params, sized)
        return None if transient_bytes is None else OptimizerBytes(state_bytes, transient_bytes)

    def _in_lists(self, sized: list[tuple[Any, int]]) -> int:
        parts: dict[Any, list[list[int]]] = {}
        for (kind, size), n in Counter(sized).items():
            held = [n * bytes_after for bytes_after in self.alone[kind].timeline_at(size)]
            parts.setdefault(kind[:3], []).append(held)
        return max(0, *(max(map(sum, zip(*part, strict=True)), default=0) for part in parts.values()))

    def _in_loop(self, params: list[Tensor], sized: list[tuple[Any, int]]) -> int | None:
        most_bytes = max(self.alone[kind].transient_at([size]) for kind, size in dict.fromkeys(sized))
        neighbours: dict[Any, tuple[Tensor, Tensor]] = {}  # the first of each two kinds and sizes
        for two, of in zip(itertools.pairwise(params), itertools.pairwise(sized), strict=True):
            neighbours.setdefault(of, two)
        for ((kind, size), (other, next_size)), (a, b) in neighbours.items():
            both = kind, other
            if both not in self.pairs:
                self.pairs[both] = _Line.of(self.step, [a, b])
            line = self.pairs[both]
            if not line.is_counted(self.grain):
                return None
            most_bytes = max(most_bytes, line.transient_at([size, next_size]))
        return most_bytes


# Optimizers whose step and state of a parameter hang on that parameter and its group alone.
_EACH_BY_ITSELF = frozenset({
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
})  # fmt: skip


def _fake_of(tensor: Tensor, device: torch.device, count: int | None = None) -> Tensor:
    """A tensor of the same sizes, strides, dtype and kind on ``device``, under the current fake mode.

    ``count``: of so many elements instead.

    Of one that is spread over ranks (FSDP2's shards, tensor parallelism): of what this rank has of it.
    """
    if is_spread(type(tensor)):
        (local,) = dense_parts(tensor)
        return _fake_of(_like(local, tensor), device, count)
    if count is None:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    else:
        fake = torch.empty((count,), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _like(local: Tensor, whole: Tensor) -> Tensor:
    """``local``, a parameter if ``whole`` is one."""
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(local.detach(), requires_grad=whole.requires_grad)
    return local.detach().requires_grad_(whole.requires_grad)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers such as accelerate's, which are optimizers themselves."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def _copy_on_device(
    optimizer: Optimizer, fakes: dict[int, Tensor], device: torch.device, *, keeps_state: bool
) -> Optimizer:
    """The same optimizer on fake parameters, without the user's hooks and, unless told, without its state.

    It goes through the pickling protocol, which every Optimizer keeps, and not through the
    constructor, whose arguments need not be the defaults (AdamW's are not).
    """
    cls = type(optimizer)
    kept = {
        name: value
        for name, value in vars(optimizer).items()
        if name != "state"
        and not name.startswith("_optimizer_")  # hooks
        and not callable(getattr(cls, name, None))  # a scheduler wraps the instance's step
    }
    kept["param_groups"] = [
        {**group, "params": [p for p in group["params"] if id(p) in fakes]}
        for group in optimizer.param_groups
    ]
    kept["param_groups"] = [group for group in kept["param_groups"] if group["params"]]
    memo: dict[int, Any] = dict(fakes)
    state: dict[Tensor, Any] = defaultdict(dict)
    if keeps_state:
        of_these = {p: made for p, made in optimizer.state.items() if id(p) in fakes}
        for p, made in of_these.items():
            for tensor in tensors_in(made):  # a count of steps is on the CPU, whatever the parameter is on
                moves = tensor.dim() > 0 and tensor.device == p.device
                memo[id(tensor)] = _fake_of(tensor, device if moves else tensor.device)
        state.update({fakes[id(p)]: copy.deepcopy(made, memo) for p, made in of_these.items()})
    for tensor in tensors_in(kept):  # buffers of its own, a learning rate; never copied for real
        memo.setdefault(id(tensor), _fake_of(tensor, tensor.device))
    copied = {name: copy.deepcopy(value, memo) for name, value in kept.items()}
    clone: Optimizer = cls.__new__(cls)
    clone.__setstate__({**copied, "state": state})
    return clone


def _construct(factory: Callable[..., Optimizer], fakes: list[Tensor]) -> Optimizer:
    wanted = [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ][1:]
    if wanted not in ([], ["lr"]):
        raise PlannerError(
            f"{_name_of(factory)} needs {', '.join(wanted)}: pass an instance, "
            f"or functools.partial({_name_of(factory)}, {', '.join(f'{name}=...' for name in wanted)})"
        )
    made = factory(fakes, lr=1e-3) if wanted else factory(fakes)
    if not isinstance(made, Optimizer):
        raise PlannerError(
            f"{_name_of(factory)} made a {type(made).__name__}, not a torch.optim.Optimizer: "
            "pass an optimizer, its class, or the bytes of its state"
        )
    return made


def _name_of(optimizer: Optimizer | Callable[..., Any]) -> str:
    if isinstance(optimizer, functools.partial):
        return _name_of(optimizer.func)
    return getattr(optimizer, "__name__", type(optimizer).__name__)
