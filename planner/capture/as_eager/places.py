"""Lines of the user's code, as messages name them.

What is torch's, ours (but for the models of our checks and examples) or one of the helpers of Python that
stand between a caller and a call is none of it.
"""

from __future__ import annotations

import linecache
import threading
from types import FrameType

__all__ = ["is_ours", "is_users", "line_of", "users_frame", "users_place"]

_OURS = __name__.split(".", maxsplit=1)[0]
_OUR_MODELS = (f"{_OURS}.checks", f"{_OURS}.examples")
_BETWEEN = frozenset(
    {"abc", "_collections_abc", "contextlib", "functools", "random", "numpy", "secrets", "torch", "uuid"}
)
# What they do is nobody's line (others of torch._dynamo only pass a call on, where it is disabled).
_TRACERS = ("torch._dynamo.convert_frame", "torch._dynamo.utils", "torch._functorch.aot_autograd")


def line_of(frame: FrameType, line: int) -> str:
    """``file:line (code)``."""
    path = frame.f_code.co_filename
    source = linecache.getline(path, line).strip()
    return f"{path}:{line} ({source})" if source else f"{path}:{line}"


def is_ours(module: str) -> bool:
    """Whether a module of this name is the planner's own work."""
    return module.split(".", maxsplit=1)[0] == _OURS and not module.startswith(_OUR_MODELS)


def is_users(frame: FrameType) -> bool:
    """Whether the frame runs a line that its user can change, or ask its author to."""
    module = str(frame.f_globals.get("__name__", ""))
    return module.split(".", maxsplit=1)[0] not in _BETWEEN and not is_ours(module)


def users_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost of the user's frames from ``frame`` outwards; ``None``: ours or a tracer's come first.

    What the tracer does for itself has such frames between it and the user's.
    """
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if is_ours(module) or module.startswith(_TRACERS):
            return None
        if is_users(frame):
            return frame
        frame = frame.f_back
    return None


def users_place(frame: FrameType | None, thread: int | None = None) -> str | None:
    """The line of :func:`users_frame`; ``None`` in another thread than ``thread``, if that is given."""
    if thread is not None and threading.get_ident() != thread:
        return None
    found = users_frame(frame)
    return None if found is None else line_of(found, found.f_lineno)
