"""What a forward reads besides tensors, and what happens to its plan when that changes.

One model reads a number in every way there is and multiplies them: it is captured once, and each case
changes one of the numbers and puts it back.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planner
from planner.capture.joint_graph import capture
from planner.graph.captured import CapturedStep
from planner.graph.training_graph import training_graph
from planner.runtime.guard import Guard
from planner.solving import priced
from tests import tiny

SCALE = 1.0
TABLE = {"scale": 1.0, "unread": 1.0}
LEVELS = [1.0]


def from_global() -> float:
    return SCALE * TABLE["scale"] * TABLE.get("other", 1.0) * LEVELS[0]


def helper() -> float:
    return 1.0


def replacement() -> float:
    return 2.0


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    unread: float = 1.0
    nested: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"a": [1.0, 1.0]})


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float = 1.0


class Config:
    """As those of transformers: one name stands for another, and some are properties."""

    names: ClassVar = {"factor": "private"}
    shared = 1.0

    def __init__(self) -> None:
        self._scale = 1.0
        self.private = 1.0

    @property
    def scale(self) -> float:
        return self._scale * self.shared

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(Config.names.get(name, name))


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


def closing(value: float) -> Callable[[], float]:
    def read() -> float:
        return value

    return read


class Adapter(nn.Module):
    """As peft's: factors by the name of the adapter, which may be off or merged."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low = nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.scaling = {"a": 1.0, "b": 3.0}
        self._active = ["a"]
        self._disabled = False
        self.merged: list[str] = []
        self.p = {"a": 0.0}

    @property
    def active(self) -> list[str]:
        return self._active

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._disabled or self.merged:
            return y
        for name in self.active:
            y = y + self.low[name](x) * self.scaling[name]
        return y


class Reader(nn.Module):
    width = 1.0  # read through the class
    depth = 1.0  # read through the instance

    def __init__(self) -> None:
        super().__init__()
        self.adapter = Adapter()
        self.last = nn.Linear(4, 2)
        self.list, self.lists = [1.0], [[1.0], [1.0, 1.0]]
        self.stats = {"scale": 1.0, "calls": 0}
        self.objects = {"a": Options()}
        self.options, self.frozen, self.config, self.slotted = Options(), Frozen(), Config(), Slotted()
        self.space = types.SimpleNamespace(scale=1.0, unread=1.0)
        self._private = 1.0
        self.nothing: float | None = None
        self.kind, self.path, self.word = Kind.ONE, pathlib.Path("a"), "a"
        self.counts, self.scalar = np.ones(2), np.float64(1.0)
        self.tensor: Tensor | None = torch.ones(())
        self.tensors = [torch.ones(()), {"a": torch.ones(())}]
        self.empty: Tensor | None = None
        self.function: Callable[[], float] = lambda: 1.0
        self.functions = [helper]
        self.closure = closing(1.0)
        self.partial = functools.partial(float, 1.0)
        self.held = [nn.ReLU()]
        self.register_buffer("unset", None)
        self.unread, self.unread_list = 1.0, [1.0]
        self.unread_object = Options()

    @property
    def threshold(self) -> float:
        return self._private

    def forward(self, x: Tensor) -> Tensor:
        assert self.tensor is not None
        numbers = (
            self.list[0], self.lists[1][0], self.stats["scale"], self.objects["a"].scale, self.options.scale,
            self.options.nested["a"][0], self.frozen.scale, self.config.scale, self.config.factor,
            self.slotted.scale, self.space.scale, self.threshold, self.nothing or 1.0,
            float(self.kind is Kind.ONE), float(str(self.path) == "a"), float(self.word == "a"),
            float(self.counts[0]), float(self.scalar), self.function(), self.functions[0](), self.closure(),
            self.partial(), type(self).width, self.depth, helper(), from_global(),
        )  # fmt: skip
        y = self.held[0](self.adapter(x)) * self.tensor * self.tensors[0] * self.tensors[1]["a"]
        for number in numbers:
            y = y * number
        if self.empty is not None:
            y = y + self.empty
        if self.unset is not None:
            y = y + self.unset
        out: Tensor = self.last(y).square().mean()
        return out


