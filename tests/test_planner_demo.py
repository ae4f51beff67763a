"""The commands a person types first: they run, they hold, and they say so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.__main__ import main
from planner.checks import cuda_check, demo
from planner.checks.trials import Trial, race, seconds_of
from planner.checks.zoo import MODELS, Example, ResNet, Where
from planner.cli.commands import CANNOT, FAILED, HELD
from planner.errors import PlannerError
from planner.measure import Agreement, Comparison
from tests import tiny

ROOT = Path(__file__).parent.parent


def small(device: Where = "cpu", dtype: torch.dtype = torch.float32, size: str = "demo") -> Example:
    """The zoo's ResNet, of so few and narrow layers that its steps take no time."""
    model = tiny.seeded(lambda: ResNet((2, 2), width=8, classes=10)).to(device, dtype)
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 3, 48, 48, generator=random).to(device, dtype)
    labels = torch.randint(0, 10, (8,), generator=random).to(device)
    return Example("ResNet", model, {"pixels": pixels, "labels": labels})


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (demo, cuda_check):
            patch.setattr(module, "MODELS", {**MODELS, "resnet": small})
        yield


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str
    folder: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("demo")
    out, err = io.StringIO(), io.StringIO()
    command = "demo --quick --models resnet --device cpu --out"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command.split(), str(folder)])
    return Done(status, out.getvalue(), err.getvalue(), folder)


def test_the_demo_holds_what_it_prints(quick: Done) -> None:
    assert quick.status == HELD, quick.stderr[-2000:]
    rows = [line for line in quick.stdout.splitlines() if re.search(r"(50 %|least) +\d", line)]
    assert len(rows) == 2
    for row in rows:
        budget, predicted, measured = map(float, re.findall(r"\d+\.\d\d(?![%x\d])", row)[-4:-1])
        assert predicted == measured <= budget
        assert row.endswith("equal")
    assert "ResNet " in quick.stdout
    assert "total" in quick.stdout.splitlines()[-1]
    assert "100%" in quick.stderr  # the bar reached its end
    assert (quick.folder / "memory.png").read_bytes().startswith(b"\x89PNG")


def _row(**changes: object) -> demo.Row:
    same = Agreement(3, (), 0.0, 0.0)
    measured = Trial(Comparison(same, same, same, same, True), 990, 50, 100)
    row = demo.Row("m", "50 %", 7, 2000, 1000, 990, 0.1, 0.0, measured, 1.1, True)
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_each_way_to_fail_is_told() -> None:
    same, other = Agreement(3, (), 0.0, 0.0), Agreement(3, ("w",), 1e-3, 1e-3)
    unequal = Trial(Comparison(same, other, same, same, True), 990, 50, 100)
    over = Trial(Comparison(same, same, same, same, True), 1001, 50, 100)
    assert _row().failures() == []
    assert "over the budget" in _row(trial=over, predicted_bytes=1001).failures()[0]
    assert "predicted 984" in _row(predicted_bytes=984).failures()[0]
    assert "1 of 3 differ" in _row(trial=unequal).failures()[0]
    assert "losses" in _row(same_losses=False).failures()[0]


def test_a_budget_below_the_least_is_a_row_not_a_failure() -> None:
    row = _row(trial=None, needs_bytes=1_500_000, time_ratio=math.nan)
    shown = demo.table(demo.Demo((row,), "CPU", 3, 1.0, None))
    assert "infeasible: needs 1.5 MB" in shown
    assert row.failures() == []


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = demo.Demo((_row(same_losses=False),), "CPU", 3, 1.0, None)
    monkeypatch.setattr(demo, "run", lambda *_, **__: wrong)
    assert main(["demo", "--device", "cpu"]) == FAILED
    assert "FAILED m at 50 %: the losses" in capsys.readouterr().err
    assert main(["demo", "--models", "alexnet"]) == CANNOT
    assert "alexnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"models": ("alexnet",)}, {"models": ()}, {"fractions": (0.0,)}, {"fractions": (1.5,)}, {"steps": 1}],
)
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        demo.Settings(**wrong)  # type: ignore[arg-type]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["check-cuda"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown and "Exit code 1 if" in shown and "Exit code 2 without" in shown


