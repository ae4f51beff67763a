"""One plan for many shapes: which program runs a batch, and when another trace or solution is needed.

A *variant* is a program made from one symbolic capture and one schedule.  A batch of new sizes takes
the first variant

* whose guards hold at its sizes, so that the graph is right, and
* whose peak there is within the budget.  Where no storage is larger than it was planned for, nor is
  the peak; else the schedule is judged again at the batch's sizes, which is arithmetic.

A batch so small that all of it can be kept is run without recomputation, by a second program from
the same capture; whether it can is the same arithmetic.

Where the guards of none hold (a size of 1, a branch the model takes on lengths) the step is traced
once more, for all batches of that kind; the schedule is taken over where the graph has the same
calls and fits, and solved for where not.  Where guards hold but the budget does not, the batch is
larger than the plan can serve: the schedule is solved for its sizes without a trace, or the batch is
refused, as the user chose.  Shapes seen before cost a dictionary lookup.

Known limits: costs and kernel workspace are those of the sizes planned for, and so is what a loss
outside the model makes; both are taken to grow with the step's values where a batch is larger.  A plan
read from a file knows no costs, so it runs what is no larger than it was made for and refuses the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from planner import _compat
from planner._compat import pytree
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph
from planner.capture.outputs import LossFn
from planner.capture.symbolic import SymbolicCaptures
from planner.errors import StalePlanError
from planner.graph.captured import CapturedStep
from planner.graph.training_graph import TrainingGraph
from planner.options import OnLarger, Search
from planner.plans.plan_data import PlanData
from planner.rewrite.emit import emit
from planner.rewrite.program import Argument
from planner.runtime.step import ExecutableStep, Lifetimes

__all__ = ["MATTERS", "Replanner", "Variant", "Variants", "Varying", "step_of"]

log = logging.getLogger(__name__)

# Outputs of fewer bytes than this part of what a step holds are not worth a plan of their own.
MATTERS = 1000

_MOST_VARIANTS = 64  # beyond that the oldest go; only a model that no symbols fit comes so far
_MOST_SHAPES = 4096  # remembered; beyond that all are forgotten, and cost a millisecond again


@dataclass(frozen=True)
class Varying:
    """What a plan for many shapes was asked for, and the captures it starts from.

    ``on_larger``  for a batch that no schedule at hand serves within the budget.
    ``around``     the context in which a batch is captured and planned for in the middle of training.
    """

    captures: SymbolicCaptures
    on_larger: OnLarger = "replan"
    search: Search = field(default_factory=Search)
    around: Callable[[], AbstractContextManager[None]] = nullcontext


class Replanner(Protocol):
    """A captured step that has costs, so that its schedules can be judged and searched for.

    :class:`planner.solving.priced.PricedStep` is one; a plan from a file has none.
    """

    @property
    def captured(self) -> CapturedStep: ...
    @property
    def loss_fn(self) -> LossFn | None: ...
    @property
    def least_limit_s(self) -> float: ...

    def peak_of(self, steps: list[int]) -> int:
        """Peak in bytes of a schedule, the optimizer's step included."""
        ...

    def peak_at(self, value_bytes: np.ndarray, inputs: Inputs, steps: list[int]) -> int:
        """The same where each of the graph's values has ``value_bytes``, shape (V,)."""
        ...

    def recaptured(self, model: nn.Module, joint: JointGraph) -> Replanner:
        """The same model and settings, from another capture or at other sizes."""
        ...

    def as_planned(self, plan: PlanData) -> Replanner:
        """The same where the outputs live as ``plan`` counts them to."""
        ...

    def plan_bytes(
        self, budget_bytes: int, search: Search | None = None, *, hint: PlanData | None = None
    ) -> PlanData:
        """The plan for a budget in bytes."""
        ...


