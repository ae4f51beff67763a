"""Before each random op a note of the generator's state, from which the op can be replayed."""

from __future__ import annotations

import torch

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft
from planner.graph.nodes import first_tensor, is_random

__all__ = ["note_random_state"]


def note_random_state(draft: Draft) -> Did:
    """Before each random op, ``rng_state``: what a replay starts from."""
    for node in list(draft.graph.nodes):
        if not is_random(node):
            continue
        device = str(first_tensor(node).device)
        with draft.graph.inserting_before(node):
            state = draft.graph.call_function(kernels.rng_state, (device,))
        with _compat.fake_mode_of(first_tensor(node)):
            made = torch.empty(kernels.rng_state_bytes(device), dtype=torch.uint8)
            meta.describe(state, made, node, same_work=False)
        meta.note_rng_state(node, state)
        draft.states.append(state)
        draft.pinned.add(state)
    return {"states": len(draft.states)}
