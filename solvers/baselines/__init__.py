"""Schedules at once, without search or proof: keep all, recompute all, every block, square root, greedy."""
