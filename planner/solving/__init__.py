"""From a captured, priced step to its plan.

In: ``TrainingGraph``, ``Costs``, what is resident, a budget in bytes.  Out: ``Plan``.  Lowers to
``solvers.Problem``, solves, fits to the allocator, reads the schedule back.  Raises
``InfeasibleBudgetError`` where no plan fits.
"""
