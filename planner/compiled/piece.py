"""One of Dynamo's graphs: seen once, on tensors, then compiled by inductor as a plan says.

Seen means: taken through torch's own preparation for inductor, so that it is the graph that will be compiled,
and run by the dispatcher.  Nothing is compiled for that.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from planner import _compat
from planner.compiled.emit import Written, write
from planner.compiled.fused import FusedStep
from planner.compiled.judge import Played, play, scratch_bytes
from planner.compiled.layouts import Ways, lay_out
from planner.compiled.prices import costs_of_fused, laid_out_faster
from planner.compiled.verify import added_terms
from planner.costs.op_costs import Costs
from planner.costs.target import Target
from planner.errors import PlannerError
from planner.plans.lowering import lower
from solvers import minimum_peak

__all__ = ["Own", "Piece"]

log = logging.getLogger(__name__)

FORM = 4  # of what is written for a schedule: another for the same schedule is another entry of the caches

KEPT = 8  # plans whose code is kept, should they come back
_GRADIENT = "aten.convolution_backward"

SEEN_S = 1.0  # of search for the schedule of a step that is seen


@dataclass(frozen=True)
class Own:
    """What a piece runs.

    ``steps``   positions in its ops, ``turn`` of them in the forward.
    ``torchs``  the ``activation_memory_budget`` for which torch itself splits its graph so: it is then
                compiled as torch compiles it.  ``None``: it is compiled as ``steps`` say.
    ``sparing`` in code that takes less memory and more time: loops that only read the same are not joined,
                what is dead is not held for the next result of its size, and gradients of convolutions are
                in rows where that takes less, by other kernels than torch's.
    ``last``    positions of gradients of convolutions whose operands have the channels last: of
                :attr:`Piece.swifter`.
    """

    steps: tuple[int, ...]
    turn: int
    torchs: float | None = None
    sparing: bool = False
    last: tuple[int, ...] = ()


class Piece:
    """A graph of a forward with its backward.

    ``step``   as inductor stores it; ``None`` where nothing of it is differentiated.
    ``why``    it is compiled as torch would compile it; "" where it is planned.
    ``costs``  of its ops.
    ``swifter``  of its ops (by position) those that take clearly less time with the channels last.
    ``seen_as``  the schedule that it runs when it is seen; ``seen_low``: one of a low peak.
    """

    def __init__(
        self,
        number: int,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        hears: Hears,
        target: Target,
        *,
        same_bits: bool = False,
        seen_low: bool = False,
    ) -> None:
        self.target, self.seen_low = target, seen_low
        self.number, self.inputs, self.hears, self.same_bits = number, list(inputs), hears, same_bits
        self.gm = _compat.copy_of(gm)
        self.step: FusedStep | None = None
        self.why = ""
        self.costs: Costs | None = None
        self.swifter: dict[int, Ways] = {}
        self.given = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        self.seen_as = Own((), 0)
        self.planned: Own | None = None
        self._compiled: dict[Own | None, Callable[..., Any]] = {}
        self._played: dict[tuple[Own, frozenset[int]], tuple[Played, Played]] = {}
        self._left_bytes: dict[float, int] = {}
        self._partitions: dict[float, tuple[fx.GraphModule, fx.GraphModule]] = {}  # that nobody used up yet
        self._open: list[Any] = []  # calls that are yet to have their backward
        self._seen: Callable[..., Any] | None = None
        self._has_backward = torch.is_grad_enabled()  # while Dynamo cuts it, as while it is called
        self._static: Any = None  # numbers of inputs that stay where they are
        if any(_compat.has_symbols(x) for x in inputs):  # sizes are guarded now, or never
            self._compiled[None] = _compat.compile_as_torch(self.gm, self.inputs)
            if self._has_backward:
                self.why = (
                    "it has numbers that are symbols and no sizes (floats that change). Pass them as "
                    "tensors, or torch.compile(..., dynamic=False), and each value is planned by itself"
                )
        elif any(_compat.is_spread(type(x)) for x in inputs):
            self.why = (
                "its tensors are spread over ranks (DTensors: tensor parallelism), and such graphs are "
                "planned in eager: planner.enable(model, budget_gb) without backend='inductor'"
            )
        elif any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            self._seen = _compat.compile_split(self.gm, self.inputs, self._look, inner=self._interpreted)
        if self.step is None and not self.why:
            self.why = "nothing in it is differentiated"

    @property
    def is_trained(self) -> bool:
        """Whether something that it is given asks for a gradient."""
        given = (x for x in self.inputs if isinstance(x, torch.Tensor))
        return self._has_backward and any(x.requires_grad for x in given)

    @property
    def keep_all(self) -> Own:
        """Nothing is recomputed."""
        assert self.step is not None
        return Own(tuple(range(len(self.step.graph.ops))), self.step.graph.turn)

    @property
    def libraries(self) -> frozenset[str]:
        """Names of what inductor has no loops for: libraries' kernels."""
        assert self.step is not None
        ops = self.step.graph.ops
        return frozenset(op.target for op in ops if op.node is not None and not _compat.is_lowered(op.node))

    @property
    def added_terms(self) -> int:
        """How many one call of it adds up at most into one number."""
        assert self.step is not None and self.costs is not None
        ops, flops = self.step.graph.ops, self.costs.flops
        return max([added_terms(op.node, flops[op.name]) for op in ops if op.node is not None], default=1)

    def peak_bytes(self, played: Played) -> int:
        """Of a half, with what libraries take while they run."""
        if self.target.here.type == "cpu":
            nodes = [node for node, _ in played.kernels]
            scratch = dict(zip(nodes, scratch_bytes(nodes), strict=True))
            return played.with_scratch(scratch.__getitem__)
        assert self.step is not None and self.costs is not None
        most: dict[str, int] = {}
        for op in self.step.graph.ops:
            size = self.costs.workspace_bytes.get(op.name, 0)
            most[op.target] = max(most.get(op.target, 0), size)
        return played.with_scratch(lambda node: most.get(_packet(node), 0))

    # -- looking -----------------------------------------------------------------------------------

    def _look(self, joint: fx.GraphModule, forwards: int, static: Any) -> Any:
        try:
            self._static = static
            self.step = self._step_of(_compat.copy_of(joint), forwards)
            costs = costs_of_fused(self.step, self.target)
            self.costs, self.swifter = laid_out_faster(self.step, costs)
            self.seen_as = self._least() if self.seen_low else self.keep_all
            return self._split(self.step, self.seen_as, sparing=self.seen_low)
        except PlannerError as error:
            self.step, self.why = None, str(error)
            return _compat.torchs_split(joint, forwards, static)

    def _least(self) -> Own:
        """A schedule of a low peak: a step that trains is seen before anything is known of its budget."""
        assert self.step is not None and self.costs is not None
        graph = self.step.graph
        problem = lower(graph, self.costs, resident_bytes=0)
        steps = minimum_peak(problem, time_limit_s=SEEN_S).schedule.steps(problem)
        behind = (k for k, i in enumerate(steps) if graph.ops[i].phase == "backward")
        return Own(tuple(steps), next(behind, len(steps)))

    def torchs(self, budget: float) -> Own:
        """What torch's own partition makes again, for an ``activation_memory_budget``.

        Raises ``PlannerError`` where it would make something again that must run once, or might have other
        bits.
        """
        assert self.step is not None
        if self.same_bits:
            raise PlannerError("torch's partition makes things again that have other bits then")
        ops, turn = self.step.graph.ops, self.step.graph.turn
        forward, backward = self._partitions[budget] = self._partition(budget)
        held = _held_elsewhere(forward, self.step.forwards)
        (output,) = forward.graph.find_nodes(op="output")
        kept = {n for n in output.args[0][self.step.forwards :] if isinstance(n, fx.Node)}
        own = (n.meta["val"] for n in kept if n.name not in held)
        self._left_bytes[budget] = sum(x.nbytes for x in own if isinstance(x, torch.Tensor))
        late = {n.name for n in backward.graph.nodes if n.op == "call_function"}
        again = {i for i in range(turn) if ops[i].name in late}
        once = [ops[i].name for i in sorted(again) if not ops[i].recomputable]
        if once:
            raise PlannerError(f"torch's partition for a memory budget of {budget} runs {once[0]} twice")
        steps, values = list(range(turn)), self.step.graph.values
        for i in range(turn, len(ops)):
            burst, stack = set[int](), list(ops[i].inputs)
            while stack:
                p = values[stack.pop()].producer
                if p in again:
                    again.remove(p)
                    burst.add(p)
                    stack += ops[p].inputs
            steps += [*sorted(burst), i]
        return Own(tuple(steps), turn, budget)

    def left_bytes(self, budget: float) -> int:
        """Bytes that torch's own partition holds, at least, when the backward begins."""
        return self._left_bytes[budget]

    def _step_of(self, joint: fx.GraphModule, forwards: int) -> FusedStep:
        return FusedStep.of(joint, forwards, self._sources(), same_bits=self.same_bits)

    def _sources(self) -> list[tuple[str, str | int]]:
        return [
            ("parameter", name) if isinstance(x, nn.Parameter) else ("input", i)
            for i, (name, x) in enumerate(zip(self.given, self.inputs, strict=True))
        ]

    def _interpreted(self, gm: fx.GraphModule, inputs: Any, **settings: Any) -> Callable[..., Any]:
        """``gm`` run call by call, as one of inductor's functions is called."""
        is_backward = bool(settings.get("is_backward"))
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        _compat.seeded(gm)

        def run(args: list[Any]) -> Any:
            given = list(args)
            args.clear()
            if not is_backward:
                return _run(gm, given)
            seen = self._open.pop() if self._open else None
            if seen is not None:
                places = [i for i, n in enumerate(names) if n.startswith("tangents")]
                self.hears.backward_begins(seen, [given[i] for i in places])
            made = _run(gm, given)
            if seen is not None:
                self.hears.backward_ends(seen, made)
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    # -- running -----------------------------------------------------------------------------------

    def see(self, args: Sequence[Any], seen: Any) -> Any:
        """Run call by call; ``seen`` is told of its backward."""
        assert self._seen is not None
        self._open.append(seen)
        return self._seen(*args)

    def run(self, args: Sequence[Any]) -> Any:
        """Run compiled, as ``planned``, or as torch compiles it where nothing is."""
        made = self._compiled.get(self.planned)
        if made is None:
            made = self._compiled[self.planned] = self._compile()
        return made(*args)

    def _compile(self) -> Callable[..., Any]:
        own = self.planned
        if own is None or self.step is None:
            return _compat.compile_as_torch(self.gm, self.inputs)

        def split(joint: fx.GraphModule, forwards: int, static: Any) -> Any:
            step = self._step_of(joint, forwards)
            assert self.step is not None
            if _shape(step) != _shape(self.step):
                raise PlannerError(
                    f"graph {self.number} was planned as {self.step.graph!r}, and is now {step.graph!r}: "
                    "settings of torch.compile or of inductor have changed since; plan again"
                )
            if own.torchs is not None:
                return _compat.torchs_partition(joint, forwards, own.torchs, static)
            return self._split(step, own)

        return _compat.compile_split(
            self.gm, self.inputs, split, key=self.key_of(own),
            as_written=own.torchs is None, sparing=own.sparing,
        )  # fmt: skip

    def key_of(self, own: Own) -> str:
        """What a schedule adds to the keys of inductor's caches."""
        assert self.step is not None
        h = hashlib.sha256(repr(_shape(self.step)).encode())
        h.update(repr(own).encode())
        return f"planner-{FORM}-{h.hexdigest()}"

    def forget(self, wanted: Sequence[Own]) -> None:
        """What was compiled for other plans than ``wanted`` and a few before them."""
        others = [own for own in self._compiled if own is not None and own not in wanted]
        for own in others[:-KEPT]:
            del self._compiled[own]

    # -- foreseeing --------------------------------------------------------------------------------

    def written(self, own: Own) -> Written:
        """The two graphs of a schedule."""
        assert self.step is not None
        return write(self.step, own.steps, own.turn)

    def halves(self, own: Own) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward that are compiled of it."""
        assert self.step is not None
        if own.torchs is None:
            return self._split(self.step, own)
        return self._partitions.pop(own.torchs, None) or self._partition(own.torchs)

    def _split(
        self, step: FusedStep, own: Own, *, sparing: bool = False
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        halves = write(step, own.steps, own.turn).split()
        last = [k for k, i in enumerate(self._gradients(own)) if i in own.last]
        lay_out(*halves, sparing=sparing or own.sparing, last=last)
        return halves

    def _gradients(self, own: Own) -> list[int]:
        """Positions of gradients of convolutions, in the order of their calls."""
        assert self.step is not None
        ops = self.step.graph.ops
        return [i for i in own.steps[own.turn :] if ops[i].target == _GRADIENT]

    def gradient_bytes(self, own: Own, backward: Played) -> dict[int, int]:
        """Bytes when each of ``own.last`` runs, in ``backward``; its peak where that is not told."""
        calls = [(node, most) for node, most in backward.kernels if _packet(node) == _GRADIENT]
        places = self._gradients(own)
        if len(calls) != len(places):
            return dict.fromkeys(own.last, self.peak_bytes(backward))
        taken = zip(places, calls, scratch_bytes([node for node, _ in calls]), strict=True)
        return {i: most + scratch for i, (_, most), scratch in taken if i in own.last}

    def _partition(self, budget: float) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.step is not None
        joint = _compat.copy_of(self.step.joint)
        return _compat.torchs_partition(joint, self.step.forwards, budget, self._static)

    def played(self, own: Own, going: frozenset[int] = frozenset()) -> tuple[Played, Played]:
        """What the forward and the backward allocate that inductor makes of a schedule.

        ``going``  numbers of output gradients that nobody holds while the backward runs.
        """
        key = own, going
        if key not in self._played:
            assert self.step is not None
            halves = self.halves(own)
            self._played[key] = _played(
                *halves, self.step.forwards, going, self.libraries,
                as_written=own.torchs is None, sparing=own.sparing,
            )  # fmt: skip
        return self._played[key]


class Hears(Protocol):
    """Who is told of the backward of a call that is seen."""

    def backward_begins(self, seen: Any, tangents: Sequence[Any]) -> None:
        """It runs, for these gradients of outputs."""

    def backward_ends(self, seen: Any, made: Sequence[Any]) -> None:
        """It has run, and made a gradient or None for each input."""


def _packet(node: fx.Node) -> str:
    """The op that it calls, whichever overload."""
    return str(node.target).rpartition(".")[0]


def _shape(step: FusedStep) -> list[tuple[Any, ...]]:
    """What two captures of one graph have in common."""
    return [(op.target, op.phase, op.inputs, op.outputs) for op in step.graph.ops]


def _run(gm: fx.GraphModule, given: list[Any]) -> Any:
    """The graph on a list that is cleared; each value goes after its last reader."""
    last: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        for n in node.all_input_nodes:
            last[n] = node
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        places = iter(given)
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        env.update(zip(nodes, places, strict=True))
        given.clear()
        del places
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "get_attr":
                env[node] = operator.attrgetter(str(node.target))(gm)
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
            del args, kwargs
            for n in node.all_input_nodes:
                if last[n] is node:
                    env.pop(n, None)
            if node not in last:
                env.pop(node, None)
    raise AssertionError("a graph without an output")


def _held_elsewhere(forward: fx.GraphModule, forwards: int) -> set[str]:
    """Names of what lies on storages of a forward's operands and outputs, which others hold too."""

    def base(node: fx.Node) -> fx.Node:
        while _compat.is_view_of_operand(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    (output,) = forward.graph.find_nodes(op="output")
    returned = [n if isinstance(n, fx.Node) else None for n in output.args[0]]
    shown = {base(n) for n in returned[:forwards] if n is not None}
    held = {n.name for n in returned if n is not None and (base(n) in shown or base(n).op == "placeholder")}
    return held


def _played(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    forwards: int,
    going: frozenset[int],
    libraries: frozenset[str],
    *,
    as_written: bool,
    sparing: bool,
) -> tuple[Played, Played]:
    held = _held_elsewhere(forward, forwards)
    (output,) = forward.graph.find_nodes(op="output")
    names = [n.name if isinstance(n, fx.Node) else "" for n in output.args[0]]
    given = [n.meta["val"] for n in forward.graph.find_nodes(op="placeholder")]
    how: dict[str, Any] = {"as_written": as_written, "sparing": sparing}
    code = _compat.lowered(forward, is_backward=False, visible=range(forwards), **how)
    first = play(code, given, range(len(given)), libraries)
    saved = {n: made for n, made in zip(names[forwards:], first.results[forwards:], strict=True) if made}
    nodes = backward.graph.find_nodes(op="placeholder")
    for n in nodes:
        if n.name in saved:  # laid out as the forward's code does
            n.meta["val"] = saved[n.name].like
    own = {i for i, n in enumerate(nodes) if n.name in saved and saved[n.name].own}
    (output,) = backward.graph.find_nodes(op="output")
    visible = [i for i, x in enumerate(output.args[0]) if isinstance(x, fx.Node)]
    given = [n.meta["val"] for n in nodes]
    donated = [i for i in own if nodes[i].name not in held]
    code = _compat.lowered(backward, is_backward=True, visible=visible, donated=donated, **how)
    tangents = [i for i, n in enumerate(nodes) if n.name.startswith("tangents")]
    freed = own | {i for k, i in enumerate(tangents) if k in going}
    return first, play(code, given, [i for i in range(len(given)) if i not in freed], libraries)
