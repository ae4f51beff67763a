"""What a training step really takes: peak bytes, FLOPs and every bit it leaves behind.

In: a module or a callable and one batch.  Out: counts, and records that can be compared.  Knows nothing of
plans; plans are judged by it.  Raises ``PlannerError`` for a step that cannot be run and put back.
"""

from planner.measure.peaks import (
    FLOP_FORMULAS,
    Agreement,
    Comparison,
    CudaPeak,
    StepRecord,
    StorageMeter,
    compare,
    cuda_step_peak,
    loss_of,
    run_step,
    step_flops,
    step_peak,
    tensors_in,
)

__all__ = [
    "FLOP_FORMULAS",
    "Agreement",
    "Comparison",
    "CudaPeak",
    "StepRecord",
    "StorageMeter",
    "compare",
    "cuda_step_peak",
    "loss_of",
    "run_step",
    "step_flops",
    "step_peak",
    "tensors_in",
]
