"""From a schedule to the program that runs it.

In: ``TrainingGraph`` and the ops of a schedule in order.  Out: ``Program``, a forward graph that returns the
saved set and the segments of a backward that recomputes.
"""
