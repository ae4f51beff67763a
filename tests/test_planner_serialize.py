"""Plans on disk: what comes back is what went in, nothing is executed, and no other file is taken for one.

Also what importing the package does (nothing), and where private torch names may stand.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import planner
from planner import InvalidPlanFileError, Plan, PlannerError, StalePlanError
from planner.options import Search
from planner.plans.batch import TensorRecord
from planner.solving.priced import prepare
from tests import tiny

INPUTS = tiny.batch(labels=True)
ROOT = Path(planner.__file__).parent.parent


@pytest.fixture(scope="module")
def plan() -> Plan:
    return prepare(tiny.seeded(tiny.Mlp), INPUTS, costs="roofline").plan_bytes(
        10**9, search=Search("recompute_all")
    )


@pytest.fixture
def file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "mlp.json"
    plan.save(path)
    return path


# -- round trip -----------------------------------------------------------------------------------


def test_every_field_comes_back(plan: Plan, file: Path) -> None:
    loaded = planner.load(file)
    for field in dataclasses.fields(Plan):
        if field.name in ("_origin", "_programs", "outline", "inputs", "known_minimum_bytes"):
            continue
        was, now = getattr(plan, field.name), getattr(loaded, field.name)
        if isinstance(was, np.ndarray):
            assert was.dtype == now.dtype and np.array_equal(was, now), field.name
        elif field.name == "timeline_by_kind":
            assert list(was) == list(now) and all(np.array_equal(was[k], now[k]) for k in was)
        else:
            assert was == now and type(was) is type(now), field.name
    assert loaded.minimum_if_known is plan.minimum_if_known is None  # saving does not search for it
    assert loaded.gap == plan.gap and repr(loaded) == repr(plan)
    assert loaded.torch_version == torch.__version__


def test_a_least_budget_that_is_known_travels(plan: Plan, tmp_path: Path) -> None:
    known = dataclasses.replace(plan, known_minimum_bytes=plan.floor_bytes)
    known.save(tmp_path / "known.json")
    assert planner.load(tmp_path / "known.json").minimum_peak_bytes == plan.floor_bytes


def test_a_file_written_before_the_folders_were_parted_still_loads(tmp_path: Path) -> None:
    """Four layers with dropout, everything recomputed, saved at commit 56a9133."""
    old = ROOT / "tests" / "data" / "plan-of-56a9133.json"
    plan = planner.load(old)
    assert plan.model_name == "Noisy" and plan.peak_bytes == 91464 < plan.baseline_peak_bytes
    assert plan.timeline.max() == plan.peak_bytes == sum(plan.breakdown.values())
    assert plan.outline is not None  # in which its generator states are known for what they are
    assert any(v.replay_only for v in plan.outline.problem.values)
    assert "recomputed" in str(plan.explain("layers.1")) and "Noisy" in plan.summary()
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == old.read_bytes()


@pytest.mark.parametrize("name", ["reserved_bytes", "minimum_peak_bytes"])
def test_a_field_that_is_wrong_is_named(name: str, file: Path) -> None:
    record = json.loads(file.read_text()) | {name: "many"}
    file.write_text(json.dumps(record))
    with pytest.raises(planner.InvalidPlanFileError, match=f"'{name}' is 'many'"):
        planner.load(file)


@pytest.mark.parametrize("span", [[0, 10**6], [3, 2], [-1, 2]])
def test_spans_are_held_against_the_length_of_the_sequence(span: list[int], file: Path) -> None:
    record = json.loads(file.read_text())
    record["placements"][0][-1][0] = span
    file.write_text(json.dumps(record))
    with pytest.raises(planner.InvalidPlanFileError, match="spans"):
        planner.load(file)


def test_saving_again_writes_the_same_bytes(file: Path, tmp_path: Path) -> None:
    planner.load(file).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "mlp.json"]


def test_a_failed_save_leaves_the_old_file(plan: Plan, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        plan.save(file)
    assert file.read_bytes() == before


def test_a_loaded_plan_is_read_without_a_model(plan: Plan, file: Path) -> None:
    loaded = planner.load(str(file))
    assert loaded.summary() == plan.summary()
    assert loaded._repr_html_() == plan._repr_html_()
    for use in (loaded.rewrite, loaded.apply, loaded.restore, loaded.verify):
        with pytest.raises(PlannerError, match=r"read from a file.*pass the model"):
            use()
    with pytest.raises(PlannerError, match=r"planner\.frontier"):
        loaded.plot_frontier()


def test_a_loaded_plan_trains_the_model_bit_for_bit(plan: Plan, file: Path) -> None:
    model = tiny.seeded(tiny.Mlp)
    twin = copy.deepcopy(model)
    loaded = planner.load(file)
    module = loaded.rewrite(model)
    assert module.code == plan.code
    tiny.assert_same_bits(tiny.run(module, INPUTS), tiny.run(twin, INPUTS))
    loaded.apply(model)
    tiny.assert_same_bits(tiny.run(model, INPUTS), tiny.run(twin, INPUTS))
    report = loaded.verify(model, INPUTS)
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes


def test_a_plan_with_its_loss_outside_comes_back(tmp_path: Path) -> None:
    def loss_fn(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, INPUTS["labels"])

    model, inputs = tiny.seeded(tiny.Mlp), {"x": INPUTS["x"]}
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, inputs, loss_fn)
    plan.save(tmp_path / "p.json")
    loaded = planner.load(tmp_path / "p.json")
    assert loaded.rewrite(model).code == plan.code
    loaded.apply(model)
    tiny.assert_same_bits(tiny.run(model, inputs, loss_fn), tiny.run(twin, inputs, loss_fn))


def test_inputs_of_every_kind_come_back(tmp_path: Path) -> None:
    class Takes(tiny.Mlp):
        def forward(self, x: Tensor, more: Any, *, mode: str, flag: bool | None = None) -> Tensor:
            return super().forward(x) * more["scale"][0] + more["shift"]

    model = tiny.seeded(Takes)
    x = INPUTS["x"].t().contiguous().t()
    arguments = (x, {"scale": [2.0, None], "shift": torch.ones(4, dtype=torch.bfloat16)})
    from planner.capture.inputs import Inputs

    twin = copy.deepcopy(model)
    plan = tiny.planned(model, Inputs(arguments, {"mode": "a"}))
    plan.save(tmp_path / "p.json")
    planner.load(tmp_path / "p.json").apply(model)
    for m in (model, twin):
        torch.manual_seed(0)
        m(*arguments, mode="a").sum().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_hugging_face_plan_comes_back(tmp_path: Path) -> None:
    model = tiny.seeded(tiny.bert)
    twin = copy.deepcopy(model)
    plan = tiny.planned(model, tiny.bert_batch())
    plan = dataclasses.replace(plan, known_minimum_bytes=plan.floor_bytes)
    plan.save(tmp_path / "p.json")
    planner.load(tmp_path / "p.json").apply(model)
    tiny.assert_same_bits(tiny.run(model, tiny.bert_batch()), tiny.run(twin, tiny.bert_batch()))


def _frozen() -> tiny.Mlp:
    model = tiny.Mlp()
    model.first.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny.Mlp(width=24),
        lambda: tiny.Mlp(p=0.5),
        lambda: tiny.Mlp().double(),
        _frozen,
    ],
    ids=["width", "dropout", "dtype", "frozen"],
)
def test_another_model_is_not_the_plans(file: Path, other: Callable[[], Any]) -> None:
    model = tiny.seeded(other)
    before = dict(vars(model))
    with pytest.raises((StalePlanError, planner.TraceError), match=r"Mlp") as caught:
        planner.load(file).apply(model)
    if isinstance(caught.value, StalePlanError):
        assert "fingerprint" in str(caught.value) and torch.__version__ in str(caught.value)
    assert dict(vars(model)) == before


# -- files that are none --------------------------------------------------------------------------


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.pop(key)


def _with(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.__setitem__(key, value)


def _burn(record: dict[str, Any]) -> None:
    record["placements"][0][4] = "burn"


def _short_placement(record: dict[str, Any]) -> None:
    record["placements"][0].pop()


def _odd_timeline(record: dict[str, Any]) -> None:
    record["timeline"].append(1)


def _input(record: dict[str, Any], kind: str) -> list[Any]:
    return record["inputs"]["tuple"][1]["dict"][0][1][kind]


TAMPERINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no version": (_without("version"), "format version None.*reads version 2"),
    "later version": (_with("version", 3), "format version 3.*reads version 2.*Make the plan again"),
    "earlier version": (_with("version", 1), "format version 1.*reads version 2.*Make the plan again"),
    "version as text": (_with("version", "2"), "format version '2'"),
    "no sequence": (_without("sequence"), "lacks 'sequence'"),
    "no inputs": (_without("inputs"), "lacks 'inputs'"),
    "budget as text": (_with("budget_bytes", "lots"), "'budget_bytes' is 'lots', want int"),
    "budget as float": (_with("budget_bytes", 1.5), "'budget_bytes' is 1.5, want int"),
    "budget as bool": (_with("budget_bytes", True), "'budget_bytes' is True, want int"),
    "overhead as list": (_with("overhead", [0.1]), "'overhead' is"),
    "status": (_with("status", "perfect"), "'status' is 'perfect'"),
    "status unhashable": (_with("status", {}), "'status' is"),
    "sequence as number": (_with("sequence", 3), "holds something"),
    "decision": (_burn, "'burn'"),
    "placement": (_short_placement, "holds something"),
    "placements as text": (_with("placements", "none"), "holds something"),
    "breakdown as text": (_with("breakdown", "x"), "holds something"),
    "breakdown of text": (_with("breakdown", {"saved": "much"}), "holds something"),
    "timeline": (_odd_timeline, "'timeline' has"),
    "timeline of text": (_with("timeline", ["a"]), "holds something"),
    "outline as text": (_with("outline", "graph"), "holds something"),
    "outline of no ops": (lambda r: r["outline"].__setitem__("ops", {}), "holds something"),
    "outline word": (lambda r: r["outline"].__setitem__("words", []), "a word is missing"),
    "outline sizes": (lambda r: r["outline"]["values"]["bytes"].__setitem__(-1, 1), "not that of its"),
    "outline resident": (lambda r: r["outline"]["resident"].__setitem__("inputs", 1), "not that of its"),
    "minimum": (_with("minimum_peak_bytes", "least"), "holds something"),
    "input dtype": (lambda r: _input(r, "tensor").__setitem__(2, "torch.load"), "dtype 'torch.load'"),
    "input dtype elsewhere": (lambda r: _input(r, "tensor").__setitem__(2, "os.system"), "dtype 'os.system'"),
    "input shape": (lambda r: _input(r, "tensor").__setitem__(0, ["a"]), "holds something"),
    "input sizes": (lambda r: _input(r, "tensor").__setitem__(0, [-3, 8]), "holds something"),
    "input device": (lambda r: _input(r, "tensor").__setitem__(3, "moon"), "holds something"),
    "input stride": (lambda r: _input(r, "tensor").__setitem__(1, [8]), "shape .* and stride"),
    "input of no bytes": (lambda r: _input(r, "tensor").__setitem__(0, [2**40, 2**40]), "beyond any memory"),
    "input kind": (_with("inputs", {"pickle": "gASVAA=="}), "'pickle'"),
    "inputs swapped": (_with("inputs", {"tuple": [{"dict": []}, {"tuple": []}]}), "positional and keyword"),
}


def test_dtypes_are_told_from_all_else_without_torch() -> None:
    told = {name for name in dir(torch) if _is_told(f"torch.{name}")}
    dtypes = {of for name in dir(torch) if isinstance(of := getattr(torch, name), torch.dtype)}
    assert {f"torch.{name}" for name in told} == {str(of) for of in dtypes}
    assert not _is_told("os.system") and not _is_told("torch.float32.__class__")


def _is_told(name: str) -> bool:
    try:
        return TensorRecord((2,), (1,), name, "cpu", False).dtype == name
    except ValueError:
        return False


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_file(file: Path, name: str) -> None:
    change, message = TAMPERINGS[name]
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(InvalidPlanFileError, match=rf"mlp\.json.*{message}"):
        planner.load(file)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[]", b"3", b'"plan"', b"{}", b'{"format": "onnx"}'),
        *(b"\x80\x04\x95", b"\xff\xfe", b"[" * 100_000, b'{"format": "rematplan.plan", "version": 2}'),
    ],
)
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(InvalidPlanFileError, match=r"other\.json (is not a plan|lacks 'model_name')"):
        planner.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InvalidPlanFileError, match=r"mlp\.json is not a plan: not JSON, or cut short"):
        planner.load(file)


def test_numbers_that_are_none(file: Path) -> None:
    record = json.loads(file.read_text()) | {"overhead": float("nan")}
    file.write_text(json.dumps(record))
    with pytest.raises(InvalidPlanFileError, match="NaN"):
        planner.load(file)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        planner.load(tmp_path / "nowhere.json")


def test_a_sequence_of_other_ops_is_stale(file: Path) -> None:
    record = json.loads(file.read_text())
    record["sequence"][0] = "__import__"
    del record["outline"]
    file.write_text(json.dumps(record))
    with pytest.raises(StalePlanError, match="'__import__'"):
        planner.load(file).apply(tiny.seeded(tiny.Mlp))


IMPORTED, LOADED = "imported", "loaded"


@pytest.fixture(scope="module")
def fresh(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A new interpreter that imports the package, says so, loads a plan under audit, and says so."""
    path = tmp_path_factory.mktemp("fresh") / "mlp.json"
    plan.save(path)
    code = (
        "import logging\n"
        "before = list(logging.root.handlers), logging.root.level\n"
        "import planner\n"
        "assert (list(logging.root.handlers), logging.root.level) == before\n"
        "names = [n for n in logging.root.manager.loggerDict if n.split('.')[0] in ('planner', 'solvers')]\n"
        "assert not any(logging.getLogger(n).handlers for n in names)\n"
        "assert all(logging.getLogger(n).level == logging.NOTSET for n in names)\n"
        f"print({IMPORTED!r}, flush=True)\n"
        "import sys\n"
        "bad = ('exec', 'compile', 'import', 'subprocess.Popen', 'os.system', 'pickle.find_class')\n"
        "planner.load(sys.argv[1])\n"  # what is imported late is imported now
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event in bad else None)\n"
        "planner.load(sys.argv[1])\n"
        "assert not seen, seen\n"
        f"print({LOADED!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:planner", "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_loading_executes_nothing(fresh: subprocess.CompletedProcess[str]) -> None:
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.splitlines()[-1] == LOADED


