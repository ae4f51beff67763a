"""The README: its lines run, its output is what they print, and what it names exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import planner
from planner.cli.parser import parser
from planner.costs.cache import VARIABLE
from planner.devices.rates import DEVICES
from solvers import SOLVERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BREAK = "==== next block ===="
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"


@dataclass(frozen=True)
class Example:
    """A block of Python and the output that is quoted under it."""

    code: str
    quoted: str


def examples() -> list[Example]:
    found = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
    return [Example(code, quoted) for code, quoted in found]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the blocks print, run one after the other in a fresh interpreter."""
    script = f"print({BREAK!r})\n".join(example.code for example in examples())
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path_factory.mktemp("readme"),
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # HiGHS has a line of its own that it writes past every switch, on some machines and at some times.
    lines = [x for x in ran.stdout.splitlines(keepends=True) if not x.startswith("HighsMipSolverData::")]
    return "".join(lines).split(BREAK + "\n")


def of(printed: list[str], code: str) -> tuple[str, str]:
    """What is quoted under the block that has ``code``, and what it prints."""
    (k,) = [k for k, example in enumerate(examples()) if code in example.code]
    return examples()[k].quoted, printed[k]


def masked(text: str) -> list[str]:
    """The lines without what timing decides: numbers, the word for the status, padding."""
    text = re.sub(NUMBER, "#", text)
    text = re.sub(r"\b(optimal|feasible)\b", "STATUS", text)
    return [re.sub(r" +", " ", line).strip() for line in text.strip().splitlines()]


def the(pattern: str, text: str) -> str:
    """The one group of ``pattern``, found once in ``text``."""
    found: list[str] = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern!r} is found {len(found)} times in:\n{text}"
    return found[0]


# -- the first screen ------------------------------------------------------------------------------


def test_ten_lines_come_first() -> None:
    first = examples()[0]
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 10
    assert README.index(first.code) < 500
    assert README.index("](notebooks/memory.png)") < README.index("\n## ")


def test_the_lines_print_what_is_quoted(printed: list[str]) -> None:
    quoted, now = examples()[0].quoted, printed[0]
    assert masked(now) == masked(quoted)
    for pattern in (
        rf"budget ({NUMBER} GB)",
        rf"nothing recomputed: ({NUMBER} GB)",
        r"(ok: .* bit-equal)\n",
        rf"\+ ({NUMBER}) of optimizer state",
        rf"({NUMBER}) without the plan",
    ):
        assert the(pattern, now) == the(pattern, quoted)


@pytest.mark.parametrize("quoted", [True, False])
def test_what_is_printed_is_what_is_promised(printed: list[str], quoted: bool) -> None:
    """Measured is predicted, and within the budget, in the README and on this machine."""
    text = examples()[0].quoted if quoted else printed[0]
    measured, predicted = the(rf"({NUMBER}) MB measured", text), the(rf"({NUMBER}) predicted \+", text)
    assert measured == predicted
    state, budget = the(rf"({NUMBER}) of optimizer", text), the(rf"; budget ({NUMBER})", text)
    assert float(measured) + float(state) <= float(budget)
    assert the(rf"extra FLOPs ({NUMBER})", text) == the(rf"counted, ({NUMBER})", text)
    assert float(the(rf"proved >= ({NUMBER})%", text)) <= float(the(rf"overhead ({NUMBER})%", text))


def test_the_summary_is_that_of_a_run(printed: list[str]) -> None:
    quoted, now = of(printed, "plan.summary()")
    names = [line[2:20].strip() for line in now.split("\n\n")[0].splitlines()[1:]]
    assert names == [line[2:20].strip() for line in quoted.split("\n\n")[0].splitlines()[1:]]
    for pattern in (
        rf"\n  budget +({NUMBER} GB)",
        rf"nothing recomputed +({NUMBER} GB)",
        rf"proved floor +({NUMBER} GB)",
        rf"on ({NUMBER})\n  costs",
        rf"optimizer state +({NUMBER} MB)",
        rf"parameters +({NUMBER} MB)",
        rf"({NUMBER}) values: ",
        rf"({NUMBER}) ops in ",
    ):
        assert the(pattern, now) == the(pattern, quoted)
    assert [line for line in masked(now) if line.endswith(":")][1:] == ["Where it is decided:"]


