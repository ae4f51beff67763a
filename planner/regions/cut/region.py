"""A region: one of Dynamo's graphs, captured at each signature that it is called with, and run as planned.

What differs from one call to the next (sizes, dtypes, which arguments want gradients, autocast) is a variant
of its own.  Graphs of one structure share what was captured, whichever layers they were cut from.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import le
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from planner import _compat
from planner._compat import pytree
from planner.capture import meta
from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph
from planner.costs.op_costs import Costs
from planner.costs.target import Target
from planner.errors import PlannerError
from planner.graph.captured import CapturedStep
from planner.graph.reading_once import reading_once
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.plans.lowering import lower
from planner.regions.cut.checkpointed import Checkpointed
from planner.regions.cut.numbers import Numbers, Scalar, class_of, other_values, scalars_of, told
from planner.regions.cut.piece import Piece, Slot, apart, captured_piece, with_homes
from planner.regions.cut.plain import as_eager
from planner.regions.cut.spread import Layouts
from planner.regions.cut.writes import positions
from planner.rewrite.emit import emit
from planner.rewrite.program import Argument
from planner.runtime.output_sets import OutputSets
from planner.runtime.step import ExecutableStep
from solvers import Problem, minimum_peak
from solvers.core.simulate import simulate_steps

__all__ = ["Region", "Variant", "recomputing_all"]

log = logging.getLogger(__name__)

MANY = 8  # reads of one tensor
LEAST_S = 3.0  # of search for a region's lowest peak

Names = Mapping[int, str]  # of the model's tensors, or modules, by identity


def recomputing_all(graph: TrainingGraph) -> tuple[list[int], int]:
    """The schedule that saves nothing that can be made again, and how many of its steps are the forward's."""
    forward = [i for i, op in enumerate(graph.ops) if op.phase == "forward"]
    behind = [i for i, op in enumerate(graph.ops) if op.phase != "forward"]
    producer = {v: i for i in forward for v in graph.ops[i].outputs}
    wanted = [v for i in behind for v in graph.ops[i].inputs]
    again: set[int] = set()
    while wanted:
        i = producer.get(wanted.pop())
        if i is not None and i not in again and graph.ops[i].recomputable:
            again.add(i)
            wanted += graph.ops[i].inputs
    return forward + sorted(again) + behind, len(forward)


class Sets(OutputSets):
    """What a region has learned of its outputs' gradients."""

    def tell_kept(self, step: ExecutableStep) -> None:
        """What ``retain_graph=True`` holds was measured in the recorded step."""


