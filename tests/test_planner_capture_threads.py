"""Captures of several threads wait for each other, since what a trace changes is the whole process's."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from planner.capture.joint_graph import JointGraph, capture
from planner.graph.captured import CapturedStep
from planner.graph.training_graph import training_graph

_VARIABLE = "TRANSFORMERS_DISABLE_TORCH_CHECK"
X = torch.linspace(-1, 1, 60).view(1, 3, 4, 5)


class Watched(nn.Module):
    """A forward that says how many are in one at a time; interpolation is what a trace might restate."""

    inside, most = 0, 0
    counting = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with self.counting:
            Watched.inside += 1
            Watched.most = max(Watched.most, Watched.inside)
        time.sleep(0.2)  # long enough for the other thread to come in, if it may
        larger = F.interpolate(self.mix(x), scale_factor=2, mode="bilinear")
        with self.counting:
            Watched.inside -= 1
        return larger.square().mean()


def fingerprint(model: nn.Module, joint: JointGraph) -> str:
    return CapturedStep.of(model, joint, training_graph(joint)).fingerprint


def test_two_threads_capture_at_once() -> None:
    torch.manual_seed(0)
    models = [Watched(), Watched()]
    alone = fingerprint(models[0], capture(models[0], (X,)))
    kernels = dict(torch.ops.aten.upsample_bilinear2d.vec.py_kernels)
    before = dict(os.environ), Distribution._validate_args
    start = threading.Barrier(2)

    def one(model: nn.Module) -> JointGraph:
        start.wait()
        return capture(model, (X,))

    Watched.most = 0
    with ThreadPoolExecutor(2) as pool:
        joints = list(pool.map(one, models))
    assert Watched.most == 1
    assert [fingerprint(m, j) for m, j in zip(models, joints, strict=True)] == [alone, alone]
    assert (dict(os.environ), Distribution._validate_args) == before and _VARIABLE not in os.environ
    assert dict(torch.ops.aten.upsample_bilinear2d.vec.py_kernels) == kernels
