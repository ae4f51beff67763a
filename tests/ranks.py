"""Two processes in a gloo group, kept for many tests, in which a hang is a failure.

A test names a function of its module; each rank calls it with its own rank first, and its results come
back in order of rank.  The group's own timeout ends a collective that one rank never enters; a deadline of
the parent ends everything else.  Below: what the ranks train.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import tiny

__all__ = ["QUICK", "Ranks", "blocks", "data", "same", "train"]

QUICK = {"costs": "roofline", "solver": "recompute_all"}

COLLECTIVE_S = 60.0  # after which a rank that waits for another gives up


class Ranks:
    """``count`` processes, started on first use and again after a failure."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0) -> list[Any]:
        """``function(rank, *args)`` on every rank; AssertionError if one raises or does not return."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        deadline = time.monotonic() + timeout_s
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                raise AssertionError(f"rank {rank} hangs in {function.__name__} ({timeout_s:.0f} s)")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (well, text) in enumerate(answers) if not well]
        if failed:
            self.stop()  # the group may be in any state
            raise AssertionError("\n".join(failed))
        return [result for _, result in answers]

    def _start(self) -> None:
        start = multiprocessing.get_context(tiny.START)
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.count):
            ours, theirs = start.Pipe()
            process = start.Process(target=_serve, args=(theirs, rank, self.count, store), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection, rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=COLLECTIVE_S),
    )
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            if module not in sys.modules:
                importlib.import_module(module)
                gc.freeze()  # what imports made stays, and need not be walked by the garbage collector
            function = getattr(sys.modules[module], name)
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Block(nn.Module):
    """A pre-norm residual block: norm, two linear layers, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))
        return out


def blocks(count: int = 2, width: int = 16) -> nn.Module:
    return tiny.seeded(lambda: nn.Sequential(*(Block(width) for _ in range(count))))


def data(rank: int, rows: int = 8, width: int = 16, step: int = 0) -> Tensor:
    """Another batch on every rank and in every step."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, batches: list[Tensor], lr: float = 0.1) -> list[Tensor]:
    """Plain SGD; the gradients of every step, then the parameters."""
    torch.manual_seed(3)
    seen = []
    for batch in batches:
        model.zero_grad()
        model(batch).square().mean().backward()
        seen += [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
