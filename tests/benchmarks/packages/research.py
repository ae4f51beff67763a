"""More packages that models are made with: experts and memory, flows, equilibria, tables, policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.benchmarks.packages import Sample, case, classes, squares

WORDS = 64


def _ids(count: int = 4, length: int = 32) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(0, WORDS, (count, length)),)


def _vectors(count: int = 4, length: int = 32, wide: int = 32) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(count, length, wide),)


def _images(count: int = 4, side: int = 32) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(count, 3, side, side),)


class _Written(nn.Module):
    """The next word's loss of a network that returns logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        made = self.net(ids)
        logits = made[0] if isinstance(made, tuple) else made
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ------------------------------------------------------------------------------------------ attention


@case("perceiver-pytorch", "perceiver")
def perceiver() -> Sample:
    from perceiver_pytorch import Perceiver

    net = Perceiver(
        input_channels=3,
        input_axis=2,
        num_freq_bands=4,
        max_freq=8.0,
        depth=2,
        num_latents=16,
        latent_dim=32,
        cross_heads=1,
        latent_heads=4,
        cross_dim_head=16,
        latent_dim_head=8,
        num_classes=2,
        attn_dropout=0.1,
        weight_tie_layers=True,
        self_per_cross_attn=1,
    )
    return Sample(net, lambda: (torch.randn(4, 16, 16, 3),), classes)


@case("slot-attention", "slots")
def slots() -> Sample:
    """Slots drawn and refined by a cell, several times."""
    from slot_attention import SlotAttention

    return Sample(SlotAttention(num_slots=4, dim=32, iters=3), _vectors(), squares)


@case("native-sparse-attention-pytorch", "sparse_attention")
def sparse_attention() -> Sample:
    from native_sparse_attention_pytorch import SparseAttention

    net = SparseAttention(
        dim=32,
        dim_head=8,
        heads=4,
        sliding_window_size=4,
        compress_block_size=4,
        compress_block_sliding_stride=2,
        selection_block_size=4,
        num_selected_blocks=2,
        causal=True,
    )
    return Sample(net, _vectors(), squares)


@case("recurrent-memory-transformer-pytorch", "recurrent_memory")
def recurrent_memory() -> Sample:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    net = RecurrentMemoryTransformer(
        num_tokens=WORDS, dim=32, depth=2, num_memory_tokens=4, seq_len=32, dim_head=8, heads=4
    )
    return Sample(_Written(net), _ids())


@case("block-recurrent-transformer-pytorch", "block_recurrent")
def block_recurrent() -> Sample:
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    net = BlockRecurrentTransformer(
        num_tokens=WORDS,
        dim=32,
        depth=2,
        dim_head=8,
        heads=4,
        max_seq_len=32,
        block_width=16,
        num_state_vectors=8,
        recurrent_layers=(2,),
    )
    return Sample(_Written(net), _ids())


@case("MEGABYTE-pytorch", "bytes_in_patches")
def bytes_in_patches() -> Sample:
    from MEGABYTE_pytorch import MEGABYTE

    net = MEGABYTE(num_tokens=WORDS, dim=(32, 16), depth=(2, 1), max_seq_len=(8, 4), dim_head=8, heads=4)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids, return_loss=True)

    return Sample(Loss(), _ids())


@case("mmdit", "two_streams")
def two_streams() -> Sample:
    """Words and patches, each with weights of their own, in one attention."""
    from mmdit import MMDiT

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MMDiT(depth=2, dim_image=32, dim_text=32, dim_cond=16, dim_head=8, heads=4)

        def forward(self, words: Tensor, image: Tensor, mask: Tensor, time: Tensor) -> Any:
            return self.net(time_cond=time, text_tokens=words, text_mask=mask, image_tokens=image)

    def batch() -> tuple[Any, ...]:
        mask = torch.ones(2, 12, dtype=torch.bool)
        return torch.randn(2, 12, 32), torch.randn(2, 24, 32), mask, torch.randn(2, 16)

    return Sample(Streams(), batch, squares)


@case("hourglass-transformer-pytorch", "hourglass")
def hourglass() -> Sample:
    from hourglass_transformer_pytorch import HourglassTransformerLM

    net = HourglassTransformerLM(
        num_tokens=WORDS, dim=32, max_seq_len=32, heads=4, dim_head=8, shorten_factor=2, depth=(1, 1, 1)
    )
    return Sample(_Written(net), _ids())


