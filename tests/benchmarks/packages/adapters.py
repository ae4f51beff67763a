"""Adapters, quantization, pruning and per-sample gradients: what wraps or rewrites a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes

# ---------------------------------------------------------------------------------------------- peft


def _tokens(count: int = 4, length: int = 24, words: int = 128) -> Any:
    def batch() -> dict[str, Any]:
        ids = torch.randint(3, words, (count, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return batch


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_embd=48, n_layer=3, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config)


def _llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _peft(config: Any, model: nn.Module | None = None) -> Sample:
    from peft import get_peft_model

    return Sample(get_peft_model(model or _llama(), config).train(), _tokens())


@case("peft")
def lora() -> Sample:
    """A cache in the outputs: ``use_cache`` as the config has it."""
    from peft import LoraConfig

    return _peft(
        LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


@case("peft")
def dora() -> Sample:
    from peft import LoraConfig

    return _peft(LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))


@case("peft")
def prefix_tuning() -> Sample:
    from peft import PrefixTuningConfig

    return _peft(PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


@case("peft")
def prompt_tuning() -> Sample:
    from peft import PromptTuningConfig

    return _peft(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), _gpt2())


@case("peft")
def p_tuning() -> Sample:
    from peft import PromptEncoderConfig

    return _peft(PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, task_type="CAUSAL_LM"))


@case("peft")
def ia3() -> Sample:
    from peft import IA3Config

    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    return _peft(config)


@case("peft")
def adalora() -> Sample:
    """Its regularizer is computed over the parameters, and its ranks change with the step."""
    from peft import AdaLoraConfig

    return _peft(AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=20, task_type="CAUSAL_LM"))


@case("peft")
def orthogonal() -> Sample:
    from peft import OFTConfig

    return _peft(OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@case("peft")
def neftune_hook() -> Sample:
    """NEFTune: a hook on the embedding that adds noise."""
    from peft import LoraConfig, get_peft_model
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = get_peft_model(
        _llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    return Sample(model, _tokens())


# -------------------------------------------------------------------------------------------- torchao


@case("torchao")
def quantization_aware() -> Sample:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = _llama(use_cache=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return Sample(model.train(), _tokens())


@case("torchao")
def float8_training() -> Sample:
    """Weights in int8 with stochastic rounding."""
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    quantize_(model, int8_weight_only_quantized_training())
    return Sample(model, lambda: (torch.randn(64, 32),), classes, "sgd")


@case("torch", "qat_prepared")
def qat_prepared() -> Sample:
    """Eager quantization-aware training: fake quantizers with observers."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    model.qconfig = get_default_qat_qconfig("x86")
    return Sample(prepare_qat(model.train()), lambda: (torch.randn(8, 3, 24, 24),), classes)


@case("torch", "spectral_and_weight_norm_pruned")
def spectral_and_weight_norm_pruned() -> Sample:
    """Parametrizations with power iteration, and a pruned layer whose weight a hook makes."""
    from torch.nn.utils import parametrizations, prune

    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(32, 64)), nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(64, 64)), nn.ReLU(),
        prune.l1_unstructured(nn.Linear(64, 2), "weight", 0.3),
    )  # fmt: skip
    return Sample(model, lambda: (torch.randn(128, 32),), classes)


@case("torch", "adaptive_softmax")
def adaptive_softmax() -> Sample:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell = nn.Embedding(200, 32), nn.GRU(32, 48, batch_first=True)
            self.head = nn.AdaptiveLogSoftmaxWithLoss(48, 200, [20, 80])

        def forward(self, ids: Tensor) -> Tensor:
            hidden, _ = self.cell(self.embed(ids[:, :-1]))
            return self.head(hidden.flatten(0, 1), ids[:, 1:].flatten()).loss

    return Sample(Words(), lambda: (torch.randint(0, 200, (8, 24)),))


@case("torch", "connectionist")
def connectionist() -> Sample:
    """CTC, whose lengths are read."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.LSTM(16, 32, 2, dropout=0.2, bidirectional=True), nn.Linear(64, 12)

        def forward(self, frames: Tensor, targets: Tensor) -> Tensor:
            logs = self.head(self.net(frames)[0]).log_softmax(-1)
            lengths = torch.full((frames.shape[1],), frames.shape[0])
            return nn.functional.ctc_loss(
                logs, targets, lengths, torch.full((targets.shape[0],), targets.shape[1])
            )

    return Sample(Speech(), lambda: (torch.randn(30, 4, 16), torch.randint(1, 12, (4, 8))))


@case("torch", "packed_lengths")
def packed_lengths() -> Sample:
    """Sequences of several lengths, packed."""
    from torch.nn.utils.rnn import pack_padded_sequence

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.GRU(16, 32, 2, dropout=0.2, batch_first=True), nn.Linear(32, 2)

        def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(series, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.net(packed)[1][-1])

    return Sample(Packed(), lambda: (torch.randn(8, 20, 16), torch.randint(5, 20, (8,))), classes)


# ------------------------------------------------------------------------------------------- brevitas


@case("brevitas")
def quantized_convolutions() -> Sample:
    import brevitas.nn as qnn

    model = nn.Sequential(
        qnn.QuantConv2d(3, 16, 3, weight_bit_width=4), nn.BatchNorm2d(16), qnn.QuantReLU(bit_width=4),
        qnn.QuantConv2d(16, 16, 3, weight_bit_width=4), qnn.QuantReLU(bit_width=4), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), qnn.QuantLinear(16, 2, bias=True, weight_bit_width=4),
    )  # fmt: skip
    return Sample(model, lambda: (torch.randn(8, 3, 24, 24),), classes)


# ----------------------------------------------------------------------------------------- bitsandbytes


@case("bitsandbytes")
def frozen_four_bit() -> Sample:
    """QLoRA: frozen four-bit weights, and adapters that train."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = _llama(use_cache=False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj", "up_proj"):
            owner = layer.self_attn if name != "up_proj" else layer.mlp
            linear = getattr(owner, name)
            four = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.float32,
            )  # fmt: skip
            four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(owner, name, four.to("cpu"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Sample(get_peft_model(model, config).train(), _tokens())


@case("bitsandbytes")
def frozen_eight_bit() -> Sample:
    """Frozen eight-bit weights under adapters that train."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = _llama(use_cache=False)
    for layer in model.model.layers:
        for owner, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
            linear = getattr(owner, name)
            eight = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
            )
            eight.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(owner, name, eight.to("cpu"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Sample(get_peft_model(model, config).train(), _tokens())


# -------------------------------------------------------------------------------------------- opacus


@case("opacus")
def per_sample_gradients() -> Sample:
    """Hooks on submodules that keep activations and compute a gradient per sample."""
    from opacus import GradSampleModule

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    return Sample(GradSampleModule(model), lambda: (torch.randn(32, 32),), classes)


@case("opacus")
def private_lstm() -> Sample:
    from opacus.layers import DPLSTM

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = DPLSTM(16, 32, batch_first=True), nn.Linear(32, 2)

        def forward(self, series: Tensor) -> Tensor:
            return self.head(self.net(series)[0][:, -1])

    return Sample(Net(), lambda: (torch.randn(16, 10, 16),), classes)
