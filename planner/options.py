"""How to search for a plan: the options that every way of planning takes, checked where they are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from torch import nn
from torch.optim import Optimizer

from planner.devices.rates import DEVICES, device_named
from planner.progress import Progress, Reporter, reporting
from solvers import SOLVERS
from solvers.fixed_order import checked_time_limit

__all__ = [
    "BackendMode",
    "CaptureMode",
    "ChunkLoss",
    "GradientsMode",
    "OnLarger",
    "OrderMode",
    "OutputsMode",
    "RecomputeMode",
    "Search",
    "check_costs",
    "check_count",
    "check_flag",
    "check_function",
    "check_model",
    "check_optimizer",
    "check_options",
]

# Until when the caller holds what the model returns: to the step's end, to the start of the backward, not at
# all but for the loss, or as the first steps show.
OutputsMode: TypeAlias = Literal["held", "released", "unread", "auto"]

# Whether the step is to be one captured graph, pieces of one with other code between them, or whichever it
# can.
CaptureMode: TypeAlias = Literal["one graph", "regions", "auto"]

# What runs the step: the dispatcher, call by call, or code that inductor generates for it.
BackendMode: TypeAlias = Literal["eager", "inductor"]

# What may be recomputed in compiled code: whatever is worth it, or what then has the same bits again.
RecomputeMode: TypeAlias = Literal["fastest", "same bits"]

# Until when the gradients of parameters are there: beyond the step, until a hook uses them up inside the
# backward, or as the first step shows.
GradientsMode: TypeAlias = Literal["held", "consumed", "auto"]

# Of the backward: as the trace has it, or with gradients of weights as soon as that holds less.
OrderMode: TypeAlias = Literal["given", "free"]

# Whether the loss is computed in chunks of tokens: where nothing fits without, always, never, or in so many.
ChunkLoss: TypeAlias = bool | int | Literal["auto"]

# What happens to a batch that a plan for varying sizes cannot serve within the budget.
OnLarger: TypeAlias = Literal["replan", "raise"]

_VALUES: dict[str, tuple[str, ...]] = {
    "outputs": get_args(OutputsMode),
    "gradients": get_args(GradientsMode),
    "capture": get_args(CaptureMode),
    "backend": get_args(BackendMode),
    "recompute": get_args(RecomputeMode),
    "order": get_args(OrderMode),
    "on_larger": get_args(OnLarger),
}


def check_options(given: object, *, finds: bool = False) -> None:
    """Refuses attributes of ``given`` that are named as an option and are none, before anything runs.

    ``finds``  the optimizer may also be "find".

    Raises ``TypeError`` or ``ValueError``, which name the option, what it is and what it may be.
    """
    for name, values in _VALUES.items():
        value = getattr(given, name, values[0])
        if not isinstance(value, str) or value not in values:
            *others, last = map(repr, values)
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")
    for name in _FUNCTIONS:
        check_function(name, getattr(given, name, None))
    check_flag("calibrate", getattr(given, "calibrate", False))
    check_optimizer(getattr(given, "optimizer", None), finds=finds)
    check_costs(getattr(given, "costs", "auto"))
    _check_dynamic(getattr(given, "dynamic", False))
    _check_chunk_loss(getattr(given, "chunk_loss", False))


# Options that are functions: of what, and one that would do.
_FUNCTIONS: Mapping[str, tuple[str, str]] = {
    "loss_fn": ("the model's outputs", "lambda outputs: cross_entropy(outputs, labels)"),
    "make_loss": ("a number of examples", "lambda n: lambda outputs: cross_entropy(outputs, labels[:n])"),
    "make_batch": ("a number of examples", "lambda n: (images[:n],)"),
}


def check_model(model: object) -> None:
    """``TypeError`` for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")


def check_flag(name: str, flag: object) -> None:
    """``TypeError`` for what is neither True nor False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, not {flag!r}")


def check_count(name: str, count: object) -> None:
    """``ValueError`` for what is no whole number from 1 up."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, not {count!r}")


def check_function(name: str, function: object) -> None:
    """``TypeError`` where the option ``name`` is no function of one argument; ``None`` is none given."""
    if function is None:
        return
    of, example = _FUNCTIONS[name]
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} must be a function of {of}, such as {example}, not {function!r}")
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        wants = inspect.signature(called)
    except (TypeError, ValueError):  # of some that are built in nothing is known
        return
    try:
        wants.bind(object())
    except TypeError:
        told = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name} must be a function of {of} alone, and {told}{wants} is not: pass such as {example}"
        ) from None


