"""What the tests of Hugging Face's trainers share: arguments, a meter of whole steps, what to compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from planner.measure import StorageMeter

__all__ = ["FAST", "QUIET", "Peaks", "files_below", "losses_of", "parameters_of"]

# Arguments of every TrainingArguments here: one CPU process that reports nothing and asks nobody.
QUIET: Mapping[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
    "seed": 3,
}


# Options under which a plan takes a fraction of a second.
FAST: Mapping[str, Any] = {"costs": "roofline", "solver": "greedy", "time_limit_s": 0.4}


class Peaks(TrainerCallback):
    """Peak bytes of each whole step, optimizer included, counted from ``first`` on."""

    def __init__(self, first: int = 0) -> None:
        self.first, self.bytes = first, []
        self._meter: StorageMeter | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        if state.global_step < self.first:
            return
        self._meter = StorageMeter("cpu")
        self._meter.register(*model.parameters(), *model.buffers())
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        for held in optimizer.state.values():
            self._meter.register(*(t for t in held.values() if isinstance(t, Tensor)))
        self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self.bytes.append(self._meter.peak_bytes)
            self._meter = None


def losses_of(trainer: Any) -> list[float]:
    """Every loss the trainer logged, those of evaluations included, in order."""
    return [e[key] for e in trainer.state.log_history for key in ("loss", "eval_loss") if key in e]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def files_below(folder: Path) -> set[str]:
    """Names of all files, relative."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
