"""What a forward does besides computing: it reads settings, which a graph freezes, and leaves things behind.

:mod:`~planner.capture.state.reads` records what was read while a trace ran, ``watched`` what stood there,
value by value (``node``), and ``bound`` whether it stands there still.  ``effects`` sees and puts back what
the forward left on its modules, ``tensors`` what it put where no graph would; ``second_call`` tells what only
a first call does.
"""
