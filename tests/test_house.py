"""The house: which file may import which, how full a folder may be, and what each folder says of itself.

Imports are read, not run: those inside functions count, those under ``TYPE_CHECKING`` do not.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("planner", "solvers")
MOST_FILES = 16  # in any folder, but for
FEWER_FILES = {"planner": 12, "solvers": 8}

# From the ground up: a room imports what stands above its own line, and nothing below it.  Rooms of one line
# do not know each other.  A folder inside a folder is of the same room, and a flat file that imports folders
# is a room by itself, at the very bottom if it is not named here.  Flat files that import none are for
# everybody: errors, units.
ORDER: tuple[tuple[str, ...], ...] = (
    ("solvers/core",),
    ("solvers/baselines", "solvers/bounds", "solvers/chain", "solvers/search"),
    ("solvers/exact", "solvers/retention", "solvers/staged"),
    ("solvers.methods",),
    ("solvers.portfolio",),
    ("solvers.fixed_order",),
    ("solvers.free_order",),
    ("solvers.solve",),
    ("solvers.frontier", "solvers.beside"),
    ("planner/_compat",),
    ("planner.alive",),
    ("planner/devices", "planner/capture"),
    ("planner.options",),
    ("planner/graph", "planner/measure"),
    ("planner/costs", "planner/memory", "planner/rewrite"),
    ("planner/plans",),
    ("planner/runtime", "planner/view"),
    ("planner/ranks",),
    ("planner/regions",),
    ("planner.plan",),
    ("planner.frontier",),
    ("planner/solving",),
    ("planner/sharded",),
    ("planner/compiled",),
    ("planner.api",),
    ("planner/sizing",),
    ("planner/training",),
    ("planner.distributed",),
    ("planner/checks",),
    ("planner/examples",),
    ("planner/cli",),
)
DOORS = {"planner", "planner.__main__", "solvers"}


@functools.cache
def files() -> Mapping[str, Path]:
    """Every file of the packages by the name it is imported by."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below ``node``, without those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(ast.Module([other], []))
        else:
            yield from _statements(child)


def imported(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """What the file ``name`` imports: of ``known`` the file itself, of others the dotted name as written.

    ``from folder import name`` is ``folder.name`` if there is such a file, else ``folder``.
    """
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for statement in _statements(tree(path)):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = statement.module or ""
        if statement.level:
            above = package.split(".")[: len(package.split(".")) - statement.level + 1]
            base = ".".join([*above, *filter(None, [base])])
        found |= {whole if (whole := f"{base}.{alias.name}") in known else base for alias in statement.names}
    return found - {name}


@functools.cache
def arrows() -> Mapping[str, frozenset[str]]:
    """Of every file those of the packages that it imports."""
    known = files()
    return {
        name: frozenset(m for m in imported(name, path, known) if m in known) for name, path in known.items()
    }


def circles(of: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Files from which one comes back (Tarjan 1972): the strong components of two or more files."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in of[name]:
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            at = stack.index(name)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for name in of:
        if name not in number:
            visit(name)
    return found


def folder_of(name: str) -> str:
    return files()[name].parent.relative_to(ROOT).as_posix()


def folders() -> list[str]:
    return sorted({folder_of(name) for name in files()})


# -- the reader itself -----------------------------------------------------------------------------


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "room.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import a.b as c\n"
        "from . import beside\n"
        "from ..up.there import thing\n"
        "if TYPE_CHECKING:\n    from never import seen\nelse:\n    import otherwise\n"
        "def f():\n    try:\n        from late import file\n    except ImportError:\n        pass\n"
    )
    found = imported("house.wing.room", path, {"late.file", "house.wing.beside"})
    assert found == {"typing", "a.b", "house.wing.beside", "house.up.there", "otherwise", "late.file"}


def test_circles_are_found() -> None:
    assert circles({"a": "b", "b": "c", "c": "b", "d": "da", "e": ""}) == [["b", "c"]]
    assert circles({"a": "b", "b": "c", "c": ""}) == []


# -- the house -------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_itself_back(package: str) -> None:
    own = {n: [m for m in ms if m.startswith(package)] for n, ms in arrows().items() if n.startswith(package)}
    assert len(own) > 20
    assert not (found := circles(own)), "\n".join(" <-> ".join(circle) for circle in found)


def is_for_all(name: str) -> bool:
    """Flat, and importing no folder."""
    return folder_of(name) in PACKAGES and all(is_for_all(m) for m in arrows()[name] if m not in DOORS)


def room_of(name: str) -> str | None:
    """``None``: one may import it from anywhere, or it is a front door and imports what it likes."""
    folder = folder_of(name)
    if name in DOORS or is_for_all(name):
        return None
    return name if folder in PACKAGES else "/".join(folder.split("/")[:2])


def test_no_folder_imports_upwards() -> None:
    floor = {room: i for i, row in enumerate(ORDER) for room in row}
    used = {name: room for name in files() if (room := room_of(name))}
    assert floor.keys() >= {room for room in used.values() if "/" in room}
    upwards = [
        f"{name} -> {other}"
        for name, mine in used.items()
        for other in sorted(arrows()[name])
        if (theirs := used.get(other)) and mine != theirs and floor.get(mine, -1) <= floor.get(theirs, -1)
    ]
    assert not upwards, "\n".join(upwards)


def test_the_solvers_know_neither_the_planner_nor_torch() -> None:
    solvers = {name: path for name, path in files().items() if name.startswith("solvers")}
    found = {name: imported(name, path, files()) for name, path in solvers.items()}
    others = {n: m for n, ms in found.items() for m in ms if m.split(".")[0] in ("planner", "torch", "tests")}
    assert others == {}


@pytest.mark.parametrize("folder", folders())
def test_a_folder_is_not_too_full(folder: str) -> None:
    count = len(list((ROOT / folder).glob("*.py")))
    assert count <= FEWER_FILES.get(folder, MOST_FILES)


@pytest.mark.parametrize("folder", folders())
def test_a_folder_says_what_goes_in_and_what_comes_out(folder: str) -> None:
    said = ast.get_docstring(tree(ROOT / folder / "__init__.py")) or ""
    assert len(said) > 60
    if folder in {*FEWER_FILES, "planner/examples"}:
        return
    asked = ("In:", "Out:") if "In:" in said or "Out:" in said else (".",)  # or a sentence at least
    assert all(word in said for word in asked)


def _is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts[1:])


def private_names(module: ast.Module) -> set[str]:
    """Private names of torch that are read through ``torch`` or imported from it."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            found |= {text for text in [ast.unparse(node)] if _is_private(text)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in whole if _is_private(name)}
    return found


def test_private_names_of_torch_are_seen() -> None:
    text = "import torch._dynamo\nfrom torch.fx import _pytree, Graph\ntorch.nn.f()\ntorch._C.x(a.torch._y)\n"
    found = private_names(ast.parse(text))
    assert found == {"torch._dynamo", "torch.fx._pytree", "torch._C.x", "torch._C"}


def test_private_names_of_torch_are_in_one_folder() -> None:
    allowed = ROOT / "planner/_compat"
    found = {n: private_names(tree(path)) for n, path in files().items() if path.parent != allowed}
    assert {name: names for name, names in found.items() if names} == {}
