"""What ``demo`` and ``check-cuda`` measure, and the models they do it on.

In: names of models of the zoo, a device, shares of memory.  Out: rows of what planned steps took beside eager
ones, as a table, and which of them broke a promise.  Plans are judged by :mod:`planner.measure`, never by
their own figures.  Raises ``ValueError`` for settings that make no sense, ``PlannerError`` without the device
asked for.
"""