@dataclass(eq=False)
class Variant:
    """A region at one signature.

    ``captured``  ``None`` where it runs as eager runs it, and ``why``.
    ``base``      the path below which its parameters were when it was captured.
    ``made``      the programs of its schedules.
    """

    slots: tuple[Slot, ...]
    base: str = ""
    captured: CapturedStep | None = None
    costs: Costs | None = None
    why: str = ""
    made: dict[tuple[int, ...], ExecutableStep] = field(default_factory=dict)
    again: Callable[[nn.Module, Inputs, frozenset[int]], Variant] | None = None
    scalars: Sequence[Scalar] = ()
    _light: tuple[list[int], int] | None = None
    _problem: Problem | None = None
    _sets: dict[tuple[int, ...], Sets] = field(default_factory=dict)
    _like: dict[int, bool] = field(default_factory=dict)
    _held_bytes: dict[tuple[int, ...], int] = field(default_factory=dict)

    def lightest(self, room_bytes: int | None = None, calls: int = 1) -> tuple[list[int], int]:
        """A schedule that saves next to nothing; of more than ``room_bytes``, the one of the lowest
        peak that is found, if that is lower by more than ``calls`` such regions hold for it.
        """
        assert self.captured is not None and self.costs is not None
        if self._light is None:
            self._light = recomputing_all(self.captured.graph)
            self._problem = lower(self.captured.graph, self.costs, resident_bytes=0)
        steps, turn = self._light
        problem = self._problem
        if room_bytes is None or problem is None:
            return steps, turn
        self._problem = None  # it is asked once
        peak_bytes = simulate_steps(problem.as_run(steps), steps).peak_bytes
        if peak_bytes > room_bytes:
            least = minimum_peak(problem, time_limit_s=LEAST_S).schedule.steps(problem)
            forward = [i for i, op in enumerate(self.captured.graph.ops) if op.phase == "forward"]
            least_turn = 1 + max((least.index(i) for i in forward), default=-1)
            more = self.held_bytes(least, least_turn) - self.held_bytes(steps, turn)
            gained = peak_bytes - simulate_steps(problem.as_run(least), least).peak_bytes
            if gained > max(0, more * (calls - 1)):
                self._light = least, least_turn
        return self._light

    def program(self, steps: Sequence[int], turn: int, budget_bytes: int) -> ExecutableStep:
        """What runs ``steps``."""
        assert self.captured is not None
        key = tuple(steps)
        if key not in self.made:
            graph, joint = self.captured.graph, self.captured.joint
            self.made[key] = ExecutableStep(
                emit(graph, list(steps), turn=turn),
                joint.template,
                self.captured.expected,
                graph.device,
                budget_bytes,
                replan=functools.partial(self._for_others, budget_bytes),
            )
        return self.made[key]

    def _for_others(
        self, budget_bytes: int, piece: nn.Module, inputs: Inputs, used: frozenset[int]
    ) -> ExecutableStep:
        """What runs where gradients came for outputs that it does not differentiate."""
        assert self.again is not None
        other = self.again(piece, inputs, used)
        if other.captured is None:
            raise PlannerError(other.why)
        return other.program(*other.lightest(), budget_bytes)

    def sets_of(self, steps: Sequence[int], step: ExecutableStep) -> Sets:
        """What is known of its outputs' gradients where it runs ``steps``."""
        key = tuple(steps)
        if key not in self._sets:
            assert self.captured is not None
            self._sets[key] = Sets(self.captured.model, step)
        return self._sets[key]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each value of its graph."""
        return () if self.captured is None else tuple(v.bytes for v in self.captured.graph.values)

    def is_like(self, other: Variant) -> bool:
        """Whether ``other``, the region at other sizes, can run a schedule of it."""
        known = self._like.get(id(other))
        if known is None:
            known = self._like[id(other)] = _runs_alike(other, self)
        return known

    def serves(self, other: Variant, bounds: tuple[int, ...] | None = None) -> bool:
        """Whether it can, and has no value of more bytes than ``bounds``, those of this one by default."""
        return self.is_like(other) and all(map(le, other.sizes, self.sizes if bounds is None else bounds))

    def held_bytes(self, steps: Sequence[int], turn: int) -> int:
        """Bytes that it makes in the forward of a schedule and holds for its backward."""
        key = tuple(steps)
        if key not in self._held_bytes:
            assert self.captured is not None
            self._held_bytes[key] = _held_bytes(self.captured.graph, steps, turn)
        return self._held_bytes[key]

    def graph_at(self, base: str) -> TrainingGraph:
        """Its step where the same code runs below another path."""
        assert self.captured is not None
        return self.captured.graph.moved(self.base, base)

    @cached_property
    def arguments(self) -> tuple[tuple[Argument, int], ...]:
        """A program's arguments, and the position of each among those of Dynamo's graph."""
        found: list[tuple[Argument, int]] = []
        inputs = 0
        for position, slot in enumerate(self.slots):
            if slot.kind == "constant":
                continue
            named = slot.kind != "input"
            if named:
                found.append((Argument(slot.kind, slot.name), position))
            more = slot.uses - named
            found += [(Argument("input", inputs + k), position) for k in range(more)]
            inputs += more
        return tuple(found)

    def spread_leaves(self, args: Sequence[Any], layouts: Layouts) -> dict[Argument, tuple[Any, Any]]:
        """Of the program's arguments that stand for spread tensors of ``args``: these, and how their
        gradients are spread (``None`` for none).
        """
        assert self.captured is not None
        come: Any = self.captured.model
        return {
            argument: (args[position], come.spreads.gradients.get(position))
            for argument, position in self.arguments
            if position in layouts
        }

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The program's input that each of the piece's is, first where it is several."""
        first: dict[int, int] = {}
        for argument, position in self.arguments:
            if argument.kind == "input" and self.slots[position].kind == "input":
                first.setdefault(position, int(argument.key))
        return tuple(first[position] for position in sorted(first))

    def given(self, args: Sequence[Any]) -> dict[Argument, Any]:
        """A program's arguments, of those of Dynamo's graph."""
        out = {argument: args[position] for argument, position in self.arguments}
        for scalar in self.scalars:
            out[Argument("size", str(scalar))] = scalar.of(args)
        return out


