"""torchvision and torchaudio beside a build of torch for the CPU.

The wheels that PyPI has of both are built for CUDA, and their C++ operators cannot be loaded beside a torch
without it; then importing them fails, and so does what imports them.  Of torchvision's operators the
detectors need one that has no Python twin, non-maximum suppression, which is written here.  RoIAlign has a
twin, which torchvision takes by itself.  torchaudio gets along without its own.
Import them only after :func:`ready`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch
from torch import Tensor

__all__ = ["ready"]

_kept: list[torch.library.Library] = []


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that no better one overlaps by more than ``iou_threshold``, best first."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    near = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    far = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (far - near).clamp(min=0).prod(-1)
    over = shared / (areas[:, None] + areas[None] - shared) > iou_threshold
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if keep[i]:
            keep[i + 1 :] &= ~over[i, i + 1 :]
    return order[keep]


def ready() -> None:
    """Make both importable, with their own operators where those load."""
    _vision()
    _audio()


def _vision() -> None:
    if _kept or importlib.util.find_spec("torchvision") is None:
        return
    definitions = torch.library.Library("torchvision", "DEF")
    definitions.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    definitions.impl("nms", _nms, "CPU")
    definitions.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(definitions)
    from torchvision import extension

    if not extension._has_ops():
        importlib.import_module("torchvision.ops.boxes")._assert_has_ops = lambda: None
        twin = importlib.import_module("torchvision.ops.roi_align")
        twin._roi_align = twin._roi_align.__wrapped__  # else compiled by inductor at its first call


def _audio() -> None:
    if importlib.util.find_spec("torchaudio") is None or torch.version.cuda is not None:
        return
    without = types.ModuleType("torchaudio._extension")
    without._IS_TORCHAUDIO_EXT_AVAILABLE = without._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
    without.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
    sys.modules[without.__name__] = without
