"""Small models of packages outside transformers, each with batches and a loss: what people train.

In: a name, ``package/model``.  Out: a :class:`Sample`.  One module per family; a package is imported when one
of its models is built, so that those of the others can be built without it.  Nothing is downloaded.
The packages' versions are in ``requirements-packages.txt`` beside the benchmark.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.benchmarks.packages._builds import ready

__all__ = ["CASES", "MODULES", "Case", "Sample", "case", "classes", "load", "squares"]

MODULES = (
    "adapters", "audio", "diffusion", "graphs", "hugging_face", "layers", "mechanisms", "medical",
    "molecules", "probability", "recurrent", "research", "science", "spiking", "tables", "time_series",
    "vision", "vision_tasks",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A model that trains, and what it trains on.

    ``batch``      called before each step, under a seed: the arguments of one call, a tuple or a dict.
    ``loss``       of what the model returns; ``None``: the model returns its loss.
    ``optimizer``  "adamw", or "sgd" for parameters whose gradients are sparse.
    """

    model: nn.Module
    batch: Callable[[], tuple[Any, ...] | dict[str, Any]]
    loss: Callable[[Any], Tensor] | None = None
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Case:
    """``package`` is the name that pip knows; ``name`` begins with it."""

    name: str
    package: str
    build: Callable[[], Sample]


CASES: dict[str, Case] = {}


def case(package: str, name: str | None = None) -> Callable[[Callable[[], Sample]], Callable[[], Sample]]:
    """Enter a function that builds a sample, under its own name or ``name``."""

    def enter(build: Callable[[], Sample]) -> Callable[[], Sample]:
        full = f"{package}/{name or build.__name__.strip('_')}"
        if full in CASES:
            raise ValueError(f"two cases are called {full!r}")
        CASES[full] = Case(full, package, build)
        return build

    return enter


def load() -> dict[str, Case]:
    """All cases, by name, in order of their packages."""
    ready()
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return dict(sorted(CASES.items()))


# -------------------------------------------------------------------------------------------- losses


def squares(outputs: Any) -> Tensor:
    """The mean square of every real tensor of ``outputs`` that has a gradient, added up."""
    if isinstance(outputs, Tensor):
        return (torch.view_as_real(outputs) if outputs.is_complex() else outputs).float().pow(2).mean()
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    kept = [
        part
        for part in parts
        if isinstance(part, (list, tuple, dict))
        or (isinstance(part, Tensor) and part.requires_grad and part.dtype.is_floating_point)
    ]
    return torch.stack([squares(part) for part in kept]).sum()


def classes(outputs: Any) -> Tensor:
    """Cross entropy of logits (batch, classes, ...), the i-th sample being of class i modulo 2."""
    labels = torch.arange(outputs.shape[0], device=outputs.device) % 2
    if outputs.dim() > 2:
        labels = labels.view(-1, *[1] * (outputs.dim() - 2)).expand(outputs.shape[0], *outputs.shape[2:])
    return cross_entropy(outputs, labels)
