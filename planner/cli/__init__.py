"""``python -m planner``: arguments in, text and an exit code out."""