@case("iTransformer", "inverted")
def inverted() -> Sample:
    from iTransformer import iTransformer

    net = iTransformer(
        num_variates=5, lookback_len=32, dim=32, depth=2, heads=4, dim_head=8, pred_length=(4, 8),
        use_reversible_instance_norm=True,
    )  # fmt: skip
    return Sample(net, lambda: (torch.randn(4, 32, 5),), squares)


@case("lambda-networks", "lambda_layers")
def lambda_layers() -> Sample:
    from lambda_networks import LambdaLayer

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        LambdaLayer(dim=16, dim_out=16, r=5, dim_k=8, heads=4, dim_u=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    return Sample(net, _images(4, 16), classes)


@case("axial-attention", "axial_images")
def axial_images() -> Sample:
    """Reversible: a backward of its own that computes the inputs from the outputs."""
    from axial_attention import AxialImageTransformer

    net = nn.Sequential(nn.Conv2d(3, 16, 1), AxialImageTransformer(dim=16, depth=2, heads=4, reversible=True))
    return Sample(net, _images(2, 8), squares)


@case("linear-attention-transformer", "linear_language_model")
def linear_language_model() -> Sample:
    from linear_attention_transformer import LinearAttentionTransformerLM

    net = LinearAttentionTransformerLM(
        num_tokens=WORDS, dim=32, heads=4, depth=2, max_seq_len=32, causal=True, n_local_attn_heads=2,
        local_attn_window_size=16, ff_chunks=2, attn_layer_dropout=0.1,
    )  # fmt: skip
    return Sample(_Written(net), _ids())


@case("routing-transformer", "routed_attention")
def routed_attention() -> Sample:
    """Keys clustered by k-means that updates itself."""
    from routing_transformer import RoutingTransformerLM

    net = RoutingTransformerLM(
        num_tokens=WORDS,
        dim=32,
        heads=4,
        depth=2,
        max_seq_len=32,
        causal=True,
        window_size=8,
        n_local_attn_heads=2,
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Tensor) -> Tensor:
            logits, extra = self.net(ids)
            return (
                nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + extra.sum()
            )

    return Sample(Model(), _ids())


@case("sinkhorn-transformer", "sinkhorn_attention")
def sinkhorn_attention() -> Sample:
    from sinkhorn_transformer import SinkhornTransformerLM

    net = SinkhornTransformerLM(
        num_tokens=WORDS, dim=32, heads=4, depth=2, max_seq_len=32, bucket_size=8, causal=False, n_sortcut=2
    )
    return Sample(_Written(net), _ids())


@case("invariant-point-attention", "invariant_points")
def invariant_points() -> Sample:
    from invariant_point_attention import IPABlock

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = IPABlock(dim=32, heads=4, require_pairwise_repr=False)

        def forward(self, x: Tensor, shifts: Tensor, turns: Tensor) -> Tensor:
            return self.block(x, rotations=turns, translations=shifts)

    def batch() -> tuple[Any, ...]:
        turns = torch.linalg.qr(torch.randn(2, 16, 3, 3))[0]
        return torch.randn(2, 16, 32), torch.randn(2, 16, 3), turns

    return Sample(Points(), batch, squares)


@case("product-key-memory", "product_keys")
def product_keys() -> Sample:
    from product_key_memory import PKM

    return Sample(PKM(dim=32, heads=4, num_keys=16, topk=4, input_dropout=0.1), _vectors(), squares)


@case("CoLT5-attention", "conditional_feed_forward")
def conditional_feed_forward() -> Sample:
    """Rows routed to a heavy and a light branch by a sort of coordinates."""
    from colt5_attention import ConditionalRoutedFeedForward

    net = ConditionalRoutedFeedForward(
        32, num_heavy_tokens=8, light_ff_mult=0.5, heavy_ff_mult=2, use_triton=False
    )
    return Sample(net, _vectors(), squares)


@case("taylor-series-linear-attention", "taylor_attention")
def taylor_attention() -> Sample:
    from taylor_series_linear_attention import TaylorSeriesLinearAttn

    return Sample(TaylorSeriesLinearAttn(dim=32, dim_head=8, heads=4), _vectors(), squares)


@case("memory-efficient-attention-pytorch", "attention_in_buckets")
def attention_in_buckets() -> Sample:
    """Checkpoints of its own, bucket by bucket."""
    from memory_efficient_attention_pytorch import Attention

    net = Attention(
        dim=32, dim_head=8, heads=4, causal=True, memory_efficient=True, q_bucket_size=8, k_bucket_size=8
    )
    return Sample(net, _vectors(), squares)


@case("hyper-connections", "several_streams")
def several_streams() -> Sample:
    from hyper_connections import HyperConnections

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made, self.expand, self.reduce = HyperConnections.get_init_and_expand_reduce_stream_functions(2)
            self.blocks = nn.ModuleList(
                made(dim=32, branch=nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)))
                for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.expand(x)
            for block in self.blocks:
                x = block(x)
            return self.reduce(x)

    return Sample(Streams(), _vectors(), squares)


