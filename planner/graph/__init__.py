"""From a traced step to ops and storages.

In: ``JointGraph``.  Out: ``TrainingGraph``, ops in execution order and the storages between them, and
``CapturedStep``, that with the model and what the capture depended on.  ``passes/`` restate the graph, one
file per reason; none changes a number it computes, and ``print(normalize(joint))`` shows what each did above
the outcome.  Raises ``TraceError`` where an output or a buffer depends on gradients.
"""
