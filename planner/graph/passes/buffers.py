"""A buffer's new value is written into it in the forward, once, whatever is recomputed.

By the kernel that does so in eager (batch norm's running statistics), by the in-place ops that the new value
is a chain of (a queue of which a slice is written, an average that moves), else by a copy.  What reads the
buffer between them runs once, where it stands.
"""

from __future__ import annotations

import torch
from torch import fx

from planner import _compat
from planner.capture import meta
from planner.graph import kernels
from planner.graph.draft import Did, Draft
from planner.graph.nodes import ignores_running_stats, last_of, readers_of, tensors_of
from planner.graph.passes.slices import in_place_form

__all__ = ["update_buffers"]

aten = torch.ops.aten


def update_buffers(draft: Draft) -> Did:
    """Copy each buffer's new value into it, after the last forward op that reads the old one."""
    moved = _update_running_stats_in_place(draft)
    written = _write_in_place(draft)
    position = {n: i for i, n in enumerate(draft.graph.nodes)}
    reach = draft.reaches((*draft.outputs, *draft.mutations.values(), *draft.updates))
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
            update = draft.graph.call_function(aten.copy_.default, (buffer, new))
        meta.describe(update, meta.value(buffer), new, same_work=False)
        draft.pinned.add(update)
        draft.updates.append(update)
    draft.mutations = {}
    draft.sweep()
    return {
        "buffers written": copied,
        "buffers written in place": written,
        "batch norms that move theirs": moved,
    }


def _write_in_place(draft: Draft) -> int:
    """Buffers whose new value is a chain of in-place ops: these, where each of them stands."""
    position = {n: i for i, n in enumerate(draft.graph.nodes)}
    reach = draft.reaches((*draft.outputs, *draft.mutations.values(), *draft.updates))
    done = 0
    for name, new in list(draft.mutations.items()):
        buffer = draft.buffers[name]
        chain = [] if name in draft.rebound else _chain(new, buffer)
        if not chain or not all(
            u in reach and position[u] < position[later]
            for now, later in zip((buffer, *chain[:-1]), chain, strict=True)
            for u in readers_of(now)
            if u is not later and not ignores_running_stats(u)
        ):
            continue
        del draft.mutations[name]
        for node in chain:
            form = kernels.write_over if node.target is kernels.written else in_place_form(node)
            with draft.graph.inserting_before(node):
                update = draft.graph.call_function(form, node.args, dict(node.kwargs))
            part = node.all_input_nodes[0]  # the buffer, or a view of it
            meta.describe(update, meta.value(part), node, same_work=False)
            position[update] = position[node]
            reach.add(update)
            draft.replace(node, part)
            draft.graph.erase_node(node)
            draft.pinned.add(update)
            draft.updates.append(update)
        draft.pinned.update(u for u in readers_of(buffer) if u in reach and not ignores_running_stats(u))
        done += 1
    return done


def _chain(new: fx.Node, buffer: fx.Node) -> list[fx.Node]:
    """The calls that make ``new`` of ``buffer``, each of the last one's result; none where one must copy."""
    chain: list[fx.Node] = []
    key = _compat.storage_key
    made, held = meta.tensor(new), meta.tensor(buffer)
    if (made.stride(), made.storage_offset()) != (held.stride(), held.storage_offset()):
        return []
    while (new := _under(new)) is not buffer:
        if new.op != "call_function" or not (new.target is kernels.written or in_place_form(new) is not None):
            return []
        before, *others = new.all_input_nodes
        made, held = meta.tensor(new), meta.tensor(before)
        lies_on_it = any(key(t) == key(held) for n in others for t in tensors_of(n))
        if before is not new.args[0] or made.stride() != held.stride() or lies_on_it:
            return []
        chain.append(new)
        new = before
    return chain[::-1]


def _under(node: fx.Node) -> fx.Node:
    """What a node is a view of, itself if of nothing."""
    key = _compat.storage_key
    while node.op == "call_function" and node.args and isinstance(before := node.args[0], fx.Node):
        held = meta.value(before)
        if not isinstance(held, torch.Tensor) or key(held) != key(meta.tensor(node)):
            break
        node = before
    return node


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
