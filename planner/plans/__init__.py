"""A plan as plain data, and its file.

In: the figures of a schedule that was played through, or a JSON text.  Out: ``PlanData``, ``FrontierData``,
``Outline``.  Imports nothing that solves, runs or draws.  Raises ``InvalidPlanFileError`` for a file that is
no plan, ``PlannerError`` for inputs that no file can describe.

``plan_data`` and ``frontier_data`` are what everybody else reads; ``placements`` says what becomes of each
value, ``outline`` is the step without its code, by which a plan is explained and played again, ``serialize``
is the file, ``within_budget`` what reports of measured steps say of one.
"""
