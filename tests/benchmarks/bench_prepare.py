"""How long a step takes from its model to its problem, beside the same at an earlier commit, in one run.

    python -m tests.benchmarks.bench_prepare [NAMES ...] [--repeats 3] [--commit 56a9133]

For each model, in turn, a process of the tree that this file is in and one of the earlier commit, which is
checked out into a temporary folder, capture the step, price it, and state its problem: models without memory
in bfloat16 (a real one where sizes are symbols), AdamW, roofline costs.  What counts is CPU seconds of the
process (other work on the machine only adds to them, so the least of the repeats stands) and its peak RSS,
torch and transformers included.  Imports are a row of their own: ``import planner`` beyond torch's, and all
that a first small step imports and does.

Prints a table, writes ``results/prepare.json`` and ``results/prepare.md`` when all rows are asked for (after
each row, so that it may be broken off), and says what falls short of ``TARGETS``; exit code 1 if anything
does.

What keeps equal blocks from being captured once and copied: autograd's engine orders the backward of what
ran, so a block that was not run has none, and its nodes are numbered among all others; and its graph hangs on
what it reads of its module (its index, its rate of dropped paths), which is known once it has run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "prepare.json"
BEFORE = "56a9133"

# CPU seconds as a share of the earlier commit's.
TARGETS: Mapping[str, float] = {
    "InternVL2-1B": 0.2,
    "BERT-base": 0.35,
    "GPT2-medium": 0.35,
    "ResNet-50": 0.35,
    "T5-base": 0.35,
    "BERT-base, symbolic sizes": 0.3,
}
DEEPER = 1.5  # a Llama of 64 layers beside one of 8
IMPORT_S = 0.1  # ``import planner`` beyond torch's
FIRST, SHALLOW, DEEP = "first small step", "Llama, 8 layers", "Llama, 64 layers"


# -- the models, in a process of either tree ------------------------------------------------------------


def _ids(rows: int, length: int) -> Any:
    import torch

    return torch.zeros(rows, length, dtype=torch.long)


def _internvl2_1b() -> Any:
    import torch

    from planner.examples.internvl2 import SHAPES, internvl2

    shape, rows, tiles, text = SHAPES["1b"], 2, 6, 256
    ids = _ids(rows, tiles * shape.tokens_per_tile + text)
    pixels = torch.zeros(rows * tiles, 3, shape.image, shape.image)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids, "labels": ids}
    return internvl2(shape), batch


def _bert() -> Any:
    import transformers as hf

    ids, labels = _ids(16, 256), _ids(16, 1)[:, 0]
    batch = {"input_ids": ids, "attention_mask": ids, "labels": labels}
    return hf.BertForSequenceClassification(hf.BertConfig()), batch


def _gpt2() -> Any:
    import transformers as hf

    ids = _ids(4, 512)
    config = hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)
    return hf.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def _resnet() -> Any:
    import torch
    import transformers as hf

    batch = {"pixel_values": torch.zeros(32, 3, 224, 224), "labels": _ids(32, 1)[:, 0]}
    return hf.ResNetForImageClassification(hf.ResNetConfig()), batch


def _t5() -> Any:
    import transformers as hf

    ids = _ids(8, 256)
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    config = hf.T5Config(**sizes, use_cache=False, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}


def _llama(layers: int) -> Any:
    import transformers as hf

    ids = _ids(4, 512)
    config = hf.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


MODELS: Mapping[str, Callable[[], Any]] = {
    "InternVL2-1B": _internvl2_1b,
    "BERT-base": _bert,
    "GPT2-medium": _gpt2,
    "ResNet-50": _resnet,
    "T5-base": _t5,
    "BERT-base, symbolic sizes": _bert,
    SHALLOW: lambda: _llama(8),
    DEEP: lambda: _llama(64),
}


def measure(name: str) -> dict[str, Any]:
    """What the tree on ``sys.path`` takes for ``name``."""
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    began = time.process_time()
    importlib.import_module("planner")
    import_s = time.process_time() - began
    step_of = _module("solving.priced", "prepared").prepare
    small = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())

    def loss_fn(out: Any) -> Any:
        return out.sum()

    assert len(step_of(small, (torch.zeros(2, 4),), loss_fn=loss_fn, costs="roofline").problem.ops) > 3
    first_s = time.process_time() - began
    if name == FIRST:
        return {"cpu_s": first_s, "import_s": import_s, "ops": 0, "rss_bytes": _peak_rss_bytes()}
    from tests.benchmarks.graphs import without_memory

    symbolic = "symbolic" in name
    model, batch = MODELS[name]() if symbolic else without_memory(MODELS[name])
    model.train()
    began = time.process_time()
    step = step_of(model, batch, optimizer=torch.optim.AdamW, costs="roofline", dynamic=symbolic)
    ops = len(step.problem.ops)
    taken_s = time.process_time() - began
    return {"cpu_s": taken_s, "ops": ops, "rss_bytes": _peak_rss_bytes()}


def _module(*names: str) -> Any:
    """The first of these modules of the package that the tree has."""
    for name in names:
        try:
            return importlib.import_module(f"planner.{name}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"planner has none of {', '.join(names)}")


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- side by side ---------------------------------------------------------------------------------------


def _run(tree: Path, name: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", name]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name} in {tree.name}: {ran.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return record


def _least(of: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: min(record[key] for record in of) for key in of[0]}


def bench(
    names: list[str], repeats: int, commit: str, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Rows of both trees, run in turns; ``note`` is given all so far after each."""
    rows: dict[str, Any] = {}
    record = {"before": commit, "repeats": repeats, "versions": _versions(), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder)
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", folder], input=packed.stdout, check=True)
        for name in names:
            found: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
            for _ in range(repeats):
                found["before"].append(_run(earlier, name))
                found["now"].append(_run(ROOT, name))
            rows[name] = {which: _least(records) for which, records in found.items()}
            print(_line(name, rows[name]), flush=True)
            note(record)
    return record


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def _line(name: str, row: Mapping[str, Any]) -> str:
    before, now = row["before"], row["now"]
    share = now["cpu_s"] / before["cpu_s"]
    taken = f"{before['cpu_s']:.2f} | {now['cpu_s']:.2f} | {share:.2f} | {TARGETS.get(name, '')}"
    rss = f"{before['rss_bytes'] / 1e6:.0f} | {now['rss_bytes'] / 1e6:.0f}"
    return f"| {name} | {now['ops'] or ''} | {taken} | {rss} |"


