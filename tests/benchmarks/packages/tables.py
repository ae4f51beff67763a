"""Tables, recommendation and clicks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.benchmarks.packages import Sample, case, classes, squares

ROWS = 256


def _numbers(wide: int = 12) -> Any:
    return lambda: (torch.randn(ROWS, wide),)


def _categories_and_numbers() -> tuple[Any, ...]:
    return torch.randint(0, 5, (ROWS, 4)), torch.randn(ROWS, 6)


def _half(logits: Tensor) -> Tensor:
    logits = logits.reshape(-1)
    return binary_cross_entropy_with_logits(logits, (torch.arange(len(logits)) % 2).to(logits.dtype))


# ------------------------------------------------------------------------------------- pytorch-tabnet


@case("pytorch-tabnet")
def tabnet() -> Sample:
    """Sparsemax over features at every step, ghost batch norm."""
    from pytorch_tabnet.tab_network import TabNet

    net = TabNet(12, 2, n_d=8, n_a=8, n_steps=3, group_attention_matrix=torch.eye(12), virtual_batch_size=64)
    return Sample(net, _numbers(), lambda out: classes(out[0]) - 1e-3 * out[1])


@case("pytorch-tabnet")
def pretrained() -> Sample:
    """Features masked by a draw, and rebuilt."""
    from pytorch_tabnet.tab_network import TabNetPretraining

    class Rebuilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TabNetPretraining(
                12, n_d=8, n_a=8, n_steps=2, group_attention_matrix=torch.eye(12), virtual_batch_size=64
            )

        def forward(self, x: Tensor) -> Tensor:
            rebuilt, kept, hidden = self.net(x)
            return ((rebuilt - kept).pow(2) * hidden).mean()

    return Sample(Rebuilt(), _numbers())


# ------------------------------------------------------------------------------- tab-transformer-pytorch


@case("tab-transformer-pytorch")
def tab_transformer() -> Sample:
    from tab_transformer_pytorch import TabTransformer

    net = TabTransformer(
        categories=(5,) * 4, num_continuous=6, dim=16, depth=2, heads=2, attn_dropout=0.1, ff_dropout=0.1,
        mlp_act=nn.ReLU(),
    )  # fmt: skip
    return Sample(net, _categories_and_numbers, _half)


@case("tab-transformer-pytorch")
def feature_tokens() -> Sample:
    from tab_transformer_pytorch import FTTransformer

    net = FTTransformer(
        categories=(5,) * 4, num_continuous=6, dim=16, depth=2, heads=2, attn_dropout=0.1, ff_dropout=0.1
    )
    return Sample(net, lambda: tuple(part[:32] for part in _categories_and_numbers()), _half)


# -------------------------------------------------------------------------------- rtdl-revisiting-models


@case("rtdl-revisiting-models")
def residual_rows() -> Sample:
    from rtdl_revisiting_models import ResNet

    net = ResNet(
        d_in=12,
        d_out=2,
        n_blocks=2,
        d_block=32,
        d_hidden=64,
        d_hidden_multiplier=None,
        dropout1=0.2,
        dropout2=0.1,
    )
    return Sample(net, _numbers(), classes)


@case("rtdl-revisiting-models")
def transformer_rows() -> Sample:
    from rtdl_revisiting_models import FTTransformer

    net = FTTransformer(
        n_cont_features=6, cat_cardinalities=[5] * 4, d_out=2, n_blocks=2, d_block=16, attention_n_heads=2,
        attention_dropout=0.1, ffn_d_hidden=32, ffn_d_hidden_multiplier=None, ffn_dropout=0.1,
        residual_dropout=0.1,
    )  # fmt: skip
    return Sample(net, lambda: _categories_and_numbers()[::-1], classes)


# -------------------------------------------------------------------------------------- pytorch-frame


@case("pytorch-frame")
def frame_of_columns() -> Sample:
    """A frame of tensors by kind of column."""
    import torch_frame
    from torch_frame.data.stats import StatType
    from torch_frame.nn import FTTransformer

    numeric, label = torch_frame.numerical, torch_frame.categorical
    of_numbers = {StatType.MEAN: 0.0, StatType.STD: 1.0, StatType.QUANTILES: [-1, -0.5, 0, 0.5, 1]}
    stats = {
        **{f"n{i}": of_numbers for i in range(6)},
        **{f"c{i}": {StatType.COUNT: (list("abcde"), [50] * 5)} for i in range(4)},
    }  # fmt: skip
    names = {numeric: [f"n{i}" for i in range(6)], label: [f"c{i}" for i in range(4)]}
    net = FTTransformer(channels=16, out_channels=2, num_layers=2, col_stats=stats, col_names_dict=names)

    class Framed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
            return self.net(torch_frame.TensorFrame({numeric: numbers, label: categories}, names))

    return Sample(Framed(), _categories_and_numbers, classes)


# ---------------------------------------------------------------------------------------------- torchfm


def _fields() -> tuple[Any, ...]:
    return (torch.randint(0, 10, (ROWS, 6)),)


@case("torchfm")
def deep_fm() -> Sample:
    from torchfm.model.dfm import DeepFactorizationMachineModel

    return Sample(DeepFactorizationMachineModel([10] * 6, 16, (32, 32), 0.2), _fields, _probable)


@case("torchfm")
def attentional_fm() -> Sample:
    from torchfm.model.afm import AttentionalFactorizationMachineModel

    return Sample(AttentionalFactorizationMachineModel([10] * 6, 16, 16, (0.2, 0.2)), _fields, _probable)


@case("torchfm")
def extreme_deep_fm() -> Sample:
    from torchfm.model.xdfm import ExtremeDeepFactorizationMachineModel

    return Sample(
        ExtremeDeepFactorizationMachineModel([10] * 6, 16, (32,), 0.2, (16, 16), split_half=True),
        _fields,
        _probable,
    )


@case("torchfm")
def automatic_interactions() -> Sample:
    from torchfm.model.afi import AutomaticFeatureInteractionModel

    net = AutomaticFeatureInteractionModel([10] * 6, 16, 16, 2, 2, (32,), (0.2, 0.2, 0.2))
    return Sample(net, _fields, _probable)


def _probable(probability: Tensor) -> Tensor:
    return -(probability.clamp(1e-6, 1 - 1e-6)).log().mean()


# ----------------------------------------------------------------------------------------------- torchrl


@case("torchrl")
def clipped_policy() -> Sample:
    """Batches and outputs as TensorDicts; advantages without gradients; functional parameters."""
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss

    head = nn.Sequential(MLP(in_features=8, out_features=4, num_cells=[32]), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"]), in_keys=["loc", "scale"],
        distribution_class=TanhNormal, return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(MLP(in_features=8, out_features=1, num_cells=[32]), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic)

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, seen: Tensor, done: Tensor, action: Tensor) -> Tensor:
            data = TensorDict(
                {
                    "observation": seen, "action": action, "action_log_prob": -done[:, 0].abs(),
                    "advantage": done, "value_target": done, "sample_log_prob": -done[:, 0].abs(),
                },
                [len(seen)],
            )  # fmt: skip
            found = self.loss(data)
            return found["loss_objective"] + found["loss_critic"] + found["loss_entropy"]

    return Sample(
        Agent(), lambda: (torch.randn(ROWS, 8), torch.randn(ROWS, 1), torch.rand(ROWS, 2).clamp(0.05, 0.95))
    )


@case("torchrl")
def noisy_layers() -> Sample:
    """Weights with noise that buffers keep."""
    from torchrl.modules import MLP, NoisyLinear

    net = MLP(in_features=8, out_features=4, num_cells=[32, 32], layer_class=NoisyLinear)
    return Sample(net, lambda: (torch.randn(ROWS, 8),), squares)


@case("torchrl")
def decision_transformer() -> Sample:
    from torchrl.modules import OnlineDTActor

    config = {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "activation": "relu", "n_positions": 64,
        "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    }  # fmt: skip
    net = OnlineDTActor(8, 2, config)
    return Sample(net, lambda: (torch.randn(8, 10, 8), torch.randn(8, 10, 2), torch.randn(8, 10, 1)), squares)


# ------------------------------------------------------------------------------------------------- torch


@case("torch", "embedding_bags_sparse")
def embedding_bags_sparse() -> Sample:
    """Bags of words whose gradients are sparse."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.EmbeddingBag(2000, 16, sparse=True)
            self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))

        def forward(self, words: Tensor, starts: Tensor) -> Tensor:
            return self.net(self.bags(words, starts))

    return Sample(
        Bags(), lambda: (torch.randint(0, 2000, (ROWS * 8,)), torch.arange(0, ROWS * 8, 8)), classes, "sgd"
    )


@case("torch", "lazy_embedding_max_norm")
def lazy_embedding_max_norm() -> Sample:
    """The forward writes into the weights that it looks up."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 32, max_norm=1.0)
            self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(self.embed(ids.clone()).mean(1))

    return Sample(Looked(), lambda: (torch.randint(0, 100, (ROWS, 8)),), classes)
