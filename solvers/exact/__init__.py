"""The integer program of Checkmate, for small graphs: optimal, and the judge of everything else.

In: a ``Problem`` and a budget in bytes.  Out: the best plan of a class of schedules with a bound on all, or
the plan of lowest peak with a floor.  Raises ``InfeasibleError`` where it is proved that nothing fits.

``program``  columns and rows, for a class of schedules (``Program``) and below all (``AnyOrder``).
``bursts``   cuts for ``AnyOrder``: reruns of one stage that fit one by one and not together.
``method``   HiGHS for time, CP-SAT for what that leaves open and for the peak; ``solve``, ``minimum_peak``.
"""
