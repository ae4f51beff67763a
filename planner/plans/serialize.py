"""Plans as JSON.

The file says what the plan is for (format version, fingerprint of the captured step, torch version,
device, where the costs came from), the plan itself, the step in outline, by which the plan can be
explained and played through, and the structure and sizes of the inputs, from which the step can be
captured again when the plan is applied to a model.  :mod:`planner.plans.reading` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planner._compat import FakeTensorMode
from planner.capture.inputs import Inputs
from planner.errors import InvalidPlanFileError
from planner.files import write_whole
from planner.plans import batch, reading
from planner.plans.batch import TensorRecord
from planner.plans.plan_data import PlanData
from planner.plans.reading import FORMAT, PLAIN, TIMELINES, VERSION

__all__ = ["inputs_of", "load", "save", "to_text"]


def save(plan: PlanData, path: str | Path) -> None:
    """Write ``plan``; the file appears whole or not at all."""
    write_whole(path, to_text(plan))


def to_text(plan: PlanData) -> str:
    """``plan`` as JSON."""
    record = {"format": FORMAT, "version": VERSION}
    record |= {name: _plain(getattr(plan, name)) for name in PLAIN}
    record |= {name: getattr(plan, name).tolist() for name in TIMELINES}
    record["timeline_by_kind"] = {k: _pack(v) for k, v in plan.timeline_by_kind.items()}
    record["placements"] = [list(dataclasses.astuple(p)) for p in plan.placements]
    record["minimum_peak_bytes"] = plan.minimum_if_known
    inputs = plan.inputs
    if plan.varying_dims is not None:
        record["varying_dims"] = plan.varying_dims
    if plan.searched_on:
        record["searched_on"] = plan.searched_on
    if plan.planned_for:
        record["planned_for"] = plan.planned_for
    if plan.reserved_bytes is not None:
        record["reserved_bytes"] = plan.reserved_bytes
    if plan.outputs:
        record["outputs"] = dict(plan.outputs)
    if plan.calibration is not None:
        record["calibration"] = [list(dataclasses.astuple(r)) for r in plan.calibration.rounds]
    if plan.regions:
        record["regions"] = [dataclasses.asdict(region) for region in plan.regions]
        record["cuts"] = list(plan.cuts)
    if plan.chunked:
        record["chunked"] = [dataclasses.asdict(of) for of in plan.chunked]
        record["whole"] = [plan.whole_step_s, plan.whole_step_flops, plan.whole_peak_bytes]
    if plan.order != "given":
        record["order"] = plan.order
    if plan.answers:
        record["answers"] = list(plan.answers)
    if plan.channels_last:
        record["channels_last"] = list(plan.channels_last)
    if plan.backend == "eager":  # as files of before there was another say
        del record["backend"]
    outline = plan.outline
    if outline is not None:
        record["outline"] = outline.encode()
    if isinstance(inputs, Inputs):
        made = tuple(sorted(inputs.of_others))
        given = (inputs.args, inputs.kwargs, made) if made else (inputs.args, inputs.kwargs)
        inputs = batch.encode(given, _record_of)
    record["inputs"] = inputs
    return json.dumps(record, allow_nan=False)


def load(path: str | Path) -> PlanData:
    """Read a plan to be used here.

    Raises ``InvalidPlanFileError`` if the file is none, or its batch is of tensors that this torch does not
    have; ``OSError`` if it is not there.
    """
    plan = reading.load(path)
    try:
        inputs_of(plan)  # what cannot be rebuilt is found now
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidPlanFileError(f"{path} holds something a plan does not: {error}") from None
    return plan


def inputs_of(plan: PlanData, device: torch.device | None = None) -> Inputs:
    """The plan's inputs as fake tensors, for a new capture; those on its device are put on ``device``."""
    if isinstance(plan.inputs, Inputs):
        return plan.inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def hollow(record: TensorRecord) -> torch.Tensor:
        dtype = getattr(torch, record.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"an input has dtype {record.dtype!r}, which torch {torch.__version__} has not")
        there = record.device if device is None or record.device != plan.device else device
        with mode:
            empty = torch.empty_strided(record.shape, record.stride, dtype=dtype, device=there)
            return empty.requires_grad_(record.requires_grad)

    args, kwargs, *made = batch.decode(plan.inputs, hollow)
    return Inputs(args, kwargs, frozenset(*made), answers=plan.answers)


def _record_of(leaf: object) -> TensorRecord | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    shape, stride = tuple(leaf.shape), tuple(leaf.stride())
    return TensorRecord(shape, stride, str(leaf.dtype), str(leaf.device), leaf.requires_grad)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _pack(values: np.ndarray) -> int | list[int]:
    """A constant as one number."""
    constant = len(values) > 0 and bool((values == values[0]).all())
    return int(values[0]) if constant else values.tolist()