def step_of(plan: PlanData, captured: CapturedStep, steps: list[int], turn: int) -> ExecutableStep:
    """The program of a schedule of ``captured``, with what ``plan`` says of the caller."""
    graph, template = captured.graph, captured.joint.template
    names = [leaf.name for leaf in template.leaves]
    released, kept = (
        frozenset(i for i, name in enumerate(names) if name in of) for of in (plan.released, plan.kept)
    )
    storages: dict[int, list[int]] = {}
    for i in sorted(graph.releasable):
        storages.setdefault(graph.value_of[graph.outputs[i]], []).append(i)
    watched = tuple(
        tuple(on)
        for v, on in storages.items()
        if graph.values[v].bytes * MATTERS >= plan.peak_bytes or released.intersection(on)
    )
    program = emit(graph, steps, turn=turn)
    return ExecutableStep(
        program,
        template,
        captured.expected,
        graph.device,
        plan.budget_bytes,
        plan=plan,
        lifetimes=Lifetimes(released, kept),
        watched=watched,
        unread=frozenset(i for i, _ in captured.joint.unread),
        is_tight=plan.baseline_peak_bytes > plan.budget_bytes and len(set(steps)) < len(steps),
    )


class Variant:
    """One capture with one schedule, and what it takes to run it at other sizes.

    ``plan``      whose budget it is for; it was made for ``captured``, or for larger sizes.
    ``sequence``  op names in execution order: the plan's, or one that keeps all; only the former's peak
                  is known to be within the budget at the sizes that ``captured`` has.

    ``storage_bytes(*values)``  bytes of each value of the graph where the symbols have these values.
    """

    def __init__(
        self,
        captured: CapturedStep,
        replanner: Replanner | None,
        plan: PlanData,
        sequence: Sequence[str] | None = None,
    ) -> None:
        self.captured, self.replanner = captured, replanner
        self.plan, self.fits = plan, sequence is None
        sequence = plan.sequence if sequence is None else sequence
        self.steps = captured.steps(sequence)
        joint, graph = captured.joint, captured.graph
        self.tensors = joint.inputs.tensors()
        self.step = step_of(plan, captured, self.steps, captured.turn(sequence))
        self.sizes = joint.sizes
        symbols = () if self.sizes is None else self.sizes.symbols
        expressions = {key: meta.size(node) for node, (kind, key) in graph.sources.items() if kind == "size"}
        self._arguments = [Argument("size", str(key)) for key in expressions]
        self._sizes = _compat.compiled(list(expressions.values()), symbols)
        self.storage_bytes = _storage_bytes(graph, symbols)
        self._planned = np.array([v.bytes for v in graph.values], dtype=np.int64)

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the graph is right for these inputs."""
        return self._is_laid_out(tensors) and self.answers(tensors)

    def answers(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether they answer what the forward asks of them as those did that it was captured for."""
        return self.captured.joint.asked.hold(tensors)

    def _is_laid_out(self, tensors: Sequence[torch.Tensor]) -> bool:
        if self.sizes is None:
            return all(
                a.shape == b.shape and a.stride() == b.stride()
                for a, b in zip(tensors, self.tensors, strict=True)
            )
        return self.sizes.admit(tensors)

    def serves(self, tensors: Sequence[torch.Tensor], inputs: Inputs) -> bool:
        """Whether the peak at these inputs, which it accepts, is within the budget."""
        grown = self.storage_bytes(*self._read(tensors))
        larger = bool((grown > self._planned).any()) or _bytes_of(tensors) > _bytes_of(self.tensors)
        return (self.fits and not larger) or (
            self.replanner is not None
            and self.replanner.peak_at(grown, inputs, self.steps) <= self.plan.budget_bytes
        )

    @cached_property
    def keeping_all(self) -> Variant | None:
        """The same capture with nothing recomputed; ``None`` if that is what this is."""
        ops = self.captured.graph.ops
        if len(self.steps) == len(ops) or self.replanner is None:
            return None
        return Variant(self.captured, self.replanner, self.plan, [op.name for op in ops])

    def arguments(self, tensors: Sequence[torch.Tensor]) -> dict[Argument, int]:
        """The sizes that the program is given."""
        return dict(zip(self._arguments, self._sizes(*self._read(tensors)), strict=True))

    def held_bytes(self, tensors: Sequence[torch.Tensor]) -> int:
        """At most so much is held between forward and backward: all it makes, where nothing is dropped."""
        if self.fits:
            return self.plan.held_bytes
        made = [
            i
            for i, v in enumerate(self.captured.graph.values)
            if v.producer is not None and self.captured.graph.ops[v.producer].phase == "forward"
        ]
        return int(self.storage_bytes(*self._read(tensors))[made].sum()) + _bytes_of(tensors)

    def _read(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        return () if self.sizes is None else self.sizes.read(tensors)


def _storage_bytes(graph: TrainingGraph, symbols: Sequence[Any]) -> Any:
    """A function of the symbols' values: bytes of each value of ``graph``, shape (V,).

    What a loss outside the model makes is known at the planned sizes only: it is taken to grow with the
    step's own values where those grow, and not to shrink.
    """
    fixed = np.array([v.bytes for v in graph.values], dtype=np.int64)
    varying = [i for i, v in enumerate(graph.values) if v.symbolic is not None]
    distinct = {e: k for k, e in enumerate(dict.fromkeys(graph.values[i].symbolic for i in varying))}
    which = np.array([distinct[graph.values[i].symbolic] for i in varying], dtype=np.int64)
    outside = [
        i
        for i, v in enumerate(graph.values)
        if v.symbolic is None and v.producer is not None and graph.ops[v.producer].phase == "loss"
    ]
    function = _compat.compiled(list(distinct), symbols)

    def at(*values: int) -> np.ndarray:
        out = fixed.copy()
        if varying:
            out[varying] = np.array(function(*values), dtype=np.int64)[which]
            growth = max(1.0, float((out[varying] / np.maximum(fixed[varying], 1)).max()))
            out[outside] = np.ceil(fixed[outside] * growth)
        return out

    return at


def _bytes_of(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


class Variants:
    """The variants of one plan, shared by every model it is applied to.

    ``all``     the plan's own first.
    ``solves``  how often a schedule was searched for, that of the plan included.
    ``last``    the plan of the last batch, and ``held_bytes`` what it holds between forward and backward.
    """

    def __init__(
        self, plan: PlanData, captured: CapturedStep, replanner: Replanner | None, varying: Varying
    ) -> None:
        self.plan, self.varying = plan, varying
        self.solves = 1
        self.last, self.held_bytes = plan, plan.held_bytes
        self.all = [Variant(captured, replanner, plan)]
        self._known: dict[Any, list[tuple[Variant, dict[Argument, Any], int]]] = {}

    @property
    def traces(self) -> int:
        """How often the step was captured, for the plan itself included."""
        return self.varying.captures.traces

    def __repr__(self) -> str:
        return (
            f"Variants({len(self.all)}, {self.traces} traces, {self.solves} solves, "
            f"{len(self._known)} shapes seen)"
        )

    def step_for(
        self, model: nn.Module, leaves: Sequence[Any], in_spec: Any
    ) -> tuple[ExecutableStep, dict[Argument, Any]]:
        """The program for a batch, and the sizes it is given.

        Traces and solves where it must; raises ``StalePlanError`` where the batch is larger than the
        plan can serve and may not be planned for, ``InfeasibleBudgetError`` where nothing serves it.
        """
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        key = tuple((t.shape, t.stride()) for t in tensors)
        known = next((k for k in self._known.get(key, ()) if k[0].answers(tensors)), None)
        if known is None:
            args, kwargs = pytree.tree_unflatten(list(leaves), in_spec)
            with _compat.modes_set_aside():  # a meter is not to count the arithmetic, nor a trace
                variant = self._variant_for(model, tensors, Inputs(args, kwargs))
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            known = variant, variant.arguments(tensors), variant.held_bytes(tensors)
            self._known.setdefault(key, []).append(known)
        variant, sizes, self.held_bytes = known
        self.last = variant.plan
        return variant.step, sizes

    def _variant_for(self, model: nn.Module, tensors: list[torch.Tensor], inputs: Inputs) -> Variant:
        right = [v for v in self.all if v.accepts(tensors)]
        for variant in right:
            if variant.serves(tensors, inputs):
                return self._lightest(variant, tensors, inputs)
        first = self.all[0]
        if first.replanner is None:
            raise StalePlanError(
                f"inputs of shapes {_shapes(tensors)} are larger or of another kind than those the plan was "
                f"made for ({_shapes(first.tensors)}), and a plan read from a file cannot be extended; plan "
                "the model again at the largest batch"
            )
        if self.varying.on_larger == "raise" and (right or self._exceeds(tensors)):
            raise StalePlanError(
                f"inputs of shapes {_shapes(tensors)} do not fit {self.plan.budget_bytes / 1e9:.4g} GB with "
                f"the plan made for {_shapes(first.tensors)}; plan at the largest batch, make this one "
                "smaller, or pass on_larger='replan'"
            )
        with self.varying.around():
            joint = self._captured(model, tensors, inputs, first.replanner.loss_fn)
            variant = self._planned(first.replanner.recaptured(model, joint))
        self._keep(variant)
        log.info(
            "%s planned again for shapes %s, with %d traces and %d solves so far",
            type(model).__name__,
            _shapes(variant.tensors),
            self.traces,
            self.solves,
        )
        return variant

    def _lightest(self, variant: Variant, tensors: list[torch.Tensor], inputs: Inputs) -> Variant:
        """The variant, or, where all of a small batch can be kept, the same without recomputation."""
        relaxed = variant.keeping_all
        return relaxed if relaxed is not None and relaxed.serves(tensors, inputs) else variant

    def _exceeds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a dimension is larger than any variant was planned for."""
        return any(
            size > max(v.tensors[i].shape[d] for v in self.all)
            for i, t in enumerate(tensors)
            for d, size in enumerate(t.shape)
        )

    def _captured(
        self, model: nn.Module, tensors: list[torch.Tensor], inputs: Inputs, loss_fn: LossFn | None
    ) -> JointGraph:
        """A capture that is right for a batch, at the sizes to plan for.

        Those are the sizes first planned for, where they are larger throughout and the capture holds there
        too; else the batch's own.
        """
        found = self.varying.captures.of(model, inputs, loss_fn)
        if found.sizes is None:
            return found
        own, largest = found.sizes.read(tensors), found.sizes.read(self.all[0].tensors)
        serves_all = all(a <= b for a, b in zip(own, largest, strict=True)) and found.sizes.hold(largest)
        known = any(v.sizes is found.sizes for v in self.all)  # then its sizes were those of another batch
        return found.at(largest if serves_all and not known else own)

    def _planned(self, step: Replanner) -> Variant:
        """With the plan's own schedule where that is one of this graph and fits, else with another."""
        plan, captured = self.plan, step.captured
        same = {op.name for op in captured.graph.ops} == set(plan.sequence)
        if same and step.peak_of(captured.steps(plan.sequence)) <= plan.budget_bytes:
            return Variant(captured, step, plan)
        made = step.plan_bytes(plan.budget_bytes, self.varying.search, hint=plan)
        self.solves += 1
        step = step.as_planned(made)
        return Variant(step.captured, step, made)

    def _keep(self, variant: Variant) -> None:
        self.all.append(variant)
        if len(self.all) > _MOST_VARIANTS:
            gone = self.all.pop(1)
            for key, several in self._known.items():
                self._known[key] = [k for k in several if k[0].captured is not gone.captured]


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)
