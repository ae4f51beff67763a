"""Models of transformers built unlike the rest: other attention, experts, matching, speech, series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, squares

WORDS = 96
_LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_DECODER: dict[str, Any] = {
    "vocab_size": WORDS, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **_LAYERS,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, **_LAYERS
}  # fmt: skip
_BOTH: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
}
_VISION: dict[str, Any] = {**_LAYERS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
_SPEECH: dict[str, Any] = {
    **_LAYERS, "num_hidden_layers": 2, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


def _words(count: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, WORDS, (count, length))


def _next() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _padded() -> dict[str, Any]:
    """Sequences of several lengths, padded on the right."""
    ids = _words()
    mask = (torch.arange(24)[None] < torch.randint(8, 25, (4, 1))).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _translated() -> dict[str, Any]:
    ids = _words()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _words(4, 12)}


def _made(
    name: str,
    settings: dict[str, Any],
    batch: Callable[[], dict[str, Any]],
    loss: Callable[[Any], Tensor] | None = None,
    config: Any = None,
) -> Sample:
    import transformers

    kind = getattr(transformers, name)
    settings = (config or kind.config_class)(**settings)
    return Sample(kind(settings).train(), batch, loss)


def _decoder(name: str, **more: Any) -> Sample:
    return _made(f"{name}ForCausalLM", {**_DECODER, **more}, _padded)


# -------------------------------------------------------------------------------------------- experts


@case("transformers")
def olmoe() -> Sample:
    return _decoder("Olmoe", num_experts=4, num_experts_per_tok=2, output_router_logits=True)


@case("transformers")
def phi_moe() -> Sample:
    """Routing by a custom function of autograd, with jitter."""
    return _decoder("Phimoe", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1)


@case("transformers")
def switch_transformer() -> Sample:
    settings = {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "expert_capacity": 16, "decoder_start_token_id": 0,
    }  # fmt: skip
    return _made("SwitchTransformersForConditionalGeneration", settings, _translated)


@case("transformers")
def nllb_moe() -> Sample:
    """Experts with a capacity, second experts drawn, layers dropped."""
    settings = {**_BOTH, "num_experts": 4, "expert_capacity": 32, "encoder_sparse_step": 1,
                "decoder_sparse_step": 1, "max_position_embeddings": 64}  # fmt: skip
    return _made("NllbMoeForConditionalGeneration", settings, _translated)


@case("transformers")
def gpt_oss() -> Sample:
    return _decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8)


# ---------------------------------------------------------------------------------- states and recurrence


@case("transformers")
def jamba() -> Sample:
    return _decoder(
        "Jamba", num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


@case("transformers")
def bamba() -> Sample:
    return _decoder(
        "Bamba", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8,
    )  # fmt: skip


@case("transformers")
def recurrent_gemma() -> Sample:
    return _decoder(
        "RecurrentGemma", lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
    )


@case("transformers")
def rwkv() -> Sample:
    settings = {"vocab_size": WORDS, "context_length": 64, "hidden_size": 32, "num_hidden_layers": 2,
                "attention_hidden_size": 32, "intermediate_size": 64}  # fmt: skip
    return _made("RwkvForCausalLM", settings, lambda: {"input_ids": (i := _words()), "labels": i.clone()})


@case("transformers")
def qwen3_next() -> Sample:
    """Gated delta rule beside attention, and experts."""
    return _decoder(
        "Qwen3Next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8,
        shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- attention


@case("transformers")
def reformer() -> Sample:
    """Reversible layers of their own backward, attention by hashing; their seeds are given here."""
    from transformers.models.reformer.modeling_reformer import ReformerLayer

    class Seeded(ReformerLayer):  # type: ignore[misc]
        def _init_attention_seed(self) -> None:
            self.attention_seed = 7
            torch.manual_seed(self.attention_seed)

        def _init_feed_forward_seed(self) -> None:
            self.feed_forward_seed = 8
            torch.manual_seed(self.feed_forward_seed)

    settings = {
        "vocab_size": WORDS, "hidden_size": 32, "feed_forward_size": 64, "num_attention_heads": 2,
        "attention_head_size": 16, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 32, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "num_buckets": 4, "num_hashes": 2, "is_decoder": True, "hash_seed": 0,
    }  # fmt: skip
    sample = _made(
        "ReformerModelWithLMHead",
        settings,
        lambda: {"input_ids": (i := _words(4, 32)), "labels": i.clone()},
    )
    for layer in sample.model.modules():
        if type(layer) is ReformerLayer:
            layer.__class__ = Seeded
    return sample


@case("transformers")
def funnel() -> Sample:
    settings = {
        "vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
        "num_decoder_layers": 1,
    }  # fmt: skip
    return _made("FunnelForMaskedLM", settings, _padded)


@case("transformers")
def led() -> Sample:
    settings = {**_BOTH, "attention_window": 8, "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64, "encoder_layerdrop": 0.2}  # fmt: skip
    return _made("LEDForConditionalGeneration", settings, _translated)


@case("transformers")
def long_t5() -> Sample:
    settings = {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "local_radius": 7, "global_block_size": 4, "encoder_attention_type": "transient-global",
        "decoder_start_token_id": 0,
    }  # fmt: skip
    return _made("LongT5ForConditionalGeneration", settings, _translated)


@case("transformers")
def f_net() -> Sample:
    return _made("FNetForMaskedLM", {**_ENCODER, "tpu_short_seq_length": 24},
                 lambda: {"input_ids": (i := _words()), "labels": i.clone()})  # fmt: skip


@case("transformers")
def nystromformer() -> Sample:
    return _made("NystromformerForMaskedLM", {**_ENCODER, "segment_means_seq_len": 24, "num_landmarks": 6},
                 lambda: {"input_ids": (i := _words()), "labels": i.clone()})  # fmt: skip


@case("transformers")
def conv_bert() -> Sample:
    return _made("ConvBertForMaskedLM", {**_ENCODER, "embedding_size": 16, "head_ratio": 2}, _padded)


@case("transformers")
def canine() -> Sample:
    settings = {**_LAYERS, "num_hidden_layers": 2, "max_position_embeddings": 64, "num_hash_buckets": 64,
                "local_transformer_stride": 8, "downsampling_rate": 4, "num_hash_functions": 4}  # fmt: skip

    def batch() -> dict[str, Any]:
        ids = torch.randint(32, 2000, (4, 32))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 2}

    return _made("CanineForSequenceClassification", settings, batch)


@case("transformers")
def perceiver() -> Sample:
    settings = {"vocab_size": WORDS, "d_model": 32, "d_latents": 32, "num_latents": 16, "num_blocks": 1,
                "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                "num_cross_attention_heads": 4, "max_position_embeddings": 24, "qk_channels": 32,
                "v_channels": 32}  # fmt: skip
    return _made("PerceiverForMaskedLM", settings,
                 lambda: {"inputs": (i := _words()), "labels": i.clone()})  # fmt: skip


@case("transformers")
def prophet_net() -> Sample:
    settings = {
        "vocab_size": WORDS, "hidden_size": 32, "encoder_ffn_dim": 64, "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "ngram": 2, "pad_token_id": 0,
        "decoder_start_token_id": 2,
    }  # fmt: skip
    return _made("ProphetNetForConditionalGeneration", settings, _translated)


# -------------------------------------------------------------------------------------------- vision


def _boxes(count: int = 2, side: int = 64) -> Callable[[], dict[str, Any]]:
    def batch() -> dict[str, Any]:
        labels = [
            {"class_labels": torch.randint(0, 3, (n,)), "boxes": 0.25 + 0.5 * torch.rand(n, 4)}
            for n in torch.randint(1, 4, (count,)).tolist()
        ]
        return {"pixel_values": torch.randn(count, 3, side, side), "labels": labels}

    return batch


def _backbone() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


_DETECTOR: dict[str, Any] = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 8,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_labels": 3,
}  # fmt: skip


@case("transformers")
def detr() -> Sample:
    """Matched by scipy's assignment, a loss over what is matched."""
    return _made("DetrForObjectDetection", {**_DETECTOR, "backbone_config": _backbone()}, _boxes())


