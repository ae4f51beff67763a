"""Hugging Face's own switch, made to mean "plan for this budget".

transformers' ``Trainer`` calls ``activation_checkpointing_enable`` on the model it was given, or, where
that is missing, the older ``gradient_checkpointing_enable``; sentence-transformers' models have only the
older one, and a plain module has neither.  All four names are put on the instance, so the class, by which
saving and loading find their way, stays what it was.

What is planned is one module whose forward is one graph: the model itself, or the transformer inside a
sentence-transformers model, whose ``forward`` takes and changes a dict of features and calls the
transformer's ``forward`` by name.

Layers that carry a ``gradient_checkpointing`` flag would checkpoint themselves inside the plan, so raised
flags are lowered while the switch is on and raised again when it goes off.

Known limit: of the arguments of the switch only ``budget_gb`` and the options of :func:`planner.enable` mean
something to a plan.  Those of transformers, trl and ``torch.utils.checkpoint`` are left aside, whichever way
they come, with a line in the log where that is not what was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "NAMES",
    "arguments_of",
    "flags_raised",
    "outside_bytes",
    "own_checkpointing",
    "planned_module",
    "set_flags",
    "training_arguments",
    "usual_calls",
]

log = logging.getLogger(__name__)

NAMES = {
    "activation_checkpointing_enable": True,
    "gradient_checkpointing_enable": True,
    "activation_checkpointing_disable": False,
    "gradient_checkpointing_disable": False,
}

# What other switches are told, and what they take where they are told nothing: transformers, trl, torch.
_CHOOSES = "the plan decides what to keep and what to recompute"
_LEFT_ASIDE: Mapping[str, tuple[Any, str]] = {
    "every_n_layers": (1, _CHOOSES),
    "offload": (False, "a plan recomputes, and moves nothing to the host"),
    "selective": (False, _CHOOSES),
    "context_fn": (None, _CHOOSES),
    "preserve_rng_state": (True, "a planned step draws the same random numbers again, always"),
}

# Of torch.utils.checkpoint too: how it goes about it, which changes nothing of what comes out.
_MEANS = frozenset({"use_reentrant", "determinism_check", "debug", "early_stop"})

# By position, as transformers' switch takes them; the first is a dict of the others.
_POSITIONS = ("activation_checkpointing_kwargs", "every_n_layers", "offload")


def _is_sentence_model(root: nn.Module) -> bool:
    if "sentence_transformers" not in sys.modules:  # then nobody can have made one
        return False
    from sentence_transformers.base.model import BaseModel

    return isinstance(root, BaseModel)


def usual_calls(root: nn.Module) -> int | None:
    """How often a step usually calls the planned module, ``None`` if nobody knows.

    The losses of sentence-transformers call their model once per column of texts, or per negative.
    """
    return None if _is_sentence_model(root) else 1


def outside_bytes(root: nn.Module, outputs_bytes: int) -> int:
    """What the layers behind the planned module take: pooling makes a masked copy of its output."""
    pools = _is_sentence_model(root) and any(type(m).__name__ == "Pooling" for m in root.children())
    return outputs_bytes if pools else 0


def planned_module(root: nn.Module) -> nn.Module:
    """The module whose forward is planned when ``root`` is enabled."""
    if not _is_sentence_model(root):
        return root
    inner = root.transformers_model
    if not isinstance(inner, nn.Module):
        raise TypeError(
            f"this {type(root).__name__} holds no transformers model to plan; enable the module that does "
            "the work, e.g. planner.enable(model[0], ...)"
        )
    return inner


def flags_raised(root: nn.Module) -> list[nn.Module]:
    """Modules below ``root`` that would checkpoint themselves."""
    return [m for m in root.modules() if getattr(m, "gradient_checkpointing", False) is True]


def own_checkpointing(root: nn.Module) -> list[nn.Module]:
    """Modules below ``root`` that checkpoint themselves once their flag is raised, which is left as it was.

    transformers' own switch is what readies them; models of other libraries are those whose flag is up.
    """
    raised = flags_raised(root)
    if "transformers" not in sys.modules:
        return raised
    from transformers import PreTrainedModel

    for module in root.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            func = functools.partial(checkpoint, use_reentrant=False)
            with contextlib.suppress(TypeError, ValueError):  # models of an older form
                module._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=func)
    found = flags_raised(root)
    set_flags([m for m in found if m not in raised], False)
    return found


def set_flags(modules: list[nn.Module], value: bool) -> None:
    """Raise or lower the ``gradient_checkpointing`` flag of each of ``modules``."""
    for module in modules:
        module.gradient_checkpointing = value  # type: ignore[assignment]


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's options among the arguments of one of ``NAMES``.

    Both names of the dict, its positional form and its keys as plain keywords are understood.  ``TypeError``
    for a dict that is none.
    """
    if len(args) > len(_POSITIONS):
        raise TypeError(
            f"the switch takes {len(_POSITIONS)} positional arguments at most ({', '.join(_POSITIONS)}), got "
            f"{len(args)}"
        )
    given = {**dict(zip(_POSITIONS, args, strict=False)), **kwargs}
    inner: dict[str, Any] = {}
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        options = given.pop(name, None) or {}
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{name} must be a dict of options, such as {{'budget_gb': 8}}, not {options!r}"
            )  # fmt: skip
        inner |= options
    given |= inner
    for name, (usual, instead) in _LEFT_ASIDE.items():
        if given.pop(name, None) not in (None, usual):
            log.warning("%s is left aside: %s", name, instead)
    return {k: v for k, v in given.items() if k not in _MEANS}


def training_arguments(forward: Callable[..., Any], config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with ``use_cache=False`` where the config would have the step return a cache of keys.

    transformers' checkpointing layers do the same: nothing in training reads that cache.
    """
    if not getattr(config, "use_cache", False) or kwargs.get("use_cache") is False:
        return kwargs
    if "use_cache" not in inspect.signature(forward).parameters:
        return kwargs
    return {**kwargs, "use_cache": False}
