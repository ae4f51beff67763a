"""How a model is sharded, and what FSDP2 then holds beside the step's own tensors, glue by glue.

Between what the forward and backward of the blocks make, FSDP2 (torch 2.13) allocates and lets go of, in
order of the host's calls:

* before a block's forward: the buffer that its parameters are gathered into; then the buffer of the block
  before goes; then the gathered parameters, which are copied out of it.  The buffer stays until the next
  block has its own.
* behind the forward: the gathered parameters go (``reshard_after_forward``), those of the root stay.
* before its backward: gathered parameters are copied out, their buffer goes, and that of the block before is
  gathered ahead.
* behind its backward: the gathered parameters go, then the buffer of the last reduce-scatter, then this one's
  is filled with the gradients, which go; the rank's share of the sum stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Group", "Held", "Sharding", "held_beside"]


@dataclass(frozen=True)
class Sharding:
    """``fully_shard`` of each block and of the root, over ``ranks`` ranks.

    ``blocks``                 path of the list of blocks ("model.layers").
    ``reshard_after_forward``  of the blocks; the root's parameters stay gathered, as in torch.
    ``param_dtype``, ``reduce_dtype``  of ``MixedPrecisionPolicy``; ``None``: the parameters' own.

    Raises ``ValueError`` for fewer than two ranks.
    """

    ranks: int
    blocks: str
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = torch.bfloat16
    reduce_dtype: torch.dtype | None = torch.float32

    def __post_init__(self) -> None:
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 2:
            raise ValueError(f"ranks must be a whole number from 2 up, not {self.ranks!r}")

    def __str__(self) -> str:
        dtypes = f"{_name(self.param_dtype)} gathered, {_name(self.reduce_dtype)} reduced"
        after = "resharded" if self.reshard_after_forward else "not resharded"
        return f"FSDP2 over {self.ranks} ranks, blocks of {self.blocks} {after} after the forward, {dtypes}"


def _name(dtype: torch.dtype | None) -> str:
    return "the parameters' dtype" if dtype is None else str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together: of one block, or the root's own.

    ``gathered_bytes``  of them whole, as the forward reads them.
    ``buffer_bytes``    of what they are gathered into.
    ``shard_bytes``     of a rank's share, as the optimizer has it; ``cast_bytes``: of that share, cast.
    ``reduced_bytes``   of the buffer that gradients are reduced from; ``sum_bytes``: of a rank's share of it.
    ``gradient_bytes``  of a rank's gradients as the optimizer has them.
    """

    gathered_bytes: int
    buffer_bytes: int
    shard_bytes: int
    cast_bytes: int
    reduced_bytes: int
    sum_bytes: int
    gradient_bytes: int

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], sharding: Sharding) -> Group:
        """Those of ``parameters``, whole ones as the model has them."""
        ranks = sharding.ranks
        gathered = buffer = shard = cast = reduced = total = gradient = 0
        for p in parameters:
            whole = p.numel()
            rows = p.shape[0] if p.dim() else 1
            share = math.ceil(rows / ranks) * (whole // max(1, rows))  # padded to equal shares of the rows
            there = (sharding.param_dtype or p.dtype).itemsize
            back = (sharding.reduce_dtype or sharding.param_dtype or p.dtype).itemsize
            gathered += whole * there
            buffer += share * ranks * there
            shard += share * p.element_size()
            cast += share * there if there != p.element_size() else 0
            if p.requires_grad:
                reduced += share * ranks * back
                total += share * back
                gradient += share * p.element_size()
        return cls(gathered, buffer, shard, cast, reduced, total, gradient)


@dataclass(frozen=True)
class Held:
    """What FSDP2 holds at one glue.

    ``behind_bytes``  from there to the next glue; ``peak_bytes``: most within it.
    ``reducing_bytes``  most within it while the gradients that the backward before it made are there.
    """

    behind_bytes: int
    peak_bytes: int
    reducing_bytes: int = 0


def held_beside(root: Group, blocks: Sequence[Group], sharding: Sharding) -> list[Held]:
    """At each glue of a step: before the embedding, before each block, before the head, before its backward,
    before each block's backward in reverse, before the embedding's, and at the end.
    """
    stays = not sharding.reshard_after_forward
    whole, found = root.gathered_bytes, [Held(root.gathered_bytes + root.buffer_bytes, 0)]
    buffer, kept = root.buffer_bytes, 0
    for block in blocks:
        ahead = whole + kept + buffer + block.buffer_bytes + block.cast_bytes
        behind = whole + kept + block.buffer_bytes + block.gathered_bytes
        found.append(Held(behind, max(ahead, behind)))
        buffer, kept = block.buffer_bytes, kept + (block.gathered_bytes if stays else 0)
    found.append(Held(whole + kept + buffer, 0))
    last = 0 if stays or not blocks else blocks[-1].buffer_bytes  # gathered ahead of its backward
    cast = 0 if stays or not blocks else blocks[-1].cast_bytes
    found.append(Held(whole + kept + last, whole + kept + last + cast))
    reducing = summed = 0
    before: Group | None = None
    for k in range(len(blocks) - 1, -1, -1):
        block, ahead_of = blocks[k], blocks[k - 1] if k else None
        arrives = 0 if stays else block.buffer_bytes
        reduced, summed, reducing = _reduced(before, whole + kept + arrives, reducing, summed)
        own = whole + kept + reducing + summed
        if not stays:
            own += block.gathered_bytes
        next_bytes = 0 if stays or ahead_of is None else ahead_of.buffer_bytes
        cast = 0 if stays or ahead_of is None else ahead_of.cast_bytes
        found.append(Held(own + next_bytes, own + max(arrives, next_bytes + cast), reduced))
        kept -= block.gathered_bytes if stays else 0
        before = block
    reduced, summed, reducing = _reduced(before, whole, reducing, summed)
    found.append(Held(whole + reducing + summed, 0, reduced))
    reduced, summed, _ = _reduced(root, 0, reducing, summed)
    found.append(Held(summed, 0, reduced))
    return found


def _reduced(group: Group | None, there: int, buffer: int, summed: int) -> tuple[int, int, int]:
    """Most bytes while a group's gradients are reduced; what is summed then; the buffer that stays.

    The buffer of the last reduction goes first; what is summed in another dtype than the parameters' is cast.
    """
    if group is None:
        return 0, summed, buffer
    cast = group.gradient_bytes if group.gradient_bytes != group.sum_bytes else 0
    peak = there + summed + group.reduced_bytes + group.sum_bytes + cast
    return peak, summed + group.gradient_bytes, group.reduced_bytes
