"""One rank's step of a sharded model, put together of its pieces; nothing runs."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from planner.capture.inputs import Inputs
from planner.capture.joint_graph import JointGraph
from planner.costs.op_costs import Costs
from planner.costs.target import CostSource, Target, target_for
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.graph.training_graph import TrainingGraph, training_graph
from planner.memory.execution import Execution
from planner.memory.optimizer_state import OptimizerBytes, OptimizerLike, optimizer_state_bytes
from planner.memory.resident import Resident, budget_bytes_of
from planner.memory.static import StaticMemory
from planner.options import Search, check_model, check_optimizer
from planner.plan import Plan
from planner.plans.plan_data import PlanData
from planner.regions.cut.region import recomputing_all
from planner.regions.join import join
from planner.regions.joined import RecordedStep
from planner.regions.record import Crossing, Event, Record, RegionCall
from planner.sharded.pieces import Stack
from planner.sharded.sharding import Group, Held, Sharding, held_beside
from planner.solving.fit import Answer
from planner.solving.in_regions import JoinedStep
from planner.solving.sizes import PlannedSizes, last_within

__all__ = ["ShardedStep", "largest_micro_batch", "sharded_step"]

_MOST_ROWS = 1 << 16  # of a micro-batch

ROOT = "root"  # below which the root's own modules were captured


@dataclass(frozen=True)
class _Priced:
    """A captured piece."""

    graph: TrainingGraph
    costs: Costs
    output: int  # the one that goes on: hidden states, or the loss

    @classmethod
    def of(cls, joint: JointGraph, target: Target) -> _Priced:
        graph, costs, _ = target.price(training_graph(joint))
        (output,) = [i for i, leaf in enumerate(joint.template.leaves) if leaf.differentiated]
        return cls(graph, costs, output)

    def bytes_of(self, node: torch.fx.Node) -> int:
        return self.graph.values[self.graph.value_of[node]].bytes


@dataclass(frozen=True, eq=False)
class ShardedStep(JoinedStep):
    """The step of one rank under FSDP2; its plans are for looking."""

    sharding: Sharding | None = None

    def plan(self, budget_gb: float, *, solver: str = "auto", time_limit_s: float = 30.0) -> Plan:
        """The plan for a rank's budget in GB of 10**9 bytes; ``InfeasibleBudgetError`` if none is found."""
        return self.plan_bytes(budget_bytes_of(budget_gb), Search(solver, time_limit_s))

    def plan_bytes(
        self, budget_bytes: int, search: Search | None = None, *, hint: PlanData | None = None
    ) -> Plan:
        """As of any step, and never worse than every-block checkpointing or a greedy choice, which comes last
        in a search of thousands of ops: this one starts from the better of them.
        """
        search = search or Search()
        if search.solver != "auto" or hint is not None:
            return super().plan_bytes(budget_bytes, search, hint=hint)
        simple = []
        if self.checkpointed_peak_bytes <= budget_bytes:
            total_s, ran = self.problem.total_seconds, self.checkpointed
            seconds = total_s + ran.timeline.recompute_seconds
            answer = Answer(budget_bytes, ran, total_s, 0, seconds, "every block", 0.0)
            simple.append(self.plan_of(answer))
        with contextlib.suppress(InfeasibleBudgetError):
            simple.append(super().plan_bytes(budget_bytes, replace(search, solver="greedy")))
        start = min(simple, key=lambda plan: plan.overhead, default=None)
        return super().plan_bytes(budget_bytes, search, hint=start)

    def applied(self, plan: Plan, model: nn.Module) -> nn.Module:
        """Refused: ``PlannerError``."""
        raise PlannerError(
            f"this plan is of one rank of {self.sharding}, put together without running anything. On the "
            "cluster shard the model and call planner.enable(model, budget_gb): it plans the step that runs"
        )

    @property
    def checkpointed(self) -> Execution:
        """Every block checkpointed: its input is kept, all of it runs again before its backward."""
        own = {
            number: recomputing_all(call.graph)
            for number, call in enumerate(self.record.calls)
            if 0 < number < len(self.record.calls) - 1
        }
        return self.execution(self.joined.as_run(own))

    @property
    def checkpointed_peak_bytes(self) -> int:
        """What that takes, the optimizer's step included."""
        return max(self.checkpointed.peak_bytes, self.memory.optimizer_step_bytes)

    def overhead_of(self, ran: Execution) -> float:
        """Seconds of recomputation in a step, as a share of the step without."""
        return ran.timeline.recompute_seconds / self.problem.total_seconds


