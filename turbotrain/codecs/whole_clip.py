"""Wan 2.1's VAE on whole clips at once, with gradients: what its training runs on.

diffusers walks through a clip one latent frame at a time, with caches: of 81 frames that makes 21 times the kernels, most of them
too small for a GPU. Every convolution is causal and pads with nothing but the past, so the whole clip in one go gives the same.

Legend: B batch, C channels, T frames, H, W positions.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def posterior(vae: wan.AutoencoderKLWan, pixels_BCTHW: Tensor) -> DiagonalGaussianDistribution:
    """What the VAE makes of pixels in [-1, 1]: a Gaussian over latents (B, C, T', H', W') that are not normalised yet.

    Raises:
        ValueError: a VAE of Wan 2.2, whose levels have shortcuts around them.
    """
    config, encoder = _config(vae), vae.encoder
    x = wan.patchify(pixels_BCTHW, patch_size=config.patch_size) if config.patch_size else pixels_BCTHW
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        x = _halve(layer, x) if isinstance(layer, wan.WanResample) else layer(x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    return DiagonalGaussianDistribution(vae.quant_conv(x))


def reconstruct(vae: wan.AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W), about [-1, 1] and not clamped, of latents that are not normalised. Raises as `posterior`."""
    config, decoder = _config(vae), vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents_BCTHW)))
    block: Any
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _double(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return wan.unpatchify(x, patch_size=config.patch_size) if config.patch_size else x


def _config(vae: wan.AutoencoderKLWan) -> Any:
    config: Any = vae.config  # diffusers' frozen dictionary, whose entries are also attributes
    if config.is_residual:
        raise ValueError("vae.is_residual=True: only VAEs built like Wan 2.1's are trained here")
    return config


def _each_frame(layers: Any, x_BCTHW: Tensor) -> Tensor:
    """Layers for images, over all frames."""
    out_NCHW = layers(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return out_NCHW.unflatten(0, (x_BCTHW.shape[0], x_BCTHW.shape[2])).transpose(1, 2)


def _halve(block: Any, x_BCTHW: Tensor) -> Tensor:
    """`WanResample` of the encoder: height and width, then (`downsample3d`) all frames but the first, which stands alone."""
    x_BCTHW = _each_frame(block.resample, x_BCTHW)
    if block.mode != "downsample3d" or x_BCTHW.shape[2] == 1:
        return x_BCTHW
    return torch.cat([x_BCTHW[:, :, :1], block.time_conv(x_BCTHW)], dim=2)


def _double(block: Any, x_BCTHW: Tensor) -> Tensor:
    """`WanResample` of the decoder: (`upsample3d`) all frames but the first, which no other looks back at, then the pixels."""
    if block.mode == "upsample3d" and x_BCTHW.shape[2] > 1:
        pairs_BCTHW = block.time_conv(x_BCTHW[:, :, 1:]).unflatten(1, (2, -1))  # B 2 C T H W
        rest_BCTHW = pairs_BCTHW.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x_BCTHW = torch.cat([x_BCTHW[:, :, :1], rest_BCTHW], dim=2)
    return _each_frame(block.resample, x_BCTHW)
