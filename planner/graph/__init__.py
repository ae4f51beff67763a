"""From a traced step to ops and storages.

In: ``JointGraph``.  Out: ``TrainingGraph``, ops in execution order and the storages between them.
``passes/`` restate the graph, one file per reason; none changes a number it computes.
"""
