"""The problem, the schedule, the one judge, and what all methods share.

``Problem`` and ``Schedule`` go in, ``simulate`` makes the ``Timeline`` by which every method is judged,
``Solution`` comes out.  Raises ``ProblemError``, ``InvalidScheduleError`` and ``InfeasibleError``.

``problem``, ``schedule``, ``simulate``, ``solution``, ``files``  what goes in, comes out and judges.
``facts``         which values are a choice, and the bytes that no choice changes.
``incumbent``     the best schedule and bound so far, which methods better together.
``just_in_time``  what must run again to have a value, emission just in time, what nobody reads.
``linear``        linear and mixed-integer programs, handed to HiGHS.
``memory_rows``   rows of bytes, made where a solution is over the budget.
"""
