"""A step in outline: what runs, reads, makes and costs, without the code to run it.

It is what :mod:`planner.view.explain` and :mod:`planner.view.snapshot` need to play a plan through, and all
of it is data, so it travels with the plan in its file.  Sizes, seconds and the order are those of the
``solvers.Problem`` the plan was solved as; beside them stand the names a reader knows ops and values by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from planner.graph.step_graph import RELEASE, RNG_STATE
from planner.memory.lifetimes import Copy, copies_of
from solvers import Op, Problem, Timeline, Value
from solvers.core.simulate import simulate_steps

if TYPE_CHECKING:
    from planner.graph.training_graph import TrainingGraph

__all__ = ["Outline", "OutlineOp", "OutlineValue"]


@dataclass(frozen=True)
class OutlineOp:
    """One kernel call; ``target`` is its kernel, ``phase`` "forward", "loss" or "backward"."""

    name: str
    target: str
    module: str
    phase: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class OutlineValue:
    """A storage; ``kind`` is one of ``training_graph.VALUE_KINDS``, ``final`` if held to the end."""

    name: str
    kind: str
    final: bool


@dataclass(frozen=True, eq=False)
class Outline:
    """Ops in order of their first execution and the values between them.

    ``problem``   sizes, seconds and scratch, op for op and value for value.
    ``resident``  bytes there throughout, by kind; they add up to ``problem.resident_bytes``.
    """

    ops: tuple[OutlineOp, ...]
    values: tuple[OutlineValue, ...]
    problem: Problem
    resident: Mapping[str, int]

    def __post_init__(self) -> None:
        if sum(self.resident.values()) != self.problem.resident_bytes:
            raise ValueError("what is resident by kind does not add up to what is resident")

    def __repr__(self) -> str:
        return f"Outline({len(self.ops)} ops, {len(self.values)} values)"

    @classmethod
    def of(cls, graph: TrainingGraph, problem: Problem, resident: Mapping[str, int]) -> Outline:
        """The outline of a step that ``problem`` states; ``resident``: bytes there throughout, by kind."""
        return cls(
            tuple(OutlineOp(o.name, o.target, o.module, o.phase, o.inputs, o.outputs) for o in graph.ops),
            tuple(OutlineValue(v.name, v.kind, v.final) for v in graph.values),
            problem,
            resident,
        )

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each op by its name."""
        return {op.name: i for i, op in enumerate(self.ops)}

    def steps(self, sequence: Sequence[str]) -> list[int]:
        """Op indices of a sequence of names; ``ValueError`` for a name there is none of."""
        missing = next((name for name in sequence if name not in self.position), None)
        if missing is not None:
            raise ValueError(f"the sequence runs {missing!r}, which is no op of the step")
        return [self.position[name] for name in sequence]

    def judge(self, steps: list[int]) -> Timeline:
        """What running ``steps`` takes; ``InvalidScheduleError`` if it cannot be run."""
        return simulate_steps(self.problem, steps)

    def copies(self, timeline: Timeline) -> list[Copy]:
        """Every copy of every value, with the bytes it has in ``timeline``'s run."""
        return copies_of(self, self.problem.as_run(timeline.steps.tolist()), timeline)

    def readers(self, value: int, *, forward: bool) -> list[OutlineOp]:
        """The ops of the forward, or those behind it, that read ``value``."""
        found = (self.ops[i] for i in self.problem.consumers[value])
        return [op for op in found if (op.phase == "forward") == forward and op.target != RELEASE]

    # -- files -------------------------------------------------------------------------------------

    def encode(self) -> dict[str, Any]:
        """As JSON: a list per field; names that repeat are numbers into ``words``."""
        words: dict[str, int] = {}

        def number(word: str) -> int:
            return words.setdefault(word, len(words))

        p = self.problem
        ops = {
            "name": [op.name for op in self.ops],
            "target": [number(op.target) for op in self.ops],
            "module": [number(op.module) for op in self.ops],
            "phase": [number(op.phase) for op in self.ops],
            "inputs": [op.inputs for op in self.ops],
            "outputs": [op.outputs for op in self.ops],
            "seconds": [op.seconds for op in p.ops],
            "again_s": [op.recompute_seconds for op in p.ops],
            "workspace_bytes": [op.workspace_bytes for op in p.ops],
            "pinned": [i for i, op in enumerate(p.ops) if not op.recomputable],
        }
        if any(op.reuses is not None for op in p.ops):
            ops["reuses"] = [op.reuses for op in p.ops]
        values = {
            "name": [v.name for v in self.values],
            "kind": [number(v.kind) for v in self.values],
            "bytes": [v.bytes for v in p.values],
            "final": [i for i, v in enumerate(self.values) if v.final],
        }
        return {
            "name": p.name,
            "turn": p.turn,
            "resident": dict(self.resident),
            "ops": ops,
            "values": values,
            "words": list(words),
        }

    @classmethod
    def decode(cls, record: Any) -> Outline:
        """The inverse of :meth:`encode`.  ``ValueError``, ``KeyError`` or ``TypeError`` if it is none."""
        words = [str(word) for word in record["words"]]
        o, v = record["ops"], record["values"]
        pinned, final = frozenset(o["pinned"]), frozenset(v["final"])
        inputs, outputs = ([tuple(map(int, of)) for of in o[side]] for side in ("inputs", "outputs"))
        producer = {k: i for i, made in enumerate(outputs) for k in made}
        columns = [words_at(words, o[field]) for field in ("target", "module", "phase")]
        ops = tuple(
            OutlineOp(str(name), *row)
            for name, *row in zip(o["name"], *columns, inputs, outputs, strict=True)
        )
        values = tuple(
            OutlineValue(str(name), kind, k in final)
            for k, (name, kind) in enumerate(zip(v["name"], words_at(words, v["kind"]), strict=True))
        )
        states = {k for op in ops if op.target == RNG_STATE for k in op.outputs}
        reuses = o.get("reuses") or [None] * len(ops)
        priced = zip(ops, o["seconds"], o["again_s"], o["workspace_bytes"], reuses, strict=True)
        problem = Problem(
            tuple(
                Op(op.name, op.inputs, op.outputs, seconds, scratch, again, i not in pinned, reuses=over)
                for i, (op, seconds, again, scratch, over) in enumerate(priced)
            ),
            tuple(
                Value(f"{k}:{value.name}", size, producer.get(k), value.final, k in states)
                for k, (value, size) in enumerate(zip(values, v["bytes"], strict=True))
            ),
            record["turn"],
            sum(record["resident"].values()),
            str(record["name"]),
        )
        return cls(ops, values, problem, {str(k): int(b) for k, b in record["resident"].items()})


def words_at(words: list[str], numbers: Sequence[int]) -> list[str]:
    """``words`` at ``numbers``; ``ValueError`` for a number that none has."""
    if any(not 0 <= n < len(words) for n in numbers):
        raise ValueError("a word is missing")
    return [words[n] for n in numbers]
