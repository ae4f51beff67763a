"""What the calls of the step that runs show, and which plan it is of so far.

In: the calls of regions as they come, and the plans there are.  Out: what each call gave and took
(:mod:`~planner.regions.steps.seen`), which of its outputs get gradients
(:mod:`~planner.regions.steps.came`, :mod:`~planner.regions.steps.within`), and what it is planned to run
(:mod:`~planner.regions.steps.followed`).  Runs nothing itself.
"""
