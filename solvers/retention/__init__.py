"""Retention intervals: a fixed order on any DAG, a backward or none.

In: a ``Problem`` and a budget in bytes.  Out: the fastest plan found, ``optimal`` where the bound meets it,
or the one of lowest peak, ``unsettled``.

``program``  the integer program over candidate recomputations.
``method``   prices by its relaxation, then large-neighbourhood search; ``solve``.
``bound``    a lower bound on seconds from a few instants at which keeping everything is too much.
"""
