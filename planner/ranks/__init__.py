"""The processes of one job: a plan that one of them makes for all, and how each fares with its own.

In: plans as text, errors as words.  Out: the same in the other processes, through the job's key-value store,
so that no process waits for one that never comes.  Raises ``PlannerError`` in every process where one of
those that train one sharded model has no plan.
"""
