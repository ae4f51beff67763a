"""Training graphs of real models at real sizes, captured without memory, for the solvers' benchmark.

    python -m tests.benchmarks.graphs [NAME ...]

Each model is built with fake tensors in bfloat16 (no weights, no activations) and its training step,
loss and backward included, goes through the planner's own capture: views folded onto storages, in-place
backward, generator states of dropout, buffers updated once.  What comes out is the ``solvers.Problem``
that ``planner.plan`` would solve, written to ``graphs/NAME.json.gz``; ``graphs/captured.json`` has what
it took, ``graphs/modules/NAME.json.gz`` the module of each forward op, from which baselines make blocks
of several sizes.  Each capture runs in a process of its own, so that seconds and peak RSS are its own.

Seconds are the roofline of a device that attains 800 TFLOP/s in bfloat16 and 3.35 TB/s, with 3 us a
launch: an H100 as it behaves rather than as its data sheet has it.

Dropout is on wherever the family has it by default, but for the attention's probabilities: graphs are
captured as the CPU would run them, where attention with dropout falls back to separate kernels and a
square matrix, which no GPU makes.  (T5 has no fused attention anywhere and keeps its own.)  Sequences are
packed: no padding, so no mask beyond the causal one.

``resident_bytes`` of a problem are parameters, buffers and inputs.  Budgets of the benchmark are
fractions of what a step adds to them when nothing is recomputed (see ``activation_peak_bytes``).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner._compat import FakeTensorMode
from planner.checks import zoo
from planner.costs.op_costs import graph_costs
from planner.devices.rates import Device
from planner.solving.priced import prepare
from solvers import Problem, Schedule, read_problem, simulate, write_problem
from tests.benchmarks import public_graphs

__all__ = ["FOLDER", "GRAPHS", "activation_peak_bytes", "capture_problem", "load"]

FOLDER = Path(__file__).parent / "graphs"
RECORD = FOLDER / "captured.json"

ATTAINED_H100 = Device("H100, attained", 60e12, 60e12, 400e12, 800e12, 3.35e12, 3e-6)

Step = tuple[nn.Module, dict[str, Tensor]]


def activation_peak_bytes(problem: Problem) -> int:
    """Peak above ``resident_bytes`` when nothing is recomputed: activations, gradients, held outputs."""
    return simulate(problem, Schedule.keep_all(problem)).peak_bytes - problem.resident_bytes


def load(name: str) -> Problem:
    """The captured (or generated) problem called ``name``; ``OSError`` if there is none."""
    return read_problem(FOLDER / f"{name}.json.gz")


# ------------------------------------------------------------------------------------------ models


def _tokens(batch: int, length: int, *names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(batch, length, dtype=torch.long) for name in names}


def _hf() -> Any:
    import transformers

    return transformers


def _gpt2_medium() -> Step:
    model = zoo.gpt2(n_embd=1024, n_layer=24, n_head=16, n_positions=1024, attn_pdrop=0.0)
    return model, _tokens(16, 1024, "input_ids", "labels")


def _bert_large() -> Step:
    config = _hf().BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        attention_probs_dropout_prob=0.0,
    )
    return _hf().BertForMaskedLM(config), _tokens(16, 512, "input_ids", "labels")


def _llama(batch: int, length: int, **config: Any) -> Step:
    model = _hf().LlamaForCausalLM(_hf().LlamaConfig(use_cache=False, **config))
    return model, _tokens(batch, length, "input_ids", "labels")


def _llama_1b() -> Step:
    return _llama(
        2,
        2048,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


def _llama_7b() -> Step:
    return _llama(
        2,
        4096,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )


def _images(batch: int, side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(batch, 3, side, side), "labels": torch.zeros(batch, dtype=torch.long)}


def _vit_large() -> Step:
    config = _hf().ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=1000,
    )
    return _hf().ViTForImageClassification(config), _images(64, 224)


def _internvl2_1b() -> Step:
    """InternViT-300M on six tiles of 448 pixels per row, Qwen2-0.5B on 1792 tokens per row, two rows."""
    rows, tiles, per_tile, text = 2, 6, 256, 256
    config = _hf().InternVLConfig(
        vision_config=_hf().InternVLVisionConfig(
            image_size=[448, 448], patch_size=[14, 14], attention_bias=True
        ),
        text_config=_hf().Qwen2Config(
            use_cache=False,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=151655,
        ),
        image_token_id=1,
        image_seq_length=per_tile,
        tie_word_embeddings=False,
    )
    model = _hf().InternVLForConditionalGeneration(config)
    return model, {
        "pixel_values": torch.zeros(rows * tiles, 3, 448, 448),
        **_tokens(rows, tiles * per_tile + text, "input_ids", "labels"),
    }


def _resnet50() -> Step:
    images = _images(64, 224)
    return zoo.ResNet(), {"pixels": images["pixel_values"], "labels": images["labels"]}


def _convnext_base() -> Step:
    config = _hf().ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=1000)
    return _hf().ConvNextForImageClassification(config), _images(64, 224)


def _unet() -> Step:
    return zoo.UNet(), {
        "pixels": torch.zeros(16, 3, 256, 256),
        "masks": torch.zeros(16, 256, 256, dtype=torch.long),
    }


def _t5_base() -> Step:
    config = _hf().T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, use_cache=False, vocab_size=32128
    )
    config.decoder_start_token_id = 0
    return _hf().T5ForConditionalGeneration(config), {
        **_tokens(8, 512, "input_ids"),
        **_tokens(8, 128, "decoder_input_ids", "labels"),
    }


def _whisper_small() -> Step:
    config = _hf().WhisperConfig(
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        use_cache=False,
    )
    return _hf().WhisperForConditionalGeneration(config), {
        "input_features": torch.zeros(16, 80, 3000),
        **_tokens(16, 448, "decoder_input_ids", "labels"),
    }


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al., CVPR 2017): each layer reads all earlier ones of its block.

    ``blocks=(6, 12, 24, 16)`` with growth 32 is DenseNet-121.  All layers lie in flat lists, so the
    names of modules say nothing about blocks.
    """

    def __init__(self, blocks: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32) -> None:
        super().__init__()
        self.blocks = blocks
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 2 * growth, 7, 2, 3, bias=False)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(2 * growth)])
        channels = 2 * growth
        for k, depth in enumerate(blocks):
            for _ in range(depth):
                self._append(channels, 4 * growth, 1)
                self._append(4 * growth, growth, 3)
                channels += growth
            if k + 1 < len(blocks):
                self._append(channels, channels // 2, 1)
                channels //= 2
        self.norms.append(nn.BatchNorm2d(channels))
        self.head = nn.Linear(channels, 1000)

    def _append(self, channels_in: int, channels_out: int, kernel: int) -> None:
        self.norms.append(nn.BatchNorm2d(channels_in))
        self.convolutions.append(nn.Conv2d(channels_in, channels_out, kernel, 1, kernel // 2, bias=False))

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        pairs = zip(self.norms[1:-1], self.convolutions[1:], strict=True)
        x = F.max_pool2d(F.relu(self.norms[0](self.convolutions[0](pixels))), 3, 2, 1)

        def run(y: Tensor) -> Tensor:
            norm, convolution = next(pairs)
            return convolution(F.relu(norm(y)))

        for k, depth in enumerate(self.blocks):
            for _ in range(depth):
                x = torch.cat([x, run(run(x))], 1)
            if k + 1 < len(self.blocks):
                x = F.avg_pool2d(run(x), 2)
        return F.cross_entropy(self.head(F.relu(self.norms[-1](x)).mean((2, 3))), labels)


def _densenet121() -> Step:
    images = _images(64, 224)
    return DenseNet(), {"pixels": images["pixel_values"], "labels": images["labels"]}


class GRU(nn.Module):
    """Gated recurrent units (Cho et al., EMNLP 2014) unrolled in plain tensor code: one module, no layers."""

    def __init__(self, words: int = 1000, width: int = 1024, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(words, width))
        self.input = nn.Parameter(torch.empty(layers, width, 3 * width))
        self.state = nn.Parameter(torch.empty(layers, width, 3 * width))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        layers, width, _ = self.input.shape
        states = [self.embedding.new_zeros(len(tokens), width) for _ in range(layers)]
        top = []
        for step in tokens.unbind(1):
            x = F.embedding(step, self.embedding)
            for k in range(layers):
                reset, update, new = (x @ self.input[k]).chunk(3, 1)
                reset_h, update_h, new_h = (states[k] @ self.state[k]).chunk(3, 1)
                keep = torch.sigmoid(update + update_h)
                candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
                states[k] = x = candidate + keep * (states[k] - candidate)
            top.append(x)
        return F.cross_entropy(torch.cat(top) @ self.embedding.T, labels.T.flatten())


def _gru() -> Step:
    return GRU(), _tokens(256, 64, "tokens", "labels")


GRAPHS: Mapping[str, Callable[[], Step]] = {
    "gpt2-medium-b16x1024": _gpt2_medium,
    "bert-large-b16x512": _bert_large,
    "llama-1b-b2x2048": _llama_1b,
    "llama-7b-b2x4096": _llama_7b,
    "vit-large-b64x224": _vit_large,
    "internvl2-1b-b2x1792": _internvl2_1b,
    "resnet50-b64x224": _resnet50,
    "convnext-base-b64x224": _convnext_base,
    "unet-b16x256": _unet,
    "t5-base-b8x512": _t5_base,
    "whisper-small-b16": _whisper_small,
    "densenet121-b64x224": _densenet121,
    "gru-b256x64": _gru,
    "mobilenet-b512x224": public_graphs.mobilenet,
    "vgg16-b256x224": lambda: public_graphs.vgg(public_graphs.VGG16),
    "vgg19-b256x224": lambda: public_graphs.vgg(public_graphs.VGG19),
    "segnet-b32x416x608": public_graphs.segnet,
    "vgg-unet-b32x416x608": public_graphs.vgg_unet,
    "gru-cell-b1024x40": public_graphs.gru_cell,
}


# ----------------------------------------------------------------------------------------- capture


def without_memory(build: Callable[[], Step]) -> Step:
    """What ``build`` makes, its tensors fake and in bfloat16.

    It is built on the meta device first: some constructors read numbers from small tensors that they make
    on the CPU, which fake tensors do not have.
    """
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), no_init_weights():
            model, inputs = build()
            if isinstance(model, _hf().PreTrainedModel):
                model.tie_weights()  # left out with the weights' values
    finally:
        torch.set_default_dtype(before)
    made: dict[int, Tensor] = {}  # a tied parameter stays one

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, tensor in [*parameters, *buffers]:
                setattr(module, name, fake(tensor))
        return model.train(), {name: fake(tensor) for name, tensor in inputs.items()}


def capture_problem(build: Callable[[], Step], name: str) -> tuple[Problem, list[str]]:
    """One training step of what ``build`` makes, without memory, in bfloat16.

    The problem, and the path of the module that each of its forward ops is called in.
    """
    model, inputs = without_memory(build)
    step = prepare(model, inputs, costs="roofline")
    step = dataclasses.replace(step, costs=graph_costs(step.graph, "roofline", rates=ATTAINED_H100))
    forward = step.graph.ops[: step.graph.turn]
    return dataclasses.replace(step.problem, name=name), [op.module for op in forward]


def _capture(name: str) -> dict[str, Any]:
    """Capture and write one graph; what it took and what it is."""
    began = time.perf_counter()
    problem, modules = capture_problem(GRAPHS[name], name)
    seconds = time.perf_counter() - began
    write_problem(problem, FOLDER / f"{name}.json.gz")
    text = json.dumps(modules, separators=(",", ":")).encode()
    (FOLDER / "modules" / f"{name}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    return {
        "ops": len(problem),
        "turn": problem.turn,
        "activation_peak_bytes": activation_peak_bytes(problem),
        "resident_bytes": problem.resident_bytes,
        "step_seconds": problem.total_seconds,
        "capture_seconds": round(seconds, 2),
        "capture_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
        "transformers": _hf().__version__,
    }


def main(names: Iterable[str]) -> int:
    """Capture ``names``, each in a process of its own; the exit code counts those that failed."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failed = 0
    for name in names or GRAPHS:
        code = f"import json, tests.benchmarks.graphs as g; print(json.dumps(g._capture({name!r})))"
        ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            failed += 1
            sys.stderr.write(f"{name}: FAILED\n")
            continue
        record[name] = json.loads(ran.stdout.splitlines()[-1])
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        sys.stdout.write(f"{name}: {record[name]}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