def test_a_model_of_ones_own(printed: list[str]) -> None:
    quoted, now = of(printed, "class Tagger")
    assert masked(now) == masked(quoted)
    for pattern in (rf"peak ({NUMBER} GB) \(", rf"nothing recomputed: ({NUMBER} GB)"):
        assert the(pattern, now) == the(pattern, quoted)
    quoted, now = of(printed, "planner.frontier")
    assert [line.split()[0] for line in now.splitlines()] == [line.split()[0] for line in quoted.splitlines()]
    for text in (quoted, now):
        rows = re.findall(rf"^ +({NUMBER}) +({NUMBER}) +({NUMBER})% +({NUMBER})% ", text, re.MULTILINE)
        budgets, peaks, overheads, bounds = (list(map(float, column)) for column in zip(*rows, strict=True))
        assert budgets == [0.09, 0.12, 0.15]
        assert all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True))
        assert all(bound <= overhead for bound, overhead in zip(bounds, overheads, strict=True))
        assert overheads == sorted(overheads, reverse=True)
    assert of(printed, "tagging.apply()") == ("", "")  # its assertion held


def test_a_gpu_that_is_elsewhere(printed: list[str]) -> None:
    here = the(rf"nothing recomputed: ({NUMBER}) GB", of(printed, "class Tagger")[1])
    quoted, now = of(printed, 'costs="H100"')
    assert now == quoted  # nothing in it is timed or searched for
    assert float(the(rf"peak ({NUMBER}) GB", now)) > float(here) and f"takes {here} GB on the CPU" in README
    section = README.split("**A GPU that is elsewhere.**")[1].split("```")[0]
    named = re.findall(r'"([A-Z][A-Z0-9 ]+)"', section)
    assert named == [name for name, device in DEVICES.items() if device.capability is not None]
    assert f"`{VARIABLE}`" in README


# -- what it names ---------------------------------------------------------------------------------


def test_make_targets_exist() -> None:
    named = set(re.findall(r"(?:^ {0,4}|`)make ([a-z-]+)", README + CONTRIBUTING, re.MULTILINE))
    assert {"demo", "test", "check-cuda"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_planner_commands_parse() -> None:
    commands = re.findall(r"`python -m planner ([^`]+)`", README)
    commands += re.findall(r"^rematplan (.*)$", README, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        parser().parse_args(shlex.split(command))


def test_links_and_files_exist() -> None:
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in x]
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    files = re.findall(r"`((?:planner|solvers|tests|notebooks)/[\w./]*)`", README)
    assert len(links) > 2 and len(files) > 10
    made_by_hand = {"tests/benchmarks/results/cuda.jsonl"}  # by whoever has a GPU
    missing = [x for x in {*links, *files} - made_by_hand if not (ROOT / x).exists()]
    assert missing == []


def test_extras_exist() -> None:
    extras = the(r"-e '\.\[([a-z,]+)\]'", README).split(",")
    for command in re.findall(r"^    (.*)$", CONTRIBUTING, re.MULTILINE):
        assert command in ("make test", "make notebooks", "make bench") or command.startswith("git clone")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_methods_and_functions_exist() -> None:
    of_plan = set(re.findall(r"`plan\.(\w+)", README))
    assert {"apply", "restore", "verify", "save"} <= of_plan
    assert [name for name in of_plan if not hasattr(planner.Plan, name)] == []
    for name in re.findall(r"`planner\.([a-z_.]+)\(", README):
        holder: object = planner
        for part in name.split("."):
            holder = getattr(holder, part)
    named = set(re.findall(r"`(\w+Error)`", README)) - {"ValueError", "TypeError"}
    assert named == {name for name in planner.__all__ if name.endswith("Error")}


def test_every_solver_is_in_the_table() -> None:
    section = README.split("\n## Solvers\n")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]+?) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(SOLVERS)
