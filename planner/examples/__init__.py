"""Training scripts to start from.  Each runs as ``python -m planner.examples.NAME``, without a download."""
