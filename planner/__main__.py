"""``python -m planner``, installed as ``rematplan``: plan, look, verify, compare, from a command line.

Results go to stdout and nothing else does; progress, notes and errors go to stderr.

Exit codes: 0 it held; 1 it did not (a budget that no plan fits, a step that is not what the plan says);
2 it could not run (bad arguments, the user's code failing, a file that is no plan, a package or a GPU
missing); 130 interrupted.  Ctrl-C while a plan is being searched for ends the search, not the command.
"""

from __future__ import annotations

import sys

from planner.cli.run import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
