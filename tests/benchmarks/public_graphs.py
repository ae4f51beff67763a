"""Training steps that papers on rematerialization show, from the published architectures, and a GRU cell.

``mobilenet``   MobileNet v1 (Howard et al., 2017, table 1).
``vgg``         VGG of 16 or 19 layers (Simonyan and Zisserman, ICLR 2015, table 1, columns D and E).
``segnet``      SegNet (Badrinarayanan et al., TPAMI 2017): VGG16's convolutions, and as many back up,
                unpooled by the indices of the poolings.
``vgg_unet``    the same way down with U-Net's way up (Ronneberger et al., MICCAI 2015): skips are
                concatenated.
``gru_cell``    ``nn.GRUCell`` unrolled, with a loss over the states of all steps: long and thin.

Batches and sizes of images are those of Jain et al., "Checkmate" (MLSys 2020), figures 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "GRUCell",
    "MobileNet",
    "SegNet",
    "Vgg",
    "VggUNet",
    "gru_cell",
    "mobilenet",
    "segnet",
    "vgg",
    "vgg_unet",
]

Step = tuple[nn.Module, dict[str, Tensor]]

# Convolutions per level of VGG, and their channels.
VGG16, VGG19 = (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)
CHANNELS = (64, 128, 256, 512, 512)
CLASSES = 12
SEGMENTED = (416, 608)


def _convolution(ins: int, outs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    """A convolution with a norm and a ReLU."""
    padding = kernel // 2
    convolution = nn.Conv2d(ins, outs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


class MobileNet(nn.Module):
    """MobileNet v1; ``forward(pixels, labels)`` returns the mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _convolution(3, 32, 2)
        self.blocks = nn.ModuleList()
        ins = 32
        plan = [
            (64, 1),
            (128, 2),
            (128, 1),
            (256, 2),
            (256, 1),
            (512, 2),
            *[(512, 1)] * 5,
            (1024, 2),
            (1024, 1),
        ]
        for outs, stride in plan:
            depthwise = _convolution(ins, ins, stride, groups=ins)
            self.blocks.append(nn.Sequential(*depthwise, *_convolution(ins, outs, kernel=1)))
            ins = outs
        self.head = nn.Linear(ins, 1000)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), labels (batch,)."""
        x = self.first(pixels)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


def _levels(depths: Sequence[int], norm: bool) -> Iterator[nn.Sequential]:
    """VGG's convolutions, a level of one resolution at a time."""
    ins = 3
    for depth, outs in zip(depths, CHANNELS, strict=True):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += (
                _convolution(ins, outs) if norm else [nn.Conv2d(ins, outs, 3, 1, 1), nn.ReLU(inplace=True)]
            )
            ins = outs
        yield nn.Sequential(*layers)


class Vgg(nn.Module):
    """VGG without norms; ``forward(pixels, labels)`` returns the mean cross-entropy."""

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_levels(depths, norm=False))
        self.head = nn.Sequential(
            *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, 1000)),
        )

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Pixels (batch, 3, 224, 224), labels (batch,)."""
        x = pixels
        for level in self.levels:
            x = F.max_pool2d(level(x), 2)
        return F.cross_entropy(self.head(x.flatten(1)), labels)


class SegNet(nn.Module):
    """SegNet; ``forward(pixels, masks)`` returns the mean cross-entropy over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_levels(VGG16, norm=True))
        self.up = nn.ModuleList()
        below = (CLASSES, *CHANNELS[:-1])
        for level in reversed(range(len(CHANNELS))):
            channels = CHANNELS[level]
            layers: list[nn.Module] = []
            for _ in range(VGG16[level] - 1):
                layers += _convolution(channels, channels)
            last = (
                nn.Conv2d(channels, CLASSES, 3, 1, 1) if not level else _convolution(channels, below[level])
            )
            self.up.append(nn.Sequential(*layers, last))

    def forward(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), masks (batch, height, width)."""
        x, indices = pixels, []
        for level in self.down:
            y = level(x)
            x, where = F.max_pool2d(y, 2, return_indices=True)
            indices.append((where, y.shape[-2:]))
        for level in self.up:
            where, size = indices.pop()
            x = level(F.max_unpool2d(x, where, 2, output_size=list(size)))
        return F.cross_entropy(x, masks)


class VggUNet(nn.Module):
    """VGG16 down, U-Net up; ``forward(pixels, masks)`` returns the mean cross-entropy over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_levels(VGG16, norm=True))
        self.up = nn.ModuleList()
        ins = CHANNELS[-1]
        for outs in reversed(CHANNELS[:-1]):
            self.up.append(nn.Sequential(*_convolution(ins + outs, outs), *_convolution(outs, outs)))
            ins = outs
        self.head = nn.Conv2d(ins, CLASSES, 1)

    def forward(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), masks (batch, height, width)."""
        x, skips = pixels, []
        for k, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        skips.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return F.cross_entropy(self.head(x), masks)


class GRUCell(nn.Module):
    """``nn.GRUCell`` (Cho et al., EMNLP 2014) over a sequence; the loss reads the state after every step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(width, width), nn.Linear(width, 1)

    def forward(self, signal: Tensor, wanted: Tensor) -> Tensor:
        """Signal (batch, steps, width), wanted (batch, steps); the mean squared error."""
        state = signal.new_zeros(signal.shape[0], signal.shape[2])
        states = []
        for x in signal.unbind(1):
            state = self.cell(x, state)
            states.append(state)
        return F.mse_loss(self.head(torch.stack(states, 1))[..., 0], wanted)


def _labelled(batch: int) -> dict[str, Tensor]:
    return {"pixels": torch.zeros(batch, 3, 224, 224), "labels": torch.zeros(batch, dtype=torch.long)}


def _segmented(batch: int) -> dict[str, Tensor]:
    return {
        "pixels": torch.zeros(batch, 3, *SEGMENTED),
        "masks": torch.zeros(batch, *SEGMENTED, dtype=torch.long),
    }


def mobilenet() -> Step:
    """512 images of 224 x 224."""
    return MobileNet(), _labelled(512)


def vgg(depths: Sequence[int]) -> Step:
    """256 images of 224 x 224."""
    return Vgg(depths), _labelled(256)


def segnet() -> Step:
    """32 images of 416 x 608."""
    return SegNet(), _segmented(32)


def vgg_unet() -> Step:
    """32 images of 416 x 608."""
    return VggUNet(), _segmented(32)


def gru_cell() -> Step:
    """1024 sequences of 40 steps, 512 wide."""
    return GRUCell(512), {"signal": torch.zeros(1024, 40, 512), "wanted": torch.zeros(1024, 40)}
