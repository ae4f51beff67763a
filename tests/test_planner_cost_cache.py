"""Measured costs on disk: read back, distrusted, shared; and what a profile does where memory runs out."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

from planner._compat import FakeTensor, FakeTensorMode
from planner.costs import cache as cost_cache
from planner.costs import op_costs as costs_module
from planner.costs import profiler
from planner.costs.believed import SAMPLE, Believed, believed
from planner.costs.cache import VARIABLE, CostCache, Measured, cache_for, folder, key_of
from planner.costs.op_costs import costs_of
from planner.costs.roofline import is_view
from planner.solving.priced import prepare
from tests.test_planner_costs import trace

GPU = {"device": "A made GPU", "torch": "1"}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CostCache:
    """The CPU's measurements go to a file, as a GPU's do, and nothing has been measured yet."""
    cache = CostCache.at(tmp_path / "deep" / "costs", GPU)
    monkeypatch.setattr(costs_module, "_measured", {})
    monkeypatch.setattr(costs_module, "cache_for", lambda device: cache)
    return cache


def another_process(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """Forget what was measured, and note what is measured from now on."""
    seen: list[fx.Node] = []

    def watched(node: fx.Node, device: torch.device) -> Measured:
        seen.append(node)
        return profiler.measure(node, device)

    monkeypatch.setattr(costs_module, "_measured", {})
    monkeypatch.setattr(costs_module, "measure", watched)
    return seen


def graph(width: int = 8) -> list[fx.Node]:
    return list(trace(lambda x: (x @ x).exp().sum(), torch.ones(width, width)).graph.nodes)


def test_the_next_process_measures_only_what_is_new(kept: CostCache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = costs_of(graph(), "profile")
    seen = another_process(monkeypatch)
    again = costs_of(graph(), "profile")
    assert not seen
    assert (again.seconds, again.workspace_bytes) == (first.seconds, first.workspace_bytes)
    assert (again.source, again.estimated) == ("profile", 0)
    costs_of([*graph(9)], "profile")
    assert len(seen) == sum(not is_view(n) for n in graph(9))
    assert len(kept.read()) == len(seen) + first.signatures
    assert [p.suffix for p in kept.path.parent.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"format": "other", "version": 1}',
        json.dumps({"format": "rematplan.costs", "version": 2, "facts": GPU, "costs": {}}),
        json.dumps({"format": "rematplan.costs", "version": 1, "facts": {"device": "B"}, "costs": {}}),
        json.dumps({"format": "rematplan.costs", "version": 1, "facts": GPU, "costs": {"a": [-1.0, 0]}}),
        json.dumps(
            {"format": "rematplan.costs", "version": 1, "facts": GPU, "costs": {"a": [float("nan"), 0]}}
        ),
        json.dumps({"format": "rematplan.costs", "version": 1, "facts": GPU, "costs": {"a": [1.0, -5]}}),
        json.dumps({"format": "rematplan.costs", "version": 1, "facts": GPU, "costs": {"a": [1.0]}}),
        json.dumps({"format": "rematplan.costs", "version": 1, "facts": GPU, "costs": [1]}),
    ],
)
def test_a_foreign_or_broken_file_is_ignored_with_a_line_and_replaced(
    content: str, kept: CostCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept.path.parent.mkdir(parents=True)
    kept.path.write_text(content, encoding="latin-1")
    assert kept.read() == {}
    [line] = caplog.messages
    assert str(kept.path) in line and "ignored" in line
    seen = another_process(monkeypatch)
    costs = costs_of(graph(), "profile")
    assert len(seen) == costs.signatures == len(kept.read())


def test_a_folder_that_cannot_be_written_costs_a_line_and_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = CostCache.at(tmp_path / "file" / "in it", GPU)
    monkeypatch.setattr(costs_module, "cache_for", lambda device: cache)
    monkeypatch.setattr(costs_module, "_measured", {})
    assert costs_of(graph(), "profile").estimated == 0
    assert any("not kept" in line for line in caplog.messages)


def test_many_writers_leave_a_whole_file(tmp_path: Path) -> None:
    cache = CostCache.at(tmp_path, GPU)
    broken: list[str] = []

    def write(first: int) -> None:
        for k in range(10):
            cache.add({f"op {first + k}": Measured(1.0 * k, k)})
            if not isinstance(json.loads(cache.path.read_text())["costs"], dict):
                broken.append("cut")

    writers = [threading.Thread(target=write, args=(100 * t,)) for t in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    cache.add({"the last": Measured(0.5, 7)})
    assert not broken
    assert cache.read()[key_of("the last")] == Measured(0.5, 7)
    assert [*tmp_path.iterdir()] == [cache.path]


def test_each_device_and_each_version_has_a_file_of_its_own(tmp_path: Path) -> None:
    paths = {CostCache.at(tmp_path, GPU | change).path for change in ({}, {"torch": "2"}, {"device": "B"})}
    assert len(paths) == 3
    assert CostCache.at(tmp_path, GPU).path.name.startswith("costs-A-made-GPU-")
    assert key_of("op on cuda:0") == key_of("op on cuda:1") != key_of("op on cpu")


def test_the_folder_is_the_users_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache.sys, "platform", "linux")
    assert folder({"XDG_CACHE_HOME": "/elsewhere"}) == Path("/elsewhere/rematplan")
    monkeypatch.setenv("HOME", "/somebody")
    assert folder({}) == Path("/somebody/.cache/rematplan")
    assert folder({VARIABLE: "/here", "XDG_CACHE_HOME": "/elsewhere"}) == Path("/here")
    for off in ("0", "", "off", "No", "FALSE"):
        assert folder({VARIABLE: off}) is None
    monkeypatch.setattr(cost_cache.sys, "platform", "darwin")
    assert folder({}) == Path("/somebody/Library/Caches/rematplan")
    monkeypatch.setattr(cost_cache.sys, "platform", "win32")
    assert folder({}) is None
    assert folder({"LOCALAPPDATA": "/local"}) == Path("/local/rematplan")


def test_costs_are_kept_for_a_cpu_and_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs"))
    monkeypatch.setattr(costs_module, "_measured", {})
    mine = cache_for(torch.device("cpu"))
    assert mine is not None and mine.is_shared and not mine.path.exists()
    costs = costs_of(graph(), "profile")
    assert len(mine.read()) == costs.signatures
    monkeypatch.setenv("MALLOC_CONF", "narenas:1")  # what chooses memory or kernels has another file
    other = cache_for(torch.device("cpu"))
    assert other is not None and other.path != mine.path
    gpu = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, total_memory=24)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    cache = cache_for(torch.device("cuda"))
    assert cache is not None and not cache.is_shared
    assert cache.path.parent == tmp_path / "costs"
    assert cache.facts["capability"] == "8.9"
    monkeypatch.setenv(VARIABLE, "0")
    assert cache_for(torch.device("cuda")) is None and cache_for(torch.device("cpu")) is None


# --- What is kept of a CPU --------------------------------------------------------------------

THEN = {f"op {k}": Measured(1e-3 + k * 1e-4, 0) for k in range(12)} | {"large": Measured(0.5, 0)}


def now(times: float, off: Mapping[str, float] = MappingProxyType({})) -> Callable[[str], Measured]:
    """A machine on which ops take so many times what they took."""
    return lambda key: Measured(THEN[key].seconds * off.get(key, times), 0)


def test_a_cpu_that_is_as_it_was_is_believed() -> None:
    seen: list[str] = []

    def measured(key: str) -> Measured:
        seen.append(key)
        return now(1.1)(key)

    assert believed(THEN, measured) == Believed(THEN, {})
    assert len({*seen}) == SAMPLE and "large" not in seen
    drawn = [*seen]
    for _ in range(50):
        believed(THEN, measured)
    assert {*seen} == THEN.keys() - {"large"} != {*drawn}  # others each time


@pytest.mark.parametrize("times", [0.5, 0.85, 1.16, 3.0])
def test_a_cpu_that_is_another_or_was_disturbed_is_measured_again(
    times: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="planner"):
        kept, again = believed(THEN, now(times))
    assert not kept and len(again) == SAMPLE
    assert all(cost.seconds == THEN[key].seconds * times for key, cost in again.items())
    assert "measured again" in caplog.text and f"{times:.2f} times" in caplog.text


def test_one_op_that_was_disturbed_is_mended_alone() -> None:
    kept, again = believed(THEN, now(1.0, {"op 3": 0.2}), lambda keys, count: keys[1 : count + 1])
    assert again == {"op 3": Measured(THEN["op 3"].seconds * 0.2, 0)}
    assert kept == {key: cost for key, cost in THEN.items() if key != "op 3"}


def test_what_is_too_little_to_sample_is_measured_again() -> None:
    few = {key: THEN[key] for key in ("op 1", "op 2", "op 3", "op 4")}
    assert not believed(few, now(1.0)).kept
    assert not believed({f"op {k}": Measured(1e-7, 0) for k in range(12)}, now(1.0)).kept
    assert not believed(THEN, lambda key: None).kept  # an op that cannot be measured any more
    large = {key: Measured(0.2, 0) for key in THEN}
    assert believed(large, lambda key: Measured(0.21, 0)).kept == large


def test_a_profile_believes_a_shared_device_by_its_sample(
    kept: CostCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = replace(kept, is_shared=True)
    monkeypatch.setattr(costs_module, "cache_for", lambda device: shared)
    nodes = [node for width in range(8, 14) for node in graph(width)]
    seconds, seen = 1e-3, []

    def measured(node: fx.Node, device: torch.device) -> Measured:
        seen.append(node)
        return Measured(seconds, 0)

    monkeypatch.setattr(costs_module, "measure", measured)
    first = costs_of(nodes, "profile")
    assert len(seen) == first.signatures > SAMPLE
    for seconds, count in ((1.05e-3, SAMPLE), (2e-3, first.signatures), (2.1e-3, SAMPLE)):
        monkeypatch.setattr(costs_module, "_measured", {})
        seen.clear()
        found = costs_of(nodes, "profile")
        assert len(seen) == count and found.estimated == 0
        told = {cost for cost in found.seconds.values() if cost}
        assert told == {2e-3 if seconds > 1.5e-3 else 1e-3}


# --- Operands ---------------------------------------------------------------------------------


def test_sets_of_operands_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x.sum()

    with FakeTensorMode() as mode:
        call_graph = fx.Graph()
        x = call_graph.placeholder("x")
        x.meta["val"] = mode.from_tensor(torch.ones(64))
        call = call_graph.call_function(spy, (x,))
        call.meta["val"] = mode.from_tensor(torch.ones(()))
    monkeypatch.setattr(profiler, "_sets", lambda operand_bytes, device: 3)
    with profiler.undisturbed(torch.device("cpu")):
        profiler.measure(call, torch.device("cpu"))
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:6] or len(seen) < 6  # one after the other


def test_sets_outgrow_the_cache_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20)
    )
    gpu = torch.device("cuda", 0)
    assert profiler._sets(2**30, gpu) == 1  # one set is more than all may take
    assert profiler._sets(200 * 2**20, gpu) == 2
    assert profiler._sets(25 * 2**20, gpu) == 4
    assert profiler._sets(8, gpu) == 8
    assert profiler._sets(0, gpu) == 8
    assert profiler._sets(8, torch.device("cpu")) == 1


def test_out_of_memory_leaves_an_op_to_the_roofline_and_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alive: list[weakref.ref[Any]] = []
    emptied: list[list[bool]] = []

    def exhausted(node: fx.Node, device: torch.device) -> Measured:
        operand = torch.ones(4)
        alive.append(weakref.ref(operand))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(costs_module, "measure", exhausted)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([r() is None for r in alive]))
    [node] = [n for n in graph() if n.target is torch.ops.aten.mm.default]
    with caplog.at_level(logging.WARNING):
        assert costs_module._attempt(node, torch.device("cuda")) is None
    assert emptied == [[True]]  # the operands of the failed call were gone by then
    assert "Tried to allocate 2 GiB" in caplog.text and "more" not in caplog.text
    assert costs_module._attempt(node, torch.device("cpu")) is None
    assert len(emptied) == 1


def test_a_plan_survives_an_op_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(node: fx.Node, device: torch.device) -> Measured:
        if node.target is torch.ops.aten.mm.default:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measured(1e-6, 0)

    monkeypatch.setattr(costs_module, "_measured", {})
    monkeypatch.setattr(costs_module, "measure", large)
    costs = costs_of(graph(), "profile")
    assert costs.estimated == 1
    assert costs.total_seconds > 2e-6


# --- No memory --------------------------------------------------------------------------------


def test_a_model_without_memory_is_priced_on_the_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the caller's FakeTensorMode too: the operands timed are real, one op's at a time."""
    real: list[bool] = []

    def watched(calls: Any, device: torch.device) -> Measured:
        out = calls[0]()
        tensors = [
            t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)
        ]
        real.append(not any(isinstance(t, FakeTensor) for t in tensors))
        return Measured(1e-5, 0)

    monkeypatch.setattr(costs_module, "_measured", {})
    monkeypatch.setattr(profiler, "_timed", watched)
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(16, 2048), nn.GELU(), nn.Linear(2048, 4), nn.Dropout(0.5))
        x = torch.ones(8, 16)
        inside = prepare(model, (x,), costs="profile")
    outside = prepare(model, (x,), costs="profile")
    assert real and all(real)
    assert inside.costs is not None and outside.costs is not None
    assert inside.costs.estimated == 0
    assert inside.costs.seconds == outside.costs.seconds
