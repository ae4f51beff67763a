"""Speech, codecs and source separation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case, classes, squares


def _waves(count: int = 2, length: int = 4000) -> Any:
    return lambda: (0.1 * torch.randn(count, length),)


def _frames(count: int = 4, length: int = 60, wide: int = 40) -> Any:
    return lambda: (torch.randn(count, length, wide),)


# ---------------------------------------------------------------------------------------- speechbrain


@case("speechbrain")
def ecapa_speaker() -> Sample:
    """Lengths relative to the longest, masks made from them, an angular margin."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ECAPA_TDNN(
                40, lin_neurons=32, channels=[64, 64, 64, 64, 192], kernel_sizes=[5, 3, 3, 3, 1],
                dilations=[1, 2, 3, 4, 1], attention_channels=16, res2net_scale=4, se_channels=16,
            )  # fmt: skip
            self.head = Classifier(32, out_neurons=4)
            self.loss = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30))

        def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
            return self.loss(self.head(self.net(frames, lengths)), torch.arange(len(frames))[:, None] % 4)

    return Sample(Speaker(), lambda: (torch.randn(8, 60, 40), 0.5 + 0.5 * torch.rand(8)))


@case("speechbrain")
def conformer_encoder() -> Sample:
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
    from speechbrain.nnet.attention import RelPosEncXL

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = RelPosEncXL(40)
            self.net = ConformerEncoder(2, 40, 64, 4, kernel_size=7, dropout=0.1, layerdrop_prob=0.1)

        def forward(self, frames: Tensor) -> Tensor:
            return self.net(frames, pos_embs=self.places(frames))[0]

    return Sample(Encoder(), _frames(), squares)


@case("speechbrain")
def branchformer() -> Sample:
    from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoder
    from speechbrain.nnet.attention import RelPosEncXL

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = RelPosEncXL(40)
            self.net = BranchformerEncoder(2, 40, 4, kernel_size=7, dropout=0.1, csgu_linear_units=64)

        def forward(self, frames: Tensor) -> Tensor:
            return self.net(frames, pos_embs=self.places(frames))[0]

    return Sample(Encoder(), _frames(), squares)


@case("speechbrain")
def sepformer() -> Sample:
    """Chunks of a sequence, turned around between two networks."""
    from speechbrain.lobes.models.dual_path import Dual_Path_Model, SBTransformerBlock

    net = Dual_Path_Model(
        16, 24, SBTransformerBlock(1, 24, 4, 48, dropout=0.1), SBTransformerBlock(1, 24, 4, 48, dropout=0.1),
        num_layers=2, K=10, num_spks=2,
    )  # fmt: skip
    return Sample(net, lambda: (torch.randn(2, 16, 64),), squares)


@case("speechbrain")
def light_gru() -> Sample:
    from speechbrain.nnet.RNN import LiGRU

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = LiGRU(24, (4, 12, 40), dropout=0.2, num_layers=2), nn.Linear(24, 2)

        def forward(self, frames: Tensor) -> Tensor:
            return self.head(self.net(frames)[0].mean(1))

    return Sample(Net(), _frames(4, 12), classes)


# --------------------------------------------------------------------------------------------- codecs


@case("encodec")
def codec() -> Sample:
    """Residual quantizers whose codebooks move in buffers, dead codes replaced."""
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            how: dict[str, Any] = {
                "channels": 1,
                "dimension": 16,
                "n_filters": 4,
                "ratios": [4, 2],
                "lstm": 1,
            }
            self.encode, self.decode = SEANetEncoder(**how), SEANetDecoder(**how)
            self.quantize = ResidualVectorQuantizer(dimension=16, n_q=2, bins=32)

        def forward(self, wave: Tensor) -> Tensor:
            found = self.quantize(self.encode(wave), 100)
            return (self.decode(found.quantized) - wave).pow(2).mean() + found.penalty.mean()

    return Sample(Codec(), lambda: (0.1 * torch.randn(2, 1, 800),))


@case("vocos")
def vocoder() -> Sample:
    """An inverse STFT of a phase and a magnitude."""
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = VocosBackbone(40, 32, 64, 2), ISTFTHead(32, 64, 16)

        def forward(self, mel: Tensor) -> Tensor:
            return self.head(self.net(mel))

    return Sample(Vocoder(), lambda: (torch.randn(4, 40, 50),), squares)


# -------------------------------------------------------------------------------------------- asteroid


@case("asteroid")
def conv_tasnet_permuted() -> Sample:
    """The loss is that of the best assignment of sources."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import ConvTasNet

    class Separated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvTasNet(
                2, n_filters=32, n_blocks=2, n_repeats=1, bn_chan=16, hid_chan=32, skip_chan=16
            )
            self.loss = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")

        def forward(self, sources: Tensor) -> Tensor:
            return self.loss(self.net(sources.sum(1)), sources)

    return Sample(Separated(), lambda: (0.1 * torch.randn(2, 2, 2000),))


@case("asteroid")
def dual_path_rnn() -> Sample:
    from asteroid.models import DPRNNTasNet

    net = DPRNNTasNet(2, n_filters=16, bn_chan=16, hid_size=16, chunk_size=20, n_repeats=1)
    return Sample(net, _waves(2, 2000), squares)


@case("asteroid")
def dual_path_transformer() -> Sample:
    from asteroid.models import DPTNet

    net = DPTNet(2, n_filters=16, chunk_size=20, n_repeats=1, ff_hid=16, in_chan=16)
    return Sample(net, _waves(2, 2000), squares)


# ------------------------------------------------------------------------------------------ torchaudio


@case("torchaudio")
def conformer() -> Sample:
    from torchaudio.models import Conformer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Conformer(40, 4, 64, 2, 7, dropout=0.1)

        def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
            return self.net(frames, lengths)[0]

    return Sample(Net(), lambda: (torch.randn(4, 60, 40), torch.tensor([60, 50, 40, 60])), squares)


@case("torchaudio")
def wav2vec2_layer_drop() -> Sample:
    from torchaudio.models import wav2vec2_model

    net = wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
        extractor_conv_bias=False, encoder_embed_dim=32, encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=16, encoder_pos_conv_groups=4, encoder_num_layers=3, encoder_num_heads=4,
        encoder_attention_dropout=0.1, encoder_ff_interm_features=64, encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1, encoder_layer_norm_first=False, encoder_layer_drop=0.3, aux_num_out=12,
    )  # fmt: skip
    return Sample(net, _waves(2, 800), lambda out: out[0].pow(2).mean())


@case("torchaudio")
def emformer() -> Sample:
    """Segments of a stream, with memory."""
    from torchaudio.models import Emformer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Emformer(40, 4, 64, 2, 8, dropout=0.1, right_context_length=2, max_memory_size=2)

        def forward(self, frames: Tensor) -> Tensor:
            return self.net(frames, torch.full((len(frames),), frames.shape[1]))[0]

    return Sample(Net(), _frames(4, 34), squares)


@case("torchaudio")
def masked_spectrogram() -> Sample:
    """Spectrograms made in the model, with masks over time and frequency."""
    from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mel = MelSpectrogram(8000, n_fft=128, n_mels=24)
            self.mask = nn.Sequential(FrequencyMasking(4), TimeMasking(8))
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 2),
            )

        def forward(self, wave: Tensor) -> Tensor:
            return self.net(self.mask((self.mel(wave) + 1e-6).log())[:, None])

    return Sample(Net(), _waves(4), classes)
