"""The command line: results on stdout and nothing else, exit codes that mean something, errors that help."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import planner
from planner.__main__ import main
from planner.cli import commands as cli
from planner.cli import parser as arguments
from planner.cli import user_code
from planner.cli.commands import CANNOT, FAILED, HELD, INTERRUPTED
from planner.plans.reading import VERSION

ROOT = Path(planner.__file__).resolve().parent.parent

TRAIN = """
import torch
from torch import nn

class Net(nn.Sequential):
    pass

def build():
    print("the user's own print")
    torch.manual_seed(0)
    return Net(*(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2)) for _ in range(4))), batch(32)

def bare():
    return build()[0]

def batch(width=32):
    return (torch.zeros(64, width),)

def sized(model):
    return {"input": torch.zeros(16, model[0][0].in_features)}

def loss(out):
    return out.square().mean()

def broken():
    return nn.Linear(3)

def evaluated():
    return bare().eval(), batch()

def wider():
    return Net(nn.Sequential(nn.Linear(32, 64))), batch()

def number():
    return 3

def plans():  # an error that is raised in the planner's own files
    import planner
    return planner.plan(bare(), "8", batch())

def needs(width):
    return nn.Linear(width, 3)

def stopped():
    raise KeyboardInterrupt

def batch_of(n):
    return {"input": torch.zeros(n, 32)}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder, which is the working directory."""
    here = tmp_path_factory.mktemp("user")
    (here / "train.py").write_text(TRAIN)
    (here / "imports.py").write_text("x = 1\nimport nosuchpackage\n")
    (here / "syntax.py").write_text("def build(:\n    pass\n")
    before = Path.cwd()
    os.chdir(here)
    yield here
    os.chdir(before)


@pytest.fixture(scope="module")
def planned(folder: Path) -> subprocess.CompletedProcess[str]:
    """``plan`` in a process of its own, with torch's logging on; it leaves ``plan.json``."""
    command = "plan train.py:build --budget-gb 90e-6 --costs roofline --optimizer sgd --out plan.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_LOGS": "+planner", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "planner", *command.split()],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def plan(planned: subprocess.CompletedProcess[str], folder: Path) -> planner.Plan:
    assert planned.returncode == HELD, planned.stderr[-2000:]
    return planner.load(folder / "plan.json")


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def command(line: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(shlex.split(line))
        return code, *capfd.readouterr()

    return command


# -- what works -----------------------------------------------------------------------------------


def test_plan_from_a_shell(planned: subprocess.CompletedProcess[str], plan: planner.Plan) -> None:
    assert planned.stdout == plan.summary() + "\n"
    assert "the user's own print" in planned.stderr and "written to plan.json" in planned.stderr
    assert plan.peak_bytes <= 90_000 < plan.baseline_peak_bytes
    for bar in ("capture", "solve", f"overhead {plan.overhead:.2%}", "3/3"):
        assert bar in planned.stderr
    for logged in ("capture, Net", "profile, ", "solve, ", repr(plan)):  # TORCH_LOGS="+planner"
        assert re.search(rf"planner/\w+\.py:\d+\] .*{re.escape(logged)}", planned.stderr)


def test_show_is_the_summary(run: Run, plan: planner.Plan) -> None:
    assert run("show plan.json") == (HELD, plan.summary() + "\n", "")


def test_show_as_json_a_page_and_pictures(run: Run, plan: planner.Plan, folder: Path) -> None:
    code, out, err = run("show plan.json --json --html plan.html --plot pictures")
    shown = json.loads(out)
    assert code == HELD
    for name in ("peak_bytes", "budget_bytes", "overhead", "gap", "status", "recompute_s", "fingerprint"):
        assert shown[name] == getattr(plan, name)
    assert shown["breakdown"] == plan.breakdown
    assert sum(of["values"] for of in shown["decisions"].values()) == len(plan.placements)
    page = (folder / "plan.html").read_text()
    assert page.startswith("<!doctype html>") and plan._repr_html_() in page
    HTMLParser().feed(page)
    for picture in ("memory.png", "placements.png"):
        assert (folder / "pictures" / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in err


def test_explain(run: Run, plan: planner.Plan) -> None:
    p = next(p for p in plan.placements if p.decision == "recompute")
    assert run(f"explain plan.json {p.name}") == (HELD, str(plan.explain(p.name)) + "\n", "")
    code, out, _ = run(f"explain plan.json {p.module} --json")
    assert code == HELD and json.loads(out)["sentences"] == list(plan.explain(p.module).sentences)
    end = f"{p.module.split('.')[-1]}.{p.name}"
    assert run(f"explain plan.json {end}") == (HELD, str(plan.explain(p.name)) + "\n", "")
    code, out, err = run("explain plan.json gelo_1")
    assert (code, out) == (CANNOT, "") and "near it: gelu_1" in err


def test_snapshot(run: Run, plan: planner.Plan, folder: Path) -> None:
    code, out, err = run("snapshot plan.json step.pickle")
    assert code == HELD and f"peak {plan.peak_bytes} bytes" in out and "memory_viz" in err
    assert (folder / "step.pickle").stat().st_size > 1000


def test_verify_and_diff(run: Run, plan: planner.Plan) -> None:
    code, out, err = run("verify train.py:build --plan plan.json")
    assert code == HELD and out.startswith("ok: outputs 1 bit-equal") and "own print" in err
    code, out, _ = run("verify train:bare --inputs batch --plan plan.json --json")
    report = json.loads(out)
    assert code == HELD and report["ok"] and report["peak_bytes"] == plan.peak_bytes
    code, out, _ = run(
        "plan train:build --budget-gb 100e-6 --costs roofline --optimizer sgd -q --json --out hundred.json"
    )
    assert code == HELD and json.loads(out)["budget_bytes"] == 100_000
    other = planner.load("hundred.json")
    assert run("diff plan.json hundred.json") == (HELD, str(plan.diff(other)) + "\n", "")
    assert json.loads(run("diff plan.json hundred.json --json")[1])["peak_bytes"] == (
        other.peak_bytes - plan.peak_bytes
    )


def test_a_loss_outside_the_model_is_named_again_to_verify(run: Run) -> None:
    what = "train:bare --inputs batch --loss loss"
    code, out, err = run(f"plan {what} --budget-gb 110e-6 --costs roofline -q --json --out loss.json")
    assert code == HELD, err
    peak = json.loads(out)["peak_bytes"]
    code, out, _ = run(f"verify {what} --plan loss.json --json")
    assert code == HELD and json.loads(out)["peak_bytes"] == peak


def test_a_plan_that_does_not_hold_fails(run: Run, folder: Path) -> None:
    """The file claims a lower budget than its plan can keep: the measured peak says so."""
    record = json.loads((folder / "plan.json").read_text())
    record["budget_bytes"] = 80_000
    (folder / "boast.json").write_text(json.dumps(record))
    code, out, _ = run("verify train.py:build --plan boast.json")
    assert code == FAILED and out.startswith("NOT OK")


def test_frontier(run: Run, folder: Path) -> None:
    what = "train:bare --inputs sized --loss loss --costs roofline"
    code, out, err = run(f"frontier {what} --budgets-gb 60e-6 1 --time-limit 2 -q --json --plot f.png")
    points = json.loads(out)["points"]
    assert code == HELD and [p["budget_bytes"] for p in points] == [60_000, 10**9]
    assert points[1]["overhead"] == 0 and (folder / "f.png").exists() and "f.png" in err


def test_estimate_says_whether_a_budget_is_known_to_fit(run: Run) -> None:
    code, out, err = run("estimate train:build --loss loss --costs roofline --budget-gb 1 -q")
    assert code == HELD and "fits as it is" in out and "proved floor" in out
    assert err.strip() == "the user's own print"
    code, out, _ = run("estimate train:build --fake --loss loss --costs roofline --budget-gb 1e-6 -q --json")
    found = json.loads(out)
    assert code == FAILED and found["fit"]["verdict"] == "no"
    assert found["fit"]["lacks_bytes"] == found["floor_bytes"] - 1000


def test_largest(run: Run, folder: Path) -> None:
    what = "train:bare --make-batch batch_of --loss loss --costs roofline --time-limit 0.1 -q"
    code, out, _ = run(f"largest {what} --budget-gb 1 --low 3 --high 4 --plot sizes.png")
    assert code == HELD and "largest batch 4" in out and (folder / "sizes.png").stat().st_size > 1000
    code, out, err = run(f"largest {what} --budget-gb 1e-6 --json")
    assert code == FAILED and json.loads(out)["status"] == "infeasible" and "there throughout" in err


def test_fake_takes_no_memory_and_makes_the_same_plan(run: Run, plan: planner.Plan) -> None:
    code, out, _ = run(
        "plan train:build --fake --budget-gb 90e-6 --costs roofline --optimizer sgd -q --json --out fake.json"
    )
    assert code == HELD and json.loads(out)["fingerprint"] == plan.fingerprint
    assert planner.load("fake.json").peak_bytes <= 90_000


def test_a_budget_too_low_says_the_least(run: Run) -> None:
    code, out, err = run("plan train:build --budget-gb 50e-6 --costs roofline --time-limit 1 -q --json")
    told = json.loads(out)
    assert code == FAILED and told["status"] == "infeasible"
    assert 50_000 < told["floor_bytes"] <= told["minimum_bytes"]
    assert "The least budget with a plan is" in err


def test_a_model_that_does_not_train_is_noted(run: Run) -> None:
    code, out, err = run("plan train:evaluated --budget-gb 1 --costs roofline -q")
    assert code == HELD and "Net on cpu" in out and "note: Net is in evaluation mode" in err


# -- what does not --------------------------------------------------------------------------------

REFUSED = {
    "train.py:broken": r"train.py, line 26, in broken\n    return nn.Linear\(3\)",
    "train.py:number": "returned an object of type int; it has to return a torch.nn.Module",
    "train.py:plans": r"TypeError: budget_gb .*\n    train.py, line 39, in plans\n",
    "train.py:needs": "takes width: name a callable that needs no arguments",
    "train.py:biuld": "has no 'biuld'; it defines Net, build, bare",
    "train.py:build --inputs loss2": "has no 'loss2'",
    "train.py:build --inputs number": "inputs is a int",
    "train.py:bare": "needs inputs for Net",
    "train.py:build --optimizer lion": "has no 'lion'",
    "train.py:build --costs magic -q": "costs must be",
    "train.py:build --solver magic --costs roofline -q": "solver is 'magic'",
    "train.py:build --out nowhere/plan.json": "there is no folder .*nowhere to write plan.json to",
    "train": "names no object: write package.module:name or path/to/file.py:name",
    "nosuch.module:build": "there is no module 'nosuch'",
    "imports:build": r"No module named 'nosuchpackage'\n    imports.py, line 2",
    "syntax.py:build": "syntax.py, line 1: invalid syntax",
    "nofile.py:build": "there is no file nofile.py",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_had(run: Run, what: str) -> None:
    code, out, err = run(f"plan {what} --budget-gb 1")
    assert (code, out) == (CANNOT, "")
    assert re.search(REFUSED[what], err) and "Traceback" not in err


def test_which_frames_are_ours() -> None:
    """All of the package, and nothing beside it whose name begins like its own."""
    for file in ("cli/user_code.py", "memory/resident.py", "api.py"):
        assert str(ROOT / "planner" / file).startswith(user_code._OURS)
    for file in ("planner_models.py", "planner-experiments/train.py", "tests/tiny.py"):
        assert not str(ROOT / file).startswith(user_code._OURS)


@pytest.mark.parametrize(("budget", "said"), [("-1", "positive"), ("nan", "finite"), ("0", "positive")])
def test_budgets_that_are_none(run: Run, budget: str, said: str) -> None:
    code, out, err = run(f"plan train:build -q --budget-gb {budget}")
    assert (code, out) == (CANNOT, "") and said in err


def test_files_that_are_no_plans(run: Run, folder: Path, plan: planner.Plan) -> None:
    record = json.loads((folder / "plan.json").read_text())
    (folder / "newer.json").write_text(json.dumps({**record, "version": VERSION + 1}))
    (folder / "foreign.json").write_text('{"format": "recipe"}')
    (folder / "short.json").write_text((folder / "plan.json").read_text()[:500])
    said = {
        "newer.json": f"version {VERSION + 1}; this installation reads version {VERSION}",
        "foreign.json": "is not a plan",
        "short.json": "cut short",
        "train.py": "not JSON",
        "nope.json": "there is no file nope.json",
    }
    for name, message in said.items():
        for command in (
            f"show {name}",
            f"explain {name} x",
            f"snapshot {name} s.pickle",
            f"diff {name} plan.json",
        ):
            code, out, err = run(command)
            assert (code, out) == (CANNOT, "") and message in err, command


def test_a_plan_of_another_model(run: Run, plan: planner.Plan) -> None:
    for call, said in (
        ("wider", "was made for another step"),
        ("bare --inputs sized", "planned for 1 positional"),
    ):
        code, out, err = run(f"verify train.py:{call} --plan plan.json")
        assert (code, out) == (CANNOT, "") and said in err


def test_without_matplotlib(run: Run, plan: planner.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("show plan.json --plot pictures", "frontier train:build --plot f.png"):
        code, out, err = run(command)
        assert (code, out) == (CANNOT, "") and "pip install 'rematplan[notebooks]'" in err


def test_without_tqdm_there_is_no_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, out, err = run("plan train:build --budget-gb 1 --costs roofline")
    assert code == HELD and "Net on cpu" in out and err == "the user's own print\n"


def test_ctrl_c(run: Run) -> None:
    code, out, err = run("plan train.py:stopped --budget-gb 1")
    assert (code, out) == (INTERRUPTED, "") and err.endswith("interrupted\n")


def test_a_reader_that_has_had_enough(
    plan: planner.Plan, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``show plan.json | head -1``: the pipe closes, nobody complains."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe, contextlib.suppress(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["show", "plan.json"]) == HELD
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


# -- without torch ---------------------------------------------------------------------------------

# Runs each line of a command line where torch cannot be imported, and stops at one that wants to.
NO_TORCH = """
import shlex, sys
from importlib.abc import MetaPathFinder

class Refused(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise SystemExit(f"{line!r} imports {name}")

sys.meta_path.insert(0, Refused())
from planner.__main__ import main

for line in sys.argv[1:]:
    try:
        code = main(shlex.split(line))
    except SystemExit as ended:  # of --help
        if isinstance(ended.code, str):
            raise
        code = ended.code
    assert not code, (line, code)
"""


def without_torch(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, *lines],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_help_and_looking_need_no_torch(plan: planner.Plan, folder: Path) -> None:
    commands = re.findall(r"^    ([a-z-]+) ", arguments.parser().format_help(), re.MULTILINE)
    assert len(commands) > 8
    name = next(p.name for p in plan.placements if p.module)
    lines = [
        "--help",
        *(f"{command} --help" for command in commands),
        "show plan.json",
        "show plan.json --json",
        "show plan.json --html page.html --plot drawn",
        f"explain plan.json {name}",
        "diff plan.json plan.json",
        "snapshot plan.json bare.pickle",
    ]
    done = without_torch(lines, folder)
    assert done.returncode == HELD, done.stderr[-2000:]
    assert plan.summary() in done.stdout and str(plan.explain(name)) in done.stdout
    assert (folder / "page.html").read_text() == cli.page(plan)
    assert all((folder / "drawn" / f"{of}.png").stat().st_size for of in ("memory", "placements"))


def test_what_runs_a_model_does_import_torch(plan: planner.Plan, folder: Path) -> None:
    """So the refusal of above refuses."""
    line = "verify train.py:build --plan plan.json"
    done = without_torch([line], folder)
    assert done.returncode != HELD and f"{line!r} imports torch" in done.stderr


# -- help -----------------------------------------------------------------------------------------


def test_every_command_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    parser = arguments.parser()
    commands = re.findall(r"^    ([a-z-]+) ", parser.format_help(), re.MULTILINE)
    assert {
        "plan",
        "estimate",
        "largest",
        "show",
        "frontier",
        "verify",
        "explain",
        "diff",
        "snapshot",
        "demo",
    } <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([command, "--help"])
        assert ended.value.code == HELD
        text = capsys.readouterr().out
        lines = re.findall(rf"^  {re.escape(parser.prog)} (.*?)(?: \||   |$)", text, re.MULTILINE)
        assert lines and all(line.startswith(command) for line in lines)
        for line in lines:
            assert parser.parse_args(shlex.split(line)).command == command
    assert "exit codes: 0 it held" in parser.format_help()


def test_the_entry_point_is_main() -> None:
    scripts = re.search(
        r'^rematplan = "planner\.__main__:main"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert scripts is not None
