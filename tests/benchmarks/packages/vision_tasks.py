"""Detectors, optical flow, matching, restoration and learning without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from tests.benchmarks.packages import Sample, case, squares

# --------------------------------------------------------------------------------------- torchvision


def _backbone() -> Any:
    """A small pyramid of features, as the detectors want it."""
    from torchvision.models import resnet18
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = resnet18(weights=None)
    body.layer3, body.layer4 = nn.Identity(), nn.Identity()
    return BackboneWithFPN(body, {"layer1": "0", "layer2": "1"}, [64, 128], 32)


def _boxes(masks: bool = False, keypoints: bool = False) -> Any:
    """Two images, and a dictionary of what is in each."""

    def batch() -> tuple[Any, ...]:
        targets = []
        for count in (1, 2):
            corner = torch.rand(count, 2) * 30
            boxes = torch.cat([corner, corner + 12 + 18 * torch.rand(count, 2)], 1)
            target = {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64)}
            if masks:
                target["masks"] = (torch.rand(count, 64, 64) > 0.5).to(torch.uint8)
            if keypoints:
                points = torch.rand(count, 3, 2) * 12 + corner[:, None]
                target["keypoints"] = torch.cat([points, torch.ones(count, 3, 1)], -1)
            targets.append(target)
        return [torch.rand(3, 64, 64) for _ in range(2)], targets

    return batch


def _added(losses: Any) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _anchors(sizes: tuple[Any, ...]) -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


_SIDES: dict[str, Any] = {"min_size": 64, "max_size": 64}
_PROPOSALS: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 64, "rpn_post_nms_top_n_train": 32, "box_batch_size_per_image": 16,
    "rpn_batch_size_per_image": 32,
}  # fmt: skip


def _pooler() -> Any:
    from torchvision.ops import MultiScaleRoIAlign

    return MultiScaleRoIAlign(["0", "1"], 5, 2)


@case("torchvision")
def faster_rcnn() -> Sample:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    model = FasterRCNN(
        _backbone(), None, box_head=TwoMLPHead(32 * 25, 64), box_predictor=FastRCNNPredictor(64, 2),
        rpn_anchor_generator=_anchors(((8,), (16,), (32,))), box_roi_pool=_pooler(),
        **_SIDES, **_PROPOSALS,
    )  # fmt: skip
    return Sample(model, _boxes(), _added)


@case("torchvision")
def mask_rcnn() -> Sample:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    model = MaskRCNN(
        _backbone(), None, box_head=TwoMLPHead(32 * 25, 64), box_predictor=FastRCNNPredictor(64, 2),
        mask_head=MaskRCNNHeads(32, (32, 32), 1), mask_predictor=MaskRCNNPredictor(32, 32, 2),
        rpn_anchor_generator=_anchors(((8,), (16,), (32,))), box_roi_pool=_pooler(),
        mask_roi_pool=_pooler(), **_SIDES, **_PROPOSALS,
    )  # fmt: skip
    return Sample(model, _boxes(masks=True), _added)


@case("torchvision")
def keypoint_rcnn() -> Sample:
    from torchvision.models.detection import KeypointRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

    model = KeypointRCNN(
        _backbone(), None, keypoint_head=KeypointRCNNHeads(32, (32, 32)),
        keypoint_predictor=KeypointRCNNPredictor(32, 3), box_head=TwoMLPHead(32 * 25, 64),
        box_predictor=FastRCNNPredictor(64, 2),
        rpn_anchor_generator=_anchors(((8,), (16,), (32,))),
        box_roi_pool=_pooler(), keypoint_roi_pool=_pooler(), **_SIDES, **_PROPOSALS,
    )  # fmt: skip
    return Sample(model, _boxes(keypoints=True), _added)


@case("torchvision")
def retinanet() -> Sample:
    from torchvision.models.detection import RetinaNet

    return Sample(
        RetinaNet(_backbone(), 2, anchor_generator=_anchors(((8,), (16,), (32,))), **_SIDES), _boxes(), _added
    )


@case("torchvision")
def fcos() -> Sample:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(((4,), (8,), (16,)), ((1.0,),) * 3)
    return Sample(FCOS(_backbone(), 2, anchor_generator=anchors, **_SIDES), _boxes(), _added)


@case("torchvision")
def ssd_lite() -> Sample:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    return Sample(model, _boxes(), _added)


@case("torchvision")
def raft() -> Sample:
    """Optical flow, refined four times."""
    from torchvision.models.optical_flow import raft_small

    def loss(flows: Any) -> Tensor:
        return torch.stack([flow.abs().mean() * 0.8 ** (3 - i) for i, flow in enumerate(flows)]).sum()

    def batch() -> dict[str, Any]:
        first, second = torch.rand(2, 1, 3, 128, 128).unbind()
        return {"image1": first, "image2": second, "num_flow_updates": 4}

    return Sample(raft_small(), batch, loss)


# --------------------------------------------------------------------------------------------- kornia


@case("kornia")
def focal_dice_segmenter() -> Sample:
    import kornia

    target = torch.arange(32 * 32).view(1, 32, 32).expand(2, 32, 32) % 3
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))

    def loss(logits: Tensor) -> Tensor:
        focal = kornia.losses.focal_loss(logits, target, alpha=0.5, reduction="mean")
        return focal + kornia.losses.dice_loss(logits, target)

    return Sample(net, lambda: (torch.randn(2, 3, 32, 32),), loss)


@case("kornia")
def disk_local_features() -> Sample:
    from kornia.feature.disk._unets import Unet

    return Sample(
        Unet(in_features=3, down=[8, 16, 16], up=[16, 9]), lambda: (torch.randn(1, 3, 32, 32),), squares
    )


@case("kornia")
def spatial_transformer() -> Sample:
    """Boxes warped by an angle that the net estimates, and edges and blurs of the package."""
    import kornia

    class Rotator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.angle = nn.Linear(32, 1)

        def forward(self, image: Tensor) -> Tensor:
            angle = 30 * torch.tanh(self.angle(self.net(image))).squeeze(-1)
            turned = kornia.geometry.transform.rotate(image, angle)
            blurred = kornia.filters.gaussian_blur2d(turned, (5, 5), (1.5, 1.5))
            edges = kornia.filters.sobel(blurred)
            return kornia.losses.total_variation(blurred).mean() + edges.mean()

    return Sample(Rotator(), lambda: (torch.rand(2, 3, 32, 32),))


# ------------------------------------------------------------------------------------------- lightly


def _views(count: int = 8) -> Any:
    def batch() -> tuple[Any, ...]:
        image = torch.randn(count, 3, 32, 32)
        return image + 0.1 * torch.randn_like(image), image + 0.1 * torch.randn_like(image)

    return batch


class _TwoViews(nn.Module):
    """A network and heads of the package, called on two views."""

    def __init__(self, *heads: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2),
            nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.heads = nn.ModuleList(heads)
        self.loss = loss

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if len(self.heads) == 1:
            return self.loss(*(self.heads[0](self.net(view)) for view in (first, second)))
        project, predict = self.heads
        a, b = (project(self.net(view)) for view in (first, second))
        return 0.5 * (self.loss(predict(a), b.detach()) + self.loss(predict(b), a.detach()))


@case("lightly")
def simclr() -> Sample:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    return Sample(_TwoViews(SimCLRProjectionHead(32, 32, 16), loss=_begun(NTXentLoss())), _views())


def _begun(loss: nn.Module) -> nn.Module:
    """With its place in the queue, which the package leaves as it found it."""
    loss.memory_bank.bank_ptr.zero_()  # type: ignore[operator, union-attr]
    return loss


@case("lightly")
def moco_memory_bank() -> Sample:
    """A queue of old features, written at every step."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    bank = _begun(NTXentLoss(memory_bank_size=(64, 16)))
    return Sample(_TwoViews(MoCoProjectionHead(32, 32, 16), loss=bank), _views())


