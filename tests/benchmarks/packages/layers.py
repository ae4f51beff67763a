"""Attention, quantizers, experts and other parts that research code is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes, squares

WORDS = 64


def _ids(count: int = 4, length: int = 32) -> Any:
    return lambda: (torch.randint(0, WORDS, (count, length)),)


def _vectors(count: int = 4, length: int = 32, wide: int = 32) -> Any:
    return lambda: (torch.randn(count, length, wide),)


# -------------------------------------------------------------------------- vector-quantize-pytorch


def _quantized(layer: nn.Module) -> Sample:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
            self.quantize, self.decode = layer, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            found = self.quantize(self.encode(x))
            extra = found[2].sum() if len(found) > 2 else 0.0
            return (self.decode(found[0]) - x).pow(2).mean() + extra

    return Sample(Coder(), _vectors(8))


@case("vector-quantize-pytorch")
def codebook_by_k_means() -> Sample:
    from vector_quantize_pytorch import VectorQuantize

    return _quantized(VectorQuantize(32, 64, kmeans_init=True, kmeans_iters=3, threshold_ema_dead_code=2))


@case("vector-quantize-pytorch")
def residual_dropout() -> Sample:
    """How many quantizers are used is drawn with ``random``."""
    from vector_quantize_pytorch import ResidualVQ

    return _quantized(ResidualVQ(dim=32, num_quantizers=4, codebook_size=32, quantize_dropout=True))


@case("vector-quantize-pytorch")
def finite_scalar() -> Sample:
    from vector_quantize_pytorch import FSQ

    return _quantized(FSQ([5, 5, 4], dim=32))


@case("vector-quantize-pytorch")
def lookup_free() -> Sample:
    from vector_quantize_pytorch import LFQ

    return _quantized(LFQ(dim=32, codebook_size=64))


@case("vector-quantize-pytorch")
def random_projection() -> Sample:
    from vector_quantize_pytorch import SimVQ

    return _quantized(SimVQ(dim=32, codebook_size=64))


# ------------------------------------------------------------------------------------ x-transformers


def _written(net: nn.Module) -> Sample:
    from x_transformers import AutoregressiveWrapper

    return Sample(AutoregressiveWrapper(net), _ids(4, 33))


@case("x-transformers")
def decoder_rotary() -> Sample:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, ff_glu=True, attn_dropout=0.1,
        ff_dropout=0.1,
    )  # fmt: skip
    return _written(TransformerWrapper(num_tokens=WORDS, max_seq_len=32, attn_layers=layers))


@case("x-transformers")
def layer_drop() -> Sample:
    """Layers skipped by a draw of ``random``."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, layer_dropout=0.2, alibi_pos_bias=True)
    return _written(TransformerWrapper(num_tokens=WORDS, max_seq_len=33, attn_layers=layers))


@case("x-transformers")
def vit_memory_tokens() -> Sample:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_pre_talking_heads=True, use_rmsnorm=True)
    net = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=2, attn_layers=layers)
    return Sample(net, lambda: (torch.randn(8, 3, 32, 32),), classes)


@case("x-transformers")
def encoder_decoder() -> Sample:
    from x_transformers import XTransformer

    net = XTransformer(
        dim=32, enc_num_tokens=WORDS, enc_depth=2, enc_heads=4, enc_max_seq_len=32, dec_num_tokens=WORDS,
        dec_depth=2, dec_heads=4, dec_max_seq_len=32, tie_token_emb=True,
    )  # fmt: skip
    return Sample(net, lambda: (torch.randint(0, WORDS, (4, 24)), torch.randint(0, WORDS, (4, 24))))


@case("x-transformers")
def transformer_xl_recurrence() -> Sample:
    from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rel_pos_bias=True)
    net = TransformerWrapper(num_tokens=WORDS, max_seq_len=16, max_mem_len=16, attn_layers=layers)
    return Sample(XLAutoregressiveWrapper(net), _ids(4, 49))


# -------------------------------------------------------------------------------- efficient attention


@case("performer-pytorch")
def language_model() -> Sample:
    """Random features redrawn after a number of steps that a buffer counts."""
    from performer_pytorch import PerformerLM

    net = PerformerLM(
        num_tokens=WORDS, max_seq_len=32, dim=32, depth=2, heads=4, dim_head=8, causal=False,
        feature_redraw_interval=2, ff_dropout=0.1,
    )  # fmt: skip
    return Sample(net, _ids(), squares)


@case("linformer")
def linear_attention() -> Sample:
    from linformer import LinformerLM

    return Sample(LinformerLM(num_tokens=WORDS, dim=32, seq_len=32, depth=2, heads=4, k=8), _ids(), squares)


