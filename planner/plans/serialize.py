"""Plans as JSON.  Reading one executes nothing: it is data, checked field by field.

The file says what the plan is for (format version, fingerprint of the captured step, torch version,
device, where the costs came from), the plan itself, the step in outline, by which the plan can be
explained and played through, and the structure and sizes of the inputs, from which the step can be
captured again when the plan is applied to a model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np
import torch

from planner._compat import FakeTensorMode
from planner.capture.inputs import Inputs
from planner.capture.sizes import Dims
from planner.errors import InvalidPlanFileError, PlannerError
from planner.files import write_whole
from planner.graph.chunks.write import Chunked
from planner.plans.outline import Outline
from planner.plans.plan_data import Calibration, Placement, PlanData, RegionSummary, Round

__all__ = ["FORMAT", "VERSION", "from_text", "inputs_of", "load", "save", "to_text"]

FORMAT = "rematplan.plan"
VERSION = 2

_ARRAYS = ("timeline", "baseline_timeline")
_SKIPPED = (
    "placements",
    "timeline_by_kind",
    "inputs",
    "known_minimum_bytes",
    "searched_on",
    "varying_dims",
    "calibration",
    "planned_for",
    "reserved_bytes",
    "outputs",
    "outline",
    "regions",
    "cuts",
    "chunked",
    "whole_step_s",
    "whole_step_flops",
    "whole_peak_bytes",
    "order",
    "answers",
    *_ARRAYS,
)
_PLAIN = tuple(f.name for f in dataclasses.fields(PlanData) if f.name not in _SKIPPED)
_KEYS = (
    "format",
    "version",
    *_PLAIN,
    "minimum_peak_bytes",
    "placements",
    "timeline_by_kind",
    "inputs",
    *_ARRAYS,
)


_TYPES = get_type_hints(PlanData)  # now: evaluating annotations is not for the time a file is read
# What JSON may hold where a field is one of these.
_NUMBERS_AND_TEXT: Mapping[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}


def save(plan: PlanData, path: str | Path) -> None:
    """Write ``plan``; the file appears whole or not at all."""
    write_whole(path, to_text(plan))


def to_text(plan: PlanData) -> str:
    """``plan`` as JSON."""
    record = {"format": FORMAT, "version": VERSION}
    record |= {name: _plain(getattr(plan, name)) for name in _PLAIN}
    record |= {name: getattr(plan, name).tolist() for name in _ARRAYS}
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
    if plan.backend == "eager":  # as files of before there was another say
        del record["backend"]
    outline = plan.outline
    if outline is not None:
        record["outline"] = outline.encode()
    if isinstance(inputs, Inputs):
        made = tuple(sorted(inputs.of_others))
        inputs = encode((inputs.args, inputs.kwargs, made) if made else (inputs.args, inputs.kwargs))
    record["inputs"] = inputs
    return json.dumps(record, allow_nan=False)


def load(path: str | Path) -> PlanData:
    """Read a plan.  Raises ``InvalidPlanFileError`` if the file is not one; ``OSError`` if it is not there.

    The plan can be looked at at once; ``rewrite(model)`` and ``apply(model)`` capture the model again.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as e:
        raise InvalidPlanFileError(f"{path} is not a plan: not text ({e})") from None
    return from_text(text, str(path))


