"""What is known of a device.

Rates from data sheets, its memory now, what cuBLAS keeps for itself, how the caching allocator hands memory
out.  Only ``state`` asks the device.
"""