@case("transformers")
def conditional_detr() -> Sample:
    return _made("ConditionalDetrForObjectDetection", {**_DETECTOR, "backbone_config": _backbone()}, _boxes())


@case("transformers")
def deformable_detr() -> Sample:
    settings = {**_DETECTOR, "backbone_config": _backbone(), "num_feature_levels": 3, "auxiliary_loss": True,
                "disable_custom_kernels": True}  # fmt: skip
    return _made("DeformableDetrForObjectDetection", settings, _boxes())


@case("transformers")
def rt_detr() -> Sample:
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    settings = {
        "backbone_config": backbone, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 32],
        "encoder_ffn_dim": 64, "d_model": 32, "num_queries": 8, "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "num_denoising": 6,
        "encoder_attention_heads": 4, "num_labels": 3, "use_pretrained_backbone": False, "backbone": None,
    }  # fmt: skip
    return _made("RTDetrForObjectDetection", settings, _boxes())


@case("transformers")
def yolos() -> Sample:
    settings = {
        **_VISION,
        "image_size": [64, 64],
        "patch_size": 16,
        "num_detection_tokens": 8,
        "num_labels": 3,
    }
    return _made("YolosForObjectDetection", settings, _boxes())


@case("transformers")
def mask2former() -> Sample:
    """Points drawn on the masks, and matched."""
    from transformers import SwinConfig

    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                      window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    settings = {
        "backbone_config": swin, "use_pretrained_backbone": False, "backbone": None, "feature_size": 32,
        "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
        "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 32, "num_queries": 8,
        "train_num_points": 64, "num_labels": 3,
    }  # fmt: skip

    def batch() -> dict[str, Any]:
        return {
            "pixel_values": torch.randn(2, 3, 64, 64),
            "mask_labels": [(torch.rand(n, 64, 64) > 0.5).float() for n in (2, 3)],
            "class_labels": [torch.arange(n) % 3 for n in (2, 3)],
        }

    return _made("Mask2FormerForUniversalSegmentation", settings, batch)


