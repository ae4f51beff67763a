"""The findings' form: pinned packages, nothing of this project, and what was seen when.  None is run here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_table_has_every_script_and_no_other() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)\.sh`\]\((\w+)\.sh\) \| .+ \| .+ \| (\d{4}-\d\d-\d\d) \|$", PAGE, re.MULTILINE
    )
    assert len(SCRIPTS) >= 3
    assert [(path.stem, path.stem) for path in SCRIPTS] == sorted((a, b) for a, b, _ in rows)
    for name, _, day in rows:
        assert f"Run on {day}" in (FOLDER / f"{name}.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_the_form(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    head, _, body = text.partition("\nset -euo pipefail\n")
    assert head.startswith("#!/usr/bin/env bash\n") and body
    assert all(line.startswith("#") for line in head.strip().splitlines())  # what happens, and what was seen
    assert "mktemp -d" in body and "trap " in body and "-m venv" in body
    (packages,) = re.findall(r"-m pip install --quiet (.+)$", body, re.MULTILINE)
    assert all(re.fullmatch(r"[\w-]+==\d[\w.]*", package) for package in packages.split())
    (code,) = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", body, re.DOTALL | re.MULTILINE)
    compile(code, script.name, "exec")
    assert not re.search(r"\b(?:import|from) (?:planner|solvers)\b", code)
    assert "__version__" in code and "sys.exit" in code
    assert max(map(len, text.splitlines())) <= 110
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_output_that_is_quoted_is_that_of_the_script(script: Path) -> None:
    """Each line quoted is one that the script can print, numbers apart: its last one says that it held."""
    text = script.read_text(encoding="utf-8")
    quoted = re.findall(r"^#     (.*)$", text.partition("\nset -euo pipefail\n")[0], re.MULTILINE)
    assert len(quoted) > 2 and quoted[-1] == "as told"
