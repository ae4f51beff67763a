"""From a captured, priced step to its plan.

In: ``CapturedStep``, ``Costs``, ``StaticMemory``, a budget in bytes, a ``Search``.  Out: ``Plan``,
``Frontier``. Raises ``InfeasibleBudgetError`` where no plan fits, ``PlannerError`` for a search that was
stopped before one was found and for a measured step that does not fit.

``priced`` is the step with its costs, from which any number of plans are made; ``lowering`` states it as a
``solvers.Problem``; ``fit`` solves until the execution fits, the allocator's slack included, and answers with
what was found and what was proved (``Answer``); ``calibrate`` runs the planned step and plans again.
"""
