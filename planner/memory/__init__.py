"""What a step holds.

In: model, optimizer, ``TrainingGraph``.  Out: bytes that are there throughout the step (``Resident``); and,
of a schedule, every copy of every value and the bytes at each of its positions (``Execution``).
"""
