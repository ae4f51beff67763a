"""Which outputs get a gradient, as backwards have told, and the programs for those sets.

A set within what the plan differentiates is served by the plan's own backward without what serves the others
(:mod:`planner.rewrite.prune`).  For any other (a loss that is computed from the logits, where the plan took
the model's own for it; a formula that is given some of its gradients only) the step is captured and planned
again, in the same budget, with that set differentiated.  The forward of the call at hand did not keep what
that needs: it is run again, from its inputs and its random numbers, in the very backward that told; later
calls run by the new plan.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from planner import _compat
from planner._compat import pytree, version_of
from planner.capture.inputs import Inputs
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.graph import kernels
from planner.rewrite.program import Argument, Program, Segment
from planner.runtime.step import ExecutableStep
from planner.units import bytes_text

__all__ = ["OutputSets", "Start"]

log = logging.getLogger(__name__)

# Models whose parameters or inputs get gradients in places that no plan knows of, before those of a call.
_JOINED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_MOST_STEPS = 8  # plans for other sets
_BESIDE = 0.01  # of a plan's peak that is a little
_NAMED = 3  # of what is named
_OFTEN = 6  # forwards that ran again before that is said


class Start:
    """What one call began with, from which its forward can be run again.

    Inputs are held until a first backward is through, which is when another set of outputs is learned of;
    from then on they are there only if the caller has them still.
    """

    def __init__(
        self,
        step: ExecutableStep,
        given: dict[Argument, Any],
        leaves: Sequence[Any],
        in_spec: Any,
        *,
        hold: bool,
        inputs: Sequence[int] | None = None,
    ) -> None:
        """Before the forward runs; ``given``: its arguments.

        ``inputs``  the program's input that each tensor of ``leaves`` is; ``None``: they are numbered alike.
        """
        program = step.program
        self._constants = [None if isinstance(x, torch.Tensor) else (x,) for x in leaves]
        self.in_spec = in_spec
        self.state: torch.Tensor | None = None
        if program.draws and not kernels.is_capturing(step.device):
            with _compat.modes_set_aside():
                self.state = kernels.rng_state(str(step.device))
        self.before: dict[str, torch.Tensor] = {}  # buffers that the forward reads and then writes
        if hold:
            self.before = {
                name: given[Argument("buffer", name)].clone()
                for name, read in program.updates.items()
                if read
            }
        self.updates = program.updates
        count = sum(constant is None for constant in self._constants)
        self._inputs = range(count) if inputs is None else inputs
        self._given = dict(given)
        if not hold:
            for argument in given:
                if argument.kind == "input":
                    self._given[argument] = weakref.ref(given[argument])
        self._versions: dict[Argument, int] = {}

    def ran(self, given: dict[Argument, Any]) -> None:
        """The forward has run: from here on nobody may change what it read."""
        self._versions = {a: version_of(t) for a, t in given.items() if isinstance(t, torch.Tensor)}

    def let_go(self) -> None:
        """A backward is through: whoever still holds the loss is not to hold the batch by it."""
        self.before = {}
        for argument, value in self._given.items():
            if argument.kind == "input" and isinstance(value, torch.Tensor):
                self._given[argument] = weakref.ref(value)

    def again(
        self, program: Program, segments: Sequence[Segment], sizes: dict[Argument, Any]
    ) -> dict[Argument, Any]:
        """The arguments as they were, for a forward by ``program`` and a backward by ``segments``.

        Raises ``PlannerError`` for one that is gone, or that these gradients depend on and has changed.
        """
        own = [a for s in segments for a in s.arguments if a.kind in _GIVEN]
        needed = _needed_by(program, segments) | set(own)
        out: dict[Argument, Any] = {}
        for argument in dict.fromkeys((*program.arguments, *own)):
            name = str(argument.key)
            if argument.kind == "constant":
                out[argument] = program.constants[name]
                continue
            value = sizes[argument] if argument in sizes else self.value(argument)
            changes = argument.kind == "buffer" and name in self.updates
            if value is None:
                raise PlannerError(f"input {name} {_GONE}")
            if changes and self.updates[name]:
                if name not in self.before:
                    raise PlannerError(f"the buffer {name}, which the forward changes and reads, {_GONE}")
                value = self.before[name].clone()
            elif changes:
                value = value.clone()
            elif argument in needed and self._versions.get(argument, 0) != _version(value):
                raise PlannerError(f"{argument.kind} {name} {_GONE}")
            out[argument] = value
        return out

    def leaves(self) -> list[Any]:
        """The call's arguments, flat; ``PlannerError`` for a tensor that is gone."""
        out: list[Any] = []
        inputs = iter(self._inputs)
        for constant in self._constants:
            if constant is not None:
                out.append(constant[0])
                continue
            number = next(inputs)
            out.append(self.value(Argument("input", number)))
            if out[-1] is None:
                raise PlannerError(f"input {number} {_GONE}")
        return out

    def value(self, argument: Argument) -> Any:
        """What was given; ``None`` where it is gone."""
        value = self._given.get(argument)
        return value() if isinstance(value, weakref.ref) else value


