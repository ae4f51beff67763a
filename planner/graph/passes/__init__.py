"""Restatements of a traced step, each with its reason; none changes a number that the step computes."""
