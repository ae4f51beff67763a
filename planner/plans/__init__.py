"""A plan as plain data, and its file.

Imports nothing that solves, runs or draws.  Raises ``InvalidPlanFileError`` for a file that is no plan.
"""
