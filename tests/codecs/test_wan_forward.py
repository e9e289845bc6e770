"""Our order of work against diffusers' own: every VAE layout, chunks of any length.

Legend: B batch, T frames, H, W pixels, C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from turbokernels.testing import assert_within_budget

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.vae import frames_to_pixels
from turbotrain.codecs.wan_forward import decode_chunks, encode_chunks

CHANNELS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "num_res_blocks": 2},
    "2.2": {
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "num_res_blocks": 2,
        "decoder_base_dim": 6,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
    "shapes": {
        "dim_mult": [1, 1, 2],
        "temperal_downsample": [True, True],
        "num_res_blocks": 1,
        "scale_factor_spatial": 4,
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        **LAYOUTS[request.param],
    )
    for name, parameter in vae.eval().requires_grad_(False).named_parameters():
        if name.endswith("gamma"):
            parameter.normal_(1, 0.3)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
    return vae


def stride(vae: AutoencoderKLWan) -> int:
    return 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)


def decoded(vae: AutoencoderKLWan, latents_BCTHW: Tensor, chunk: int) -> Tensor:
    pixels_BTHWC = torch.cat(list(decode_chunks(vae, latents_BCTHW, chunk)), 1)
    return pixels_BTHWC.movedim(-1, 1).clamp(-1, 1)


def encoded(vae: AutoencoderKLWan, frames_BTHWC: Tensor, chunk: int) -> Tensor:
    return torch.cat(list(encode_chunks(vae, frames_BTHWC, chunk)), 1).movedim(-1, 1)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (2, 2, 4, 2), (1, 6, 3, 2)], ids=["one frame", "batch", "six"])
def test_every_chunk_length_gives_what_diffusers_gives(vae: AutoencoderKLWan, shape: tuple[int, ...]) -> None:
    batch, length, height, width = shape
    latents_BCTHW = torch.randn(batch, CHANNELS, length, height, width)
    side = stride(vae)
    frames_BTHWC = torch.randint(0, 256, (batch, 4 * length - 3, side * height, side * width, 3), dtype=torch.uint8)
    wide = copy.deepcopy(vae).double()
    exact_video = wide.decode(latents_BCTHW.double()).sample
    exact_moments = wide.encode(frames_to_pixels(frames_BTHWC, torch.float32).double()).latent_dist.parameters
    plain_video = vae.decode(latents_BCTHW).sample
    plain_moments = vae.encode(frames_to_pixels(frames_BTHWC, torch.float32)).latent_dist.parameters
    for chunk in sorted({1, min(2, length), min(5, length), length}):
        # The largest of two float32 noises of one size; over draws the root mean squares' ratio was 0.4 to 1.1.
        name, factor = f"chunks of {chunk}", 3.0
        assert_within_budget(decoded(vae, latents_BCTHW, chunk), plain_video, exact_video, name, factor)
        assert_within_budget(encoded(vae, frames_BTHWC, chunk), plain_moments, exact_moments, name, factor)


def test_half_precision_is_no_worse_than_diffusers(vae: AutoencoderKLWan) -> None:
    """Both against float64 with the same rounded weights; summed taps of the doubling convolutions are rounded once more."""
    half = copy.deepcopy(vae).bfloat16()
    latents_BCTHW = torch.randn(1, CHANNELS, 3, 2, 3).bfloat16()
    exact = copy.deepcopy(half).double().decode(latents_BCTHW.double()).sample
    assert_within_budget(decoded(half, latents_BCTHW, 2), half.decode(latents_BCTHW).sample, exact)


def test_weights_and_their_layout_stay_as_they_are(vae: AutoencoderKLWan) -> None:
    """Other code saves, trains and moves this module."""
    before = {name: (value.clone(), value.stride()) for name, value in vae.state_dict().items()}
    decoded(vae, torch.randn(1, CHANNELS, 2, 2, 2), 1)
    after = vae.state_dict()
    assert before.keys() == after.keys()
    for name, (value, strides) in before.items():
        assert torch.equal(value, after[name])
        assert after[name].stride() == strides


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_frames_come_in_order_and_in_pieces(vae: AutoencoderKLWan, chunk: int | None) -> None:
    codec = VideoCodec(copy.deepcopy(vae))
    codec.chunk = chunk
    latents_BCTHW = torch.randn(2, CHANNELS, 4, 3, 2)
    together = codec.decode(latents_BCTHW)
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    for clips, frames_BTHWC in codec.decode_stream(latents_BCTHW):
        for clip, frames_THWC in zip(clips, frames_BTHWC):
            pieces[clip].append(frames_THWC.clone())
    assert [len(found) for found in pieces.values()] == [{None: 1, 1: 4, 2: 2}[chunk]] * 2
    assert torch.equal(torch.stack([torch.cat(pieces[clip]) for clip in (0, 1)]), together)