@case("lightly")
def simsiam() -> Sample:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    heads = SimSiamProjectionHead(32, 32, 16), SimSiamPredictionHead(16, 8, 16)
    return Sample(_TwoViews(*heads, loss=NegativeCosineSimilarity()), _views())


@case("lightly")
def vicreg() -> Sample:
    from lightly.loss import VICRegLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    return Sample(_TwoViews(BarlowTwinsProjectionHead(32, 32, 16), loss=VICRegLoss()), _views())


@case("lightly")
def barlow_twins() -> Sample:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    return Sample(_TwoViews(BarlowTwinsProjectionHead(32, 32, 16), loss=BarlowTwinsLoss()), _views())


@case("lightly")
def swav_prototypes() -> Sample:
    """Assignments by Sinkhorn, without gradients."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    class SwaV(_TwoViews):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            project, prototypes = self.heads
            prototypes.normalize()
            scores = [prototypes(nn.functional.normalize(project(self.net(v)))) for v in (first, second)]
            return self.loss(scores, [])

    return Sample(SwaV(SwaVProjectionHead(32, 32, 16), SwaVPrototypes(16, 8), loss=SwaVLoss()), _views())


@case("lightly")
def dino_head() -> Sample:
    """The teacher's center in a buffer that the loss writes."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    class Dino(_TwoViews):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            student, teacher = self.heads
            with torch.no_grad():
                target = [teacher(self.net(view)) for view in (first, second)]
            return self.loss(target, [student(self.net(view)) for view in (first, second)], epoch=0)

    heads = DINOProjectionHead(32, 32, 16, 64), DINOProjectionHead(32, 32, 16, 64)
    return Sample(Dino(*heads, loss=DINOLoss(output_dim=64)), _views())