@case("reformer-pytorch")
def reversible() -> Sample:
    """Reversible blocks: a backward of its own that runs the forward again; hashing by draws."""
    from reformer_pytorch import ReformerLM

    net = ReformerLM(
        num_tokens=WORDS, dim=32, depth=2, max_seq_len=64, heads=4, bucket_size=16, n_hashes=2, causal=True
    )
    return Sample(net, _ids(2, 64), squares)


@case("nystrom-attention")
def nystromformer() -> Sample:
    from nystrom_attention import Nystromformer

    return Sample(Nystromformer(dim=32, dim_head=8, heads=4, depth=2, num_landmarks=8), _vectors(), squares)


@case("local-attention")
def local_transformer() -> Sample:
    from local_attention.transformer import LocalTransformer

    net = LocalTransformer(
        num_tokens=WORDS, dim=32, depth=2, max_seq_len=64, local_attn_window_size=8, heads=4, dim_head=8
    )
    return Sample(net, _ids(4, 32), squares)


# -------------------------------------------------------------------------------------------- experts


@case("st-moe-pytorch")
def sparse_experts() -> Sample:
    from st_moe_pytorch import MoE

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MoE(dim=32, num_experts=4)

        def forward(self, x: Tensor) -> Tensor:
            found = self.experts(x)
            return found[0].pow(2).mean() + found[1]

    return Sample(Block(), _vectors(8))


@case("mixture-of-experts")
def routed() -> Sample:
    from mixture_of_experts import MoE

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MoE(dim=32, num_experts=4, hidden_dim=64)

        def forward(self, x: Tensor) -> Tensor:
            out, loss = self.experts(x)
            return out.pow(2).mean() + loss

    return Sample(Block(), _vectors(8))


@case("soft-moe-pytorch")
def soft_experts() -> Sample:
    from soft_moe_pytorch import SoftMoE

    return Sample(SoftMoE(dim=32, seq_len=32, num_experts=4), _vectors(8), squares)


# --------------------------------------------------------------------------------------------- others


@case("enformer-pytorch")
def genome() -> Sample:
    from enformer_pytorch import Enformer

    net = Enformer.from_hparams(
        dim=48, depth=2, heads=4, output_heads={"human": 4}, target_length=8, num_downsamples=3,
        dim_divisible_by=16,
    )  # fmt: skip
    return Sample(net, lambda: (torch.randint(0, 5, (1, 128)),), lambda out: out["human"].pow(2).mean())


@case("conformer")
def convolution_block() -> Sample:
    from conformer import Conformer

    net = Conformer(32, depth=2, dim_head=8, heads=4, conv_kernel_size=7, attn_dropout=0.1, ff_dropout=0.1)
    return Sample(net, _vectors(), squares)


@case("byol-pytorch")
def byol() -> Sample:
    """The online network's hidden layer comes out of a hook; a target network in averages."""
    from byol_pytorch import BYOL

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)
    )
    same = nn.Identity()
    learner = BYOL(
        net, image_size=32, hidden_layer=-1, projection_size=16, projection_hidden_size=32, augment_fn=same,
        augment_fn2=same, sync_batchnorm=False,
    )  # fmt: skip
    return Sample(learner, lambda: (torch.randn(8, 3, 32, 32),))


@case("einops")
def mixer_of_layers() -> Sample:
    from einops.layers.torch import EinMix, Rearrange, Reduce

    net = nn.Sequential(
        Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 32), nn.LayerNorm(32),
        EinMix("b t c -> b s c", weight_shape="t s", bias_shape="s", t=64, s=64), nn.GELU(),
        EinMix("b t c -> b t d", weight_shape="c d", bias_shape="d", c=32, d=32),
        Reduce("b t c -> b c", "mean"), nn.Linear(32, 2),
    )  # fmt: skip
    return Sample(net, lambda: (torch.randn(8, 3, 32, 32),), classes)


@case("entmax")
def sparse_attention() -> Sample:
    """Sorting, and a support that each row finds by itself."""
    from entmax import Entmax15Loss, sparsemax

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask, self.key, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.loss = Entmax15Loss()

        def forward(self, x: Tensor) -> Tensor:
            weights = sparsemax(self.ask(x) @ self.key(x).transpose(1, 2), dim=-1)
            return self.loss(self.head((weights @ x).mean(1)), torch.arange(len(x)) % 4).mean()

    return Sample(Attend(), _vectors(8))


@case("rotary-embedding-torch")
def rotary_attention() -> Sample:
    """Frequencies that are computed once and kept on the module."""
    from rotary_embedding_torch import RotaryEmbedding

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary, self.both = RotaryEmbedding(dim=8), nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.both(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            ask, key = (self.rotary.rotate_queries_or_keys(part) for part in heads[:2])
            return nn.functional.scaled_dot_product_attention(ask, key, heads[2], dropout_p=0.1)

    return Sample(Attend(), _vectors(8), squares)
