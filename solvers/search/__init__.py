"""Betters a schedule: windows of it solved exactly, mending and shaving where it is above the budget.

In: an ``Incumbent`` with a schedule, and a deadline.  Out: better schedules, offered to the incumbent;
nothing is proved.

``template``          a long sequence of slots of which a schedule is a part: a neighbourhood.
``template_program``  the cheapest schedule inside a template, or the one least above the budget.
``local_search``      windows of the best schedule, opened and solved in turn.
``repeats``           where a graph repeats itself: like layers, and what is called what there.
``mend``              windows that are made to fit, where a schedule is above the budget in many places.
``shave``             one value or one burst at a time, where a schedule is a little above the budget.
"""