def check_optimizer(optimizer: object, *, finds: bool = False) -> None:
    """``TypeError`` or ``ValueError`` where ``optimizer`` is none; ``finds``: it may be "find"."""
    if optimizer is None or (finds and isinstance(optimizer, str) and optimizer == "find"):
        return
    made = optimizer
    while isinstance(made, functools.partial):
        made = made.func
    may = "'find', None" if finds else "None"
    want = (
        f"optimizer must be {may}, an optimizer, its class such as torch.optim.AdamW, a functools.partial of "
        "it, or the bytes of its state as an int"
    )
    if isinstance(made, int) and not isinstance(made, bool):
        if made < 0:
            raise ValueError(f"{want}, 0 or more, not {optimizer!r}")
    elif isinstance(made, type):
        if not (issubclass(made, Optimizer) or hasattr(made, "step")):
            raise TypeError(f"{want}, not the class {made.__name__}")
    elif isinstance(made, nn.Module):
        raise TypeError(f"{want}, not a module ({type(made).__name__})")
    elif not isinstance(made, Optimizer) and not callable(made):
        told = repr(optimizer)
        if hasattr(made, "optimizers"):
            told += ": parameters that step in the backward are found by their hooks, so leave optimizer out"
        raise TypeError(f"{want}, not {told}")


def check_costs(costs: object) -> None:
    """``ValueError`` where ``costs`` is neither a way to price ops nor the name of a device."""
    known = "auto", "profile", "roofline"
    if not isinstance(costs, str) or (costs not in known and device_named(costs) is None):
        names = ", ".join(repr(d.name) for d in DEVICES.values() if d.capability is not None)
        raise ValueError(
            f"costs must be {', '.join(map(repr, known))} or a device's name ({names}), not {costs!r}"
        )


def _check_dynamic(dynamic: object) -> None:
    if isinstance(dynamic, bool | tuple):  # a tuple is by tensor, and made here
        return
    want = "dynamic must be True, False or dimensions by argument, such as {'input_ids': (0, 1)}"
    if not isinstance(dynamic, Mapping):
        raise TypeError(f"{want}, not {dynamic!r}")
    for name, dims in dynamic.items():
        named = isinstance(name, str | int) and not isinstance(name, bool)
        listed = isinstance(dims, Sequence) and all(type(d) is int for d in dims)
        if not named or not listed or isinstance(dims, str):
            raise TypeError(f"{want}, not {dims!r} of {name!r}")


def _check_chunk_loss(chunk_loss: object) -> None:
    if isinstance(chunk_loss, bool) or (isinstance(chunk_loss, str) and chunk_loss == "auto"):
        return
    if not isinstance(chunk_loss, int) or chunk_loss < 2:
        raise ValueError(
            f"chunk_loss must be 'auto', True, False or a number of chunks from 2 up, not {chunk_loss!r}"
        )


@dataclass(frozen=True)
class Search:
    """Who searches for a plan, for how long, and who is told.

    ``solver``        a name in ``solvers.SOLVERS``.
    ``time_limit_s``  seconds for the search, 0 or more; ``math.inf``: until nothing better is found.
    ``progress``      as for :func:`planner.plan`: True, False, None or a callable; or the
                      :class:`~planner.progress.Reporter` made of one, inside :meth:`reporting`.

    Raises ``TypeError`` or ``ValueError``, which name the argument, what it is and what it may be.
    """

    solver: str = "auto"
    time_limit_s: float = 30.0
    progress: bool | Progress | Reporter | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, want one of {', '.join(SOLVERS)}")
        checked_time_limit(self.time_limit_s)
        known = self.progress is None or isinstance(self.progress, bool | Reporter)
        if not known and not callable(self.progress):
            raise TypeError(f"progress must be True, False, None or a callable, not {self.progress!r}")

    @contextmanager
    def reporting(self) -> Iterator[Search]:
        """The same search with its reporter open: what ``progress=True`` draws is closed at the end.

        Raises ``PlannerError`` for ``progress=True`` without tqdm.
        """
        if isinstance(self.progress, Reporter):
            yield self
            return
        with reporting(self.progress) as tell:
            yield replace(self, progress=tell)

    @property
    def tell(self) -> Reporter:
        """Who is told.  ``ValueError`` for ``progress=True`` outside :meth:`reporting`: it has no bar."""
        if isinstance(self.progress, Reporter):
            return self.progress
        if self.progress is True:
            raise ValueError("progress=True draws a bar: open it with Search.reporting()")
        return Reporter(self.progress or None)
