"""What no schedule can beat, in bytes or in seconds.

In: a ``Problem`` and, for time, a budget in bytes.  Out: a floor of the peak or a bound on total seconds, and
schedules met on the way.  All bounds hold of every schedule whose first executions keep the problem's order.
Nothing fits a budget: ``time_bound`` answers ``inf``, ``refine.solve`` raises ``InfeasibleError``.

``lower_bounds``  the front: ``peak_floor`` at once, ``proved_floor`` and ``time_bound`` as long as they may.
``instants``      the integer program over a few instants of the run, below every schedule.
``refine``        where to put the instants: solve, run the answer, add the instant where it overflows.
``pebbling``      floors of the peak from all that may happen in a short window of the run.
"""
