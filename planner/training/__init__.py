"""Trainers: the checkpointing switch of Hugging Face and others means a budget.

In: a model and a budget.  Out: the same model, whose training batches run by plans that are made when a batch
of a new kind comes, and shared by the ranks of a job.  Raises what ``planner.plan`` raises, at that batch.
"""
