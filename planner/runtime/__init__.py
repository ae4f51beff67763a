"""A program in the place of ``model.forward``.

In: a ``Program``.  Out: a stand-in behind autograd nodes and a guard, programs for batches of other sizes,
and ``verify``, which runs the step with and without it.  Raises ``StalePlanError`` where the call or the
model is not what was planned.
"""
