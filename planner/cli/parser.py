"""The arguments and the help of ``python -m planner``: what can be asked, with examples that parse."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from planner.cli import commands as cli
from planner.cli.commands import Outcome

__all__ = ["parser"]

Command: TypeAlias = Callable[[str, Callable[[argparse.Namespace], Outcome], str, str, str], ArgumentParser]

_DESCRIPTION = """\
Plan activation checkpointing of PyTorch models to a memory budget, and see that it holds."""

_EPILOG = """\
a first tour:
  {prog} plan train.py:build --budget-gb 8 --optimizer adamw --out plan.json
  {prog} show plan.json --html plan.html
  {prog} explain plan.json encoder.layer.3
  {prog} verify train.py:build --plan plan.json

`train.py` has a function that needs no arguments and returns the model, in training mode, and a batch
of the size to train with:

  def build():
      model = Net().train()
      return model, {{"x": torch.randn(64, 512)}}

exit codes: 0 it held, 1 it did not (no plan fits, or the step is not as planned), 2 it could not run,
130 interrupted. Results are on stdout, everything else on stderr; COMMAND --help has examples.
TORCH_LOGS="+planner" shows what happens inside."""

_PLAN = """\
Traces one training step of a model (nothing is run and no activation memory is taken), decides what to
keep and what to compute again so that it fits the budget, prints the plan, and writes it to a file from
which planner.load(...).apply(model) trains."""

_PLAN_EXAMPLES = """\
examples:
  {prog} plan train.py:build --budget-gb 8 --out plan.json
  {prog} plan mypackage.models:build --inputs batch --loss loss --optimizer adamw --budget-gb 8
  {prog} plan train.py:build --fake --costs roofline --budget-gb 80     a model larger than this machine
  {prog} plan train.py:build --budget-gb 8 --json | jq .overhead

A budget that no plan fits is told with the least that one does, exit code 1. Ctrl-C while it searches
takes the best plan so far."""

_ESTIMATE = """\
Traces one training step and says what it takes: its peak as it is and what fills it, the least peak known
without a search, and the proved floor below which no plan helps. Seconds, not minutes; nothing is run and
no memory taken. With a budget: whether the step fits it as it is, with a plan, perhaps, or not at all."""

_ESTIMATE_EXAMPLES = """\
examples:
  {prog} estimate train.py:build --optimizer adamw
  {prog} estimate train.py:build --budget-gb 8 --json | jq .fit.verdict
  {prog} estimate train.py:build --fake --costs H100 --budget-gb 80    a model and a GPU that are elsewhere

Exit code 1 if the step is not known to fit the budget: below the floor, or only a search can tell."""

_LARGEST = """\
Finds the largest batch for which a training step has a plan within the budget, and the one of most examples
per second predicted, from one trace; says which bound stopped it, and prints what lies between."""

_LARGEST_EXAMPLES = """\
examples:
  {prog} largest train.py:build --make-batch batch_of --budget-gb 8 --optimizer adamw
  {prog} largest train.py:build --make-batch batch_of --budget-gb 8 --at-most-overhead 0.2 --plot sizes.png

