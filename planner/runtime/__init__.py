"""A program in the place of ``model.forward``.

In: ``PlanData`` and a ``CapturedStep``.  Out: ``ExecutableStep``, and a stand-in for ``forward`` behind
autograd nodes and a guard; ``verify`` runs the step with and without it.  Raises ``StalePlanError`` where
the call or the model is not what was planned, ``PlannerError`` for a second backward through what the first
one freed and what else no plan can serve.

``build`` makes the step (of a plan from a file by capturing the model again), ``apply`` puts it on a model or
into a GraphModule, ``forward`` and ``autograd`` run it behind ``guard``, ``running`` without autocast, its
errors explained, ``gates`` hand out what it returns, ``variants`` finds or makes the program for a batch
of other sizes, ``output_sets`` for other outputs than foreseen, ``held_outputs`` sees what the caller lets go
of, ``shared_casts`` has what calls in one context of autocast cast once, ``hooks`` keeps those of parameters
without a gradient from being called, ``tracing`` knows when a compiler is looking.
"""