X = torch.ones(3, 4)


class Case:
    """A model, its guard, and how often the model was captured."""

    def __init__(self) -> None:
        self.model: Any = tiny.seeded(Reader)
        joint = capture(self.model, (X,))
        self.guard = Guard(self.model, CapturedStep.of(self.model, joint, training_graph(joint)).expected)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def put(name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    """Set a dotted name of the model; what is returned sets it back."""
    path, _, last = name.rpartition(".")

    def move(model: Any) -> Callable[[], None]:
        owner = functools.reduce(getattr, path.split("."), model) if path else model
        before = getattr(owner, last)
        setattr(owner, last, value)
        return lambda: setattr(owner, last, before)

    return move


def item(find: Callable[[Any], Any], key: Any, value: Any) -> Callable[[Any], Callable[[], None]]:
    """Set an entry of what ``find`` finds; what is returned sets it back."""

    def move(model: Any) -> Callable[[], None]:
        held = find(model)
        missing = isinstance(held, dict) and key not in held
        before = None if missing else held[key]
        held[key] = value

        def back() -> None:
            if missing:
                del held[key]
            else:
                held[key] = before

        return back

    return move


def attribute(owner: Any, name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    def move(_: Any) -> Callable[[], None]:
        before = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, before)

    return move


def global_(name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    return item(lambda _: globals(), name, value)


def merged_list(model: Any) -> Callable[[], None]:
    model.adapter.merged.append("a")
    return model.adapter.merged.clear


def cell(model: Any) -> Callable[[], None]:
    held = model.closure.__closure__[0]
    held.cell_contents = 2.0

    def back() -> None:
        held.cell_contents = 1.0

    return back


def in_dict(model: Any) -> Callable[[], None]:
    model.last.forward = types.MethodType(lambda _, x: x, model.last)

    def back() -> None:
        del model.last.forward

    return back


READ = {
    "a list": (item(lambda m: m.list, 0, 2.0), r"list\[0\]=2.0, .*list\[0\]=1.0"),
    "a list replaced": (put("list", [2.0]), r"list\[0\]=2.0"),
    "an int for a float": (put("list", [1]), r"list\[0\]=1, .*list\[0\]=1.0"),
    "a list of lists": (item(lambda m: m.lists[1], 0, 2.0), r"lists\[1\]\[0\]=2.0"),
    "a list that grew": (item(lambda m: m.lists, slice(2, None), [[1.0]]), "lists="),
    "a dict": (item(lambda m: m.stats, "scale", 2.0), r"stats\['scale'\]=2.0"),
    "an object in a dict": (put("objects", {"a": Options(2.0)}), r"objects\['a'\].scale=2.0"),
    "a dataclass": (put("options.scale", 2.0), "options.scale=2.0, .*options.scale=1.0"),
    "deep in a dataclass": (item(lambda m: m.options.nested["a"], 0, 2.0), r"options.nested\['a'\]\[0\]=2.0"),
    "a frozen dataclass replaced": (put("frozen", Frozen(2.0)), "frozen.scale=2.0"),
    "a private name behind a property": (put("config._scale", 2.0), "config._scale=2.0"),
    "a name that stands for another": (put("config.private", 2.0), "config.factor=2.0"),
    "a constant of a config's class": (attribute(Config, "shared", 2.0), "class Config has shared=2.0"),
    "slots": (put("slotted.scale", 2.0), "slotted.scale=2.0"),
    "a namespace": (put("space.scale", 2.0), "space.scale=2.0"),
    "a private name": (put("_private", 2.0), "the model has _private=2.0"),
    "None, then a number": (put("nothing", 2.0), "nothing=2.0, .*nothing=None"),
    "an enum": (put("kind", Kind.TWO), "kind="),
    "a path": (put("path", pathlib.Path("b")), "path="),
    "a word": (put("word", "b"), "word='b'"),
    "an array of numpy": (item(lambda m: m.counts, 0, 2.0), "counts="),
    "a scalar of numpy": (put("scalar", np.float64(2.0)), "scalar="),
    "a function": (put("function", lambda: 2.0), "function="),
    "a function in a list": (item(lambda m: m.functions, 0, replacement), r"functions\[0\]=replacement"),
    "a closure": (cell, "closure's value=2.0"),
    "a partial function": (put("partial", functools.partial(float, 2.0)), "partial.args"),
    "a tensor": (put("tensor", torch.full((), 2.0)), "tensor=a tensor"),
    "a tensor, then None": (put("tensor", None), "tensor=None"),
    "a tensor in a list": (item(lambda m: m.tensors, 0, torch.zeros(())), r"tensors\[0\]=a tensor"),
    "a tensor in a dict": (item(lambda m: m.tensors[1], "a", torch.zeros(())), r"tensors\[1\]\['a'\]="),
    "None, then a tensor": (put("empty", torch.ones(())), "empty=a tensor .*empty=None"),
    "a buffer that was None": (put("unset", torch.ones(())), "unset=a tensor .*unset=None"),
    "a module in a list": (item(lambda m: m.held, 0, nn.Tanh()), r"held\[0\]="),
    "a constant of the class": (attribute(Reader, "width", 2.0), "class Reader has width=2.0"),
    "a class's constant on the instance": (item(vars, "depth", 2.0), "depth=2.0, .*depth=1.0"),
    "a global": (global_("SCALE", 2.0), "module .*stale_reads has SCALE=2.0"),
    "a global dict": (item(lambda _: TABLE, "scale", 2.0), r"TABLE\['scale'\]=2.0"),
    "a key that was not there": (item(lambda _: TABLE, "other", 2.0), r"TABLE\['other'\]=2.0"),
    "a global list": (item(lambda _: LEVELS, 0, 2.0), r"LEVELS\[0\]=2.0"),
    "a global function": (global_("helper", replacement), "helper=replacement"),
    "a submodule's forward": (in_dict, "last has forward="),
    "an adapter's scale": (item(lambda m: m.adapter.scaling, "a", 2.0), r"adapter has scaling\['a'\]=2.0"),
    "another adapter": (put("adapter._active", ["b"]), r"adapter has _active\[0\]='b'"),
    "adapters off": (put("adapter._disabled", True), "adapter has _disabled=True"),
    "a merged adapter": (merged_list, "adapter has merged="),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_was_read_and_changes_is_named(case: Case, kind: str) -> None:
    move, said = READ[kind]
    case.guard.check_modules()
    back = move(case.model)
    try:
        with pytest.raises(planner.StalePlanError, match=said):
            case.guard.check_modules()
    finally:
        back()
    case.guard.check_modules()


UNREAD = {
    "a counter": put("calls", 1),
    "an attribute": put("unread", 2.0),
    "a list": item(lambda m: m.unread_list, 0, 2.0),
    "an object": put("unread_object.scale", 2.0),
    "of an object that is read": put("options.unread", 2.0),
    "of a namespace that is read": put("space.unread", 2.0),
    "a counter beside a number": item(lambda m: m.stats, "calls", 1),
    "a key of a dict": item(lambda m: m.stats, "new", 1),
    "a key of a global": item(lambda _: TABLE, "unread", 2.0),
    "an adapter's rate that is not used": put("adapter.p", {"a": 0.5}),
    "an attribute of a submodule": item(lambda m: vars(m.last), "unread", 2.0),
    "a list replaced by an equal one": put("list", [1.0]),
    "an object by an equal one": put("options", Options()),
    "a scalar by an equal one": put("scalar", np.float64(1.0)),
    "a closure by an equal one": put("closure", closing(1.0)),
    "a tensor written in place": lambda m: (m.tensor.fill_(2.0), lambda: m.tensor.fill_(1.0))[1],
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_was_not_read_may_change(case: Case, kind: str) -> None:
    case.model.calls = 0
    case.guard.check_modules()
    back = UNREAD[kind](case.model)
    try:
        case.guard.check_modules()
    finally:
        back()


def test_a_copy_has_its_own() -> None:
    model: Any = tiny.seeded(Reader)
    plan = tiny.planned(model, (X,))
    plan.apply()
    twin = copy.deepcopy(model)
    expected = model(X)
    assert torch.equal(twin(X), expected)
    twin.options.scale = 2.0
    with pytest.raises(planner.StalePlanError, match=r"options\.scale=2\.0"):
        twin(X)
    assert torch.equal(model(X), expected)


# -- under the switch -----------------------------------------------------------------------------------


class Scheduled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rate, self.calls = nn.Linear(4, 2), [1.0], 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.layer(x) * self.rate[0]).square().mean()
        return out


def test_settings_that_come_back_have_their_plans_and_ever_new_ones_are_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny.seeded(Scheduled)
    twin: Any = copy.deepcopy(model)
    planner.enable(model, budget_gb=1, costs="roofline")
    model.gradient_checkpointing_enable()
    captures = []
    monkeypatch.setattr(priced, "capture", lambda *a, **k: captures.append(a) or capture(*a, **k))
    made = []
    with caplog.at_level(logging.INFO, logger="planner"):
        for rate in (1.0, 0.5, 1.0, 0.5, 0.25, 1.0, 0.1, 0.2):
            model.calls += 1  # nobody reads it
            model.rate[0] = twin.rate[0] = rate
            loss, expected = model(X), twin(X)
            loss.backward(), expected.backward()
            assert torch.equal(loss, expected)
            assert torch.equal(model.layer.weight.grad, twin.layer.weight.grad)
            made.append(len(captures))
    assert [after - made[0] for after in made] == [0, 1, 1, 1, 2, 2, 3, 4]
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "rate[0] of the model changes" in warned[0] and "register_buffer('rate'" in warned[0]


# -- what the forward itself writes ---------------------------------------------------------------------


@functools.cache
def remembered(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


GRIDS: dict[str, Tensor] = {}
GRID: Tensor | None = None


class Caching(nn.Module):
    """Fills caches of constants at its first call, in all kinds of places."""

    of_class: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.arange(4.0))
        self.grid: Any = None
        self.tables: dict[Any, Any] = {"deep": [None]}
        self.held = types.SimpleNamespace(grid=None)
        self.listed: list[Tensor] = []
        self.length = 0

    @functools.cached_property
    def once(self) -> Tensor:
        return torch.linspace(0, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        global GRID
        if self.grid is None:
            self.grid = (torch.linspace(0, 1, 4), 3)
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.linspace(0, 1, 4)
        if self.tables["deep"][0] is None:
            self.tables["deep"][0] = torch.linspace(0, 1, 4)
        if self.held.grid is None:
            self.held.grid = torch.linspace(0, 1, 4)
        if not self.listed:
            self.listed.append(torch.linspace(0, 1, 4))
        if len(x) > self.length:  # a rotary embedding's table
            self.length = len(x)
            self.cosines = (torch.arange(self.length)[:, None] * self.frequencies).cos()
        if "grid" not in GRIDS:
            GRIDS["grid"] = torch.linspace(0, 1, 4)
        if GRID is None:
            GRID = torch.linspace(0, 1, 4)
        if Caching.of_class is None:
            Caching.of_class = torch.linspace(0, 1, 4)
        y = self.layer(x) + self.grid[0] + self.tables[x.shape] + self.tables["deep"][0] + self.held.grid
        y = y + self.listed[0] + self.cosines[: len(x)] + GRIDS["grid"] + GRID + Caching.of_class
        out: Tensor = y + self.once + remembered(4)
        return out


def forget() -> None:
    global GRID
    GRID = Caching.of_class = None
    GRIDS.clear()
    remembered.cache_clear()


@pytest.mark.parametrize("called", [False, True])
def test_caches_of_constants_are_as_eager_and_nothing_of_the_trace_stays(called: bool) -> None:
    forget()
    model: Any = tiny.seeded(Caching)
    if called:
        model(X)
    before = {name: copy.deepcopy(value) for name, value in vars(model).items() if name[0] != "_"}
    plan = tiny.planned(model, (X,))
    assert repr({name: value for name, value in vars(model).items() if name[0] != "_"}) == repr(before)
    assert (GRID is None, "grid" in GRIDS, Caching.of_class is None) == (not called, called, not called)
    plan.apply()
    first = model(X)
    model.eval()
    model(X)  # fills what is empty, for real
    if called:
        model.tables[5, 4] = torch.linspace(0, 1, 4)
    else:
        model(torch.ones(5, 4))
    model.train()
    second = model(X)
    plan.restore()
    expected = model(X)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert type(remembered(4)) is Tensor
    forget()


class Storing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind
        self.seen: dict[str, Any] = {"calls": 0}
        self.sizes: list[int] = []
        self.modes: dict[bool, int] = {}
        self.loose = torch.ones(4, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.kind == "first batch" and "first" not in self.seen:
            self.seen["first"] = x.mean()
        if self.kind == "drawn" and "first" not in self.seen:
            self.seen["first"] = torch.rand(4)
        if self.kind == "last":
            self.seen["last"] = y
        if self.kind == "counted":
            self.seen["calls"] += 1
        if self.kind == "listed":
            self.sizes.append(len(x))
            self.modes[self.training] = len(x)  # a cache: it does not grow on
        if self.kind == "loose":
            y = y * self.loose
        return y


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("first batch", r"seen\['first'\].*call the model once before planning"),
        ("drawn", r"seen\['first'\]"),
        ("last", r"seen\['last'\]"),
        ("counted", r"counts in seen\['calls'\]"),
        ("listed", r"adds to lists or counts in sizes;"),
        ("loose", "requires grad and is no parameter"),
    ],
)
def test_what_a_plan_would_lose_is_refused(kind: str, said: str) -> None:
    model: Any = tiny.seeded(lambda: Storing(kind))
    with pytest.raises(planner.TraceError, match=said):
        capture(model, (X,))
    assert (model.seen, model.sizes, model.modes) == ({"calls": 0}, [], {})


# -- where tensors lie ----------------------------------------------------------------------------------


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("asked", torch.ones(12)[:8])
        self.register_buffer("not_asked", torch.ones(12)[:8])

    def forward(self, x: Tensor) -> Tensor:
        taken = torch.as_strided(self.asked, (4,), (2,), self.asked.storage_offset())
        out: Tensor = self.layer(x) * taken + self.not_asked[:4]
        return out


def test_a_place_in_a_storage_matters_where_it_was_asked_for() -> None:
    model: Any = tiny.seeded(Placed)
    plan = tiny.planned(model, (X,))
    plan.apply()
    model.not_asked = torch.arange(12.0)[4:]
    x = torch.arange(20.0).view(5, 4)[2:]
    planned = model(x)
    plan.restore()
    assert torch.equal(planned, model(x))
    plan.apply()
    model.asked = torch.arange(12.0)[4:]
    with pytest.raises(
        planner.StalePlanError, match=r"asked was .* 0 elements into .* is .* 4 elements into"
    ):
        model(x)


class FromNumpy(nn.Module):
    """Reads tensors that it neither computes nor registers, through numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scales = torch.full((4,), 2.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * float(np.asarray(self.scales)[1]) + self.scales.numpy().max()).sum()


def test_numbers_read_through_numpy_are_those_of_eager_until_they_change() -> None:
    model, x = tiny.seeded(FromNumpy), torch.ones(2, 4)
    plan = planner.plan(model, 1, (x,), costs="roofline")
    assert plan.verify().equal
    plan.apply()
    model(x)
    model.scales[1] = 3
    with pytest.raises(planner.StalePlanError, match="scales"):
        model(x)


class Powers(nn.Module):
    """Asks a cache that has no name, since what it caches is a partial."""

    cached = functools.lru_cache(functools.partial(pow, 2))

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * type(self).cached(3)


def test_a_cache_without_a_name_is_followed() -> None:
    assert tiny.planned(Powers(), (torch.randn(2, 4),)).verify().equal
