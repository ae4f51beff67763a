"""Small models of many families of transformers, from configs, with a batch each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["FAMILIES", "Sample"]

Sample = Callable[[], tuple[nn.Module, dict[str, Any]]]
WORDS = 128

# ------------------------------------------------------------------------------------------- sizes

_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_DECODER = {
    "vocab_size": WORDS, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False, **_LAYERS, **_ENDS,
}  # fmt: skip
_ENCODER = {
    "vocab_size": WORDS, "num_hidden_layers": 3, "max_position_embeddings": 64, "pad_token_id": 0, **_LAYERS
}  # fmt: skip
_VISION = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, **_LAYERS}
_TEXT = {"vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 32, **_LAYERS}
_BOTH_SIDES = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "use_cache": False, **_ENDS,
    "decoder_start_token_id": 3,
}  # fmt: skip
_AUDIO = {
    "vocab_size": 32, "num_hidden_layers": 2, **_LAYERS, "conv_dim": (16, 16), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_ATTENTIVE_STAGES = {**_STAGES, "num_attention_heads": [1, 2, 2, 4]}

# ------------------------------------------------------------------------------------------ batches


def _words(count: int = 4, length: int = 24, first: int = 2) -> Tensor:
    return torch.randint(first, WORDS, (count, length))


def _next_words() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _unmasked() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "labels": ids.clone()}


def _labelled() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 2}


def _translated() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _words(4, 12)}


def _pixels(side: int = 32, count: int = 4) -> dict[str, Any]:
    return {"pixel_values": torch.randn(count, 3, side, side)}


def _images(side: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {**_pixels(side), "labels": torch.arange(4) % 2}


def _captioned() -> dict[str, Any]:
    return {**_pixels(), "input_ids": _words(4, 12), "return_loss": True}


def _asked() -> dict[str, Any]:
    ids = _words(2, 32, first=6)
    ids[:, 4:20] = 5  # where the image goes
    return {
        **_pixels(count=2), "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()
    }  # fmt: skip


def _heard(labels: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_values": torch.randn(2, 800), "labels": labels}


# ----------------------------------------------------------------------------------------- families


def _sample(
    model: str, sizes: Mapping[str, Any], batch: Callable[[], dict[str, Any]], config: str | None = None
) -> Sample:
    """The class ``model`` of transformers, from ``config`` (default: by the class's own) at ``sizes``."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        kind = getattr(transformers, model)
        settings = getattr(transformers, config) if config else kind.config_class
        return kind(settings(**sizes)).train(), batch()

    return make


def _decoder(name: str, config: str | None = None, **more: Any) -> Sample:
    return _sample(f"{name}ForCausalLM", {**_DECODER, **more}, _next_words, config)


def _encoder(name: str, **more: Any) -> Sample:
    return _sample(f"{name}ForSequenceClassification", {**_ENCODER, **more}, _labelled)


def _classifier(name: str, side: int = 32, **sizes: Any) -> Sample:
    return _sample(f"{name}ForImageClassification", sizes, _images(side))


def _llava() -> tuple[nn.Module, dict[str, Any]]:
    parts = {
        "text_config": transformers.LlamaConfig(**_DECODER),
        "vision_config": transformers.CLIPVisionConfig(**_VISION),
    }
    return _sample(
        "LlavaForConditionalGeneration", {**parts, "image_token_index": 5, "image_seq_length": 16}, _asked
    )()


FAMILIES: dict[str, Sample] = {
    # decoders
    "Llama": _decoder("Llama"),
    "Mistral": _decoder("Mistral", sliding_window=8),
    "Qwen2": _decoder("Qwen2"),
    "Qwen3": _decoder("Qwen3", head_dim=8),
    "Gemma": _decoder("Gemma", head_dim=8),
    "Gemma2": _decoder("Gemma2", head_dim=8),
    "Gemma3": _decoder("Gemma3", "Gemma3TextConfig", head_dim=8),
    "Phi": _decoder("Phi"),
    "Phi3": _decoder("Phi3"),
    "Olmo2": _decoder("Olmo2"),
    "Granite": _decoder("Granite"),
    "StableLm": _decoder("StableLm"),
    "SmolLM3": _decoder("SmolLM3"),
    "Cohere": _decoder("Cohere"),
    "Glm": _decoder("Glm", head_dim=8),
    "Falcon": _decoder("Falcon"),
    "GPTNeoX": _decoder("GPTNeoX"),
    "GPT2": _sample(
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "use_cache": False},
        _next_words,
    ),
    "GPTJ": _sample(
        "GPTJForCausalLM",
        {
            "vocab_size": WORDS,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "use_cache": False,
        },
        _next_words,
    ),
    "GPTNeo": _sample(
        "GPTNeoForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
            "use_cache": False,
        },
        _next_words,
    ),
    "OPT": _sample(
        "OPTForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        _next_words,
    ),
    "Bloom": _sample(
        "BloomForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 3, "n_head": 4, "use_cache": False},
        _next_words,
    ),
    "Mpt": _sample(
        "MptForCausalLM",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 64,
            "use_cache": False,
        },
        _next_words,
    ),
    # mixtures of experts and state spaces
    "Mixtral": _decoder("Mixtral", num_local_experts=4),
    "Qwen2Moe": _decoder("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=32),
    "Qwen3Moe": _decoder("Qwen3Moe", **_EXPERTS, head_dim=8),
    "DeepseekV3": _decoder(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "Mamba": _sample(
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False},
        _unmasked,
    ),
    "Mamba2": _sample(
        "Mamba2ForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_cache": False,
        },
        _unmasked,
    ),
    # encoders
    "Bert": _encoder("Bert"),
    "Roberta": _encoder("Roberta"),
    "XLMRoberta": _encoder("XLMRoberta"),
    "Electra": _encoder("Electra", embedding_size=32),
    "Albert": _encoder("Albert", embedding_size=16),
    "MPNet": _encoder("MPNet"),
    "ModernBert": _encoder("ModernBert"),
    "BigBird": _encoder("BigBird"),
    "DistilBert": _sample(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": WORDS,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        _labelled,
    ),
    "XLNet": _sample(
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64},
        _labelled,
    ),
    "DebertaV2": _encoder(
        "DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    ),
    "Longformer": _encoder("Longformer", attention_window=8),
    # encoder and decoder
    "T5": _sample(
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
        _translated,
    ),
    "Bart": _sample(
        "BartForConditionalGeneration", {**_BOTH_SIDES, "max_position_embeddings": 64}, _translated
    ),
    "Marian": _sample("MarianMTModel", {**_BOTH_SIDES, "max_position_embeddings": 64}, _translated),
    # sound and series
    "Whisper": _sample(
        "WhisperForConditionalGeneration",
        {**_BOTH_SIDES, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
        lambda: {"input_features": torch.randn(2, 16, 64), "labels": _words(2, 12)},
    ),
    "Wav2Vec2": _sample("Wav2Vec2ForCTC", _AUDIO, _heard(torch.ones(2, 10, dtype=torch.long))),
    "Hubert": _sample("HubertForSequenceClassification", _AUDIO, _heard(torch.tensor([0, 1]))),
    "PatchTST": _sample(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
        },
        lambda: {"past_values": torch.randn(4, 32, 3), "future_values": torch.randn(4, 8, 3)},
    ),
    # vision
    "ViT": _classifier("ViT", **_VISION),
    "DeiT": _classifier("DeiT", **_VISION),
    "Beit": _classifier("Beit", **_VISION),
    "Dinov2": _classifier("Dinov2", **_VISION),
    "Swin": _classifier(
        "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "Swinv2": _classifier(
        "Swinv2", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "ConvNextV2": _classifier("ConvNextV2", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1]),
    "ResNet": _classifier("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2]),
    "RegNet": _classifier("RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8),
    "EfficientNet": _classifier(
        "EfficientNet", image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320
    ),
    "MobileNetV2": _classifier("MobileNetV2", image_size=32, depth_multiplier=0.35),
    "MobileViT": _classifier(
        "MobileViT",
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
    ),
    "Pvt": _classifier("Pvt", 64, image_size=64, **_ATTENTIVE_STAGES),
    "PoolFormer": _classifier("PoolFormer", 64, **_STAGES),
    "Segformer": _sample(
        "SegformerForSemanticSegmentation",
        {**_ATTENTIVE_STAGES, "decoder_hidden_size": 16, "num_labels": 3},
        lambda: {**_pixels(64), "labels": torch.randint(0, 3, (4, 64, 64))},
    ),
    "DPT": _sample(
        "DPTForDepthEstimation",
        {
            **_VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8,
            "is_hybrid": False,
            "reassemble_factors": [4, 2, 1, 0.5],
        },
        _pixels,
    ),
    "ViTMAE": _sample(
        "ViTMAEForPreTraining",
        {
            **_VISION,
            "decoder_num_attention_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
        },
        _pixels,
    ),
    "VideoMAE": _sample(
        "VideoMAEForVideoClassification",
        {**_VISION, "num_frames": 4, "tubelet_size": 2},
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32), "labels": torch.tensor([0, 1])},
    ),
    # text and images
    "CLIP": _sample(
        "CLIPModel",
        {"text_config": {**_TEXT, **_ENDS}, "vision_config": _VISION, "projection_dim": 16},
        _captioned,
    ),
    "Siglip": _sample("SiglipModel", {"text_config": _TEXT, "vision_config": _VISION}, _captioned),
    "Blip": _sample(
        "BlipForConditionalGeneration",
        {
            "text_config": {**_TEXT, **_ENDS, "encoder_hidden_size": 32, "sep_token_id": 2},
            "vision_config": _VISION,
        },
        lambda: {**_pixels(), "input_ids": _words(4, 12), "labels": _words(4, 12)},
    ),
    "Llava": _llava,
}
