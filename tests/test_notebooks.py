"""The notebooks run from top to bottom, and what is committed is what a run shows.

python -m tests.test_notebooks [NAME ...]      executes them in place, after an edit (``make notebooks``)

The tests run them with the smaller sizes of ``SMALL``, all in one kernel, which is emptied in between: most
of the time of a short notebook is spent on importing what the one before it has imported.  By day they run
those of ``BY_DAY``; of the others what can be known without a run, as what they show has tests of its own.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 600_000
BY_DAY = ("01_plan_and_inspect", "06_graph_network")

# What the tests put behind a notebook's cell of parameters (tagged so), by its name.
SMALL: Mapping[str, str] = {
    "01_plan_and_inspect": """
LAYERS, WIDTH, ROWS, SEARCH_S = 2, 96, 8, 0.5
BUDGET_GB, TOO_LITTLE_GB, CURVE_GB = 0.020, 0.009, [0.017, 0.020]""",
    "02_cross_encoder": "LAYERS, WIDTH, ROWS, LONGEST, SEARCH_S = 2, 32, 80, 40, 5",
    "03_internvl2": """
LAYERS, TILES, TEXT, SEARCH_S, TRAIN_ROWS, TRAIN_SEARCH_S = 1, 2, 64, 1, 4, 0.5
BUDGETS_GB, BUDGET_GB = [3.65], 3.7
from planner.examples.internvl2 import SHAPES
for tower in (SHAPES["tiny"].vision, SHAPES["tiny"].text):
    tower["num_hidden_layers"] = 1""",
    "06_graph_network": "NODES, EDGES, WIDTH, LAYERS, SEARCH_S = 600, 3000, 48, 1, 0.5",
    "08_how_large": "LAYERS, WIDTH, LENGTH, ROWS, SEARCH_S, GPU_LAYERS = 1, 16, 16, 4, 0.1, 1",
    "07_compiled": "LAYERS, WIDTH, TURNS, SHARES, THEIRS = 1, 64, 2, (0.8,), (0.5,)",
    "04_frontier_and_bounds": "SHARES, SECONDS, KNAPSACK_STEPS = [0.1, 0.35, 0.9], 2, 4",
}


# What all of them import stays, and the garbage collector need not walk it.
PRELUDE = """
import gc, pandas, torch, transformers.models.bert.modeling_bert, planner
gc.collect()
gc.freeze()
%reset -f"""


def started(folder: Path) -> KernelManager:
    """A kernel that works in ``folder`` and imports from this checkout."""
    kernel = KernelManager(kernel_name="python3")
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # tqdm complains where there are no widgets to draw its bars with; nothing here draws one.
    more = {"PYTHONPATH": search, "PYTHONWARNINGS": "ignore:IProgress not found"}
    kernel.start_kernel(env=os.environ | more, cwd=str(folder))
    return kernel


def execute(path: Path, kernel: KernelManager, *, small: bool = False) -> NotebookNode:
    """The notebook after a run; errors are among its outputs, later cells run all the same."""
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if small and "parameters" in cell.metadata.get("tags", ()):
            cell.source += f"\n{SMALL[path.stem]}"
    _run(notebook, kernel)
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    return notebook


def _run(notebook: NotebookNode, kernel: KernelManager) -> None:
    client = NotebookClient(
        notebook, km=kernel, timeout=300, allow_errors=True, record_timing=False, coalesce_streams=True
    )
    client.execute()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> list[tuple[Any, ...]]:
    """What kinds of output a cell has, in order; warnings on stderr depend on the machine."""
    return [
        (out.output_type, out.get("name"), *sorted(out.get("data", ())))
        for out in cell.outputs
        if out.get("name") != "stderr"
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    kernel = started(tmp_path_factory.mktemp("notebooks"))
    _run(new_notebook(cells=[new_code_cell(PRELUDE)]), kernel)
    yield kernel
    kernel.shutdown_kernel(now=True)


def marks(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    return () if path.stem in BY_DAY else (pytest.mark.nightly,)


@pytest.fixture(scope="module", params=[pytest.param(p, marks=marks(p), id=p.stem) for p in NOTEBOOKS])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def executed(path: Path, kernel: KernelManager) -> NotebookNode:
    notebook = execute(path, kernel, small=True)
    _run(new_notebook(cells=[new_code_cell("%reset -f")]), kernel)
    return notebook


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS and SMALL.keys() | {*BY_DAY} <= {path.stem for path in NOTEBOOKS}


def test_every_cell_runs(executed: NotebookNode) -> None:
    """A false ``assert`` in a notebook is an error output too."""
    errors = [
        f"{cell.source.splitlines()[0]} ...: {out.ename}: {out.evalue}"
        for cell in code_cells(executed)
        for out in cell.outputs
        if out.output_type == "error"
    ]
    assert errors == []
    assert sum("assert " in cell.source for cell in code_cells(executed)) >= 4


def test_committed_outputs_are_those_of_a_run(path: Path, executed: NotebookNode) -> None:
    committed = code_cells(nbformat.read(path, as_version=4))
    for was, now in zip(committed, code_cells(executed), strict=True):
        assert shown(was) == shown(now), was.source
    assert sum(bool(cell.outputs) for cell in committed) > len(committed) // 2


OURS = ("planner", "solvers", "tests")


def names_of(tree: ast.Module) -> dict[str, object]:
    """What a notebook's imports from here give it, by the names they have there."""
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] in OURS:
                    module = importlib.import_module(one.name)
                    names[one.asname or one.name.split(".")[0]] = (
                        module if one.asname else sys.modules[one.name.split(".")[0]]
                    )
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
            module = importlib.import_module(str(node.module))
            names |= {one.asname or one.name: getattr(module, one.name) for one in node.names}
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_calls_exists_and_takes_what_it_is_given(path: Path) -> None:
    tree = ast.parse("\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))))
    names, checked = names_of(tree), 0

    def ours(node: ast.expr) -> object:
        if isinstance(node, ast.Attribute):
            holder = ours(node.value)
            return None if holder is None else getattr(holder, node.attr)
        return names.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            ours(node)
        elif isinstance(node, ast.Call) and callable(called := ours(node.func)):
            starred = any(isinstance(arg, ast.Starred) for arg in node.args)
            given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            if not starred:
                inspect.signature(called).bind_partial(*node.args, **given)
                checked += 1
    assert names and checked >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
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
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|var|usr|opt|mnt|Users)/", text)
    printed = [str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", "")) for out in outputs]
    assert "site-packages" not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", "\n".join(printed))
    assert len(text.encode()) < MOST_BYTES


def _rewrite(names: Sequence[str]) -> None:
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            kernel = started(Path(folder))
            notebook = execute(path, kernel)
            kernel.shutdown_kernel(now=True)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    _rewrite(sys.argv[1:])
