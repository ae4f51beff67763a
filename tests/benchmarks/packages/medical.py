"""Segmentation and classification of volumes, and its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes


def _volumes(side: int = 16, count: int = 2) -> Any:
    return lambda: (torch.randn(count, 1, side, side, side),)


def _target(kinds: int, side: int = 16, count: int = 2) -> Tensor:
    return (torch.arange(side**3).view(1, 1, side, side, side) % kinds).expand(count, 1, side, side, side)


# --------------------------------------------------------------------------------------------- monai


@case("monai")
def unet_dice() -> Sample:
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    net = UNet(3, 1, 3, (8, 16, 32), (2, 2), num_res_units=1, dropout=0.1)
    dice = DiceLoss(softmax=True, to_onehot_y=True)
    return Sample(net, _volumes(), lambda out: dice(out, _target(3)))


@case("monai")
def swin_unetr_dice_ce() -> Sample:
    from monai.losses import DiceCELoss
    from monai.networks.nets import SwinUNETR

    net = SwinUNETR(
        1,
        3,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        drop_rate=0.1,
        norm_name=("group", {"num_groups": 4}),
    )
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    return Sample(net, _volumes(32), lambda out: loss(out, _target(3, 32)))


@case("monai")
def unetr_generalized_dice() -> Sample:
    from monai.losses import GeneralizedDiceLoss
    from monai.networks.nets import UNETR

    net = UNETR(1, 3, (16, 16, 16), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4, dropout_rate=0.1)
    loss = GeneralizedDiceLoss(softmax=True, to_onehot_y=True)
    return Sample(net, _volumes(16, 1), lambda out: loss(out, _target(3, 16, 1)))


@case("monai")
def segresnet_focal() -> Sample:
    from monai.losses import FocalLoss
    from monai.networks.nets import SegResNet

    net = SegResNet(3, 8, 1, 3, dropout_prob=0.1, blocks_down=(1, 1), blocks_up=(1,))
    loss = FocalLoss(to_onehot_y=True)
    return Sample(net, _volumes(), lambda out: loss(out, _target(3)))


@case("monai")
def dyn_unet_deep_supervision() -> Sample:
    from monai.losses import TverskyLoss
    from monai.networks.nets import DynUNet

    net = DynUNet(
        3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], deep_supervision=True, deep_supr_num=1
    )
    loss = TverskyLoss(softmax=True, to_onehot_y=True)
    return Sample(
        net, _volumes(), lambda out: torch.stack([loss(part, _target(3)) for part in out.unbind(1)]).sum()
    )


@case("monai")
def attention_unet_hausdorff() -> Sample:
    """A loss that computes a distance transform with scipy, on the host."""
    from monai.losses import HausdorffDTLoss
    from monai.networks.nets import AttentionUnet

    net = AttentionUnet(3, 1, 2, (8, 16), (2,), dropout=0.1)
    loss = HausdorffDTLoss(softmax=True, to_onehot_y=True)
    return Sample(net, _volumes(8), lambda out: loss(out, _target(2, 8)))


@case("monai")
def densenet3d() -> Sample:
    from monai.networks.nets import DenseNet

    net = DenseNet(3, 1, 2, init_features=8, growth_rate=8, block_config=(2, 2), dropout_prob=0.1)
    return Sample(net, _volumes(), classes)


@case("monai")
def variational_autoencoder() -> Sample:
    """A VAE that draws its latent."""
    from monai.networks.nets import VarAutoEncoder

    net = VarAutoEncoder(3, (1, 16, 16, 16), 1, 8, (8, 16), (2, 2))

    def loss(out: Any) -> Tensor:
        _, mean, log_variance, _ = out
        return out[0].pow(2).mean() - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).mean()

    return Sample(net, _volumes(), loss)


@case("monai")
def vq_vae() -> Sample:
    """Its codebook moves by averages kept in buffers."""
    from monai.networks.nets import VQVAE

    net = VQVAE(
        3, 1, 1, channels=(8, 16), num_res_layers=1, num_res_channels=(8, 16),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=32, embedding_dim=8,
    )  # fmt: skip
    return Sample(net, _volumes(), lambda out: out[0].pow(2).mean() + out[1])


@case("monai")
def global_registration() -> Sample:
    """A displacement field that warps a volume."""
    from monai.losses import BendingEnergyLoss, LocalNormalizedCrossCorrelationLoss
    from monai.networks.blocks import Warp
    from monai.networks.nets import LocalNet

    class Register(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LocalNet(3, 2, 4, out_channels=3, extract_levels=(0, 1))
            self.warp, self.bend = Warp("bilinear", "border"), BendingEnergyLoss()
            self.alike = LocalNormalizedCrossCorrelationLoss(kernel_size=3)

        def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
            field = self.net(torch.cat([moving, fixed], 1))
            return self.alike(self.warp(moving, field), fixed) + self.bend(field)

    return Sample(Register(), lambda: (torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)))