`batch_of` is a function in train.py of a number of examples that returns the inputs:

  def batch_of(n):
      return {{"x": torch.randn(n, 512)}}"""

_SHOW = """\
Prints a saved plan: budget, peak, overhead and its proved bound, what fills the peak, layer by layer.
Reading a plan executes nothing and needs no model."""

_SHOW_EXAMPLES = """\
examples:
  {prog} show plan.json
  {prog} show plan.json --html plan.html --plot pictures     a page, and memory.png and placements.png
  {prog} show plan.json --json | jq .peak_bytes"""

_FRONTIER = """\
Plans at many budgets from one trace and prints overhead against budget, with what is proved."""

_FRONTIER_EXAMPLES = """\
examples:
  {prog} frontier train.py:build
  {prog} frontier train.py:build --budgets-gb 6 8 10 12 --plot frontier.png
  {prog} frontier train.py:build --points 5 --time-limit 3 --json"""

_VERIFY = """\
Runs one step of the model as it is and one with the saved plan, compares outputs, gradients, buffers and
random state bit for bit, and measures both peaks. Exit code 1 if anything differs or is over budget."""

_VERIFY_EXAMPLES = """\
examples:
  {prog} verify train.py:build --plan plan.json
  {prog} verify train.py:build --inputs batch --plan plan.json --json"""

_EXPLAIN = """\
Says why a value, or what a module makes, is kept, recomputed or freed: bytes, seconds, and what the step
would be with that choice turned round, as simulated."""

_EXPLAIN_EXAMPLES = """\
examples:
  {prog} explain plan.json bert.encoder.layer.3       all that a module makes
  {prog} explain plan.json layer.3                    the same, if no other path ends so
  {prog} explain plan.json encoder.layer.3.output.mm_5
  {prog} explain plan.json mm_5                       a value, as `show` and the tables name it"""

_DIFF = """\
Compares two saved plans of one model: budget, peak, overhead, and layer by layer what is decided
otherwise, with bytes and seconds won and lost."""

_DIFF_EXAMPLES = """\
examples:
  {prog} diff eight.json twelve.json
  {prog} diff eight.json twelve.json --json"""

_SNAPSHOT = """\
Writes a saved plan as the memory snapshot that PyTorch's viewers read, to lay the prediction beside a
recording of torch.cuda.memory._record_memory_history(). The file is a pickle of plain data, since the
viewers read nothing else."""

_SNAPSHOT_EXAMPLES = """\
examples:
  {prog} snapshot plan.json step.pickle               then drop it on https://pytorch.org/memory_viz
  python -m torch.cuda._memory_viz stats step.pickle"""

_DEMO = """\
Plans and trains five models (a BERT in a CrossEncoder, an InternVL2-shaped VLM, GPT2, ResNet-50, a
U-Net; random weights, no downloads), each at 75 % and 50 % of the memory the eager step adds and at
the least budget that has a plan. Every planned step is compared with the eager one bit for bit and
its peak measured independently of the plan. Prints one table; writes OUT/memory.png.
Exit code 1 if any row is over budget, unequal, or predicted wrong by more than 0.5 %."""

_DEMO_EXAMPLES = """\
examples:
  {prog} demo                      the whole table, some minutes on a CPU
  {prog} demo --models gpt2 unet   two of the models
  {prog} demo --quick --out /tmp   a small run, as the tests do it"""

_CUDA = """\
Runs the demo's models on a CUDA device: allocated and reserved peaks against budget and prediction,
step time by CUDA events, gradients (also with deterministic algorithms), and the kernels of a step
that recomputes nothing against eager's. Prints a table, and with --results appends one JSON object per
measured step to a file. Needs no network. Exit code 2 without a CUDA device."""

_CUDA_EXAMPLES = """\
examples:
  {prog} check-cuda                on a machine with a GPU
  {prog} check-cuda --quick --models gpt2
  {prog} check-cuda --results cuda.jsonl"""

_MODEL = "package.module:NAME or path/to/file.py:NAME: a callable that returns the model, or (model, inputs)"
_INPUTS = "the batch, or a callable that returns it; a bare name is looked up in MODEL's module"


def parser() -> ArgumentParser:
    """The parser of all commands; what it parses has ``run``, the command's function."""
    prog = "rematplan" if Path(sys.argv[0]).name.startswith("rematplan") else "python -m planner"
    made = ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], Outcome], help: str, about: str, examples: str
    ) -> ArgumentParser:
        added: ArgumentParser = commands.add_parser(
            name,
            help=help,
            description=about,
            epilog=examples.format(prog=prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _add_plan(command)
    _add_sizing(command)
    _add_looking(command)
    _add_frontier_and_verify(command)
    demo = command("demo", cli.demo, "plan and train five models, show one table", _DEMO, _DEMO_EXAMPLES)
    _add_demo(demo)
    cuda = command(
        "check-cuda", cli.check_cuda, "the same on a GPU, as JSON and a table", _CUDA, _CUDA_EXAMPLES
    )
    _add_cuda(cuda)
    return made


def _add_plan(command: Command) -> None:
    plan = command("plan", cli.plan, "plan a model of yours for a budget", _PLAN, _PLAN_EXAMPLES)
    _add_model(plan)
    plan.add_argument(
        "--budget-gb", type=float, required=True, metavar="GB", help="GB of 10**9 bytes for the whole step"
    )
    _add_planning(plan, time_limit_s=30.0)
    plan.add_argument("--dynamic", action="store_true", help="sizes may vary from batch to batch")
    _add_chunk_loss(plan, "auto")
    plan.add_argument(
        "--order", choices=("given", "free"), default="given",
        help="of the backward: as autograd runs it, or also gradients of weights as early as holds less",
    )  # fmt: skip
    plan.add_argument(
        "--calibrate", action="store_true", help="run the planned step, and plan again until it fits"
    )
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan there, as JSON")
    _add_json(plan)


def _add_chunk_loss(parser: ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--chunk-loss", default=default, metavar="N",
        help="compute the loss in N chunks of tokens; yes: as many as are fastest, no: whole, "
        "auto: in chunks where nothing fits without (default: %(default)s)",
    )  # fmt: skip


def _add_sizing(command: Command) -> None:
    """How large: does it fit, and how large a batch does."""
    estimate = command("estimate", cli.estimate, "does a step fit?", _ESTIMATE, _ESTIMATE_EXAMPLES)
    _add_model(estimate)
    estimate.add_argument(
        "--budget-gb", type=float, metavar="GB", help="GB of 10**9 bytes to hold it against"
    )
    estimate.add_argument(
        "--time-limit", type=float, default=0.0, metavar="S",
        help="seconds of search for the least peak (default: none, what is known without)",
    )  # fmt: skip
    _add_step(estimate)
    _add_chunk_loss(estimate, "auto")

    largest = command("largest", cli.largest, "how large a batch fits?", _LARGEST, _LARGEST_EXAMPLES)
    _add_model(largest)
    largest.add_argument(
        "--make-batch", required=True, metavar="NAME", help="make_batch(n) -> the inputs of n examples"
    )
    largest.add_argument(
        "--budget-gb", type=float, required=True, metavar="GB", help="GB of 10**9 bytes for the whole step"
    )
    largest.add_argument(
        "--at-most-overhead", type=float, metavar="SHARE", help="of the step's time: 0.2 is a fifth"
    )
    largest.add_argument("--low", type=int, default=1, help="the least size (default: %(default)s)")
    largest.add_argument("--high", type=int, default=1 << 16, help="the largest size (default: %(default)s)")
    _add_planning(largest, time_limit_s=10.0)
    _add_chunk_loss(largest, "no")
    largest.add_argument("--plot", type=Path, metavar="FILE", help="draw it there (needs matplotlib)")
    for made in (estimate, largest):
        _add_json(made)


def _add_looking(command: Command) -> None:
    """What takes saved plans and no model."""
    show = command("show", cli.show, "look at a saved plan", _SHOW, _SHOW_EXAMPLES)
    show.add_argument("plan", type=Path, metavar="PLAN", help="file that `plan --out` or Plan.save wrote")
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page there")
    show.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures there (needs matplotlib)")

    explain = command("explain", cli.explain, "why is this recomputed?", _EXPLAIN, _EXPLAIN_EXAMPLES)
    explain.add_argument("plan", type=Path, metavar="PLAN", help="a saved plan")
    explain.add_argument("name", metavar="NAME", help="a value, a module path or its end, or both")

    diff = command("diff", cli.diff, "what another plan decides otherwise", _DIFF, _DIFF_EXAMPLES)
    diff.add_argument("first", type=Path, metavar="FIRST", help="a saved plan")
    diff.add_argument("second", type=Path, metavar="SECOND", help="another of the same model")

    snapshot = command(
        "snapshot", cli.snapshot, "a plan for PyTorch's memory viewer", _SNAPSHOT, _SNAPSHOT_EXAMPLES
    )
    snapshot.add_argument("plan", type=Path, metavar="PLAN", help="a saved plan")
    snapshot.add_argument("out", type=Path, metavar="OUT", help="file to write, such as step.pickle")

    for made in (show, explain, diff):
        _add_json(made)


def _add_frontier_and_verify(command: Command) -> None:
    frontier = command("frontier", cli.frontier, "overhead against budget", _FRONTIER, _FRONTIER_EXAMPLES)
    _add_model(frontier)
    frontier.add_argument(
        "--budgets-gb", type=float, nargs="+", metavar="GB", help="budgets (default: from the least up)"
    )
    frontier.add_argument("--points", type=int, default=8, help="how many budgets (default: %(default)s)")
    _add_planning(frontier, time_limit_s=10.0)
    _add_chunk_loss(frontier, "no")
    frontier.add_argument("--plot", type=Path, metavar="FILE", help="draw it there (needs matplotlib)")

    verify = command("verify", cli.verify, "run a step both ways and compare", _VERIFY, _VERIFY_EXAMPLES)
    _add_model(verify)
    verify.add_argument("--loss", metavar="NAME", help="the loss that the plan was made with")
    verify.add_argument("--plan", type=Path, required=True, metavar="PLAN", help="a saved plan of this model")

    for made in (frontier, verify):
        _add_json(made)


def _add_json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result for other programs")


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--inputs", metavar="NAME", help=_INPUTS)


def _add_planning(parser: ArgumentParser, *, time_limit_s: float) -> None:
    _add_step(parser)
    parser.add_argument("--solver", default="auto", metavar="NAME", help="a method (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=float, default=time_limit_s, metavar="S",
        help="seconds of search for a budget (default: %(default)g)",
    )  # fmt: skip


def _add_step(parser: ArgumentParser) -> None:
    """What a step is, and how it is captured and priced."""
    parser.add_argument("--loss", metavar="NAME", help="loss(outputs) -> scalar, if it is outside the model")
    parser.add_argument(
        "--optimizer", metavar="NAME", help="adamw, adam, sgd, or MODULE:NAME of a class; its state counts"
    )
    parser.add_argument(
        "--costs",
        default="auto",
        metavar="SOURCE",
        help="auto, profile, roofline, or a GPU that is elsewhere, such as H100 (default: %(default)s)",
    )
    parser.add_argument(
        "--outputs", choices=("auto", "held", "released", "unread"), default="auto",
        help="what the model returns is held to the end of the step, or released before the backward, as by "
        "model(**batch).loss; auto: held, where that fits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--capture", choices=("auto", "one graph", "regions"), default="auto",
        help="the step as one graph, or in regions with the model's own code between them, for which it is "
        "run twice and put back; auto: regions where it is not one graph (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--fake", action="store_true", help="build the model without memory")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="bert, internvl, gpt2, resnet, unet (default: all)"
    )
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda if there is one)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder of the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two models, two budgets, short searches: half a minute"
    )


def _add_cuda(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="bert, internvl, gpt2, resnet, unet (default: all)"
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda[:N]; cpu tries out the check itself (default: %(default)s)"
    )
    parser.add_argument(
        "--size", choices=("auto", "demo", "large"), default="auto",
        help="the demo's or the published sizes; auto: large on 40 GB (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="append a line of JSON there per measured step (default: write no file)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one model, short searches")
