"""Dynamic programming over a chain of blocks with options each, for deep recomputation near the floor."""
