"""What a training step really takes: peak bytes, FLOPs and every bit it leaves behind.

In: a module or a callable and one batch.  Out: counts, and records that can be compared.  Knows nothing of
plans; plans are judged by it, and by nothing they computed themselves.

All measurements run the same step.  The loss is ``loss_fn(outputs)``, or the model's own (:func:`loss_of`, by
the rule that a capture goes by); without one every differentiable output gets a gradient of ones.
Gradients must be None at the start; afterwards they are None again, and buffers and random state are as they
were.

Raises ``PlannerError`` for a step that cannot be run and put back, or has nothing to differentiate;
``TypeError`` for a ``loss_fn`` that gives no scalar and inputs of another kind; ``ValueError`` for output
gradients of other shapes.

Known limits: Python's and numpy's random states are not put back; FLOPs of elementwise work are not counted.
"""

from planner.measure.bits import Agreement, Comparison, StepRecord, compare, run_step
from planner.measure.flops import FLOP_FORMULAS, step_flops
from planner.measure.meter import StorageMeter
from planner.measure.peaks import CudaPeak, allocated_peak, cuda_step_peak, step_peak
from planner.measure.step import loss_of, tensors_in

__all__ = [
    "FLOP_FORMULAS",
    "Agreement",
    "Comparison",
    "CudaPeak",
    "StepRecord",
    "StorageMeter",
    "allocated_peak",
    "compare",
    "cuda_step_peak",
    "loss_of",
    "run_step",
    "step_flops",
    "step_peak",
    "tensors_in",
]
