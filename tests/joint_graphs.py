"""Joint training graphs as data: six traced from real models, and a generator of small random ones.

``tests/data/joint_*.json.gz`` hold a ``Problem`` each.  They were traced in bfloat16 under fake tensors
with random weights, without dropout, views folded onto their base; seconds are a roofline of an 800
TFLOP/s, 4 TB/s device with 3 us a launch.  Ops of the backward run exactly once, as in the planner's
problems.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from solvers import Op, Problem, Schedule, Value, read_problem, simulate

DATA = Path(__file__).parent / "data"
NAMES = ("bert-base-b16x256", "resnet50-b8x224", "unet-d4c64-b4x256")
LARGE = ("gpt2-b8x512", "gpt2-medium-b16x1024", "internvl2-1b-2x1792")


def load(name: str) -> Problem:
    """The graph called ``name``, one of ``NAMES`` or ``LARGE``."""
    return read_problem(DATA / f"joint_{name}.json.gz")


def keep_all_peak(problem: Problem) -> int:
    """Peak bytes when nothing is recomputed."""
    return simulate(problem, Schedule.keep_all(problem)).peak_bytes


def random_training_graph(seed: int, layers: int = 5, width: int = 3) -> Problem:
    """A chain of layers with residual adds and long skips, and its mirrored backward.

    Each forward op's backward op reads its inputs and the gradient of its output, makes one gradient per
    input and, for every second op, a final parameter gradient.  Some ops have workspace.
    """
    rng = random.Random(seed)
    ops: list[Op] = []
    values: list[Value] = []

    def add(name: str, inputs: list[int], sizes: list[tuple[int, bool]], group: str) -> list[int]:
        outputs = list(range(len(values), len(values) + len(sizes)))
        values.extend(Value(f"{name}.{k}", size, len(ops), final) for k, (size, final) in enumerate(sizes))
        workspace = rng.choice([0, 0, 0, 5])
        unique = tuple(dict.fromkeys(inputs))
        ops.append(Op(name, unique, tuple(outputs), rng.randint(1, 9) / 4, workspace, group=group))
        return outputs

    values.append(Value("batch", 7))
    stream, skips = 0, []
    forward: list[tuple[str, list[int], int, str]] = []

    def run(name: str, inputs: list[int], group: str) -> int:
        (out,) = add(name, inputs, [(rng.randint(4, 30), False)], group)
        forward.append((name, inputs, out, group))
        return out

    for i in range(layers):
        group, entry = f"layer{i}", stream
        for j in range(width):
            stream = run(f"f{i}.{j}", [stream], group)
        if entry and rng.random() < 0.6:
            stream = run(f"add{i}", [stream, entry], group)
        if skips and i > layers // 2 and rng.random() < 0.7:
            stream = run(f"skip{i}", [stream, skips.pop()], group)
        skips.append(stream)
    (loss,) = add("loss", [stream], [(1, True)], "loss")
    turn = len(ops)
    (first,) = add("loss_backward", [stream, loss], [(values[stream].bytes, False)], "loss")
    gradient = {stream: first}
    for k, (name, inputs, out, group) in enumerate(reversed(forward)):
        targets = [v for v in dict.fromkeys(inputs) if v]
        sizes = [(values[v].bytes, False) for v in targets] + ([(3, True)] if k % 2 else [])
        made = add(f"{name}_backward", [*inputs, gradient[out]], sizes, group)
        for v, g in zip(targets, made, strict=False):
            if v in gradient:
                (g,) = add(f"{name}_sum{v}", [gradient[v], g], [(values[v].bytes, False)], group)
            gradient[v] = g
    ops[turn:] = [replace(op, recomputable=False) for op in ops[turn:]]
    return Problem(tuple(ops), tuple(values), turn=turn, name=f"random{seed}")
