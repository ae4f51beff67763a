"""Dynamic programming over a chain of blocks with options each, for deep recomputation near the floor.

In: a ``Problem`` with a turn, and a budget in bytes.  Out: the fastest plan of the table that truly fits, or
the one of lowest peak, ``unsettled``; its bound is the trivial one.  Raises ``ProblemError`` where there is
no turn, no backward, or nothing to cut.

``blocks``      where to cut, what crosses each cut, and what an option of a run of blocks takes.
``saved_sets``  which inner values of a block to save, for every price of a byte: minimum cuts.
``method``      the table over slots of memory, plans read from it, ``solve``.
"""
