"""The race's own parts: rows and resumption, turns, budgets, searches, verdicts, pictures; one tiny race.

What races is marked ``nightly``: it is the benchmark's harness that it tests, nothing that anybody installs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.checks import cuda_check
from planner.checks.kernel_check import CASES
from planner.devices.state import DeviceMemory
from planner.errors import PlannerError
from tests.benchmarks import bench_cuda, race, race_largest, race_models, race_plots, race_table
from tests.benchmarks.race import Job, Worker
from tests.benchmarks.race_largest import largest, largest_batches
from tests.benchmarks.race_measure import Step, gradient_error, gradients, peak_of, timed
from tests.benchmarks.race_methods import COMPILED, HAND_MADE
from tests.benchmarks.race_rows import NO_GPU, RESULTS, Row, append, latest, read
from tests.benchmarks.race_turns import TimeIsUp, Turns

CPU = torch.device("cpu")


def _row(**changes: Any) -> Row:
    row = Row("GPU", "1", "2.11", "abc", "bfloat16", "2026", "race", "unet", 4, "eager")
    return dataclasses.replace(row, **changes)


# ------------------------------------------------------------------------------------------- rows


def test_rows_survive_the_file_and_the_last_of_a_cell_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cuda.jsonl"
    first, again = _row(step_s=1.0), _row(step_s=2.0, date="2027")
    other = _row(method="ours", label="50%", gpu="another")
    for row in (first, other, again):
        append(path, row)
    with path.open("a") as file:
        file.write('{"gpu": "a line of check-cuda", "model": "unet"}\n{"cut sho')
    assert read(path) == [first, other, again]
    assert latest(read(path)) == [other, again]
    assert latest(read(path), first.machine) == [again]
    assert latest(read(path), dataclasses.replace(first.machine, commit="def")) == []


def test_json_has_no_infinity() -> None:
    row = _row(grad_rel_err=float("inf"))
    assert row.grad_rel_err is None and "grad_rel_err is inf" in row.note
    assert json.loads(row.json())["grad_rel_err"] is None


def test_results_on_file_name_their_gpu() -> None:
    """CPU rows say so; a GPU's row has the allocator's figures or says why not."""
    for row in read(RESULTS):
        assert row.gpu and row.commit and row.date and row.status in ("ok", "error", "skipped")
        if row.machine.is_cpu:
            assert row.gpu == NO_GPU and row.reserved_bytes is None
        elif row.status == "ok" and row.part == "race":
            assert row.allocated_bytes and row.reserved_bytes


# ------------------------------------------------------------------------------------------ turns


def test_who_measures_is_alone_and_who_compiles_is_not(tmp_path: Path) -> None:
    one, other = Turns(tmp_path, time.time() + 60), Turns(tmp_path, time.time() - 1)
    with one.shared(), other.shared():
        pass
    with one.alone():
        with pytest.raises(TimeIsUp), other.shared():
            pass
        with pytest.raises(TimeIsUp), other.alone():
            pass
    with one.shared(), pytest.raises(TimeIsUp), other.alone():
        pass
    with other.alone():
        pass


# --------------------------------------------------------------------------------------- searches


@pytest.mark.parametrize("truth", [0, 1, 2, 7, 64, 65, 1000])
@pytest.mark.parametrize("guess", [1, 60, 64, 2000])
@pytest.mark.parametrize("informed", [True, False])
def test_the_largest_batch(truth: int, guess: int, informed: bool) -> None:
    tried: list[int] = []

    def trains(batch: int) -> bool:
        tried.append(batch)
        return batch <= truth

    found = largest(trains, guess, informed=informed, most_tries=200)
    assert len(tried) == found.tries == len(set(tried)) and min(tried) >= 1
    assert found.batch <= truth
    if found.failed is not None:
        assert truth < found.failed
        assert found.failed - found.batch <= max(1, found.batch // 32)
    short = largest(lambda b: b <= truth, guess, informed=informed, most_tries=2)
    assert short.tries <= 2 and short.batch <= truth


# ---------------------------------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def unet() -> race_models.Case:
    return race_models.build("unet", CPU, torch.float32, large=False)


@pytest.mark.nightly
def test_peers_by_hand_recompute_and_leave_no_trace(unet: race_models.Case) -> None:
    step = Step(unet.model, unet.model, unet.inputs(2), None, CPU)
    before = {name: dict(vars(module)) for name, module in unet.model.named_modules()}
    reference, eager = gradients(step), peak_of(step)
    for method in ("hf", "sac"):
        with HAND_MADE[method](unet) as run:
            taken = Step(unet.model, run, step.inputs, None, CPU)
            assert peak_of(taken).allocated_bytes < eager.allocated_bytes
            assert gradient_error(taken, reference) == 0.0  # dropout's masks are drawn again, equal
    assert {name: dict(vars(module)) for name, module in unet.model.named_modules()} == before
    assert gradient_error(step, reference) == 0.0
    assert 0 < timed(step, steps=2, warm_up=1) < 60


def test_another_gradient_is_seen(unet: race_models.Case) -> None:
    step = Step(unet.model, unet.model, unet.inputs(2), None, CPU)
    reference = gradients(step)
    name = "head.weight"
    wrong = {**reference, name: reference[name] * 1.5}  # type: ignore[operator]
    assert gradient_error(step, wrong) == pytest.approx(1 / 3)
    assert gradient_error(step, {**reference, name: None}) == float("inf")
    assert gradient_error(step, reference, seed=1) > 0


def test_families_at_their_small_sizes() -> None:
    for name, family in race_models.MODELS.items():
        case = race_models.build(name, CPU, torch.float32, large=False)
        inputs = case.inputs(2)
        assert set(family.blocks) <= {type(m).__name__ for m in case.model.modules()}
        if family.unit == "tokens":
            assert inputs["input_ids"].numel() == case.items(2)
        assert all(torch.equal(a, b) for a, b in zip(inputs.values(), case.inputs(2).values(), strict=True))


# ----------------------------------------------------------------------------------------- a race


@pytest.fixture(scope="module", autouse=True)
def fewer_budgets() -> Iterator[None]:
    """Three budgets and one of greedy's show all that eight do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "OURS", ("all", "50%", "at hf"))
        patch.setattr(race, "GREEDY", ("70%",))
        yield


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Worker, Path]:
    """One family, all that needs no compiler, in this process."""
    folder = tmp_path_factory.mktemp("race")
    job = Job(
        part="race",
        model="unet",
        group="eager",
        device="cpu",
        dtype="float32",
        large=False,
        deadline=time.time() + 600,
        results=str(folder / "cuda.jsonl"),
        turns=str(folder),
        batch=2,
        steps=2,
        warm_up=1,
        solve_s=0.2,
        least_s=0.2,
        costs="roofline",
    )
    worker = Worker(Job.of(job.json()))
    worker.race()
    return worker, folder / "cuda.jsonl"


