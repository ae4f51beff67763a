"""The notebooks run from top to bottom, and what is committed is what a run shows.

python -m tests.test_notebooks        executes them in place, after an edit
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 600_000


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook after a run in ``folder``; errors are among its outputs, later cells run all the same."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=180,
        kernel_name="python3",
        allow_errors=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # tqdm complains where there are no widgets to draw its bars with; nothing here draws one.
    client.execute(env=os.environ | {"PYTHONPATH": search, "PYTHONWARNINGS": "ignore:IProgress not found"})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> list[tuple[Any, ...]]:
    """What kinds of output a cell has, in order; warnings on stderr depend on the machine."""
    return [
        (out.output_type, out.get("name"), *sorted(out.get("data", ())))
        for out in cell.outputs
        if out.get("name") != "stderr"
    ]


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def executed(path: Path, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    return execute(path, tmp_path_factory.mktemp(path.stem))


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_plan_and_inspect.ipynb"]


def test_every_cell_runs(executed: NotebookNode) -> None:
    """A false ``assert`` in a notebook is an error output too."""
    errors = [
        f"{cell.source.splitlines()[0]} ...: {out.ename}: {out.evalue}"
        for cell in code_cells(executed)
        for out in cell.outputs
        if out.output_type == "error"
    ]
    assert errors == []


def test_committed_outputs_are_those_of_a_run(path: Path, executed: NotebookNode) -> None:
    committed = code_cells(nbformat.read(path, as_version=4))
    for was, now in zip(committed, code_cells(executed), strict=True):
        assert shown(was) == shown(now), was.source
    assert sum(bool(cell.outputs) for cell in committed) > len(committed) // 2


def test_committed_notebook_is_clean(path: Path) -> None:
    """Run once from top to bottom, without warnings, and without a trace of where."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    for folder in (ROOT, Path.home(), Path(tempfile.gettempdir())):
        assert folder.parent == folder or f"{folder}/" not in text
    assert "site-packages" not in text
    assert len(text.encode()) < MOST_BYTES


def _rewrite() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    _rewrite()
