"""What cuBLAS keeps on a CUDA device.

PyTorch hands every handle a workspace from its caching allocator and never takes it back
(``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``): 32 MiB on compute capability 9,
and in later versions 10 and 12, else 8 MiB + 128 KiB, or what ``CUBLAS_WORKSPACE_CONFIG`` says.  Handles
belong to threads, and the backward of a step runs in a thread of the autograd engine, so a training step has
two.  Products with a bias go through cuBLASLt, which has a workspace of its own, of
``CUBLASLT_WORKSPACE_SIZE`` KiB or 1 MiB, unless ``TORCH_CUBLASLT_UNIFIED_WORKSPACE=1`` has it share the
other: so torch 2.11 for CUDA 13, asked with a made driver under its own allocator.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["cublas_workspace_bytes", "cublaslt_workspace_bytes", "library_blocks"]


def cublas_workspace_bytes(capability: tuple[int, int], environ: Mapping[str, str] | None = None) -> int:
    """Bytes that PyTorch gives each cuBLAS handle."""
    environ = os.environ if environ is None else environ
    default_bytes = 32 * 2**20 if capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024
    config = environ.get("CUBLAS_WORKSPACE_CONFIG")
    pairs = re.findall(r":([0-9]+):([0-9]+)", config) if config else []
    return sum(int(kib) * 1024 * int(count) for kib, count in pairs) if pairs else default_bytes


def cublaslt_workspace_bytes(environ: Mapping[str, str] | None = None) -> int:
    """Bytes that PyTorch gives a thread's cuBLASLt beyond its cuBLAS workspace."""
    environ = os.environ if environ is None else environ
    if environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") == "1":
        return 0
    own = environ.get("CUBLASLT_WORKSPACE_SIZE", "")
    return (int(own) if own.isdecimal() else 1024) * 1024


def library_blocks(capability: tuple[int, int] | None, *, products: bool, biased: bool) -> tuple[int, ...]:
    """Bytes of each workspace that cuBLAS keeps through a step with matrix products, some with a bias.

    Both threads of the step are counted for both: a product of the forward may be recomputed in the other.
    None where ``capability`` is ``None``: other devices have no such workspace.
    """
    if capability is None:
        return ()
    of_a_thread = [cublas_workspace_bytes(capability)] * products + [cublaslt_workspace_bytes()] * biased
    return tuple(2 * of_a_thread)
