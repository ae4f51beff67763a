"""An enabled model in people's hands: edited, interrupted, out of memory.  It stays usable, and says why."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import planner
from tests import tiny
from tests.hf import FAST
from tests.signals import HEARD, IGNORING, ctrl_c_heard

INPUTS = tiny.batch(64, labels=True)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model that trains as planned, with recomputation, and its twin that does not."""
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    settings = {**FAST, "solver": "recompute_all", **options}
    planner.enable(model, 1.0, **settings, now=True)
    assert_equal(model, twin)
    plan = planner.plan_of(model)
    assert plan is not None and plan.recompute_flops > 0
    return model, twin


def assert_equal(model: nn.Module, twin: nn.Module) -> None:
    """The next two steps, gradients added up, are the same."""
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))


# -- the model edited after planning --------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter beside a frozen layer."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.full((rank, layer.in_features), 0.01))
        self.up = nn.Parameter(torch.full((layer.out_features, rank), 0.02))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.down.T @ self.up.T
        return out


def replaced(model: Any) -> None:
    model.last = tiny.seeded(lambda: nn.Linear(16, 4), seed=7)


def adapted(model: Any) -> None:
    model.second = LowRank(model.second)


def frozen(model: Any) -> None:
    model.first.requires_grad_(False)


def less_dropout(model: Any) -> None:
    model.drop.p = 0.1