# ---------------------------------------------------------------------------------- flows, equilibria


@case("FrEIA", "invertible")
def invertible() -> Sample:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    flow = Ff.SequenceINN(8)
    for _ in range(4):
        flow.append(
            Fm.AllInOneBlock,
            subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, o)),
            permute_soft=True,
        )

    class Likelihood(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> Tensor:
            z, logarithm = self.flow(x)
            return (0.5 * z.pow(2).sum(1) - logarithm).mean()

    return Sample(Likelihood(), lambda: (torch.randn(128, 8),))


@case("torchdeq", "deep_equilibrium")
def deep_equilibrium() -> Sample:
    """Anderson's iteration, and a backward that solves for the gradient in a hook."""
    from torchdeq import get_deq

    class Equilibrium(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inject, self.layer, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 2)
            self.deq = get_deq(f_solver="anderson", f_max_iter=8, b_max_iter=8, ift=True)

        def forward(self, x: Tensor) -> Tensor:
            given = self.inject(x)
            found, _ = self.deq(lambda z: torch.tanh(0.5 * self.layer(z) + given), torch.zeros_like(given))
            return self.head(found[-1])

    return Sample(Equilibrium(), lambda: (torch.randn(64, 16),), classes)


@case("pytorch-crf", "tagger")
def tagger() -> Sample:
    from torchcrf import CRF

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.score, self.crf = (
                nn.Embedding(WORDS, 32),
                nn.Linear(32, 5),
                CRF(5, batch_first=True),
            )

        def forward(self, ids: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
            return -self.crf(self.score(self.embed(ids).tanh()), tags, mask=mask, reduction="mean")

    def batch() -> tuple[Any, ...]:
        mask = torch.arange(20)[None] < torch.randint(8, 21, (8, 1))
        return torch.randint(0, WORDS, (8, 20)), torch.randint(0, 5, (8, 20)), mask

    return Sample(Tagger(), batch)


# ------------------------------------------------------------------------------------ tables, policies


@case("deepctr-torch", "wide_and_deep")
def wide_and_deep() -> Sample:
    return _clicks("WDL")


@case("deepctr-torch", "deep_and_cross")
def deep_and_cross() -> Sample:
    return _clicks("DCN")


@case("deepctr-torch", "interest")
def interest() -> Sample:
    return _clicks("AutoInt")


def _clicks(kind: str) -> Sample:
    import deepctr_torch.models as models
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    columns = [SparseFeat(f"c{i}", 32, embedding_dim=8) for i in range(6)] + [DenseFeat("d", 3)]
    settings = {"AutoInt": (columns, columns)}.get(kind, (columns, columns))
    net = getattr(models, kind)(*settings, task="binary", device="cpu")

    def batch() -> tuple[Any, ...]:
        return (torch.cat([torch.randint(0, 32, (256, 6)).float(), torch.randn(256, 3)], 1),)

    return Sample(
        net,
        batch,
        lambda p: nn.functional.binary_cross_entropy(p.squeeze(1), torch.arange(len(p)).float() % 2),
    )


@case("pytorch-widedeep", "tab_perceiver")
def tab_perceiver() -> Sample:
    from pytorch_widedeep.models import TabPerceiver

    net = TabPerceiver(
        column_idx={f"c{i}": i for i in range(6)}, cat_embed_input=[(f"c{i}", 16) for i in range(4)],
        continuous_cols=["c4", "c5"], input_dim=16, n_latents=4, latent_dim=16, n_perceiver_blocks=2,
        n_latent_blocks=1, n_latent_heads=2, n_cross_attn_heads=2,
    )  # fmt: skip

    def batch() -> tuple[Any, ...]:
        return (torch.cat([torch.randint(1, 16, (64, 4)).float(), torch.randn(64, 2)], 1),)

    return Sample(net, batch, squares)


@case("stable-baselines3", "actor_and_critic")
def actor_and_critic() -> Sample:
    """The policy evaluates actions; the loss of PPO."""
    import gymnasium
    import numpy as np
    from stable_baselines3.common.policies import ActorCriticPolicy

    policy = ActorCriticPolicy(
        gymnasium.spaces.Box(-1, 1, (12,), np.float32),
        gymnasium.spaces.Box(-1, 1, (3,), np.float32),
        lambda _: 1e-3,
    )

    class Ppo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, seen: Tensor, done: Tensor, before: Tensor, gain: Tensor, value: Tensor) -> Tensor:
            values, logs, entropy = self.policy.evaluate_actions(seen, done)
            ratio = torch.exp(logs - before)
            kept = torch.min(gain * ratio, gain * ratio.clamp(0.8, 1.2)).mean()
            return mse_loss(values.flatten(), value) * 0.5 - kept - 0.01 * entropy.mean()

    def batch() -> tuple[Any, ...]:
        return (
            torch.randn(128, 12),
            torch.randn(128, 3),
            torch.randn(128) - 4,
            torch.randn(128),
            torch.randn(128),
        )

    return Sample(Ppo(), batch)


@case("stable-baselines3", "quantile_of_values")
def nature_network() -> Sample:
    import gymnasium
    import numpy as np
    from stable_baselines3.dqn.policies import CnnPolicy

    policy = CnnPolicy(
        gymnasium.spaces.Box(0, 255, (3, 40, 40), np.uint8), gymnasium.spaces.Discrete(4), lambda _: 1e-3
    )
    policy.set_training_mode(True)
    return Sample(policy.q_net, lambda: (torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8),), squares)