@pytest.mark.nightly
def test_a_race_has_every_cell(raced: tuple[Worker, Path]) -> None:
    _, path = raced
    rows = {(row.method, row.label): row for row in read(path)}
    assert list(rows) == race.cells_of("eager")
    eager, everything = rows["eager", ""], rows["ours", "all"]
    assert eager.grad_rel_err == 0.0 and eager.allocated_bytes
    for (method, _), row in rows.items():
        assert row.machine.is_cpu and row.reserved_bytes is None and row.batch == 2
        if method == "ours-inductor":
            assert row.status == "skipped" and "inductor" in row.note
        else:
            assert row.status == "ok", row.note
            assert row.grad_rel_err == 0.0 and row.step_s and row.items_per_s
        if method in ("ours", "ours-calibrated", "greedy"):
            assert row.allocated_bytes == row.predicted_bytes
            assert row.allocated_bytes <= (row.budget_bytes or 0)
    assert everything.eager_step_s and everything.overhead == 0.0
    told = race_table.verdicts(list(rows.values()))
    assert not [v for v in told if v.failed]
    assert all(v.word.endswith("(CPU)") or v.held is None for v in told)
    assert {"allocated <= budget", "gradients as eager's"} <= {v.claim for v in told if v.held}
    text = "\n".join(race_table.table(list(rows.values())))
    assert "at hf" in text and "skipped" in text


