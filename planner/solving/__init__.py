"""From a captured, priced step to its plan.

In: ``CapturedStep``, ``Costs``, ``StaticMemory``, a budget in bytes, a ``Search``.  Out: ``Plan``,
``Frontier``. Raises ``InfeasibleBudgetError`` where no plan fits, ``PlannerError`` for a search that was
stopped before one was found and for a measured step that does not fit.

``request`` is what is asked for, checked; ``priced`` the step of one graph with its costs, ``in_regions`` one
in regions, from which any number of plans are made, as ``budgeted`` says of both; ``fit`` solves until the
execution fits, the allocator's slack included, and answers with what was found and what was proved
(``Answer``); ``kept`` leaves that for the next process; ``calibrate`` runs the planned step and plans again;
``better`` goes on searching beside the training.  ``chunked`` cuts the loss of a step, ``in_backward`` has
its parameters step in the backward, ``sizes`` plans it at several sizes.
"""
