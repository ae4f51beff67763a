"""Problems in files: gzip-compressed JSON by columns, the same bytes for the same problem.

One list per field of all ops and one per field of all values, so that what repeats lies together and
compresses well: a training graph of four thousand ops takes some tens of kilobytes.  A column whose
entries are all the field's default is left out.  Inputs and outputs are indices into the values; a
value's producer follows from the ops' outputs and is not stored.

The format carries a version; readers refuse versions they do not know.  Reading builds a
:class:`~solvers.core.problem.Problem`, so a file that was edited into nonsense is refused as any malformed
problem is.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solvers.core.problem import Op, Problem, ProblemError, Value

__all__ = ["read_problem", "write_problem"]

VERSION = 1

# Fields with a default, which a column may be left out for.
_OP_DEFAULTS: Mapping[str, Any] = {
    "workspace_bytes": 0,
    "recompute_seconds": None,
    "recomputable": True,
    "group": None,
    "reuses": None,
}
_OP_FIELDS = ("name", "inputs", "outputs", "seconds", *_OP_DEFAULTS)
_VALUE_DEFAULTS: Mapping[str, Any] = {"final": False, "replay_only": False}
_VALUE_FIELDS = ("name", "bytes", *_VALUE_DEFAULTS)


def write_problem(problem: Problem, path: str | Path) -> None:
    """Write ``problem`` to ``path``; the same problem gives the same bytes on every machine.

    Raises ``OSError`` if the file cannot be written.
    """
    data = {
        "format": "rematerialization problem",
        "version": VERSION,
        "name": problem.name,
        "turn": problem.turn,
        "resident_bytes": problem.resident_bytes,
        "ops": _columns(problem.ops, _OP_FIELDS, _OP_DEFAULTS),
        "values": _columns(problem.values, _VALUE_FIELDS, _VALUE_DEFAULTS),
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    Path(path).write_bytes(_gzip(text.encode()))


def read_problem(path: str | Path) -> Problem:
    """The problem that ``write_problem`` wrote to ``path``.

    Raises ``OSError`` if the file cannot be read, and ``ProblemError``, naming the file, if it is not
    such a file, is of another version, or holds a malformed problem.
    """
    try:
        data = json.loads(gzip.decompress(Path(path).read_bytes()))
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProblemError(f"{path}: not gzip-compressed JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != "rematerialization problem":
        raise ProblemError(f"{path}: JSON, but not a problem")
    if data.get("version") != VERSION:
        raise ProblemError(f"{path}: version {data.get('version')!r}, this reads version {VERSION}")
    try:
        return _problem(data)
    except KeyError as error:
        raise ProblemError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:  # ProblemError is a ValueError
        raise ProblemError(f"{path}: {error}") from error


def _gzip(data: bytes) -> bytes:
    """``data`` compressed, without the time and without the byte that names the operating system."""
    packed = bytearray(gzip.compress(data, 9, mtime=0))
    packed[9] = 255
    return bytes(packed)


def _columns(rows: tuple[Any, ...], fields: tuple[str, ...], defaults: Mapping[str, Any]) -> dict[str, Any]:
    columns = {field: [getattr(row, field) for row in rows] for field in fields}
    return {
        field: column
        for field, column in columns.items()
        if field not in defaults or any(entry != defaults[field] for entry in column)
    }


def _rows(
    columns: dict[str, Any], fields: tuple[str, ...], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    unknown = sorted(set(columns) - set(fields))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}")
    count = len(columns[fields[0]])
    filled = {
        field: columns.get(field, [defaults[field]] * count) if field in defaults else columns[field]
        for field in fields
    }
    for field, column in filled.items():
        if not isinstance(column, list) or len(column) != count:
            raise ValueError(f"column {field!r} does not have the {count} entries of {fields[0]!r}")
    return [dict(zip(filled, row, strict=True)) for row in zip(*filled.values(), strict=True)]


def _problem(data: dict[str, Any]) -> Problem:
    op_rows = _rows(data["ops"], _OP_FIELDS, _OP_DEFAULTS)
    value_rows = _rows(data["values"], _VALUE_FIELDS, _VALUE_DEFAULTS)
    producer = {v: i for i, row in enumerate(op_rows) for v in row["outputs"]}
    for row in op_rows:
        row["inputs"], row["outputs"] = tuple(row["inputs"]), tuple(row["outputs"])
    return Problem(
        tuple(Op(**row) for row in op_rows),
        tuple(Value(**row, producer=producer.get(v)) for v, row in enumerate(value_rows)),
        turn=data["turn"],
        resident_bytes=data["resident_bytes"],
        name=data["name"],
    )