def from_text(text: str, path: str = "the text") -> PlanData:
    """The inverse of :func:`to_text`; ``path`` is what errors call it.  Raises as :func:`load`."""
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:  # not JSON, or nested beyond reading
        raise InvalidPlanFileError(f"{path} is not a plan: not JSON, or cut short ({e})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InvalidPlanFileError(f"{path} is not a plan: its 'format' is not {FORMAT!r}")
    if record.get("version") != VERSION:
        raise InvalidPlanFileError(
            f"{path} has plan format version {record.get('version')!r}; this installation reads version "
            f"{VERSION}. Make the plan again, or install the version that wrote it"
        )
    record = {"backend": "eager", **record}
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise InvalidPlanFileError(f"{path} lacks {', '.join(map(repr, missing))}")
    try:
        return _read(record)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as e:
        raise InvalidPlanFileError(f"{path} holds something a plan does not: {e}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read(record: dict[str, Any]) -> PlanData:
    plain: dict[str, Any] = {}
    for name in _PLAIN:
        value = record[name]
        want = _NUMBERS_AND_TEXT.get(_TYPES[name])
        if want is not None and (not isinstance(value, want) or isinstance(value, bool)):
            raise ValueError(f"{name!r} is {value!r}, want {_TYPES[name].__name__}")
        plain[name] = value
    plain["sequence"] = tuple(map(str, plain["sequence"]))
    plain["differentiated"] = tuple(map(int, plain["differentiated"]))
    plain["breakdown"] = {str(k): int(v) for k, v in plain["breakdown"].items()}
    arrays: dict[str, Any] = {name: np.asarray(record[name], dtype=np.int64) for name in _ARRAYS}
    length = len(plain["sequence"])
    if len(arrays["timeline"]) != length:  # before the outline is held against it
        raise ValueError(f"'timeline' has {len(arrays['timeline'])} entries for {length} steps")
    by_kind = {str(k): _unpack(v, length) for k, v in record["timeline_by_kind"].items()}
    placements = tuple(_placement(row) for row in record["placements"])
    inputs = decode(record["inputs"], FakeTensorMode())  # one that cannot be rebuilt is found now
    if not (isinstance(inputs, tuple) and list(map(type, inputs)) in ([tuple, dict], [tuple, dict, tuple])):
        raise ValueError("'inputs' are not positional and keyword arguments")
    return PlanData(
        **plain,
        **arrays,
        timeline_by_kind=by_kind,
        placements=placements,
        inputs=record["inputs"],
        known_minimum_bytes=_optional_int("minimum_peak_bytes", record["minimum_peak_bytes"]),
        searched_on=str(record.get("searched_on", "")),
        varying_dims=_dims(record.get("varying_dims"), inputs),
        calibration=_calibration(record.get("calibration")),
        planned_for=str(record.get("planned_for", "")),
        reserved_bytes=_optional_int("reserved_bytes", record.get("reserved_bytes")),
        outputs={str(k): v for k, v in record.get("outputs", {}).items()},  # earlier files: all held
        regions=tuple(_region(of) for of in record.get("regions", ())),  # none: the step is one graph
        cuts=tuple(map(str, record.get("cuts", ()))),
        chunked=tuple(_chunked(of) for of in record.get("chunked", ())),
        answers=tuple(map(_truth, record.get("answers", ()))),
        **_whole(record.get("whole", (0.0, 0, 0))),
        order=record.get("order", "given"),
        outline=_outline(record.get("outline"), plain["sequence"], arrays["timeline"], by_kind),
    )


def _calibration(record: Any) -> Calibration | None:
    """Plans whose step was not measured have none."""
    return None if record is None else Calibration(tuple(Round(*of) for of in record))


def _region(record: Mapping[str, Any]) -> RegionSummary:
    types = get_type_hints(RegionSummary)
    for name, value in record.items():
        if not isinstance(value, _NUMBERS_AND_TEXT[types[name]]) or isinstance(value, bool):
            raise ValueError(f"{name!r} of a region is {value!r}, want {types[name].__name__}")
    return RegionSummary(**record)


def _whole(record: Any) -> dict[str, Any]:
    """Of the same step with its loss whole: seconds, FLOPs, bytes."""
    seconds, flops, peak_bytes = record
    return {
        "whole_step_s": float(seconds), "whole_step_flops": int(flops), "whole_peak_bytes": int(peak_bytes)
    }  # fmt: skip


def _chunked(record: Mapping[str, Any]) -> Chunked:
    known = {"head": str, "rows": int, "columns": int, "chunks": int, "form": str, "is_made": bool}
    for name, kind in known.items():
        if type(record[name]) is not kind:
            raise ValueError(f"{name!r} of a loss in chunks is {record[name]!r}, want {kind.__name__}")
    feeds = tuple((int(i), int(j)) for i, j in record.get("feeds", ()))
    return Chunked(**{**record, "feeds": feeds})


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"an answer of the batch is {value!r}, want true or false")
    return value


def _outline(
    record: Any, sequence: tuple[str, ...], timeline: np.ndarray, by_kind: Mapping[str, np.ndarray]
) -> Outline | None:
    """Files of earlier versions do not have it."""
    if record is None:
        return None
    outline = Outline.decode(record)
    live = outline.judge(outline.steps(sequence)).live_bytes
    if "allocator_slack" in by_kind:  # of which the outline knows what is there throughout
        live = live + by_kind["allocator_slack"] - outline.resident.get("allocator_slack", 0)
    if not np.array_equal(live, timeline):
        raise ValueError("'timeline' is not that of its 'outline'")
    return outline


def _dims(record: Any, inputs: Any) -> Dims | None:
    """Plans of fixed sizes do not have them."""
    if record is None:
        return None
    tensors = Inputs(*inputs[:2]).tensors()
    dims = tuple(tuple(map(int, of)) for of in record)
    if len(dims) != len(tensors) or any(
        not 0 <= d < t.dim() for of, t in zip(dims, tensors, strict=True) for d in of
    ):
        raise ValueError(f"'varying_dims' is {record!r}, which does not fit the inputs")
    return dims


def _optional_int(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name!r} is {value!r}, want an integer or null")
    return value


def _placement(row: list[Any]) -> Placement:
    name, module, op, size, decision, seconds, times, call, spans = row
    if decision not in ("save", "recompute", "free"):
        raise ValueError(f"placement of {name!r} is {decision!r}")
    if len(spans) != 1 + times:
        raise ValueError(f"placement of {name!r} has {len(spans)} spans and is recomputed {times} times")
    return Placement(
        str(name),
        str(module),
        str(op),
        int(size),
        decision,
        float(seconds),
        int(times),
        str(call),
        tuple((int(first), int(last)) for first, last in spans),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _pack(values: np.ndarray) -> int | list[int]:
    """A constant as one number."""
    constant = len(values) > 0 and bool((values == values[0]).all())
    return int(values[0]) if constant else values.tolist()


def _unpack(packed: int | list[int], length: int) -> np.ndarray:
    if isinstance(packed, int):
        return np.full(length, packed, dtype=np.int64)
    if len(packed) != length:
        raise ValueError(f"a timeline has {len(packed)} entries for {length} steps")
    return np.asarray(packed, dtype=np.int64)


# -- inputs ---------------------------------------------------------------------------------------


def encode(tree: Any) -> Any:
    """Containers, constants, and tensors by size only, as JSON."""
    if isinstance(tree, torch.Tensor):
        return {
            "tensor": [
                list(tree.shape),
                list(tree.stride()),
                str(tree.dtype),
                str(tree.device),
                tree.requires_grad,
            ]
        }
    if isinstance(tree, Mapping):
        return {"dict": [[str(k), encode(v)] for k, v in tree.items()]}
    if isinstance(tree, (tuple, list)):
        return {"tuple" if isinstance(tree, tuple) else "list": [encode(x) for x in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"constant": tree}
    raise PlannerError(
        f"an input of type {type(tree).__name__} cannot be described in a plan file; pass tensors, numbers, "
        "strings and containers of them"
    )


def decode(record: Any, mode: FakeTensorMode, moved: Mapping[str, str] = MappingProxyType({})) -> Any:
    """The inverse of ``encode``; tensors are fake ones of ``mode``, on the device theirs is ``moved`` to."""
    ((kind, body),) = record.items()
    if kind == "tensor":
        shape, stride, dtype, device, requires_grad = body
        if not dtype.startswith("torch.") or not isinstance(getattr(torch, dtype[6:], None), torch.dtype):
            raise ValueError(f"an input has dtype {dtype!r}")
        device = moved.get(device, device)
        with mode:
            empty = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype[6:]), device=device)
            return empty.requires_grad_(requires_grad)
    if kind == "dict":
        return {k: decode(v, mode, moved) for k, v in body}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(decode(x, mode, moved) for x in body)
    if kind == "constant":
        return body
    raise ValueError(f"an input is described as {kind!r}")


def inputs_of(plan: PlanData, device: torch.device | None = None) -> Inputs:
    """The plan's inputs as fake tensors, for a new capture; those on its device are put on ``device``."""
    if isinstance(plan.inputs, Inputs):
        return plan.inputs
    moved = {} if device is None else {plan.device: str(device)}
    args, kwargs, *made = decode(plan.inputs, FakeTensorMode(allow_non_fake_inputs=True), moved)
    return Inputs(args, kwargs, frozenset(*made), answers=plan.answers)
