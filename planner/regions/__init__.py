"""A step in regions: captured pieces in order, with the user's own code between them, under one budget.

    forward -> Dynamo's graphs -> regions -> Record of a step -> Joined graph -> JoinedStep -> Plan

The files, in that order: :mod:`~planner.regions.cut` lets Dynamo cut the forward,
:mod:`~planner.regions.region` captures each piece, :mod:`~planner.regions.record` sees a step run,
:mod:`~planner.regions.joined` makes one graph of it, of which :mod:`~planner.solving.in_regions` makes plans,
:mod:`~planner.regions.runs` runs what was planned.
"""
