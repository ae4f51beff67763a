"""A buffer's new value is written into it in the forward, once, whatever is recomputed.

By the kernel that does so in eager (batch norm's running statistics), else by a copy.
"""

from __future__ import annotations

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph.draft import Did, Draft
from planner.graph.nodes import ignores_running_stats, last_of, readers_of

__all__ = ["update_buffers"]

aten = torch.ops.aten


def update_buffers(draft: Draft) -> Did:
    """Copy each buffer's new value into it, after the last forward op that reads the old one."""
    moved = _update_running_stats_in_place(draft)
    position = {n: i for i, n in enumerate(draft.graph.nodes)}
    reach = draft.reaches((*draft.outputs, *draft.mutations.values()))
    copied = len(draft.mutations)
    for name, new in draft.mutations.items():
        buffer = draft.buffers[name]
        readers = [u for u in readers_of(buffer) if not ignores_running_stats(u)]
        if any(u not in reach for u in readers):
            _keep_old(draft, buffer, new, reach)
        draft.pinned.update(readers)
        for user in [u for u in new.users if ignores_running_stats(u)]:
            user.replace_input_with(new, buffer)  # a backward that does not look at them
        after = max((new, *(u for u in readers if u in reach)), key=lambda n: position.get(n, -1))
        with draft.graph.inserting_after(last_of(after)):
            if _counts(new, buffer):
                update = draft.graph.call_function(aten.add_.Tensor, new.args)
            else:
                update = draft.graph.call_function(aten.copy_.default, (buffer, new))
        meta.describe(update, meta.value(buffer), new, same_work=False)
        draft.pinned.add(update)
        draft.updates.append(update)
    draft.mutations = {}
    draft.sweep()
    return {"buffers written": copied, "batch norms that move theirs": moved}


def _keep_old(draft: Draft, buffer: fx.Node, new: fx.Node, reach: set[fx.Node]) -> None:
    """A copy of what the buffer held, for the calls of the backward that read it."""
    first = next(n for n in draft.graph.nodes if n.op == "call_function")
    with draft.graph.inserting_before(first):
        before = draft.graph.call_function(aten.clone.default, (buffer,))
    with _compat.fake_mode_of(meta.tensor(new)):
        meta.describe(before, torch.empty_like(meta.tensor(buffer)))
    for user in [u for u in buffer.users if u is not before and u not in reach]:
        user.replace_input_with(buffer, before)
    draft.pinned.add(before)


def _update_running_stats_in_place(draft: Draft) -> int:
    """Batch norm's first execution updates its buffers itself, as eager's does; how many do.

    A further execution normalizes by the batch's statistics alone (:func:`planner.capture.meta.again`), so
    they move once per step.
    """
    functional = aten._native_batch_norm_legit_functional.default
    names = {node: name for name, node in draft.buffers.items()}
    moved = 0
    for node in draft.graph.find_nodes(op="call_function", target=functional):
        x, weight, bias, mean, var, training, momentum, eps = node.args
        parts = {user.args[1]: _to_its_buffer(user) for user in node.users}
        fits = all(
            buffer in names
            and draft.mutations.get(names[buffer]) is parts.get(index)
            and all(ignores_running_stats(u) for u in (*readers_of(buffer), *parts[index].users))
            for buffer, index in ((mean, 3), (var, 4))
        )
        if training is not True or not fits:
            continue
        for buffer, index in ((mean, 3), (var, 4)):
            parts[index].replace_all_uses_with(buffer)
            del draft.mutations[names[buffer]]
        node.target = aten._native_batch_norm_legit.default
        meta.describe(node, meta.value(node)[:3], node)
        no_stats = aten._native_batch_norm_legit.no_stats
        meta.note_again(node, no_stats, (x, weight, bias, True, momentum, eps))
        draft.updates.append(node)
        moved += 1
    draft.sweep()
    return moved


def _to_its_buffer(statistic: fx.Node) -> fx.Node:
    """What of a batch norm's new running statistic goes into the buffer: it, or its cast.

    Traced formulas make statistics in float32; kernels write them in the buffer's own type.
    """
    casts = [u for u in statistic.users if u.target is aten._to_copy.default]
    return casts[0] if len(casts) == len(statistic.users) == 1 else statistic


def _counts(new: fx.Node, buffer: fx.Node) -> bool:
    """Whether a buffer's ``new`` value is a number more than its last, and read by nobody else."""
    plain = new.target is aten.add.Tensor and not new.kwargs and not new.users
    return plain and new.args[0] is buffer and type(new.args[1]) in (int, float)
