"""Trainers: the checkpointing switch of Hugging Face and others means a budget.

In: a model and a budget.  Out: the same model, whose training batches run by plans that are made when a batch
of a new kind comes, and shared by the ranks of a job.  Raises what ``planner.plan`` raises, at that batch;
``TypeError`` or ``ValueError`` for arguments that make no sense, at :func:`~planner.training.enable.enable`.

    enable       the front door; ``settings`` checks what it is told, ``huggingface`` knows trainers' names
    switch       the stand-in for the model's forward; ``unplanned`` names what trains without it
    ondemand     a plan at hand, or a new one?  ``calls`` and ``step_calls`` say what comes, ``sharing`` what
                 room it has, ``plan_cache`` what there is, ``making`` makes one, ``as_run`` meters it
    distributed  one plan for several ranks
"""
