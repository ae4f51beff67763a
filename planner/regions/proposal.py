"""Where a step can be planned neither as one graph nor in regions: which part of the model could be."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner._compat import FakeTensor
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import capture
from planner.capture.module import original_forward
from planner.errors import PlannerError
from planner.measure.step import held, tensors_in
from planner.regions.observe import apart

__all__ = ["proposal"]

log = logging.getLogger(__name__)

LIMIT_S = 15.0  # after which no further part is tried
TRIES = 6


def proposal(model: nn.Module, inputs: Inputs) -> str:
    """Words that name the part with most of the activations that is one graph, or say what was tried.

    The forward runs once, without gradients, and everything is put back; parts are captured on fakes, the
    largest first, until one is a graph, ``TRIES`` of them or ``LIMIT_S`` seconds.
    """
    name, began = type(model).__name__, time.perf_counter()
    try:
        calls, made_bytes = _seen(model, inputs)
    except PlannerError as error:
        return f"Of the parts of {name} none was tried: {error}"
    parts = dict(model.named_modules())
    trains = [n for n in calls if n and any(p.requires_grad for p in parts[n].parameters())]
    trains.sort(key=lambda n: (-made_bytes[n], n.count(".")))
    tried: list[str] = []
    for path in trains[:TRIES]:
        if time.perf_counter() - began > LIMIT_S:
            break
        tried.append(path)
        try:
            capture(parts[path], calls[path])
        except Exception as error:  # the user's code on fakes: whatever stops it, it is not proposed
            log.debug("model.%s is not proposed: %r", path, error)
            continue
        share = f", where {made_bytes[path] / made_bytes['']:.0%} of what the model's layers return is made"
        return (
            f"What works instead: model.{path} ({type(parts[path]).__name__}"
            f"{share if made_bytes[''] else ''}) is one graph. planner.enable(model.{path}, budget_gb), with "
            "a budget for what that part takes, plans it, and the rest trains as it is"
        )
    if not tried:
        return f"Of the parts of {name} none was tried: none with parameters to train was called by itself"
    rest = len(trains) - len(tried)
    return (
        f"Of the parts of {name}, {', '.join(tried)} {'was' if len(tried) == 1 else 'were'} tried, and none "
        f"is one graph{f'; {rest} smaller ones were not tried' if rest else ''}"
    )


def _seen(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Inputs], Counter[str]]:
    """Of each part what its first call was given, and bytes that its layers returned."""
    real = not any(t.is_meta or isinstance(t, FakeTensor) for t in held(model, inputs))
    calls: dict[str, Inputs] = {}
    made_bytes: Counter[str] = Counter()

    def begins(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in calls:
                calls[path] = Inputs(args, dict(kwargs)).without_data()

        return hook

    def ends(path: str) -> Callable[..., None]:
        above = [path[:i] for i, letter in enumerate(path) if letter == "."]

        def hook(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            size = sum(t.nbytes for t in tensors_in(outputs))
            made_bytes.update(dict.fromkeys(("", *above, path), size))

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks of Python's
        handles.append(module.register_forward_pre_hook(begins(path), with_kwargs=True))
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(ends(path)))
    try:
        # on fakes it ends where a value is wanted; what was seen until then is what is known
        around = apart(model, inputs) if real else contextlib.nullcontext()
        with around, torch.no_grad(), contextlib.suppress(Exception):
            original_forward(model)(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, made_bytes