def sharded_step(
    model: nn.Module,
    inputs: object,
    sharding: Sharding,
    *,
    optimizer: OptimizerLike | None = None,
    costs: CostSource = "auto",
    time_limit_s: float = 30.0,
) -> ShardedStep:
    """What one rank holds and runs in a step of ``model`` under ``sharding``, on its micro-batch ``inputs``.

    ``model``      whole, with its loss inside; built under FakeTensorMode it takes no memory.
    ``optimizer``  its class or a ``functools.partial``: its state is of a rank's shards.
    ``costs``      as for :func:`planner.plan`; "H100" for one that is elsewhere.  Of computing alone: whether
                   collectives hide behind it is not told.

    One block of each kind is captured.  Raises ``PlannerError`` for a model that is no stack of blocks.
    """
    check_model(model)
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding must be a planner.sharded.Sharding, not {sharding!r}")
    check_optimizer(optimizer)
    search = Search(time_limit_s=time_limit_s)
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer holds parameters of one device: pass its class, or functools.partial of it with its "
            "settings, of which a rank's shards are counted"
        )
    target = target_for(model, costs)
    with target.capturing():
        stack = Stack(model, sharding.blocks, Inputs.of(model, inputs), sharding.param_dtype)
        known: dict[Hashable, _Priced] = {}
        pieces = [_Priced.of(stack.before(), target)]
        for number in range(len(stack.blocks)):
            kind = stack.kind_of(number)
            if kind not in known:
                known[kind] = _Priced.of(stack.block(number), target)
            pieces.append(known[kind])
        pieces.append(_Priced.of(stack.behind(), target))
    root, blocks = _groups(model, stack, sharding)
    record = _record(pieces, stack)
    held = held_beside(root, blocks, sharding)
    joined = join(record, beside=_beside(record, held, pieces))
    resident = _resident(model, stack, sharding, [root, *blocks], optimizer, target)
    captured = RecordedStep(model, stack.inputs, joined)
    memory = StaticMemory(captured, resident, target.device, target.grain, target.capability)
    return ShardedStep(
        captured,
        joined.costs,
        memory,
        target,
        least_limit_s=search.time_limit_s,
        why=str(sharding),
        sharding=sharding,
    )


def largest_micro_batch(
    step_of: Callable[[int], ShardedStep],
    budget_gb: float,
    *,
    solver: str = "auto",
    time_limit_s: float = 10.0,
) -> tuple[int, Plan | None]:
    """The largest micro-batch for which a plan within a rank's budget is found, and that plan.

    ``step_of(size)``  the step at a micro-batch of ``size``; asked for once at each of some ten sizes.
    ``time_limit_s``   seconds of search at each size that is planned, a handful.

    0 and ``None``: not even one of 1 fits.  That a larger one needs no less memory is an assumption.
    """
    budget_bytes, search = budget_bytes_of(budget_gb), Search(solver, time_limit_s)
    step_at = functools.cache(step_of)
    last = last_within(lambda size: step_at(size).floor_bytes, budget_bytes, 1, _MOST_ROWS, {})
    if not last:
        return 0, None
    sizes = PlannedSizes(step_at, budget_bytes, search)
    found = sizes.largest(last)
    return found, sizes.plans.get(found)


# -- what is there ---------------------------------------------------------------------------------------


def _groups(model: nn.Module, stack: Stack, sharding: Sharding) -> tuple[Group, list[Group]]:
    inside: set[int] = set()
    blocks = []
    for block in stack.blocks:
        own = [p for p in block.parameters() if id(p) not in inside]
        inside.update(map(id, own))
        blocks.append(Group.of(own, sharding))
    return Group.of([p for p in model.parameters() if id(p) not in inside], sharding), blocks


def _resident(
    model: nn.Module,
    stack: Stack,
    sharding: Sharding,
    groups: Sequence[Group],
    optimizer: OptimizerLike | None,
    target: Target,
) -> Resident:
    taken = _optimizer_bytes(model, stack, sharding, optimizer, target)
    return Resident(
        parameters_bytes=sum(group.shard_bytes for group in groups),
        buffers_bytes=sum(b.nbytes for b in model.buffers()),
        gradients_bytes=0,
        inputs_bytes=sum(x.nbytes for x in stack.inputs.tensors()),
        optimizer_state_bytes=taken.state_bytes,
        optimizer_step_bytes=taken.step_transient_bytes,
    )


def _optimizer_bytes(
    model: nn.Module, stack: Stack, sharding: Sharding, optimizer: OptimizerLike | None, target: Target
) -> OptimizerBytes:
    """Of a rank's shards; parameters of one shape take the same."""
    if optimizer is None or isinstance(optimizer, int):
        return OptimizerBytes(optimizer or 0, 0)
    alike = Counter((tuple(p.shape), p.dtype, p.device) for p in model.parameters() if p.requires_grad)
    state = step = 0
    for (shape, dtype, device), count in alike.items():
        with stack.mode:
            shard = _shard(torch.empty(shape, dtype=dtype, device=device), sharding.ranks)
        taken = optimizer_state_bytes(optimizer, [shard], device=target.here, as_on=target.device)
        state, step = state + count * taken.state_bytes, step + count * taken.step_transient_bytes
    return OptimizerBytes(state, step)


