"""The symbolic captures of one step: each right for the batches that meet its guards."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph, capture
from planner.capture.outputs import LossFn
from planner.capture.sizes import Dims
from planner.errors import TraceError

__all__ = ["SymbolicCaptures", "capture_varying"]

log = logging.getLogger(__name__)

_MOST = 64  # beyond that the oldest go; only a model that no symbols fit comes so far


class SymbolicCaptures:
    """The captures of one step, shared by all plans for it.

    ``dims``    which dimensions of each input tensor are symbols.
    ``traces``  how often the step was captured.
    ``used``    outputs that are differentiated, whatever loss there is; ``None``: those of the loss.
    """

    def __init__(self, dims: Dims, joint: JointGraph, used: frozenset[int] | None = None) -> None:
        self.dims, self.traces, self.used = dims, 1, used
        self._all = [joint]

    def of(self, model: nn.Module, inputs: Inputs, loss_fn: LossFn | None) -> JointGraph:
        """One that is right for a batch, traced if there is none yet."""
        tensors = inputs.tensors()
        for joint in self._all:
            if joint.sizes is not None and joint.sizes.admit(tensors) and joint.asked.hold(tensors):
                return joint
        loss_fn = loss_fn if self.used is None else None
        joint, _ = capture_varying(
            model,
            inputs.without_data(until_captured=True),
            loss_fn,
            self.dims,
            narrow=True,
            used=self.used,
            drops=bool(self._all[0].template.dropped),
        )
        joint = replace(joint, order=self._all[0].order)
        self.traces += 1
        self._all.append(joint)
        if len(self._all) > _MOST:
            del self._all[1]
        return joint


def capture_varying(
    model: nn.Module,
    inputs: Inputs,
    loss_fn: LossFn | None,
    dims: Dims,
    *,
    narrow: bool,
    used: frozenset[int] | None = None,
    drops: bool = False,
) -> tuple[JointGraph, Dims]:
    """Capture with ``dims`` symbolic, and which of them are in the end.

    ``narrow``: where the trace fails with all of them it is tried with the first dimension of each
    tensor, and then with none; else the ``TraceError`` stands.
    """
    first = tuple(tuple(d for d in of if d == 0) for of in dims)
    fixed: Dims = tuple(() for _ in dims)
    tries = list(dict.fromkeys([dims, first, fixed])) if narrow else [dims]
    for these in tries[:-1]:
        try:
            return capture(model, inputs, loss_fn, used=used, dims=these, drops=drops), these
        except TraceError as e:
            log.debug("%s cannot be captured with sizes %s varying: %s", type(model).__name__, these, e)
            error = e
    # raises where the reason was another
    joint = capture(model, inputs, loss_fn, used=used, dims=tries[-1], drops=drops)
    if len(tries) > 1:
        log.warning(
            "%s cannot be captured for varying sizes, so each shape is planned by itself: %s",
            type(model).__name__,
            error,
        )
    return joint, tries[-1]
