"""The loss of a step in chunks of tokens: logits, their softmax and its gradient never exist whole.

In: the draft of a joint graph, and a number of chunks.  Out: the same draft, in which the last product and
all that follows it row by row, forward and backward, runs for some rows after the other.  It is found by what
each call does with rows (:mod:`~planner.graph.chunks.rows`, :mod:`~planner.graph.chunks.rules`), never by a
model's or a loss's name (:mod:`~planner.graph.chunks.region`), and written as ordinary calls of aten
(:mod:`~planner.graph.chunks.write`), over the rows once or more often (:mod:`~planner.graph.chunks.passes`).
What is no call on rows is first restated as one where it can be: products of einsum
(:mod:`~planner.graph.chunks.products`), losses over the second dim (:mod:`~planner.graph.chunks.turned`), and
softmaxes along columns (:mod:`~planner.graph.chunks.columns`).  So schedules, bytes, seconds and generated
code of a chunked step are those of any other.  Raises :class:`~planner.graph.chunks.region.NotInRows`, which
names the call in the way.
"""