@case("transformers")
def group_vit() -> Sample:
    """Groups chosen by a hard Gumbel softmax."""
    text = {**_ENCODER, "num_attention_heads": 4}
    vision = {**_LAYERS, "depths": [1, 1], "num_group_tokens": [8, 0], "num_output_groups": [8, 4],
              "image_size": 32, "patch_size": 8}  # fmt: skip
    settings = {"text_config": text, "vision_config": vision, "projection_dim": 16,
                "projection_intermediate_dim": 32}  # fmt: skip

    def batch() -> dict[str, Any]:
        return {"input_ids": _words(4, 12), "pixel_values": torch.randn(4, 3, 32, 32), "return_loss": True}

    return _made("GroupViTModel", settings, batch)


@case("transformers")
def time_sformer() -> Sample:
    settings = {**_VISION, "num_frames": 4}
    return _made(
        "TimesformerForVideoClassification",
        settings,
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32), "labels": torch.arange(2)},
    )


# ------------------------------------------------------------------------------------ vision and words


def _seen(token: int, patches: int) -> Callable[[], dict[str, Any]]:
    def batch() -> dict[str, Any]:
        ids = torch.randint(8, WORDS, (2, 32))
        ids[:, 2 : 2 + patches] = token
        more = {"attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        return {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids, **more}

    return batch


@case("transformers")
def pali_gemma() -> Sample:
    settings = {
        "text_config": {"model_type": "gemma", **_DECODER, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        "image_token_index": 5, "projection_dim": 32, "hidden_size": 32,
    }  # fmt: skip
    inner = _seen(5, 16)

    def batch() -> dict[str, Any]:
        made = inner()
        return {**made, "token_type_ids": (torch.arange(32)[None] > 20).long().expand(2, 32).contiguous()}

    return _made("PaliGemmaForConditionalGeneration", settings, batch)


@case("transformers")
def intern_vl() -> Sample:
    settings = {
        "text_config": {"model_type": "qwen2", **_DECODER},
        "vision_config": {**_LAYERS, "num_hidden_layers": 2, "image_size": [32, 32], "patch_size": [8, 8]},
        "image_token_id": 5, "downsample_ratio": 0.5, "image_seq_length": 4,
    }  # fmt: skip
    return _made("InternVLForConditionalGeneration", settings, _seen(5, 4))


@case("transformers")
def qwen2_vl() -> Sample:
    """Rotary positions of three axes, computed from where the images are."""
    text = {
        **_DECODER,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    settings = {
        "text_config": text,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
                          "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
    }  # fmt: skip

    def batch() -> dict[str, Any]:
        ids = torch.randint(8, WORDS, (2, 32))
        ids[:, 2], ids[:, 3:7], ids[:, 7] = 3, 5, 4
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone(),
            "pixel_values": torch.randn(32, 3 * 2 * 16),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
            "mm_token_type_ids": (ids == 5).long(),
        }

    return _made("Qwen2VLForConditionalGeneration", settings, batch)


@case("transformers")
def blip2() -> Sample:
    settings = {
        "vision_config": _VISION, "qformer_config": {**_ENCODER, "encoder_hidden_size": 32},
        "text_config": {"model_type": "opt", "vocab_size": WORDS, "hidden_size": 32, "ffn_dim": 64,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
                        "max_position_embeddings": 64},
        "num_query_tokens": 4, "image_token_index": 5,
    }  # fmt: skip
    return _made("Blip2ForConditionalGeneration", settings, _seen(5, 4))


# -------------------------------------------------------------------------------------- speech, series


def _heard(labels: Tensor | None) -> Callable[[], dict[str, Any]]:
    def batch() -> dict[str, Any]:
        mask = (torch.arange(800)[None] < torch.tensor([[800], [600]])).long()
        more = {} if labels is None else {"labels": labels}
        return {"input_values": torch.randn(2, 800), "attention_mask": mask, **more}

    return batch


@case("transformers")
def wav2vec2_masked() -> Sample:
    """Spans of time and of features masked by numpy's draws, layers dropped."""
    settings = {**_SPEECH, "mask_time_prob": 0.3, "mask_time_length": 4, "mask_feature_prob": 0.2,
                "mask_feature_length": 4, "layerdrop": 0.2}  # fmt: skip
    return _made("Wav2Vec2ForCTC", settings, _heard(torch.ones(2, 10, dtype=torch.long)))


@case("transformers")
def wav_lm() -> Sample:
    settings = {**_SPEECH, "mask_time_prob": 0.0, "layerdrop": 0.0, "num_buckets": 16}
    return _made("WavLMForSequenceClassification", settings, _heard(torch.tensor([0, 1])))


@case("transformers")
def speech_to_text() -> Sample:
    settings = {**_BOTH, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 200,
                "max_target_positions": 32, "encoder_layerdrop": 0.2}  # fmt: skip

    def batch() -> dict[str, Any]:
        mask = (torch.arange(60)[None] < torch.tensor([[60], [40]])).long()
        return {"input_features": torch.randn(2, 60, 16), "attention_mask": mask, "labels": _words(2, 12)}

    return _made("Speech2TextForConditionalGeneration", settings, batch)


@case("transformers")
def sew_d() -> Sample:
    settings = {**_SPEECH, "squeeze_factor": 2, "mask_time_prob": 0.0, "pos_att_type": ("p2c", "c2p"),
                "position_buckets": 16, "max_position_embeddings": 64, "layerdrop": 0.0}  # fmt: skip
    return _made("SEWDForSequenceClassification", settings, _heard(torch.tensor([0, 1])))


@case("transformers")
def time_series_transformer() -> Sample:
    settings = {
        "prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2,
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    }  # fmt: skip

    def batch() -> dict[str, Any]:
        return {
            "past_values": torch.rand(4, 19), "past_time_features": torch.randn(4, 19, 2),
            "past_observed_mask": torch.ones(4, 19), "future_values": torch.rand(4, 8),
            "future_time_features": torch.randn(4, 8, 2),
        }  # fmt: skip

    return _made("TimeSeriesTransformerForPrediction", settings, batch)


@case("transformers")
def patch_ts_mixer() -> Sample:
    settings = {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3,
                "d_model": 16, "num_layers": 2, "prediction_length": 8}  # fmt: skip
    return _made(
        "PatchTSMixerForPrediction",
        settings,
        lambda: {"past_values": torch.randn(4, 32, 3), "future_values": torch.randn(4, 8, 3)},
    )


@case("transformers")
def decision_transformer() -> Sample:
    settings = {"state_dim": 6, "act_dim": 3, "hidden_size": 32, "max_ep_len": 50, "n_layer": 2, "n_head": 4}

    def batch() -> dict[str, Any]:
        return {
            "states": torch.randn(4, 12, 6),
            "actions": torch.randn(4, 12, 3),
            "rewards": torch.randn(4, 12, 1),
            "returns_to_go": torch.randn(4, 12, 1),
            "timesteps": torch.arange(12).expand(4, 12).contiguous(),
            "attention_mask": torch.ones(4, 12),
        }

    return _made("DecisionTransformerModel", settings, batch, lambda out: squares([out.action_preds]))


@case("transformers")
def mimi() -> Sample:
    """A codec with a split residual quantizer and causal convolutions."""
    settings = {
        "num_filters": 4,
        "hidden_size": 32,
        "upsampling_ratios": [4, 2],
        "codebook_size": 32,
        "codebook_dim": 16,
        "num_quantizers": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vector_quantization_hidden_dimension": 16,
        "frame_rate": 1500,
        "sliding_window": 16,
        "num_semantic_quantizers": 1,
        "upsample_groups": 32,
    }
    return _made(
        "MimiModel",
        settings,
        lambda: {"input_values": torch.randn(2, 1, 640)},
        lambda out: out.audio_values.pow(2).mean(),
    )


@case("transformers")
def vits() -> Sample:
    """Speech from words: durations, flows and draws."""
    import transformers

    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "window_size": 4,
        "flow_size": 16,
        "spectrogram_bins": 17,
        "prior_encoder_num_flows": 2,
        "upsample_initial_channel": 16,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "duration_predictor_filter_channels": 16,
        "posterior_encoder_num_wavenet_layers": 2,
        "prior_encoder_num_wavenet_layers": 2,
        "duration_predictor_num_flows": 2,
        "depth_separable_num_layers": 2,
    }
    model = transformers.VitsModel(transformers.VitsConfig(**settings))
    return Sample(
        model, lambda: {"input_ids": torch.randint(1, 32, (2, 10))}, lambda o: o.waveform.pow(2).mean()
    )


class _Outer(nn.Module):
    """Sentences in pairs, pooled by masks, with the loss of sentence-transformers."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer, losses
        from transformers import BertConfig, BertModel

        bert = BertModel(BertConfig(**_ENCODER))

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bert = bert

            def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
                found = self.bert(**features).last_hidden_state
                mask = features["attention_mask"].unsqueeze(-1)
                return {"sentence_embedding": (found * mask).sum(1) / mask.sum(1), **features}

        net = SentenceTransformer(modules=[Encoder()], device="cpu")
        self.loss = getattr(losses, loss)(net)

    def forward(self, sentences: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return self.loss(sentences, labels)


def _pairs(count: int) -> Callable[[], tuple[Any, ...]]:
    def batch() -> tuple[Any, ...]:
        sentences = []
        for length in range(10, 10 + count):
            ids = _words(6, length)
            sentences.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return sentences, torch.arange(6) % 2

    return batch


@case("sentence-transformers")
def multiple_negatives() -> Sample:
    return Sample(_Outer("MultipleNegativesRankingLoss"), _pairs(2))


@case("sentence-transformers")
def contrastive() -> Sample:
    return Sample(_Outer("OnlineContrastiveLoss"), _pairs(2))


@case("sentence-transformers")
def triplets() -> Sample:
    return Sample(_Outer("BatchHardTripletLoss"), _pairs(1))


@case("sentence-transformers")
def cached_negatives() -> Sample:
    """GradCache: gradients of embeddings first, then a hook runs the encoder again."""
    return Sample(_Outer("CachedMultipleNegativesRankingLoss"), _pairs(2))
