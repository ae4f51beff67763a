"""The staged retention program: what is resident when each stage of the backward starts.

In: a ``Problem`` with a turn, and a budget in bytes.  Out: rounded relaxations, bettered by local search,
with the bound of ``solvers.bounds``; ``unsettled`` where none fits.  Raises ``ProblemError`` without a turn
or a backward.

``stages``   the backward cut into stages, what may run again in each, and in which order.
``program``  the integer program over them.
``orders``   from a choice to a sequence of steps.
``method``   several cuts relaxed, rounded and offered; ``solve``.
"""
