"""Encoder and decoder of Wan's VAE (2.1 and 2.2) over chunks of frames, with diffusers' weights: see `wan_layers`.

Chunks of any length give the same result up to rounding, for no convolution looks ahead; what differs is memory and speed.

Legend: B batch, T frames, T' latent frames, H, W pixels, H', W' latent positions, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor

from turbotrain.codecs.wan_layers import (
    Pending,
    Stream,
    causal,
    downsample,
    middle,
    normed,
    pointwise,
    residual_block,
    residual_down_block,
    residual_up_block,
    up_block,
)


@torch.no_grad()
def decode_chunks(vae: wan.AutoencoderKLWan, latents_BCTHW: Tensor, chunk: int) -> Iterator[Tensor]:
    """Pixels (B, T, H, W, 3), about [-1, 1] and not clamped, of `chunk` latent frames after the other.

    latents_BCTHW: (B, C, T', H', W'), not normalised, in the VAE's dtype.
    """
    stream, decoder, config = Stream(), vae.decoder, _config(vae)
    climb = residual_up_block if config.is_residual else up_block
    for part_BCTHW in latents_BCTHW.split(_chunk_lengths(latents_BCTHW.shape[2], chunk), 2):
        latents_BTHWC = pointwise(vae.post_quant_conv, part_BCTHW.movedim(1, -1).contiguous())
        x = middle(stream, decoder.mid_block, causal(stream, decoder.conv_in, latents_BTHWC))
        for block in decoder.up_blocks:
            x = climb(stream, block, x)
        pixels_BTHWC = stream.convolve(decoder.conv_out, normed(stream, decoder.norm_out, decoder.conv_out, x))
        del x  # a caller that waits holds no activations
        stream.first = False
        yield _unpatchify(pixels_BTHWC, config.patch_size or 1)


@torch.no_grad()
def encode_chunks(vae: wan.AutoencoderKLWan, frames_BTHWC: Tensor, chunk: int) -> Iterator[Tensor]:
    """Moments (B, T', H', W', 2 C) of the posterior, means before logarithms of variances, `chunk` latent frames at a time.

    frames_BTHWC: (B, T, H, W, 3), uint8 or floating in [-1, 1], with T = stride n + 1; they may be on another device.
    """
    stream, encoder, config = Stream(), vae.encoder, _config(vae)
    stride = 2 ** sum(config.temperal_downsample)
    lengths = [stride * length for length in _chunk_lengths(1 + (frames_BTHWC.shape[1] - 1) // stride, chunk)]
    lengths[0] -= stride - 1  # the first latent frame is of one frame
    for part_BTHWC in frames_BTHWC.split(lengths, 1):
        part_BTHWC = part_BTHWC.to(vae.device)
        if part_BTHWC.dtype == torch.uint8:
            part_BTHWC = part_BTHWC.float() / 127.5 - 1
        x = causal(stream, encoder.conv_in, _patchify(part_BTHWC.to(vae.dtype), config.patch_size or 1))
        for block in encoder.down_blocks:
            x = _down(stream, block, x)
        x = middle(stream, encoder.mid_block, x)
        moments_BTHWC = stream.convolve(encoder.conv_out, normed(stream, encoder.norm_out, encoder.conv_out, x))
        del x
        stream.first = False
        yield pointwise(vae.quant_conv, moments_BTHWC)


def _down(stream: Stream, block: object, x: Pending) -> Pending:
    """Wan 2.1 lists its encoder's layers one by one, 2.2 level by level."""
    if isinstance(block, wan.WanResidualBlock):
        return residual_block(stream, block, x)
    if isinstance(block, wan.WanResample):
        return downsample(stream, block, x)
    assert isinstance(block, wan.WanResidualDownBlock)
    return residual_down_block(stream, block, x)


def _config(vae: wan.AutoencoderKLWan) -> Any:
    """diffusers' frozen dictionary, whose entries are also attributes."""
    return vae.config


def _chunk_lengths(length: int, chunk: int) -> list[int]:
    """How `length` latent frames are split: the first chunk takes what is left over, so that all others are alike."""
    first = (length - 1) % chunk + 1
    return [first, *[chunk] * ((length - first) // chunk)]


def _unpatchify(x_BTHWC: Tensor, patch: int) -> Tensor:
    """(B, T, H, W, 3 patch^2) to (B, T, patch H, patch W, 3)."""
    if patch == 1:
        return x_BTHWC
    parts = x_BTHWC.unflatten(-1, (-1, patch, patch))  # colour, column, row
    return parts.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)


def _patchify(x_BTHWC: Tensor, patch: int) -> Tensor:
    """Inverse of `_unpatchify`."""
    if patch == 1:
        return x_BTHWC
    parts = x_BTHWC.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B T H row W column colour
    return parts.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)
