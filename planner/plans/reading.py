"""Plan files read back: JSON, checked field by field.  Nothing is executed, and nothing here needs torch.

The batch a plan was made for stands in its file by structure and sizes.  Whether it can be one is checked
here (:mod:`planner.plans.batch`); tensors are made of it where a step is captured again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.errors import InvalidPlanFileError
from planner.graph.chunks.chunked import Chunked
from planner.plans import batch
from planner.plans.outline import Outline
from planner.plans.plan_data import Calibration, Placement, PlanData, RegionSummary, Round

if TYPE_CHECKING:
    from planner.capture.sizes import Dims

__all__ = ["FORMAT", "PLAIN", "TIMELINES", "VERSION", "from_text", "load"]

FORMAT = "rematplan.plan"
VERSION = 2

TIMELINES = ("timeline", "baseline_timeline")
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
    "channels_last",
    *TIMELINES,
)
PLAIN = tuple(f.name for f in dataclasses.fields(PlanData) if f.name not in _SKIPPED)
_KEYS = (
    "format",
    "version",
    *PLAIN,
    "minimum_peak_bytes",
    "placements",
    "timeline_by_kind",
    "inputs",
    *TIMELINES,
)


# What JSON may hold where a field is annotated so.
_NUMBERS_AND_TEXT: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
_ANNOTATIONS = {of: {f.name: str(f.type) for f in dataclasses.fields(of)} for of in (PlanData, RegionSummary)}


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
    for name in PLAIN:
        value = record[name]
        want = _NUMBERS_AND_TEXT.get(_ANNOTATIONS[PlanData][name])
        if want is not None and (not isinstance(value, want) or isinstance(value, bool)):
            raise ValueError(f"{name!r} is {value!r}, want {_ANNOTATIONS[PlanData][name]}")
        plain[name] = value
    plain["sequence"] = tuple(map(str, plain["sequence"]))
    plain["differentiated"] = tuple(map(int, plain["differentiated"]))
    plain["breakdown"] = {str(k): int(v) for k, v in plain["breakdown"].items()}
    arrays: dict[str, Any] = {name: np.asarray(record[name], dtype=np.int64) for name in TIMELINES}
    length = len(plain["sequence"])
    if len(arrays["timeline"]) != length:  # before the outline is held against it
        raise ValueError(f"'timeline' has {len(arrays['timeline'])} entries for {length} steps")
    by_kind = {str(k): _unpack(v, length) for k, v in record["timeline_by_kind"].items()}
    placements = tuple(_placement(row) for row in record["placements"])
    inputs = batch.decode(record["inputs"], lambda tensor: tensor)
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
        channels_last=tuple(map(str, record.get("channels_last", ()))),
        **_whole(record.get("whole", (0.0, 0, 0))),
        order=record.get("order", "given"),
        outline=_outline(record.get("outline"), plain["sequence"], arrays["timeline"], by_kind),
    )


def _calibration(record: Any) -> Calibration | None:
    """Plans whose step was not measured have none."""
    return None if record is None else Calibration(tuple(Round(*of) for of in record))


def _region(record: Mapping[str, Any]) -> RegionSummary:
    types = _ANNOTATIONS[RegionSummary]
    for name, value in record.items():
        if not isinstance(value, _NUMBERS_AND_TEXT[types[name]]) or isinstance(value, bool):
            raise ValueError(f"{name!r} of a region is {value!r}, want {types[name]}")
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
    arguments, keywords, *_ = inputs
    tensors = batch.tensors_in((arguments, dict(sorted(keywords.items()))))
    dims = tuple(tuple(map(int, of)) for of in record)
    if len(dims) != len(tensors) or any(
        not 0 <= d < len(t.shape) for of, t in zip(dims, tensors, strict=True) for d in of
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


def _unpack(packed: int | list[int], length: int) -> np.ndarray:
    if isinstance(packed, int):
        return np.full(length, packed, dtype=np.int64)
    if len(packed) != length:
        raise ValueError(f"a timeline has {len(packed)} entries for {length} steps")
    return np.asarray(packed, dtype=np.int64)
