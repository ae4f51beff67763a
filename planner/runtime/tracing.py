"""Calls that are only looked at: a compiler or a transform runs the forward to rewrite it.

A plan's step is generated code behind autograd nodes of its own, and neither torch.compile nor
torch.func's transforms could do anything with it.  So they are given the model's own forward:

* ``torch.compile``, ``model.compile()`` and ``torch.export`` compile the plain model.  The result is right
  and as fast as without a plan, but what is kept and recomputed is then the compiler's choice and **the
  budget does not hold**, which is said once, in a warning.  The same model called outside the compiled
  one runs as planned.
* a plan never runs compiled, not even in parts: a submodule compiled before planning is captured as
  what it computes, and a plan of a model compiled already is refused.
* what another thread compiles meanwhile is no concern of a call, which runs as planned;
* a plan for a model around this one is made from the model's own forward, and so is whatever else a fake
  mode or a tracer of ops sees.

Who trains compiled plans so from the start: ``backend="inductor"`` (:mod:`planner.compiled`).
"""

from __future__ import annotations

import logging

import torch

from planner import _compat

__all__ = ["is_traced"]

log = logging.getLogger(__name__)

_told: set[str] = set()


def is_traced(model_name: str) -> bool:
    """Whether somebody traces this call, so that the model's own forward is to run; says so once."""
    if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and _compat.compiles_here()):
        _tell(model_name)
        return True
    return _compat.is_transformed() or _compat.is_faked()


def _tell(model_name: str) -> None:
    if model_name not in _told:
        _told.add(model_name)
        log.warning(
            "%s is being compiled: what is compiled is its own forward, the plan stays out and its budget "
            "does not hold there. To train as planned, call the model without torch.compile, or plan it "
            "compiled: backend='inductor'",
            model_name,
        )


# A compiler runs it as it traces, instead of tracing it.
torch.compiler.assume_constant_result(_tell)
