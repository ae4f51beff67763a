"""A model under FSDP2, planned for a cluster from a machine that has none of it.

In: a model (built under FakeTensorMode, if it is large), a batch, and a description of how it is to be
sharded (:class:`Sharding`).  Out: a step of one rank (:func:`sharded_step`), whose plans say what a budget
costs there, beside every-block checkpointing under the same accounting, and which micro-batch fits
(:func:`largest_micro_batch`).  No process group is made.  Raises ``PlannerError`` for a model that is no
stack of blocks.

    Sharding -> pieces (embedding, one block of each kind, head and loss) -> Record -> Joined -> plans

What FSDP2 holds and when (:mod:`planner.sharded.sharding`) is that of torch's own code, in the order in which
the host runs it, which is the order in which the allocator is asked.
"""

from planner.sharded.sharding import Sharding
from planner.sharded.step import ShardedStep, largest_micro_batch, sharded_step

__all__ = ["ShardedStep", "Sharding", "largest_micro_batch", "sharded_step"]
