"""Which models of packages outside transformers train planned, and to the bit as they do without a plan.

    python -m venv --system-site-packages VENV
    VENV/bin/pip install -r tests/benchmarks/requirements-packages.txt
    VENV/bin/python -m tests.benchmarks.bench_packages [--only NAME ...] [--resume] [--families]

Each case (``tests/benchmarks/packages``) is built small, from a seed, in a process of its own, and takes
three optimizer steps on batches that differ, as it is and planned through ``planner.enable``.  Where the two
are not equal, it takes them as it is once more, which says whether it is deterministic at all, and under
``torch.compile(backend="aot_eager")``, which says whether Dynamo and AOTAutograd alone keep its bits.  The
budget is what is resident plus 60 % of what the plain step adds, or, where no plan fits that, the least for
which the refusal says there is one ("least").  Compared bit for bit: losses, the gradients of every step,
parameters, buffers and the random states after the last.  Four more steps follow, in which a plan may still
settle, and two whose peaks are counted by ``planner.measure.StorageMeter``.

Writes ``results/packages.json`` (``results/packages_families.json`` for ``--families``) after every case,
and at the end the same as a page.  Exit code 1 if a plan differs from a plain step where aot_eager does not,
or breaks its budget.  A refusal is no failure, and its row has the first line of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

import planner
from planner.capture.as_eager.generators import global_states, seed_all
from planner.errors import InfeasibleBudgetError, PlannerError
from planner.measure import StepRecord, StorageMeter, compare, loss_of, tensors_in
from planner.measure.step import call
from tests.benchmarks.families import FAMILIES
from tests.benchmarks.packages import Case, Sample, load

RESULTS = Path(__file__).parent / "results"
STEPS, SETTLING, METERED = 3, 4, 2
TRIES = 5  # budgets, each the least that the refusal of the one before names
SHARE = 0.6  # of what the plain step adds to what is resident
SOLVE_S = 2.0
LIMIT_S = 240.0
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Row:
    """One case.  Bytes are of the whole step, what is resident included.

    ``status``      "equal", "refused", "over budget", "different", "no plan" (it trained as it is), "failed"
                    (another error than the planner's), "timed out", "broken" (it does not run here).
    ``repeats``     two plain runs from one seed are equal.
    ``aot_eager``   "equal", "different", or how it failed.
    ``least``       no plan was found at 60 %, and the least was taken instead.
    ``regions``     of the plan, 1 for one whole graph.
    ``planned``     of the memory at the plain step's peak, beside what is there throughout, the share that
                    lies in them.
    ``said``        what the planner logged and warned of.
    """

    name: str
    package: str
    version: str
    status: str = "broken"
    repeats: bool | None = None
    aot_eager: str = ""
    rest_bytes: int | None = None
    plain_bytes: int | None = None
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    least: bool = False
    regions: int | None = None
    planned: float | None = None
    overhead: float | None = None
    bound: float | None = None
    seconds: float | None = None
    plain_step_s: float | None = None
    planned_step_s: float | None = None
    words: str = ""
    where: str = ""
    said: list[str] = field(default_factory=list)
    rss_mb: int | None = None
    capture: str = ""

    def __str__(self) -> str:
        more = f" aot_eager {self.aot_eager or '?'}" + (", least" if self.least else "")
        figures = ""
        if self.peak_bytes is not None and self.budget_bytes is not None:
            figures = f" {self.peak_bytes / 1e6:.2f} of {self.budget_bytes / 1e6:.2f} MB"
            figures += f" (plain {(self.plain_bytes or 0) / 1e6:.2f})"
        if self.overhead is not None:
            figures += f", {self.overhead:.1%} (>= {self.bound or 0:.1%})"
        took = "" if self.seconds is None else f", {self.seconds:.1f} s"
        return f"{self.name}: {self.status}{figures}{took},{more}; {self.words[:200]}"


# ----------------------------------------------------------------------------------------- the steps


class _Meter(StorageMeter):
    """The meter, under which Dynamo compiles what it has not seen before, as it would without."""

    def _see(self, tensor: Tensor, *, there_before: bool) -> None:
        if tensor.layout is torch.strided:  # sparse ones have no storage of their own, and count nothing
            super()._see(tensor, there_before=there_before)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@dataclass
class _Run:
    """Three steps, and the peaks of two more."""

    record: StepRecord
    step_s: float
    first_s: float
    rest_bytes: int = 0
    peak_bytes: int = 0
    unsettled: str = ""  # what was said instead of a peak


def _train(
    sample: Sample,
    prepared: Callable[[nn.Module, torch.optim.Optimizer], Callable[..., Any]] | None = None,
    *,
    metered: bool = True,
) -> _Run:
    """The steps.  ``prepared`` gets model and optimizer and returns what is called in the model's place."""
    model, loss_fn = sample.model, sample.loss
    seed_all(7)
    batches = [sample.batch() for _ in range(STEPS + SETTLING + METERED)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if sample.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    called = prepared(model, optimizer) if prepared else model
    seed_all(0)
    losses: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    times = []

    def forward(batch: Any) -> Tensor:
        loss = loss_of(call(called, batch), loss_fn)
        assert loss is not None, "the model returns no loss, and the case has none"
        return loss

    for number, batch in enumerate(batches[:STEPS]):
        began = time.perf_counter()
        loss = forward(batch)
        loss.backward()
        times.append(time.perf_counter() - began)
        losses[str(number)] = loss.detach().clone()
        del loss
        gradients |= {f"{name} at step {number}": g for name, g in _gradients(model)}
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = StepRecord(
        outputs=losses,
        gradients=gradients | parameters,
        buffers={name: _plain(b).clone() for name, b in model.named_buffers()},
        rng={"cpu": torch.get_rng_state(), **global_states()},
        loss=None,
        output_type="",
    )
    run = _Run(record, times[-1], times[0])
    for batch in batches[STEPS : STEPS + SETTLING] if metered else ():
        forward(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for batch in batches[STEPS + SETTLING :] if metered else ():
        gc.collect()
        meter = _Meter("cpu")
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        meter.register(*model.parameters(), *model.buffers(), *tensors_in(batch), *state)
        try:
            with meter:
                forward(batch).backward()
        except InfeasibleBudgetError:
            raise  # another kind of step came, which needs more
        except PlannerError as error:
            run.unsettled = _first_line(error)
            break
        run.rest_bytes = max(run.rest_bytes, meter.live_bytes - meter.made_bytes)
        run.peak_bytes = max(run.peak_bytes, meter.peak_bytes)
        optimizer.step()
        optimizer.zero_grad()
    return run


def _plain(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n, _plain(p.grad).clone()) for n, p in model.named_parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------ one case


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What the planner logs and warns of meanwhile, a line each."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(_short(record.getMessage().replace("\n", " "))[:400])

    listener, logger = Listener(logging.INFO), logging.getLogger("planner")
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)
        lines += [f"{w.category.__name__}: {w.message}"[:400] for w in caught if "planner" in w.filename]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _short(f"{type(error).__name__}: {lines[0] if lines else ''}")[:1200]


def _where(error: BaseException) -> str:
    """The last lines of the traceback."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return _short("\n".join(lines[-24:]))


def _short(text: str) -> str:
    """Without the folders that this machine has the packages and the project in."""
    return re.sub(r"/\S*/site-packages/", "", text).replace(f"{Path(__file__).parents[2]}/", "")


def measure(case: Case, capture: str, tell: Callable[[Row], None]) -> None:
    """All runs of one case; ``tell`` is given the row as it grows."""
    row = Row(case.name, case.package, _version(case.package), capture=capture)

    def build() -> Sample:
        seed_all(0)
        return case.build()

    try:
        plain = _train(build())
    except Exception as error:
        tell(replace(row, words=_first_line(error), where=_where(error)))
        return
    if capture == "plain":
        figures = {"plain_bytes": plain.peak_bytes, "rest_bytes": plain.rest_bytes}
        tell(replace(row, status="equal", plain_step_s=plain.step_s, **figures))
        return
    row = replace(
        row,
        status="timed out",
        rest_bytes=plain.rest_bytes,
        plain_bytes=plain.peak_bytes,
        budget_bytes=_budget_bytes(plain),
        plain_step_s=plain.step_s,
    )
    tell(row)
    row = _planned(row, build, plain)
    row = replace(row, rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    tell(row)
    if row.status == "equal":
        return  # of such a model there is nothing to ask
    torch._dynamo.reset()
    later = _train(build(), metered=False)
    repeats = compare(plain.record, later.record).equal
    if not repeats and row.status == "different" and _settled(build, later):
        planned = _planned(replace(row, least=False, budget_bytes=_budget_bytes(plain)), build, later)
        if planned.status == "equal":
            tell(replace(planned, words="as plain steps from their third run on"))
            return
    tell(replace(row, repeats=repeats, aot_eager="timed out"))
    tell(replace(row, repeats=repeats, aot_eager=_aot_eager(build, plain)))


def _budget_bytes(plain: _Run) -> int:
    return plain.rest_bytes + int(SHARE * (plain.peak_bytes - plain.rest_bytes))


def _settled(build: Callable[[], Sample], later: _Run) -> bool:
    """Whether plain steps repeat themselves by now: TorchScript runs functions otherwise at first."""
    torch._dynamo.reset()
    return compare(later.record, _train(build(), metered=False).record).equal


def _planned(row: Row, build: Callable[[], Sample], plain: _Run, tries: int = TRIES) -> Row:
    assert row.budget_bytes is not None and row.rest_bytes is not None and row.plain_bytes is not None
    sample = build()

    def prepared(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        return planner.enable(
            model,
            row.budget_bytes / 1e9,  # type: ignore[operator]
            loss_fn=sample.loss,
            costs="roofline",
            time_limit_s=SOLVE_S,
            now=True,
            capture=row.capture,  # type: ignore[arg-type]
        )

    def again(budget_bytes: int) -> Row:
        planner.disable(sample.model)
        torch._dynamo.reset()
        return _planned(replace(row, budget_bytes=budget_bytes, least=True), build, plain, tries - 1)

    with _heard() as said:
        try:
            run = _train(sample, prepared)
        except InfeasibleBudgetError as error:
            if tries > 1 and error.minimum_bytes > row.budget_bytes:
                return again(error.minimum_bytes)
            return replace(row, status="refused", words=_first_line(error), said=said)
        except PlannerError as error:
            return replace(row, status="refused", words=_first_line(error), where=_where(error), said=said)
        except Exception as error:
            return replace(row, status="failed", words=_first_line(error), where=_where(error), said=said)
    found = compare(plain.record, run.record)
    plan = planner.plan_of(sample.model)
    row = replace(row, peak_bytes=run.peak_bytes, seconds=run.first_s, planned_step_s=run.step_s, said=said)
    if plan is not None:
        row = replace(row, predicted_bytes=plan.peak_bytes, overhead=plan.overhead, bound=plan.overhead_bound)
        row = replace(row, **_regions(plan))
    if not found.equal:
        return replace(row, status="different", words=str(found))
    if plan is None or run.unsettled:
        words = run.unsettled or (said[-1] if said else "not a word")
        return replace(row, status="no plan", words=words)
    if run.peak_bytes > row.budget_bytes:
        named = [math.ceil(float(gb) * 1e9) for line in said for gb in _LEAST.findall(line)]
        if tries > 1 and max(named, default=0) > row.budget_bytes:  # it warned that no plan fits
            return again(max(named))
        over = run.peak_bytes - row.budget_bytes
        return replace(row, status="over budget", words=f"{over} bytes over the budget")
    return replace(row, status="equal")


_LEAST = re.compile(r"The least budget with a plan is ([\d.]+) GB")


def _regions(plan: planner.Plan) -> dict[str, Any]:
    """How many regions a plan has, and how much of what the step takes lies in them."""
    if not plan.regions:
        return {"regions": 1, "planned": 1.0}
    return {"regions": len(plan.regions), "planned": sum(r.memory_share for r in plan.regions)}


def _aot_eager(build: Callable[[], Sample], plain: _Run) -> str:
    torch._dynamo.reset()
    try:
        run = _train(build(), lambda model, _: torch.compile(model, backend="aot_eager"), metered=False)
    except Exception as error:
        return _first_line(error)[:300]
    found = compare(plain.record, run.record)
    return "equal" if found.equal else f"different: {found}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


# -------------------------------------------------------------------------------------- the processes


def _child(case: Case, capture: str, pipe: Connection) -> None:
    gc.freeze()  # what the parent holds need not be walked
    measure(case, capture, pipe.send)
    pipe.close()


def row_of(case: Case, capture: str, limit_s: float = LIMIT_S) -> Row:
    """One case in a process of its own, ended after ``limit_s``: its row as far as it came."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(case, capture, theirs))
    process.start()
    theirs.close()
    row = Row(case.name, case.package, _version(case.package), "timed out", capture=capture)
    deadline = time.monotonic() + limit_s
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            row = ours.recv()
        process.kill()
    except EOFError:
        pass
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        row = replace(row, status="failed", words=f"the process ended with {process.exitcode}")
    return row


def _children(cases: Sequence[Case], capture: str, limit_s: float, pipe: Connection) -> None:
    if len(cases) > 1:  # each of their processes need not then import it
        with contextlib.suppress(ImportError):
            importlib.import_module(cases[0].package.replace("-", "_"))
    for case in cases:
        pipe.send(row_of(case, capture, limit_s))
    pipe.close()


def rows_of(cases: Sequence[Case], capture: str, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """The rows of one package's cases.  What its import does to others stays in a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_children, args=(cases, capture, limit_s, theirs)
    )
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):
        while True:
            yield ours.recv()
    process.join()


def families() -> dict[str, Case]:
    """The families of transformers, by name."""

    def made(name: str) -> Callable[[], Sample]:
        def build() -> Sample:
            model, batch = FAMILIES[name]()
            depth = type(model).__name__ == "DPTForDepthEstimation"
            return Sample(model, lambda: batch, _of_depth if depth else None)

        return build

    return {name: Case(name, "transformers", made(name)) for name in FAMILIES}


def _of_depth(outputs: Any) -> Tensor:
    return outputs.predicted_depth.pow(2).mean()


# ------------------------------------------------------------------------------------------ the table

_HEAD = (
    "model", "version", "status", "aot_eager", "plain MB", "budget MB", "peak MB", "regions", "planned",
    "overhead", "proved", "s",
)  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _shown(row: Row) -> tuple[str, ...]:
    def mb(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.2f}"

    return (
        row.name, row.version, row.status + ("" if row.repeats is not False else ", not deterministic"),
        row.aot_eager.partition(":")[0], mb(row.plain_bytes), mb(row.budget_bytes) + "*" * row.least,
        mb(row.peak_bytes), _number(row.regions, "d"), _number(row.planned, ".0%"),
        _number(row.overhead, ".1%"), _number(row.bound, ".1%"), _number(row.seconds, ".1f"),
    )  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """A pipe table."""
    lines = [_HEAD, ("---",) * len(_HEAD), *map(_shown, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: list[Row]) -> str:
    """How many of how many packages came to what."""
    counts = Counter(row.status for row in rows)
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{len(rows)} models of {len({row.package for row in rows})} packages: {found}"


def page(results: dict[str, Any], rows: list[Row]) -> str:
    """The table with its summary, and the words of each row that is not equal."""
    words = "".join(
        f"* {row.name}: {row.status}: {row.words.replace('|', '/')}\n" for row in rows if row.words
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"# {results['title']}\n\nMade by `{results['command']}`; do not edit. {versions}. "
        f"{summary(rows)}. The budget is what is resident plus 60 % of what the plain step adds; "
        f"\\*: the least that has a plan, if more.\n\n{table(rows)}\n\n{words}"
    )


def read(path: Path) -> list[Row]:
    """The rows of a file of results."""
    if not path.exists():
        return []
    names = {f.name for f in fields(Row)}
    return [
        Row(**{k: v for k, v in row.items() if k in names}) for row in json.loads(path.read_text())["rows"]
    ]


def write(path: Path, rows: list[Row], *, are_families: bool) -> None:
    """The rows with what they were made by, and beside them the page."""
    results = {
        "title": "Families of transformers" if are_families else "Models of other packages",
        "command": "python -m tests.benchmarks.bench_packages" + (" --families" if are_families else ""),
        "versions": {name: _version(name) for name in ("torch", "transformers")},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(results, rows), encoding="utf-8")


# ------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose name begins so")
    parser.add_argument("--families", action="store_true", help="the families of transformers instead")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there already")
    parser.add_argument("--again", nargs="+", default=[], metavar="STATUS", help="with --resume: but these")
    parser.add_argument("--capture", default="auto", choices=("auto", "one graph", "regions"))
    parser.add_argument("--plain", action="store_true", help="only one plain run each, to see that it runs")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for each case")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cases = families() if asked.families else load()
    chosen = [c for n in asked.only or [""] for c in cases.values() if c.name.startswith(n)]
    chosen = list({c.name: c for c in chosen}.values())
    if asked.plain:
        for case in chosen:
            began = time.perf_counter()
            row = row_of(case, "plain", asked.limit_s)
            where = "\n".join(row.where.splitlines()[-7:])
            mb = f"{(row.rest_bytes or 0) / 1e6:.1f} to {(row.plain_bytes or 0) / 1e6:.1f} MB"
            took = f"{row.plain_step_s or 0:.2f} s a step, {time.perf_counter() - began:.1f} s"
            print(f"{row.name}: {row.status}, {mb}, {took} {row.words}\n{where}".rstrip(), flush=True)
        return 0
    name = "packages_families" if asked.families else "packages"
    path = asked.out or RESULTS / f"{name}.json"
    before = {row.name: row for row in read(path)} if asked.resume or asked.only else {}
    rows = {n: row for n, row in before.items() if n in cases}
    if asked.resume:
        chosen = [c for c in chosen if c.name not in rows or rows[c.name].status in asked.again]
    for package in dict.fromkeys(c.package for c in chosen):
        for row in rows_of([c for c in chosen if c.package == package], asked.capture, asked.limit_s):
            rows[row.name] = row
            print(row, flush=True)
            write(path, [rows[n] for n in cases if n in rows], are_families=asked.families)
    done = [rows[n] for n in cases if n in rows]
    print(table(done))
    print(summary(done))
    wrong = [
        r for r in done if r.status == "over budget" or (r.status == "different" and r.aot_eager == "equal")
    ]
    for row in wrong:
        print(f"FAILED {row}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