_GIVEN = ("parameter", "buffer", "input", "constant", "size")

_GONE = (
    "is not there any more as it was: this backward is for outputs that no earlier one was for, so the "
    "forward would have to run again from it. Keep the batch, and change nothing, until the backward; or "
    "plan with loss_fn=... computing the loss you train with"
)


class OutputSets:
    """What one planned model has learned of its outputs' gradients.

    ``now``      the step that its next call runs.
    ``arrived``  the sets of outputs that got gradients so far.
    ``followed_by_another``  those after which another backward of the same call came.
    """

    def __init__(self, model: nn.Module, step: ExecutableStep) -> None:
        self.model, self.now = model, step
        self.arrived: set[frozenset[int]] = set()
        self.followed_by_another: set[frozenset[int]] = set()
        self._awaited: frozenset[int] | None = None  # after which another is to come
        self._again = 0
        self._told: set[str] = set()  # what was said once in the log
        self._steps: dict[frozenset[int], ExecutableStep] = {step.differentiated: step}

    def step_for(
        self, leaves: Sequence[Any], in_spec: Any, present: frozenset[int]
    ) -> tuple[ExecutableStep, dict[Argument, Any]]:
        """A step that gives gradients of the outputs ``present``, for this batch, and the sizes it is given.

        From here on calls run by it.  Raises ``PlannerError`` where there is nobody to plan it,
        ``InfeasibleBudgetError`` where no such plan fits the budget.
        """
        for made in self._steps.values():
            if present <= made.differentiated:
                step, sizes = self._sized(made, leaves, in_spec)
                if present == step.differentiated or step.prunings.of(present) is not None:
                    self.now = made
                    return step, sizes
        together = present.union(*self.arrived)
        if together != present and together not in self._steps:
            try:
                self._plan(leaves, in_spec, together, present)
            except InfeasibleBudgetError as error:
                log.info("%s has no plan for all outputs it was asked for: %s", self.name, error)
            else:
                return self.step_for(leaves, in_spec, present)
        self._plan(leaves, in_spec, present, present)
        return self.step_for(leaves, in_spec, present)

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    def _sized(
        self, step: ExecutableStep, leaves: Sequence[Any], in_spec: Any
    ) -> tuple[ExecutableStep, dict[Argument, Any]]:
        if step.variants is None:
            return step, {}
        return step.variants.step_for(self.model, leaves, in_spec)

    def _plan(
        self, leaves: Sequence[Any], in_spec: Any, used: frozenset[int], present: frozenset[int]
    ) -> None:
        step = self.now
        arrived, planned = step.names(present), step.names(step.differentiated)
        if step.replan is None:
            raise PlannerError(
                f"a gradient arrived for {arrived}, but the plan differentiates {planned} only, and a plan "
                "read from a file cannot be extended; plan with loss_fn=... computing the loss you train with"
            )
        args, kwargs = pytree.tree_unflatten(list(leaves), in_spec)
        began = time.perf_counter()
        on, dtype = step.expected.autocast
        with (
            _compat.modes_set_aside(),
            torch.autocast(step.device.type, dtype=getattr(torch, dtype[6:] or "bfloat16"), enabled=on),
        ):
            try:
                made = step.replan(self.model, Inputs(args, kwargs).without_data(until_captured=True), used)
            except InfeasibleBudgetError as error:
                raise error.saying(
                    f"a gradient arrived for {arrived}, and the plan differentiates {planned}: {error}"
                ) from None
        while len(self._steps) >= _MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        self._steps[used] = made
        log.warning(
            "%s was planned for the gradient of %s, and one arrived for %s: planned again for that in "
            "%.1f s, and the forward runs once more in this backward",
            self.name, planned, arrived, time.perf_counter() - began,
        )  # fmt: skip

    # -- what backwards tell -----------------------------------------------------------------------

    def began(self) -> None:
        """A call begins: what was held for a backward that did not come is not held again."""
        if self._awaited is not None:
            self.followed_by_another.discard(self._awaited)
            self._awaited = None

    def came(self, present: frozenset[int]) -> None:
        """A backward for these outputs runs."""
        self.arrived.add(present)
        self._awaited = present if present in self.followed_by_another else None

    def followed(self, earlier: frozenset[int]) -> None:
        """Another one comes through a call that had one for ``earlier``: from here on that is expected."""
        self._awaited = None
        if earlier not in self.followed_by_another:
            self.followed_by_another.add(earlier)
            self._tell(
                f"followed by another {sorted(earlier)}",
                "%s has another backward after that of %s: what it needs is held from now on, as in eager",
                self.name,
                self.now.names(earlier),
            )

    def runs_again(self) -> None:
        """A forward runs twice, since its program did not keep what its backward came for."""
        self._again += 1
        if self._again == _OFTEN:
            log.warning(
                "%s ran its forward again in %d backwards: outputs that get gradients change from step to "
                "step in a way that no one plan serves. Plan with loss_fn=... that reads all of them, or "
                "read the same ones in every step",
                self.name,
                self._again,
            )

    def tell_kept(self, step: ExecutableStep) -> None:
        """Say once what ``retain_graph=True`` costs."""
        held_gb = 0.0 if step.plan is None else step.plan.held_bytes / 1e9
        self._tell(
            "retain_graph",
            "retain_graph=True: %.4g GB that the backward of %s would let go of stay until the graph goes, "
            "which its plan does not count",
            held_gb,
            self.name,
        )

    @property
    def is_joined(self) -> bool:
        """Whether gradients were added to what something else had made (a penalty on weights)."""
        return self.model in _JOINED

    def joined(self, name: str) -> None:
        """The gradient of ``name``, a sum, was: from here on it is handed out one by one."""
        if not self.is_joined:
            _JOINED.add(self.model)
            log.warning(
                "%s of %s is read several times in a planned call and gets a gradient from elsewhere in the "
                "same backward (a penalty, say). Eager adds one after the other; this step added up the "
                "call's own first, and may differ in the last bits. From the next step on they are added as "
                "in eager; capture='regions' does so from the first",
                name,
                self.name,
            )

    def tell_apart(self, step: ExecutableStep) -> None:
        """Say once what it takes to hand out gradients one by one, where that is more than a little."""
        beside_bytes = step.apart.beside_bytes
        if step.plan is not None and beside_bytes > _BESIDE * step.plan.peak_bytes:
            names, more = [str(name) for name in step.apart.names], ""
            if len(names) > _NAMED:
                names, more = names[:_NAMED], f" and {len(names) - _NAMED} more"
            self._tell(
                "apart",
                "%s reads %s%s several times in a call, and a backward has other gradients of that: they are "
                "handed out one by one, to be added up in eager's order, and up to %s are held beside what "
                "the plan counts",
                self.name,
                ", ".join(names),
                more,
                bytes_text(beside_bytes),
            )

    def _tell(self, what: str, message: str, *values: object) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(message, *values)


def _needed_by(program: Program, segments: Sequence[Segment]) -> set[Argument]:
    """The forward's arguments from which what the segments read was computed."""
    nodes = list(program.forward.graph.nodes)
    argument = dict(zip((n for n in nodes if n.op == "placeholder"), program.arguments, strict=True))
    results = nodes[-1].args[0]
    stack = [
        results[program.outputs + int(a.key)] for s in segments for a in s.arguments if a.kind == "saved"
    ]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return {argument[n] for n in seen if n in argument}


def _version(value: Any) -> int:
    return version_of(value) if isinstance(value, torch.Tensor) else 0
