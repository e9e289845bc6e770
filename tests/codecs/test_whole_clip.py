"""Training's way through the VAE gives what diffusers' own way gives, and gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from turbotrain.codecs.whole_clip import posterior, reconstruct
from turbotrain.stages.codec import tiny_vae


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clips_equal_diffusers(frames: int) -> None:
    torch.manual_seed(0)
    vae = tiny_vae().double()
    pixels = torch.rand(1, 3, frames, 16, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels, return_dict=False)[0]
        found = posterior(vae, pixels)
        decoded = vae.decode(expected.mode(), return_dict=False)[0]
        again = reconstruct(vae, expected.mode())
    assert found.parameters.shape == expected.parameters.shape
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-9, atol=1e-9)
    inside = decoded.abs() < 1  # diffusers clamps
    assert inside.any()
    torch.testing.assert_close(again[inside], decoded[inside], rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    vae = tiny_vae()
    pixels = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    reconstruct(vae, posterior(vae, pixels).sample()).square().mean().backward()
    assert [name for name, weight in vae.named_parameters() if weight.grad is None] == []


def test_a_vae_of_wan_22_is_refused() -> None:
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], is_residual=True
    )
    with pytest.raises(ValueError, match="is_residual"):
        posterior(vae, torch.zeros(1, 3, 5, 16, 16))