def _shard(p: torch.Tensor, ranks: int) -> nn.Parameter:
    rows = -(-p.shape[0] // ranks) if p.dim() else 1
    return nn.Parameter(torch.empty((rows, *p.shape[1:]), dtype=p.dtype, device=p.device))


# -- what happens ----------------------------------------------------------------------------------------


def _record(pieces: Sequence[_Priced], stack: Stack) -> Record:
    """A step of the pieces, each called once: its forward at event ``2 c + 1``, its backward likewise from
    the end; glue between them.
    """
    count = len(pieces)
    last = 4 * count
    forwards = [2 * c + 1 for c in range(count)]
    backwards = [last - 1 - 2 * c for c in range(count)]
    events = []
    for e in range(last + 1):
        is_forward = e < 2 * count
        if e % 2 == 0:
            events.append(Event("glue", None, 0, 0, 0.0, is_forward))
        elif is_forward:
            events.append(Event("forward", forwards.index(e), 0, 0, 0.0, True))
        else:
            events.append(Event("backward", backwards.index(e), 0, 0, 0.0, False))
    crossings: list[Crossing] = []

    def crossing(bytes_: int, born: int, died: int | None) -> int:
        crossings.append(Crossing(bytes_, born, died))
        return len(crossings) - 1

    takes: list[dict[tuple[str, str | int], int]] = [{} for _ in pieces]
    gives: list[dict[tuple[str, str | int], int]] = [{} for _ in pieces]
    for c, piece in enumerate(pieces):
        made = piece.bytes_of(piece.graph.outputs[piece.output])
        behind = None if c == count - 1 else forwards[c + 1] + 1
        k = crossing(made, forwards[c], behind)
        gives[c]["output", piece.output] = k
        if c + 1 < count:
            takes[c + 1]["input", 0] = k
        for key, node in piece.graph.gradients.items():
            if key == 0 and c:
                k = crossing(piece.bytes_of(node), backwards[c], backwards[c - 1])
                gives[c]["gradient", 0], takes[c - 1]["tangent", pieces[c - 1].output] = k, k
            elif isinstance(key, str):
                ends = backwards[c] + 1 if 0 < c < count - 1 else last
                gives[c]["gradient", key] = crossing(piece.bytes_of(node), backwards[c], ends)
    there: dict[int, int] = {}
    for c, call in enumerate(stack.calls, 1):
        for i, x in enumerate(call.beside, 1):
            if id(x) not in there:
                there[id(x)] = crossing(x.nbytes, 2, forwards[-1] - 1)
            takes[c]["input", i] = there[id(x)]
    calls = []
    for c, piece in enumerate(pieces):
        inside = 0 < c < count - 1
        path = f"{stack.path}.{c - 1}" if inside else ""
        graph = piece.graph if inside else piece.graph.moved(ROOT, "")
        names = [str(key) for kind, key in graph.sources.values() if kind in ("parameter", "buffer")]
        renamed = {n: f"{path}.{n}" if inside else n.removeprefix(f"{ROOT}.") for n in names}
        steps = tuple(range(len(graph.ops)))
        calls.append(
            RegionCall(f"r{c}", graph, piece.costs, path, renamed, takes[c], gives[c], steps, graph.turn)
        )
    return Record(tuple(events), tuple(calls), tuple(crossings), 0)


def _beside(
    record: Record, held: Sequence[Held], pieces: Sequence[_Priced]
) -> tuple[list[int], dict[int, int]]:
    """What FSDP2 holds behind each glue, and its scratch there beyond that.

    While a block's backward runs there is one gradient of its input more: that of what goes around the block
    is handed on by itself (:mod:`planner.regions.cut.piece`).
    """
    levels = [at.behind_bytes for at in held]
    for call in record.calls[1:-1]:
        number = int(call.name[1:])
        _, backward = record.events_of(number)
        assert backward is not None
        levels[backward // 2] += pieces[number].bytes_of(call.graph.gradients[0])
    scratch: dict[int, int] = {}
    made = _gradients_by_event(record, pieces)
    for j, ((before, now), at) in enumerate(zip(pairwise([0, *levels]), held, strict=True)):
        level, own = max(before, now), made.get(2 * j - 1, 0)
        scratch[2 * j] = max(0, at.peak_bytes - own - level, at.reducing_bytes - level)
    return levels, scratch


def _gradients_by_event(record: Record, pieces: Sequence[_Priced]) -> Mapping[int, int]:
    """Bytes of the parameters' gradients that blocks make, by the event of their backward."""
    found: dict[int, int] = {}
    for call in record.calls[1:-1]:
        number = int(call.name[1:])
        _, backward = record.events_of(number)
        assert backward is not None
        keys = [key for kind, key in call.gives if kind == "gradient" and isinstance(key, str)]
        found[backward] = sum(pieces[number].bytes_of(call.graph.gradients[key]) for key in keys)
    return found
