"""From a model and one batch to the whole training step as one graph.

In: an ``nn.Module`` and one batch.  Out: ``JointGraph``, forward and backward as one fx graph on tensors
without memory, and ``Expectation``, what that capture depended on.  Raises ``TraceError`` where the step is
not one graph, ``PlannerError`` for what cannot be planned, ``TypeError`` for inputs that do not fit.

What a node carries from here on is in :mod:`planner.capture.meta`; ``print(joint)`` shows Python that runs.
Captures of several threads wait for each other.
"""
