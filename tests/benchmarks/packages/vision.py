"""Classifiers and segmenters of images, and layers of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes, squares


def images(count: int = 4, side: int = 32, channels: int = 3) -> Any:
    """A batch of one tensor of images."""
    return lambda: (torch.randn(count, channels, side, side),)


# ---------------------------------------------------------------------------------------------- timm


def _timm(name: str, side: int = 32, count: int = 4, **sizes: Any) -> Sample:
    import timm

    return Sample(timm.create_model(name, num_classes=2, **sizes), images(count, side), classes)


@case("timm")
def convnext() -> Sample:
    return _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), drop_path_rate=0.2)


@case("timm")
def vision_transformer_registers() -> Sample:
    return _timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=4, reg_tokens=2,
        drop_path_rate=0.2, pos_drop_rate=0.1,
    )  # fmt: skip


@case("timm")
def swin() -> Sample:
    return _timm(
        "swin_tiny_patch4_window7_224", img_size=56, side=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
    )  # fmt: skip


@case("timm")
def maxvit() -> Sample:
    return _timm("maxvit_rmlp_pico_rw_256", img_size=64, side=64, count=2, depths=(1, 1), embed_dim=(32, 64))


@case("timm")
def mixer() -> Sample:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        num_classes=2,
        img_size=32,
        patch_size=4,
        embed_dim=48,
        num_blocks=3,
        drop_path_rate=0.2,
        drop_rate=0.1,
    )
    return Sample(model, images(), classes)


@case("timm")
def efficientnet() -> Sample:
    return _timm("efficientnet_lite0", side=64, drop_path_rate=0.2)


@case("timm")
def regnet() -> Sample:
    return _timm("regnety_002", side=64)


@case("timm")
def coat() -> Sample:
    sizes: dict[str, Any] = {"embed_dims": (32,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1}
    return _timm("coat_tiny", img_size=64, side=64, count=2, **sizes)


@case("timm")
def cait() -> Sample:
    return _timm("cait_xxs24_224", img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=4)


@case("timm")
def hiera() -> Sample:
    return _timm("hiera_tiny_224", img_size=64, side=64, stages=(1, 1, 2, 1), embed_dim=24)


@case("timm")
def beit() -> Sample:
    return _timm("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)


@case("timm")
def densenet_checkpointed() -> Sample:
    """Its author's own ``torch.utils.checkpoint``."""
    return _timm(
        "densenet121", side=64, count=2, growth_rate=8, block_config=(2, 2, 2), memory_efficient=True
    )


@case("timm")
def resnet_split_batch_norm() -> Sample:
    import timm

    model = timm.layers.convert_splitbn_model(timm.create_model("resnet10t", num_classes=2), 2)
    return Sample(model, images(4, 64), classes)


@case("timm")
def resnet_checkpointed() -> Sample:
    """The library's switch for checkpointing, thrown."""
    import timm

    model = timm.create_model("resnet18", num_classes=2)
    model.set_grad_checkpointing(True)
    return Sample(model, images(2, 64), classes)


@case("timm")
def features_by_hooks() -> Sample:
    """A backbone whose features come out of forward hooks."""
    import timm

    model = timm.create_model("resnet10t", features_only=True, feature_cls="hook")
    return Sample(model, images(2, 64), squares)


# --------------------------------------------------------------------------------------- torchvision


def _torchvision(name: str, side: int = 64, count: int = 2, **sizes: Any) -> Sample:
    import torchvision

    return Sample(torchvision.models.get_model(name, num_classes=2, **sizes), images(count, side), classes)


@case("torchvision")
def resnet18() -> Sample:
    return _torchvision("resnet18")


@case("torchvision")
def mobilenet_v3() -> Sample:
    return _torchvision("mobilenet_v3_small", count=4)


@case("torchvision")
def shufflenet() -> Sample:
    return _torchvision("shufflenet_v2_x0_5", count=4)


@case("torchvision")
def googlenet() -> Sample:
    """Two auxiliary heads in a named tuple."""
    from torchvision.models import googlenet

    def loss(outputs: Any) -> Tensor:
        return classes(outputs.logits) + 0.3 * (classes(outputs.aux_logits1) + classes(outputs.aux_logits2))

    return Sample(googlenet(num_classes=2, init_weights=False), images(2, 64), loss)


@case("torchvision")
def densenet_memory_efficient() -> Sample:
    from torchvision.models.densenet import DenseNet

    model = DenseNet(8, (2, 2, 2), 16, num_classes=2, drop_rate=0.1, memory_efficient=True)
    return Sample(model, images(2, 64), classes)


