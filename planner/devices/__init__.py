"""What is known of a device.

In: a ``torch.device``, or a device's name.  Out: its rates from data sheets (``rates``), its memory now
(``state``), what cuBLAS keeps for itself (``cublas``), what the caching allocator hands out for a step
(``allocator``).  Only ``state`` asks the device.  Raises ``PlannerError`` for one that torch cannot reach.
"""