# ----------------------------------------------------------------------------------------- and others


@case("auraloss", "spectra_at_several_resolutions")
def spectra_at_several_resolutions() -> Sample:
    from auraloss.freq import MultiResolutionSTFTLoss

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv1d(1, 16, 9, padding=4), nn.PReLU(), nn.Conv1d(16, 1, 9, padding=4)
            )
            self.loss = MultiResolutionSTFTLoss([128, 256], [32, 64], [128, 256])

        def forward(self, x: Tensor) -> Tensor:
            return self.loss(self.net(x + 0.1 * torch.randn_like(x)), x)

    return Sample(Denoiser(), lambda: (torch.randn(2, 1, 1024),))


@case("tensorly-torch", "factorized")
def factorized() -> Sample:
    import tltorch

    net = nn.Sequential(
        tltorch.FactorizedConv(3, 16, 3, order=2, rank=0.5, factorization="cp"), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        tltorch.FactorizedLinear((4, 8, 8), (4, 4, 4), rank=0.3, factorization="blocktt"), nn.Linear(64, 2),
    )  # fmt: skip
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # they come as memory happens to be
    return Sample(net, _images(4, 16), classes)


@case("ema-pytorch", "averaged_teacher")
def averaged_teacher() -> Sample:
    """A moving average that is updated in the forward, and teaches."""
    from ema_pytorch import EMA

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 16))
            self.teacher = EMA(self.net, beta=0.9, update_after_step=1, update_every=2)

        def forward(self, x: Tensor) -> Tensor:
            self.teacher.update()
            with torch.no_grad():
                aim = self.teacher(x)
            return mse_loss(self.net(x + 0.1 * torch.randn_like(x)), aim)

    return Sample(Taught(), lambda: (torch.randn(64, 32),))


@case("torchscale", "retentive")
def retentive() -> Sample:
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    settings = RetNetConfig(
        vocab_size=WORDS, decoder_embed_dim=32, decoder_value_embed_dim=64, decoder_retention_heads=4,
        decoder_ffn_embed_dim=64, decoder_layers=2, dropout=0.1, drop_path_rate=0.1,
    )  # fmt: skip
    return Sample(_Written(RetNetDecoder(settings, nn.Embedding(WORDS, 32))), _ids())


@case("segment-anything", "image_encoder")
def image_encoder() -> Sample:
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT

    net = ImageEncoderViT(
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        out_chans=16,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return Sample(net, _images(2, 64), squares)
