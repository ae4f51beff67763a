"""Kernels as eager chooses them, while a step is captured.

Each file puts something in the tracer's way for the time of a capture, so that the graph calls what an eager
step would: recurrent layers, a CUDA device's attention kernels, the path that a batch's values choose.
"""
