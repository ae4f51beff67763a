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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
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
from planner.errors import PlannerError
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

    An instance: its own parameter groups and settings, its present state ignored.  A class or a
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
        raise PlannerError(
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
        counted = _by_kinds(optimizer, params, step)
        return step(params).bytes if counted is None else counted


@dataclass(frozen=True)
class _Stepped:
    """What an optimizer of some parameters took.

    ``state``     bytes of what it keeps for each parameter, in their order.
    ``timeline``  of its last step: the ops, and the bytes there were after each beyond those before it.
    """

    bytes: OptimizerBytes
    state: tuple[int, ...]
    timeline: tuple[tuple[str, int], ...]

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
    *,
    device: torch.device,
    as_on: torch.device,
) -> _Stepped:
    """An optimizer like ``optimizer`` steps on fakes of ``params``."""
    meter = StorageMeter(as_on, timeline=True, grain=allocation_grain(as_on))
    with FakeTensorMode(allow_non_fake_inputs=True), _AnyValue(), meter:
        fakes = {id(p): _fake_of(p, as_on if on_device(p.device, device) else p.device) for p in params}
        gradients = {key: torch.empty_like(f) for key, f in fakes.items() if f.requires_grad}
        base_bytes = meter.live_bytes
        if isinstance(optimizer, Optimizer):
            running = _copy_on_device(optimizer, fakes)
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
    return _Stepped(taken, state, tuple((name, held - before) for name, held in meter.timeline[began:]))


def _state_bytes(state: Any, meter: StorageMeter) -> int:
    held = {
        storage_key(t): rounded_up(int(t.untyped_storage().nbytes()), meter.grain)
        for t in tensors_in(state)
        if meter.device is None or on_device(t.device, meter.device)
    }
    return sum(held.values())


def _by_kinds(
    optimizer: Optimizer | Callable[..., Optimizer],
    params: list[Tensor],
    step: Callable[[list[Tensor]], _Stepped],
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
    for p in params:
        part = group_of.get(id(p), 0), p.dtype, p.device
        here = dense_parts(p)[0] if is_spread(type(p)) else p
        kinds[id(p)] = part, tuple(here.shape), here.stride(), type(p)
    first = {kinds[id(p)]: p for p in reversed(params)}
    # Some eight parameters of each kind step here; of those that do not train, some make state all the same.
    if 8 * len(first) >= len(kinds) or not all(p.requires_grad for p in params):
        return None
    counted = _Counted({kind: step([p]) for kind, p in first.items()}, kinds, step)
    few = params[: 2 * len(first)]
    if not counted.is_one_way or counted.of(few) != step(few).bytes:
        log.debug("the steps of %s are not each parameter's own: all are run", _name_of(optimizer))
        return None
    return counted.of(params)


@dataclass(frozen=True)
class _Counted:
    """What an optimizer takes whose parameters step by themselves.

    State is each parameter's own.  Ops that take lists leave temporaries of all that are in a list: of one
    group, dtype and device.  A loop leaves those of the parameter at hand and, until their names are bound
    again, of the one before it.

    ``alone``  a parameter of each kind, stepped by itself; ``kinds``: the kind of each, by id.
    """

    alone: Mapping[Any, _Stepped]
    kinds: Mapping[int, Any]
    step: Callable[[list[Tensor]], _Stepped]
    pairs: dict[Any, int] = field(default_factory=dict)

    @property
    def is_one_way(self) -> bool:
        """Whether all kinds step by lists of the same ops, or all in a loop."""
        alone = self.alone.values()
        return len({(each.shared_bytes, each.by_lists) for each in alone}) == 1 and all(
            len(names) == 1 for names in self._names.values()
        )

    @property
    def _names(self) -> Mapping[Any, set[tuple[str, ...]]]:
        names: dict[Any, set[tuple[str, ...]]] = {}
        for kind, each in self.alone.items():
            if each.by_lists:
                names.setdefault(kind[0], set()).add(tuple(name for name, _ in each.timeline))
        return names

    def of(self, params: list[Tensor]) -> OptimizerBytes:
        """State and temporaries of these, which are of the kinds that were seen."""
        counts = Counter(self.kinds[id(p)] for p in params)
        some = self.alone[next(iter(counts))]
        state_bytes = some.shared_bytes + sum(n * sum(self.alone[k].state) for k, n in counts.items())
        return OptimizerBytes(state_bytes, self._in_lists(counts) if some.by_lists else self._in_loop(params))

    def _in_lists(self, counts: Mapping[Any, int]) -> int:
        parts: dict[Any, list[list[int]]] = {}
        for kind, n in counts.items():
            held = [n * bytes_after for _, bytes_after in self.alone[kind].timeline]
            parts.setdefault(kind[0], []).append(held)
        return max(0, *(max(map(sum, zip(*part, strict=True)), default=0) for part in parts.values()))

    def _in_loop(self, params: list[Tensor]) -> int:
        most_bytes = max(self.alone[self.kinds[id(p)]].bytes.step_transient_bytes for p in params)
        for pair in itertools.pairwise(params):
            both = tuple(self.kinds[id(p)] for p in pair)
            if both not in self.pairs:
                self.pairs[both] = self.step(list(pair)).bytes.step_transient_bytes
            most_bytes = max(most_bytes, self.pairs[both])
        return most_bytes


# Optimizers whose step and state of a parameter hang on that parameter and its group alone.
_EACH_BY_ITSELF = frozenset({
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
})  # fmt: skip


def _fake_of(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same sizes, strides, dtype and kind on ``device``, under the current fake mode.

    Of one that is spread over ranks (FSDP2's shards, tensor parallelism): of what this rank has of it.
    """
    if is_spread(type(tensor)):
        (local,) = dense_parts(tensor)
        return _fake_of(_like(local, tensor), device)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
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


def _copy_on_device(optimizer: Optimizer, fakes: dict[int, Tensor]) -> Optimizer:
    """The same optimizer on fake parameters, without its state and without the user's hooks.

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
    for tensor in tensors_in(kept):  # buffers of its own, a learning rate; never copied for real
        memo.setdefault(id(tensor), _fake_of(tensor, tensor.device))
    copied = {name: copy.deepcopy(value, memo) for name, value in kept.items()}
    clone: Optimizer = cls.__new__(cls)
    clone.__setstate__({**copied, "state": defaultdict(dict)})
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
