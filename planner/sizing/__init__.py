"""How large: does a step fit, and how large a batch does.

In: a model, one batch (:mod:`~planner.sizing.estimating`) or a function that makes batches of any size
(:mod:`~planner.sizing.largest`).  Out: ``Estimate``, ``LargestBatch``.  Raises what planning raises, and
``InfeasibleBudgetError`` where not even the smallest batch fits.

    request      what is asked for, checked
    estimating   a capture and a simulation: what the step takes as it is, what no plan goes below
    memoryless   models on the meta device or made of fake tensors, all of them in one mode
    sized        the step at any batch size, from one symbolic trace where sizes can be symbols
    simple       what is known without a search: everything kept, every block checkpointed, the floor
    largest      the search for the largest batch, and for the one of most examples per second
    estimates    what ``estimate`` answers; ``batches``: what ``largest_batch`` does
"""
