"""Schedules at once, without search or proof.

In: a ``Problem`` and, for greedy, a budget in bytes.  Out: a ``Schedule``.  Raises ``ProblemError`` where a
baseline needs a turn or groups that the problem lacks.

``simple``  keep all, recompute all, every block, square root; and the table ``BASELINES``.
``greedy``  drop what frees most bytes per recomputed second at the peak, until it fits.
"""
