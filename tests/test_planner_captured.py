"""The captured step by itself: its fingerprint is its plans', and names of ops lead to the ops."""

import pytest
import torch
from torch import nn

import planner
from planner.capture.joint_graph import capture
from planner.errors import StalePlanError
from planner.graph.captured import CapturedStep
from planner.graph.training_graph import training_graph


def _captured(width: int = 8) -> CapturedStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, 1))
    joint = capture(model, (torch.rand(3, 4),), loss_fn=torch.sum)
    return CapturedStep.of(model, joint, training_graph(joint))


def test_the_fingerprint_is_that_of_its_plans_and_of_no_other_step():
    step, again, wider = _captured(), _captured(), _captured(9)
    plan = planner.plan(step.model, 1.0, (torch.rand(3, 4),), loss_fn=torch.sum, costs="roofline")
    assert step.fingerprint == again.fingerprint == plan.fingerprint
    assert step.fingerprint != wider.fingerprint
    step.model.eval()  # read at capture, not when somebody asks
    assert step.fingerprint == again.fingerprint


def test_names_of_ops_lead_to_the_ops_and_what_stands_before_the_loss_is_forward():
    step = _captured()
    names = [op.name for op in step.graph.ops]
    assert step.steps(names) == list(range(len(names)))
    assert step.steps([*reversed(names), names[0]]) == [*reversed(range(len(names))), 0]
    assert step.steps(["loss/of_another", "ones_like_loss"]) == step.steps(["ones_like_loss"])
    forward = [op.name for op in step.graph.ops if op.phase == "forward"]
    assert step.turn(names) == len(forward) > 0
    assert step.turn(forward) == len(forward)
    with pytest.raises(StalePlanError, match="'conv2d', which the captured step does not have"):
        step.steps([*names, "conv2d"])