# -- the package ----------------------------------------------------------------------------------


def _private_torch(path: Path) -> list[str]:
    """Dotted names below ``torch`` with a private part that ``path`` imports or reads."""
    found = []
    aliases: dict[str, str] = {"torch": "torch"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
            aliases |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("torch")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [f"{node.module}.{a.name}" for a in node.names]
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in aliases:
            found.append(".".join([aliases[node.id], *reversed(parts)]))
    modules = [f for f in found if f == "torch" or f.startswith("torch.")]
    modules = [f for f in modules if not f.startswith("torch.ops.")]  # kernels go by aten's own names
    return sorted({f for f in modules if any(part.startswith("_") for part in f.split("."))})


def test_only_one_folder_knows_private_torch_names() -> None:
    offenders = {
        path.name: names
        for path in sorted((ROOT / "planner").rglob("*.py"))
        if path.parent.name != "_compat" and (names := _private_torch(path))
    }
    offenders = {
        name: rest for name, names in offenders.items() if (rest := [n for n in names if not _dunder(n)])
    }
    assert offenders == {}
    assert "torch._subclasses.fake_tensor.FakeTensorMode" in _private_torch(
        ROOT / "planner/_compat/__init__.py"
    )


def _dunder(name: str) -> bool:
    return all(part.startswith("__") or not part.startswith("_") for part in name.split("."))


def test_importing_says_nothing_and_handles_no_logs(fresh: subprocess.CompletedProcess[str]) -> None:
    assert fresh.stdout.splitlines()[:1] == [IMPORTED], fresh.stderr
    assert fresh.stderr == ""


def test_public_names_exist_and_are_documented() -> None:
    for name in planner.__all__:
        assert (getattr(planner, name).__doc__ or "").strip(), name