def table(record: Mapping[str, Any]) -> list[str]:
    """Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# From a model to its problem",
        "",
        f"CPU seconds and peak RSS beside commit {record['before']}, least of {record['repeats']} runs in "
        f"turns (`python -m tests.benchmarks.bench_prepare`; {versions}).",
        "",
        "| model | ops | s before | s now | share | target | MB before | MB now |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(name, row) for name, row in record["rows"].items()),
        "",
    ]
    missed = short_of(record["rows"])
    return [*lines, *(["Short of its targets:", "", *(f"* {m}" for m in missed)] if missed else []), ""]


def short_of(rows: Mapping[str, Any]) -> list[str]:
    """What falls short, a line each."""
    out = []
    for name, row in rows.items():
        before, now = row["before"], row["now"]
        share, target = now["cpu_s"] / before["cpu_s"], TARGETS.get(name)
        if target is not None and share > target:
            out.append(f"{name}: {share:.2f} of the CPU seconds, wanted {target}")
        if now["rss_bytes"] > 1.01 * before["rss_bytes"]:  # pages of one run and another
            ratio = now["rss_bytes"] / before["rss_bytes"]
            out.append(f"{name}: {ratio:.3f} of the peak RSS, wanted no more")
    if {SHALLOW, DEEP} <= rows.keys():
        deeper = rows[DEEP]["now"]["cpu_s"] / rows[SHALLOW]["now"]["cpu_s"]
        if deeper > DEEPER:
            out.append(f"64 layers of a Llama take {deeper:.1f} times what 8 take, wanted {DEEPER}")
    if FIRST in rows and rows[FIRST]["now"]["import_s"] > IMPORT_S:
        taken_s = rows[FIRST]["now"]["import_s"]
        out.append(f"import planner takes {taken_s:.2f} s beyond torch's, wanted {IMPORT_S}")
    return out


def write(record: Mapping[str, Any]) -> None:
    """The rows, and their table."""
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text("\n".join(table(record)), encoding="utf-8")


def main() -> int:
    """Exit code 1 if anything falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], FIRST, *MODELS], help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default=BEFORE)
    parser.add_argument("--measure", metavar="NAME", help="one model, here; for the processes it starts")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    names = arguments.names or [FIRST, *MODELS]
    note = (lambda _: None) if arguments.names else write
    record = bench(names, arguments.repeats, arguments.commit, note)
    missed = short_of(record["rows"])
    print("\n".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
