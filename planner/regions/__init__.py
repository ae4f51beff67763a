"""A step in regions: captured pieces in order, with the user's own code between them, under one budget.

In: a model whose step is not one graph, and steps of it that run.  Out: ``Record`` of a step, the ``Joined``
graph of it, and a forward that runs as a plan of that says.  Raises ``PlannerError`` where there is no region
to plan or nothing to run, ``StalePlanError`` for a plan of another step.

    forward -> Dynamo's graphs -> Region, Variant -> Record -> Joined -> (planner.solving.in_regions) -> Plan

In that order: ``cut_forward`` has the forward cut, ``cut/torn`` tears out of a graph of Dynamo's what eager
must run, ``cut/numbers`` what is computed of Python's numbers, ``cut/piece`` makes a module of the rest,
``cut/spread`` has of tensors that are spread over ranks what is here, ``cut/region`` captures it at each
signature that it is called with, ``session`` runs the calls of a step and ``pending`` their backwards,
``steps`` tells which plan the step is of and what gets gradients,
``recorder`` sees them run, ``record`` is what was seen, ``join`` makes one graph of it, ``joined`` is that,
and parts its schedules again, ``observe`` runs a step as if it had not been, ``forward`` stands in for the
model's.

Dynamo (Ansel et al., "PyTorch 2", ASPLOS 2024, https://doi.org/10.1145/3620665.3640366) cuts and guards; what
is saved and recomputed within a piece is decided here, for all pieces at once.
"""