# --------------------------------------------------------------------------------- pytorch-metric-learning


def _embedder() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


class _Metric(nn.Module):
    """Embeddings and a loss of the package, with what it mines."""

    def __init__(self, loss: Any, miner: Any = None) -> None:
        super().__init__()
        self.net, self.loss, self.miner = _embedder(), loss, miner

    def forward(self, data: Tensor, labels: Tensor) -> Tensor:
        embeddings = self.net(data)
        pairs = None if self.miner is None else self.miner(embeddings, labels)
        return self.loss(embeddings, labels, pairs)


def _labelled() -> tuple[Any, ...]:
    return torch.randn(64, 24), torch.arange(64) % 4


@case("pytorch-metric-learning")
def triplets_mined() -> Sample:
    from pytorch_metric_learning import losses, miners

    return Sample(_Metric(losses.TripletMarginLoss(), miners.MultiSimilarityMiner()), _labelled)


@case("pytorch-metric-learning")
def arcface() -> Sample:
    from pytorch_metric_learning import losses

    class Arc(_Metric):
        def forward(self, data: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.net(data), labels)

    return Sample(Arc(losses.ArcFaceLoss(4, 16)), _labelled)


@case("pytorch-metric-learning")
def cross_batch_memory() -> Sample:
    from pytorch_metric_learning import losses

    class Memory(_Metric):
        def forward(self, data: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.net(data), labels)

    return Sample(Memory(losses.CrossBatchMemory(losses.ContrastiveLoss(), 16, memory_size=96)), _labelled)


@case("pytorch-metric-learning")
def supervised_contrastive() -> Sample:
    from pytorch_metric_learning import losses

    return Sample(_Metric(losses.SupConLoss()), _labelled)


# ------------------------------------------------------------------------------------------ restoration


@case("super-image")
def edsr() -> Sample:
    from super_image import EdsrConfig, EdsrModel

    model = EdsrModel(EdsrConfig(scale=2, n_resblocks=3, n_feats=16))
    target = torch.zeros(2, 3, 48, 48)
    return Sample(model, lambda: (torch.rand(2, 3, 24, 24),), lambda image: l1_loss(image, target))


@case("piq")
def denoiser_by_ssim() -> Sample:
    import piq

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid()
    )

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.ssim, self.vif = net, piq.MultiScaleSSIMLoss(kernel_size=3), piq.GMSDLoss()

        def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
            image = self.net(noisy)
            return self.ssim(image, clean) + self.vif(image, clean)

    return Sample(Denoiser(), lambda: (torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96)))


@case("pytorch-msssim")
def autoencoder_by_ms_ssim() -> Sample:
    from pytorch_msssim import MS_SSIM

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid()
            )
            self.ssim = MS_SSIM(data_range=1.0, win_size=5)

        def forward(self, image: Tensor) -> Tensor:
            coded = self.net(image)
            return 1 - self.ssim(coded, image) + mse_loss(coded, image)

    return Sample(Coder(), lambda: (torch.rand(2, 3, 96, 96),))
