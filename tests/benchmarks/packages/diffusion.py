"""Denoisers and autoencoders of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.benchmarks.packages import Sample, case

# ----------------------------------------------------------------------------------------- diffusers


class _Denoise(nn.Module):
    """Noise added by the package's scheduler, and the net's guess of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.net, self.schedule = net, DDPMScheduler(100)

    def forward(self, image: Tensor, **more: Any) -> Tensor:
        noise = torch.randn_like(image)
        times = torch.randint(0, 100, (len(image),))
        noisy = self.schedule.add_noise(image, noise, times)
        return mse_loss(self.net(noisy, times, **more).sample, noise)


@case("diffusers")
def unet_2d() -> Sample:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, dropout=0.1,
    )  # fmt: skip
    return Sample(_Denoise(net), lambda: (torch.randn(4, 3, 16, 16),))


@case("diffusers")
def unet_2d_conditioned_checkpointed() -> Sample:
    """With the library's own checkpointing on."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=24,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    net.enable_gradient_checkpointing()
    return Sample(
        _Denoise(net),
        lambda: {"image": torch.randn(4, 4, 16, 16), "encoder_hidden_states": torch.randn(4, 6, 24)},
    )


@case("diffusers")
def diffusion_transformer() -> Sample:
    """Class labels dropped by a draw (``dropout_prob`` of the label embedding)."""
    from diffusers import DiTTransformer2DModel

    class Dit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
                sample_size=16, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8,
            )  # fmt: skip

        def forward(self, image: Tensor) -> Tensor:
            times, labels = torch.randint(0, 100, (len(image),)), torch.arange(len(image)) % 10
            return self.net(image, timestep=times, class_labels=labels).sample.pow(2).mean()

    return Sample(Dit(), lambda: (torch.randn(4, 4, 16, 16),))


@case("diffusers")
def autoencoder_kl() -> Sample:
    from diffusers import AutoencoderKL

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = AutoencoderKL(
                block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            )  # fmt: skip

        def forward(self, image: Tensor) -> Tensor:
            latent = self.net.encode(image).latent_dist
            return mse_loss(self.net.decode(latent.sample()).sample, image) + 1e-3 * latent.kl().mean()

    return Sample(Coder(), lambda: (torch.randn(2, 3, 32, 32),))


@case("diffusers")
def vq_model() -> Sample:
    from diffusers import VQModel

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = VQModel(
                block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=32, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            )  # fmt: skip

        def forward(self, image: Tensor) -> Tensor:
            decoded = self.net(image)
            return mse_loss(decoded.sample, image) + decoded.commit_loss.mean()

    return Sample(Coder(), lambda: (torch.randn(2, 3, 32, 32),))


@case("diffusers")
def flux() -> Sample:
    from diffusers import FluxTransformer2DModel

    class Flux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = FluxTransformer2DModel(
                in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
            )  # fmt: skip

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            out = self.net(
                hidden_states=image, encoder_hidden_states=text, pooled_projections=text.mean(1),
                timestep=torch.rand(len(image)), img_ids=torch.zeros(image.shape[1], 3),
                txt_ids=torch.zeros(text.shape[1], 3), guidance=None,
            )  # fmt: skip
            return out.sample.pow(2).mean()

    return Sample(Flux(), lambda: (torch.randn(4, 16, 4), torch.randn(4, 6, 32)))


# ------------------------------------------------------------------------------------------ lucidrains


@case("denoising-diffusion-pytorch")
def gaussian_diffusion() -> Sample:
    """Self conditioning: half of the steps run the net once more without gradients."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(dim=16, dim_mults=(1, 2), flash_attn=False, self_condition=True)
    return Sample(GaussianDiffusion(net, image_size=16, timesteps=50), lambda: (torch.rand(4, 3, 16, 16),))


@case("denoising-diffusion-pytorch")
def elucidated() -> Sample:
    from denoising_diffusion_pytorch import ElucidatedDiffusion, Unet

    net = Unet(dim=16, dim_mults=(1, 2), flash_attn=False, learned_sinusoidal_cond=True)
    return Sample(
        ElucidatedDiffusion(net, image_size=16, num_sample_steps=4), lambda: (torch.rand(4, 3, 16, 16),)
    )


@case("muse-maskgit-pytorch")
def vq_gan_vae() -> Sample:
    from muse_maskgit_pytorch import VQGanVAE

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = VQGanVAE(dim=16, codebook_size=64, layers=2, use_vgg_and_gan=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image, return_loss=True)

    return Sample(Coder(), lambda: (torch.rand(2, 3, 32, 32),))
