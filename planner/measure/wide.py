"""A step in float64, as the reference for two that round otherwise: how far each of them is from it.

The same model in float64 makes the same choices: it draws the numbers that were drawn before, and what its
code casts to a narrower type stays wide (an upcast of logits "to float32" would else round them).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from planner._compat import TorchDispatchMode, pytree, writes_arguments
from planner.capture.inputs import Inputs
from planner.capture.outputs import LossFn
from planner.measure.bits import StepRecord, distance, run_step
from planner.measure.step import Batch

__all__ = ["Errors", "against_float64", "errors_of", "expected", "recorded_draws", "step_in_float64"]

NO_DIGIT = 0.1  # of a number, an error that leaves it no decimal digit
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _may_draw(func):
            return func(*args, **(kwargs or {}))
        before = _states(kwargs)
        made = func(*args, **(kwargs or {}))
        if all(map(torch.equal, before, _states(kwargs))):
            self.draws.append(None)  # attention without dropout: it computes, and nothing else
        else:
            self.draws.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), made))
        return made


def _may_draw(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _states(kwargs: dict[str, Any] | None) -> list[Tensor]:
    """Of the generators that a call may draw from."""
    own = (kwargs or {}).get("generator")
    if own is not None:
        return [own.get_state()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


@contextmanager
def recorded_draws() -> Iterator[list[Any]]:
    """What calls of random ops make within, in order: copies; ``None`` of a call that drew nothing."""
    mode = _Record()
    with mode:
        yield mode.draws


class _Wide(TorchDispatchMode):
    """Draws what was drawn, and keeps what is cast to a narrower type."""

    def __init__(self, draws: list[Any]) -> None:
        super().__init__()
        self.draws = iter(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        drawn = next(self.draws) if _may_draw(func) else None
        if drawn is not None:
            return _drawn(func, args, pytree.tree_map_only(Tensor, _widened, drawn))
        if not writes_arguments(func):  # a constant that belongs to no module is as narrow as it was
            args, kwargs = pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)


def _drawn(func: Any, args: Any, made: Any) -> Any:
    """What ``func`` makes of ``args`` where it drew what it drew when it made ``made``."""
    if func is torch.ops.aten.native_dropout.default:  # whose result is rounded, and its mask is what it drew
        kept = made[1]
        return args[0] * kept / max(1 - args[1], torch.finfo(torch.float64).tiny), kept
    return args[0].copy_(made) if writes_arguments(func) else made


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in _NARROW else tensor


def step_in_float64(
    model: nn.Module, inputs: Batch, draws: list[Any], *, loss_fn: LossFn | None = None, seed: int = 0
) -> StepRecord:
    """The step of a copy of ``model`` in float64, whose random ops give ``draws``.

    Raises whatever the step raises in float64; ``StopIteration`` where it draws more than was drawn.
    """
    twin = copy.deepcopy(model).double()
    if isinstance(inputs, Inputs):
        args, kwargs = pytree.tree_map_only(Tensor, _widened, (inputs.args, inputs.kwargs))
        wide: Batch = replace(inputs, args=args, kwargs=kwargs)
    else:
        wide = pytree.tree_map_only(Tensor, _widened, inputs)
    with _Wide(draws):
        return run_step(twin, wide, loss_fn=loss_fn, seed=seed)


@dataclass(frozen=True)
class Errors:
    """How far two steps are from the same in float64.

    Each the largest, over the loss and the gradients, of max|g - g64| / max|g64|; relative to the largest of
    all where a gradient is zero but for rounding (a bias before a softmax): smaller than a rounding of that
    one, and eager has no digit of it right.  ``worst``: the one of which the second step's share over the
    first one's, ``share``, is largest.  Errors below what a sum of so many rounded terms is expected to have
    count as that (:func:`expected`).  ``loss_ulps``: between the two losses, in units in the last place of
    the first.
    """

    eager: float
    planned: float
    worst: str
    share: float
    loss_ulps: float

    @property
    def rounding_alone(self) -> bool:
        """All are at most twice as far away as the first step's, or as rounding is expected to make them."""
        return self.share <= 2

    def beside(self, first: str) -> str:
        """In words, where the first of the two steps is ``first``."""
        return (
            f"from float64 it is up to {self.planned:.2e} away, {first} {self.eager:.2e}; at most "
            f"{self.share:.2f} times as far as {first} or what rounding is expected to make ({self.worst}); "
            f"the loss differs by {self.loss_ulps:.3g} ulp"
        )

    def __str__(self) -> str:
        return self.beside("eager")


def expected(dtype: torch.dtype, terms: int) -> float:
    """The relative error that a sum of so many rounded terms is expected to have: their root times a
    rounding.

    Half precision is added up in float32 and rounded once.  Higham and Mary, "A New Approach to Probabilistic
    Rounding Error Analysis" (SIAM J. Sci. Comput. 41, 2019), https://doi.org/10.1137/18M1226312.
    """
    own, sums = (torch.finfo(d).eps / 2 for d in (dtype, torch.promote_types(dtype, torch.float32)))
    return own + math.sqrt(terms) * sums


def against_float64(
    model: nn.Module,
    inputs: Batch,
    records: tuple[StepRecord, StepRecord],
    draws: list[Any],
    terms: int,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> tuple[Errors | None, str]:
    """How far two runs are from the same in float64, as :func:`errors_of`; else why that cannot be said."""
    try:
        wide = step_in_float64(model, inputs, draws, loss_fn=loss_fn, seed=seed)
    except (RuntimeError, TypeError, ValueError, StopIteration, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else "no more draws"
        return None, f"{type(error).__name__}: {why}"
    return errors_of(*records, wide, terms), ""


def errors_of(eager: StepRecord, planned: StepRecord, wide: StepRecord, terms: int) -> Errors:
    """The loss and gradients of two records against those of a third in float64; zeros where there are none.

    ``terms``  that are added up at most, in what the two do in another order.
    """
    records = (wide, eager, planned)
    of = [dict(r.gradients) | ({} if r.loss is None else {"the loss": r.loss}) for r in records]
    sizes = {
        name: float(g.abs().max()) for name, g in of[0].items() if g.numel() and bool(g.isfinite().all())
    }
    largest = max(sizes.values(), default=0.0)
    most = [0.0, 0.0]
    worst, share = "", 0.0
    for name, size in sizes.items():
        off = [distance(side[name], of[0][name]) for side in of[1:]]
        sums = torch.promote_types(of[2][name].dtype, torch.float32)
        if size <= torch.finfo(sums).eps * largest and off[0] >= NO_DIGIT * size:
            size = largest
        if not size:
            continue
        far = [o / size for o in off]
        most = [max(pair) for pair in zip(most, far, strict=True)]
        floor = expected(of[2][name].dtype, terms)
        ratio = max(far[1], floor) / max(far[0], floor)
        if ratio > share:
            worst, share = name, ratio
    ulps = 0.0 if eager.loss is None or planned.loss is None else _ulps(eager.loss, planned.loss)
    return Errors(most[0], most[1], worst, share, ulps)


def _ulps(a: Tensor, b: Tensor) -> float:
    """How many units in the last place of ``a`` two numbers lie apart; 0 where both are nan."""
    if torch.equal(a, b) or (bool(a.isnan().all()) and bool(b.isnan().all())):
        return 0.0
    step = (torch.nextafter(a.abs(), torch.full_like(a, torch.inf)) - a.abs()).double()
    return float(((a.double() - b.double()).abs() / step).max())