def _named(names: Mapping[fx.Node, str]) -> Callable[[fx.Node], Any]:
    return lambda node: names[node]


class Region:
    """One of Dynamo's graphs.

    ``number``   in the order in which Dynamo handed them over.
    ``why``      it runs as eager runs it; "": it does not.
    ``shared``   what was captured for graphs of any number.
    ``numbers``  what it computes of Python's numbers; ``plain``: the rest, which is what is meant elsewhere.
    ``scalars``  arguments that may be another number at each call, within one capture.
    ``spoilt``   arguments (positions) that something behind it writes over before its backward, which
                 therefore reads nothing of them again; ``spoilt_outputs`` likewise (tensors, by number).
    ``tangents`` how gradients of its outputs (tensors, by number) are spread, where they are.
    """

    def __init__(
        self,
        number: int,
        graph: fx.GraphModule,
        homes: Names,
        why: str = "",
        shared: dict[Any, Variant] | None = None,
    ) -> None:
        self.number, self.why = number, why
        self.shared = {} if shared is None else shared
        self.numbers = Numbers.of(graph)
        rest = graph if self.numbers is None else self.numbers.rest
        self.plain = as_eager(rest)
        self.scalars = scalars_of(rest)
        self.graph = with_homes(rest, homes)
        self.writes = positions(rest.graph)  # of what is written, a buffer is made
        self.variants: dict[Any, Variant] = {}
        self.is_eager = bool(why)
        self.is_alone = False  # all of the forward, called once
        self.casts: frozenset[int] | None = None  # by identity, weights that it reads under autocast
        self.spoilt: frozenset[int] = frozenset()
        self.spoilt_outputs: frozenset[int] = frozenset()
        self.tangents: dict[int, Any] = {}
        self._varying: list[int] | None = None  # positions of arguments that are no parameters

    def casts_of(self, args: Sequence[Any]) -> frozenset[int]:
        """By identity, the weights that it reads in a context of autocast, its caller's or its own."""
        if self.casts is None:
            entered = (n.target is _compat.ENTERS_AUTOCAST for n in self.plain.graph.nodes)
            cast = args if _compat.is_under_autocast() or any(entered) else ()
            self.casts = frozenset(id(x) for x in cast if isinstance(x, nn.Parameter) and x.requires_grad)
        return self.casts

    @cached_property
    def read_within(self) -> frozenset[int]:
        """Outputs (tensors, by number) that others are computed from."""
        (output,) = self.plain.graph.find_nodes(op="output")
        nodes = (n for n in pytree.tree_leaves(output.args) if isinstance(n, fx.Node))
        made = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.Tensor)]
        return frozenset(i for i, n in enumerate(made) if any(user is not output for user in n.users))

    @cached_property
    def checkpointed(self) -> Checkpointed:
        """As eager runs it, with nothing held."""
        return Checkpointed(self.plain)

    def signature(self, args: Sequence[Any], layouts: Layouts = MappingProxyType({})) -> Any:
        """What a capture depends on, beside what one graph of Dynamo's guards: all there is to know of
        parameters.

        ``layouts``  of arguments that are spread, by position; they are the last of it.
        """
        if self._varying is None:
            self._varying = [i for i, x in enumerate(args) if type(x) is not nn.Parameter]
        seen: dict[int, int] = {}
        tensors = []
        for position in self._varying:
            x = args[position]
            if not isinstance(x, torch.Tensor):
                tensors.append(class_of(x) if position in self.scalars else (type(x), x))
                continue
            same = seen.setdefault(id(x), position)
            tensors.append(
                (tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad, x.is_leaf, type(x), same)
            )
        device = next((x.device.type for x in args if isinstance(x, torch.Tensor)), "cpu")
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return *tensors, autocast, torch.get_default_dtype(), tuple(layouts.items())

    def slots(self, args: Sequence[Any], names: Names) -> tuple[list[Slot], str]:
        """What each argument is, and the path that the names of parameters and buffers are below.

        ``names``  of the model's parameters and buffers.
        """
        full = [names.get(id(x)) if isinstance(x, torch.Tensor) else None for x in args]
        base = _common([name.split(".")[:-1] for name in full if name is not None])
        out = []
        for position, (x, name) in enumerate(zip(args, full, strict=True)):
            if not isinstance(x, torch.Tensor):
                out.append(Slot("constant"))
            elif isinstance(x, nn.Parameter):
                local = f"parameter_{position}" if name is None else name[len(base) :].lstrip(".")
                out.append(Slot("parameter", local))
            elif name is not None and not x.requires_grad:
                out.append(Slot("buffer", name[len(base) :].lstrip(".")))
            elif not x.requires_grad and position in self.writes:
                out.append(Slot("buffer", f"written_{position}"))
            else:
                out.append(Slot("input"))
        return out, base

    def variant(
        self, key: Any, args: Sequence[Any], names: Names, target: Target, used: frozenset[int] | None = None
    ) -> Variant:
        """The region at arguments of signature ``key``, captured when they first come.

        ``used``  the outputs (tensors, by number) that get gradients; ``None``: all that can.
        """
        found = self.variants.get((key, used))
        if found is None:
            slots, base = self.slots(args, names)
            alike = self._alike(key, slots, args, used)
            found = self.shared.get(alike)
            if found is not None:
                self.variants[key, used] = found
                return found
            piece = Piece(self.graph, slots, args, dict(key[-1]), self.tangents)
            inputs = Inputs(tuple(piece.arguments(args)), {}).apart().without_data()
            found = self._captured(key, piece, inputs, base, target, used)
            if alike is not None:
                self.shared[alike] = found
        return found

    def _alike(
        self, key: Any, slots: Sequence[Slot], args: Sequence[Any], used: frozenset[int] | None
    ) -> Any:
        """What regions have in common that share a capture; ``None``: none does.

        Numbers that vary and constants are a region's own.
        """
        if self.scalars or self.code is None:
            return None
        parameters = tuple(
            (i, tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad, id(x) in map(id, args[:i]))
            for i, x in enumerate(args)
            if isinstance(x, nn.Parameter)
        )
        known = self.spoilt, self.spoilt_outputs, tuple(self.tangents.items())
        return self.code, tuple(slots), parameters, key, used, *known

    @cached_property
    def code(self) -> tuple[Any, ...] | None:
        """The graph without its names; ``None`` where it has constants or graphs of its own."""
        names: dict[fx.Node, str] = {}
        lines: list[Any] = []
        for number, node in enumerate(self.graph.graph.nodes):
            names[node] = f"%{number}"
            if node.op in ("get_attr", "call_module"):
                return None
            given = (
                "" if node.op == "placeholder" else repr(fx.map_arg((node.args, node.kwargs), _named(names)))
            )
            lines.append((node.op, None if node.op in ("placeholder", "output") else node.target, given))
        return tuple(lines)

    def _captured(
        self,
        key: Any,
        piece: Piece,
        inputs: Inputs,
        base: str,
        target: Target,
        used: frozenset[int] | None,
        like: tuple[Slot, ...] | None = None,
    ) -> Variant:
        """``like``: its arguments are to be those of a call that runs, by these slots."""
        known = (key, used) if like is None else (key, used, like)
        found = self.variants.get(known)
        if found is not None:
            return found
        try:
            joint, terms = captured_piece(piece, inputs, used)
            terms = {} if self.is_alone else terms
            scalars = self._scalars(joint, piece, inputs, used)
        except PlannerError as error:
            log.info("region %d runs as eager runs it: %s", self.number, error)
            made = Variant(piece.slots, base, why=str(error))
        else:
            made = self._made(piece, base, *apart(joint, terms, piece.slots, like), target)
            if made.captured is not None and (many := _too_many(terms, made.captured.graph)):
                made = Variant(piece.slots, base, why=many)
            made.scalars = scalars
            made.again = lambda _, inputs, used: self._captured(
                key, piece, inputs, base, target, used, made.slots
            )
        self.variants[known] = made
        return made

    def _made(
        self, piece: Piece, base: str, joint: JointGraph, slots: tuple[Slot, ...], target: Target
    ) -> Variant:
        made = Variant(slots, base)
        spoilt = {(a.kind, a.key) for a, position in made.arguments if position in self.spoilt}
        try:
            graph, made.costs, _ = target.price(
                reading_once(training_graph(joint), spoilt, self.spoilt_outputs)
            )
        except PlannerError as error:
            made.why = str(error)
        else:
            made.captured = CapturedStep.of(piece, joint, graph)
        return made

    def note_tangent(self, output: int, gradient: torch.Tensor) -> None:
        """The gradient of an output has come, where it ran as eager runs it."""
        if not _compat.is_spread(type(gradient)):
            return
        layout = _compat.layout_of(gradient)
        known = self.tangents.setdefault(output, layout)
        if known is layout:
            self.variants.clear()
        elif not _compat.alike_spread(known, layout):
            self.is_eager = True
            self.why = self.why or "the gradient of an output is spread in another way from call to call"

    def is_spoilt_at(self, arguments: Collection[int], outputs: Collection[int]) -> None:
        """Something writes over these arguments and outputs between a call and its backward."""
        if not (self.spoilt.issuperset(arguments) and self.spoilt_outputs.issuperset(outputs)):
            self.spoilt, self.spoilt_outputs = (
                self.spoilt.union(arguments),
                self.spoilt_outputs.union(outputs),
            )
            self.variants.clear()

    def _scalars(
        self, joint: JointGraph, piece: Piece, inputs: Inputs, used: frozenset[int] | None
    ) -> list[Scalar]:
        """The numbers that the captured step is to be given; what they are in it is replaced there."""
        positions = [k for k, slot in enumerate(piece.slots) for _ in slot.places]
        while True:
            at = frozenset(i for i, k in enumerate(positions) if k in self.scalars)
            others = other_values(inputs.args, at)
            if all(a is b for a, b in zip(inputs.args, others, strict=True)):
                return []
            other, _ = captured_piece(piece, replace(inputs, args=tuple(others)), used)
            graphs = joint.step.module.graph, other.step.module.graph
            found, fixed = told(*graphs, inputs.args, others, positions)
            if not fixed:
                return found
            self.scalars -= fixed  # each value of these has a capture of its own


