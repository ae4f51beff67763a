"""Stands in for ``model.forward`` where a step is planned in regions.

Each call goes through Dynamo's cut of the original forward, whose pieces the session runs.  A step begins
where no call waits for its backward.  The first step is looked at; of each kind one is recorded, in the
training loop itself, and planned before the next.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from planner import _compat
from planner.capture.inputs import Inputs
from planner.capture.state.effects import Before
from planner.costs.target import target_for
from planner.errors import InfeasibleBudgetError, PlannerError, StalePlanError
from planner.measure.step import held, tensors_in
from planner.plans.plan_data import PlanData
from planner.ranks.company import Company
from planner.regions.join import join
from planner.regions.joined import RecordedStep, parts
from planner.regions.kept import Foresight, Kept, Kind, Parts
from planner.regions.proposal import proposal
from planner.regions.record import Record
from planner.regions.session import NewCode, Session
from planner.regions.watching import is_watched
from planner.runtime.apply import put, restored
from planner.runtime.tracing import is_traced
from planner.units import bytes_text, gb_enough

__all__ = ["RegionsForward", "Solved", "apply_plan"]

log = logging.getLogger(__name__)

CHECKS = 2  # steps of a plan that are counted at least
DIFFERENT = 4  # likewise where these differ
SPARSE = 16  # where they differ, one in so many is counted for as long as it trains
PATIENCE = 4  # steps that cannot be recorded before that is said
TRIES = 3  # records of steps of one structure before it is said that there is no plan
TRIES_OF_NEW = 6  # likewise where each ran code that was not seen before


@dataclass(frozen=True, eq=False)
class Solved:
    """A plan, as the steps from here on run it.

    ``parts``      the schedule of each call of the recorded step.
    ``over``       hears what planned steps took (CPU), and may say what to run instead.
    ``plan``       the plan itself, for whoever asks for it.
    ``foresight``  what steps at other sizes would take.
    """

    parts: Parts
    over: Callable[[Sequence[int]], Solved | None] | None = None
    plan: Any = None
    foresight: Foresight | None = None


@dataclass(eq=False)
class _Counts:
    """Bytes that steps of one plan were counted to take, and whether the next one is counted.

    The first ``CHECKS`` are.  Where steps differ, ``DIFFERENT`` are at least, and more until as many came
    since the largest as up to it; from then on one in ``SPARSE``.
    """

    taken: list[int] = field(default_factory=list)
    skipped: int = 0

    def add(self, taken_bytes: int) -> None:
        self.taken.append(taken_bytes)
        self.skipped = 0

    def wants_next(self) -> bool:
        """Whether the step that begins is counted."""
        largest = 1 + self.taken.index(max(self.taken)) if self.taken else 1
        differ = len(set(self.taken)) > 1
        if len(self.taken) < max(DIFFERENT if differ else CHECKS, 2 * largest):
            return True
        self.skipped += differ
        return self.skipped >= SPARSE


# A recorded step -> what its calls are to run; ``None``: too little of it lies in regions, while Dynamo left
# loops to eager, which are to be followed first.
Solve = Callable[[Record], Solved | None]


class RegionsForward:
    """``model.forward`` in regions; evaluation, ``no_grad`` and compilers get the original.

    ``solve``     plans a recorded step of a kind that has no plan.
    ``root``      the model that ``model`` is a part of.
    ``any_mode``  whether calls in evaluation mode are planned too.
    ``state``     bytes of the optimizer's state, which a step that is counted does not show.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        solve: Solve,
        *,
        root: nn.Module | None = None,
        any_mode: bool = False,
        state: Callable[[], int] | None = None,
    ) -> None:
        self.state = state
        self.model, self.session, self.solve = model, session, solve
        self.root = model if root is None else root
        self.company = Company.of(self.root, session.device)  # ranks that wait for this one
        self._steps = 0
        self._listed: tuple[int, list[nn.Parameter]] = (-1, [])
        self._shards: list[Any] = []  # what FSDP2 gathers
        self.gradients_bytes = 0  # that the recorded step found
        self.any_mode = any_mode
        self._counted: WeakKeyDictionary[Solved, _Counts] = WeakKeyDictionary()
        self._refused: dict[Hashable, Exception] = {}
        self._failed: Counter[Hashable] = Counter()
        self._waited = 0  # steps that could not be recorded for somebody else's mode
        self._behind = 0  # or for that of another model's record
        self._late = 0  # steps in a row whose backward did not come before the next forward
        self._told: set[str] = set()
        self._thread = threading.get_ident()
        self.original = session.original
        self.training = model.training
        self.before: Any = None  # what model.__dict__ held under "forward", put back by restore

    @_compat.left_alone
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            not torch.is_grad_enabled()
            or not (self.any_mode or self.model.training is self.training)
            or is_traced(type(self.model).__name__)
        ):
            self.session.watching.settle()
            return self.original(*args, **kwargs)
        session = self.session
        if _compat.dynamo_stands_aside():
            self._tell(
                "mode",
                "was called under a dispatch mode (a counter of FLOPs, a tracker of memory), under which "
                "Dynamo runs code as it is: such a step runs without its plan. A mode of your own that "
                "only looks on can say so: ignore_compile_internals = classmethod(lambda cls: True)",
            )
            return self.original(*args, **kwargs)
        if session.waits and threading.get_ident() != self._thread:
            self._tell(
                "thread",
                "was called by a second thread while a step of the first is under way: such a call runs "
                "without a plan. Give each thread a copy of the model",
            )
            return self.original(*args, **kwargs)
        if not session.waits:
            session = self._begin((args, kwargs))
        if session.stage != "look" or session.calls:
            outputs = session.call(*args, **kwargs)
            foreseen_bytes = session.followed.foreseen_bytes
            if foreseen_bytes > session.budget_bytes > 0:
                self._tell_larger(foreseen_bytes)
            return outputs
        before = Before(self.model)
        outputs = session.call(*args, **kwargs)
        # what runs otherwise from then on may show more
        while session.leave_spoilt_to_eager() and not before.is_lost():
            del outputs
            before.put_back()
            session.begin("look", session.kind)
            outputs = session.call(*args, **kwargs)
        return outputs

    def _tell(self, what: str, message: str, *values: object) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(f"%s {message}", type(self.model).__name__, *values)

    def _tell_larger(self, foreseen_bytes: int) -> None:
        """Before its backward: by the sizes of its calls the step is over the budget."""
        over = foreseen_bytes - self.session.budget_bytes
        self._tell(
            "larger",
            "runs a step that its sizes, which follow the data, make larger than those it was planned by: it "
            "takes up to %s, %s over its budget, whatever its regions save. The least budget with a plan is "
            "%s GB at these sizes, as far as is known",
            bytes_text(foreseen_bytes),
            bytes_text(over),
            gb_enough(foreseen_bytes),
        )

    @property
    def plan(self) -> Any:
        """That of the step that runs, or ran last; ``None`` where it has none."""
        of = self.session.runs
        return None if of is None or of.of is None else of.of.plan

    def _begin(self, inputs: Any) -> Session:
        """A step begins: what the last one showed is acted upon."""
        self._thread = threading.get_ident()
        self.session.watching.settle()
        if self.company is not None:
            self.company.begins()
        with _compat.modes_set_aside():  # a meter of the user's counts what the step does
            self._act(inputs)
        session = self.session  # another one where loops are followed from here on
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        gradients += _compat.unreduced_gradients(self._shards)
        kind = self._kind(inputs, bool(gradients))
        if kind in self._refused and self.company is None:
            raise self._refused[kind]
        stage = session.next_stage(kind)
        if kind in self._refused and self.company is not None:
            self.company.failed(self._refused[kind])
            stage = session.unwatched_stage
        if stage == "record" and not session.watching.may_begin(must=self._behind >= PATIENCE):
            stage = session.unwatched_stage
            self._behind += 1
            self._waited += is_watched()
            if self._waited == PATIENCE:
                self._tell(
                    "waits",
                    "%s: the step that shows what to plan is watched by a mode of torch, and in each of %d "
                    "steps another mode was on (a meter, a counter). Let a step run without it",
                    "has steps of a kind that no plan is for" if session.plans else "is not planned yet",
                    PATIENCE,
                )
        session.begin(stage, kind)
        self._steps += 1
        if stage == "record" or (self._counts(session.runs) and session.watching.may_begin()):
            dense = [part for g in gradients for part in _compat.dense_parts(g)]
            self.gradients_bytes = sum(g.untyped_storage().nbytes() for g in dense)
            there = *held(self.root, None), *_compat.held_by_shards(self.root)
            session.watch([*there, *gradients, *tensors_in(inputs)])
        return session

    def _counts(self, kept: Kept | None) -> bool:
        """Whether a step of this plan is counted."""
        of = None if kept is None else kept.of
        return (
            isinstance(of, Solved)
            and of.over is not None
            and self.session.device.type == "cpu"
            and self._counted.setdefault(of, _Counts()).wants_next()
        )

    def _act(self, inputs: Any) -> None:
        session = self.session
        session.ended()
        self._late = self._late + 1 if session.is_late else 0
        if self._late == PATIENCE and not session.plans:
            self._tell(
                "late",
                "is not planned yet, and saves next to nothing: in each of %d steps the next forward came "
                "before the backward of the last. Run the backward first; where none is to come, call the "
                "model under torch.no_grad()",
                PATIENCE,
            )
        kept = session.runs
        if session.is_seen and (session.stage == "record" or session.followed.strayed):
            self._tell_over(session.counted_bytes)
        if session.loops.are_too_long:
            self._turn_loops()
        elif session.is_recorded:
            self._plan()
        elif session.regions and not session.calls and (session.stage != "look" or session.is_all_eager):
            self._none_ran()
        elif self._steps and not session.calls and session.loops.are_left:
            self._turn_loops()
        elif self._steps and session.regions and len(session.eager) == len(session.regions):
            self._none_ran()
        elif self._steps and not session.calls and "uncut" not in self._told:
            self._tell(
                "uncut",
                "trains without a plan, whatever the budget: Dynamo found no piece of its forward to cut out "
                "that gets gradients. Where a loop is cut, all of the function that it stands in runs as "
                "eager: make the loop's body a function or a module of its own.\n%s",
                proposal(self.model, Inputs(*inputs)),
            )
        elif session.is_counted and kept is not None and isinstance(kept.of, Solved) and kept.of.over:
            counts = self._counted.setdefault(kept.of, _Counts())
            counts.add(session.counted_bytes)
            instead = kept.of.over(counts.taken)
            if instead is not None:
                session.follow(instead.parts, instead, instead.foresight)
        session.recorder = None

    def _tell_over(self, counted_bytes: int) -> None:
        """A step that no plan was for took so much."""
        budget_bytes = self.session.budget_bytes
        if self.state is None or self.session.device.type != "cpu" or "over" in self._told:
            return
        taken_bytes = counted_bytes + self.state()
        if taken_bytes > budget_bytes:
            self._tell(
                "over",
                "ran a step that no plan was for yet, with next to nothing saved, and it took %s, %s over "
                "its budget: raise the budget to %s GB, or make the batch smaller, if such steps have to fit",
                bytes_text(taken_bytes),
                bytes_text(taken_bytes - budget_bytes),
                gb_enough(taken_bytes),
            )

    def _turn_loops(self) -> None:
        """Begin anew, with the forward cut in its loops too, or, where that did not do, as before."""
        if self.session.loops.are_too_long:
            how = (
                f"not in its loops, which would take more than {_compat.TURNS_HERE} compiles of one place, "
                f"or {_compat.TURNS} in all"
            )
        elif self.session.loops.followed:
            how = "not in its loops, whose turns differ from step to step"
        else:
            how = (
                "in its loops too, with a compile for each turn: Dynamo leaves a function with a loop that "
                "is cut to eager, and little else was left to plan"
            )
        log.info("%s is cut anew, %s", type(self.model).__name__, how)
        self._failed.clear()
        self.session = self.session.with_loops_turned()

    def _none_ran(self) -> None:
        session = self.session
        session.plans.tried(session.kind)
        if session.is_all_eager:
            self._tell(
                "eager",
                "trains without a plan: each of its %d regions runs as eager runs it, for %s",
                len(session.regions),
                "; ".join(session.eager_for),
            )
        else:
            self._tell(
                "none",
                "ran a step in which none of its %d regions was called, so without a plan: another path "
                "through its code, or Dynamo has given up on one that changes with every call (it says so "
                "itself, with the line and what changed; more than %d compiles of one place are not made)",
                len(session.regions),
                _compat.RECOMPILES,
            )

    def _plan(self) -> None:
        """Plan what was recorded.  A kind of steps that no plan fits is refused when the next one comes."""
        session, kind = self.session, self.session.kind
        if session.is_planned:
            self._failed.pop(kind.structure, None)
            session.plans.found(kind)
            return
        if kind in session.plans and session.plans.is_hopeless(kind, session.trained):
            session.plans.tried(session.kind)
            return
        try:
            solved = self.solve(session.record())
        except InfeasibleBudgetError as error:
            if kind in session.plans:
                log.warning(
                    "steps of %s hold more than those that it was planned by, and such steps are over the "
                    "budget: %s",
                    type(self.model).__name__,
                    error,
                )
                session.plans.give_up_longer(kind, session.trained)
            else:
                self._refused[kind] = error
            return
        except ValueError as error:
            self._failed[kind.structure] += 1
            may_settle = isinstance(error, NewCode) and not session.loops.followed
            left = (TRIES_OF_NEW if may_settle else TRIES) - self._failed[kind.structure]
            if left <= 1 and session.loops.followed:
                self._turn_loops()
            elif left <= 0:
                session.plans.give_up(kind)
                whys = dict.fromkeys(v.why for r in session.regions for v in r.variants.values() if v.why)
                self._tell(
                    str(error),
                    "trains without a plan, with next to nothing saved where it can be cut: %s%s",
                    error,
                    "".join(f"\n{why}" for why in whys),
                )
            return
        except Exception as error:
            if self.company is None:
                raise
            self._refused[kind] = error
            return
        self._failed.pop(kind.structure, None)
        if solved is None:
            self._turn_loops()
        else:
            session.follow(solved.parts, solved, solved.foresight)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """Of the root.  Listing them takes long; an edited model is cut anew."""
        if self._listed[0] != len(self.session.regions):
            self._listed = len(self.session.regions), _compat.sharded_parameters(self.root)
            self._shards = _compat.shard_groups(self.root)
        return self._listed[1]

    def _kind(self, inputs: Any, has_gradients: bool) -> Kind:
        given = tensors_in(inputs)
        specs = tuple((t.dim(), t.dtype, t.requires_grad) for t in given)
        trains = tuple(p.requires_grad for p in self._parameters)
        sharding = _compat.sharding_now(self._shards)
        structure = has_gradients, specs, trains, self.model.training, sharding
        return Kind(structure, tuple(t.numel() for t in given))

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original

    @property
    def __code__(self) -> Any:
        return self.original.__code__

    def __reduce__(self) -> Any:
        raise PlannerError(
            "a planned model cannot be pickled (compiled code and autograd nodes do not travel); save "
            "model.state_dict() and plan.save(path), or call plan.restore(model) first"
        )


def apply_plan(plan: PlanData, model: nn.Module) -> nn.Module:
    """Make ``model`` train as ``plan`` says, one of a step in regions, from a file.  Returns the model.

    Two steps are looked at and recorded; if they are the plan's, the third runs as planned, else
    ``StalePlanError``.
    """
    session = Session(model, target_for(model, "roofline"), plan.budget_bytes)

    def follow(record: Record) -> Solved:
        step = RecordedStep(model, Inputs((), {}), join(record))
        if step.fingerprint != plan.fingerprint:
            raise StalePlanError(
                f"the plan was made for another step in regions than that of this {type(model).__name__} "
                f"(fingerprint {plan.fingerprint[:12]} with torch {plan.torch_version}, here "
                f"{step.fingerprint[:12]} with torch {torch.__version__}): the model, its sizes, what the "
                "loop does, or the versions of its libraries differ; make a new plan"
            )
        steps = step.joined.named(plan.sequence)
        assert steps is not None  # of one fingerprint
        return Solved(parts(step.joined, steps), plan=plan)

    return put(restored(model), RegionsForward(model, session, follow))