# ------------------------------------------------------------------------------------ on the device


@pytest.fixture(scope="module")
def check() -> cuda_check.Check:
    settings = cuda_check.settings_of("cpu", quick=True)
    told: list[str] = []
    found = cuda_check.run(settings, told.append)
    assert len(told) == settings.phases
    return found


def test_the_check_measures_every_method(check: cuda_check.Check) -> None:
    eager, keep_all, *planned = check.rows
    assert [r.method for r in check.rows] == ["eager", "keep_all", "plan 50%", "plan least"]
    assert eager.time_ratio == 1.0 and eager.predicted_bytes is None
    for row in (keep_all, *planned):
        assert row.allocated_bytes == row.predicted_bytes
        assert row.grad_rel_err == 0.0 == row.eager_rel_err
        assert row.deterministic_equal is True
    assert all(r.allocated_bytes <= (r.budget_bytes or 0) < eager.allocated_bytes for r in planned)
    assert check.failures() == []


def test_nothing_recomputed_calls_the_same_ops(check: cuda_check.Check) -> None:
    """All but batch norm, whose kernel has another name."""
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in small().model.modules())
    assert check.rows[1].kernels_differ == {
        "aten._native_batch_norm_legit": norms,
        "aten.native_batch_norm": -norms,
    }


def test_lines_of_json(check: cuda_check.Check, tmp_path: Path) -> None:
    path = tmp_path / "cuda.jsonl"
    cuda_check.append_rows(path, check.rows)
    cuda_check.append_rows(path, check.rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 * len(check.rows)
    asked = {"gpu", "driver", "torch", "commit", "date", "model", "batch", "method", "budget_bytes"}
    asked |= {"allocated_bytes", "reserved_bytes", "predicted_bytes", "step_s", "grad_rel_err"}
    assert all(asked <= line.keys() for line in lines)
    assert lines[0]["reserved_bytes"] is None and lines[2]["allocated_bytes"] > 0
    apart = dataclasses.replace(check.rows[2], grad_rel_err=math.inf, deterministic_equal=False)
    assert json.loads(apart.json())["grad_rel_err"] == "inf" and "inf" in apart.failures()[0]
    assert "plan least" in str(check)
    assert "the same kernels as eager's in 1 of 1 small modules" in str(check)


def test_a_model_that_fails_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    row = cuda_check.Row(
        "g", "d", "t", "c", "2026", "m", "demo", "x", "eager", None, 10, 12, None, 5, step_s=1.0
    )

    def build(key: str) -> str:
        if key == "gpt2":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried a lot.\nmore")
        if key == "unet":
            raise RuntimeError("a kernel broke\nits stack")
        return key

    def rows(example: str, *_: object) -> list[cuda_check.Row]:
        return [dataclasses.replace(row, model=example)]

    names = ("bert", "gpt2", "unet", "resnet")
    made = {key: lambda *_, key=key, **__: build(key) for key in names}
    monkeypatch.setattr(cuda_check, "MODELS", made)
    monkeypatch.setattr(cuda_check, "_rows_of", rows)
    monkeypatch.setattr(cuda_check, "compare_kernels", lambda name, device: {"gemm": 1})
    settings = cuda_check.Settings(torch.device("cpu"), "demo", names, cases=("attention",))
    written: list[str] = []
    check = cuda_check.run(settings, None, lambda rows: written.extend(r.model for r in rows))
    assert written == [r.model for r in check.rows] == ["bert", "resnet"]
    memory, broken = check.failures()
    assert memory.startswith("gpt2: demo size does not fit on cpu: CUDA out of memory. Tried a lot. Other")
    assert "--size demo" in memory and "more" not in memory.split("--size")[0]
    assert broken == "unet: RuntimeError: a kernel broke"
    assert "0 of 1 small modules\n  attention: {'gemm': 1}" in str(check)
    late = cuda_check.run(dataclasses.replace(settings, limit_s=-1.0))
    assert late.rows == () and len(late.failures()) == 4
    assert "not begun" in late.failures()[0] and "--models bert" in late.failures()[0]
    assert "small modules" in str(late)


def test_the_check_fails_on_what_it_should(check: cuda_check.Check) -> None:
    row = check.rows[2]
    assert row.budget_bytes is not None and row.predicted_bytes is not None
    over = dataclasses.replace(row, budget_bytes=row.allocated_bytes - 1)
    wrong = dataclasses.replace(row, predicted_bytes=row.allocated_bytes // 2)
    unequal = dataclasses.replace(row, deterministic_equal=False, grad_rel_err=1e-3, eager_rel_err=1e-6)
    noisy = dataclasses.replace(unequal, grad_rel_err=1e-7)
    assert over.failures()[0].endswith("bytes") and "over the budget" in over.failures()[0]
    slack = dataclasses.replace(over, slack_bytes=7)
    assert slack.failures()[0].endswith("; 7 are the allocator's slack")
    assert "predicted" in wrong.failures()[0]
    assert "gradients differ" in unequal.failures()[0]
    assert noisy.failures() == []


def test_it_writes_only_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file and no folder without --results, wherever it is run."""
    row = cuda_check.Row(
        "g", "d", "t", "c", "2026", "m", "demo", "x", "eager", None, 10, 12, None, 5, step_s=1.0
    )

    def run(settings: cuda_check.Settings, tell: Any, found: Any) -> cuda_check.Check:
        if found is not None:
            found([row])
        return cuda_check.Check((row,), 1.0)

    monkeypatch.setattr(cuda_check, "run", run)
    monkeypatch.chdir(tmp_path)
    command = ["check-cuda", "--device", "cpu", "--models", "gpt2"]
    assert main(command) == HELD
    assert list(tmp_path.rglob("*")) == []
    assert "appended" not in capsys.readouterr().out
    assert main([*command, "--results", "here.jsonl"]) == HELD
    assert [p.name for p in tmp_path.rglob("*")] == ["here.jsonl"]
    assert "1 lines appended to here.jsonl" in capsys.readouterr().out
    assert main([*command, "--results", "no/such/folder.jsonl"]) == CANNOT
    assert [p.name for p in tmp_path.rglob("*")] == ["here.jsonl"]
    assert "there is no folder" in capsys.readouterr().err


def test_the_make_target_keeps_its_results() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ncheck-cuda:\n")[1].splitlines()[0]
    assert recipe.endswith("check-cuda --results tests/benchmarks/results/cuda.jsonl")


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["check-cuda"]) == CANNOT
    assert "there is no CUDA device" in capsys.readouterr().err
    with pytest.raises(PlannerError, match="GPU"):
        cuda_check.settings_of("cuda:0")


# -------------------------------------------------------------------------------------------- trials


def test_a_race_times_and_trains() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).square().mean()

    ticks = iter([5.0, 5.0, 1.0, 3.0, 2.0, 4.0])  # the first turn is not timed; who starts alternates
    ran = race(
        [Scaled(), Scaled()], (torch.ones(4),), steps=3, clock=lambda work, _: (work(), next(ticks))[1]
    )
    assert ran.losses[0] == ran.losses[1]
    assert ran.losses[0][0] > ran.losses[0][1] > ran.losses[0][2]
    assert ran.step_s == (2.5, 2.5)
    assert ran.ratios == ((1 / 3 + 4 / 2) / 2,)


def test_seconds_are_of_the_work() -> None:
    done: list[int] = []
    assert 0 <= seconds_of(lambda: done.append(1), torch.device("cpu")) < 1.0
    assert done == [1]
