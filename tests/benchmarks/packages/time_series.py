"""Forecasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.packages import Sample, case

HORIZON, SEEN = 8, 24


class _Forecast(nn.Module):
    """A model of neuralforecast, called on the windows that its trainer makes."""

    def __init__(self, net: Any, series: int = 1) -> None:
        super().__init__()
        self.net, self.series = net, series

    def forward(self, seen: Tensor, target: Tensor) -> Tensor:
        windows = {
            "insample_y": seen, "insample_mask": torch.ones_like(seen), "futr_exog": None, "hist_exog": None,
            "stat_exog": None,
        }  # fmt: skip
        out = self.net(windows)
        return (out.reshape(target.shape) - target).abs().mean()


def _forecast(name: str, **sizes: Any) -> Sample:
    import neuralforecast.models as models

    kind = getattr(models, name)
    net = kind(h=HORIZON, input_size=SEEN, **sizes)
    return Sample(_Forecast(net), lambda: (torch.randn(32, SEEN, 1), torch.randn(32, HORIZON, 1)))


@case("neuralforecast")
def nbeats() -> Sample:
    return _forecast("NBEATS", mlp_units=[[32, 32]] * 3, n_harmonics=2, n_polynomials=2)


@case("neuralforecast")
def nhits() -> Sample:
    return _forecast("NHITS", mlp_units=[[32, 32]] * 3)


@case("neuralforecast")
def patch_tst() -> Sample:
    return _forecast(
        "PatchTST", hidden_size=16, linear_hidden_size=32, n_heads=4, encoder_layers=2, patch_len=8, stride=4
    )


@case("neuralforecast")
def fed_former() -> Sample:
    """Frequencies chosen by ``numpy.random`` when it is built, complex weights."""
    return _forecast("FEDformer", hidden_size=16, n_head=8, conv_hidden_size=16, modes=4)


@case("neuralforecast")
def autoformer() -> Sample:
    """Delays chosen by an autocorrelation."""
    return _forecast("Autoformer", hidden_size=16, n_head=4, conv_hidden_size=16)


@case("neuralforecast")
def informer() -> Sample:
    """Queries sampled by a draw."""
    return _forecast("Informer", hidden_size=16, n_head=4, conv_hidden_size=16, distil=False)


@case("neuralforecast")
def times_net() -> Sample:
    """Periods found by an FFT, and read."""
    return _forecast("TimesNet", hidden_size=16, conv_hidden_size=16, encoder_layers=1, num_kernels=2)


@case("neuralforecast")
def temporal_fusion() -> Sample:
    return _forecast("TFT", hidden_size=16, n_head=4)


@case("chronos-forecasting")
def chronos_bolt() -> Sample:
    """Quantiles of patches, from a T5."""
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    config = T5Config(
        vocab_size=2, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        chronos_config={
            "context_length": SEEN, "prediction_length": HORIZON, "input_patch_size": 4,
            "input_patch_stride": 4, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True,
        },
        pad_token_id=0, decoder_start_token_id=0, reg_token_id=1,
    )  # fmt: skip
    model = ChronosBoltModelForForecasting(config)
    return Sample(model, lambda: {"context": torch.randn(8, SEEN), "target": torch.randn(8, HORIZON)})
