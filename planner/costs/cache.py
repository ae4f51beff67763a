"""Measured costs on disk, so that the next process need not measure them again.

One JSON file per device, driver and versions of libraries: what was measured under other ones is simply
in another file.  Settings that choose kernels are part of an op's signature.  The file lies in the folder
that ``REMATPLAN_CACHE`` names, else in ``rematplan`` under the user's cache folder;
``REMATPLAN_CACHE=0`` switches it off, and with it the schedules that lie there too
(:mod:`planner.solving.kept`).

A file is read with suspicion: one that is not whole, or not of this device, is ignored with one line in
the log and replaced.  It is replaced whole, so that a reader never sees half of one; of two processes
that add at the same time the later keeps what it read and what it measured, and what is lost is
measured again.

A GPU is timed by its own clock and seldom shared.  A CPU is, and a neighbour's load while measuring is not to
be believed for ever after: of its figures some are measured again before the rest is believed
(:mod:`planner.costs.believed`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from planner._compat import cuda_driver_version
from planner.files import write_whole

__all__ = ["VARIABLE", "CostCache", "Measured", "cache_for", "folder"]

log = logging.getLogger(__name__)

VARIABLE = "REMATPLAN_CACHE"
_FORMAT, _VERSION = "rematplan.costs", 1
_OFF = ("", "0", "off", "no", "false")


class Measured(NamedTuple):
    """One execution: seconds, and bytes of scratch beyond inputs and outputs (0 if nothing shows them)."""

    seconds: float
    workspace_bytes: int


def folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where what is kept lies; ``None`` if they are switched off, or there is no home to put them in."""
    environ = os.environ if environ is None else environ
    told = environ.get(VARIABLE)
    if told is not None:
        return None if told.strip().lower() in _OFF else Path(told).expanduser()
    if sys.platform == "win32":
        base = environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "rematplan" if base else None
    except RuntimeError:  # no home
        return None


def cache_for(device: torch.device) -> CostCache | None:
    """The file for ``device``; ``None`` where measurements are not kept."""
    where = folder()
    if where is None or device.type not in ("cpu", "cuda"):
        return None
    if device.type == "cpu":
        return CostCache.at(where, _facts_of_cpu(), is_shared=True)
    return CostCache.at(where, _facts(device))


# Variables that choose a CPU's kernels, its threads' places, or where memory comes from.
_CHOOSING = re.compile(
    r"(OMP|KMP|GOMP|MKL|DNNL|ONEDNN|ATEN|OPENBLAS|BLIS|MALLOC|JEMALLOC|TCMALLOC)_\w+|LD_PRELOAD"
)


def _facts_of_cpu() -> dict[str, str]:
    """What a measurement on this CPU depends on beside the op's signature, as far as one can ask."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    chosen = {name: value for name, value in os.environ.items() if _CHOOSING.fullmatch(name)}
    return {
        "device": _cpu_name() or "cpu",
        "machine": platform.machine(),
        "processors": str(os.cpu_count() if affinity is None else len(affinity(0))),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "built": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "onednn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "chosen": json.dumps(chosen, sort_keys=True),
    }


def _cpu_name() -> str:
    """What the processor calls itself."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", told, re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def _facts(device: torch.device) -> dict[str, str]:
    """What a measurement on a CUDA device depends on beside the op's signature."""
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": str(properties.multi_processor_count),
        "memory": str(properties.total_memory),
        "driver": str(cuda_driver_version()),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version()) if cudnn.is_available() else "none",
    }


@dataclass(frozen=True)
class CostCache:
    """One file of measurements, by signature.

    ``path``       of the file; it and its folder are made when something is added.
    ``facts``      what every measurement in it depends on; another file's are not taken.
    ``is_shared``  the device, with other programs: what is kept is to be doubted.
    """

    path: Path
    facts: Mapping[str, str]
    is_shared: bool = False

    @classmethod
    def at(cls, where: Path, facts: Mapping[str, str], *, is_shared: bool = False) -> CostCache:
        """The file in ``where`` for ``facts``."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts.get("device", "device")).strip("-")
        return cls(where / f"costs-{name}-{digest}.json", dict(facts), is_shared)

    def read(self) -> dict[str, Measured]:
        """What the file holds, by :func:`key_of` a signature; nothing if it is not there or not right."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            return self._checked(record)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("%s is ignored, it is no file of costs for this device: %s", self.path, error)
            return {}

    def _checked(self, record: Any) -> dict[str, Measured]:
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {record['format']!r}, version {record['version']!r}")
        if record["facts"] != self.facts:
            raise ValueError("measured on another device or under other settings")
        found = {}
        for key, (seconds, workspace_bytes) in record["costs"].items():
            if not (math.isfinite(seconds) and seconds >= 0 and isinstance(workspace_bytes, int)):
                raise ValueError(f"{key} costs {seconds!r} s, {workspace_bytes!r} bytes")
            if workspace_bytes < 0:
                raise ValueError(f"{key} has {workspace_bytes} bytes of scratch")
            found[str(key)] = Measured(float(seconds), workspace_bytes)
        return found

    def add(self, measured: Mapping[str, Measured]) -> None:
        """Add ``measured`` (by signature) to what the file holds; what cannot be written is let go."""
        if not measured:
            return
        costs = self.read() | {key_of(signature): cost for signature, cost in measured.items()}
        record = {"format": _FORMAT, "version": _VERSION, "facts": dict(self.facts), "costs": costs}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(record))
        except OSError as error:
            log.warning("measured costs are not kept in %s: %s", self.path, error)


def key_of(signature: str) -> str:
    """A signature's name in the file: as long for every op, and the same on each device of a kind."""
    return hashlib.sha256(re.sub(r"cuda:\d+", "cuda", signature).encode()).hexdigest()[:32]