@case("torchvision")
def swin_v2() -> Sample:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    model = SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=2,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip
    return Sample(model, images(4, 64), classes)


@case("torchvision")
def deeplab() -> Sample:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    return Sample(model, images(2, 64), lambda outputs: classes(outputs["out"]))


# ----------------------------------------------------------------------- segmentation-models-pytorch


@case("segmentation-models-pytorch")
def unet_dice() -> Sample:
    import segmentation_models_pytorch as smp

    dice = smp.losses.DiceLoss("binary")
    target = (torch.arange(64 * 64).view(1, 1, 64, 64) % 3 == 0).float().expand(2, 1, 64, 64)
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 32, 16, 8, 8))
    return Sample(model, images(2, 64), lambda logits: dice(logits, target))


@case("segmentation-models-pytorch")
def fpn_focal() -> Sample:
    import segmentation_models_pytorch as smp

    focal = smp.losses.FocalLoss("multiclass")
    target = torch.arange(64 * 64).view(1, 64, 64).expand(2, 64, 64) % 3
    return Sample(
        smp.FPN("mobilenet_v2", encoder_weights=None, classes=3), images(2, 64), lambda x: focal(x, target)
    )


@case("segmentation-models-pytorch")
def lovasz_deeplabv3plus() -> Sample:
    import segmentation_models_pytorch as smp

    lovasz = smp.losses.LovaszLoss("multiclass")
    target = torch.arange(64 * 64).view(1, 64, 64).expand(2, 64, 64) % 3
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3)
    return Sample(model, images(2, 64), lambda logits: lovasz(logits, target))


@case("segmentation-models-pytorch")
def segformer() -> Sample:
    import segmentation_models_pytorch as smp

    return Sample(smp.Segformer("resnet18", encoder_weights=None, classes=2), images(2, 64), classes)


# ------------------------------------------------------------------------------ efficientnet-pytorch


@case("efficientnet-pytorch")
def b0() -> Sample:
    """Drop connect by the layer's index."""
    from efficientnet_pytorch import EfficientNet

    return Sample(EfficientNet.from_name("efficientnet-b0", num_classes=2), images(2, 64), classes)


# -------------------------------------------------------------------------------------- vit-pytorch


def _vit(model: nn.Module, side: int = 32, count: int = 4) -> Sample:
    return Sample(model, images(count, side), classes)


_VIT: dict[str, Any] = {"num_classes": 2, "dim": 48, "depth": 3, "heads": 3, "mlp_dim": 96}


@case("vit-pytorch")
def simple_vit() -> Sample:
    from vit_pytorch import SimpleViT

    return _vit(SimpleViT(image_size=32, patch_size=4, **_VIT))


@case("vit-pytorch")
def navit() -> Sample:
    """Images of several sizes, packed."""
    from vit_pytorch.na_vit import NaViT

    model = NaViT(image_size=32, patch_size=8, dropout=0.1, emb_dropout=0.1, token_dropout_prob=0.1, **_VIT)
    sizes = [(32, 32), (16, 32), (24, 8), (32, 8)]
    return Sample(
        model,
        lambda: ([[torch.randn(3, *s) for s in sizes[:2]], [torch.randn(3, *s) for s in sizes[2:]]],),
        classes,
    )


@case("vit-pytorch")
def dino() -> Sample:
    """Student and teacher of one network, the teacher's center in a buffer, views by augmentation."""
    from vit_pytorch import Dino, ViT

    net = ViT(image_size=32, patch_size=8, **_VIT)
    flip = nn.Identity()
    learner = Dino(
        net, image_size=32, hidden_layer="to_latent", projection_hidden_size=32, projection_layers=2,
        num_classes_K=64, augment_fn=flip, augment_fn2=flip,
    )  # fmt: skip
    return Sample(learner, images())


@case("vit-pytorch")
def patch_dropout_t2t() -> Sample:
    from vit_pytorch.t2t import T2TViT

    return _vit(
        T2TViT(
            dim=48, image_size=32, depth=2, heads=3, mlp_dim=96, num_classes=2, t2t_layers=((3, 2), (3, 2))
        )
    )


