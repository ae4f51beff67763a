"""The pages: their lines run, their output is what they print, and what they name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

import planner
from planner.checks import demo
from planner.cli.parser import parser
from planner.costs.cache import VARIABLE
from planner.devices.rates import DEVICES
from planner.errors import TESTED_TORCH
from planner.examples.internvl2 import Arguments
from solvers import SOLVERS

ROOT = Path(__file__).resolve().parent.parent
FRONT, PLANNER, CHOOSES = "README.md", "planner/README.md", "planner/HOW_IT_CHOOSES.md"
SOLVING, MEASURED, CONTRIBUTING = "solvers/README.md", "tests/benchmarks/results/README.md", "CONTRIBUTING.md"
# In the order in which their Python runs: a page goes on with what the ones before it have made.
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (FRONT, PLANNER, CHOOSES, SOLVING, MEASURED, CONTRIBUTING, "findings/README.md")
}
README, ALL = PAGES[FRONT], "\n".join(PAGES.values())
# Written by the benchmarks, with tests of their own.
GENERATED = {
    f"tests/benchmarks/results/{name}.md"
    for name in ("cuda", "families", "floor_ops", "packages", "packages_families", "prepare", "solvers")
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
BREAK = "==== next block ===="
# What is imported stays: the garbage collector need not walk it.  No name is left for the blocks.
PRELUDE = (
    "import gc, planner, transformers.models.bert.modeling_bert as bert\ngc.freeze()\ndel gc, planner, bert\n"
)
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
MOST_LINES, LONGEST_PARAGRAPH = 235, 600


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it is in, the word after its fence, and what it holds."""

    page: str
    kind: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page, text in PAGES.items():
        parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)
        assert len(parts) % 4 == 1, f"{page}: a fence is not closed"
        found += [Block(page, kind, held) for kind, held in zip(parts[1::4], parts[2::4], strict=True)]
    return found


@dataclass(frozen=True)
class Example:
    """A block of Python and the output that is quoted under it."""

    page: str
    code: str
    quoted: str


