"""What each op of a step costs.

In: the ops of a ``TrainingGraph`` and a target.  Out: ``Costs``, seconds, scratch bytes and FLOPs by op:
profiled, or by a roofline.  Raises ``ValueError`` for a source of costs that is not known.
"""
