"""The problem, the schedule, the one judge, and what all methods share.

``Problem`` and ``Schedule`` go in, ``simulate`` makes the ``Timeline`` by which every method is judged,
``Solution`` comes out.  Beside them: the incumbent that methods better together, linear programs, and the
emission of recomputations just in time.
"""