def examples() -> list[Example]:
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    return [
        Example(page, code, quoted)
        for page, text in PAGES.items()
        for code, quoted in re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the blocks print, run one after the other in a fresh interpreter, a second for each search."""
    codes = [re.sub(r"\btime_limit_s=\d+", "time_limit_s=1", example.code) for example in examples()]
    script = PRELUDE + f"print({BREAK!r})\n".join(codes)
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
        rf"({NUMBER}) ops in ",
    ):
        assert the(pattern, now) == the(pattern, quoted)
    for text in (quoted, now):  # how many there are hangs on the plan: a seed is one where it is kept
        values, kept, again, freed = (
            int(the(pattern, text))
            for pattern in (r"(\d+) values: ", r"(\d+) kept, ", r"(\d+) recomputed, ", r"(\d+) freed; ")
        )
        assert values == kept + again + freed
    assert [line for line in masked(now) if line.endswith(":")][1:] == ["Where it is decided:"]


def test_a_model_of_ones_own(printed: list[str]) -> None:
    quoted, now = of(printed, "planner.frontier")
    for pattern in (rf"peak ({NUMBER} GB) \(", rf"nothing recomputed: ({NUMBER} GB)"):
        assert the(pattern, now) == the(pattern, quoted)
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
    here = the(rf"nothing recomputed: ({NUMBER}) GB", of(printed, "planner.frontier")[1])
    quoted, now = of(printed, 'costs="H100"')
    assert now == quoted  # nothing in it is timed or searched for
    section = chapter(PLANNER, "A GPU that is elsewhere")
    assert float(the(rf"peak ({NUMBER}) GB", now)) > float(here) and f"takes {here} GB on the CPU" in section
    named = re.findall(r'"([A-Z][A-Z0-9 ]+)"', section.split("```")[0])
    assert named == [name for name, device in DEVICES.items() if device.capability is not None]
    assert f"`{VARIABLE}`" in section


def test_the_step_by_hand(printed: list[str]) -> None:
    """Its figures are proved optimal, so they are the same wherever it runs."""
    quoted, now = of(printed, "Problem.build")
    assert now == quoted
    for extra, bound in re.findall(r", +(\d+) ms more, proved >= +(\d+)", now):
        assert extra == bound
    text = chapter(CHOOSES, "One step by hand")
    told = [int(budget) for budget in re.findall(r"^\* \*\*(\d+) MB", text, re.MULTILINE)]
    assert told == [48, 40, 39, 31, 23] and set(told) <= set(map(int, re.findall(r"budget (\d+) MB", now)))


@pytest.mark.parametrize("k", range(len(examples())), ids=lambda k: f"{examples()[k].page}-{k}")
def test_each_block_prints_what_stands_under_it(printed: list[str], k: int) -> None:
    if "plan.summary()" in examples()[k].code:  # rows depend on the plan: see above
        assert examples()[k].quoted
        return
    now, quoted = masked(printed[k]), masked(examples()[k].quoted)
    if "planner.frontier" in examples()[k].code:  # as does the last column of its table
        now, quoted = ([line for line in x if "next MB" in line or "Plan(" in line] for x in (now, quoted))
    assert now == quoted


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    quoted = {example.quoted for example in examples()}
    tested = {"python", "sh", "mermaid"}
    for block in blocks():
        assert block.kind in tested or (block.kind == "text" and block.text in {*quoted, demo_table()}), (
            f"{block.page}: no test reads the {block.kind or 'nameless'} block\n{block.text}"
        )
    assert sum(block.kind == "python" for block in blocks()) == len(examples())
    for page, text in PAGES.items():
        fenced_off = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"\n\n(?: {4}|\t)", fenced_off), f"{page}: code without a fence"


# -- what it names ---------------------------------------------------------------------------------


def chapter(page: str, title: str) -> str:
    """What stands under ``title`` in ``page``."""
    (found,) = [x for x in PAGES[page].split("\n## ") if x.startswith(f"{title}\n")]
    return found


def anchors(text: str) -> set[str]:
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_read() -> None:
    folders = [ROOT / name for name in ("planner", "solvers", "tests", "notebooks", "findings")]
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    assert {page.relative_to(ROOT).as_posix() for page in pages} == PAGES.keys() | GENERATED


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    outside = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in outside.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= LONGEST_PARAGRAPH
    for title in ("Guarantees and limits", "With a trainer", "Beside others", "How to read a plan"):
        assert chapter(FRONT, title)
    assert the(r'(?m)^readme = "(.*)"$', PROJECT) == FRONT


def test_each_guarantee_and_limit_names_its_test() -> None:
    points = re.findall(r"^\* (.*)$", chapter(FRONT, "Guarantees and limits"), re.MULTILINE)
    assert len(points) == 16
    for point in points:
        named = re.findall(r"`tests/(test_\w+\.py)`", point)
        assert named and all((ROOT / "tests" / name).exists() for name in named), point
    for word in ("batch", "`use_cache`", "threads", "CPU", "seed"):  # which eager run a planned one equals
        assert word in chapter(FRONT, "Guarantees and limits").split("\n* ")[0]


def demo_table() -> str:
    """The table of the demo that is quoted."""
    (table,) = [block.text for block in blocks() if block.text.startswith("model  ")]
    return table


def test_the_demos_table_is_one_it_prints() -> None:
    head, rule, *rows = demo_table().splitlines()
    empty = demo.table(demo.Demo((), "CPU", 3, 1.0, None)).splitlines()
    assert re.split(r"  +", head) == re.split(r"  +", empty[-2].strip()) and set(rule) == {"-", " "}
    models = [line.split("  ")[0] for line in rows if not line.startswith(" ")]
    assert len(rows) == 3 * len(models) == 3 * len(demo.FULL.models)
    for row in rows:
        budget, predicted, measured = map(float, re.findall(r"\d+\.\d\d(?![%x\d])", row)[-4:-1])
        assert predicted == measured <= budget and row.endswith("  equal")


def test_make_targets_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL, re.MULTILINE))
    assert {"demo", "test", "check-cuda", "notebooks", "bench"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_commands_are_commands() -> None:
    """Every line of a shell block: a target, a command that parses, or a script that exists."""
    lines = [line for block in blocks() if block.kind == "sh" for line in block.text.splitlines() if line]
    commands = re.findall(r"`(?:python -m planner|rematplan) ([^`]+)`", ALL)
    for line in lines:
        if line.startswith("rematplan "):
            commands.append(line.removeprefix("rematplan "))
        elif line.startswith("pip install "):
            assert "-c constraints.txt" in line and (ROOT / "constraints.txt").exists()
        elif line.startswith("python -m "):
            assert (ROOT / f"{line.split()[2].replace('.', '/')}.py").exists()
        elif line.startswith("bash findings/"):
            assert (ROOT / line.split()[1]).exists()
        else:
            assert line.startswith(("make ", "git clone ")), line
    assert len(commands) > 3
    for command in commands:
        parser().parse_args(shlex.split(command))


def test_the_internvl2_lines_parse() -> None:
    lines = re.findall(r"^python -m planner\.examples\.internvl2 (.*)$", ALL, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        taking = HfArgumentParser([Arguments, TrainingArguments])
        ours, _ = taking.parse_args_into_dataclasses(shlex.split(line))
        assert ours.grad_checkpoint and ours.budget_gb > 0


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    files = re.findall(r"`((?:planner|solvers|tests|notebooks|findings)/[\w./]*)`", text)
    assert [x for x in files if not (ROOT / x).exists()] == []
    modules = re.findall(r"`python -m (tests\.[\w.]+)", text)
    assert [x for x in modules if not (ROOT / f"{x.replace('.', '/')}.py").exists()] == []


def test_the_drawing_is_of_what_there_is() -> None:
    """Its folders exist, its classes are defined, and the table beside it says where."""
    (drawing,) = [block.text for block in blocks() if block.kind == "mermaid"]
    folders = set(re.findall(r"\b(?:planner|solvers)(?:/\w+)?\b", drawing))
    assert len(folders) > 7 and [x for x in folders if not (ROOT / x).is_dir()] == []
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| `([\w/.]+)` \|$", chapter(CHOOSES, "The way of a step"), re.MULTILINE
    )
    assert len(rows) == 8
    for name, place in rows:
        path = ROOT / place
        files = [path] if path.is_file() else path.rglob("*.py")
        assert any(re.search(rf"^class {name}\b", x.read_text("utf-8"), re.MULTILINE) for x in files), name
        assert name == "Program" or f'"{name}"' in drawing
    arrows = re.findall(r"(\w+)[\[(\w\" ,\])]* -->", drawing)
    assert {"joint", "graph", "costs", "resident", "lowering", "problem", "solution", "plan"} <= set(arrows)


def test_references_are_stated_where_it_says() -> None:
    rows = re.findall(
        r"^\| (\w+).*\| (`solvers/.*`|`planner/.*`) \|$", chapter(SOLVING, "References"), re.MULTILINE
    )
    assert len(rows) == 13
    for author, places in rows:
        for place in re.findall(r"`([\w/]+)`", places):
            texts = [path.read_text(encoding="utf-8") for path in (ROOT / place).rglob("*.py")]
            assert any(author in text for text in texts), f"{author} in {place}"


def test_the_versions_of_torch_are_those_that_errors_name() -> None:
    *first, last = TESTED_TORCH
    assert f"all tests ran with {', '.join(first)} and {last}" in README
    assert f'"torch>={first[0]}"' in PROJECT and f"torch {first[0]} or later" in README
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] in TESTED_TORCH


def test_extras_exist() -> None:
    extras = the(r"-e '\.\[([a-z,]+)\]'", README).split(",")
    assert all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras)


def test_methods_and_functions_exist() -> None:
    of_plan = set(re.findall(r"`plan\.(\w+)", ALL))
    assert {"apply", "restore", "verify", "save"} <= of_plan
    assert [name for name in of_plan if not hasattr(planner.Plan, name)] == []
    for name in re.findall(r"`planner\.([a-z_.]+)\(", ALL):
        holder: object = planner
        for part in name.split("."):
            holder = getattr(holder, part)
    named = set(re.findall(r"`(\w+Error)`", PAGES[PLANNER])) - {"ValueError", "TypeError"}
    assert named == {name for name in planner.__all__ if name.endswith("Error")}


def test_every_solver_is_in_the_table() -> None:
    table = PAGES[SOLVING].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]+?) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(SOLVERS)
