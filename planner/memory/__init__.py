"""What a step holds.

In: a captured step, an optimizer, the device planned for.  Out: bytes that are there throughout the step
(``StaticMemory``), and, of a schedule, every copy of every value and the bytes at each of its positions
(``Execution``).  Raises ``TypeError`` or ``ValueError`` for budgets that make no sense, ``PlannerError`` for
an optimizer whose step cannot be run on fake tensors.

``resident`` counts what a step finds and leaves, ``optimizer_state`` what an optimizer takes and
``live_optimizers`` those that hold a model's parameters now; ``static`` adds what comes with the graph
(``footprint``).  ``execution`` plays a schedule through, ``lifetimes`` reads it copy by copy.
"""
