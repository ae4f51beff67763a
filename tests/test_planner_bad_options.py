"""Every option of every public function: what makes no sense is refused by its name, before a model runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import planner


class Ran(BaseException):
    """The model was traced or run."""


class Untouchable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise Ran


X = torch.ones(2, 4)


def model() -> nn.Module:
    return Untouchable().train()


# Of each option, values that make no sense.  One that is not here, or in FREE, fails the first test.
BAD: Mapping[str, tuple[Any, ...]] = {
    "model": ("gpt2", None, nn.Linear, 3, {}),
    "budget_gb": ("8", True, -1, math.nan, 0),
    "budgets_gb": ("8", [], ["8"], [4, -1], 8, [math.inf], {4: 8}),
    "points": (0, -2, 2.5, "8", True),
    "make_batch": (None, "x", 3, (X,), nn.Linear, lambda: (X,)),
    "at_most_overhead": (-0.1, "0.2", True, math.nan, math.inf),
    "low": (0, -1, 1.5, "1", True),
    "high": (0, -1, 1.5, "64", True),
    "loss_fn": ("x", 3, nn.CrossEntropyLoss, cross_entropy, nn.CrossEntropyLoss()),
    "make_loss": ("x", 3, nn.CrossEntropyLoss, cross_entropy, lambda: None),
    "optimizer": ("adamw", nn.Linear(2, 2), -5, True, dict, nn.Linear, [1], 0.5),
    "costs": ("h1000", 3, None, True, ["auto"]),
    "solver": ("nope", None, 3, [], True),
    "time_limit_s": (-1, "30", None, math.nan, True),
    "dynamic": (3, "all", None, {"x": 0}, {"x": "0"}, {1.5: (0,)}, [0]),
    "on_larger": ("grow", None, 3, [], True),
    "calibrate": (1, "yes", None, [], 0),
    "now": (1, "yes", None, [], 0),
    "max_plans": (0, -1, 2.5, "64", True),
    "calls_per_step": (0, -1, 2.5, "2", True),
    "outputs": ("kept", None, 3, [], True),
    "gradients": ("gone", None, 3, [], True),
    "capture": ("whole", None, 3, [], True),
    "backend": ("aot", None, 3, [], True),
    "recompute": ("all", None, 3, [], True),
    "order": ("any", None, 3, [], True),
    "chunk_loss": ("yes", None, 1, -4, 2.5, []),
    "progress": ("yes", 1, 0, [], {}),
    "make_optimizer": ("adamw", None, 3, nn.Linear(2, 2), dict),
    "sharding": ("fsdp", None, 8, {}, True),
}
FREE = {"inputs", "path"}  # any object may be a batch: the forward tells; a path is the file system's

GIVEN: Mapping[str, Any] = {"budget_gb": 1.0, "inputs": (X,), "make_batch": lambda n: (torch.ones(n, 4),)}

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "plan": planner.plan,
    "frontier": planner.frontier,
    "estimate": planner.estimate,
    "largest_batch": planner.largest_batch,
    "enable": planner.enable,
    "disable": planner.disable,
    "plan_of": planner.plan_of,
    "inductor": planner.inductor,
    "load": planner.load,
    "optimizer_in_backward": planner.optimizer_in_backward,
    "sharded_step": planner.sharded.sharded_step,
}

# Nothing of these is decided by an option: they are what functions return, raise, or are in.
OTHERS = {"distributed", "measure", "sharded"}


def options_of(name: str) -> list[str]:
    return [option for option in inspect.signature(FUNCTIONS[name]).parameters if option not in FREE]


def cases() -> Iterator[Any]:
    for name in FUNCTIONS:
        for option in options_of(name):
            for value in BAD.get(option, ()):
                # of what some functions do without, None is no mistake
                default = inspect.signature(FUNCTIONS[name]).parameters[option].default
                if value is None and default is None:
                    continue
                yield pytest.param(name, option, value, id=f"{name}-{option}-{type(value).__name__}")


def call(name: str, **options: Any) -> Any:
    wanted = inspect.signature(FUNCTIONS[name]).parameters
    given = {"model": model(), "make_optimizer": torch.optim.SGD, "path": "none", "sharding": SHARDING}
    given |= GIVEN
    return FUNCTIONS[name](**{k: v for k, v in given.items() if k in wanted} | options)


SHARDING = planner.sharded.Sharding(2, "inner")


def test_every_function_and_every_option_is_in_the_tables() -> None:
    functions = {n for n in planner.__all__ if not inspect.isclass(getattr(planner, n))} - OTHERS
    assert functions == FUNCTIONS.keys() - {"sharded_step"}
    for name in FUNCTIONS:
        assert set(options_of(name)) <= BAD.keys(), name


@pytest.mark.parametrize(("name", "option", "value"), cases())
def test_a_bad_value_is_refused_by_name_before_anything_runs(name: str, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError, planner.PlannerError), match=rf"^{option}\b"):
        call(name, **{option: value})


@pytest.mark.parametrize("name", ["plan", "frontier", "estimate", "largest_batch"])
def test_a_good_call_does_run_the_model(name: str) -> None:
    """Else the tests above would show nothing."""
    with pytest.raises(Ran):
        call(name, costs="roofline")
