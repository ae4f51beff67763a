"""Everything public says what it does, in what units, and what it raises."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import planner
import solvers
from planner import distributed, measure

UNITS = {
    r"(^|_)gb$|_gb(_|$)": r"\bGB\b",
    r"_bytes(_|$)|^bytes$": r"\bbytes\b",
    r"_s$|(^|_)seconds(_|$)": r"\bseconds\b|_s``|\bs\b",
}


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes of ``module.__all__``, and the public methods and properties of the classes,
    inherited ones of our own included."""
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield f"{module.__name__}.{name}", thing
        elif inspect.isclass(thing):
            yield f"{module.__name__}.{name}", thing
            ours = [
                c for c in reversed(thing.__mro__) if c.__module__.split(".")[0] in ("planner", "solvers")
            ]
            for key, member in {k: m for c in ours for k, m in vars(c).items()}.items():
                if key.startswith("_"):
                    continue
                if isinstance(member, (classmethod, staticmethod)):
                    member = member.__func__
                if isinstance(member, property) or inspect.isfunction(member) or hasattr(member, "func"):
                    yield f"{module.__name__}.{name}.{key}", member


PUBLIC = dict(item for module in (planner, solvers, measure, distributed) for item in public(module))


def text_of(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def test_much_is_public() -> None:
    assert len(PUBLIC) > 100
    assert {"planner.plan", "planner.Plan.explain", "solvers.solve", "solvers.Problem.build"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    text = text_of(PUBLIC[name])
    assert re.match(r"\S.{11,}", text), f"{name} has no docstring"
    # A dataclass without one gets its signature as docstring.
    assert not re.match(rf"{re.escape(name.split('.')[-1])}\(", text), f"{name} has no docstring of its own"


@pytest.mark.parametrize(
    "name", [n for n, x in PUBLIC.items() if inspect.isfunction(x) and n.startswith("planner.")]
)
def test_arguments_with_units_are_explained(name: str) -> None:
    """Bytes, GB and seconds among the arguments are named in the docstring, here or where it points to."""
    function = PUBLIC[name]
    text = text_of(function)
    if "as for" in text or "as :func:" in text or "Arguments as" in text:
        return
    for argument in inspect.signature(function).parameters:
        for pattern, unit in UNITS.items():
            if re.search(pattern, argument):
                assert argument in text or re.search(unit, text), f"{name}: {argument}"