def _runs_alike(one: Variant, other: Variant) -> bool:
    if one is other:
        return True
    if one.captured is None or other.captured is None:
        return False
    mine, its = one.captured.graph, other.captured.graph
    return len(mine.values) == len(its.values) and [(op.name, op.inputs, op.outputs) for op in mine.ops] == [
        (op.name, op.inputs, op.outputs) for op in its.ops
    ]


def _held_bytes(graph: TrainingGraph, steps: Sequence[int], turn: int) -> int:
    made = {v for i in steps[:turn] for v in graph.ops[i].outputs}
    held: set[int] = set()
    for i in steps[turn:]:
        held.update(v for v in graph.ops[i].inputs if v in made)
        made.difference_update(graph.ops[i].outputs)
    return sum(graph.values[v].bytes for v in held)


def _common(paths: list[list[str]]) -> str:
    """The path that all of ``paths`` begin with."""
    out = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out)


def _too_many(terms: Mapping[str | int, Sequence[fx.Node]], graph: TrainingGraph) -> str:
    """Why gradients that are handed on one by one, to be added up in eager's order, are too many; "": they
    are not.
    """
    forward = {v for op in graph.ops if op.phase == "forward" for v in op.outputs}
    forward_bytes = sum(graph.values[v].bytes for v in forward)
    for key, of in terms.items():
        if len(of) > MANY and sum(meta.tensor(term).nbytes for term in of[1:]) > forward_bytes:
            name = key if isinstance(key, str) else f"input {key}"
            return (
                f"it reads {name} {len(of)} times, as a recurrence does, and each of the gradients is handed "
                "on by itself, since code outside of it may read that too, which takes more than a plan "
                "would save. Plan the layer that does so by itself (planner.enable)"
            )
    return ""