@pytest.mark.nightly
def test_what_is_on_file_is_not_measured_again(
    raced: tuple[Worker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, path = raced
    lines = path.read_text().splitlines()
    again = Worker(worker.job)
    monkeypatch.setattr(again, "figures", lambda *_, **__: pytest.fail("measured"))
    again.race()
    assert path.read_text().splitlines() == lines
    machine = worker.machine
    assert bench_cuda.missing([worker.job], machine, CPU) == []
    other = dataclasses.replace(machine, commit="another")
    assert len(bench_cuda.missing([worker.job], other, CPU)) == len(race.cells_of("eager"))


@pytest.mark.nightly
def test_pictures_from_the_file(raced: tuple[Worker, Path], tmp_path: Path) -> None:
    written = race_plots.draw(latest(read(raced[1])), tmp_path)
    assert [p.name for p in written] == ["race-time-cpu.png", "race-predicted-cpu.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert race_plots.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2


@pytest.mark.nightly
def test_errors_are_rows_and_the_race_goes_on(
    raced: tuple[Worker, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(raced[0].job, results=str(tmp_path / "cuda.jsonl"))
    worker = Worker(job)

    def no_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker.cell("hf", "", no_memory)
    with pytest.raises(SystemExit) as ended:
        worker.cell("sac", "", broken)
    assert ended.value.code == race.BROKEN
    hf, sac = read(tmp_path / "cuda.jsonl")
    assert (hf.status, hf.note) == ("error", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert sac.status == "error"
    with pytest.raises(ValueError, match="the peak of hf is not known"):
        worker.budget_bytes("at hf")
    monkeypatch.setattr(worker.turns, "deadline", time.time() - 1)
    with pytest.raises(TimeIsUp):
        worker.cell("eager", "", no_memory)


@pytest.mark.nightly
def test_largest_batches_under_a_cap(
    raced: tuple[Worker, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = next(row for row in read(raced[1]) if row.method == "eager")
    cap_gb = 1.2 * (eager.allocated_bytes or 0) / 1e9
    job = dataclasses.replace(
        raced[0].job,
        part="batch",
        results=str(tmp_path / "b.jsonl"),
        caps_gb=(cap_gb,),
        solve_s=0.3,
        least_s=0.3,
    )
    worker = Worker(job)
    worker.rows |= {row.cell: row for row in read(raced[1])}
    monkeypatch.setattr(race_largest, "MOST_TRIES", 2)
    monkeypatch.setattr(race_largest, "SHARES", (1.0,))
    largest_batches(worker)
    found = {row.method: row for row in read(tmp_path / "b.jsonl")}
    assert found.keys() == {"ours", *HAND_MADE}
    assert 2 <= found["eager"].batch <= found["ours"].batch
    for row in found.values():
        assert row.status == "ok" and (row.allocated_bytes or 0) <= cap_gb * 1e9 and row.tries
        assert row.failed_batch is None or row.failed_batch > row.batch
    assert found["ours"].grad_rel_err == 0.0


# --------------------------------------------------------------------------------------- verdicts


def test_verdicts_can_fail() -> None:
    eager = _row(step_s=1.0, allocated_bytes=1000, grad_rel_err=1e-3)
    hf = _row(method="hf", step_s=1.3, allocated_bytes=500)
    good = {
        "method": "ours",
        "predicted_step_s": 1.1,
        "step_s": 1.1,
        "overhead_bound": 0.1,
        "grad_rel_err": 1e-3,
    }
    good |= {"budget_bytes": 500, "allocated_bytes": 500, "reserved_bytes": 500, "predicted_bytes": 500}
    rows = [
        eager,
        hf,
        _row(**good, label="at hf"),
        _row(**good, label="50%"),
        _row(**{**good, "step_s": 1.01, "predicted_step_s": 1.0}, label="all", eager_step_s=1.0),
        _row(**{**good, "method": "ours-calibrated"}, label="50%"),
        _row(part="batch", method="ours", label="24 GB", batch=9),
        _row(part="batch", method="hf", label="24 GB", batch=9),
    ]
    held = {v.claim: v.held for v in race_table.verdicts(rows)}
    assert not [claim for claim, value in held.items() if value is False]
    assert [claim for claim, value in held.items() if value is None] == [
        "overhead at 70% <= bound + 2 points",
        "not slower than sac at its peak",
    ]
    bad = {
        "allocated <= budget": {"allocated_bytes": 501},
        "predicted peak within 1 %": {"predicted_bytes": 490},
        "predicted time within 5 %": {"predicted_step_s": 1.2},
        "<= 0.6 of the flag's extra time": {"step_s": 1.2},
        "not slower than hf at its peak": {"step_s": 1.31},
        "gradients as eager's": {"grad_rel_err": 1e-2},
    }
    for claim, change in bad.items():
        worse = [dataclasses.replace(r, **change) if r.label == "at hf" else r for r in rows]
        assert claim in {v.claim for v in race_table.verdicts(worse) if v.failed}, claim
    slow = [dataclasses.replace(r, step_s=1.13) if r.label in ("50%", "all") else r for r in rows]
    assert {"overhead at 50% <= bound + 2 points", "nothing recomputed <= 1.02x eager"} <= {
        v.claim for v in race_table.verdicts(slow) if v.failed
    }
    over = [dataclasses.replace(r, reserved_bytes=501) if r.method == "ours-calibrated" else r for r in rows]
    assert {v.claim for v in race_table.verdicts(over) if v.failed} == {"reserved <= budget, calibrated"}
    less = [dataclasses.replace(r, batch=8) if r.method == "ours" and r.part == "batch" else r for r in rows]
    assert {v.claim for v in race_table.verdicts(less) if v.failed} == {
        "largest batch in 24 GB >= every peer's"
    }
    on_cpu = [dataclasses.replace(r, gpu=NO_GPU) for r in slow]
    assert not [v for v in race_table.verdicts(on_cpu) if v.failed]  # seconds on a CPU settle nothing


# ------------------------------------------------------------------------------------- bad ground


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert bench_cuda.main(["--part", "race"]) == bench_cuda.CANNOT
    assert "built without CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_cuda.main([]) == bench_cuda.CANNOT
    assert "nvidia-smi" in capsys.readouterr().err


def test_a_second_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    checked_device, held_by_others = cuda_check.checked_device, cuda_check.held_by_others
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert checked_device("cuda") == torch.device("cuda", 1) == checked_device("cuda:1")
    with pytest.raises(PlannerError, match=r"no cuda:2: torch sees 2"):
        checked_device("cuda:2")
    memory = DeviceMemory("GPU", 80 * 10**9, 60 * 10**9, 5 * 10**9)
    monkeypatch.setattr(cuda_check, "memory_of", lambda device: memory if device.type == "cuda" else None)
    assert held_by_others(torch.device("cuda", 0)) == 15 * 10**9
    assert held_by_others(CPU) == 0


def test_a_worker_that_dies_is_a_row(tmp_path: Path) -> None:
    """A worker killed in the middle of a cell: the cell is an error, the others are still wanted."""
    job = Job(
        "race", "unet", "eager", "cpu", "float32", False, time.time() + 60, str(tmp_path / "r"), "", batch=2
    )
    machine = _row().machine
    run = bench_cuda.Run(job, began=("race", "unet", "sac", ""))
    assert bench_cuda._goes_on(run, machine, -9)
    (row,) = read(tmp_path / "r")
    assert (row.method, row.status, row.batch) == ("sac", "error", 2) and "-9" in row.note
    assert not bench_cuda._goes_on(bench_cuda.Run(job), machine, 1)  # it died before its first cell


@pytest.mark.nightly
def test_the_command_measures_kernels_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command on its shortest part, with a worker of its own; a second call has nothing to do."""
    results = tmp_path / "cuda.jsonl"
    command = ["--device", "cpu", "--part", "kernels", "--results", str(results), "--limit-s", "500"]
    for said in ("1 of 1 jobs", "0 of 1 jobs"):
        assert bench_cuda.main(command) in (bench_cuda.HELD, bench_cuda.FAILED)
        assert said in capfd.readouterr().err
    rows = {row.label: row for row in read(results)}
    assert rows.keys() == CASES.keys() and all(row.status == "ok" for row in rows.values())
    assert rows["attention, causal"].kernels_differ == {}
    assert rows["attention, bool mask"].kernels_differ == {}
    assert rows["products, TF32"].kernels_differ == {}
    renamed = {"aten._native_batch_norm_legit": 1, "aten.native_batch_norm": -1}
    for name in ("convolutions", "convolutions, channels last"):  # the same kernel by another name
        assert rows[name].kernels_differ == renamed
    assert results.with_suffix(".md").exists()


def test_compiled_methods_are_torchs_own_settings() -> None:
    from torch._functorch import config

    before = config.activation_memory_budget
    case = race_models.build("resnet-50", CPU, torch.float32, large=False)
    with COMPILED["compile-budget-0.25"](case) as run:
        assert config.activation_memory_budget == 0.25
        assert isinstance(run, torch.nn.Module) and run is not case.model
    assert config.activation_memory_budget == before
