"""``python -m planner``.

In: the words of a command line.  Out: text on stdout, everything else on stderr, an exit code: 0 it held,
1 it did not, 2 it could not run, 130 interrupted.  ``parser`` says what can be asked, ``commands`` does it,
``user_code`` finds the models that are named.  What the user's code raises is shown at the user's line.
"""