def without_dropout(model: Any) -> None:
    model.drop.eval()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (replaced, "'last' was replaced"),
        (adapted, "second|added or removed|replaced"),
        (frozen, "first.weight was .*requires_grad=True.* and is .*requires_grad=False"),
        (less_dropout, "drop has p=0.1, the plan was made with p=0.3"),
        (without_dropout, "drop has training=False"),
    ],
)
def test_an_edited_model_is_planned_again(
    edit: Callable[[nn.Module], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = pair()
    before = planner.plan_of(model)
    edit(model), edit(twin)
    with caplog.at_level(logging.INFO, logger="planner"):
        assert_equal(model, twin)
    said = [r.message for r in caplog.records if "planned again" in r.message]
    assert len(said) == 1
    assert re.search(reason, said[0])
    assert planner.plan_of(model) is not before


def test_a_budget_changed_after_an_edit() -> None:
    model, twin = pair()
    frozen(model), frozen(twin)
    model.gradient_checkpointing_enable({"budget_gb": 2.0})
    assert_equal(model, twin)
    plan = planner.plan_of(model)
    assert plan is not None and plan.budget_bytes == 2 * 10**9


def test_a_hook_below_is_refused_and_the_model_goes_on_without_it() -> None:
    model, twin = pair()
    handle = model.second.register_forward_hook(lambda *_: None)
    with pytest.raises(planner.PlannerError, match="second has a hook"):
        model(**INPUTS)
    handle.remove()
    assert_equal(model, twin)


# -- a step broken off ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        (lambda _: (_ for _ in ()).throw(ZeroDivisionError("a hook failed")), ZeroDivisionError),
        (lambda _: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
    ],
)
def test_broken_off_in_the_middle_of_the_backward(
    fails: Callable[[Tensor], None], error: type[BaseException]
) -> None:
    model, twin = pair()
    handle = model.second.weight.register_hook(fails)
    loss = model(**INPUTS)
    with pytest.raises(error), ctrl_c_heard():
        loss.backward()
    assert model.last.weight.grad is not None and model.first.weight.grad is None  # it was the middle
    with pytest.raises(planner.PlannerError, match=r"second backward.*Run the forward again"):
        loss.backward()
    handle.remove()
    assert_equal(model, twin)


def test_ctrl_c_is_still_pythons_after_the_solvers_ran() -> None:
    script = """
import signal, solvers
from solvers.exact import method
n = 5  # a chain of n, whose backward reads every value of it, the last first
ops = [solvers.Op(f"f{i}", (i - 1,) if i else (), (i,), 1.0) for i in range(n)]
reads = [(i,) if i == n - 1 else (2 * n - 2 - i, i) for i in range(n)]
ops += [solvers.Op(f"b{i}", reads[i], (2 * n - 1 - i,), 1.0) for i in reversed(range(n))]
values = [solvers.Value(f"v{i}", 4, i, i == 2 * n - 1) for i in range(2 * n)]
problem = solvers.Problem(tuple(ops), tuple(values), n, 0, "chain")
method.minimum_peak(problem, time_limit_s=2, seed=0, hint=solvers.Schedule.keep_all(problem))
assert solvers.solve(problem, 20, solver="exact", time_limit_s=2).recompute_seconds > 0
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [*IGNORING, sys.executable, "-c", HEARD + script]
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout == "interrupted\n", ran.stderr[-2000:]


def test_interrupted_while_planning() -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()

    def interrupt(_: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    planner.enable(model, 1.0, **FAST, loss_fn=interrupt, now=True)
    with pytest.raises(KeyboardInterrupt), ctrl_c_heard():
        model(**INPUTS)
    assert torch.equal(torch.get_rng_state(), state) and planner.plan_of(model) is None
    model.gradient_checkpointing_enable({"loss_fn": None})
    assert_equal(model, twin)


@contextlib.contextmanager
def memory_left(spare_bytes: int, chunk_bytes: int) -> Iterator[None]:
    """The process can take so much more, and no more; then the allocator fails in earnest.

    What earlier work left free in the heap and would hold ``chunk_bytes`` is taken first.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken, fresh = [], 0
    while fresh < 3:
        used = address_space()
        taken.append(torch.empty(chunk_bytes, dtype=torch.uint8))
        fresh = fresh + 1 if address_space() > used else 0
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        del taken


def address_space() -> int:
    """Bytes of addresses that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory(phase: str) -> None:
    model = nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))
    large = torch.randn(2**15, 8)  # 64 MB for each activation
    planner.enable(model, 10, **{**FAST, "solver": "recompute_all"}, now=True)
    model(large).sum().backward()
    model.zero_grad()
    loss = model(large).sum() if phase == "backward" else None
    message = rf"can't allocate memory[\s\S]*{phase} of a step planned to 10 GB"
    with pytest.raises(RuntimeError, match=message), memory_left(80_000_000, 2**26):
        model(large) if loss is None else loss.backward()
    model.zero_grad()
    model(large).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_out_of_memory_is_still_what_trainers_take_it_for() -> None:
    from accelerate.utils.memory import should_reduce_batch_size

    from planner.runtime.running import memory_explained

    model, _ = pair()
    plan = planner.plan_of(model)
    assert plan is not None
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 64 bytes"),
    ):
        with (
            pytest.raises(type(error), match="lower budget_gb") as caught,
            memory_explained(plan.executable(), "forward"),
        ):
            raise error
        assert should_reduce_batch_size(caught.value)


# -- wrapped before it was enabled ----------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_enabled_after_wrapping_in_ddp(one_process: None) -> None:
    model, twin = (DistributedDataParallel(tiny.seeded(tiny.Mlp)) for _ in range(2))
    assert planner.enable(model, 1.0, **{**FAST, "solver": "recompute_all"}, now=True) is model
    assert_equal(model, twin)
    plan = planner.plan_of(model)
    assert plan is not None and plan.model_name == "Mlp" and plan.recompute_flops > 0
    model.module.gradient_checkpointing_disable()
    assert "forward" not in vars(model.module)


def test_enabled_after_compiling_says_what_to_do() -> None:
    with pytest.raises(planner.PlannerError, match="Mlp is compiled already"):
        planner.enable(torch.compile(tiny.seeded(tiny.Mlp)), 1.0)


def test_a_batch_on_another_device_says_so() -> None:
    model, twin = pair()
    with pytest.raises(planner.PlannerError, match="is on cpu and was called with a tensor on meta"):
        model(**{k: v.to("meta") for k, v in INPUTS.items()})
    assert_equal(model, twin)


def test_a_first_call_with_other_tensors_for_its_parameters_is_refused_in_words() -> None:
    model = planner.enable(tiny.Mlp(), 1.0, **FAST, now=True)
    others = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with pytest.raises(planner.PlannerError, match=r"is no parameter during this call .*functional_call"):
        torch.func.functional_call(model, others, (), INPUTS)
    model(**INPUTS).backward()
