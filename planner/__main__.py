"""``python -m planner``: the demo and the CUDA check.

Exit codes: 0 everything held; 1 something was over budget, mispredicted or unequal; 2 it could not
run (bad arguments, a package or a GPU missing).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HELD, FAILED, CANNOT = 0, 1, 2

_DESCRIPTION = """\
Plan activation checkpointing of PyTorch models to a memory budget, and see that it holds."""

_DEMO = """\
Plans and trains five models (a BERT in a CrossEncoder, an InternVL2-shaped VLM, GPT2, ResNet-50, a
U-Net; random weights, no downloads), each at 75 % and 50 % of the memory the eager step adds and at
the least budget that has a plan. Every planned step is compared with the eager one bit for bit and
its peak measured independently of the plan. Prints one table; writes OUT/memory.png.
Exit code 1 if any row is over budget, unequal, or predicted wrong by more than 0.5 %."""

_CUDA = """\
Runs the demo's models on a CUDA device: allocated and reserved peaks against budget and prediction,
step time by CUDA events, gradients (also with deterministic algorithms), and the kernels of a step
that recomputes nothing against eager's. Prints a table and appends one JSON object per measured step
to the results file. Needs no network. Exit code 2 without a CUDA device."""

_EPILOG = """\
examples:
  python -m planner demo                      the whole table, some minutes on a CPU
  python -m planner demo --models gpt2 unet   two of the models
  python -m planner demo --quick --out /tmp   a small run, as the tests do it
  python -m planner check-cuda                on a machine with a GPU
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m planner",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    demo = commands.add_parser(
        "demo", help="plan and train five models, show one table", description=_DEMO, formatter_class=raw
    )
    demo.add_argument(
        "--models", nargs="+", metavar="NAME", help="bert, internvl, gpt2, resnet, unet (default: all)"
    )
    demo.add_argument("--device", help="cpu or cuda[:N] (default: cuda if there is one)")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder of the picture (default: %(default)s)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="two models, two budgets, short searches: half a minute"
    )
    demo.set_defaults(run=_demo)

    cuda = commands.add_parser(
        "check-cuda", help="the same on a GPU, as JSON and a table", description=_CUDA, formatter_class=raw
    )
    cuda.add_argument(
        "--models", nargs="+", metavar="NAME", help="bert, internvl, gpt2, resnet, unet (default: all)"
    )
    cuda.add_argument(
        "--device", default="cuda", help="cuda[:N]; cpu tries out the check itself (default: %(default)s)"
    )
    cuda.add_argument(
        "--size", choices=("auto", "demo", "large"), default="auto",
        help="the demo's or the published sizes; auto: large on 40 GB (default: %(default)s)",
    )  # fmt: skip
    cuda.add_argument(
        "--results", type=Path, default=Path("tests/benchmarks/results/cuda.jsonl"),
        help="file to append to (default: %(default)s)",
    )  # fmt: skip
    cuda.add_argument("--quick", action="store_true", help="one model, short searches")
    cuda.set_defaults(run=_check_cuda)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars would break ours
    from planner.errors import PlannerError

    try:
        return int(arguments.run(arguments))
    except (PlannerError, ValueError) as error:
        print(f"python -m planner {arguments.command}: {error}", file=sys.stderr)
        return CANNOT


def _demo(arguments: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from planner import demo

    settings = demo.QUICK if arguments.quick else demo.FULL
    if arguments.models:
        settings = dataclasses.replace(settings, models=tuple(arguments.models))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _Bar(settings.phases) as bar:
        shown = demo.run(settings, device=device, out=arguments.out, tell=bar.tell)
    print(shown)
    print(f"\ntotal {shown.seconds:.0f} s; " + (f"memory over the step: {shown.picture}" if shown.picture
          else "no picture: matplotlib is not installed"))  # fmt: skip
    return _verdict(shown.failures())


def _check_cuda(arguments: argparse.Namespace) -> int:
    from planner import cuda_check

    settings = cuda_check.settings_of(arguments.device, size=arguments.size, quick=arguments.quick)
    if arguments.models:
        settings = cuda_check.with_models(settings, tuple(arguments.models))
    with _Bar(settings.phases) as bar:
        check = cuda_check.run(settings, tell=bar.tell)
    check.append_to(arguments.results)
    print(check)
    print(f"\ntotal {check.seconds:.0f} s; {len(check.rows)} lines appended to {arguments.results}")
    return _verdict(check.failures())


def _verdict(failures: Sequence[str]) -> int:
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    return FAILED if failures else HELD


class _Bar:
    """A progress bar on stderr; silent where tqdm is not installed."""

    def __init__(self, phases: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(
                total=phases, file=sys.stderr, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
            )
        self._started = False

    def tell(self, phase: str) -> None:
        """A new phase begins, so the one before it is done."""
        if self._bar is not None:
            self._bar.update(1 if self._started else 0)
            self._bar.set_description(f"{phase:<28}")
        self._started = True

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(0 if failed else 1)
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
