"""One of Dynamo's graphs, made fit to be planned.

In: a graph as it was cut out of a forward, at each signature that it is called with.  Out: a region
(:mod:`planner.regions.cut.region`) whose variants are captured and priced, and which runs as eager runs it,
or with nothing held, where it is not planned.
"""