@case("vit-pytorch")
def cross_vit() -> Sample:
    from vit_pytorch.cross_vit import CrossViT

    return _vit(
        CrossViT(
            image_size=32, num_classes=2, depth=1, sm_dim=32, sm_patch_size=4, sm_enc_depth=1, sm_enc_heads=2,
            sm_enc_mlp_dim=64, lg_dim=48, lg_patch_size=8, lg_enc_depth=1, lg_enc_heads=2, lg_enc_mlp_dim=64,
            cross_attn_depth=1, cross_attn_heads=2, dropout=0.1, emb_dropout=0.1,
        )
    )  # fmt: skip


@case("vit-pytorch")
def deep_layer_drop() -> Sample:
    """Layers skipped by draws of ``random.random`` or ``torch.rand``."""
    from vit_pytorch.cait import CaiT

    return _vit(
        CaiT(
            image_size=32, patch_size=4, num_classes=2, dim=48, depth=3, cls_depth=1, heads=3, mlp_dim=96,
            dropout=0.1, emb_dropout=0.1, layer_dropout=0.2,
        )
    )  # fmt: skip


@case("vit-pytorch")
def twins() -> Sample:
    from vit_pytorch.twins_svt import TwinsSVT

    return _vit(
        TwinsSVT(
            num_classes=2, s1_emb_dim=16, s1_patch_size=4, s1_local_patch_size=4, s1_global_k=2, s1_depth=1,
            s2_emb_dim=24, s2_patch_size=2, s2_local_patch_size=4, s2_global_k=2, s2_depth=1, s3_emb_dim=32,
            s3_patch_size=2, s3_local_patch_size=4, s3_global_k=2, s3_depth=1, s4_emb_dim=48, s4_patch_size=2,
            s4_local_patch_size=2, s4_global_k=1, s4_depth=1, peg_kernel_size=3, dropout=0.1,
        ),
        side=64,
        count=2,
    )  # fmt: skip


@case("vit-pytorch")
def adaptive_tokens() -> Sample:
    """Tokens sampled by their scores."""
    from vit_pytorch.ats_vit import ViT

    return _vit(ViT(image_size=32, patch_size=4, max_tokens_per_depth=(32, 16, 8), dropout=0.1, **_VIT))


# -------------------------------------------------------------------------------------------- kornia


@case("kornia")
def mobile_vit() -> Sample:
    from kornia.models.vit import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, dropout_rate=0.1, dropout_attn=0.1
    )
    return Sample(model, images(), squares)


@case("kornia")
def augmented_classifier() -> Sample:
    """Augmentation inside of the model: draws, and parameters kept on the modules."""
    import kornia.augmentation as K

    net = nn.Sequential(
        K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5), K.RandomAffine(20.0, p=0.7),
            K.ColorJitter(0.1, 0.1, 0.1, 0.1, p=0.8), data_keys=["input"],
        ),
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip
    return Sample(net, lambda: (torch.rand(4, 3, 32, 32),), classes)


@case("kornia")
def hardnet_homography() -> Sample:
    """Descriptors, and a warp by a homography that the net estimates."""
    import kornia

    class Aligner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(8, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            moved = 4 * torch.tanh(self.head(self.net(torch.cat([a, b], 1)))).view(-1, 4, 2)
            corners = torch.tensor([[0.0, 0.0], [31.0, 0.0], [31.0, 31.0], [0.0, 31.0]]).expand_as(moved)
            homography = kornia.geometry.transform.get_perspective_transform(corners, corners + moved)
            warped = kornia.geometry.transform.warp_perspective(a, homography, (32, 32))
            return kornia.losses.ssim_loss(warped, b, 5)

    return Sample(Aligner(), lambda: (torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)))


# --------------------------------------------------------------------------------------------- open_clip


@case("open-clip-torch")
def clip() -> Sample:
    """Images and texts, and the contrastive loss of the package."""
    from open_clip import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(
        32,
        CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=8, image_size=32, patch_dropout=0.25),
        CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=4, layers=2),
    )
    contrastive = ClipLoss()
    return Sample(
        model,
        lambda: (torch.randn(4, 3, 32, 32), torch.randint(1, 64, (4, 16))),
        lambda out: contrastive(out[0], out[1], out[2]),
    )


@case("open-clip-torch")
def coca() -> Sample:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model = CoCa(
        32,
        {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2},
        CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=4, layers=2, embed_cls=True,
                    output_tokens=True),
        CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=8, image_size=32,
                      attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
    )  # fmt: skip
    model.text.init_parameters()
    nn.init.normal_(model.text.cls_emb)
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # which the package leaves as it found it
    return Sample(model, lambda: (torch.randn(4, 3, 32, 32), torch.randint(1, 64, (4, 16))), squares)
