"""``enable``: the switch that training code already has comes to mean "plan for this budget".

    planner.enable(model, budget_gb=8)
    Trainer(model, TrainingArguments(gradient_checkpointing=True, ...), ...).train()

The plan is made when the first training batch arrives, from that batch, and can be read afterwards with
:func:`plan_of`.  A loop of one's own calls ``model.gradient_checkpointing_enable()`` itself, whatever the
model's class, or passes ``now=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from planner.capture.module import unwrapped
from planner.capture.outputs import LossFn
from planner.costs.target import CostSource
from planner.memory.optimizer_state import OptimizerLike
from planner.options import (
    BackendMode,
    CaptureMode,
    ChunkLoss,
    GradientsMode,
    OnLarger,
    OutputsMode,
    RecomputeMode,
    check_flag,
    check_model,
)
from planner.plan import Plan
from planner.progress import Progress
from planner.training import huggingface
from planner.training.settings import OPTIONS, Settings
from planner.training.switch import Switch

__all__ = ["disable", "enable", "plan_of"]

_KEY = "_planner_switch"


def enable(
    model: nn.Module,
    budget_gb: float | None = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerLike | Literal["find"] | None = "find",
    costs: CostSource = "auto",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    on_larger: OnLarger = "replan",
    max_plans: int = 64,
    calls_per_step: int | None = None,
    outputs: OutputsMode = "auto",
    gradients: GradientsMode = "auto",
    capture: CaptureMode = "auto",
    backend: BackendMode = "eager",
    recompute: RecomputeMode = "fastest",
    chunk_loss: ChunkLoss = "auto",
    progress: bool | Progress | None = None,
    now: bool = False,
) -> nn.Module:
    """Let the checkpointing switch of ``model`` plan its training step for ``budget_gb``.  Returns ``model``.

    Nothing changes until the switch is thrown, of which a step that trains before reminds, once: by
    ``TrainingArguments(gradient_checkpointing=True)`` (or ``activation_checkpointing=True``), by
    ``model.gradient_checkpointing_enable()``, which every model has from here on, or by ``now=True``.  Any of
    the options may also come with the switch, as ``gradient_checkpointing_kwargs={"budget_gb": 8}``.  From
    then on each kind of training batch is planned when it first comes; evaluation, ``generate`` and
    ``no_grad`` run as they always did.  A model in eval mode is planned once a backward came through it, a
    frozen one where its input asks for a gradient; a part that trains by itself is named in a warning.  What
    the first steps take beside the planned calls is counted from then on.

    ``budget_gb``  GB of 10**9 bytes for the whole step on the device, as for :func:`planner.plan`.
                   Parameters, gradients and optimizer state are those of ``model``; what is planned is
                   ``model``, or the transformer inside a sentence-transformers model.
    ``loss_fn``    ``loss_fn(outputs) -> scalar`` if the loss is outside the model and takes memory worth
                   planning for.  It is traced when a plan is made, and never run in training.  In regions
                   and compiled the whole step is seen as it runs, its loss too, and this is not asked.
    ``optimizer``  "find": whatever optimizer holds the parameters when a plan is made; else as for
                   :func:`planner.plan`.
    ``on_larger``  what happens when a batch is larger than the largest planned for: "replan", or "raise"
                   a ``StalePlanError``.
    ``max_plans``  plans kept at once.  The first two shapes are planned one by one; from the third on, sizes
                   vary in one plan (:mod:`planner.runtime.variants`).
    ``calls_per_step``  how often the loss calls the model before the backward; the calls share the budget.
                   By default what the first step shows, which is run at a low peak where its first call would
                   leave no room for another.
    ``outputs``    until when the loop holds what the model returns, as for :func:`planner.plan`; "auto": as
                   the first steps show.  Where several calls share the budget, that means held.
    ``gradients``  "auto": as the first backward shows, where parameters have hooks that may use them up (an
                   optimizer's step in the backward); "held" or "consumed" as for :func:`planner.plan`.

    ``capture``    "one graph", "regions" or "auto" as for :func:`planner.plan`; in regions the first step of
                   a kind of batches is looked at and the second recorded, both with next to nothing saved,
                   and from the third on they run as planned.

    ``backend``    "inductor": it trains compiled (:mod:`planner.compiled.loop`); the first step of a kind
                   runs uncompiled, with little kept, the next is planned and compiled.  Inside an
                   outer ``torch.compile``, as of ``TrainingArguments(torch_compile=True)``, this compiles.

    ``time_limit_s``  seconds of search for each plan.  A batch waits for the first three of them; where one
                   was found by then, the rest is spent beside training (:mod:`planner.solving.better`).
    ``chunk_loss``  as for :func:`planner.plan`; a batch whose loss is in chunks is planned for its own sizes.
    ``costs``, ``solver``, ``recompute`` and ``progress`` as for :func:`planner.plan`.

    Enabling again changes the options, from the next batch on, without a new capture.  A model inside
    ``DistributedDataParallel`` is enabled in there.  Raises ``TypeError`` or ``ValueError`` for arguments
    that make no sense, ``PlannerError`` for a model compiled already; a budget that cannot be met raises
    ``InfeasibleBudgetError`` when the first batch comes.
    """
    given = dict(locals())  # the options by their names
    check_model(model)
    check_flag("now", now)
    options = {name: given[name] for name in OPTIONS if name != "budget_gb" or budget_gb is not None}
    settings = Settings(None).changed(options)
    root = unwrapped(model)
    switch = vars(root).get(_KEY)
    if switch is None:
        planned = huggingface.planned_module(root)
        switch = Switch(root, planned, settings)
        for module in {id(m): m for m in (root, planned)}.values():
            _put_methods(module, switch)
    else:
        switch.change(settings)
    if now:
        switch.turn_on()
    else:
        switch.remind()
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo :func:`enable`: the model's own switch and forward are back.  Returns ``model``."""
    switch = _switch_of(model)
    if switch is not None:
        switch.turn_off()
        for module in (switch.root, switch.planned):
            _take_methods(module)
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of the last training batch of an enabled model; ``None`` before the first."""
    switch = _switch_of(model)
    return None if switch is None else switch.plan


def _switch_of(model: nn.Module) -> Switch | None:
    check_model(model)
    found: Switch | None = vars(unwrapped(model)).get(_KEY)
    return found


@dataclass(eq=False)
class _Method:
    """One of the names by which trainers throw the switch, on one instance."""

    switch: Switch
    turns_on: bool
    before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self.turns_on:
            self.switch.turn_off()
            return
        options = huggingface.arguments_of(args, kwargs)
        self.switch.change(self.switch.settings.changed(options))
        self.switch.turn_on(by_name=True)


def _put_methods(module: nn.Module, switch: Switch) -> None:
    attributes = vars(module)
    for name, turns_on in huggingface.NAMES.items():
        attributes[name] = _Method(switch, turns_on, attributes.get(name))
    attributes[_KEY] = switch


def _take_methods(module: nn.Module) -> None:
    attributes = vars(module)
    attributes.pop(_KEY, None)
    for name in huggingface.NAMES:
        method = attributes.get(name)
        if isinstance(method, _Method):
            if method.before is None:
                del attributes[name]
            else:
                attributes[name] = method.before
