"""A step compiled by inductor: what crosses from its forward to its backward is the plan's.

In: a model and one batch.  Out: a plan, judged by what the generated code allocates, and a forward that
trains so.  Dynamo cuts and guards, AOTAutograd differentiates, inductor compiles; here is only chosen what
the forward keeps, what the backward computes again, and in which order.
"""
