"""A model's forward, cut by Dynamo into regions, and what is known of how it was cut."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from planner import _compat
from planner.capture.joint_graph import NO_GRADIENT
from planner.capture.module import original_forward
from planner.regions.cut.region import Region, Variant
from planner.regions.cut.torn import torn

__all__ = ["CutForward"]


class _Runs(nn.Module):
    """What runs in the place of a part of a torn graph."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = run


class CutForward(ABC):
    """The forward of ``model``, cut by Dynamo: each call of one of its graphs goes through :meth:`run`.

    ``loops``    which of its functions Dynamo follows into their loops.
    ``regions``  its graphs, as they were met; ``is_torn``: of one of them eager runs a part.
    """

    def __init__(self, model: nn.Module, loops: _compat.Loops | None) -> None:
        self.model, self.loops = model, loops or _compat.Loops()
        self.regions: list[Region] = []
        self.is_torn = False
        self._captures: dict[Any, Variant] = {}  # by structure
        self._before = len(_compat.dynamo_breaks())
        self.original = original_forward(model)
        self._compiled = _compat.cut_by_dynamo(self.original, self._cut)

    @abstractmethod
    def run(self, region: Region, *args: Any) -> Any:
        """A region is called."""

    @abstractmethod
    def cut_anew(self) -> None:
        """A region was met after one was planned as the only one: plans made so far are void."""

    def run_cut(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in regions."""
        with _compat.dynamo_as_eager(), self.loops.asked():
            return self._compiled(*args, **kwargs)

    # -- cutting -----------------------------------------------------------------------------------

    def _cut(self, graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        """What runs in the place of one of Dynamo's graphs."""
        apart = torn(graph)
        if apart is None:
            return functools.partial(self.run, self._region(graph))
        whole, eager = apart
        self.is_torn = True
        for name, part in list(whole.named_children()):
            if isinstance(part, fx.GraphModule) and name.startswith("submod_"):
                run = functools.partial(self.run, self._region(part, eager.get(name, "")))
                setattr(whole, name, _Runs(run))
        forward: Callable[..., Any] = whole.forward
        return forward

    def _region(self, graph: fx.GraphModule, why_eager: str = "") -> Region:
        homes = {id(m): n for n, m in self.model.named_modules()}
        for first in self.regions:
            if first.is_alone:  # no longer
                first.is_alone = False
                first.variants.clear()
                self.cut_anew()
        region = Region(len(self.regions), graph, homes, why_eager, self._captures)
        self.regions.append(region)
        return region

    # -- how it was cut ----------------------------------------------------------------------------

    @property
    def breaks(self) -> list[tuple[str, str]]:
        """Where (file:line) and why the forward was cut, each once."""
        return list(dict.fromkeys(_compat.dynamo_breaks()[self._before :]))

    @property
    def eager_for(self) -> dict[str, list[int]]:
        """Why regions run as eager runs them, though gradients come by there, and which."""
        found: dict[str, list[int]] = {}
        for region in self.regions:
            whys = {variant.why for variant in region.variants.values() if variant.captured is None}
            if region.is_eager:
                whys = {region.why or "a gradient of it is differentiated itself"}
            for why in whys - {NO_GRADIENT, ""}:
                found.setdefault(why, []).append(region.number)
        return found

    @property
    def left_to_eager(self) -> tuple[str, ...]:
        """:attr:`eager_for` in words, a line for each reason."""
        return tuple(
            f"{'regions' if len(of) > 1 else 'region'} {', '.join(map(str, of))}: as eager runs it, for {why}"
            for why, of in self.eager_for.items()
        )

    @property
    def eager(self) -> frozenset[int]:
        """Numbers of the regions that run as eager runs them."""
        return frozenset(region.number for region in self.regions if region.is_eager)

    @property
    def is_all_eager(self) -> bool:
        """Whether each region does."""
        return bool(self.regions) and all(region.is_eager for region in self.regions)
