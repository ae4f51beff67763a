"""How a plan is looked at: text, tables, HTML, pictures, explanations, PyTorch's memory viewer.

Everything here reads a ``Plan`` and changes nothing.  ``outline`` is the step in outline, from which other
choices are simulated; ``layers`` and ``bands`` count by module and by kind; ``display`` writes text, tables
and HTML; ``canvas``, ``plots``, ``depth`` and ``block`` draw; ``explain``, ``diff`` and ``snapshot`` say why,
what differs, and what a memory viewer shows.
"""
