"""From a schedule to the program that runs it.

In: ``TrainingGraph`` and the ops of a schedule in order.  Out: ``Program``, a forward graph that returns the
saved set and the segments of a backward that recomputes.  Raises nothing of its own: a schedule that cannot
be run never comes so far (``solvers.simulate``).

``emit`` replays the schedule into eager's own kernel calls, ``segments`` cuts the backward, ``prune`` leaves
out of it what serves only outputs that got no gradient, ``apart`` hands out gradients one by one that
else are added up, ``bindings`` finds torch's fast bindings of the same ops, ``program`` has the types.
Another generator of code, for a compiler, is a file beside ``emit`` that returns a ``Program``.
"""
