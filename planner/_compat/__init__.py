"""The one door to private torch APIs: each name, what it is for, which versions have it.

Tested with torch 2.11 and 2.13.  Nothing else in this package imports a private torch name, so a
torch upgrade is a change to this folder.

    tracing.py  how a step is traced
    sizes.py    sizes that are symbols
    autocast.py contexts of autocast
    dynamo.py   how Dynamo cuts a forward
    quick.py    the same trace in less time
    running.py  modes, hooks and the engine, while a step runs
    tensors.py  what holds the values of a tensor, and who holds that
    ops.py      what is to be known of single ops, of kernels, of libraries below them
"""

from __future__ import annotations

import torch.utils._pytree as pytree  # public-to-be container flattening; 2.0+

# joint forward+backward export on a live module, with a descriptor on every input; 2.9+
from torch._functorch._aot_autograd import descriptors
from torch._ops import OpOverload  # an op at one of its signatures: what a captured graph calls; 1.13+
from torch._subclasses.fake_tensor import (  # tensors with shapes, strides and storages, no memory; 2.0+
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen  # code that takes one list and clears it; 2.1+
from torch.utils._python_dispatch import TorchDispatchMode  # sees every op below autograd; 1.13+

from planner._compat.autocast import (
    ENTERS_AUTOCAST,
    autocast_depth,
    autocast_notes,
    autocast_watched,
    is_under_autocast,
)
from planner._compat.dynamo import (
    RECOMPILES,
    TURNS,
    TURNS_HERE,
    Loops,
    cut_by_dynamo,
    dynamo_as_eager,
    dynamo_breaks,
    dynamo_stands_aside,
    forbids_hooks,
    hide_from_dynamo,
    is_autograd_function,
    is_checkpoint,
    left_alone,
    nests,
    split_graph,
    switches_gradients,
)
from planner._compat.ops import (
    batch_norm_is_cudnns,
    batch_norm_reserve_bytes,
    clear_cublas_workspaces,
    cuda_driver_version,
    dp_knapsack,
    is_out_of_memory,
    job_store,
    pieces_of,
    reads_a_number,
    writes_arguments,
)
from planner._compat.quick import collecting_seldom
from planner._compat.running import (
    after_backward,
    at_end_of_backward,
    backward_functions,
    compiles_here,
    current_backward,
    dispatch_state,
    flop_counter_sees_pieces,
    graph_is_kept,
    is_top_mode,
    is_transformed,
    modes_set_aside,
    once_in_backward,
    saved_tensors_hooks_set_aside,
    watching_modes,
    will_run,
)
from planner._compat.sizes import (
    compiled,
    evaluated,
    expression_of,
    guards_of,
    is_symbol,
    size_hint,
    symbolic_fake,
    symbolic_mode,
)
from planner._compat.tensors import (
    dense_parts,
    generator_key,
    gone,
    post_accumulate_hooks,
    storage_key,
    storage_uses,
    tensors_on,
    version_of,
    weak_storage,
    wraps_others,
)
from planner._compat.tracing import (
    STAND_INS,
    CheckpointCalls,
    checkpoint_calls,
    compiled_parts_as_eager,
    compiler_flags,
    export_joint,
    fake_mode_of,
    fakes_as_last_time,
    foreach_takes_fakes,
    graph_in_tracing,
    is_data_dependent,
    is_faked,
    kernels_as_eager,
    parametrized_weights_are_cached,
    stand_ins_derive_from,
    values_unchecked,
    writes_keep_layout,
    writes_so_far,
)

__all__ = [
    "ENTERS_AUTOCAST",
    "RECOMPILES",
    "STAND_INS",
    "TURNS",
    "TURNS_HERE",
    "BoxedCodeGen",
    "CheckpointCalls",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "Loops",
    "OpOverload",
    "TorchDispatchMode",
    "after_backward",
    "at_end_of_backward",
    "autocast_depth",
    "autocast_notes",
    "autocast_watched",
    "backward_functions",
    "batch_norm_is_cudnns",
    "batch_norm_reserve_bytes",
    "checkpoint_calls",
    "clear_cublas_workspaces",
    "collecting_seldom",
    "compiled",
    "compiled_parts_as_eager",
    "compiler_flags",
    "compiles_here",
    "cuda_driver_version",
    "current_backward",
    "cut_by_dynamo",
    "dense_parts",
    "descriptors",
    "dispatch_state",
    "dp_knapsack",
    "dynamo_as_eager",
    "dynamo_breaks",
    "dynamo_stands_aside",
    "evaluated",
    "export_joint",
    "expression_of",
    "fake_mode_of",
    "fakes_as_last_time",
    "flop_counter_sees_pieces",
    "forbids_hooks",
    "foreach_takes_fakes",
    "generator_key",
    "gone",
    "graph_in_tracing",
    "graph_is_kept",
    "guards_of",
    "hide_from_dynamo",
    "is_autograd_function",
    "is_checkpoint",
    "is_data_dependent",
    "is_faked",
    "is_out_of_memory",
    "is_symbol",
    "is_top_mode",
    "is_transformed",
    "is_under_autocast",
    "job_store",
    "kernels_as_eager",
    "left_alone",
    "modes_set_aside",
    "nests",
    "once_in_backward",
    "parametrized_weights_are_cached",
    "pieces_of",
    "post_accumulate_hooks",
    "pytree",
    "reads_a_number",
    "saved_tensors_hooks_set_aside",
    "size_hint",
    "split_graph",
    "stand_ins_derive_from",
    "storage_key",
    "storage_uses",
    "switches_gradients",
    "symbolic_fake",
    "symbolic_mode",
    "tensors_on",
    "values_unchecked",
    "version_of",
    "watching_modes",
    "weak_storage",
    "will_run",
    "wraps_others",
    "writes_arguments",
    "writes_keep_layout",
    "writes_so_far",
]
